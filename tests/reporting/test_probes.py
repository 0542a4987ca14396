"""The figure and table of probes show each seed, the means, the differences to gpt and the baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextlat.reporting import load_runs, probes_grid, write_report
from nextlat.reporting.probes import probes_figure
from tests.reporting.synthetic import write_run

OFFSETS = 20
ABOVE = {"gpt": 0.0, "nextlat": -0.02, "mtp": 0.03}


def curve(objective: str, seed: int) -> list[float]:
    return [2.0 + 1.5 * (1 - 0.8**k) + ABOVE[objective] * k / 10 + 0.01 * (seed - 1) for k in range(1, OFFSETS + 1)]


def bigram(k: int) -> float:
    return 3.2 + 0.9 * (1 - 0.7**k)


def with_probes(folder: Path, objective: str, seed: int, kinds: tuple[str, ...] = ("probe",), **options: Any) -> Path:
    run = write_run(folder, objective, seed, 0.5, name=f"stories-{objective}-s{seed}", **options)
    metrics = {}
    for kind in kinds:
        for k, value in enumerate(curve(objective, seed), start=1):
            metrics[f"{kind}_ce_{k}"] = {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 9000}
            metrics[f"{kind}_bigram_{k}"] = {"value": bigram(k), "n": 9000}
    metrics["probe_unigram"] = {"value": 4.75, "n": 9000}
    (run / "evaluations" / "probes.json").write_text(json.dumps({"metrics": metrics, "step": 200, "seed": seed}))
    return run


@pytest.fixture
def nine_runs(tmp_path: Path) -> list[Path]:
    return [with_probes(tmp_path / "runs", objective, seed) for objective in ABOVE for seed in range(3)]


def test_the_figure_draws_a_line_a_seed_the_means_and_the_baselines(nine_runs: list[Path]) -> None:
    figure = probes_figure(load_runs(nine_runs))
    assert figure is not None
    less, beside = figure.axes
    drawn = {line.get_gid(): np.asarray(line.get_ydata()) for line in less.lines}
    assert {f"stories-{objective}-s{seed}" for objective in ABOVE for seed in range(3)} <= drawn.keys()
    reference = np.array(curve("gpt", 1))  # seeds lie evenly about seed 1
    for objective in ABOVE:
        assert drawn[objective] == pytest.approx(np.array(curve(objective, 1)) - reference, abs=1e-9)
        for seed in range(3):
            wanted = np.array(curve(objective, seed)) - reference
            assert drawn[f"stories-{objective}-s{seed}"] == pytest.approx(wanted, abs=1e-9)
    assert not np.any(drawn["gpt"])
    values = {line.get_gid(): np.asarray(line.get_ydata()) for line in beside.lines}
    assert values["nextlat"] == pytest.approx(np.array(curve("nextlat", 1)))
    assert values["bigram"] == pytest.approx(np.array([bigram(k) for k in range(1, OFFSETS + 1)]))
    assert set(values["unigram"]) == {4.75}
    assert "k" in less.get_xlabel() and "nats" in less.get_ylabel() and "gpt" in less.get_ylabel()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["gpt", "nextlat", "mtp", "one seed", "bigram k apart"]


def test_without_gpt_only_the_values_are_drawn(tmp_path: Path) -> None:
    figure = probes_figure(load_runs([with_probes(tmp_path, "nextlat", seed) for seed in range(2)]))
    assert figure is not None
    (axes,) = figure.axes
    assert "gpt" not in axes.get_ylabel()


def test_runs_without_probes_have_no_figure_and_no_table(six_runs: list[Path]) -> None:
    assert probes_figure(load_runs(six_runs)) is None
    assert probes_grid(load_runs(six_runs)) is None


def test_the_table_has_means_with_the_difference_to_gpt(nine_runs: list[Path]) -> None:
    grid = probes_grid(load_runs(nine_runs))
    assert grid is not None
    assert grid.columns == ("probe of", "seeds", "k = 1", "k = 2", "k = 4", "k = 8", "k = 16", "k = 20")
    rows = {row[0]: row[1:] for row in grid.rows}
    assert list(rows) == ["gpt", "nextlat", "mtp", "bigram k apart", "unigram"]
    ours, gpt = curve("nextlat", 1), curve("gpt", 1)
    assert rows["nextlat"] == (
        "3",
        *(f"{ours[k - 1]:.3f} ({ours[k - 1] - gpt[k - 1]:+.3f})" for k in (1, 2, 4, 8, 16, 20)),
    )
    assert rows["gpt"][-1] == f"{gpt[19]:.3f} (+0.000)"
    assert rows["bigram k apart"][1].startswith(f"{bigram(1):.3f} (+")
    assert rows["unigram"][1] == "4.750"


def test_the_legend_shows_the_dashes_of_the_lines(tmp_path: Path) -> None:
    """Also where a second row of panels has other settings first."""
    runs = [
        with_probes(tmp_path, "gpt", 0, ("probe", "probe_row")),
        with_probes(tmp_path, "nextlat", 0, ("probe",)),
        with_probes(
            tmp_path / "wide", "nextlat", 0, ("probe", "probe_row"), overrides={"objectives.nextlat.horizon": 4}
        ),
    ]
    figure = probes_figure(load_runs(runs))
    assert figure is not None
    legend = {line.get_label(): line for line in figure.legends[0].get_lines()}
    drawn = [line for axes in figure.axes for line in axes.lines if line.get_gid() in legend]
    assert len({line.get_gid() for line in drawn}) == 3 and len(drawn) > 6
    for line in drawn:
        handle = legend[line.get_gid()]
        assert (line.get_linestyle(), line.get_color()) == (handle.get_linestyle(), handle.get_color())
    assert len({(line.get_linestyle(), line.get_color()) for line in drawn}) == 3


def test_both_kinds_of_pairs_have_their_own_panels_and_rows(tmp_path: Path) -> None:
    runs = load_runs([with_probes(tmp_path, objective, 1, ("probe", "probe_row")) for objective in ("gpt", "nextlat")])
    figure, grid = probes_figure(runs), probes_grid(runs)
    assert figure is not None and grid is not None
    assert len(figure.axes) == 4
    assert [row[0] for row in grid.rows] == [
        "gpt",
        "nextlat",
        "bigram k apart",
        "unigram",
        "gpt, all pairs of a row",
        "nextlat, all pairs of a row",
        "bigram k apart, all pairs of a row",
    ]


def test_a_report_of_such_runs_has_figure_and_table(nine_runs: list[Path], tmp_path: Path) -> None:
    page = write_report(nine_runs[:4], tmp_path / "report").read_text(encoding="utf-8")
    assert (tmp_path / "report" / "figures" / "probes.png").stat().st_size > 10_000
    assert "What the state says of the tokens ahead" in page
    assert "bigram k apart" in page
    assert "k = 16" in (tmp_path / "report" / "table.md").read_text(encoding="utf-8")


def test_a_run_of_text_is_reported_by_its_cross_entropy_and_never_in_percent(tmp_path: Path) -> None:
    run = write_run(tmp_path, "gpt", 0, 0.5, evaluated=False)
    metrics = {"ce": {"value": 0.83, "low": 0.82, "high": 0.84, "n": 1000}, "perplexity": {"value": 2.29, "n": 1000}}
    content = {"metrics": metrics, "seed": 0, "step": 200}
    (run / "evaluations" / "cross_entropy.json").write_text(json.dumps(content))
    log = (
        (run / "metrics.csv").read_text().replace("eval.whole_path_greedy", "eval.ce").replace("eval.token_2", "eval.z")
    )
    (run / "metrics.csv").write_text(log)
    page = write_report([run], tmp_path / "report").read_text(encoding="utf-8")
    assert "0.83" in page and "83.00" not in page
    assert "less is better" in page
