"""What evaluation and decoding may know of a model, whatever objective trained it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nextlat.model.cache import Cache


class LMOutput(NamedTuple):
    """What one call of a causal language model returns."""

    logits: Tensor
    """(B, T, V) next-token logits; (B, 1, V) where only one position of each row was asked for."""
    hidden: Tensor
    """(B, T, D) the state the output head reads; what rank and belief measurements take."""
    cache: Cache | None = None
    """The cache that was passed in, now holding the new positions as well."""
    probe_state: Tensor | None = None
    """(B, T, D) the state that linear probes read."""
    layers: tuple[Tensor, ...] | None = None
    """(B, T, D) each: the residual stream after the embedding and after each block, on request."""
    draft_features: Any = None
    """Whatever this objective's drafter needs beyond ``hidden``."""


def states_at(states: Tensor, logits_at: Tensor | None) -> Tensor:
    """Of (B, T, D) states those that logits are made of: all, or (B, 1, D) at the (B,) positions asked for."""
    if logits_at is None:
        return states
    return states[torch.arange(len(states), device=states.device), logits_at][:, None]


class CausalLM(Protocol):
    """A plain next-token model. ``documents`` and ``cache`` exclude each other."""

    def __call__(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_at: Tensor | None = None,
    ) -> LMOutput:
        """Run the model on (B, T) tokens; with ``logits_at`` make logits of (B,) positions only, as after a prompt."""
        ...

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for ``rows`` rows of up to ``capacity`` positions."""
        ...


class Drafter(Protocol):
    """Guesses tokens ahead of the model that verifies them."""

    max_length: int | None
    """Longest draft it can make; ``None`` means any."""
    vocabulary: Tensor | None
    """(V',) int64 tokens that its logits are of, increasing; ``None`` means all."""

    def observe(self, output: LMOutput, accepted: Tensor) -> Any:
        """State after a trunk call: ``accepted`` (B,) is the index of each row's last accepted position."""
        ...

    def step(self, state: Any, token: Tensor) -> tuple[Any, Tensor]:
        """Feed (B,) tokens; return the next state and (B, V), or (B, V'), logits to draft from."""
        ...

    def select(self, state: Any, rows: Tensor) -> Any:
        """Gather rows of the state, for batches, beams and trees."""
        ...
