"""Performance as ratios: every arm in one process, interleaved, medians; see docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

from nextlat.bench.results import Effort, Result
from nextlat.errors import unknown

SUITES = {
    "loss": "nextlat.bench.loss",
    "attention": "nextlat.bench.attention",
    "train": "nextlat.bench.train",
    "decode": "nextlat.bench.decode",
}
"""Module of each suite; it has ``run(effort) -> Iterator[Result]``. Decode's takes trained runs as well."""


def find_suite(name: str) -> Callable[..., Iterator[Result]]:
    """The function that measures a suite, one result at a time."""
    if name not in SUITES:
        raise unknown("benchmark", name, SUITES)
    run: Callable[..., Iterator[Result]] = import_module(SUITES[name]).run
    return run


__all__ = ["SUITES", "Effort", "Result", "find_suite"]
