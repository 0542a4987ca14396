"""Gradient health against gradients taken one term at a time, and its columns in a run."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from nextlat.objectives import total_loss
from nextlat.training.gradients import gradient_health
from tests.batches import random_batch
from tests.objectives.cases import VOCABULARY, small_nextlat
from tests.tiny import ALL, go_on, metrics, run_whole, tiny


def test_norms_and_cosines_are_those_of_the_weighted_groups_over_the_plain_model() -> None:
    objective, batch = small_nextlat(horizon=2, latent_weight=0.5, kl_weight=3.0), random_batch(0, 3, 8, VOCABULARY)
    terms = objective(batch)
    flat = {}
    for group in ("ce", "latent", "kl"):
        loss = total_loss({name: term for name, term in terms.items() if name.startswith(group)})
        found = torch.autograd.grad(loss, list(objective.model.parameters()), retain_graph=True, materialize_grads=True)
        flat[group] = torch.cat([g.flatten() for g in found])
    row = gradient_health(objective, batch)
    assert row.keys() == {f"grad_norm.{group}" for group in flat} | {"cosine.latent", "cosine.kl"}
    for group, gradient in flat.items():
        assert row[f"grad_norm.{group}"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    for group in ("latent", "kl"):
        cosine = torch.cosine_similarity(flat[group], flat["ce"], dim=0)
        assert row[f"cosine.{group}"] == pytest.approx(float(cosine), abs=1e-5)
    assert all(p.grad is None for p in objective.parameters())


@pytest.mark.parametrize("objective", ALL)
def test_evaluated_steps_log_health_and_it_changes_no_weight(objective: str, runs: Path) -> None:
    path = run_whole(tiny(objective), runs)
    without = run_whole(tiny(objective, "evaluation.health=false", name="without"), runs)
    rows = metrics(path)
    for row in rows:
        figures = {key: value for key, value in row.items() if key.startswith("health.") and value}
        assert bool(figures) == (row["step"] in ("3", "6"))
        assert all(math.isfinite(float(value)) for value in figures.values())
    assert "health.grad_norm.ce" in rows[0] or objective == "bst"
    kept = [{key: value for key, value in row.items() if not key.startswith("health.")} for row in rows]
    assert kept == metrics(without)


def test_health_survives_an_interruption_bit_for_bit(runs: Path) -> None:
    straight = run_whole(tiny(name="straight"), runs)
    stopped = run_whole(tiny(name="stopped"), runs, stop_after=4)
    go_on(stopped)
    assert metrics(stopped) == metrics(straight)


def test_a_collapse_is_printed_and_logged(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["nextlat.evaluation.health"], "LEAST_DEVIATION", 1e9)
    path = run_whole(tiny(), runs)
    assert "states are collapsing" in capsys.readouterr().out
    assert (path / "log.txt").read_text(encoding="utf-8").count("states are collapsing") == 2
