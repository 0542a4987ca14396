"""Numbers over seeds and the tables that show them."""

from __future__ import annotations

import csv
import io
import json
from math import sqrt
from pathlib import Path

import pytest

from nextlat.reporting import group_runs, load_runs, report_markdown, runs_grid, summarise, summary_csv, summary_grid
from nextlat.reporting.groups import Summary, is_rate, notes
from nextlat.reporting.runs import Reading
from tests.reporting.conftest import GPT, NEXTLAT, ODD_NAME
from tests.reporting.synthetic import write_run


def summaries_of(paths: list[Path]) -> dict[str, Summary]:
    return {s.group.label: s for s in summarise(load_runs(paths))}


def test_the_interval_over_three_seeds_is_students(six_runs: list[Path]) -> None:
    gpt = summaries_of(six_runs)["gpt"]
    mean = sum(GPT) / 3
    half = 4.303 * sqrt(sum((x - mean) ** 2 for x in GPT) / 2) / sqrt(3)
    assert gpt.mean == pytest.approx(mean)
    assert (gpt.low, gpt.high) == pytest.approx((mean - half, mean + half))
    assert (gpt.interval, gpt.chance) == ("seeds", 0.5)


def test_an_unfinished_seed_is_shown_but_not_averaged(six_runs: list[Path]) -> None:
    summary = summaries_of(six_runs)["nextlat"]
    assert summary.mean == pytest.approx((NEXTLAT[0] + NEXTLAT[1]) / 2)
    assert summary.high == 1.0  # Student's interval of two seeds reaches past what a rate can be
    assert summary.readings[2] is not None
    assert summary.readings[2].step == 120
    assert any("path_star-mini-nextlat-s2" in note for note in notes([summary]))
    assert "94.80 at step 120 of 200" in summary_grid([summary]).markdown()


def test_the_solve_rate_counts_finished_seeds(six_runs: list[Path]) -> None:
    found = summaries_of(six_runs)
    assert (found["gpt"].solved, found["gpt"].judged) == (0, 3)
    assert (found["nextlat"].solved, found["nextlat"].judged) == (2, 2)
    rate = found["gpt"].solve_rate
    assert rate is not None
    z2 = 1.959963984540054**2
    assert rate == pytest.approx((0.0, 0.0, z2 / (3 + z2)))  # Wilson's upper end for 0 of 3


def test_one_seed_has_the_interval_of_its_items(tmp_path: Path) -> None:
    (summary,) = summarise(load_runs([write_run(tmp_path, "nextlat", 0, 0.99)]))
    half = 1.96 * sqrt(0.99 * 0.01 / 2000) + 0.001
    assert summary.interval == "items"
    assert (summary.mean, summary.low, summary.high) == pytest.approx((0.99, 0.99 - half, 0.99 + half))
    assert "says nothing of seeds" in summary_grid([summary]).markdown()


def test_runs_are_grouped_by_all_that_differs_but_seed_name_and_threads(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path, "nextlat", 0, 0.9, name="a"),
        write_run(tmp_path, "nextlat", 1, 0.9, name="b"),
        write_run(tmp_path, "nextlat", 0, 0.9, name="c", overrides={"objectives.nextlat.horizon": 4}),
        write_run(tmp_path, "gpt", 0, 0.5, name="d", overrides={"objectives.nextlat.horizon": 9}),
    ]
    groups = group_runs(load_runs(paths))
    assert [(g.objective, g.settings, [r.name for r in g.runs]) for g in groups] == [
        ("nextlat", "horizon=2", ["a", "b"]),
        ("nextlat", "horizon=4", ["c"]),
        ("gpt", "", ["d"]),  # options of an objective that was not trained are no difference
    ]


def test_data_options_make_another_benchmark_and_shared_settings_show_everywhere(tmp_path: Path) -> None:
    fast = {"training.learning_rate": 0.01, "data.length": 7}
    paths = [write_run(tmp_path, "nextlat", 0, 0.9), write_run(tmp_path, "gpt", 0, 0.5, overrides=fast)]
    groups = group_runs(load_runs(paths))
    assert [(g.benchmark, g.settings) for g in groups] == [
        ("path_star length=5", "learning_rate=0.001"),
        ("path_star length=7", "learning_rate=0.01"),
    ]


def test_two_runs_of_one_seed_are_pointed_out(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, "gpt", 0, 0.5, name=name) for name in ("a", "b")]
    assert any("several runs with seed 0" in note for note in notes(summarise(load_runs(paths))))


def test_only_counts_over_items_are_shown_in_percent(six_runs: list[Path]) -> None:
    assert is_rate([Reading(0.5025, n=2000), Reading(0.25)])
    assert not is_rate([Reading(0.31234567, n=2000)])
    assert not is_rate([Reading(1.5)])
    (margin,) = summarise(load_runs(six_runs[:3]), "branch_margin")
    assert (margin.metric, margin.rate) == ("branch_margin", False)
    assert "| 0.3123 |" in summary_grid([margin]).markdown()


def test_the_table_of_runs_has_a_line_each(six_runs: list[Path]) -> None:
    grid = runs_grid(load_runs(six_runs))
    assert grid.columns[:6] == ("run", "objective", "seed", "steps", "whole_path_greedy", "95 % over items")
    first, last = (
        dict(zip(grid.columns, grid.rows[0], strict=True)),
        dict(zip(grid.columns, grid.rows[-1], strict=True)),
    )
    assert first["whole_path_greedy"] == "50.25 %"
    assert (first["branch"], first["basin"], first["chance"], first["seconds"]) == ("50.25 %", "shortcut", "50 %", "50")
    assert (last["steps"], last["whole_path_greedy"], last["basin"]) == ("130 of 200", "94.80 % …", "-")


def test_the_csv_gives_the_numbers_back(six_runs: list[Path]) -> None:
    summaries = summarise(load_runs(six_runs))
    gpt, nextlat = csv.DictReader(io.StringIO(summary_csv(summaries)))
    assert json.loads(gpt["values"]) == list(GPT)
    assert float(gpt["mean"]) == summaries[0].mean
    assert json.loads(nextlat["finished"]) == [True, True, False]
    assert json.loads(json.dumps(summaries[0].as_dict()))["runs"][1]["value"] == GPT[1]


def test_odd_names_break_neither_markdown_nor_the_terminal(six_runs: list[Path]) -> None:
    from rich.console import Console

    runs = load_runs(six_runs)
    assert 'nextlat &lt;b>&"odd"\\|[red]' in report_markdown(runs)
    console = Console(file=io.StringIO(), width=240)
    console.print(runs_grid(runs).rich())
    assert isinstance(console.file, io.StringIO)
    assert ODD_NAME in console.file.getvalue()
