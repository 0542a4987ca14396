"""Reading run directories."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nextlat.errors import NextLatError
from nextlat.reporting import load_run, load_runs
from nextlat.reporting.runs import headline_metric
from tests.reporting.synthetic import write_run


def test_a_finished_run_reads_its_headline_from_the_evaluation(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "nextlat", 3, 0.9915))
    assert (run.task, run.objective, run.seed, run.step, run.finished) == ("path_star", "nextlat", 3, 200, True)
    reading = run.final("whole_path_greedy")
    assert reading is not None
    assert (reading.value, reading.n, reading.chance, reading.step) == (0.9915, 2000, 0.5, 200)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path, "gpt", 0, 0.5, torn=True)
    assert not (path / "metrics.csv").read_text().endswith("\n")
    run = load_run(path)
    assert run.step == 200
    assert len(run.metrics["loss"]) == 200


def test_an_unfinished_run_shows_its_last_logged_evaluation(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "nextlat", 2, 0.9885, done=130))
    reading = run.reading("whole_path_greedy")
    assert reading is not None
    assert (reading.step, reading.low, reading.chance) == (120, None, 0.5)
    assert run.final("whole_path_greedy") is None
    assert not run.finished


def test_an_evaluation_of_an_earlier_checkpoint_is_not_the_result(tmp_path: Path) -> None:
    path = write_run(tmp_path, "nextlat", 0, 0.99)
    file = path / "evaluations" / "accuracy.json"
    content = json.loads(file.read_text()) | {"step": 40}
    content["metrics"]["whole_path_greedy"]["value"] = 0.25
    file.write_text(json.dumps(content))
    reading = load_run(path).final("whole_path_greedy")
    assert reading is not None
    assert (reading.value, reading.step) == (0.99, 200)


def test_terms_of_one_horizon_step_stand_for_their_group(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "nextlat", 0, 0.99))
    assert list(run.terms()) == ["ce", "latent", "kl"]
    assert np.array_equal(run.terms()["kl"], run.metrics["kl"])
    (run.directory / "metrics.csv").write_text("step,loss,ce,ce.share,latent_1,eval.basin\n1,0.5,0.5,1,0.25,partial\n")
    single = load_run(run.directory).terms()
    assert {name: values.tolist() for name, values in single.items()} == {"ce": [0.5], "latent": [0.25]}


def test_a_run_that_has_only_begun_has_no_steps(tmp_path: Path) -> None:
    path = write_run(tmp_path, "gpt", 0, 0.5, done=1)
    (path / "metrics.csv").unlink()
    run = load_run(path)
    assert (run.step, run.finished, run.reading("whole_path_greedy"), run.terms()) == (0, False, None, {})


def test_a_run_named_twice_is_read_once(tmp_path: Path) -> None:
    path = write_run(tmp_path, "gpt", 0, 0.5)
    assert len(load_runs([path, path.parent / "." / path.name])) == 1


def test_a_directory_of_runs_is_refused_with_the_name_of_one(tmp_path: Path) -> None:
    path = write_run(tmp_path / "runs", "gpt", 0, 0.5)
    with pytest.raises(NextLatError, match=r"runs is not a run directory.*path_star-mini-gpt-s0") as error:
        load_run(path.parent)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "task: path_star\n", "config.yaml lacks objective, seed, training"),
        ("config.yaml", "task: [", "config.yaml is not valid YAML"),
        ("config.yaml", "{task: a, objective: b, seed: 0, training: {}}", "lacks training.steps"),
        ("environment.json", "{", "environment.json is not valid JSON"),
        ("evaluations/accuracy.json", '{"metrics": {"a": 1}}', 'accuracy.json has no "metrics"'),
        ("metrics.csv", "loss\n1\n", "metrics.csv has no column 'step'"),
        ("metrics.csv", "step,loss\n1,2\n2\n3,4\n", "metrics.csv, line 3: 1 cells under 2 columns"),
        ("metrics.csv", "step,loss\n1,oops\n", "line 2: loss is 'oops', not a number"),
        ("metrics.csv", "step,loss\n,1\n", "line 2: no step number"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    path = write_run(tmp_path, "gpt", 0, 0.5)
    (path / file).write_text(content)
    with pytest.raises(NextLatError) as error:
        load_run(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_an_unknown_metric_is_refused_with_those_there_are(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path, "gpt", 0, 0.5))]
    assert headline_metric(runs) == "whole_path_greedy"
    with pytest.raises(NextLatError, match=r"no run has the metric 'pass'.*branch_margin"):
        headline_metric(runs, "pass")


def test_reading_and_reporting_import_no_torch() -> None:
    code = "import nextlat.reporting, sys; print([m for m in ('torch', 'matplotlib', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
