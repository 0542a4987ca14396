"""Ranks of matrices whose spectrum is known."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from nextlat.batch import Batch
from nextlat.evaluation.rank import effective_rank, participation_ratio, rank
from nextlat.model.interfaces import LMOutput
from tests.evaluation.models import subject


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def with_spectrum(values: list[float], rows: int = 9) -> Tensor:
    """(rows, D) states with these singular values, turned at random."""
    width = len(values)
    return orthogonal(rows)[:, :width] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ orthogonal(width, 1)


def test_equal_singular_values_count_fully() -> None:
    for width in (1, 3, 8):
        assert effective_rank(with_spectrum([2.5] * width)) == pytest.approx(width)


def test_one_direction_counts_as_one() -> None:
    assert effective_rank(with_spectrum([3.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.ones(7, 4)) == pytest.approx(1.0)


def test_entropy_runs_over_singular_values_and_not_their_squares() -> None:
    """Shares 1/2, 1/4, 1/4 give 2^1.5; squares would give another number."""
    assert effective_rank(with_spectrum([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)
    squares = [4 / 6, 1 / 6, 1 / 6]
    assert abs(2**1.5 - math.exp(-sum(p * math.log(p) for p in squares))) > 0.4


def test_scale_does_not_matter() -> None:
    states = with_spectrum([2.0, 1.0, 0.5])
    assert effective_rank(states * 1e4) == pytest.approx(effective_rank(states))


def test_participation_ratio_of_a_known_covariance() -> None:
    """Eigenvalues 4, 1, 1 of the covariance: 36 / 18; the mean is taken off first."""
    corners = torch.tensor([[2.0, 0, 0], [-2, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    assert participation_ratio(corners) == pytest.approx(2.0)
    assert participation_ratio(corners + 100) == pytest.approx(2.0)


class Table:
    """A model whose state is a row of a table, and a task that shows every token once, and some padding."""

    def __init__(self, states: Tensor, documents: Tensor | None) -> None:
        self.states, self.documents = states, documents

    def evaluation(self, split: str) -> Iterable[Batch]:
        tokens = torch.arange(len(self.states)).view(-1, 2)
        for row in range(len(tokens)):
            documents = None if self.documents is None else self.documents[row : row + 1]
            yield Batch(tokens[row : row + 1], tokens[row : row + 1], documents)

    def __call__(self, tokens: Tensor, documents: Tensor | None = None) -> LMOutput:
        return LMOutput(logits=torch.full((1, 2, 1), torch.nan), hidden=self.states[tokens])


def test_rank_measures_the_hidden_states_raw_and_centred() -> None:
    corners = torch.tensor([[2.0, 0, 0], [-2, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    table = Table(corners + 100, None)
    metrics = rank(subject(table, table))
    assert metrics["effective_rank"].value == pytest.approx(1.0, abs=0.15)
    share = torch.tensor([8.0, 2.0, 2.0]).sqrt()
    share = share / share.sum()
    assert metrics["effective_rank_centred"].value == pytest.approx(
        float((-(share * share.log()).sum()).exp()), rel=1e-4
    )
    assert metrics["participation_ratio"].value == pytest.approx(2.0, rel=1e-4)
    assert (metrics["width"].value, metrics["effective_rank"].n) == (3.0, 6)


def test_rank_leaves_padding_out() -> None:
    states = torch.tensor([[1.0, 0], [0, 1], [1, 0], [50, 7]])
    table = Table(states, torch.tensor([[0, 0], [3, -1]]))
    metrics = rank(subject(table, table))
    assert metrics["effective_rank"].n == 3
    assert metrics["effective_rank"].value == pytest.approx(effective_rank(states[:3]))


def test_rank_stops_at_the_examples_asked_for() -> None:
    table = Table(torch.eye(6), None)
    assert rank(subject(table, table, examples=2))["effective_rank"].n == 4
