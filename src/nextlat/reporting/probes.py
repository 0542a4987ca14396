"""What linear probes found: how much states say of the tokens ahead, against gpt and against tables of pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import isfinite, nan
from typing import TYPE_CHECKING

import numpy as np

from nextlat.reporting.curves import Styles, group_styles
from nextlat.reporting.groups import Group, benchmarks, group_runs
from nextlat.reporting.runs import Array, Run
from nextlat.reporting.tables import NOTHING, Grid
from nextlat.reporting.theme import LIGHT, SMALL, Theme, dress, legend_above, new_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.6
SHOWN = (1, 2, 4, 8, 16, 20)
"""Offsets of the table."""
REFERENCE = "gpt"
KINDS = {"probe": "", "probe_row": ", all pairs of a row"}
"""Prefix of the metrics of each kind of pairs, and what it is called beside the usual one."""


def probes_figure(runs: Sequence[Run], theme: Theme = LIGHT) -> Figure | None:
    """Cross-entropy of probes over the offset: the difference to gpt, and the value beside the baselines.

    A row of panels a benchmark and kind of pairs; a thin line a seed with the run's name as its gid, a thick one the
    mean of a group's seeds. Without gpt the differences are left out. None where no run has probes.
    """
    rows = [
        (f"{benchmark}{words}", prefix, probed)
        for benchmark, groups in benchmarks(group_runs(runs)).items()
        for prefix, words in KINDS.items()
        if (probed := _probed(groups, prefix))
    ]
    if not rows:
        return None
    columns = 2 if any(_reference(groups, prefix) is not None for _, prefix, groups in rows) else 1
    figure = new_figure(WIDTH, 0.6 + 3.4 * len(rows), theme)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    everything = [group for _, _, groups in rows for group in groups]
    styles = group_styles(everything, theme)
    for (title, prefix, groups), places in zip(rows, panels, strict=True):
        reference = _reference(groups, prefix)
        if reference is not None:
            _draw(places[0], groups, prefix, theme, styles, reference, f"{title}: less is better")
            places[0].axhline(0, color=theme.ink, linewidth=1.1, alpha=0.6, zorder=1.5)
        elif columns == 2:
            places[0].set_visible(False)
        _draw(places[-1], groups, prefix, theme, styles, None, f"{title}: beside the baselines")
        _draw_baselines(places[-1], groups, prefix, theme)
    legend_above(figure, _legend(everything, styles, theme), theme)
    return figure


def probes_grid(runs: Sequence[Run]) -> Grid | None:
    """One row a group and two for the baselines: the mean over seeds at some offsets, with the difference to gpt."""
    several = len(benchmarks(group_runs(runs))) > 1
    rows: list[tuple[str, ...]] = []
    for benchmark, all_groups in benchmarks(group_runs(runs)).items():
        for prefix, words in KINDS.items():
            groups = _probed(all_groups, prefix)
            if not groups:
                continue
            reference = _reference(groups, prefix)
            lead = (f"{benchmark}{words}",) if several else ()
            lines = [(group.label + words, str(len(group.runs)), _mean(group.runs, f"{prefix}_ce")) for group in groups]
            members = [run for group in groups for run in group.runs]
            lines.append((f"bigram k apart{words}", NOTHING, _mean(members, f"{prefix}_bigram")))
            for label, seeds, curve in lines:
                rows.append((*lead, label, seeds, *(_cell(curve, reference, k) for k in SHOWN)))
            if prefix == "probe":
                level = _level(members)
                rows.append((*lead, "unigram", NOTHING, NOTHING if level is None else f"{level:.3f}", *[""] * 5))
    if not rows:
        return None
    words_of = ("benchmark",) * several + ("probe of",)
    return Grid(
        "Cross-entropy of linear probes k tokens ahead, nats",
        (*words_of, "seeds", *(f"k = {k}" for k in SHOWN)),
        tuple(rows),
        len(words_of),
        (f"In brackets the difference to the mean of {REFERENCE}; below zero the state says more.",),
    )


def _probed(groups: Iterable[Group], prefix: str) -> list[Group]:
    """Groups with their runs that have probes of a kind."""
    kept = []
    for group in groups:
        runs = tuple(run for run in group.runs if f"{prefix}_ce_1" in run.evaluations.get("probes", {}))
        if runs:
            kept.append(Group(group.benchmark, group.objective, group.settings, runs))
    return kept


def _curve(run: Run, name: str) -> Array:
    """(K,) a metric over offsets, nan where there is none."""
    found = run.evaluations.get("probes", {})
    places = [int(match[1]) for key in found if (match := re.fullmatch(rf"{name}_(\d+)", key))]
    return np.array(
        [found[f"{name}_{k}"].number if f"{name}_{k}" in found else nan for k in range(1, max(places, default=0) + 1)]
    )


def _mean(runs: Sequence[Run], name: str) -> Array:
    """(K,) mean over runs, as far as all of them reach."""
    curves = [curve for run in runs if len(curve := _curve(run, name))]
    reach = min((len(curve) for curve in curves), default=0)
    mean: Array = np.mean([curve[:reach] for curve in curves], axis=0) if curves else np.empty(0)
    return mean


def _reference(groups: Sequence[Group], prefix: str) -> Array | None:
    runs = [run for group in groups if group.objective == REFERENCE for run in group.runs]
    return _mean(runs, f"{prefix}_ce") if runs else None


def _level(runs: Sequence[Run]) -> float | None:
    values = [
        run.evaluations["probes"]["probe_unigram"].number
        for run in runs
        if "probe_unigram" in run.evaluations["probes"]
    ]
    return float(np.mean(values)) if values else None


def _cell(curve: Array, reference: Array | None, k: int) -> str:
    if k > len(curve) or not isfinite(curve[k - 1]):
        return NOTHING
    text = f"{curve[k - 1]:.3f}"
    if reference is None or k > len(reference):
        return text
    return f"{text} ({curve[k - 1] - reference[k - 1]:+.3f})"


def _draw(
    axes: Axes,
    groups: Sequence[Group],
    prefix: str,
    theme: Theme,
    styles: Styles,
    reference: Array | None,
    title: str,
) -> None:
    name = f"{prefix}_ce"
    y = "cross-entropy, nats" if reference is None else f"cross-entropy less that of {REFERENCE}, nats"
    dress(axes, theme, title, "tokens ahead, k", y, 2)
    for group in groups:
        curves = [(run.name, _curve(run, name), 0.8, 0.45) for run in group.runs if len(group.runs) > 1]
        whole = (group.label, _mean(group.runs, name), 2.2, 1.0)
        for gid, curve, width, alpha in [*curves, whole]:
            reach = len(curve) if reference is None else min(len(curve), len(reference))
            values = curve[:reach] - (0 if reference is None else reference[:reach])
            axes.plot(
                np.arange(1, reach + 1),
                values,
                gid=gid,
                **styles[group.label],
                linewidth=width,
                alpha=alpha,
                zorder=3 if width > 1 else 2,
            )
    longest = max(len(_curve(run, name)) for group in groups for run in group.runs)
    axes.set_xlim(0.5, longest + 0.5)
    axes.set_xticks([k for k in (1, 4, 8, 12, 16, 20) if k <= longest] if longest > 6 else range(1, longest + 1))


def _draw_baselines(axes: Axes, groups: Sequence[Group], prefix: str, theme: Theme) -> None:
    """The table of pairs, and the unigram as a level; each is named where it ends."""
    runs = [run for group in groups for run in group.runs]
    bigram, level = _mean(runs, f"{prefix}_bigram"), _level(runs)
    if len(bigram):
        axes.plot(
            np.arange(1, len(bigram) + 1), bigram, color=theme.ink, linewidth=1.4, linestyle=(0, (4, 2)), gid="bigram"
        )
    if level is not None:
        axes.axhline(level, color=theme.ink, linewidth=1.1, linestyle=(0, (1, 2)), gid="unigram", zorder=1.5)
        at = axes.get_yaxis_transform()
        axes.text(0.02, level, "unigram", transform=at, fontsize=SMALL, color=theme.ink, va="bottom")


def _legend(groups: Sequence[Group], styles: Styles, theme: Theme) -> list[Artist]:
    from matplotlib.lines import Line2D

    handles: list[Artist] = [Line2D([], [], linewidth=2.2, label=label, **style) for label, style in styles.items()]
    if any(len(group.runs) > 1 for group in groups):
        handles.append(Line2D([], [], linewidth=0.8, alpha=0.6, color=theme.ink, label="one seed"))
    handles.append(Line2D([], [], linewidth=1.4, color=theme.ink, linestyle=(0, (4, 2)), label="bigram k apart"))
    return handles
