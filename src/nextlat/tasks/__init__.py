"""The benchmarks, by name. A new one is a file and a line here."""

from typing import Any

from nextlat.errors import unknown
from nextlat.tasks.base import Outputs, Passages, Prompted, Prompts, Task, Textual
from nextlat.tasks.path_star import PathStar
from nextlat.tasks.text import FineWebEdu, TinyStories

TASKS: dict[str, Any] = {
    "path_star": PathStar,
    "tiny_stories": TinyStories,
    "fineweb_edu": FineWebEdu,
}


def find_task(name: str) -> Any:
    """The task class of a name; it has ``Options`` and is built from (options, seed, batch_size)."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


__all__ = [
    "TASKS",
    "FineWebEdu",
    "Outputs",
    "Passages",
    "PathStar",
    "Prompted",
    "Prompts",
    "Task",
    "Textual",
    "TinyStories",
    "find_task",
]
