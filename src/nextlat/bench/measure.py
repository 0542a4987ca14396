"""The peak memory of a function."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from nextlat.allocator import give_back_freed_memory
from nextlat.timing import Arm, collector_paused


class Peak(NamedTuple):
    """Memory that a call holds at its worst moment beyond what was there before, in bytes."""

    tensors: int
    """Live bytes of torch's CPU allocator: exact, and the same in every run."""
    resident: int | None
    """Growth of the process's peak resident set: with scratch of the matrix library; ``None`` outside Linux."""


def peak_memory(function: Arm, calls: int = 1) -> Peak:
    """Peak memory of a call; what it returns is alive at its end and so counted.

    Args:
        function: to call, once more than ``calls`` in all.
        calls: of which the least growth of the resident set is taken: what the allocator happens to hold from before,
            and returns or not, is chance, and as large as the largest tensor.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces its start and stop on stderr
    from torch.profiler import ProfilerActivity, profile

    grown = []
    for _ in range(calls):
        with collector_paused():  # without the profiler: what it writes down is memory too
            give_back_freed_memory()
            before = _reset_resident()
            result = function()
            if before is not None:
                grown.append(_resident("VmHWM") - before)
            del result
    with collector_paused(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    return Peak(_most_live(profiler), min(grown, default=None))


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


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
