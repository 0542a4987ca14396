"""Run directories from disk, with an error that names file and fix for what cannot be read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nextlat.errors import NextLatError
from nextlat.reporting.results import load_results
from nextlat.reporting.runs import EVALUATED, Array, Reading, Run, number


def load_run(directory: Path) -> Run:
    """Read a run directory; a torn last line of its log is left out.

    Raises:
        NextLatError: not a run directory, or a file of it cannot be read.
    """
    path = directory / "config.yaml"
    if not path.is_file():
        inside = sorted(p.parent.name for p in directory.glob("*/config.yaml"))
        fix = f"it holds runs; name them, as in {directory / inside[0]}" if inside else "name one that `train` wrote"
        raise NextLatError(f"{directory} is not a run directory: it has no config.yaml; {fix}")
    text = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise NextLatError(f"{path} is not valid YAML ({error}); restore it or leave this run out") from error
    _check_config(path, config)
    environment = directory / "environment.json"
    evaluations = {p.stem: p for p in sorted((directory / "evaluations").glob("*.json"))}
    metrics = _read_metrics(directory / "metrics.csv")
    last = int(metrics["step"][-1]) if metrics and metrics["step"].size else 0
    return Run(
        directory=directory.resolve(),
        config=config,
        environment=_read_json(environment) if environment.is_file() else {},
        metrics=metrics,
        evaluations={name: _readings(_read_json(p), p, last) for name, p in evaluations.items()},
        config_text=text,
    )


def load_runs(directories: Iterable[Path]) -> list[Run]:
    """Read run directories in the given order, each once: a run named twice is one seed, not two.

    A results file of a sweep (``.csv``) stands for all its runs.

    Raises:
        NextLatError: no directory at all, or as for :func:`load_run`.
    """
    unique = dict.fromkeys(directory.resolve() for directory in directories)
    if not unique:
        raise NextLatError("no run directory given; name at least one, as in runs/path_star-mini-nextlat-s0")
    return [run for path in unique for run in (load_results(path) if path.suffix == ".csv" else [load_run(path)])]


def _check_config(path: Path, config: Any) -> None:
    keys = config if isinstance(config, dict) else {}
    missing = [key for key in ("task", "objective", "seed", "training") if key not in keys]
    if not missing and not isinstance((keys["training"] or {}).get("steps"), int):
        missing = ["training.steps"]
    if missing:
        raise NextLatError(
            f"{path} lacks {', '.join(missing)}: not the resolved configuration of a run; "
            "name a directory that `train` wrote"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NextLatError(f"{path} is not valid JSON ({error}); run the evaluation again or delete it") from error
    if not isinstance(content, dict):
        raise NextLatError(f"{path} holds {type(content).__name__}, not an object; run the evaluation again")
    return content


def _readings(content: Mapping[str, Any], path: Path, last_step: int) -> dict[str, Reading]:
    metrics = content.get("metrics")
    if not isinstance(metrics, dict) or not all(isinstance(m, dict) and "value" in m for m in metrics.values()):
        raise NextLatError(f'{path} has no "metrics" with a "value" each; run the evaluation again or delete it')
    step = content.get("step")
    return {
        name: Reading(
            value=entry["value"]
            if isinstance(entry["value"], str)
            else float(nan if entry["value"] is None else entry["value"]),
            low=number(entry.get("low")),
            high=number(entry.get("high")),
            n=entry.get("n"),
            chance=number(entry.get("chance")),
            step=last_step if step is None else int(step),
        )
        for name, entry in metrics.items()
    }


def _read_metrics(path: Path) -> dict[str, Array]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a killed run may leave a last line without its end
    if not whole:
        return {}
    header, *lines = csv.reader(whole.splitlines())
    if "step" not in header:
        raise NextLatError(f"{path} has no column 'step' in its first line; restore it or leave this run out")
    place = header.index("step")
    rows: list[list[float]] = []
    for at, line in enumerate(lines, start=2):
        where = f"{path}, line {at}"
        if len(line) != len(header):
            raise NextLatError(f"{where}: {len(line)} cells under {len(header)} columns; delete that line")
        row = [_cell(cell, name, where) for name, cell in zip(header, line, strict=True)]
        if not isfinite(row[place]):
            raise NextLatError(f"{where}: no step number; delete that line")
        rows.append(row)
    table = np.array(rows, dtype=np.float64).reshape(len(rows), len(header))
    return {name: table[:, i] for i, name in enumerate(header)}


def _cell(text: str, column: str, where: str) -> float:
    if not text:
        return nan
    try:
        return float(text)
    except ValueError:
        if column.startswith(EVALUATED):  # a word, as the basin is
            return nan
        raise NextLatError(f"{where}: {column} is {text!r}, not a number; delete that line") from None
