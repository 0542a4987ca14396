"""The tables of a report, as Markdown, for the terminal and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from nextlat.reporting.groups import Summary, notes, summarise
from nextlat.reporting.runs import Reading, Run

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "-"
OPEN = "…"
SHORT = 10
"""Words up to this length are never broken."""
EXTRA = {"forced_whole_path": "forced path", "token_2": "branch", "basin": "basin"}


@dataclass(frozen=True)
class Grid:
    """A table as text, before it takes a form."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int
    """How many leading columns hold words; the others hold numbers and stand to the right."""
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """GitHub-flavoured Markdown with the title as a heading."""
        cells = [[_escaped(cell) for cell in row] for row in (self.columns, *self.rows)]
        rule = [":--" if i < self.words else "--:" for i in range(len(self.columns))]
        lines = ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]
        remarks = [line for note in self.notes for line in ("", _escaped(note))]
        return "\n".join([f"### {self.title}", "", *lines, *remarks, ""])

    def rich(self) -> Table:
        """For the terminal; names are shown as they are, never read as markup."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        caption = Text("\n".join(self.notes)) if self.notes else None
        table = Table(title=Text(self.title), caption=caption, box=box.SIMPLE_HEAD, title_justify="left")
        for i, name in enumerate(self.columns):
            number = i >= self.words
            short = max(len(row[i]) for row in (self.columns, *self.rows)) <= SHORT
            table.add_column(Text(name), justify="right" if number else "left", no_wrap=number or short)
        for row in self.rows:  # an interval in brackets goes below its number: width is scarce in a terminal
            cells = [*row[: self.words], *(cell.replace(" (", "\n(") for cell in row[self.words :])]
            table.add_row(*map(Text, cells))
        return table


def summary_grid(summaries: Sequence[Summary]) -> Grid:
    """One row a group: every seed, mean, interval, solve rate, chance."""
    several = len({s.group.benchmark for s in summaries}) > 1
    settings = any(s.group.settings for s in summaries)
    judged = any(s.judged for s in summaries)
    percent = all(s.rate for s in summaries)
    rows = []
    for s in summaries:
        rate = s.rate
        seeds = [
            _seed(run, reading, s.metric, rate, percent) for run, reading in zip(s.group.runs, s.readings, strict=True)
        ]
        row = [s.group.benchmark] if several else []
        row.append(s.group.objective)
        row += [s.group.settings or NOTHING] if settings else []
        row += [", ".join(seeds), show(s.mean, rate), show_interval(s.low, s.high, rate)]
        row += [_solve_rate(s)] if judged else []
        rows.append((*row, show_level(s.chance, rate)))
    words = ["benchmark"] * several + ["objective"] + ["settings"] * settings
    words.append("each seed, %" if percent else "each seed")
    numbers = ["mean", "95 % interval"] + ["solved"] * judged + ["chance"]
    metrics = list(dict.fromkeys(s.metric for s in summaries))
    kinds = {s.interval for s in summaries}
    remarks = notes(summaries)
    if "items" in kinds:
        remarks.insert(0, "Where one seed has finished, the interval is over its test items and says nothing of seeds.")
    title = f"{' and '.join(metrics)} over seeds"
    return Grid(title, (*words, *numbers), tuple(rows), len(words), tuple(remarks))


def runs_grid(runs: Sequence[Run], metric: str | None = None) -> Grid:
    """One row a run."""
    summaries = summarise(runs, metric)
    metrics = list(dict.fromkeys(s.metric for s in summaries))
    several = len({s.group.benchmark for s in summaries}) > 1
    extra = [name for name in EXTRA if any(run.reading(name) for run in runs) and name not in metrics]
    rows = []
    for s in summaries:
        words = (s.group.benchmark, s.group.label) if several else (s.group.label,)
        for run, reading in zip(s.group.runs, s.readings, strict=True):
            rows.append((run.name, *words, *_run_numbers(run, reading, s, extra)))
    names = ("run", *["benchmark"] * several, "objective")
    numbers = ("seed", "steps", " or ".join(metrics), "95 % over items", "chance")
    columns = (*names, *numbers, *(EXTRA[name] for name in extra), "last CE", "seconds")
    is_open = any(cell.endswith(OPEN) for row in rows for cell in row)
    remarks = (f"{OPEN} not of the last step: the run is unfinished, or not evaluated since.",) if is_open else ()
    return Grid("Every run", columns, tuple(rows), len(names), remarks)


def _run_numbers(run: Run, reading: Reading | None, summary: Summary, extra: Sequence[str]) -> tuple[str, ...]:
    rate, metric = summary.rate, summary.metric
    last = {name: run.metrics[name][-1] for name in ("loss", "seconds") if len(run.metrics.get(name, ()))}
    return (
        str(run.seed),
        str(run.step) if run.finished else f"{run.step} of {run.planned_steps}",
        _value(reading, rate) + (f" {OPEN}" if reading and not run.final(metric) else ""),
        show_interval(reading.low, reading.high, rate) if reading else NOTHING,
        show_level(run.chance(metric), rate),
        *(_value(run.reading(name), True) for name in extra),
        f"{last['loss']:.4f}" if "loss" in last else NOTHING,
        f"{last['seconds']:,.0f}" if "seconds" in last else NOTHING,
    )


def report_markdown(runs: Sequence[Run], metric: str | None = None, more: Sequence[Grid] = ()) -> str:
    """All tables as Markdown."""
    grids = (summary_grid(summarise(runs, metric)), *more, runs_grid(runs, metric))
    return "\n".join(grid.markdown() for grid in grids)


def summary_csv(summaries: Sequence[Summary]) -> str:
    """One line a group; ``values`` and ``seeds`` are JSON lists over its runs."""
    out = io.StringIO()
    fields = (
        "benchmark",
        "objective",
        "settings",
        "metric",
        "seeds",
        "values",
        "finished",
        "mean",
        "low",
        "high",
        "interval",
        "solved",
        "judged",
        "chance",
    )
    writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in (s.as_dict() for s in summaries):
        lists = {"seeds": "seed", "values": "value", "finished": "finished"}
        writer.writerow(record | {to: json.dumps([run[key] for run in record["runs"]]) for to, key in lists.items()})
    return out.getvalue()


def show(value: float | None, rate: bool) -> str:
    """A rate in percent with two decimals, so that one miss in 2,000 shows; any other number with four digits."""
    if value is None or not isfinite(value):
        return NOTHING
    return f"{100 * value:.2f} %" if rate else f"{value:.4g}"


def show_level(level: float | None, rate: bool) -> str:
    """A chance level: ``50 %``, ``14.29 %``."""
    return NOTHING if level is None else f"{100 * level:.4g} %" if rate else f"{level:.4g}"


def show_interval(low: float | None, high: float | None, rate: bool) -> str:
    """``98.6 to 99.4 %``."""
    if low is None or high is None:
        return NOTHING
    return f"{100 * low:.1f} to {100 * high:.1f} %" if rate else f"{low:.4g} to {high:.4g}"


def _value(reading: Reading | None, rate: bool) -> str:
    if reading is None:
        return NOTHING
    return reading.value if isinstance(reading.value, str) else show(reading.value, rate)


def _seed(run: Run, reading: Reading | None, metric: str, rate: bool, bare: bool) -> str:
    if reading is None:
        return NOTHING
    text = show(reading.number, rate)
    text = text.removesuffix(" %") if bare else text
    return text if run.final(metric) else f"{text} at step {reading.step} of {run.planned_steps}"


def _solve_rate(summary: Summary) -> str:
    rate = summary.solve_rate
    if rate is None:
        return NOTHING
    return f"{summary.solved} of {summary.judged} ({100 * rate[1]:.0f} to {100 * rate[2]:.0f} %)"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
