"""Our own implementations behind the contracts: what the suite is run on by default, and the adapters to copy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from nextlat.batch import Batch
from nextlat.objectives.dynamics import LatentDynamics
from nextlat.objectives.losses import cross_entropy_sum
from nextlat.objectives.nextlat import nextlat_sums
from nextlat.objectives.positions import token_positions

Dynamics = Callable[[Tensor, Tensor], Tensor]


def own_losses(
    hidden: Tensor,
    embedding_weight: Tensor,
    head_weight: Tensor,
    tokens: Tensor,
    targets: Tensor,
    documents: Tensor | None,
    horizon: int,
    dynamics: Dynamics,
) -> dict[str, tuple[Tensor, Tensor]]:
    """``nextlat_sums`` behind the contract of ``--kind losses``; shapes as there."""
    batch = Batch(tokens, targets, documents)
    return nextlat_sums(hidden, embedding_weight, head_weight, batch, dynamics, horizon)


def own_dynamics(
    state: Tensor, embedding: Tensor, gain: Tensor, layer_1: Tensor, layer_2: Tensor, layer_3: Tensor
) -> Tensor:
    """``LatentDynamics`` behind the contract of ``--kind dynamics``: (..., D) in and out, weights as (out, in)."""
    module = LatentDynamics(state.shape[-1], layer_1.shape[0], generator=torch.Generator())
    weights = {"norm.weight": gain}
    weights |= {f"layer_{n}.weight": layer for n, layer in enumerate((layer_1, layer_2, layer_3), start=1)}
    out: Tensor = functional_call(module, weights, (state, embedding))
    return out


def own_terms(
    states: Tensor, head_weight: Tensor, targets: Tensor, documents: Tensor | None, horizon: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The index sets and token loss of mtp and jtp behind the contract of ``--kind multi-token``.

    Args:
        states: (d + 1, B, T, D), one state a slot.
        head_weight: (V, D).
        targets: (B, T) int64.
        documents: (B, T) int64, or ``None``.
        horizon: d.
    """
    batch = Batch(targets, targets, documents)  # the index sets read the shape of the tokens only
    terms = {}
    for step in range(horizon + 1):
        chosen = token_positions(batch, step)  # (B, max(T - step, 0))
        logits = states[step, :, : chosen.shape[1]][chosen] @ head_weight.T
        total = cross_entropy_sum(logits, targets[:, step:][chosen])
        terms[f"mtp_{step}" if step else "ce"] = (total, chosen.sum())
    return terms
