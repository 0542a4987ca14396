"""The one type every room shares: a batch of token rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""Target value of a position where nothing is asked."""


class Batch(NamedTuple):
    """Rows of tokens with what each position must predict.

    Targets are never derived from tokens inside an objective: in language tasks the data side sets
    ``targets[b, t] = tokens[b, t + 1]``, in tagging tasks the two differ.
    """

    tokens: Tensor
    """(B, T) int64, what the model reads."""
    targets: Tensor
    """(B, T) int64, what the state at each position must predict; ``IGNORE`` where nothing is asked."""
    documents: Tensor | None = None
    """(B, T) int64 ids of packed documents, negative on padding; every change of id is a boundary that
    nothing may cross. ``None``: each row is one document without padding."""
    keys: Tensor | None = None
    """(B,) int64, one per global row: all randomness inside an objective is keyed by it."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._map(lambda part: part.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` (exclusive) of the batch."""
        return self._map(lambda part: part[start:stop])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        documents, keys = (None if part is None else change(part) for part in (self.documents, self.keys))
        return Batch(change(self.tokens), change(self.targets), documents, keys)
