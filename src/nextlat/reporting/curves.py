"""What happened during training: accuracy and the loss terms over optimiser steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from nextlat.reporting.groups import Group, benchmarks, group_runs, summarise
from nextlat.reporting.runs import Array, Run
from nextlat.reporting.theme import (
    DASHES,
    LIGHT,
    SMALL,
    Theme,
    counts,
    dress,
    legend_above,
    logarithmic,
    new_figure,
    percent,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.6
STEPS = "optimiser steps"
AXIS = {"ce": "cross-entropy, nats", "kl": "KL divergence, nats", "latent": "SmoothL1"}
HEALTH = {
    "rms": "RMS of the state",
    "deviation_min": "least deviation / RMS",
    "effective_rank": "effective rank",
    "transition_error_1": "transition error",
    "grad_norm": "gradient norm, {}",
    "cosine": "cosine, {} and ce",
}
"""Panels of :func:`health_figure`: a column of the log, or all columns ``NAME.TERM``."""
LOG_FROM = 20.0
"""A panel is drawn on a logarithmic axis when its largest value is this many times its smallest."""


def accuracy_figure(runs: Sequence[Run], metric: str | None = None, theme: Theme = LIGHT) -> Figure:
    """The headline metric over training: a panel a benchmark, a line a seed, chance and ceiling as lines.

    The gid of each line is the name of its run. An open circle marks where an unfinished run stands.
    """
    summaries = summarise(runs, metric)
    names = {s.group.benchmark: s.metric for s in summaries}
    rates = {s.group.benchmark: s.rate for s in summaries}
    panels = benchmarks([s.group for s in summaries])
    styles = group_styles([s.group for s in summaries], theme)
    figure = new_figure(WIDTH, 0.6 + 3.5 * len(panels), theme)
    unfinished = False
    for axes, (benchmark, groups) in zip(
        figure.subplots(len(panels), 1, squeeze=False).flat, panels.items(), strict=True
    ):
        name = names[benchmark]
        dress(axes, theme, benchmark, STEPS, name.replace("_", " "))
        for run, style in _styled(groups, styles):
            steps, values = run.curve(name)
            axes.plot(steps, values, gid=run.name, linewidth=1.8, alpha=0.85, **style)
            if len(steps) and not run.finished:
                unfinished = True
                axes.plot(steps[-1:], values[-1:], "o", markersize=7, mfc=theme.paper, mec=style["color"], mew=1.6)
        _steps_axis(axes, groups)
        levels = {level for group in groups for run in group.runs if (level := run.chance(name)) is not None}
        _references(axes, sorted(levels), rates[benchmark], theme)
    legend_above(figure, _legend(runs, theme, unfinished), theme)
    return figure


def loss_figure(runs: Sequence[Run], theme: Theme = LIGHT) -> Figure | None:
    """Loss terms over training: a row a benchmark, a panel a term, faint as logged and solid as a running mean.

    The gid of the logged line is the name of its run, that of the running mean ``NAME smoothed``. None where no
    run has logged a step.
    """
    terms = list(dict.fromkeys(term for run in runs for term, values in run.terms().items() if len(values)))
    if not terms:
        return None
    faint = 0.3 / len(runs) ** 0.5

    def draw(axes: Axes, run: Run, term: str, style: dict[str, Any]) -> Array:
        values = run.terms().get(term, np.empty(0))
        steps = run.metrics["step"] if len(values) else values
        axes.plot(steps, values, gid=run.name, linewidth=0.6, alpha=faint, **style | {"linestyle": "-"}, zorder=2)
        mean = running_mean(values)
        axes.plot(steps, mean, gid=f"{run.name} smoothed", linewidth=1.5, alpha=0.9, **style, zorder=3)
        return values

    return _panels(runs, {term: (term, AXIS.get(term, term)) for term in terms}, draw, 2.7, theme)


def health_figure(runs: Sequence[Run], theme: Theme = LIGHT) -> Figure | None:
    """States and gradients over training: a row a benchmark, a panel a figure, a dot an evaluation.

    The gid of each line is the name of its run. None where no run has logged any.
    """
    found = {run.name: run.health() for run in runs}
    columns = list(dict.fromkeys(name for logged in found.values() for name in logged))
    titles = {
        name: (title.format(name.partition(".")[2]), "")
        for key, title in HEALTH.items()
        for name in columns
        if name.partition(".")[0] == key
    }
    if not titles:
        return None

    def draw(axes: Axes, run: Run, name: str, style: dict[str, Any]) -> Array:
        steps, values = found[run.name].get(name, (np.empty(0), np.empty(0)))
        axes.plot(steps, values, gid=run.name, linewidth=1.2, marker=".", markersize=4, alpha=0.85, **style)
        return values

    return _panels(runs, titles, draw, 2.2, theme)


def _panels(
    runs: Sequence[Run],
    columns: Mapping[str, tuple[str, str]],
    draw: Callable[[Axes, Run, str, dict[str, Any]], Array],
    height: float,
    theme: Theme,
) -> Figure:
    """A row a benchmark, a panel a column of the log, at most three beside each other.

    Args:
        runs: to draw.
        columns: name -> title of its panel and label of its axis.
        draw: draws a run's column and returns the values; a panel without any is left out.
        height: of a row, in inches; a row of one panel gets a little more.
        theme: colours.
    """
    grouped = group_runs(runs)
    styles, of_benchmark = group_styles(grouped, theme), benchmarks(grouped)
    panels = [(benchmark, name) for benchmark in of_benchmark for name in columns]
    beside = min(3, len(columns))
    rows = ceil(len(panels) / beside)
    figure = new_figure(WIDTH, 0.6 + (height if beside > 1 else 3.3) * rows, theme)
    places = list(figure.subplots(rows, beside, squeeze=False).flat)
    for axes, (benchmark, name) in zip(places, panels, strict=False):
        title, label = columns[name]
        dress(axes, theme, f"{benchmark}: {title}" if len(of_benchmark) > 1 else title, STEPS, label, beside)
        drawn = [draw(axes, run, name, style) for run, style in _styled(of_benchmark[benchmark], styles)]
        _steps_axis(axes, of_benchmark[benchmark])
        values = np.concatenate(drawn)
        values = values[np.isfinite(values)]
        axes.set_visible(bool(values.size))  # no objective on this benchmark has it otherwise
        if values.size and values.min() > 0 and values.max() > LOG_FROM * values.min():
            logarithmic(axes)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    legend_above(figure, _legend(runs, theme), theme)
    return figure


def running_mean(values: Array) -> Array:
    """Centred mean over a fiftieth of the curve; at its ends over what there is of it."""
    window = len(values) // 50 // 2 * 2 + 1
    if window == 1:
        return values
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


Styles = dict[str, dict[str, Any]]
"""Label of a group -> colour and dashes of its lines."""


def group_styles(groups: Sequence[Group], theme: Theme) -> Styles:
    """Colour by objective, dashes by settings within it; one map for all panels of a figure and its legend."""
    colours = theme.colours([group.objective for group in groups])
    settings: dict[str, list[str]] = {}
    for group in groups:
        seen = settings.setdefault(group.objective, [])
        seen += [] if group.settings in seen else [group.settings]
    return {
        group.label: {
            "color": colours[group.objective],
            "linestyle": DASHES[settings[group.objective].index(group.settings) % len(DASHES)],
        }
        for group in groups
    }


def _styled(groups: Sequence[Group], styles: Styles) -> Iterator[tuple[Run, dict[str, Any]]]:
    for group in groups:
        for run in group.runs:
            yield run, styles[group.label]


def _legend(runs: Sequence[Run], theme: Theme, unfinished: bool = False) -> list[Artist]:
    from matplotlib.lines import Line2D

    handles: list[Artist] = [
        Line2D([], [], linewidth=2.2, label=label, **style)
        for label, style in group_styles(group_runs(runs), theme).items()
    ]
    if unfinished:
        handles.append(Line2D([], [], linestyle="", marker="o", mfc=theme.paper, mec=theme.ink, label="unfinished"))
    return handles


def _steps_axis(axes: Axes, groups: Sequence[Group]) -> None:
    counts(axes.xaxis)
    axes.set_xlim(0, max(max(run.planned_steps, run.step) for group in groups for run in group.runs) * 1.01)


def _references(axes: Axes, levels: Sequence[float], rate: bool, theme: Theme) -> None:
    """Chance and ceiling, named at the right of the panel, where no curve runs."""
    named = [(level, f"chance {100 * level:.3g} %" if rate else f"chance {level:.3g}", "--") for level in levels]
    if rate:
        named.append((1.0, "ceiling", "-"))
        percent(axes.yaxis)
        axes.set_ylim(-0.03, 1.06)
    for level, label, dashes in named:
        axes.axhline(level, color=theme.ink, linewidth=1.1, linestyle=dashes, alpha=0.75, zorder=1.5, gid=label)
        place = axes.get_yaxis_transform()
        axes.text(1.01, level, label, transform=place, fontsize=SMALL, color=theme.ink, va="center")
