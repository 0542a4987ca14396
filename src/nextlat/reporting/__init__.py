"""Tables, figures and a self-contained page, made from run directories alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nextlat.files import explained, write_bytes
from nextlat.reporting.figures import drawings
from nextlat.reporting.groups import Summary, group_runs, summarise
from nextlat.reporting.load import load_run, load_runs
from nextlat.reporting.page import Picture, report_page
from nextlat.reporting.probes import probes_grid
from nextlat.reporting.runs import Reading, Run
from nextlat.reporting.tables import Grid, report_markdown, runs_grid, summary_csv, summary_grid
from nextlat.reporting.theme import DARK, LIGHT, png, size


def write_report(run_dirs: Sequence[Path], out: Path, metric: str | None = None) -> Path:
    """Write ``report.html``, ``table.md``, ``summary.csv`` and ``figures/*.png`` into a folder.

    The same runs give the same bytes. Each file is replaced at once; the page comes last, so that it never
    speaks of figures that are not there.

    Args:
        run_dirs: run directories, finished or not.
        out: made if it does not exist.
        metric: the metric to report instead of each task's headline.

    Returns:
        Path of ``report.html``.

    Raises:
        NextLatError: a directory is not a run, no run has the metric, matplotlib is missing, or ``out`` cannot
            be written.
    """
    runs = load_runs(run_dirs)
    summaries = summarise(runs, metric)
    with explained("creating", out):
        (out / "figures").mkdir(parents=True, exist_ok=True)
    pictures = []
    for drawing in drawings(runs, metric):
        light, dark = drawing.draw(LIGHT), drawing.draw(DARK)
        if light is None or dark is None:
            continue
        data, width_height = png(light), size(light)
        write_bytes(out / "figures" / f"{drawing.name}.png", data)
        pictures.append(Picture(drawing.title, drawing.caption, drawing.alt, data, png(dark), *width_height))
    probed = probes_grid(runs)
    write_bytes(out / "table.md", report_markdown(runs, metric, [probed] if probed else []).encode())
    write_bytes(out / "summary.csv", summary_csv(summaries).encode())
    write_bytes(
        out / "report.html", report_page(runs, summaries, pictures, metric, [probed] if probed else []).encode()
    )
    return out / "report.html"


__all__ = [
    "Grid",
    "Reading",
    "Run",
    "Summary",
    "group_runs",
    "load_run",
    "load_runs",
    "probes_grid",
    "report_markdown",
    "runs_grid",
    "summarise",
    "summary_csv",
    "summary_grid",
    "write_report",
]
