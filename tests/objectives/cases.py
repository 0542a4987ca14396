"""What the objective tests share: the worked example, small models and gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nextlat.batch import IGNORE, Batch
from nextlat.model import Transformer
from nextlat.objectives.nextlat import NextLat

VOCABULARY = 7


class Parts(NamedTuple):
    """Leaves of the loss core."""

    hidden: Tensor
    embedding: Tensor
    head: Tensor


def parts(rows: int, length: int, vocabulary: int = 5, width: int = 3, seed: int = 0) -> Parts:
    """Random float64 leaves."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, length, width), (vocabulary, width), (vocabulary, width))
    return Parts(*(torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes))


def halfway(state: Tensor, embedding: Tensor) -> Tensor:
    """The stub dynamics of the worked example."""
    return state + embedding / 2


def worked_example() -> tuple[Batch, Parts]:
    """One row of five tokens, two documents (the end token 0 opens the second), the first position prompt."""
    batch = Batch(
        torch.tensor([[1, 2, 2, 0, 1]]), torch.tensor([[IGNORE, 2, 0, 1, IGNORE]]), torch.tensor([[0, 0, 0, 1, 1]])
    )
    tables = (
        [[[0.5, -0.5], [1.0, 0.0], [-0.5, 2.5], [0.0, 1.0], [1.5, -1.0]]],
        [[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]],
        [[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]],
    )
    return batch, Parts(*(torch.tensor(table, dtype=torch.float64).requires_grad_() for table in tables))


def small_trunk(seed: int = 0, tied: bool = False) -> Transformer:
    """A float64 trunk with weights large enough to make every term matter."""
    g = torch.Generator().manual_seed(seed)
    model = Transformer(VOCABULARY, 1, 2, 8, tie_embeddings=tied, generator=g).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10.0)
    return model


def small_nextlat(horizon: int = 2, seed: int = 0, tied: bool = False, **options: float | bool) -> NextLat:
    """A float64 NextLat on a small trunk."""
    g = torch.Generator().manual_seed(seed + 100)
    objective = NextLat(small_trunk(seed, tied), horizon=horizon, dynamics=6, generator=g, **options).double()
    with torch.no_grad():
        for parameter in objective.dynamics.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20.0)
    return objective


def gradients(loss: Tensor, module: nn.Module, single_term: bool = False) -> dict[str, Tensor]:
    """Gradient of every parameter. A missing one is an error, unless a single term is asked about."""
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=single_term, materialize_grads=single_term)
    return dict(zip(named, found, strict=True))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )
