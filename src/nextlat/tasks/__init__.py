"""The benchmarks, by name. A new one is a file and a line here."""

from typing import Any

from nextlat.errors import unknown
from nextlat.tasks.base import Outputs, Prompts, Task
from nextlat.tasks.path_star import PathStar

TASKS: dict[str, Any] = {
    "path_star": PathStar,
}


def find_task(name: str) -> Any:
    """The task class of a name; it has ``Options`` and is built from (options, seed, batch_size)."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


__all__ = ["TASKS", "Outputs", "PathStar", "Prompts", "Task", "find_task"]
