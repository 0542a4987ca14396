"""Root-mean-square norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class _RMSNorm(torch.autograd.Function):
    """The same in half the time on a CPU, where torch has no fused kernel.

    With ``r = 1 / sqrt(mean(u^2) + eps)`` the gradient of the input is ``r (g w - u r^2 mean(g w u))``.
    """

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
        product = g * flat
        pull = (product @ gain)[:, None] * rate.square() / -flat.shape[-1]
        d_gain = rate[:, 0] @ product  # a matrix-vector product is faster than a sum over rows
        return torch.addcmul(g * gain, flat, pull).mul_(rate).view_as(upstream), d_gain
