"""The output head as a drafter sees it: from states to logits, and replaceable by a cheaper one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

Readout = Callable[[Tensor], Tensor]
"""(B, D) states to (B, V) logits, or to those of a part of the vocabulary."""


class HasHead(Protocol):
    """A model with an output head."""

    @property
    def head_weight(self) -> Tensor:
        """(V, D) the output head."""
        ...


class OutputHead:
    """``W s`` with a model's own weights as they are now, whole and in full precision."""

    def __init__(self, model: HasHead) -> None:
        self.model = model

    @property
    def weight(self) -> Tensor:
        """(V, D) the output head."""
        return self.model.head_weight

    def __call__(self, state: Tensor) -> Tensor:
        """(B, V) logits of (B, D) states."""
        return F.linear(state, self.weight)
