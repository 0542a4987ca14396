"""Where figures go while training: always a CSV file, and W&B or TensorBoard on request."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from nextlat.config import Config
from nextlat.errors import NextLatError
from nextlat.files import explained, write_text

Row = Mapping[str, float | int | str]


class Tracker(Protocol):
    """Takes one row a step."""

    def log(self, row: Row) -> None:
        """One optimiser step; ``row["step"]`` counts updates made, from 1."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class MetricsFile:
    """``metrics.csv``: one row an optimiser step. Numbers are written so that reading gives them back exactly.

    Args:
        path: the file; continued if it exists.
        after: the checkpoint's step; rows of later steps, and a torn last line, are dropped.
    """

    def __init__(self, path: Path, after: int = 0) -> None:
        self.path = path
        self.columns: list[str] = ["step"]
        rows: list[dict[str, str]] = []
        if path.is_file():
            self.columns, rows = read_metrics(path)
            rows = [row for row in rows if int(row["step"]) <= after]
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self._file = self.path.open("a", encoding="utf-8", newline="")

    def log(self, row: Row) -> None:
        """Append a row; a column not seen before rewrites the header."""
        new = [key for key in row if key not in self.columns]
        if new:
            self._file.close()
            _, rows = read_metrics(self.path)
            self.columns += new
            self._rewrite(rows)
        with explained("writing", self.path):
            writer = csv.DictWriter(self._file, self.columns, restval="", lineterminator="\n")
            writer.writerow({key: repr(value) if isinstance(value, float) else value for key, value in row.items()})
            self._file.flush()

    def close(self) -> None:
        """Flush to disk and close."""
        with explained("writing", self.path):
            os.fsync(self._file.fileno())
            self._file.close()


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and complete rows of a metrics file; a torn last line is left out."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole))
    rows = [row for row in reader if None not in row and None not in row.values()]
    return list(reader.fieldnames or ["step"]), rows


_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def package(name: str) -> Any:
    """The module behind a name of ``training.track``."""
    try:
        return import_module(_PACKAGES[name])
    except ImportError:
        raise NextLatError(
            f'training.track asks for {name}, which is not installed; pip install "nextlat[track]"'
        ) from None


class TensorBoard:
    """Event files in the run directory's ``tensorboard`` folder."""

    def __init__(self, config: Config, folder: Path, resumed: int) -> None:
        self._writer: Any = package("tensorboard").SummaryWriter(
            str(folder / "tensorboard"), purge_step=resumed + 1 if resumed else None
        )

    def log(self, row: Row) -> None:
        """Every number of the row, as a scalar of that step."""
        for key, value in row.items():
            if key != "step" and not isinstance(value, str):
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named after the run directory; a resumed run goes on under the same id."""

    def __init__(self, config: Config, folder: Path, resumed: int) -> None:
        self._run: Any = package("wandb").init(
            project="nextlat",
            name=config.name,
            id=f"{config.name}-{config.hash()}",
            resume="allow",
            dir=str(folder),
            config=config.plain(),
        )

    def log(self, row: Row) -> None:
        """The row at its step."""
        self._run.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def open_trackers(config: Config, folder: Path, resumed: int) -> list[Tracker]:
    """The CSV file and whatever ``training.track`` names."""
    extra: dict[str, Callable[[Config, Path, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    others = [extra[name](config, folder, resumed) for name in config.training.track]
    return [MetricsFile(folder / "metrics.csv", after=resumed), *others]
