"""Which positions count: the index sets of every loss, from the batch alone.

``run(t)`` numbers the documents of a row, ``real(t)`` is false on padding, and a position *counts* when it
is real and its target is asked for. A transition of i steps from t is allowed when t and t + i lie in the
same run; runs are contiguous, so that also covers every position in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextlat.batch import IGNORE, Batch
from nextlat.model.attention import run_index


def counted(batch: Batch) -> Tensor:
    """(B, T) bool: positions whose target is asked for (the set C_0)."""
    asked = batch.targets != IGNORE
    return asked if batch.documents is None else asked & (batch.documents >= 0)


def at(mask: Tensor, values: Tensor) -> Tensor:
    """(N, ...) of the (B, T, ...) values at the N positions that a (B, T) bool mask names, in order.

    Where all are named nothing is gathered, which a CPU finds out in no time.
    """
    return values.flatten(0, 1) if not mask.is_cuda and mask.all() else values[mask]


def transitions(documents: Tensor | None, steps: int, rows: int, length: int, device: torch.device) -> Tensor:
    """(B, max(T - steps, 0)) bool: sources t whose state may be rolled to t + steps (the set A_i)."""
    width = max(length - steps, 0)
    if documents is None:
        return torch.ones(rows, width, dtype=torch.bool, device=device)
    run = run_index(documents)
    return (run[:, :width] == run[:, steps:]) & (documents[:, :width] >= 0)


def token_positions(batch: Batch, steps: int) -> Tensor:
    """(B, max(T - steps, 0)) bool: sources t with an allowed transition to a position that counts (C_i)."""
    rows, length = batch.tokens.shape
    allowed = transitions(batch.documents, steps, rows, length, batch.tokens.device)
    return allowed & counted(batch)[:, steps:]
