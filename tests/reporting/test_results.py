"""A sweep's results file stands for its runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from nextlat.errors import NextLatError
from nextlat.reporting import load_runs, summarise, write_report


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "path_star_mini.csv"
    rows, points = [], []
    for seed, accuracy in ((0, 0.5), (1, 1.0)):
        config = {"task": "path_star", "objective": "nextlat", "seed": seed, "training": {"steps": 40}}
        rows.append(
            {"config_hash": f"h{seed}", "run": f"r{seed}", "objective": "nextlat", "seed": seed, "steps": 40}
            | {
                "whole_path_greedy": accuracy,
                "headline": "whole_path_greedy",
                "low": accuracy - 0.1,
                "high": accuracy,
                "n": 100,
                "chance": 0.5,
            }
            | {"basin": "solved" if seed else "shortcut", "loss": 0.1, "commit": "abc", "hardware": "two cores"}
            | {"torch": "2", "threads": 1, "config": json.dumps(config)}
        )
        points += [
            {"config_hash": f"h{seed}", "objective": "nextlat", "seed": seed, "step": step, "loss": 1 / step}
            | {"ce": 1 / step, "eval.whole_path_greedy": accuracy * step / 40, "eval.basin": "partial"}
            for step in (20, 40)
        ]
    for target, content in ((path, rows), (tmp_path / "path_star_mini_curves.csv", points)):
        with target.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    return path


def test_rows_come_back_as_runs_with_their_intervals_and_curves(results: Path) -> None:
    first, second = load_runs([results])
    assert (first.seed, second.seed) == (0, 1)
    reading = second.final("whole_path_greedy")
    assert reading is not None
    assert (reading.value, reading.low, reading.high, reading.n, reading.chance) == (1.0, 0.9, 1.0, 100, 0.5)
    steps, values = first.curve("whole_path_greedy")
    assert steps.tolist() == [20, 40]
    assert values.tolist() == [0.25, 0.5]
    assert first.terms()["ce"].tolist() == [0.05, 0.025]
    assert first.finished


@pytest.mark.parametrize("kept", [1, 0])
def test_a_recorded_run_is_finished_also_if_its_last_step_was_not_evaluated(results: Path, kept: int) -> None:
    curves = results.with_name("path_star_mini_curves.csv")
    header, *points = curves.read_text(encoding="utf-8").splitlines()
    early = [line for line in points if line.startswith("h0,nextlat,0,20,")][:kept]
    curves.write_text("\n".join([header, *early]) + "\n", encoding="utf-8")
    first = load_runs([results])[0]
    assert (first.step, first.finished) == (40, True)
    assert first.metrics["loss"].tolist() == [0.05, 0.1][1 - kept :]
    assert first.curve("whole_path_greedy")[0].tolist() == [20] * kept


def test_solve_rate_counts_basins_of_the_results_file(results: Path) -> None:
    (summary,) = summarise(load_runs([results]))
    assert (summary.solved, summary.judged, summary.mean) == (1, 2, 0.75)


def test_a_report_is_written_from_a_results_file_alone(results: Path, tmp_path: Path) -> None:
    page = write_report([results], tmp_path / "report")
    assert "1 of 2" in (tmp_path / "report" / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "report" / "figures" / "accuracy.png").stat().st_size > 10_000
    assert "r1" in page.read_text(encoding="utf-8")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match="no results file"):
        load_runs([tmp_path / "absent.csv"])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(NextLatError, match="not a results file"):
        load_runs([tmp_path / "other.csv"])
