"""The loop makes exactly its updates, and an interruption changes nothing."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextlat.batch import Batch
from nextlat.config import Config, TrainingConfig
from nextlat.errors import NextLatError
from nextlat.objectives import GPT, Objective, Term
from nextlat.training import loop
from nextlat.training.build import build
from nextlat.training.checkpoint import list_checkpoints, load_state, newest, verify
from nextlat.training.loop import add_counts, micro_batches, summarize, train
from nextlat.training.optimizers import learning_rate, make_optimizer
from nextlat.training.run import RunDirectory
from nextlat.training.trained import load_run
from tests.processes import launch, wait_until
from tests.tiny import ALL, assert_same_weights, files_below, go_on, metrics, run_whole, start, tiny, weights

FIXED = ("data.graphs=fixed", "data.train_size=20")
"""Eight rows a step: the second epoch begins inside the third step."""


@pytest.mark.parametrize("objective", ALL)
def test_a_run_makes_exactly_its_number_of_updates(objective: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = []
    update = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, *args: Any) -> Any:
        updates.append(self.param_groups[0]["lr"])
        return update(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    path = run_whole(tiny(objective, "training.accumulation=2"), runs)
    assert len(updates) == 6
    assert updates == [float(row["learning_rate"]) for row in metrics(path)]
    state = load_state(newest(path))["optimizer"]["state"]
    assert {float(entry["step"]) for entry in state.values()} == {6.0}
    assert [checkpoint.name for checkpoint in list_checkpoints(path / "checkpoints")] == ["step_000000006"]


def test_metrics_have_one_row_a_step_and_evaluations_only_where_they_were_made(runs: Path) -> None:
    rows = metrics(run_whole(tiny("nextlat", "training.steps=7"), runs), timings=True)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6", "7"]
    evaluated = [row["step"] for row in rows if row["eval.whole_path_greedy"]]
    assert evaluated == ["3", "6"]
    for row in rows:
        present = {bool(value) for key, value in row.items() if key.startswith(("eval.", "health."))}
        assert len(present) == 1
        assert all(value for key, value in row.items() if not key.startswith(("eval.", "health.")))
        assert sum(float(value) for key, value in row.items() if key.endswith(".share")) == pytest.approx(1)
        assert row["loss"] == row["ce"]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_the_halves_of_bst_are_logged_over_all_micro_batches(runs: Path) -> None:
    config = tiny("bst", "training.steps=1", "training.accumulation=2")
    (row,) = metrics(run_whole(config, runs))
    task, objective = build(config)
    objective(task.rows(0, 0, 8))
    assert set(objective.logged) == {"next", "prev"}
    for name, part in objective.logged.items():
        assert float(row[name]) == pytest.approx(float(part.sum / part.count), rel=1e-6)
    assert (float(row["next"]) + float(row["prev"])) / 2 == pytest.approx(float(row["pair"]), rel=1e-6)
    assert "next.share" not in row


def test_a_row_of_metrics_is_worth_what_the_objective_says(runs: Path) -> None:
    """The first row, from the objective's own sums on the same rows before any update."""
    config = tiny("nextlat", "training.steps=1")
    (row,) = metrics(run_whole(config, runs))
    task, objective = build(config)
    terms = objective(task.rows(0, 0, 8))
    means = {name: float(term.sum.detach() / term.count) for name, term in terms.items()}
    for name, mean in means.items():
        assert float(row[name]) == pytest.approx(mean, rel=1e-6)
    assert float(row["latent"]) == pytest.approx((means["latent_1"] + means["latent_2"]) / 2, rel=1e-6)
    total = sum(terms[name].weight * mean for name, mean in means.items())
    assert float(row["kl_2.share"]) == pytest.approx(0.5 * means["kl_2"] / total, rel=1e-6)


@pytest.mark.parametrize("graphs", [(), FIXED], ids=["fresh", "fixed"])
@pytest.mark.parametrize("objective", ALL)
def test_a_resumed_run_is_a_straight_run_bit_for_bit(objective: str, graphs: tuple[str, ...], tmp_path: Path) -> None:
    config = tiny(objective, *graphs)
    straight = run_whole(config, tmp_path / "straight")
    broken = run_whole(config, tmp_path / "broken", stop_after=1)
    assert [row["step"] for row in metrics(broken)] == ["1"]
    assert go_on(broken, stop_after=4).step == 4
    assert go_on(broken).finished
    assert_same_weights(straight, broken)
    assert metrics(straight) == metrics(broken)


def test_the_bit_for_bit_comparison_sees_a_lost_optimiser_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("gpt")
    straight = run_whole(config, tmp_path / "straight")
    broken = run_whole(config, tmp_path / "broken", stop_after=3)
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    go_on(broken)
    with pytest.raises(AssertionError):
        assert_same_weights(straight, broken)


class Noisy(GPT):
    """Draws from torch's global generator at every step, as dropout would."""

    def forward(self, batch: Batch, scale: Any = None) -> dict[str, Term]:
        term = super().forward(batch)["ce"]
        return {"ce": term._replace(sum=term.sum * torch.rand(()))}


def test_global_random_numbers_go_on_where_the_checkpoint_was_made(tmp_path: Path) -> None:
    paths = []
    for name, stops in (("straight", [6]), ("broken", [2, 5, 6])):
        run, built = start(tiny("gpt"), tmp_path / name)
        for stop in stops:
            noisy = built._replace(objective=Noisy(build(run.config).objective.model))
            train(run, noisy, resume=True, stop_after=stop, bar=False)
        run.close()
        paths.append(run.path)
    assert_same_weights(*paths)
    assert metrics(paths[0]) == metrics(paths[1])


def test_stopping_where_a_run_already_is_does_nothing(runs: Path) -> None:
    path = run_whole(tiny("gpt"), runs, stop_after=4)
    before = weights(path)
    outcome = go_on(path, stop_after=3)
    assert (outcome.step, outcome.finished) == (4, False)
    assert all(torch.equal(before[name], value) for name, value in weights(path).items())
    assert len(metrics(path)) == 4


def test_resuming_a_run_that_has_no_checkpoint_starts_it_from_the_beginning(tmp_path: Path) -> None:
    config = tiny("gpt")
    straight = run_whole(config, tmp_path / "straight")
    run, _ = start(config, tmp_path / "killed")
    run.close()
    (run.path / "metrics.csv").write_text("step,loss\n1,9.9\n")
    assert go_on(run.path).finished
    assert_same_weights(straight, run.path)
    assert metrics(straight) == metrics(run.path)


@pytest.mark.parametrize("objective", ALL)
def test_accumulation_changes_nothing_but_rounding(objective: str, tmp_path: Path) -> None:
    paths = [run_whole(tiny(objective, f"training.accumulation={parts}"), tmp_path / str(parts)) for parts in (1, 2, 4)]
    whole, *split = (weights(path) for path in paths)
    for other in split:
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=2e-6)
    first, *others = ([float(row["loss"]) for row in metrics(path)] for path in paths)
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("objective", ALL)
def test_micro_batches_are_the_rows_of_the_whole_batch_and_their_counts_add_up(objective: str) -> None:
    config = tiny(objective)
    task, built = build(config)
    for step in (0, 5):
        (whole,) = micro_batches(task, config, step, torch.device("cpu"))
        training = config.training.model_copy(update={"accumulation": 4})
        parts = micro_batches(task, config.model_copy(update={"training": training}), step, torch.device("cpu"))
        assert [len(part.tokens) for part in parts] == [2, 2, 2, 2]
        for place, field in enumerate(Batch._fields):
            if whole[place] is not None:
                assert torch.equal(torch.cat([part[place] for part in parts]), whole[place]), field
        assert add_counts(built, parts) == built.counts(whole)


def test_every_row_of_a_run_has_its_own_key_and_other_seeds_have_others() -> None:
    seen: set[int] = set()
    for seed in (0, 1, 2**32 - 1):
        config = tiny("bst", f"seed={seed}")
        task = build(config).task
        for step in range(3):
            (batch,) = micro_batches(task, config, step, torch.device("cpu"))
            assert batch.keys is not None
            seen |= set(batch.keys.tolist())
    assert len(seen) == 3 * 3 * 8


def test_all_objectives_start_from_the_same_trunk_and_see_the_same_rows() -> None:
    gpt, nextlat, other = (build(config) for config in (tiny("gpt"), tiny("nextlat"), tiny("gpt", "seed=1")))
    names = dict(gpt.objective.model.named_parameters())
    assert len(names) == 12
    twin = dict(nextlat.objective.model.named_parameters())
    assert all(torch.equal(value, twin[name]) for name, value in names.items())
    strange = dict(other.objective.model.named_parameters())
    assert not torch.equal(names["lm_head.weight"], strange["lm_head.weight"])
    for step in (0, 3):
        assert torch.equal(gpt.task.rows(step, 0, 8).tokens, nextlat.task.rows(step, 0, 8).tokens)
        assert not torch.equal(gpt.task.rows(step, 0, 8).tokens, other.task.rows(step, 0, 8).tokens)


def settings(**options: Any) -> TrainingConfig:
    return TrainingConfig(**({"steps": 100, "batch_size": 1, "learning_rate": 0.8} | options))


def test_warm_up_rises_in_equal_steps_and_its_first_step_is_not_zero() -> None:
    """Other implementations begin at 0 and lose the first update."""
    for schedule in ("constant", "cosine", "wsd"):
        training = settings(warmup_steps=4, schedule=schedule, decay_steps=10 if schedule == "wsd" else 0)
        assert [learning_rate(training, step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_constant_stays() -> None:
    assert {learning_rate(settings(), step) for step in range(100)} == {0.8}


def test_cosine_falls_to_its_floor_over_what_the_warm_up_leaves() -> None:
    training = settings(schedule="cosine", warmup_steps=20, min_lr_ratio=0.1)
    at = {step: learning_rate(training, step) for step in (20, 40, 60, 80, 99)}
    half_sqrt = math.sqrt(2) / 2
    assert at[20] == pytest.approx(0.8)
    assert at[40] == pytest.approx(0.8 * (0.1 + 0.9 * (1 + half_sqrt) / 2))
    assert at[60] == pytest.approx(0.44)
    assert at[80] == pytest.approx(0.8 * (0.1 + 0.9 * (1 - half_sqrt) / 2))
    assert at[99] == pytest.approx(0.0802775, abs=1e-6)


def test_cosine_stays_at_its_floor_after_the_steps_of_its_fall() -> None:
    training = settings(schedule="cosine", warmup_steps=20, decay_steps=40, min_lr_ratio=0.25)
    at = [learning_rate(training, step) for step in range(100)]
    assert at[20] == pytest.approx(0.8)
    assert at[40] == pytest.approx(0.5)  # half way between 0.8 and 0.2
    assert at[59] > 0.2
    assert at[60:] == pytest.approx([0.2] * 40)


def test_wsd_stays_and_falls_linearly_to_its_floor() -> None:
    training = settings(schedule="wsd", warmup_steps=2, decay_steps=10, min_lr_ratio=0.25)
    at = [learning_rate(training, step) for step in range(100)]
    assert set(at[2:91]) == {0.8}
    assert at[91:] == pytest.approx([0.72, 0.64, 0.56, 0.48, 0.4, 0.32, 0.24, 0.2, 0.2])


@pytest.mark.parametrize("objective", ALL)
def test_only_matrices_decay(objective: str) -> None:
    config = tiny(objective, "training.weight_decay=0.3")
    module = build(config).objective
    optimizer = make_optimizer(module, config.training)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in spared["params"])
    assert spared["params"]
    covered = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert covered == {id(p) for p in module.parameters()}
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)


def test_the_first_update_is_adamw_by_hand(runs: Path) -> None:
    """w (1 - rate decay) - rate g / (|g| + eps) on matrices, without the decay on gains."""
    config = tiny("gpt", "training.steps=1", "training.warmup_steps=0", "training.weight_decay=0.5")
    task, objective = build(config)
    start_values = {name: p.detach().clone() for name, p in objective.model.named_parameters()}
    term = objective(task.rows(0, 0, 8))["ce"]
    (term.sum / term.count).backward()
    after = weights(run_whole(config, runs))
    for name, parameter in objective.model.named_parameters():
        grad, old = parameter.grad, start_values[name]
        assert grad is not None
        decay = 0.5 if parameter.ndim >= 2 else 0.0
        expected = old * (1 - 1e-3 * decay) - 1e-3 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(after[f"model.{name}"], expected, rtol=1e-5, atol=1e-6)


def test_the_logged_norm_is_that_before_clipping_and_clipping_limits_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []

    def plain_step(self: torch.optim.AdamW, *args: Any) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        used.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", plain_step)
    for clip, limit in (("null", None), ("0.25", 0.25), ("1000", None)):
        used.clear()
        path = run_whole(tiny("nextlat", f"training.clip={clip}", "training.steps=2"), tmp_path / clip)
        norms = [float(row["grad_norm"]) for row in metrics(path)]
        assert all(norm > 0.25 for norm in norms)
        assert used == pytest.approx([limit or norm for norm in norms], rel=1e-4)


class Poisoned(GPT):
    """Cross-entropy plus a term that turns bad at one step."""

    steps_made = 0
    bad_step = 5
    value = float("nan")

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return super().counts(batch) | {"extra": torch.tensor(1)}

    def forward(self, batch: Batch, scale: Any = None) -> dict[str, Term]:
        self.steps_made += 1
        factor = self.value if self.steps_made == self.bad_step else 1.0
        extra = self.model.head_weight.square().sum() * factor
        return super().forward(batch) | {"extra": Term(extra, torch.tensor(1), 1.0)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_term_that_is_not_finite_stops_training_before_it_reaches_the_weights(value: float, runs: Path) -> None:
    config = tiny("gpt", "evaluation.health=false")
    run, built = start(config, runs)
    poisoned = Poisoned(built.objective.model)
    poisoned.value = value
    with pytest.raises(NextLatError) as caught:
        train(run, built._replace(objective=poisoned), bar=False)
    run.close()
    checkpoint = run.path / "checkpoints" / "step_000000003"
    assert f"extra is {value} at step 5" in str(caught.value)
    assert f"last good checkpoint is {checkpoint}" in str(caught.value)
    assert list_checkpoints(run.checkpoints) == [checkpoint]
    verify(checkpoint)
    assert all(torch.isfinite(p).all() for p in poisoned.parameters())
    assert [row["step"] for row in metrics(run.path)] == ["1", "2", "3", "4"]


def test_a_gradient_that_is_not_finite_stops_training_too(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.inf

    class Torn(GPT):
        def forward(self, batch: Batch, scale: Any = None) -> dict[str, Term]:
            term = super().forward(batch)["ce"]
            return {"ce": term._replace(sum=Infinite.apply(term.sum))}

    run, built = start(tiny("gpt"), runs)
    torn = Torn(built.objective.model)
    with pytest.raises(NextLatError, match=r"grad_norm is (nan|inf) at step 1; .* no checkpoint was written yet"):
        train(run, built._replace(objective=torn), bar=False)
    run.close()
    assert all(torch.isfinite(p).all() for p in torn.parameters())


def names(path: Path) -> list[str]:
    return [checkpoint.name.removeprefix("step_").lstrip("0") for checkpoint in list_checkpoints(path / "checkpoints")]


def test_save_last_and_every_keep_the_right_checkpoints(tmp_path: Path) -> None:
    for keep, kept in (("last", ["7"]), ("every", ["2", "4", "6", "7"])):
        path = run_whole(
            tiny("gpt", "training.steps=7", "training.save_every=2", f"training.save={keep}"), tmp_path / keep
        )
        assert names(path) == kept
        assert files_below(path / "checkpoints")[0] == f"step_00000000{kept[0]}"
        for checkpoint in list_checkpoints(path / "checkpoints"):
            assert verify(checkpoint)["step"] == int(checkpoint.name[-9:])


def test_save_best_keeps_the_newest_and_the_best_by_the_headline_metric(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nextlat.training.loop as loop
    from nextlat.statistics import Metric

    scores = iter([0.1, 0.7, 0.7, 0.3, 0.5])
    monkeypatch.setattr(loop, "headline", lambda subject: {"whole_path_greedy": Metric(next(scores)), "z": Metric(9.0)})
    options = ["training.steps=11", "training.evaluate_every=2", "training.save_every=3", "training.save=best"]
    path = run_whole(tiny("gpt", *options), runs, stop_after=5)
    assert names(path) == ["4", "5"]
    go_on(path)
    assert names(path) == ["4", "11"]
    assert load_run(path).step == 11
    assert load_run(path, which="best").step == 4
    assert [row["eval.whole_path_greedy"] for row in metrics(path)][1::2] == ["0.1", "0.7", "0.7", "0.3", "0.5"]


def test_without_save_best_there_is_no_best_checkpoint_to_ask_for(runs: Path) -> None:
    path = run_whole(tiny("gpt"), runs)
    with pytest.raises(NextLatError, match=r"no best checkpoint; train with training\.save=best"):
        load_run(path, which="best")


def command(config: Config, runs_dir: Path, *more: str) -> list[str]:
    """Arguments that train a configuration from its own file."""
    import yaml

    file = runs_dir / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(config.plain()))
    return ["train", str(file), "--runs-dir", str(runs_dir), *more]


def steps_of(path: Path) -> int:
    file = path / "metrics.csv"
    return max(0, file.read_text().count("\n") - 1) if file.is_file() else 0


def test_a_signal_saves_and_leaves_and_the_resumed_run_is_the_straight_one(tmp_path: Path, runs: Path) -> None:
    """Real processes; SIGTERM and SIGINT leave with 128 + their number."""
    config = tiny("nextlat", "training.steps=5000", "training.evaluate_every=null")
    children: dict[signal.Signals, tuple[Path, subprocess.Popen[str]]] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = runs / number.name
        folder.mkdir()
        arguments = [sys.executable, "-m", "nextlat", *command(config, folder)]
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        children[number] = folder / "tiny", child
    for number, (path, child) in children.items():
        while steps_of(path) < 5:
            assert child.poll() is None, child.communicate()[0]
            time.sleep(0.005)
        child.send_signal(number)
    for number, (path, child) in children.items():
        text, _ = child.communicate()
        assert child.returncode == 128 + number
        step = int(newest(path).name.removeprefix("step_"))
        assert f"stopped at step {step}; go on with: nextlat train --resume {path}" in text
        assert step >= 5
        assert [int(row["step"]) for row in metrics(path)] == list(range(1, step + 1))
        assert go_on(path, stop_after=step + 3).step == step + 3
        straight = run_whole(config, tmp_path / f"straight{number}", stop_after=step + 3)
        assert_same_weights(straight, path)
        assert metrics(straight) == metrics(path)


def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint_and_loses_nothing(tmp_path: Path, runs: Path) -> None:
    """SIGKILL at moments spread over a run that saves after every step; each resume starts from verified files."""
    config = tiny("nextlat", "training.steps=120", "training.save_every=1", "training.evaluate_every=50")
    path, log = runs / "tiny", tmp_path / "log"
    arguments = command(config, runs)
    reached = [0]
    generator = torch.Generator().manual_seed(0)
    for kill in range(12):
        process = launch(arguments, log)
        done = steps_of(path)
        delay = float(torch.rand((), generator=generator))
        if kill % 3 == 2:
            time.sleep(0.2 * delay)  # while it starts
        else:
            wait_until(lambda at=done: steps_of(path) not in (0, at), process)  # type: ignore[misc]
            time.sleep(0.03 * delay)
        process.kill()
        process.join()
        checkpoints = list_checkpoints(path / "checkpoints")
        for checkpoint in checkpoints:
            verify(checkpoint)
        if checkpoints:
            reached.append(int(checkpoints[-1].name.removeprefix("step_")))
        if path.exists():
            arguments = ["train", "--resume", str(path)]
    assert reached == sorted(reached)
    assert 0 < reached[-1] < 120
    last = reached[-1] + 2
    assert go_on(path, stop_after=last).step == last
    straight = run_whole(config, tmp_path / "straight", stop_after=last)
    assert_same_weights(straight, path)
    assert metrics(straight) == metrics(path)
    assert not [name for name in files_below(path) if Path(name).name.startswith(".")]
    assert "Traceback" not in log.read_text()


def test_a_second_process_on_a_run_directory_is_refused(tmp_path: Path, runs: Path) -> None:
    config = tiny("gpt", "training.steps=100000", "training.evaluate_every=null")
    first = launch(command(config, runs), tmp_path / "first")
    try:
        wait_until(lambda: steps_of(runs / "tiny") > 2, first)
        second = launch(["train", "--resume", str(runs / "tiny"), "--stop-after", "1"], tmp_path / "second")
        second.join()
        assert second.exitcode == 1
        said = (tmp_path / "second").read_text()
        assert said == f"error: run directory {runs / 'tiny'} is being used by another process; wait for it\n"
        with pytest.raises(NextLatError, match="is in use"):
            RunDirectory.create(config, runs, {})
    finally:
        assert first.pid is not None
        os.kill(first.pid, signal.SIGTERM)
        first.join()
    assert first.exitcode == 143
    rows = metrics(runs / "tiny")
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert go_on(runs / "tiny", stop_after=len(rows) + 1).step == len(rows) + 1


def test_a_row_of_metrics_divides_sums_by_counts_and_groups_horizon_steps() -> None:
    sums = {"ce": torch.tensor(6.0), "kl_1": torch.tensor(2.0), "kl_2": torch.tensor(0.0)}
    counts = {"ce": torch.tensor(3), "kl_1": torch.tensor(4), "kl_2": torch.tensor(0)}
    row = summarize(sums, counts, {"ce": 1.0, "kl_1": 0.5, "kl_2": 0.5}, horizon=2)
    assert row == {
        "loss": 2.0,
        "ce": 2.0,
        "kl_1": 0.5,
        "kl_2": 0.0,
        "kl": 0.25,
        "ce.share": 2.0 / 2.25,
        "kl_1.share": 0.25 / 2.25,
        "kl_2.share": 0.0,
    }


def test_a_deterministic_run_says_so_to_torch(runs: Path) -> None:
    asked: list[bool] = []

    class Looking(GPT):
        def forward(self, batch: Batch, scale: Any = None) -> dict[str, Term]:
            asked.append(torch.are_deterministic_algorithms_enabled())
            return super().forward(batch)

    def look(config: Config, name: str) -> None:
        run, built = start(config, runs / name)
        objective: Objective = Looking(built.objective.model)
        train(run, built._replace(objective=objective), stop_after=1, bar=False)
        run.close()

    look(tiny("gpt"), "usual")
    look(tiny("gpt", "training.deterministic=true"), "deterministic")
    assert asked == [False, True]


def test_bf16_rounds_the_forward_pass_a_little(runs: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        path = run_whole(tiny("nextlat", f"training.precision={precision}", "training.steps=1", name=precision), runs)
        losses.append([float(metrics(path)[0][name]) for name in ("ce", "latent_1", "kl_1")])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_tokens_a_second_count_all_passes_of_a_step(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(ticks)))
    path = run_whole(tiny("gpt", "training.accumulation=2", "training.steps=2"), runs)
    for row in metrics(path, timings=True):
        assert float(row["tokens_per_second"]) == 8 * 25  # batch 8, 25 tokens a row, one tick


def test_bf16_runs_and_keeps_fp32_weights(runs: Path) -> None:
    path = run_whole(tiny("nextlat", "training.precision=bf16", "training.steps=2"), runs)
    assert {value.dtype for value in weights(path).values()} == {torch.float32}
    assert math.isfinite(float(metrics(path)[-1]["loss"]))
