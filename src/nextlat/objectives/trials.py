"""A foreign model is tried on a few tokens before it is trusted with packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nextlat.errors import NextLatError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout; every module's mode is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def constant(model: nn.Module) -> Iterator[None]:
    """No gradient and no dropout."""
    with evaluating(model), torch.no_grad():
        yield


@contextmanager
def trial(model: nn.Module, device: torch.device) -> Iterator[None]:
    """No gradient, no dropout, no autocast."""
    with constant(model), torch.autocast(device.type, enabled=False):
        yield


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, roundings: int) -> bool:
    """Equal up to so many roundings of the largest value in this dtype."""
    limit = roundings * torch.finfo(dtype).eps * (1 + float(expected.abs().max()))
    return bool(((found - expected).abs() <= limit).all())


def check_packing(
    model: nn.Module, hidden: Callable[[Tensor, Tensor | None], Tensor], table: Tensor, length: int
) -> None:
    """Refuse a model in which a document packed behind another gets other states than alone.

    Args:
        model: its mode and its name are needed only.
        hidden: ``hidden(tokens, documents) -> (B, T, D)``.
        table: (V, D) embeddings; their dtype says how exact equality can be.
        length: tokens of the rows it is tried on, at least 2.

    Raises:
        NextLatError: states depend on what lies before the document, or the model fails on packed rows.
    """
    name, half = type(model).__name__, length // 2
    tokens = torch.randint(len(table), (length,), generator=torch.Generator().manual_seed(0)).to(table.device)
    one, other, rest = tokens[:half], tokens[half : 2 * half], tokens[2 * half :]
    documents = (torch.arange(length, device=table.device) >= half).long()[None]
    try:
        with trial(model, table.device):
            # calls of one row each, so that equal input is rounded in the same way
            behind, behind_another = (
                hidden(torch.cat([before, one, rest])[None], documents)[:, half : 2 * half].float()
                for before in (other, (other + 1) % len(table))
            )
            alone = hidden(torch.cat([one, other, rest])[None], None)[:, :half].float()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise NextLatError(
            f"{name} does not run on packed rows ({type(error).__name__}: {error}); train on rows of one document "
            "(documents=None)"
        ) from error
    # whatever lies before must not matter at all; another kernel may round in another way
    if not (close(behind, behind_another, table.dtype, 1) and close(behind, alone, table.dtype, 16)):
        raise NextLatError(
            f"a document packed behind another gets other states in {name} than alone: it does not keep to "
            "the mask or the positions it is given. Train on rows of one document (documents=None)"
        )
