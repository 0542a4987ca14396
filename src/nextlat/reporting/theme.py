"""How figures look: colours that the colour-blind tell apart, on paper and on a dark screen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from nextlat.errors import NextLatError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (10, 2)),
    (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)),
)
KNOWN = ("nextlat", "gpt", "mtp", "jtp", "bst")
TEXT = 11.0
SMALL = 9.5


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance."""

    name: str
    paper: str
    ink: str
    quiet: str
    """Grid, spines and reference lines."""
    good: str
    """Shade of the solved basin."""
    poor: str
    """Shade of the shortcut basin."""
    palette: tuple[str, ...]

    def colours(self, objectives: Sequence[str]) -> dict[str, str]:
        """A colour for each objective, the same in every report; unknown names take what is left, in order."""
        others = [name for name in dict.fromkeys(objectives) if name not in KNOWN]
        places = {name: i for i, name in enumerate((*KNOWN, *others))}
        return {name: self.palette[places[name] % len(self.palette)] for name in objectives}


# Okabe and Ito's palette, its yellow left out; lighter for the dark screen.
LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1c1f24",
    quiet="#767b84",
    good="#d7efe3",
    poor="#f7e3d4",
    palette=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#4d4d4d"),
)
DARK = Theme(
    name="dark",
    paper="#181b20",
    ink="#e8eaed",
    quiet="#969ca6",
    good="#1d3a2f",
    poor="#43301f",
    palette=("#62b8f2", "#ff9248", "#3ccfa0", "#ee9fca", "#e8b84a", "#a8dcff", "#c4c4c4"),
)
THEMES = (LIGHT, DARK)


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure that no global state knows of, in inches.

    Raises:
        NextLatError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NextLatError('figures need matplotlib: pip install "nextlat[plots]"') from error
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, theme: Theme, title: str, x: str, y: str, columns: int = 1, above: float = 6.0) -> None:
    """Titles, labels and colours of one of ``columns`` panels beside each other; the title ``above`` it, in points."""
    axes.set_facecolor(theme.paper)
    axes.set_title(fill(title, 72 // columns), loc="left", pad=above, fontsize=TEXT, color=theme.ink, fontweight="bold")
    axes.set_xlabel(x, fontsize=TEXT, color=theme.ink)
    axes.set_ylabel(y, fontsize=TEXT, color=theme.ink)
    axes.tick_params(which="both", labelsize=SMALL, colors=theme.ink, length=0)
    axes.grid(True, color=theme.quiet, alpha=0.22, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.quiet)


def legend_above(figure: Figure, handles: Sequence[Artist], theme: Theme) -> None:
    """A legend over the panels, where it covers no data."""
    if handles:
        lengths = [len(str(handle.get_label())) + 7 for handle in handles]
        columns = len(handles) if sum(lengths) <= 96 else max(1, 96 // max(lengths))
        figure.legend(
            handles=list(handles),
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            fontsize=SMALL + 0.5,
            labelcolor=theme.ink,
            handlelength=2.6,
        )


def percent(axis: Axis) -> None:
    """Tick labels in percent for values from 0 to 1."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    axis.set_major_locator(MultipleLocator(0.25))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))


def counts(axis: Axis) -> None:
    """Few tick labels with thousands set apart."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def logarithmic(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers, two to a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def pale(colour: str, theme: Theme, share: float = 0.38) -> tuple[float, float, float]:
    """The colour mixed into the paper."""
    from matplotlib.colors import to_rgb

    red, green, blue = (share * c + (1 - share) * p for c, p in zip(to_rgb(colour), to_rgb(theme.paper), strict=True))
    return red, green, blue


def png(figure: Figure, dpi: int = 170) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"agg.path.chunksize": 10_000}):  # Agg refuses longer noisy lines
        figure.savefig(out, format="png", dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return out.getvalue()


def size(figure: Figure) -> tuple[int, int]:
    """Width and height in hundredths of an inch, the size a page gives it."""
    width, height = figure.get_size_inches()
    return round(100 * width), round(100 * height)
