"""What a person sees while training: one log line now and then, and a bar on a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from nextlat.training.gradients import group_of
from nextlat.training.run import RunDirectory

LINES = 40
"""About so many log lines a run, evaluations not counted."""


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """Prints and logs; used as a context around the loop."""

    def __init__(self, run: RunDirectory, steps: int, first: int, bar: bool) -> None:
        self.run, self.steps, self.first = run, steps, first
        self.every = max(1, steps // LINES)
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar = RichProgress(
            TextColumn(run.path.name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (bar and self.console.is_terminal),
        )

    def __enter__(self) -> Progress:
        self.bar.start()
        self.task = self.bar.add_task("train", total=self.steps, completed=self.first)
        self.began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Move the bar; print the line of this step if it is due."""
        self.bar.update(self.task, completed=step)
        evaluated = any(key.startswith("eval.") for key in row)
        if not (evaluated or step % self.every == 0 or step in (self.first + 1, self.steps)):
            return
        left = (time.monotonic() - self.began) / (step - self.first) * (self.steps - step)
        line = self.line(step, row, left)
        self.console.print(line, markup=False)
        self.run.log(line)

    def warn(self, message: str | None) -> None:
        """Print and log a warning, if there is one."""
        if message is not None:
            self.console.print(message, markup=False)
            self.run.log(message)

    def line(self, step: int, row: Mapping[str, Any], left: float) -> str:
        """``step 100/4000  ce 0.1832 (45 %)  latent 0.0301 (8 %)  lr 2.0e-03  norm 0.51  21k tok/s  ETA 5:10``."""
        shares: dict[str, float] = {}
        for key, value in row.items():
            if key.endswith(".share"):
                group = group_of(key.removesuffix(".share"))
                shares[group] = shares.get(group, 0.0) + value
        parts = [f"step {step}/{self.steps}"]
        parts += [f"{name} {row[name]:.4f} ({share:.0%})" for name, share in shares.items()]
        parts += [f"lr {row['learning_rate']:.1e}", f"norm {row['grad_norm']:.2f}"]
        parts += [f"{row['tokens_per_second'] / 1000:.1f}k tok/s"]
        parts += [f"MFU {row['mfu']:.0%}"] if "mfu" in row else []
        parts += [f"ETA {duration(left)}"]
        evaluated = {key.removeprefix("eval."): value for key, value in row.items() if key.startswith("eval.")}
        parts += [f"{name} {value:.3f}" for name, value in evaluated.items() if isinstance(value, float)][:3]
        parts += [f"[{value}]" for value in evaluated.values() if isinstance(value, str)]
        return "  ".join(parts)
