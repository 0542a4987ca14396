"""What a benchmark reports: ratios with their targets, and the setting they were measured in."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table

COLUMNS = {"figure": 54, "value": 8, "target": 11, "met": 4, "wall": 6, "quartiles": 12, "limit": 6, "of": 20}
WIDTH = sum(COLUMNS.values()) + 2 * len(COLUMNS)

Effort = Literal["full", "quick", "tiny"]
"""How large and how often: ``tiny`` is for tests, and its figures mean nothing."""


@dataclass(frozen=True)
class Result:
    """One figure.

    Args:
        name: what is divided by what.
        value: the figure; ``None`` if it could not be measured, for the reason in ``note``.
        target: the value asked for; ``None`` for figures that stand beside others.
        at_least: whether the target is a lower bound; otherwise it is an upper one.
        wall: the same ratio of wall time, where it is one of times.
        spread: quartiles of the ratios of single repetitions.
        limit: the best value that any implementation could reach, computed or measured.
        note: what limits it, or what else must be known.
        of: what was divided, with its unit.
        setting: sizes and repetitions.
        details: seconds, bytes and whatever the figure was made of.
    """

    name: str
    value: float | None
    target: float | None = None
    at_least: bool = True
    wall: float | None = None
    spread: tuple[float, float] | None = None
    limit: float | None = None
    note: str = ""
    of: str = ""
    setting: dict[str, Any] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; ``None`` without one, or without a value."""
        if self.target is None or self.value is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "met": self.met}


def machine() -> dict[str, Any]:
    """What every figure of a process shares."""
    import torch

    from nextlat.training.environment import commit, hardware

    return {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def table(results: Sequence[Result]) -> Table:
    """One line a figure, under their common setting; columns have the same widths in every table."""
    out = Table(title=described(results[0].setting), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column, width in COLUMNS.items():
        out.add_column(column, width=width, no_wrap=True, justify="left" if column == "figure" else "right")
    for result in results:
        sign = ">=" if result.at_least else "<="
        out.add_row(
            result.name,
            "-" if result.value is None else number(result.value),
            "" if result.target is None else f"{sign} {number(result.target)}",
            {None: "", True: "yes", False: "NO"}[result.met],
            "" if result.wall is None else number(result.wall),
            "" if result.spread is None else f"{number(result.spread[0])}-{number(result.spread[1])}",
            "" if result.limit is None else number(result.limit),
            result.of,
        )
    return out


def notes(results: Sequence[Result]) -> list[str]:
    """The remarks on the figures, each once."""
    return list(dict.fromkeys(result.note for result in results if result.note))


def described(setting: dict[str, Any]) -> str:
    """``V 1000, D 256``."""
    return ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in setting.items()
    )


def number(value: float) -> str:
    """Three digits, or two decimals from 1 on."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 1 else f"{value:,.2f}"


def milliseconds(one: float, other: float) -> str:
    """Two times, given in seconds."""
    return f"{1000 * one:,.1f}/{1000 * other:,.1f} ms"
