"""Rollouts of worlds whose dynamics are known."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError
from nextlat.evaluation.rollout import rollout
from nextlat.model.interfaces import LMOutput
from nextlat.statistics import Metric
from tests.evaluation.models import subject

V, D, LENGTH = 5, 3, 7


class World:
    """A linear recurrence ``h_t = A h_(t-1) + E[x_t]``, started anew in each document; model and task in one."""

    sequence_length = LENGTH

    def __init__(self, packed: bool) -> None:
        g = torch.Generator().manual_seed(1)
        self.step = 0.8 * torch.linalg.qr(torch.randn(D, D, generator=g))[0]
        self.embedding, self.head = torch.randn(V, D, generator=g), 2 * torch.randn(V, D, generator=g)
        tokens = torch.randint(V, (6, LENGTH), generator=g)
        targets = torch.randint(V, (6, LENGTH), generator=g)
        targets[torch.rand(6, LENGTH, generator=g) < 0.4] = IGNORE
        documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 3 + [[4, 4, 4, 4, 4, -1, -1]] * 3) if packed else None
        self.batch = Batch(tokens, targets, documents)

    def evaluation(self, split: str) -> Iterable[Batch]:
        yield self.batch.rows(0, 4)
        yield self.batch.rows(4, 6)

    def states(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        h = torch.zeros(*tokens.shape, D)
        for row in range(len(tokens)):
            for t in range(LENGTH):
                begins = t == 0 or (documents is not None and documents[row, t] != documents[row, t - 1])
                h[row, t] = self.embedding[tokens[row, t]] + (0 if begins else self.step @ h[row, t - 1])
        return h

    def __call__(self, tokens: Tensor, documents: Tensor | None = None) -> LMOutput:
        h = self.states(tokens, documents)
        return LMOutput(logits=h @ self.head.T, hidden=h)


class Exact(nn.Module):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.step = world.step

    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        return state @ self.step.T + embedding


class Still(nn.Module):
    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        return state


def measure(world: World, dynamics: nn.Module | None, **options: int) -> dict[str, Metric]:
    return rollout(
        subject(world, world, embedding_weight=world.embedding, head_weight=world.head, dynamics=dynamics, **options)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_exact_dynamics_make_no_error(packed: bool) -> None:
    """In packed rows this holds only if no rollout passes through a boundary."""
    world = World(packed)
    metrics = measure(world, Exact(world))
    assert {f"{kind}_{k}" for kind in ("transition_error", "kl", "agreement") for k in (1, 2, 3, 4)} == set(metrics)
    for k in (1, 2, 3, 4):
        assert metrics[f"transition_error_{k}"].value == pytest.approx(0, abs=1e-10)
        assert metrics[f"kl_{k}"].value == pytest.approx(0, abs=1e-5)
        assert metrics[f"agreement_{k}"].value == 1.0


@pytest.mark.parametrize("packed", [False, True])
def test_a_state_that_stands_still_makes_the_error_worked_out_by_hand(packed: bool) -> None:
    world = World(packed)
    metrics = measure(world, Still())
    tokens, targets, documents, _ = world.batch
    h = world.states(tokens, documents)
    real = [(r, t) for r in range(6) for t in range(LENGTH) if documents is None or documents[r, t] >= 0]
    states = torch.stack([h[r, t] for r, t in real])
    variance = (states - states.mean(0)).square().sum(1).mean()
    law = (h @ world.head.T).softmax(-1)
    for k in (1, 2, 3, 4):
        errors, divergences, same = [], [], []
        for r in range(6):
            for t in range(LENGTH - k):
                if documents is not None and (
                    documents[r, t] < 0 or len(set(documents[r, t : t + k + 1].tolist())) > 1
                ):
                    continue
                errors.append((h[r, t] - h[r, t + k]).square().sum() / variance)
                if targets[r, t + k] != IGNORE:
                    truth, guess = law[r, t + k], law[r, t]
                    divergences.append((truth * (truth / guess).log()).sum())
                    same.append(float(truth.argmax() == guess.argmax()))
        assert metrics[f"transition_error_{k}"].n == len(errors)
        assert metrics[f"transition_error_{k}"].value == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)
        assert metrics[f"kl_{k}"].n == len(divergences)
        assert metrics[f"kl_{k}"].value == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-4)
        assert metrics[f"agreement_{k}"].value == pytest.approx(sum(same) / len(same))
        assert k > 1 or 0 < sum(same) < len(same)


def test_a_guess_of_the_mean_has_error_one() -> None:
    world = World(packed=False)
    mean = world.states(world.batch.tokens, None).flatten(0, 1).mean(0)

    class Mean(nn.Module):
        def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
            return mean.expand_as(state)

    errors = [measure(world, Mean())[f"transition_error_{k}"].value for k in (1, 2, 3, 4)]
    assert errors == pytest.approx([1.0] * 4, abs=0.25)  # later positions only, so not exactly 1


def test_rollouts_are_as_long_as_a_longer_horizon() -> None:
    world = World(packed=False)
    assert {name[-1] for name in measure(world, Exact(world), horizon=2)} == set("1234")
    assert {name[-1] for name in measure(world, Exact(world), horizon=6)} == set("123456")


def test_steps_that_no_document_is_long_enough_for_are_left_out() -> None:
    world = World(packed=True)
    world.batch = world.batch._replace(documents=torch.tensor([[0, 0, 1, 1, 2, 2, 3]] * 6))
    found = measure(world, Exact(world))
    assert [name for name in found if name.startswith("transition_error")] == ["transition_error_1"]
    assert all(math.isfinite(float(metric.value)) for metric in found.values())


def test_states_that_are_all_the_same_have_no_error_to_speak_of() -> None:
    world = World(packed=False)
    world.embedding = torch.ones(V, D)
    world.step = torch.zeros(D, D)
    found = measure(world, Still())
    assert not any(name.startswith("transition_error") for name in found)
    assert found["kl_1"].value == 0


def test_rollouts_are_no_longer_than_the_rows() -> None:
    world = World(packed=False)
    world.sequence_length = 3
    assert {name[-1] for name in measure(world, Exact(world))} == {"1", "2"}


def test_examples_limits_the_rows() -> None:
    assert measure(world := World(packed=False), Exact(world), examples=5)["transition_error_1"].n == 5 * 6


def test_a_model_without_dynamics_is_told_how_to_get_them() -> None:
    with pytest.raises(NextLatError, match="nextlat fit-dynamics RUN"):
        measure(World(packed=False), None)
