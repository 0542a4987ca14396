"""Timing functions against each other, in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median, quantiles
from typing import NamedTuple

import torch

Arm = Callable[[], object]


class Prepared(NamedTuple):
    """An arm that needs something made for it, anew each time and without being timed."""

    arm: Callable[[], Arm]
    """Makes it, and gives what is timed."""


class Timing(NamedTuple):
    """Seconds of every repetition of one arm, in order."""

    cpu: tuple[float, ...]
    """Processor time of the whole process, all threads together."""
    wall: tuple[float, ...]


class Ratio(NamedTuple):
    """How much longer one arm takes than another."""

    value: float
    """Ratio of the medians."""
    wall: float
    """The same of wall time."""
    low: float
    """Lower quartile of the ratios of single repetitions: how far a neighbour's load moves the figure."""
    high: float
    """Upper quartile."""


def interleave(arms: Mapping[str, Arm | Prepared], repetitions: int, warmup: int = 1) -> dict[str, Timing]:
    """Run the arms in turn, A B C A B C ..., so that a busy neighbour slows all of them alike.

    Garbage is collected between rounds and never inside a timed region; what an arm returns is freed inside it.

    Args:
        arms: functions without arguments.
        repetitions: timed rounds.
        warmup: rounds before them that are not timed.
    """
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    with older_objects_left_alone():
        for round_number in range(warmup + repetitions):
            with collector_paused():
                for name, made in arms.items():
                    arm = made.arm() if isinstance(made, Prepared) else made
                    began = time.perf_counter(), time.process_time()
                    arm()
                    spent = time.perf_counter() - began[0], time.process_time() - began[1]
                    if round_number >= warmup:
                        wall[name].append(spent[0])
                        cpu[name].append(spent[1])
    return {name: Timing(tuple(cpu[name]), tuple(wall[name])) for name in arms}


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect garbage now, and not again before the end of the block."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def older_objects_left_alone() -> Iterator[None]:
    """Collections within the block look at what it made: going through all else takes longer than most arms do."""
    if gc.get_freeze_count():  # somebody did so before
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def compare(slow: Timing, fast: Timing) -> Ratio:
    """Time of ``slow`` in units of ``fast``.

    On one thread the value is that of processor time, which a neighbour on the same core does not inflate. On
    several threads processor time counts waiting threads as work, and the value is that of wall time.
    """
    single = [a / b for a, b in zip(counting(slow), counting(fast), strict=True)]
    low, _, high = quantiles(single, n=4, method="inclusive") if len(single) > 1 else single * 3
    return Ratio(seconds(slow) / seconds(fast), median(slow.wall) / median(fast.wall), low, high)


def counting(timing: Timing) -> tuple[float, ...]:
    """The seconds that :func:`compare` goes by."""
    return timing.cpu if torch.get_num_threads() == 1 else timing.wall


def seconds(timing: Timing) -> float:
    """Their median."""
    return median(counting(timing))
