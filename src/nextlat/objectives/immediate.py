"""Sums whose gradient is made in the forward pass, piece by piece, so that the pieces' memory is freed at once.

A term's weight and count enter a loss only as a factor on its sum, so the gradient of the sum can be made
before that factor is known and multiplied by it later. This is plain differentiation in another order: the
result does not depend on how the sum is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextlat.errors import NextLatError


class Piece(NamedTuple):
    """A part of a sum."""

    term: int
    """Which sum it belongs to."""
    value: Callable[..., Tensor]
    """``value(*states)`` makes the scalar part from leaf copies of the states."""


def immediate_sums(
    pieces: Sequence[Piece],
    n_terms: int,
    states: Sequence[Tensor],
    parameters: Sequence[Tensor],
    scale: Sequence[float] | None = None,
) -> Tensor:
    """Add up pieces, differentiating and freeing each before the next one is made.

    Args:
        pieces: parts of the sums.
        n_terms: number of sums K.
        states: tensors with a graph behind them; pieces get detached copies, so that this graph is walked once.
        parameters: the leaf tensors that pieces read besides.
        scale: (K,) the factor that each sum will be multiplied with before ``backward``, up to one common
            factor. With it all sums share one accumulated gradient; without it each keeps its own.

    Returns:
        (K,) the sums, fp32 or wider. Every state and parameter receives a gradient, zero if no piece reads it.

    Raises:
        NextLatError: on ``backward``, when the sums are not weighted in proportion to ``scale``.
    """
    inputs = (*states, *parameters)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        sums: Tensor = _ImmediateSums.apply(pieces, n_terms, states, parameters, scale, *inputs)  # type: ignore[no-untyped-call]
        return sums
    totals = zero_sums(n_terms, inputs[0])
    for piece in pieces:
        totals[piece.term] += piece.value(*states)
    return totals


def zero_sums(n_terms: int, like: Tensor) -> Tensor:
    """(K,) zeros, fp32, or fp64 beside fp64."""
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return torch.zeros(n_terms, dtype=dtype, device=like.device)


class _ImmediateSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pieces: Sequence[Piece],
        n_terms: int,
        states: Sequence[Tensor],
        parameters: Sequence[Tensor],
        scale: Sequence[float] | None,
        *inputs: Tensor,
    ) -> Tensor:
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in states]
        read = [*leaves, *parameters]
        live = [index for index, x in enumerate(read) if x.requires_grad]
        # One gradient per input when the factors are known, else one per term and input.
        gradients: list[dict[int, Tensor]] = [{} for _ in range(1 if scale is not None else n_terms)]
        totals = zero_sums(n_terms, inputs[0])
        for piece in pieces:
            with torch.enable_grad():
                part = piece.value(*leaves)
            totals[piece.term] += part.detach()
            if not part.requires_grad:
                continue
            factor = None if scale is None else part.new_tensor(scale[piece.term])
            made = torch.autograd.grad(part, [read[index] for index in live], factor, allow_unused=True)
            store = gradients[0 if scale is not None else piece.term]
            for index, gradient in zip(live, made, strict=True):
                if gradient is not None:
                    store[index] = store[index].add_(gradient) if index in store else gradient.clone()
            del part, made
        ctx.gradients, ctx.scale, ctx.live = gradients, scale, live
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs]
        return totals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factors = upstream if ctx.scale is None else _common_factor(upstream, ctx.scale)
        out: list[Tensor | None] = [None] * len(ctx.like)
        for index in ctx.live:
            shape, dtype, device = ctx.like[index]
            parts = [f * store[index] for store, f in zip(ctx.gradients, factors, strict=True) if index in store]
            out[index] = sum(parts[1:], start=parts[0]) if parts else torch.zeros(shape, dtype=dtype, device=device)
        return (None, None, None, None, None, *out)


def _common_factor(upstream: Tensor, scale: Sequence[float]) -> Tensor:
    """(1,) the factor between the announced and the actual weights of the sums."""
    announced = upstream.new_tensor(scale)
    common = (upstream @ announced / (announced @ announced).clamp(min=torch.finfo(announced.dtype).tiny)).view(1)
    if not torch.allclose(upstream, common * announced, rtol=1e-4, atol=0.0, equal_nan=True):
        raise NextLatError(
            f"the loss weighs its terms by {upstream.tolist()}, but scale announced {list(scale)}; "
            "pass the factors that the loss really uses, or scale=None"
        )
    return common
