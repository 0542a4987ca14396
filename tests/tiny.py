"""The smallest runs that exercise everything, and ways to look at what they left on disk."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nextlat.config import Config, load_config
from nextlat.objectives import OBJECTIVES
from nextlat.training.build import Built, build
from nextlat.training.checkpoint import load_state, newest
from nextlat.training.loop import Outcome, train
from nextlat.training.run import RunDirectory

TINY = (
    "model.width=16",
    "model.n_layers=1",
    "model.n_heads=2",
    "data.test_size=40",
    "training.batch_size=8",
    "training.steps=6",
    "training.learning_rate=1e-3",
    "training.warmup_steps=2",
    "training.schedule=constant",
    "training.decay_steps=0",
    "training.evaluate_every=3",
)
"""Overrides of path_star/mini: a run takes a fraction of a second."""

EXTRA = {
    "nextlat": ("objective.horizon=2", "objective.dynamics.hidden_dim=16"),
    "mtp": ("objective.horizon=2",),
    "jtp": ("objective.horizon=2",),
    "bst": ("objective.pair_fraction=0.5",),
}
TIMINGS = ("seconds", "tokens_per_second")
ALL = tuple(OBJECTIVES)


def overrides(objective: str = "nextlat", *more: str, name: str | None = "tiny") -> list[str]:
    """``key=value`` texts of a tiny run."""
    named = () if name is None else (f"name={name}",)
    return [*TINY, f"objective={objective}", *EXTRA.get(objective, ()), *named, *more]


def tiny(objective: str = "nextlat", *more: str, name: str | None = "tiny") -> Config:
    return load_config("path_star/mini", overrides(objective, *more, name=name))


def start(config: Config, runs_dir: Path) -> tuple[RunDirectory, Built]:
    return RunDirectory.create(config, runs_dir, {}), build(config)


def run_whole(config: Config, runs_dir: Path, stop_after: int | None = None) -> Path:
    """Train in this process; returns the run directory, unlocked."""
    run, built = start(config, runs_dir)
    try:
        train(run, built, stop_after=stop_after, bar=False)
    finally:
        run.close()
    return run.path


def go_on(path: Path, stop_after: int | None = None) -> Outcome:
    """Resume in this process."""
    run = RunDirectory.open(path)
    try:
        return train(run, build(run.config), resume=True, stop_after=stop_after, bar=False)
    finally:
        run.close()


def weights(path: Path) -> dict[str, Tensor]:
    """All weights of a run's newest checkpoint, by file and name."""
    found = {}
    for file in sorted(newest(path).glob("*.safetensors")):
        found |= {f"{file.stem}.{name}": value for name, value in load_file(file).items()}
    return found


def assert_same_weights(one: Path, other: Path, besides: tuple[str, ...] = ("seconds",)) -> None:
    """Bit for bit, the optimiser's state included; ``besides`` names entries of the state that may differ."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different
    states = [load_state(newest(path)) for path in (one, other)]
    for state in states:
        for name in besides:
            del state[name]
    assert same(*states)


def same(one: Any, other: Any) -> bool:
    """Equality through nested containers and tensors; NaN equals NaN."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


def metrics(path: Path, timings: bool = False) -> list[dict[str, str]]:
    """Rows of a run's ``metrics.csv`` as text, so that every digit counts."""
    with (path / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if timings or key not in TIMINGS} for row in rows]


def files_below(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
