"""The command: instant help, ready commands that work, and errors a user can act on."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nextlat.cli import app, main
from nextlat.config import packaged
from nextlat.training import estimate
from nextlat.training.run import RunDirectory
from tests.processes import launch
from tests.tiny import files_below, go_on, metrics, overrides, run_whole, tiny

COMMANDS = sorted(command.name or str(command.callback.__name__) for command in app.registered_commands)  # type: ignore[union-attr]


class Said(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Said]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Runs the command in this process, in an empty folder; anything but a clean exit fails the test."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["nextlat", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return Said(int(caught.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained runs that tests copy."""
    folder = tmp_path_factory.mktemp("finished")
    return {objective: run_whole(tiny(objective, name=objective), folder) for objective in ("gpt", "nextlat")}


@pytest.fixture
def copied(finished: dict[str, Path], runs: Path) -> Callable[[str], Path]:
    return lambda objective: Path(shutil.copytree(finished[objective], runs / objective))


def assert_error(said: Said, *parts: str) -> None:
    """Exit code 1 and a short message without a traceback."""
    assert said.code == 1, said
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    for part in parts:
        assert part in said.err


def test_help_of_the_command_and_of_every_subcommand_does_not_load_torch() -> None:
    code = f"""
import sys
from nextlat.cli import main
for command in {COMMANDS}:
    for arguments in (["--help"], [command, "--help"], ["configs"]):
        sys.argv = ["nextlat", *arguments]
        try:
            main()
        except SystemExit as leaving:
            assert not leaving.code
print("loaded", sorted({{"torch", "matplotlib"}} & sys.modules.keys()))
import nextlat
nextlat.Batch
print("control", "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loaded []" in done.stdout
    assert "control True" in done.stdout
    assert done.stdout.count("Usage: nextlat") == 2 * len(COMMANDS)


def test_every_command_of_the_library_is_there() -> None:
    assert set(COMMANDS) >= {"configs", "demo", "evaluate", "fit-dynamics", "report", "sweep", "train"}


def test_a_bare_command_prints_help(cli: Cli) -> None:
    said = cli()
    assert all(command in said.out + said.err for command in COMMANDS)


def test_configs_prints_every_name_with_its_header(cli: Cli) -> None:
    said = cli("configs")
    assert said.code == 0
    for name, file in packaged().items():
        first = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert f"{name}\n    {first}\n" in said.out


def test_configs_with_a_name_prints_the_file(cli: Cli, tmp_path: Path) -> None:
    text = packaged()["path_star/mini"].read_text(encoding="utf-8")
    assert cli("configs", "path_star/mini").out.strip() == text.strip()
    own = tmp_path / "own.yaml"
    own.write_text(text, encoding="utf-8")
    assert cli("configs", own).out.strip() == text.strip()
    assert_error(cli("configs", "path_star/mimi"), "did you mean 'path_star/mini'")


def dry_run(cli: Cli, command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Plain and auxiliary parameters that a dry run prints; the timing trial is left out."""
    monkeypatch.setattr(estimate, "_trial", lambda config, depth, rows, device: (1.0 + depth, 1000 * depth))
    words = command.split()
    assert words[:2] == ["nextlat", "train"]
    said = cli(*words[1:], "--dry-run")
    assert said.code == 0, said
    found = re.search(r"# parameters ([\d,]+) \(plain model ([\d,]+), beside it ([\d,]+)\)", said.out)
    assert found, said.out
    total, plain, beside = (int(text.replace(",", "")) for text in found.groups())
    assert total == plain + beside
    return plain, beside


def trunk_parameters(layers: int, width: int, inner: int, vocabulary: int) -> int:
    block = 4 * width * width + 3 * width * inner + 2 * width
    return layers * block + width + 2 * vocabulary * width


PUBLISHED = {"gpt": 21_323_904, "nextlat": 21_914_496, "mtp": 26_635_776, "jtp": 21_914_945, "bst": 47_286_528}
"""Parameters at 12 layers of width 384, 105 tokens and horizon 3, worked out by hand."""

TRUNKS = {
    "path_star/mini": trunk_parameters(6, 64, 128, 15),
    "tiny_stories/mini": trunk_parameters(3, 96, 256, 1000),
    "tiny_stories/paper": trunk_parameters(8, 768, 2048, 1000),
    "fineweb_edu/mini": trunk_parameters(4, 128, 384, 1000),
}
TOO_LARGE = ("fineweb_edu/100m", "fineweb_edu/1b")


def test_every_printed_command_builds_models_of_the_published_size(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = cli("configs", "--commands").out.split("\n")[:-1]
    assert {line.split()[2] for line in commands} == set(packaged())
    assert len(commands) == len(set(commands))
    totals = {}
    for command in commands:
        _, _, name, objective = command.split()
        if name in TOO_LARGE:  # to be built here
            continue
        plain, beside = dry_run(cli, command, monkeypatch)
        assert plain == TRUNKS.get(name, trunk_parameters(12, 384, 1024, 105)), command
        assert (beside == 0) == (objective == "objective=gpt"), command
        totals[name, objective.removeprefix("objective=")] = plain + beside
    assert {objective: totals["path_star/g5_5", objective] for objective in PUBLISHED} == PUBLISHED
    assert files_below(Path.cwd()) == []


def test_a_dry_run_estimates_cost_by_a_trial_and_writes_nothing(cli: Cli) -> None:
    said = cli("train", "path_star/mini", *overrides(), "--dry-run")
    found = re.search(r"# estimate on this machine: ([\d.e-]+) s a step, ([\d.e-]+) h for 6 steps", said.out)
    assert found, said.out
    assert float(found[1]) > 0
    assert float(found[2]) == pytest.approx(float(found[1]) * 6 / 3600, rel=0.01)
    assert f"# hash {tiny().hash()}" in said.out
    assert "vocabulary 15, rows of 25 tokens" in said.out
    assert files_below(Path.cwd()) == []


@pytest.mark.parametrize("name", ["path_star/g2_10", "path_star/g5_5", "path_star/g7_7"])
def test_paper_scale_configurations_run(cli: Cli, name: str) -> None:
    """Two whole steps, checkpoint and final measurements; only rows and graphs are fewer."""
    fewer = ["training.steps=2", "training.batch_size=2", "data.train_size=200", "data.test_size=4"]
    for objective in ("gpt", "nextlat"):
        said = cli("train", name, f"objective={objective}", *fewer, "name=short")
        assert said.code == 0
        assert [row["step"] for row in metrics(Path("runs/short"))] == ["1", "2"]
        found = files_below(Path("runs/short/evaluations"))
        assert found == ["accuracy.json", "rank.json"]
        shutil.rmtree("runs/short")


def test_train_then_evaluate_then_resume(cli: Cli) -> None:
    said = cli("train", "path_star/mini", *overrides(), "--stop-after", "4")
    assert (said.code, "stopped at step 4; go on with: nextlat train --resume runs/tiny" in said.out) == (0, True)
    said = cli("train", "path_star/mini", *overrides(), "--resume", "runs/tiny")
    assert said.code == 0
    assert [int(row["step"]) for row in metrics(Path("runs/tiny"))] == [1, 2, 3, 4, 5, 6]
    said = cli("evaluate", "runs/tiny", "accuracy", "rank", "rollout")
    assert said.code == 0
    assert "effective_rank" in said.out
    assert files_below(Path("runs/tiny/evaluations")) == ["accuracy.json", "rank.json", "rollout.json"]
    assert cli("evaluate", "runs/tiny", "--split", "train").code == 0
    assert "accuracy-train.json" in files_below(Path("runs/tiny/evaluations"))


BAD = [
    (["sead=3"], ["sead: unknown key; did you mean 'seed'"]),
    (["training.step=3"], ["training.step: unknown key; did you mean 'steps'"]),
    (["training.steps=many"], ["training.steps is 'many'", "integer"]),
    (["model.width=16.5"], ["model.width is 16.5", "integer"]),
    (["model.n_heads=3"], ["n_heads = 3", "width = 16", "multiple of 6"]),
    (["model.n_heads=16"], ["n_heads = 16", "width = 16", "multiple of 32"]),
    (["objective.horizon=25"], ["horizon = 25", "rows have 25", "at most 24"]),
    (["objective.dynamics.hidden_dim=0"], ["dynamics.hidden_dim is 0", "greater than or equal to 1"]),
    (["data.degree=4"], ["G(4,4) has 13 nodes and only 10 labels", "data.nodes to at least 13"]),
    (["data.nodes=8", "data.length=3", "data.graphs=fixed"], ["graphs are asked for", "lower data.train_size"]),
    (["training.accumulation=3"], ["accumulation = 3 does not divide batch_size = 8"]),
    (["objective.latent_weight=0", "objective.kl_weight=0"], ["are all 0; set one above 0"]),
    (["objective.kl_weight=.nan"], ["objectives.nextlat.kl_weight is nan"]),
    (["objective=nextlatt"], ["unknown objective 'nextlatt'; did you mean 'nextlat'"]),
    (["task=path_stars"], ["unknown task 'path_stars'; did you mean 'path_star'"]),
    (["evaluation.after=[acuracy]"], ["unknown evaluation 'acuracy'; did you mean 'accuracy'"]),
    (["model.width=[1"], ["model.width is not valid YAML"]),
    (["seed"], ["'seed' is not an override; write key=value"]),
]
LATE = [
    (["evaluation.split=tets"], ["no split 'tets'; choose test or train"]),
    (["training.track=[wandb]"], ['pip install "nextlat[track]"']),
    (["--runs-dir", "file/below"], ["creating run directory file/below/tiny is not permitted", "--runs-dir"]),
    (["--runs-dir", "file"], ["creating run directory file/tiny failed: File exists"]),
    ([f"name={'n' * 300}"], ["at most 200 characters"]),
]
"""What a dry run has no reason to look at."""


@pytest.mark.parametrize(("arguments", "said"), [*BAD, *LATE])
def test_bad_input_is_refused_before_anything_is_written(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    Path("file").touch()
    assert_error(cli("train", "path_star/mini", *overrides(), *arguments), *said)
    assert [name for name in files_below(Path.cwd()) if name not in ("file", "runs")] == []


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_a_dry_run_refuses_bad_input_too(cli: Cli, arguments: list[str], said: list[str]) -> None:
    assert_error(cli("train", "path_star/mini", *overrides(), *arguments, "--dry-run"), *said)
    assert files_below(Path.cwd()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(cli: Cli) -> None:
    assert_error(
        cli("train", "path_star/mini", "training.device=cuda"), "training.device is cuda", "device=auto or cpu"
    )
    assert files_below(Path.cwd()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_runs_folder_is_refused(cli: Cli) -> None:
    Path("locked").mkdir(mode=0o500)
    said = cli("train", "path_star/mini", *overrides(), "--runs-dir", "locked")
    assert_error(said, "creating run directory locked/tiny is not permitted (Permission denied)", "--runs-dir")
    assert files_below(Path.cwd()) == ["locked"]


def test_a_file_that_is_no_configuration_is_refused(cli: Cli) -> None:
    Path("list.yaml").write_text("- 1\n")
    Path("broken.yaml").write_text("model: {")
    assert_error(cli("train", "list.yaml"), "list.yaml holds a list, not a mapping")
    assert_error(cli("train", "broken.yaml"), "broken.yaml is not valid YAML")
    assert_error(cli("train", "missing.yaml"), "there is no configuration file missing.yaml")
    assert_error(cli("train"), "name a configuration")
    assert files_below(Path.cwd()) == ["broken.yaml", "list.yaml"]


def test_a_run_directory_in_use_is_refused_and_left_alone(cli: Cli, copied: Callable[[str], Path]) -> None:
    run = copied("gpt")
    before = {name: (run / name).stat().st_mtime_ns for name in files_below(run)}
    said = cli("train", "path_star/mini", *overrides("gpt", name="gpt"), "--runs-dir", run.parent)
    assert_error(said, f"run directory {run} is in use", f"--resume {run}", "another name=")
    assert {name: (run / name).stat().st_mtime_ns for name in files_below(run)} == before
    assert files_below(run.parent)[0] == "gpt"


def test_resuming_with_another_configuration_is_refused_with_the_difference(
    cli: Cli, copied: Callable[[str], Path]
) -> None:
    run = copied("gpt")
    said = cli("train", "path_star/mini", *overrides("gpt", "training.steps=7"), "--resume", run)
    assert_error(said, "was started with another configuration (training.steps: 6 there, 7 asked for)")
    assert_error(cli("train", "--resume", run, "seed=3"), "leave the overrides out")
    assert len(metrics(run)) == 6


def test_resuming_what_is_no_run_is_refused(cli: Cli) -> None:
    assert_error(cli("train", "--resume", "nothing"), "nothing is not a run directory: it has no config.yaml")
    assert files_below(Path.cwd()) == []


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(
    cli: Cli, copied: Callable[[str], Path], file: str, damage: str
) -> None:
    run = copied("gpt")
    path = run / "checkpoints" / "step_000000006" / file
    whole = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    for command in (["evaluate", run], ["fit-dynamics", run], ["train", "--resume", run]):
        said = cli(*command)
        assert_error(said, str(path.parent), f"delete {path.parent} to fall back to an older checkpoint")
    assert not path.exists() or path.read_bytes() == whole[: len(whole) // 2]
    assert len(metrics(run)) == 6


def test_a_run_without_any_checkpoint_is_refused(cli: Cli, copied: Callable[[str], Path]) -> None:
    run = copied("gpt")
    shutil.rmtree(run / "checkpoints" / "step_000000006")
    assert_error(cli("evaluate", run), f"{run} has no checkpoint; train it first")


def test_an_unknown_measurement_is_refused_before_any_other_is_made(cli: Cli, copied: Callable[[str], Path]) -> None:
    run = copied("gpt")
    before = files_below(run)
    assert_error(cli("evaluate", run, "rank", "rollot"), "unknown evaluation 'rollot'; did you mean 'rollout'")
    assert_error(cli("evaluate", run, "--dynamics", "postoc"), "--dynamics is 'postoc'; choose own or posthoc")
    assert_error(cli("evaluate", run, "--checkpoint", "bset"), "--checkpoint is 'bset'; choose newest or best")
    assert_error(cli("evaluate", run, "--checkpoint", "best"), "no best checkpoint; train with training.save=best")
    assert_error(cli("evaluate", run, "--split", "tets"), "no split 'tets'")
    assert files_below(run) == before


def test_rolling_a_model_without_dynamics_says_how_to_fit_one(cli: Cli, copied: Callable[[str], Path]) -> None:
    run = copied("gpt")
    before = files_below(run)
    assert_error(cli("evaluate", run, "rollout"), "fit-dynamics RUN", "--dynamics posthoc")
    assert_error(
        cli("evaluate", run, "rollout", "--dynamics", "posthoc"),
        "posthoc/dynamics.safetensors does not exist",
        f"nextlat fit-dynamics {run}",
    )
    assert files_below(run) == before


def test_fit_dynamics_then_rollout_works_for_gpt(cli: Cli, copied: Callable[[str], Path]) -> None:
    run = copied("gpt")
    said = cli("fit-dynamics", run, "--steps", "3", "--hidden-dim", "8")
    assert said.code == 0
    assert "at step 3" in said.out
    assert cli("evaluate", run, "rollout", "--dynamics", "posthoc").code == 0
    assert files_below(run / "evaluations") == ["rollout-posthoc.json"]


def test_a_sweep_is_planned_without_running(cli: Cli) -> None:
    said = cli("sweep", "path_star/mini", "objective=gpt,nextlat", "seed=0..1", "--dry-run")
    assert said.code == 0
    assert [line.split()[::2] for line in said.out.splitlines()] == [
        [f"path_star-mini-{objective}-s{seed}", "new"] for objective in ("gpt", "nextlat") for seed in (0, 1)
    ]
    assert_error(cli("sweep", "path_star/mini", "objective=gpt,nextlatt"), "did you mean 'nextlat'")
    assert files_below(Path.cwd()) == []


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes flushing any file whose path has a certain part fail as on a full disk."""
    parts: list[str] = []
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if any(part in path for part in parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    yield parts.append
    parts.clear()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
@pytest.mark.parametrize("file", ["config.yaml", "environment.json"])
def test_a_disk_that_is_full_at_the_start_leaves_no_run(cli: Cli, full_disk: Callable[[str], None], file: str) -> None:
    full_disk(file)
    assert_error(
        cli("train", "path_star/mini", *overrides()), "the disk is full while writing", file, "free some space"
    )
    assert files_below(Path.cwd()) == ["runs"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "manifest.json"])
def test_a_disk_that_fills_while_saving_keeps_the_old_checkpoint(
    cli: Cli, full_disk: Callable[[str], None], file: str
) -> None:
    assert cli("train", "path_star/mini", *overrides("gpt"), "--stop-after", "3").code == 0
    full_disk(f".writing-step_000000006/{file}" if file != "manifest.json" else ".manifest.json")
    said = cli("train", "--resume", "runs/tiny")
    assert_error(said, "the disk is full while writing", "step_000000006", "free some space and resume")
    assert [path.name for path in Path("runs/tiny/checkpoints").iterdir()] == ["step_000000003"]


def test_a_limit_on_file_size_is_met_without_a_traceback_and_resumed_from(tmp_path: Path, runs: Path) -> None:
    """The safetensors writer is not Python: its failures are not OSErrors. The same run then ends as a straight one."""
    log = tmp_path / "log"
    arguments = ["train", "path_star/mini", *overrides("gpt"), "--runs-dir", str(runs)]
    process = launch(arguments, log, file_size=20_000)
    process.join()
    text = log.read_text()
    assert process.exitcode == 1
    assert "Traceback" not in text
    assert "error: writing checkpoint" in text
    assert "free some space and resume" in text
    assert list((runs / "tiny" / "checkpoints").iterdir()) == []
    assert go_on(runs / "tiny").finished


def test_a_run_that_is_locked_is_refused(cli: Cli, copied: Callable[[str], Path]) -> None:
    run = copied("gpt")
    holder = RunDirectory.open(run)
    try:
        assert_error(cli("train", "--resume", run), f"run directory {run} is being used by another process")
    finally:
        holder.close()
    assert cli("train", "--resume", run).code == 0
