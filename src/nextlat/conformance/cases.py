"""Inputs of the claims: small, float64 and the same at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""Target where nothing is asked."""
HORIZON = 6
"""Of claims on every step: further than loops that are unrolled by hand."""


class Case(NamedTuple):
    """What a loss function is called with, beside horizon and dynamics."""

    hidden: Tensor
    """(B, T, D) leaf."""
    embedding: Tensor
    """(V, D) leaf."""
    head: Tensor
    """(V, D) leaf."""
    tokens: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64, ``IGNORE`` where nothing is asked."""
    documents: Tensor | None
    """(B, T) int64, negative on padding, or ``None``."""

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that take gradients, as messages name them."""
        return {"hidden": self.hidden, "embedding_weight": self.embedding, "head_weight": self.head}

    def rows(self, chosen: Sequence[int]) -> Case:
        """Some rows, as new leaves of the states and the same tables."""
        return self.cut(chosen, list(range(self.tokens.shape[1])))

    def cut(self, rows: Sequence[int], positions: Sequence[int]) -> Case:
        """The same positions of some rows, as new leaves of the states and the same tables."""
        index = torch.tensor(list(rows))[:, None], torch.tensor(list(positions))[None]
        return self._replace(
            hidden=leaf(self.hidden.detach()[index]),
            tokens=self.tokens[index],
            targets=self.targets[index],
            documents=None if self.documents is None else self.documents[index],
        )


def leaf(values: Tensor) -> Tensor:
    """A copy that takes gradients."""
    return values.detach().clone().requires_grad_()


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers that depend on shape and seed alone."""
    generator = torch.Generator().manual_seed(1000 * seed + sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_case(
    rows: int,
    length: int,
    documents: Sequence[Sequence[int]] | None = None,
    *,
    vocabulary: int = 5,
    width: int = 3,
    seed: int = 0,
) -> Case:
    """Next-token rows without a prompt.

    The token 0 does not occur, so that it can be taken for an end token only where a claim is about that. The
    last position of a row is asked about too: the token behind the row is known.

    Args:
        rows: B.
        length: T.
        documents: (B, T) ids; positions with a negative id have no target.
        vocabulary: V.
        width: D.
        seed: of states and tokens; the tables depend on (V, D) alone.
    """
    generator = torch.Generator().manual_seed(seed)
    line = torch.randint(1, vocabulary, (rows, length + 1), generator=generator)
    targets = line[:, 1:].clone()
    ids = None if documents is None else torch.tensor([list(row) for row in documents])
    if ids is not None:
        targets[ids < 0] = IGNORE
    return Case(
        leaf(draw(rows, length, width, seed=seed)),
        leaf(draw(vocabulary, width, seed=1)),
        leaf(draw(vocabulary, width, seed=2)),
        line[:, :-1].clone(),
        targets,
        ids,
    )


def with_prompts(case: Case, lengths: Sequence[int]) -> Case:
    """The case with the first ``lengths[b]`` tokens of each row as prompt; the last of them predicts the answer."""
    targets = case.targets.clone()
    for row, length in enumerate(lengths):
        targets[row, : length - 1] = IGNORE
    return case._replace(targets=targets)


def halfway(state: Tensor, embedding: Tensor) -> Tensor:
    """Dynamics of the worked example: ``s + e / 2``."""
    return state + embedding / 2


def turning(state: Tensor, embedding: Tensor) -> Tensor:
    """Dynamics whose state tells the order of the tokens fed: ``roll(s, 1) / 2 + e``."""
    return torch.roll(state, 1, -1) / 2 + embedding


class Mixing:
    """Smooth dynamics with a parameter: ``tanh(A s + e)``."""

    def __init__(self, width: int) -> None:
        self.weight = leaf(draw(width, width, seed=3) / width**0.5)

    def __call__(self, state: Tensor, embedding: Tensor) -> Tensor:
        """Next state."""
        return torch.tanh(state @ self.weight.T + embedding)


def worked_example() -> Case:
    """One row of five tokens: two documents, the end token 0 opens the second, the first position is prompt."""
    hidden = [[[0.5, -0.5], [1.0, 0.0], [-0.5, 2.5], [0.0, 1.0], [1.5, -1.0]]]
    embedding = [[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]
    head = [[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]
    states, lookup, output = (leaf(torch.tensor(table, dtype=torch.float64)) for table in (hidden, embedding, head))
    return Case(
        states,
        lookup,
        output,
        torch.tensor([[1, 2, 2, 0, 1]]),
        torch.tensor([[IGNORE, 2, 0, 1, IGNORE]]),
        torch.tensor([[0, 0, 0, 1, 1]]),
    )
