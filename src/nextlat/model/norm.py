"""Root-mean-square norm, alone and with the products that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.model.products import add_product, product

EPS = 1e-5


class RMSNorm(nn.Module):
    """``gain * u / sqrt(mean(u^2) + 1e-5)``, computed in fp32 at least."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, u: Tensor) -> Tensor:
        """(..., width) -> (..., width), same dtype."""
        gain: Tensor = self.weight
        if u.is_cpu and u.dtype is gain.dtype and u.dtype.itemsize > 2:
            return _on_cpu(u, gain)  # nothing to convert, which for one token would take as long as the norm
        wide = u if u.dtype is torch.float64 else u.float()
        gain = gain.to(wide.dtype)
        out = _on_cpu(wide, gain) if u.is_cpu else F.rms_norm(wide, gain.shape, gain, EPS)
        return out.to(u.dtype)


def _on_cpu(u: Tensor, gain: Tensor) -> Tensor:
    # without gradients directly: the call of a function of one's own takes longer than a short norm itself
    normed = _RMSNorm.apply if torch.is_grad_enabled() else _normed
    out: Tensor = normed(u, gain)
    return out


def _rate(u: Tensor) -> Tensor:
    """(..., 1) by what the input is multiplied."""
    length = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    rate: Tensor = length.square_().div_(u.shape[-1]).add_(EPS).rsqrt_()
    return rate


def _normed(u: Tensor, gain: Tensor) -> Tensor:
    normed: Tensor = u * _rate(u)
    return normed.mul_(gain)


def _pulled(g: Tensor, u: Tensor, rate: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1) factors of u in the gradient of a norm's input, and (D,) gradient of its gain.

    With ``r = 1 / sqrt(mean(u^2) + eps)`` the former gradient is ``r g w - u r^3 mean(g w u)``.
    """
    product = g * u
    pull = (product @ gain)[:, None].mul_(rate.pow(3)).div_(-u.shape[-1])
    return pull, rate[:, 0] @ product  # a matrix-vector product is faster than a sum over rows


class _RMSNorm(torch.autograd.Function):
    """The same in half the time on a CPU, where torch has no fused kernel."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, gain: Tensor) -> Tensor:
        rate = _rate(u)
        ctx.save_for_backward(u, rate, gain)
        normed: Tensor = u * rate
        return normed.mul_(gain)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        u, rate, gain = ctx.saved_tensors
        flat, rate = u.reshape(-1, u.shape[-1]), rate.reshape(-1, 1)
        g = upstream.reshape(flat.shape)
        pull, d_gain = _pulled(g, flat, rate, gain)
        return (g * gain).mul_(rate).addcmul_(flat, pull).view_as(upstream), d_gain


def normed_products(u: Tensor, gain: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The stream, to go on with, and what matrices make of its norm, in fp32 or fp64 on a CPU.

    The gradients of all that reads the stream are summed by the products that make them and by the norm's own
    backward pass, which saves a pass over memory for each.

    Args:
        u: (..., D) residual stream.
        gain: (D,) of the norm.
        weights: (D', D) each.

    Returns:
        ``u`` and an (..., D') product for each of ``weights``.
    """
    return _NormedProducts.apply(u, gain, *weights)  # type: ignore[no-untyped-call, no-any-return]


class _NormedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, gain: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        flat = u.reshape(-1, u.shape[-1])
        rate = _rate(flat)
        x = (flat * rate).mul_(gain)
        ctx.save_for_backward(flat, rate, gain, x, *weights)
        return u, *(product(x, weight).view(*u.shape[:-1], len(weight)) for weight in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_u: Tensor, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, rate, gain, x, *weights = ctx.saved_tensors
        d_weights: list[Tensor | None] = []
        g = flat  # of the norm's output
        for number, (d_made, weight) in enumerate(zip(upstream, weights, strict=True)):
            d_made = d_made.reshape(-1, d_made.shape[-1])
            d_weights.append(d_made.T @ x if ctx.needs_input_grad[2 + number] else None)
            g = add_product(g, d_made, weight.T) if number else product(d_made, weight.T)
        pull, d_gain = _pulled(g, flat, rate, gain)
        total = torch.addcmul(d_u.reshape(flat.shape), g.mul_(gain), rate).addcmul_(flat, pull)
        return total.view_as(d_u), d_gain, *d_weights
