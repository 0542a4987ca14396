"""Every figure of every step is written down exactly, once."""

from __future__ import annotations

import csv
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nextlat.errors import NextLatError
from nextlat.training.tracking import MetricsFile, open_trackers, read_metrics
from tests.tiny import files_below, go_on, metrics, run_whole, tiny


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 1e-300, 123456789.123456789, 5e-324, 2.0, -0.0, float("nan"), float("inf")]
    path = tmp_path / "metrics.csv"
    tracker = MetricsFile(path)
    for step, value in enumerate(values, start=1):
        tracker.log({"step": step, "loss": value, "eval.basin": "solved, or not"})
    tracker.close()
    columns, rows = read_metrics(path)
    assert columns == ["step", "loss", "eval.basin"]
    assert [int(row["step"]) for row in rows] == list(range(1, len(values) + 1))
    assert [repr(float(row["loss"])) for row in rows] == [repr(value) for value in values]
    assert {row["eval.basin"] for row in rows} == {"solved, or not"}


def test_every_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = MetricsFile(tmp_path / "metrics.csv")
    tracker.log({"step": 1, "loss": 0.5})
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,0.5\n"
    tracker.close()


def test_a_column_that_appears_late_grows_the_header_and_keeps_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    tracker = MetricsFile(path)
    tracker.log({"step": 1, "loss": 0.5})
    tracker.log({"step": 2, "loss": 0.4, "eval.x": 1.0})
    tracker.log({"step": 3, "loss": 0.3})
    tracker.close()
    assert path.read_text() == "step,loss,eval.x\n1,0.5,\n2,0.4,1.0\n3,0.3,\n"
    assert files_below(tmp_path) == ["metrics.csv"]


@pytest.mark.parametrize("torn", ["4,0.", "4", "4,0.25"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    """``4,0.25`` without a newline may be the beginning of 0.257."""
    path = tmp_path / "metrics.csv"
    path.write_text(f"step,loss\n1,0.5\n2,0.4\n3,0.3\n{torn}")
    assert [row["step"] for row in read_metrics(path)[1]] == ["1", "2", "3"]
    tracker = MetricsFile(path, after=4)
    tracker.log({"step": 4, "loss": 0.257})
    tracker.close()
    assert path.read_text() == "step,loss\n1,0.5\n2,0.4\n3,0.3\n4,0.257\n"


def test_rows_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n2,0.4\n3,0.3\n")
    tracker = MetricsFile(path, after=2)
    tracker.log({"step": 3, "loss": 0.25})
    tracker.close()
    assert path.read_text() == "step,loss\n1,0.5\n2,0.4\n3,0.25\n"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    tracker = MetricsFile(tmp_path / "metrics.csv")
    tracker._file.close()
    tracker.columns.append("loss")
    full = tracker._file = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails
    with pytest.raises(NextLatError, match=r"the disk is full while writing .*metrics\.csv; free some space"):
        tracker.log({"step": 1, "loss": 0.5})
    with suppress(OSError):
        full.close()


def test_tensorboard_gets_every_number_at_its_step(runs: Path) -> None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        assert not os.environ.get("CI"), "tensorboard must be installed in CI"
        pytest.skip("tensorboard is not installed")
    path = run_whole(tiny("gpt", "training.track=[tensorboard]"), runs, stop_after=4)
    go_on(path)
    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    rows = metrics(path)
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in loss] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in loss] == pytest.approx([float(row["loss"]) for row in rows], rel=1e-6)
    assert [event.step for event in events.Scalars("eval.whole_path_greedy")] == [3, 6]
    assert "eval.basin" not in events.Tags()["scalars"]


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, row: dict[str, Any], step: int) -> None:
        self.logged.append((step, row))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], FakeRun]]:
    """A stand-in for the package; collects what runs were opened and what they were told."""
    opened: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**settings: Any) -> FakeRun:
        opened.append((settings, FakeRun()))
        return opened[-1][1]

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return opened


def test_wandb_gets_every_row_and_a_resumed_run_goes_on_under_the_same_id(
    wandb: list[tuple[dict[str, Any], FakeRun]], runs: Path
) -> None:
    config = tiny("nextlat", "training.track=[wandb]")
    path = run_whole(config, runs, stop_after=4)
    go_on(path)
    (first, before), (second, after) = wandb
    assert first["id"] == second["id"] == f"tiny-{config.hash()}"
    assert second["resume"] == "allow"
    assert first["config"]["training"]["steps"] == 6
    assert [step for step, _ in before.logged] == [1, 2, 3, 4]
    assert [step for step, _ in after.logged] == [5, 6]
    assert before.finished
    assert after.finished
    rows = metrics(path)
    for step, row in before.logged + after.logged:
        assert row["loss"] == float(rows[step - 1]["loss"])
        assert "step" not in row


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NextLatError) as caught:
        open_trackers(tiny("gpt", f"training.track=[{name}]"), tmp_path, 0)
    assert str(caught.value) == (
        f'training.track asks for {name}, which is not installed; pip install "nextlat[track]"'
    )
    assert files_below(tmp_path) == []


def test_the_csv_is_written_whatever_else_is_tracked(wandb: list[Any], tmp_path: Path) -> None:
    trackers = open_trackers(tiny("gpt", "training.track=[wandb]"), tmp_path, 0)
    for tracker in trackers:
        tracker.log({"step": 1, "loss": 0.5})
        tracker.close()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"step": "1", "loss": "0.5"}]
