"""Matrix products of training, on a CPU by whichever of torch's two libraries is faster there."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LEAST = 2**24
"""Multiply-adds of a product, below which calling oneDNN takes as long as it saves."""


@lru_cache(maxsize=1)
def onednn_pays() -> bool:
    """Whether oneDNN multiplies faster than the library behind ``torch.mm``: so it was where there is AVX-512.

    It is not found out by timing: a run that is resumed shall go on exactly as it would have. The operator is a private
    one of torch and may go; then nothing changes but the time.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and onednn_works()


def onednn_works() -> bool:
    """Whether this build of torch has the operator."""
    u = torch.linspace(-1, 1, 12).view(3, 4)
    try:
        with torch.no_grad():
            made = _by_onednn(u, u.flip(0))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(torch.allclose(made, u @ u.flip(0).T, atol=1e-5))


def product(u: Tensor, weight: Tensor) -> Tensor:
    """(N, D') of (N, D) and a (D', D) matrix: ``u @ weight.T``, without gradients."""
    return _by_onednn(u, weight) if other_library(u, weight) else u @ weight.T


def add_product(total: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """``total + u @ weight.T``, made in ``total``."""
    if other_library(u, weight):
        return total.add_(_by_onednn(u, weight))
    return total.addmm_(u, weight.T)


def other_library(u: Tensor, weight: Tensor) -> bool:
    """Whether :func:`product` takes oneDNN."""
    large = u.shape[0] * weight.numel() >= LEAST
    return large and u.dtype is torch.float32 and u.is_cpu and onednn_pays()


def _by_onednn(u: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(u, weight, None, "none", [], "")
    return out


def linear(u: Tensor, weight: Tensor) -> Tensor:
    """(..., D') of (..., D) and a (D', D) matrix, with gradients; in fp32 or fp64 on a CPU."""
    return _Linear.apply(u, weight)  # type: ignore[no-untyped-call, no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor) -> Tensor:
        flat = u.reshape(-1, u.shape[-1])
        ctx.save_for_backward(flat, weight)
        return product(flat, weight).view(*u.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
        flat, weight = ctx.saved_tensors
        g = upstream.reshape(-1, upstream.shape[-1])
        d_u = product(g, weight.T).view(*upstream.shape[:-1], flat.shape[-1])
        return d_u, g.T @ flat if ctx.needs_input_grad[1] else None
