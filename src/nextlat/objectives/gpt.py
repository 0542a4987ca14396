"""Plain next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from nextlat import options
from nextlat.batch import Batch
from nextlat.model.trunk import Transformer
from nextlat.objectives.base import Objective, Term
from nextlat.objectives.positions import at, counted
from nextlat.objectives.token_losses import token_losses


class GPTOptions(options.Options):
    """Plain next-token prediction has nothing to set."""


class GPT(Objective):
    """Next-token cross-entropy over every position that counts."""

    Options = GPTOptions

    @classmethod
    def build(
        cls,
        trunk: Transformer,
        options: options.Options,
        *,
        generator: torch.Generator,
        end_token: int | None,
        next_token: bool,
    ) -> Self:
        """The trunk, and nothing beside it."""
        return cls(trunk)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``{"ce": number of positions that count}``."""
        return {"ce": counted(batch).sum()}

    def forward(self, batch: Batch, scale: Mapping[str, float] | None = None) -> dict[str, Term]:
        """``{"ce": ...}`` with weight 1."""
        hidden = self.model.hidden_states(batch.tokens, batch.documents)
        mask = counted(batch)
        (ce,) = token_losses(at(mask, hidden), self.model.head_weight, at(mask, batch.targets))
        return {"ce": Term(ce, mask.sum(), 1.0)}
