"""Training does today what it did when the trajectories were recorded, and equal configurations do the same.

A deliberate change of what is computed records them anew, in the same commit and with the reason:
``python -m tests.invariants.record``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.invariants.record import FILE, trajectory
from tests.tiny import ALL, assert_same_weights, metrics, run_whole, tiny

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
ROUNDING = 3e-7
"""A KL of 3e-4 nats is a small difference of logarithms: its rounding in fp32 is absolute, some 5e-8."""


@pytest.mark.parametrize("objective", ALL)
def test_training_follows_the_recorded_trajectory(objective: str, runs: Path) -> None:
    found = trajectory(objective, runs)
    assert found.keys() == GOLDEN[objective].keys()
    for name, values in GOLDEN[objective].items():
        assert len(values) == 20
        assert found[name] == pytest.approx(values, rel=1e-5, abs=ROUNDING), name


@pytest.mark.parametrize("change", ["training.learning_rate=1.02e-3", "training.weight_decay=0.2", "seed=1"])
def test_the_recorded_trajectory_sees_a_small_change(change: str, runs: Path) -> None:
    found = trajectory("nextlat", runs, change)
    assert found["loss"] != pytest.approx(GOLDEN["nextlat"]["loss"], rel=1e-5)


def test_every_recorded_objective_still_exists() -> None:
    assert set(GOLDEN) == set(ALL)


@pytest.mark.parametrize("objective", ALL)
def test_accumulation_follows_the_same_trajectory(objective: str, runs: Path) -> None:
    found = trajectory(objective, runs, "training.accumulation=4")
    for name, values in GOLDEN[objective].items():
        assert found[name] == pytest.approx(values, rel=1e-4, abs=ROUNDING), name


@pytest.mark.parametrize(
    ("objective", "one", "other"),
    [
        ("gpt", (), ("objectives.nextlat.horizon=5",)),
        ("gpt", (), ("training.save=every", "training.save_every=1")),
        ("gpt", (), ("evaluation.examples=7", "evaluation.batch_size=3", "evaluation.after=[rank]")),
        ("nextlat", (), ("training.evaluate_every=1",)),
        ("nextlat", ("training.evaluate_every=null",), ("training.evaluate_every=2",)),
        ("nextlat", ("training.clip=null",), ("training.clip=1000000",)),
        ("nextlat", (), ("training.schedule=wsd", "training.decay_steps=1")),
        ("nextlat", ("objective.ce_weight=0",), ("objective.ce_weight=0.0",)),
        ("gpt", ("training.schedule=cosine", "training.min_lr_ratio=1"), ("training.schedule=constant",)),
    ],
)
def test_these_configurations_coincide_bit_for_bit(
    objective: str, one: tuple[str, ...], other: tuple[str, ...], tmp_path: Path
) -> None:
    """Above all: how often a run is measured or saved has no influence on what it learns."""
    paths = [run_whole(tiny(objective, *more), tmp_path / str(i)) for i, more in enumerate((one, other))]
    losses = [[row["loss"] for row in metrics(path)] for path in paths]
    assert losses[0] == losses[1]
    assert_same_weights(*paths, besides=("seconds", "best", "best_step"))


@pytest.mark.parametrize(
    ("objective", "change"),
    [("mtp", "objective.horizon=0"), ("mtp", "objective.mtp_weight=0"), ("jtp", "objective.mtp_weight=0")],
)
def test_objectives_without_their_extra_terms_log_cross_entropy_alone(objective: str, change: str, runs: Path) -> None:
    rows = metrics(run_whole(tiny(objective, change), runs))
    assert {name for name in rows[0] if name.endswith(".share")} == {"ce.share"}


def test_nextlat_that_touches_neither_trunk_nor_embedding_trains_exactly_as_gpt(tmp_path: Path) -> None:
    """With the auxiliary gradients cut off, only the dynamics feel them, and clipping is far away."""
    cut = ("objective.detach_source=true", "objective.detach_embeddings=true", "training.clip=null")
    nextlat = run_whole(tiny("nextlat", *cut), tmp_path / "nextlat")
    gpt = run_whole(tiny("gpt", "training.clip=null"), tmp_path / "gpt")
    losses = [[float(row["loss"]) for row in metrics(path)] for path in (nextlat, gpt)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    live = run_whole(tiny("nextlat", "training.clip=null"), tmp_path / "live")
    assert losses[1] != pytest.approx([float(row["loss"]) for row in metrics(live)], rel=1e-6)
