"""The commands a newcomer types, run for real on tiny models: demo, sweep, report."""

from __future__ import annotations

import csv
import inspect
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nextlat import cli, commands
from nextlat.cli import app
from nextlat.config import expand as expand_any
from nextlat.options import split_names
from tests.tiny import TINY, metrics

RESULTS = Path(__file__).parents[1] / "results"


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    return result


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_demo_trains_both_models_and_leaves_summary_table_and_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "expand", lambda source, overrides: expand_any(source, [*overrides, *TINY]))
    said = run("demo", "--seed", "3").output
    summary = json.loads(Path("runs/demo/summary.json").read_text(encoding="utf-8"))
    assert list(summary) == ["gpt", "nextlat"]
    for objective, found in summary.items():
        (path,) = Path("runs/demo").glob(f"*-{objective}-s3*")
        measured = json.loads((path / "evaluations/accuracy.json").read_text(encoding="utf-8"))
        metric = measured["metrics"]["whole_path_greedy"]
        assert found == {
            "accuracy": metric["value"],
            "low": metric["low"],
            "high": metric["high"],
            "chance": 0.5,
            "seed": 3,
            "steps": 6,
        }
        assert metric["n"] == 40
    assert "nextlat" in said
    assert "50 %" in said
    assert Path("runs/demo/report/report.html").resolve().as_uri() in said
    assert Path("runs/demo/report/report.html").stat().st_size > 50_000


def test_the_demo_is_a_pair_of_the_published_runs_of_which_nextlat_alone_solved_the_task() -> None:
    seed = inspect.signature(cli.demo).parameters["seed"].default
    with (RESULTS / "path_star_mini.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["objective"], row["seed"]): row for row in csv.DictReader(file)}
    for objective, low, high in (("gpt", 0.45, 0.55), ("nextlat", 0.9, 1.0)):
        (config,) = expand_any("path_star/mini", [f"objective={objective}", f"seed={seed}"])
        row = rows[objective, str(seed)]
        assert row["config_hash"] == config.hash()
        assert low <= float(row["whole_path_greedy"]) <= high


def test_a_sweep_shows_every_seed_and_again_when_its_runs_are_gone() -> None:
    arguments = ["sweep", "path_star/mini", *TINY, "objective=gpt", "seed=0,1", "--results", "kept/study.csv"]
    first = run(*arguments).output
    assert "of 2" in first.replace("\n", " ")
    shutil.rmtree("runs")
    again = run(*arguments).output
    assert again.count("already in kept/study.csv") == 2
    table = "over seeds"
    assert again[again.index(table) :] == first[first.index(table) :]
    assert not Path("runs").exists()
    run("report", "kept/study.csv", "--out", "page")
    assert "| gpt |" in Path("page/table.md").read_text(encoding="utf-8")


def test_impossible_runs_of_a_sweep_are_refused_before_any_starts() -> None:
    result = CliRunner().invoke(app, ["sweep", "path_star/mini", *TINY, "objective.horizon=1,100"])
    assert result.exit_code == 1
    assert "horizon = 100" in str(result.exception)
    assert list(Path().iterdir()) == []


def test_a_results_place_that_cannot_be_used_is_found_out_before_training() -> None:
    Path("file").write_text("", encoding="utf-8")
    result = CliRunner().invoke(app, ["sweep", "path_star/mini", *TINY, "seed=0", "--results", "file/x.csv"])
    assert result.exit_code == 1
    assert "creating file" in str(result.exception)
    assert not Path("runs").exists()


def test_an_edited_configuration_is_not_resumed() -> None:
    run("train", "path_star/mini", *TINY, "name=edited", "--stop-after", "3")
    file = Path("runs/edited/config.yaml")
    file.write_text(file.read_text(encoding="utf-8").replace("learning_rate: 0.001", "learning_rate: 0.5"))
    result = CliRunner().invoke(app, ["train", "--resume", "runs/edited"])
    assert result.exit_code == 1
    assert "was changed since the run began" in str(result.exception)
    assert len(metrics(Path("runs/edited"))) == 3


def test_measuring_the_best_checkpoint_leaves_the_final_measurement_alone() -> None:
    run("train", "path_star/mini", *TINY, "name=r", "training.save=best")
    final = Path("runs/r/evaluations/accuracy.json").read_bytes()
    run("evaluate", "runs/r", "--checkpoint", "best")
    assert Path("runs/r/evaluations/accuracy.json").read_bytes() == final
    assert Path("runs/r/evaluations/accuracy-best.json").is_file()


def test_dynamics_fitted_to_an_earlier_step_are_refused() -> None:
    run("train", "path_star/mini", *TINY, "objective=gpt", "name=r", "--stop-after", "3")
    run("fit-dynamics", "runs/r", "--steps", "2")
    run("train", "--resume", "runs/r")
    result = CliRunner().invoke(app, ["evaluate", "runs/r", "rollout", "--dynamics", "posthoc"])
    assert "was fitted to the model of step 3, and this is step 6" in str(result.exception)
    run("fit-dynamics", "runs/r", "--steps", "2")
    run("evaluate", "runs/r", "rollout", "--dynamics", "posthoc")
    Path("runs/r/posthoc/dynamics.safetensors").write_bytes(b"torn")
    result = CliRunner().invoke(app, ["evaluate", "runs/r", "rollout", "--dynamics", "posthoc"])
    assert "is damaged; fit it again" in str(result.exception)


def test_the_report_of_an_unfinished_run_knows_its_chance_level() -> None:
    run("train", "path_star/mini", *TINY, "name=r", "--stop-after", "3")
    run("report", "runs/r", "--out", "page")
    assert "50 %" in Path("page/table.md").read_text(encoding="utf-8")


def test_lists_of_names_forgive_spaces_and_a_comma_too_many() -> None:
    assert split_names("prose, code,") == ["prose", "code"]
    assert split_names("") == split_names(None) == []
