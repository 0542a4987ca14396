"""The report as one self-contained HTML file: it opens from disk, asks nothing of a network and prints."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

from nextlat.reporting.groups import NOT_RATES, Summary
from nextlat.reporting.runs import Run
from nextlat.reporting.tables import NOTHING, Grid, runs_grid, show, show_interval, show_level, summary_grid

BASINS = (
    "<strong>Basin</strong> names where a run ended: <em>solved</em> from 90 % on, <em>shortcut</em> within 5 points "
    "of chance (the model has learned to go on with an answer but not to choose it), <em>broken</em> below that, "
    "<em>partial</em> between. Runs of one configuration fall into different basins by their seed alone, so read the "
    "seeds and the share that solved; the mean describes neither kind."
)
MEANING = (
    "<strong>Chance</strong>{level} is what guessing among the possible answers scores; a score is worth its distance "
    "from it. The <strong>ceiling</strong> is 100 %, every answer right in all its tokens."
)
NO_SHARE = "Cross-entropies are in nats a token on held-out text: less is better."

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
$style</style>
</head>
<body>
<header>
<h1>$heading</h1>
<p class="quiet">$subtitle</p>
</header>
<main>
<section aria-labelledby="result">
<h2 id="result">Result</h2>
$summary
<p>$meaning</p>
</section>
$figures
<section aria-labelledby="runs">
<h2 id="runs">Every run</h2>
$runs
</section>
<section aria-labelledby="environment">
<h2 id="environment">Environment</h2>
$environment
</section>
<section aria-labelledby="details">
<h2 id="details">Details of each run</h2>
$details
</section>
</main>
</body>
</html>
""")


@dataclass(frozen=True)
class Picture:
    """A drawn figure, for light and for dark screens."""

    title: str
    caption: str
    alt: str
    light: bytes
    dark: bytes
    width: int
    height: int


def report_page(
    runs: Sequence[Run],
    summaries: Sequence[Summary],
    pictures: Sequence[Picture],
    metric: str | None = None,
    more: Sequence[Grid] = (),
) -> str:
    """The whole page; everything that comes from a run is escaped."""
    tasks = ", ".join(dict.fromkeys(run.task for run in runs))
    unfinished = sum(not run.finished for run in runs)
    objectives = ", ".join(dict.fromkeys(run.objective for run in runs))
    counted = f"{len(runs)} run{'s' * (len(runs) > 1)} of {objectives}"
    subtitle = counted + (f"; {unfinished} unfinished" if unfinished else "")
    return PAGE.substitute(
        title=escape(f"{tasks}: next-latent report"),
        style=files("nextlat.reporting").joinpath("page.css").read_text(encoding="utf-8"),
        heading=escape(tasks),
        subtitle=escape(subtitle),
        summary=_table(summary_grid(summaries)),
        meaning=_meaning(summaries),
        figures="\n".join([*(_figure(i, picture) for i, picture in enumerate(pictures)), *map(_section, more)]),
        runs=f'<div class="runs">{_table(runs_grid(runs, metric))}</div>',
        environment=_table(_environment_grid(runs)),
        details="\n".join(_details(run) for run in runs),
    )


def _meaning(summaries: Sequence[Summary]) -> str:
    levels = sorted({s.chance for s in summaries if s.chance is not None and s.chance <= 1})
    if all(s.metric in NOT_RATES for s in summaries):
        return NO_SHARE
    level = f" ({', '.join(show_level(level, True) for level in levels)})" if levels else ""
    return MEANING.format(level=level) + (f" {BASINS}" if any(s.judged for s in summaries) else "")


def _table(grid: Grid) -> str:
    long = [max((len(row[i]) for row in grid.rows), default=0) > 36 for i in range(len(grid.columns))]

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [("word long" if long[i] else "word") if i < grid.words else "number" for i in range(len(cells))]
        scope = ' scope="col"' if tag == "th" else ""
        shown = [escape(cell) for cell in cells]
        if tag == "th":  # long metric names may break
            shown = [cell.replace("_", "_<wbr>") for cell in shown]
        inside = "".join(
            f'<{tag} class="{kind}"{scope}>{cell}</{tag}>' for kind, cell in zip(kinds, shown, strict=True)
        )
        return f"<tr>{inside}</tr>"

    head, body = row(grid.columns, "th"), "\n".join(row(cells, "td") for cells in grid.rows)
    remarks = "".join(f'<p class="quiet">{escape(note)}</p>\n' for note in grid.notes)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(grid.title)}"><table>\n'
        f"<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n{remarks}"
    )


def _section(grid: Grid) -> str:
    return f"<section>\n<h2>{escape(grid.title)}</h2>\n{_table(grid)}</section>"


def _figure(number: int, picture: Picture) -> str:
    light, dark = (base64.b64encode(data).decode() for data in (picture.light, picture.dark))
    uri = "data:image/png;base64,"
    return (
        f'<section aria-labelledby="figure-{number}">\n<h2 id="figure-{number}">{escape(picture.title)}</h2>\n'
        "<figure>\n"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(picture.title)}"><picture>\n'
        f'<source media="screen and (prefers-color-scheme: dark)" srcset="{uri}{dark}">\n'
        f'<img src="{uri}{light}" alt="{escape(picture.alt)}" width="{picture.width}" height="{picture.height}">\n'
        f"</picture></div>\n<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n</section>"
    )


def _environment_grid(runs: Sequence[Run]) -> Grid:
    """A row for each environment that differs in more than the time it started, with the runs made in it."""
    own = ("started", "config_hash", "chance")
    keys = list(dict.fromkeys(k for run in runs for k, v in run.environment.items() if k not in own and _plain(v)))
    made: dict[tuple[str, ...], int] = {}
    for run in runs:
        values = tuple(_text(run.environment.get(key)) for key in keys)
        made[values] = made.get(values, 0) + 1
    columns = (*keys, "runs")
    return Grid("Environment", columns, tuple((*v, str(n)) for v, n in made.items()), len(keys))


def _plain(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _text(value: object) -> str:
    return NOTHING if value is None else str(value)


def _details(run: Run) -> str:
    parts = [f"<p><code>{escape(str(run.directory))}</code></p>"]
    for name, metrics in run.evaluations.items():
        rows = []
        for metric, reading in metrics.items():
            value = reading.value if isinstance(reading.value, str) else show(reading.value, rate=False)
            items = NOTHING if reading.n is None else f"{reading.n:,}"
            interval = show_interval(reading.low, reading.high, rate=False)
            rows.append((metric, value, interval, items, show(reading.chance, rate=False)))
        grid = Grid(f"{name} of {run.name}", ("metric", "value", "95 % interval", "items", "chance"), tuple(rows), 1)
        step = next(iter(metrics.values())).step if metrics else run.step
        parts.append(f"<h3>{escape(name)}, step {step:,}</h3>\n{_table(grid)}")
    environment = json.dumps(dict(run.environment), indent=2, ensure_ascii=False)
    parts.append(f'<h3>Configuration</h3>\n<pre tabindex="0">{escape(run.config_text)}</pre>')
    parts.append(f'<h3>Environment</h3>\n<pre tabindex="0">{escape(environment)}</pre>')
    state = "" if run.finished else f' <span class="quiet">step {run.step} of {run.planned_steps}</span>'
    return f"<details>\n<summary>{escape(run.name)}{state}</summary>\n" + "\n".join(parts) + "\n</details>"
