"""The results file of a sweep, read back as runs: what the figures and tables of the documentation are made from."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from nextlat.errors import NextLatError
from nextlat.reporting.runs import Array, Reading, Run

ENVIRONMENT = ("commit", "hardware", "torch", "threads")
NOT_METRICS = {
    *ENVIRONMENT,
    *(
        "config_hash",
        "run",
        "headline",
        "objective",
        "seed",
        "steps",
        "low",
        "high",
        "n",
        "chance",
        "loss",
        "seconds",
        "config",
    ),
}
PROBE = "probe_"
"""What the metrics of the evaluation ``probes`` begin with."""
NOT_CURVES = {"config_hash", "objective", "seed", "eval.basin"}


def load_results(path: Path) -> list[Run]:
    """The runs of ``results/<name>.csv``, with the curves of ``results/<name>_curves.csv`` if that is there.

    Raises:
        NextLatError: no such file, or one that no sweep wrote.
    """
    rows = _rows(path)
    if not rows or "config" not in rows[0]:
        raise NextLatError(f"{path} is not a results file of `nextlat sweep`: it has no column 'config'")
    curves: dict[str, list[dict[str, str]]] = {}
    beside = path.with_name(f"{path.stem}_curves.csv")
    for row in _rows(beside) if beside.is_file() else []:
        curves.setdefault(row["config_hash"], []).append(row)
    return [_run(path, row, curves.get(row["config_hash"], [])) for row in rows]


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise NextLatError(f"there is no results file {path}; `nextlat sweep` writes it")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _run(path: Path, row: dict[str, str], curve: list[dict[str, str]]) -> Run:
    steps = int(row["steps"])
    config: dict[str, Any] = json.loads(row["config"])
    readings = {
        name: _reading(text, steps)
        for name, text in row.items()
        if name not in NOT_METRICS and text and name is not None
    }
    low, high, n, chance = (float(row[key]) if row.get(key) else None for key in ("low", "high", "n", "chance"))
    headline = readings.get(row.get("headline", ""))
    if headline is not None:
        readings[row["headline"]] = Reading(
            headline.value, low, high, None if n is None else int(n), chance, headline.step
        )
    probed = {name: reading for name, reading in readings.items() if name.startswith(PROBE)}
    others = {name: reading for name, reading in readings.items() if name not in probed}
    if not curve or int(curve[-1]["step"]) < steps:  # the last step need not be one of those that are evaluated
        curve = [*curve, {"step": row["steps"], "loss": row.get("loss", ""), "seconds": row.get("seconds", "")}]
    named = [name for name in dict.fromkeys(key for point in curve for key in point) if name not in NOT_CURVES]
    columns: dict[str, Array] = {
        name: np.array([float(point[name]) if point.get(name) else np.nan for point in curve]) for name in named
    }
    return Run(
        directory=path.parent / row["run"],
        config=config,
        environment={key: row.get(key) for key in ENVIRONMENT} | {"chance": chance},
        metrics={name: column for name, column in columns.items() if np.isfinite(column).any()},
        evaluations={"accuracy": others} | ({"probes": probed} if probed else {}),
        config_text=json.dumps(config, indent=2),
    )


def _reading(text: str, steps: int) -> Reading:
    try:
        return Reading(float(text), step=steps)
    except ValueError:
        return Reading(text, step=steps)
