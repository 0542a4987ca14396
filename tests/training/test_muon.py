"""Muon against torch's own, its split of the parameters, and a resumed run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nextlat.training import muon
from nextlat.training.build import build
from nextlat.training.muon import Muon, Together, orthogonalized, rate_factor, split
from nextlat.training.optimizers import make_optimizer
from tests.tiny import ALL, assert_same_weights, go_on, metrics, run_whole, tiny

MUON = "training.optimizer=muon"


@pytest.mark.parametrize("shape", [(6, 6), (3, 8), (8, 3)])
def test_orthogonalising_keeps_singular_vectors_and_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    made = left.T @ orthogonalized(matrix, torch.float64) @ right.T
    torch.testing.assert_close(made, torch.diag(made.diagonal()), rtol=0, atol=1e-9)
    assert ((made.diagonal() > 0.6) & (made.diagonal() < 1.3)).all()


def test_rate_factors() -> None:
    assert rate_factor(torch.Size((8, 2)), "original") == 2.0
    assert rate_factor(torch.Size((2, 8)), "original") == 1.0
    assert rate_factor(torch.Size((2, 16)), "match_rms_adamw") == pytest.approx(0.8)
    assert rate_factor(torch.Size((16, 2)), "match_rms_adamw") == pytest.approx(0.8)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_updates_are_those_of_torch(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's steps are in bf16 everywhere
    monkeypatch.setattr(muon, "orthogonalized", lambda matrix, dtype: orthogonalized(matrix, torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    mine = Muon([ours], 0.02, 0.1, scale)  # type: ignore[arg-type]
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn=scale)
    for _ in range(4):
        ours.grad = torch.randn(6, 4, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    moved = (theirs - 1).norm()
    assert float((ours - theirs).detach().norm() / moved) < 1e-5


@pytest.mark.parametrize("objective", ALL)
@pytest.mark.parametrize("tie", ["true", "false"])
def test_matrices_go_to_muon_and_tables_gains_and_biases_to_adamw_without_decay(objective: str, tie: str) -> None:
    built = build(tiny(objective, MUON, f"model.tie_embeddings={tie}")).objective
    matrices, others = split(built)
    names = {id(p): name for name, p in built.named_parameters()}
    assert sorted(map(id, matrices + others)) == sorted(names)
    for p in matrices:
        assert p.ndim == 2
        assert "embed_tokens" not in names[id(p)]
        assert "lm_head" not in names[id(p)]
    assert {names[id(p)].rpartition(".")[0].rpartition(".")[2] for p in others} >= {"embed_tokens", "norm"}
    assert all("_proj" not in names[id(p)] and "layer_" not in names[id(p)] for p in others)
    optimizer = make_optimizer(built, tiny(objective, MUON).training)
    assert isinstance(optimizer, Together)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_run_trains_and_resumes_bit_for_bit(runs: Path) -> None:
    straight = run_whole(tiny("nextlat", MUON, name="straight"), runs)
    stopped = run_whole(tiny("nextlat", MUON, name="stopped"), runs, stop_after=4)
    go_on(stopped)
    assert metrics(stopped) == metrics(straight)
    assert_same_weights(stopped, straight)
    losses = [float(row["loss"]) for row in metrics(straight)]
    assert all(map(math.isfinite, losses))
    adamw = run_whole(tiny("nextlat", name="adamw"), runs)
    assert metrics(adamw)[0]["loss"] == metrics(straight)[0]["loss"]
    assert metrics(adamw)[2]["loss"] != metrics(straight)[2]["loss"]
