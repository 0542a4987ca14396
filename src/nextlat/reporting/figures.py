"""The figures of a report, each with a title, what it shows and a description for who cannot see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nextlat.reporting.curves import accuracy_figure, health_figure, loss_figure
from nextlat.reporting.groups import Summary, summarise
from nextlat.reporting.outcomes import seeds_figure, token_figure
from nextlat.reporting.probes import probes_figure
from nextlat.reporting.runs import Run
from nextlat.reporting.tables import show
from nextlat.reporting.theme import Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """One figure of the report."""

    name: str
    title: str
    caption: str
    alt: str
    """Read aloud in place of the figure."""
    draw: Callable[[Theme], Figure | None]
    """None where the runs lack what the figure shows."""


def drawings(runs: Sequence[Run], metric: str | None = None) -> list[Drawing]:
    """The figures of a report in the order of reading; nothing is drawn yet."""
    summaries = summarise(runs, metric)
    return [
        Drawing(
            "seeds",
            "Where every seed ended",
            "One dot is one run at its last evaluation; hollow, if it is not finished. The diamond is the mean over "
            "finished seeds with its 95 % interval.",
            "Dots on an axis, a row for each objective. " + " ".join(map(_told, summaries)),
            lambda theme: seeds_figure(runs, metric, theme),
        ),
        Drawing(
            "accuracy",
            "Accuracy during training" if all(s.rate for s in summaries) else "Held-out figures during training",
            "One line is one seed, measured on held-out items.",
            "Curves over optimiser steps, one for each run. " + " ".join(map(_told, summaries)),
            lambda theme: accuracy_figure(runs, metric, theme),
        ),
        Drawing(
            "tokens",
            "Accuracy by token",
            "Solid bars: the model writes the answer itself. Pale bars: it reads the true answer up to that token. "
            "Pale bars that are full but for one at chance, where the answer branches, are the mark of the shortcut.",
            "Bars for each token of the answer, generated and teacher-forced, a panel for each objective; the values "
            "are in the details of each run.",
            lambda theme: token_figure(runs, theme),
        ),
        Drawing(
            "probes",
            "What the state says of the tokens ahead",
            "A linear map without bias predicts the token k places ahead from the frozen state. Thin lines are seeds, "
            "thick ones their means. The bigram is a table of pairs of tokens k apart, made from the same rows.",
            "Curves over the offset k, one for each run and one for the mean of each objective; the values are in the "
            "table of probes.",
            lambda theme: probes_figure(runs, theme),
        ),
        Drawing(
            "loss",
            "Loss terms during training",
            "Faint: every optimiser step. Solid: running mean over a fiftieth of the run. Without the terms' weights.",
            "Curves over optimiser steps, one for each run, a panel for each loss term.",
            lambda theme: loss_figure(runs, theme),
        ),
        Drawing(
            "health",
            "States and gradients during training",
            "At evaluations. States are of held-out items: those that collapse lose rank and deviation. The transition "
            "error is the squared one of a latent step over the variance of states. Gradients are of each term with "
            "its weight, over the plain model; a cosine near -1 undoes what the cross-entropy does.",
            "Curves over optimiser steps, one for each run, a panel for each figure of states and gradients.",
            lambda theme: health_figure(runs, theme),
        ),
    ]


def _told(summary: Summary) -> str:
    ends = ", ".join(show(reading.number, summary.rate) for reading in summary.readings if reading is not None)
    return f"{summary.group.benchmark}, {summary.group.label}: {ends or 'no evaluation yet'}."


__all__ = [
    "Drawing",
    "accuracy_figure",
    "drawings",
    "health_figure",
    "loss_figure",
    "probes_figure",
    "seeds_figure",
    "token_figure",
]
