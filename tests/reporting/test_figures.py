"""Figures show what the files hold."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from nextlat.errors import NextLatError
from nextlat.reporting import load_runs
from nextlat.reporting.curves import running_mean
from nextlat.reporting.figures import accuracy_figure, drawings, health_figure, loss_figure, seeds_figure, token_figure
from nextlat.reporting.theme import DARK, LIGHT, png
from tests.reporting.conftest import NEXTLAT
from tests.reporting.synthetic import write_run


def lines(axes):  # type: ignore[no-untyped-def]
    return {line.get_gid(): line for line in axes.get_lines() if line.get_gid()}


def logged(path: Path, column: str) -> list[tuple[float, float]]:
    with (path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["seconds"]]  # the torn line has none
    return [(float(row["step"]), float(row[column])) for row in rows if row[column]]


def test_accuracy_curves_are_the_logged_evaluations(six_runs: list[Path]) -> None:
    (axes,) = accuracy_figure(load_runs(six_runs)).axes
    drawn = lines(axes)
    for path in six_runs:
        points = logged(path, "eval.whole_path_greedy")
        assert len(points) == (6 if path.name.endswith("nextlat-s2") else 10)
        assert [tuple(point) for point in drawn[path.name].get_xydata()] == points


def test_chance_and_ceiling_are_lines_with_names(six_runs: list[Path]) -> None:
    (axes,) = accuracy_figure(load_runs(six_runs)).axes
    drawn = lines(axes)
    assert set(drawn["chance 50 %"].get_ydata()) == {0.5}
    assert set(drawn["ceiling"].get_ydata()) == {1.0}
    assert {"chance 50 %", "ceiling"} <= {text.get_text() for text in axes.texts}


def test_the_end_of_an_unfinished_run_is_marked(six_runs: list[Path]) -> None:
    (axes,) = accuracy_figure(load_runs(six_runs)).axes
    marks = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [mark.get_xydata().tolist() for mark in marks] == [[[120.0, 0.948]]]


def test_a_colour_belongs_to_an_objective_and_dashes_to_its_settings(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path, "gpt", 0, 0.5, name="g"),
        write_run(tmp_path, "nextlat", 0, 0.9, name="a"),
        write_run(tmp_path, "nextlat", 1, 0.9, name="b"),
        write_run(tmp_path, "nextlat", 0, 0.9, name="c", overrides={"objectives.nextlat.horizon": 4}),
    ]
    drawn = lines(accuracy_figure(load_runs(paths)).axes[0])
    assert drawn["a"].get_color() == drawn["b"].get_color() == drawn["c"].get_color() == LIGHT.palette[0]
    assert drawn["g"].get_color() == LIGHT.palette[1]
    assert drawn["a"].get_linestyle() == drawn["b"].get_linestyle() != drawn["c"].get_linestyle()


def test_loss_panels_are_the_logged_terms(six_runs: list[Path]) -> None:
    figure = loss_figure(load_runs(six_runs))
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["ce", "latent", "kl"]
    for axes, term in zip(figure.axes, ("ce", "latent", "kl"), strict=True):
        drawn = lines(axes)
        for path in six_runs:
            points = logged(path, term) if "nextlat" in path.name or term == "ce" else []
            assert [tuple(point) for point in drawn[path.name].get_xydata()] == points
        assert axes.get_yscale() == "log"


def test_health_is_drawn_where_it_was_measured(six_runs: list[Path]) -> None:
    figure = health_figure(load_runs(six_runs))
    assert figure is not None
    panels = {axes.get_title(loc="left"): lines(axes) for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ["RMS of the state", "transition error", "gradient norm, ce", "cosine, kl and ce"]
    measured = np.arange(20, 201, 20)
    gpt, nextlat = six_runs[0].name, six_runs[3].name
    for title, place in (("RMS of the state", 0), ("gradient norm, ce", 1)):
        assert panels[title][gpt].get_xydata().tolist() == [[step, step + place] for step in measured]
    for title, place in (("transition error", 2), ("cosine, kl and ce", 4)):
        assert panels[title][nextlat].get_xydata().tolist() == [[step, step + place] for step in measured]
        assert not len(panels[title][gpt].get_xydata())


def test_runs_without_health_have_no_such_figure(tmp_path: Path) -> None:
    assert health_figure(load_runs([write_run(tmp_path, "gpt", 0, None, evaluated=False)])) is None


def test_the_running_mean_keeps_a_constant_and_the_mean_of_a_window() -> None:
    assert running_mean(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    values = np.arange(500.0) ** 2
    assert running_mean(values)[250] == pytest.approx(values[245:256].mean())
    assert running_mean(values)[0] == pytest.approx(values[:6].mean())


def test_every_seed_stands_at_its_final_accuracy(six_runs: list[Path]) -> None:
    (axes,) = seeds_figure(load_runs(six_runs)).axes
    drawn = lines(axes)
    for path, value in zip(six_runs[3:], (*NEXTLAT[:2], 0.948), strict=True):
        assert drawn[path.name].get_xdata().tolist() == [value]
    assert drawn[six_runs[5].name].get_markerfacecolor() == LIGHT.paper  # hollow: not finished
    assert drawn[six_runs[4].name].get_markerfacecolor() == LIGHT.palette[0]
    shades = sorted((round(patch.get_x(), 3), round(patch.get_x() + patch.get_width(), 3)) for patch in axes.patches)
    assert shades[0] == (0.45, 0.55)
    assert shades[1][0] == 0.9


def test_dots_of_equal_seeds_do_not_hide_each_other(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path, "gpt", seed, 0.5) for seed in range(4)])
    (axes,) = seeds_figure(runs).axes
    heights = sorted(lines(axes)[run.name].get_ydata()[0] for run in runs)
    assert np.diff(heights).min() >= 7.5  # points, the diameter of a dot


def test_token_bars_are_means_over_seeds(six_runs: list[Path]) -> None:
    figure = token_figure(load_runs(six_runs))
    assert figure is not None
    gpt, nextlat = figure.axes
    assert (gpt.get_title(loc="left"), nextlat.get_title(loc="left")) == ("gpt", "nextlat")
    bars = {patch.get_gid(): patch.get_height() for patch in gpt.patches}
    assert bars["token_2"] == pytest.approx(0.5)
    assert bars["forced_token_3"] == 1.0
    assert {patch.get_gid(): patch.get_height() for patch in nextlat.patches}["token_2"] == pytest.approx(0.99425)


def test_runs_without_steps_still_draw(tmp_path: Path) -> None:
    path = write_run(tmp_path, "gpt", 0, None, done=1)
    (path / "metrics.csv").unlink()
    figures = [drawing.draw(DARK) for drawing in drawings(load_runs([path]))]
    assert [figure is None for figure in figures] == [False, False, True, True, True, True]
    assert all(png(figure, dpi=40)[:4] == b"\x89PNG" for figure in figures if figure is not None)


def test_a_missing_matplotlib_is_said_with_what_to_install(
    six_runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NextLatError, match=r'pip install "nextlat\[plots\]"'):
        accuracy_figure(load_runs(six_runs))
