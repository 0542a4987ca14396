"""Many runs: one process each, finished ones skipped, interrupted ones resumed, results appended as they come."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import yaml

from nextlat.config import Config
from nextlat.errors import NextLatError
from nextlat.files import explained, locked, write_text
from nextlat.training.build import build, check
from nextlat.training.checkpoint import list_checkpoints
from nextlat.training.run import differences, read_run_config
from nextlat.training.tracking import read_metrics

Status = Literal["recorded", "finished", "interrupted", "new"]
Say = Callable[[str], None]
CURVES = ("step", "loss", "ce", "latent", "kl", "seconds")
"""What a curves file keeps beside the evaluations."""


def status(config: Config, runs_dir: Path, recorded: set[str]) -> Status:
    """What is left to do for a run.

    Raises:
        NextLatError: the run's directory holds another configuration.
    """
    if config.hash() in recorded:
        return "recorded"
    path = runs_dir / str(config.name)
    if not path.exists():
        return "new"
    there = read_run_config(path)
    if there.hash() != config.hash():
        changed = "; ".join(differences(there.plain(), config.plain()))
        raise NextLatError(
            f"{path} holds a run of another configuration ({changed}); remove it or use another --runs-dir"
        )
    return "finished" if is_finished(path, config) else "interrupted"


def is_finished(path: Path, config: Config) -> bool:
    """Whether a run made its last step and was measured."""
    checkpoints = list_checkpoints(path / "checkpoints")
    trained = bool(checkpoints) and int(checkpoints[-1].name.removeprefix("step_")) == config.training.steps
    return trained and all(measured_step(path, name) == config.training.steps for name in config.evaluation.after)


def measured_step(run: Path, evaluation: str) -> int | None:
    """The step a measurement was made at; ``None`` if it was not made."""
    file = run / "evaluations" / f"{evaluation}.json"
    return int(json.loads(file.read_text(encoding="utf-8"))["step"]) if file.is_file() else None


def _shape(config: Config) -> str:
    """What decides whether a run can be built: everything but the seed."""
    return config.model_copy(update={"seed": 0}).hash()


@dataclass
class Sweep:
    """Runs configurations side by side and keeps their results.

    Args:
        configs: what to run.
        runs_dir: where the run directories go.
        results: the CSV that finished runs are appended to; ``None`` keeps none.
        jobs: processes at a time.
        devices: CUDA devices to deal out, one process each; empty for CPU or a single GPU.
        say: takes a line of progress.
    """

    configs: Sequence[Config]
    runs_dir: Path
    results: Path | None = None
    jobs: int = 1
    devices: Sequence[str] = ()
    say: Say = print
    failed: list[str] = field(default_factory=list)
    _children: set[subprocess.Popen[str]] = field(default_factory=set)
    signal: int | None = None
    """The signal that stopped the sweep."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(self) -> list[tuple[Config, Status]]:
        """Every run and what is left to do for it.

        Raises:
            NextLatError: a run that cannot be built.
        """
        for config in {_shape(config): config for config in self.configs}.values():
            check(config, build(config))

        recorded = {row["config_hash"] for row in read_results(self.results)} if self.results else set()
        return [(config, status(config, self.runs_dir, recorded)) for config in self.configs]

    def run(self) -> None:
        """Do what is left; a signal lets the children save and stops."""
        plan = self.plan()
        if self.results is not None:  # found out now rather than after the first run
            with explained("creating", self.results.parent):
                self.results.parent.mkdir(parents=True, exist_ok=True)
        slots: SimpleQueue[str | None] = SimpleQueue()
        for slot in range(self.jobs):
            slots.put(self.devices[slot % len(self.devices)] if self.devices else None)
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(self.jobs) as pool:
                jobs = [pool.submit(self._one, config, state, Path(folder), slots) for config, state in plan]
                for job in jobs:
                    job.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signal is not None:
            self.say("the sweep was stopped; every started run saved its state, and the same command goes on with them")

    def _stop(self, number: int, frame: Any) -> None:
        self.signal = number
        for child in list(self._children):
            child.terminate()

    def _one(self, config: Config, state: Status, folder: Path, slots: SimpleQueue[str | None]) -> None:
        name = str(config.name)
        if state == "recorded" or self.signal is not None:
            if state == "recorded":
                self.say(f"{name}: already in {self.results}")
            return
        if state != "finished":
            file = folder / f"{name}.yaml"
            file.write_text(yaml.safe_dump(config.plain(), sort_keys=False), encoding="utf-8")
            command = [sys.executable, "-m", "nextlat", "train", str(file), "--runs-dir", str(self.runs_dir)]
            if state == "interrupted":
                command += ["--resume", str(self.runs_dir / name)]
            device = slots.get()
            try:
                code, tail = self._watch(name, command, device)
            finally:
                slots.put(device)
            if self.signal is not None:
                return
            if code:
                with self._lock:
                    self.failed.append(name)
                self.say(f"{name}: failed with exit code {code}\n{tail}")
                return
        self.say(f"{name}: {'was finished before' if state == 'finished' else 'finished'}")
        if self.results is not None:
            with self._lock:
                record(self.results, self.runs_dir / name, config)

    def _watch(self, name: str, command: list[str], device: str | None) -> tuple[int, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._children.add(child)
        if self.signal is not None:
            child.terminate()
        lines: list[str] = []
        assert child.stdout is not None
        for line in child.stdout:
            lines = [*lines[-19:], line.rstrip()]
            if (line.startswith("step ") and "[" in line) or line.startswith("error:"):
                self.say(f"{name}: {line.rstrip()}")
        self._children.discard(child)
        return child.wait(), "\n".join(f"    {line}" for line in lines)


def read_results(path: Path) -> list[dict[str, str]]:
    """Rows of a results file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def record(path: Path, run: Path, config: Config) -> None:
    """Append a finished run to a results file, and its evaluations while training to ``<name>_curves.csv``."""
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    columns, rows = read_metrics(run / "metrics.csv")
    row: dict[str, Any] = {
        "config_hash": config.hash(),
        "run": config.name,
        "objective": config.objective,
        "seed": config.seed,
        "steps": config.training.steps,
    }
    for name in config.evaluation.after:
        found = json.loads((run / "evaluations" / f"{name}.json").read_text(encoding="utf-8"))["metrics"]
        for key, metric in found.items():
            row[key] = metric["value"]
            if "headline" not in row:
                row["headline"] = key
                row |= {part: metric[part] for part in ("low", "high", "n", "chance")}
    row |= {"loss": rows[-1]["loss"], "seconds": round(float(rows[-1]["seconds"]), 1)}
    row |= {key: environment.get(key) for key in ("commit", "hardware", "torch", "threads")}
    row["config"] = json.dumps(config.plain() | {"sweep": []}, separators=(",", ":"))
    append(path, [row])
    kept = [name for name in columns if name in CURVES or name.startswith("eval.")]
    curve = [
        {"config_hash": config.hash(), "objective": config.objective, "seed": config.seed, **{k: row[k] for k in kept}}
        for row in rows
        if any(row[name] for name in kept if name.startswith("eval."))
    ]
    if curve:
        append(path.with_name(f"{path.stem}_curves.csv"), curve)


def append(path: Path, new: Sequence[dict[str, Any]]) -> None:
    """Add rows to a CSV at once; rows of the same configuration hash are replaced."""
    with locked(path.parent):  # sweeps may share a file
        hashes = {row["config_hash"] for row in new}
        rows: list[dict[str, Any]] = [row for row in read_results(path) if row["config_hash"] not in hashes]
        rows += new
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
