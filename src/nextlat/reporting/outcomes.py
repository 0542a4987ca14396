"""What training came to: where every seed ended, and accuracy by place in the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from nextlat.reporting.groups import Group, Summary, benchmarks, group_runs, summarise
from nextlat.reporting.runs import Array, Run
from nextlat.reporting.theme import LIGHT, SMALL, Theme, dress, legend_above, new_figure, pale, percent
from nextlat.statistics import SHORTCUT_WITHIN, SOLVED_FROM

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.6
BRANCH = (0, (2, 1))
MEAN_BELOW = 11.0
"""Points from the lowest dot of a row to its mean."""


@dataclass(frozen=True)
class Row:
    """Where the dots of a group stand."""

    summary: Summary
    heights: list[float]
    """Of each run's dot, in points from the top of the panel."""
    dot: float
    """Diameter, in points."""
    middle: float
    end: float


def seeds_figure(runs: Sequence[Run], metric: str | None = None, theme: Theme = LIGHT) -> Figure:
    """Where every seed ended: a panel a benchmark, a row a group, a dot a run, the mean and its interval below.

    Hollow dots are the latest values of runs that have not been measured at their last step. The basins are
    shaded where evaluations name them. The gid of each dot is the name of its run.
    """
    summaries = summarise(runs, metric)
    panels = benchmarks([s.group for s in summaries])
    layouts = {name: _rows([s for s in summaries if s.group.benchmark == name]) for name in panels}
    heights = [1.1 + rows[-1].end / 72 for rows in layouts.values()]
    figure = new_figure(WIDTH, 0.7 + sum(heights), theme)
    places = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flat
    colours = theme.colours([run.objective for run in runs])
    shaded = False
    for axes, (benchmark, rows) in zip(places, layouts.items(), strict=True):
        dress(axes, theme, benchmark, rows[0].summary.metric.replace("_", " "), "", above=20)
        axes.grid(False, axis="y")
        for row in rows:
            _draw_seeds(axes, row, colours[row.summary.group.objective], theme)
        axes.set_yticks([row.middle for row in rows], [fill(row.summary.group.label, 26) for row in rows])
        axes.set_ylim(rows[-1].end, 0)
        shaded |= _draw_levels(axes, [row.summary for row in rows], theme)
    legend_above(figure, _seeds_legend(summaries, shaded, theme), theme)
    return figure


def token_figure(runs: Sequence[Run], theme: Theme = LIGHT) -> Figure | None:
    """Accuracy by place in the answer, generated beside teacher-forced: a panel a group, a dot a seed.

    Bars are means over the evaluated runs. None where no evaluation has accuracies by token.
    """
    groups = [group for group in group_runs(runs) if _token_places(group)]
    if not groups:
        return None
    columns = min(2, len(groups))
    rows = ceil(len(groups) / columns)
    figure = new_figure(WIDTH, 0.7 + 2.7 * rows, theme)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    several = len({group.benchmark for group in groups}) > 1
    for axes, group in zip(panels, groups, strict=False):
        title = f"{group.benchmark}: {group.label}" if several else group.label
        dress(axes, theme, title, "token of the answer", "accuracy", columns)
        axes.grid(False, axis="x")
        _draw_tokens(axes, group, theme)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    legend_above(figure, _token_legend(theme), theme)
    return figure


def _draw_seeds(axes: Axes, row: Row, colour: str, theme: Theme) -> None:
    summary = row.summary
    for run, x, y in zip(summary.group.runs, _numbers(summary), row.heights, strict=True):
        style = {"mfc": colour if run.final(summary.metric) else theme.paper, "mec": colour, "mew": 1.4, "alpha": 0.85}
        axes.plot(x, y, "o", ms=row.dot, gid=run.name, clip_on=False, zorder=3, **style)  # type: ignore[arg-type]
    if summary.interval == "seeds" and summary.mean is not None:
        low, high = summary.low or 0.0, summary.high or 0.0
        ends = [[summary.mean - low], [high - summary.mean]]
        style = {"fmt": "D", "ms": 5, "capsize": 3, "elinewidth": 1.3, "zorder": 4, "clip_on": False}
        axes.errorbar(summary.mean, max(row.heights) + MEAN_BELOW, xerr=ends, color=theme.ink, **style)  # type: ignore[arg-type]


def _numbers(summary: Summary) -> Array:
    return np.array([reading.number if reading else np.nan for reading in summary.readings])


def _rows(summaries: Sequence[Summary]) -> list[Row]:
    dot = 7.5 if max(len(s.readings) for s in summaries) <= 6 else 6.0
    rows: list[Row] = []
    for summary in summaries:
        top = rows[-1].end if rows else 0.0
        levels = np.array(_levels(_numbers(summary), summary.rate, dot))
        height = max(44.0, float(np.ptp(levels)) * dot + MEAN_BELOW + 28)
        heights = top + (height - MEAN_BELOW) / 2 + (levels - (levels.min() + levels.max()) / 2) * dot
        rows.append(Row(summary, heights.tolist(), dot, top + height / 2, top + height))
    return rows


def _levels(numbers: Array, rate: bool, dot: float) -> list[int]:
    """Whole heights 0, 1, -1, 2 ... that keep dots of nearly equal value apart."""
    finite = numbers[np.isfinite(numbers)]
    near = dot / 400 * (1.0 if rate or not finite.size else float(np.ptp(finite) or 1))  # a panel is 400 points wide
    levels = [0] * len(numbers)
    done: list[int] = []
    for i in np.argsort(numbers):
        if isfinite(numbers[i]):
            taken = {levels[k] for k in done if numbers[i] - numbers[k] < near}
            free = (level for step in range(len(numbers) + 1) for level in (step, -step) if level not in taken)
            levels[i] = next(free)
            done.append(int(i))
    return levels


def _draw_levels(axes: Axes, rows: Sequence[Summary], theme: Theme) -> bool:
    """Chance, ceiling and basins; says whether basins are shaded."""
    levels = sorted({s.chance for s in rows if s.chance is not None})
    rate = rows[0].rate
    named = [(level, f"chance {100 * level:.3g} %" if rate else f"chance {level:.3g}", "--") for level in levels]
    basins = any(run.reading("basin") for s in rows for run in s.group.runs)
    if rate:
        named.append((1.0, "ceiling", "-"))
        percent(axes.xaxis)
        axes.set_xlim(-0.02, 1.02)
        if basins:
            axes.axvspan(SOLVED_FROM, 1.02, color=theme.good, zorder=0, linewidth=0)
            for level in levels:
                axes.axvspan(level - SHORTCUT_WITHIN, level + SHORTCUT_WITHIN, color=theme.poor, zorder=0, linewidth=0)
    for level, label, dashes in named:
        axes.axvline(level, color=theme.ink, linewidth=1.1, linestyle=dashes, alpha=0.75, zorder=1.5, gid=label)
        at = axes.get_xaxis_transform()
        axes.text(level, 1.02, label, transform=at, fontsize=SMALL, color=theme.ink, ha="center", va="bottom")
    return rate and basins


def _seeds_legend(summaries: Sequence[Summary], shaded: bool, theme: Theme) -> list[Artist]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    final = [run.final(s.metric) is not None for s in summaries for run in s.group.runs if run.reading(s.metric)]
    dot = {"linestyle": "", "marker": "o", "markersize": 7, "markeredgecolor": theme.ink}
    handles: list[Artist] = []
    if any(final):
        handles.append(Line2D([], [], color=theme.ink, label="one seed", **dot))  # type: ignore[arg-type]
    if not all(final):
        handles.append(Line2D([], [], color=theme.paper, label="unfinished", **dot))  # type: ignore[arg-type]
    if any(s.interval == "seeds" for s in summaries):
        handles.append(Line2D([], [], color=theme.ink, marker="D", markersize=5, label="mean, 95 % interval"))
    if shaded:
        handles += [Patch(color=theme.good, label="solved"), Patch(color=theme.poor, label="shortcut")]
    return handles


def _token_places(group: Group) -> list[int]:
    names = {name for run in group.runs for name in run.evaluations.get("accuracy", {})}
    return sorted(int(match[2]) for name in names if (match := re.fullmatch(r"(forced_)?token_(\d+)", name)))


def _draw_tokens(axes: Axes, group: Group, theme: Theme) -> None:
    colour = theme.colours([group.objective])[group.objective]
    places = sorted(set(_token_places(group)))
    faces = {"token_": colour, "forced_token_": pale(colour, theme)}
    for place in places:
        levels: set[float] = set()
        for side, (prefix, fill_colour) in zip((-0.2, 0.2), faces.items(), strict=True):
            found = (run.evaluations.get("accuracy", {}).get(f"{prefix}{place}") for run in group.runs)
            readings = [reading for reading in found if reading is not None and isfinite(reading.number)]
            if not readings:
                continue
            values = np.array([reading.number for reading in readings])
            x = place + side
            axes.bar(x, values.mean(), 0.36, color=fill_colour, gid=f"{prefix}{place}")
            apart = x + 0.12 * np.linspace(-1, 1, len(values)) if len(values) > 1 else [x]
            axes.plot(apart, values, "o", ms=3.6, mfc=theme.paper, mec=theme.ink, mew=0.8, clip_on=False, zorder=3)
            levels |= {reading.chance for reading in readings if reading.chance is not None}
        for level in levels:
            axes.hlines(level, place - 0.46, place + 0.46, color=theme.ink, linewidth=1.8, linestyle=BRANCH, zorder=4)
    axes.axhline(1.0, color=theme.ink, linewidth=1.1, alpha=0.75)
    axes.set_xticks(places)
    axes.set_ylim(0, 1.06)
    percent(axes.yaxis)


def _token_legend(theme: Theme) -> list[Artist]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Patch(color=theme.quiet, label="generated"),
        Patch(color=pale(theme.quiet, theme), label="teacher-forced"),
        Line2D([], [], linestyle="", marker="o", markersize=4, mfc=theme.paper, mec=theme.ink, label="one seed"),
        Line2D([], [], color=theme.ink, linewidth=1.6, linestyle=BRANCH, label="chance at the branch"),
    ]
