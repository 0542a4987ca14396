"""Health figures of states that are known, and when they make a warning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nextlat.batch import Batch
from nextlat.evaluation.health import collapse, health
from nextlat.evaluation.rollout import rollout
from nextlat.model.interfaces import LMOutput
from tests.evaluation.models import subject


class Rows:
    """A task whose held-out rows are given."""

    sequence_length = 6

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def evaluation(self, split: str) -> tuple[Batch, ...]:
        return self.batches


class Table:
    """The state is a row of a table, whatever came before."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, tokens: Tensor, documents: Tensor | None = None, **_: Any) -> LMOutput:
        hidden = self.table[tokens]
        return LMOutput(logits=hidden, hidden=hidden)


def measured(table: Tensor, tokens: Tensor, documents: Tensor | None = None, **options: Any) -> dict[str, float]:
    batch = Batch(tokens, torch.full_like(tokens, -100), documents)
    return {name: float(m.value) for name, m in health(subject(Rows(batch), Table(table), **options)).items()}


def test_figures_of_two_states() -> None:
    # half the positions at (3, 1), half at (-3, 1): rms sqrt 5, deviations 3 and 0, one direction
    tokens = torch.tensor([[0, 1, 0, 1]])
    figures = measured(torch.tensor([[3.0, 1.0], [-3.0, 1.0]]), tokens)
    root = 5**0.5
    assert figures == pytest.approx(
        {"rms": root, "deviation": 1.5 / root, "deviation_min": 0.0, "effective_rank": 1.0}, abs=1e-9
    )


def test_padding_is_left_out() -> None:
    table = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [1e6, 1e6]])
    documents = torch.tensor([[0, 0, 0, 0, -1, -1]])
    padded = measured(table, torch.tensor([[0, 1, 0, 1, 2, 2]]), documents)
    assert padded == measured(table, torch.tensor([[0, 1, 0, 1]]))


def test_transition_errors_are_those_of_the_rollout() -> None:
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(1))

    class Stay(nn.Module):
        def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
            return state

    batch = Batch(tokens, torch.full_like(tokens, -100))
    looked = subject(Rows(batch), Table(table), dynamics=Stay(), embedding_weight=torch.zeros(5, 3), head_weight=None)
    figures = health(looked)
    expected = {name: m for name, m in rollout(looked).items() if name.startswith("transition")}
    assert len(expected) == 4
    assert {name: figures[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([[1.0, 1.0, 1.0], [1.0, 1.01, 1.0], [1.0, 1.0, 0.99]], "deviate by"),
        ([[3.0, 1.0, 0.0], [-3.0, 1.0, 0.0], [0.0, 1.0, 0.0]], "effective rank is 1.00"),
        ([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]], None),
    ],
)
def test_a_collapse_is_named_and_a_healthy_state_is_not(table: list[list[float]], says: str | None) -> None:
    tokens = torch.tensor([[0, 1, 2, 0, 1, 2]])
    figures = health(subject(Rows(Batch(tokens, tokens)), Table(torch.tensor(table))))
    message = collapse(figures)
    assert message is None if says is None else says in str(message)
