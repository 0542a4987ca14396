"""One run directory, read into numbers; nothing here knows how the run was made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nextlat.errors import NextLatError

Array = NDArray[np.float64]

HEADLINE = "whole_path_greedy"
HEADLINE_EVALUATIONS = ("accuracy", "cross_entropy")
"""The evaluations that runs are followed by while training; a task has one of them."""
BOOKKEEPING = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds")
EVALUATED = "eval."
HEALTH = "health."


def number(value: Any) -> float | None:
    """A finite number as float; none for anything else."""
    return float(value) if isinstance(value, (int, float)) and isfinite(value) else None


@dataclass(frozen=True)
class Reading:
    """One metric of one run."""

    value: float | str
    low: float | None = None
    """Lower end of the 95 % interval over items; none where only the training log has the value."""
    high: float | None = None
    n: int | None = None
    """Number of items."""
    chance: float | None = None
    step: int = 0
    """Optimiser steps the measured model had seen."""

    @property
    def number(self) -> float:
        """The value, or nan when it is a word or not finite."""
        return self.value if isinstance(self.value, float) and isfinite(self.value) else nan


@dataclass(frozen=True)
class Run:
    """What a run directory holds."""

    directory: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Mapping[str, Array]
    """The columns of ``metrics.csv``, all of equal length; nan where a cell is empty."""
    evaluations: Mapping[str, Mapping[str, Reading]]
    """Evaluation name to metric name to reading."""
    config_text: str = ""

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.directory.name

    @property
    def task(self) -> str:
        """Registry name of the benchmark."""
        return str(self.config["task"])

    @property
    def objective(self) -> str:
        """Registry name of the objective that trained it."""
        return str(self.config["objective"])

    @property
    def seed(self) -> int:
        """Training seed."""
        return int(self.config["seed"])

    @property
    def planned_steps(self) -> int:
        """Optimiser steps the configuration asks for."""
        return int(self.config["training"]["steps"])

    @property
    def step(self) -> int:
        """Last optimiser step in the log; 0 before the first."""
        steps = self.metrics.get("step")
        return int(steps[-1]) if steps is not None and steps.size else 0

    @property
    def finished(self) -> bool:
        """Whether all planned steps are in the log."""
        return self.step >= self.planned_steps

    @property
    def measured(self) -> Mapping[str, Reading]:
        """The headline evaluation of the task; empty before it is made."""
        return next((self.evaluations[name] for name in HEADLINE_EVALUATIONS if name in self.evaluations), {})

    def terms(self) -> dict[str, Array]:
        """Loss per term group: ``latent`` is the column of that name or, with a horizon of 1, ``latent_1``."""
        names = [
            name
            for name in self.metrics
            if name not in BOOKKEEPING and not name.startswith((EVALUATED, HEALTH)) and not name.endswith(".share")
        ]
        groups = dict.fromkeys(re.sub(r"_\d+$", "", name) for name in names)
        chosen = {group: group if group in names else f"{group}_1" for group in groups}
        return {group: self.metrics[name] for group, name in chosen.items() if name in self.metrics}

    def curve(self, metric: str) -> tuple[Array, Array]:
        """(steps, values) of an evaluated metric during training, both empty if the log has none."""
        return self._seen(EVALUATED + metric)

    def health(self) -> dict[str, tuple[Array, Array]]:
        """(steps, values) of what was logged of states and gradients at evaluations."""
        found = {name.removeprefix(HEALTH): self._seen(name) for name in self.metrics if name.startswith(HEALTH)}
        return {name: curve for name, curve in found.items() if len(curve[0])}

    def _seen(self, column: str) -> tuple[Array, Array]:
        values = self.metrics.get(column)
        if values is None:
            return np.empty(0), np.empty(0)
        seen = np.isfinite(values)
        return self.metrics["step"][seen], values[seen]

    def reading(self, metric: str) -> Reading | None:
        """The latest value: from the headline evaluation, or from the training log where that is further on."""
        evaluated = self.measured.get(metric)
        steps, values = self.curve(metric)
        if steps.size and (evaluated is None or steps[-1] > evaluated.step):
            return Reading(float(values[-1]), chance=self.chance(metric), step=int(steps[-1]))
        return evaluated

    def final(self, metric: str) -> Reading | None:
        """The reading at the last planned step; none if the run has not got there."""
        reading = self.reading(metric)
        return reading if reading is not None and reading.step >= self.planned_steps else None

    def chance(self, metric: str) -> float | None:
        """Chance level of a metric; the task's own level for the headline of a run that is not evaluated yet."""
        evaluated = self.measured.get(metric)
        if evaluated is not None:
            return evaluated.chance
        return number(self.environment.get("chance")) if metric == HEADLINE else None

    def evaluated_metrics(self) -> list[str]:
        """Names of the metrics of the headline evaluation, then of those only in the training log."""
        logged = [name.removeprefix(EVALUATED) for name in self.metrics if name.startswith(EVALUATED)]
        return list(dict.fromkeys([*self.measured, *logged]))


def headline_metric(runs: Sequence[Run], metric: str | None = None) -> str:
    """The metric to report: the one asked for, else whole-path accuracy, else the first that was evaluated.

    Raises:
        NextLatError: no run has the metric, or no run has any.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.evaluated_metrics()))
    if metric is not None:
        if metric not in known:
            raise NextLatError(f"no run has the metric {metric!r}; choose one of: {', '.join(known) or 'none yet'}")
        return metric
    return HEADLINE if HEADLINE in known or not known else known[0]
