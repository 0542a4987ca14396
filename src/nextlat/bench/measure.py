"""Timing arms against each other, and the peak memory of a function."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

Arm = Callable[[], object]


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


class Peak(NamedTuple):
    """Memory that a call holds at its worst moment beyond what was there before, in bytes."""

    tensors: int
    """Live bytes of torch's CPU allocator: exact, and the same in every run."""
    resident: int | None
    """Growth of the process's peak resident set: with scratch of the matrix library; ``None`` outside Linux."""


def interleave(arms: Mapping[str, Arm], repetitions: int, warmup: int = 1) -> dict[str, Timing]:
    """Run the arms in turn, A B C A B C ..., so that a busy neighbour slows all of them alike.

    Garbage is collected between rounds and never inside a timed region; what an arm returns is freed inside it.

    Args:
        arms: functions without arguments.
        repetitions: timed rounds.
        warmup: rounds before them that are not timed.
    """
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(warmup + repetitions):
        with collector_paused():
            for name, arm in arms.items():
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


def compare(slow: Timing, fast: Timing) -> Ratio:
    """Time of ``slow`` in units of ``fast``.

    On one thread the value is that of processor time, which a neighbour on the same core does not inflate. On
    several threads processor time counts waiting threads as work, and the value is that of wall time.
    """
    wall = median(slow.wall) / median(fast.wall)
    one, other = (slow.cpu, fast.cpu) if torch.get_num_threads() == 1 else (slow.wall, fast.wall)
    single = [a / b for a, b in zip(one, other, strict=True)]
    low, _, high = quantiles(single, n=4, method="inclusive") if len(single) > 1 else single * 3
    return Ratio(median(one) / median(other), wall, low, high)


def seconds(timing: Timing) -> float:
    """The median that :func:`compare` uses."""
    return median(timing.cpu if torch.get_num_threads() == 1 else timing.wall)


def peak_memory(function: Arm) -> Peak:
    """Peak memory of one call; what it returns is alive at its end and so counted."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces its start and stop on stderr
    from torch.profiler import ProfilerActivity, profile

    trim()
    with collector_paused(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        before = _reset_resident()
        result = function()
        after = None if before is None else _resident("VmHWM")
    del result
    return Peak(_most_live(profiler), None if before is None or after is None else after - before)


def _most_live(profiler: Any) -> int:
    """Largest running total of what torch's CPU allocator handed out and took back."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    live = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        if event["args"]["Device Type"] == 0:
            live += event["args"]["Bytes"]
            most = max(most, live)
    return most


def _reset_resident() -> int | None:
    """Forget the resident set's peak and return its size; ``None`` where the kernel does not offer that."""
    try:
        with Path("/proc/self/clear_refs").open("r+", encoding="ascii") as file:  # never creates it
            file.write("5")
    except OSError:
        return None
    return _resident("VmHWM")


def trim() -> None:
    """Give freed memory back to the kernel, so that the next peak does not hide in it."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library than glibc
            return


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
