"""A run directory: who may use it, and what is written into it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from nextlat.config import Config, read_yaml, resolve
from nextlat.errors import NextLatError
from nextlat.files import explained, write_json, write_text
from nextlat.training.checkpoint import clean
from nextlat.training.environment import describe_environment


class RunDirectory:
    """One training run on disk, locked while a process uses it.

    Use :meth:`create` for a new run and :meth:`open` to go on with one.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @classmethod
    def create(cls, config: Config, runs_dir: Path, facts: dict[str, Any]) -> RunDirectory:
        """Make the directory ``runs_dir / config.name``, whole or not at all.

        Raises:
            NextLatError: it exists already, or the folder cannot be written.
        """
        path = runs_dir / str(config.name)
        with explained("looking for", path):
            there = path.exists()
        if there:
            raise NextLatError(
                f"run directory {path} is in use; continue it with --resume {path}, choose another name=..., "
                "or delete it"
            )
        aside = runs_dir / f".{path.name}.{os.getpid()}"
        with explained("creating run directory", path):
            runs_dir.mkdir(parents=True, exist_ok=True)
            try:
                (aside / "checkpoints").mkdir(parents=True)
                write_text(aside / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False))
                write_json(aside / "environment.json", {**describe_environment(config), **facts})
                os.rename(aside, path)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        run = cls(path, config)
        run._acquire()
        return run

    @classmethod
    def open(cls, path: Path, lock: bool = True) -> RunDirectory:
        """An existing run, with the configuration it was started with."""
        run = cls(path, read_run_config(path))
        if lock:
            run._refuse_changed_config()
            run._acquire()
            clean(run.checkpoints)
            for left in (*path.glob(".*.tmp"), *run.checkpoints.glob(".*.tmp")):
                left.unlink()
        return run

    def _refuse_changed_config(self) -> None:
        file = self.path / "environment.json"
        recorded = json.loads(file.read_text(encoding="utf-8")).get("config_hash") if file.is_file() else None
        if recorded not in (None, self.config.hash()):
            raise NextLatError(
                f"{self.path / 'config.yaml'} was changed since the run began (hash {self.config.hash()}, "
                f"not {recorded}); restore it, or start a new run with the new values"
            )

    def refuse_changed_data(self, facts: Mapping[str, Any]) -> None:
        """Go on only with the data that the run began with; ``facts`` is what its task says of them now."""
        file = self.path / "environment.json"
        recorded = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for key, value in facts.items():
            if key.endswith("sha256") and recorded.get(key, value) != value:
                raise NextLatError(
                    f"the data of {self.path} are not those it began with ({key} was {recorded[key]}, now {value}); "
                    "bring those back, or start a new run"
                )

    def _acquire(self) -> None:
        with explained("opening", self.path / "log.txt"):
            self._lock = (self.path / "log.txt").open("a", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise NextLatError(f"run directory {self.path} is being used by another process; wait for it") from None

    def close(self) -> None:
        """Let others use the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def log(self, line: str) -> None:
        """Append a line to ``log.txt``."""
        if self._lock is not None:
            with explained("writing", self.path / "log.txt"):
                self._lock.write(line + "\n")
                self._lock.flush()


def read_run_config(path: Path) -> Config:
    """The resolved configuration of a run directory."""
    file = path / "config.yaml"
    if not file.is_file():
        raise NextLatError(f"{path} is not a run directory: it has no config.yaml; give a path like runs/NAME")
    data = read_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(data, dict):
        raise NextLatError(f"{file} is not a mapping; the run directory is damaged")
    return resolve(data)


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Dotted keys in which two plain configurations differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in sorted({*one, *other}):
            found += differences(one.get(key), other.get(key), f"{place}.{key}" if place else key)
        return found
    return [] if one == other else [f"{place}: {one!r} there, {other!r} asked for"]
