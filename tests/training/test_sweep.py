"""A sweep does what is left to do, writes it down once, and survives failures and signals."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nextlat.config import Config
from nextlat.errors import NextLatError
from nextlat.training.checkpoint import list_checkpoints, newest
from nextlat.training.sweep import Sweep, append, is_finished, read_results, record, status
from nextlat.training.trained import evaluate_run, load_run
from tests.tiny import assert_same_weights, files_below, metrics, run_whole, tiny


def named(name: str, objective: str = "gpt", *more: str) -> Config:
    return tiny(objective, *more, name=name)


def run_and_measure(config: Config, runs: Path) -> Path:
    path = run_whole(config, runs)
    evaluate_run(load_run(path), config.evaluation.after)
    return path


def test_status_says_what_is_left(runs: Path) -> None:
    config = named("a")
    assert status(config, runs, set()) == "new"
    path = run_whole(config, runs, stop_after=3)
    assert status(config, runs, set()) == "interrupted"
    path = run_whole(named("b"), runs)
    assert status(named("b"), runs, set()) == "interrupted"  # trained, not measured
    evaluate_run(load_run(path), ["accuracy"])
    assert status(named("b"), runs, set()) == "finished"
    assert is_finished(path, named("b"))
    assert status(config, runs, {config.hash()}) == "recorded"


def test_a_directory_that_holds_another_configuration_is_refused(runs: Path) -> None:
    run_whole(named("a"), runs, stop_after=1)
    with pytest.raises(NextLatError, match=r"another configuration .*seed: 0 there, 3 asked for") as caught:
        Sweep([named("a", "gpt", "seed=3")], runs).plan()
    assert "another --runs-dir" in str(caught.value)


def test_a_finished_run_becomes_a_row_and_its_evaluations_a_curve(runs: Path, tmp_path: Path) -> None:
    config = named("a", "nextlat", "seed=4", "evaluation.after=[accuracy, rank]")
    path = run_and_measure(config, runs)
    results = tmp_path / "results" / "study.csv"
    record(results, path, config)
    (row,) = read_results(results)
    measured = json.loads((path / "evaluations" / "accuracy.json").read_text())["metrics"]
    headline = measured["whole_path_greedy"]
    assert row["config_hash"] == config.hash()
    assert [row[key] for key in ("run", "objective", "seed", "steps")] == ["a", "nextlat", "4", "6"]
    assert [float(row[key]) for key in ("whole_path_greedy", "low", "high", "n", "chance")] == [
        headline[key] for key in ("value", "low", "high", "n", "chance")
    ]
    ranks = json.loads((path / "evaluations" / "rank.json").read_text())["metrics"]
    assert float(row["effective_rank"]) == ranks["effective_rank"]["value"]
    assert float(row["branch_margin"]) == measured["branch_margin"]["value"]
    assert row["loss"] == metrics(path)[-1]["loss"]
    assert row["hardware"]
    assert row["torch"]
    with (tmp_path / "results" / "study_curves.csv").open(newline="") as file:
        curve = list(csv.DictReader(file))
    assert [point["step"] for point in curve] == ["3", "6"]
    assert {point["config_hash"] for point in curve} == {config.hash()}
    logged = {row["step"]: row for row in metrics(path)}
    for point in curve:
        for key in ("loss", "latent", "kl", "eval.whole_path_greedy", "eval.basin"):
            assert point[key] == logged[point["step"]][key]


def test_recording_the_same_configuration_again_replaces_its_row(runs: Path, tmp_path: Path) -> None:
    results = tmp_path / "study.csv"
    for config in (named("a"), named("b", "gpt", "seed=1"), named("a")):
        if not (runs / str(config.name)).exists():
            run_and_measure(config, runs)
        record(results, runs / str(config.name), config)
    assert [row["run"] for row in read_results(results)] == ["b", "a"]
    assert len(read_results(tmp_path / "study_curves.csv")) == 4


def test_rows_with_new_columns_keep_the_old_rows(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "study.csv"
    append(path, [{"config_hash": "x", "a": 1}])
    append(path, [{"config_hash": "y", "b": "2,3"}, {"config_hash": "y", "b": 4}])
    assert path.read_text() == 'config_hash,a,b\nx,1,\ny,,"2,3"\ny,,4\n'
    assert files_below(path.parent) == ["study.csv"]


def test_a_failure_while_appending_leaves_the_old_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.csv"
    append(path, [{"config_hash": "x", "a": 1}])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NextLatError, match="the disk is full"):
        append(path, [{"config_hash": "y", "a": 2}])
    assert path.read_text() == "config_hash,a\nx,1\n"
    assert files_below(tmp_path) == ["study.csv"]


def test_a_sweep_skips_resumes_records_and_goes_on_after_a_failure(runs: Path, tmp_path: Path) -> None:
    """Five runs, one in each state, and one that diverges; real processes, two at a time."""
    results = tmp_path / "study.csv"
    recorded, finished, interrupted, new, failing = (
        named("recorded"),
        named("finished", "gpt", "seed=1"),
        named("interrupted", "nextlat"),
        named("new", "nextlat", "seed=1"),
        named("failing", "gpt", "training.learning_rate=1e30", "training.warmup_steps=0"),
    )
    append(results, [{"config_hash": recorded.hash(), "run": "recorded"}])
    run_and_measure(finished, runs)
    run_whole(interrupted, runs, stop_after=4)
    old = newest(runs / "finished" / ".").stat().st_mtime_ns

    said: list[str] = []
    work = Sweep([failing, recorded, finished, interrupted, new], runs, results, jobs=2, say=said.append)
    assert [state for _, state in work.plan()] == ["new", "recorded", "finished", "interrupted", "new"]
    work.run()

    assert work.failed == ["failing"]
    failure = next(line for line in said if line.startswith("failing: failed with exit code 1"))
    assert "training stopped before it reached the weights" in failure
    assert f"recorded: already in {results}" in said
    assert "finished: was finished before" in said
    assert "new: finished" in said
    assert sorted(row["run"] for row in read_results(results)) == ["finished", "interrupted", "new", "recorded"]
    assert not (runs / "recorded").exists()
    assert newest(runs / "finished").stat().st_mtime_ns == old
    straight = run_whole(interrupted, tmp_path / "straight")
    assert_same_weights(straight, runs / "interrupted")
    assert metrics(straight) == metrics(runs / "interrupted")

    again = Sweep([recorded, finished, interrupted, new], runs, results, jobs=2, say=said.append)
    before = results.read_bytes()
    assert {state for _, state in again.plan()} == {"recorded"}
    again.run()
    assert results.read_bytes() == before


def test_a_signal_lets_every_run_save_and_the_same_sweep_goes_on(runs: Path, tmp_path: Path) -> None:
    results = tmp_path / "study.csv"
    configs = [named(name, "gpt", "training.steps=100000", "training.evaluate_every=null") for name in "ab"]
    configs[1] = configs[1].model_copy(update={"seed": 1})
    third = named("c", "gpt", "seed=2")
    work = Sweep([*configs, third], runs, results, jobs=2, say=lambda line: None)
    files = [runs / name / "metrics.csv" for name in "ab"]

    def stop_when_both_train() -> None:
        while not all(file.is_file() and file.read_text().count("\n") > 3 for file in files):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    watcher = threading.Thread(target=stop_when_both_train, daemon=True)
    watcher.start()
    work.run()
    assert work.signal == signal.SIGTERM
    watcher.join()
    assert signal.getsignal(signal.SIGTERM) is handler
    for name in "ab":
        (saved,) = list_checkpoints(runs / name / "checkpoints")
        assert int(saved.name.removeprefix("step_")) == len(metrics(runs / name))
    assert not (runs / "c").exists()
    assert not results.exists()
    assert [state for _, state in work.plan()] == ["interrupted", "interrupted", "new"]
