"""What a run records about the machine and the code it ran on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nextlat.config import Config


def package_version() -> str:
    """Version of the installed library; ``source`` when it runs from a source tree."""
    try:
        return version("nextlat")
    except PackageNotFoundError:
        return "source"


def commit() -> str | None:
    """Commit of the source tree the library runs from, with ``-dirty`` if it was changed; ``None`` outside one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("-dirty" if _git(root, "status", "--porcelain", "--", "src") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def hardware() -> str:
    """The GPU, or the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            model = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores"


def describe_environment(config: Config) -> dict[str, Any]:
    """Versions, commit, hardware and start time."""
    return {
        "nextlat": package_version(),
        "commit": commit(),
        "config_hash": config.hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "hardware": hardware(),
        "device": config.training.device,
        "threads": config.training.threads or torch.get_num_threads(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
