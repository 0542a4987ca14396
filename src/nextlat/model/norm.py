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
        wide = u if u.dtype is torch.float64 else u.float()
        gain = self.weight.to(wide.dtype)
        if wide.device.type == "cpu":
            out: Tensor = _RMSNorm.apply(wide, gain)  # type: ignore[no-untyped-call]
        else:
            out = F.rms_norm(wide, gain.shape, gain, EPS)
        return out.to(u.dtype)


class _RMSNorm(torch.autograd.Function):
    """The same in half the time on a CPU, where torch has no fused kernel.

    With ``r = 1 / sqrt(mean(u^2) + eps)`` the gradient of the input is ``r (g w - u r^2 mean(g w u))``.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, gain: Tensor) -> Tensor:
        flat = u.reshape(-1, u.shape[-1])
        length = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
        rate = length.square_().div_(flat.shape[-1]).add_(EPS).rsqrt_()  # (n, 1)
        ctx.save_for_backward(flat, rate, gain)
        normed: Tensor = flat * rate
        return normed.mul_(gain).view_as(u)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        flat, rate, gain = ctx.saved_tensors
        g = upstream.reshape(flat.shape)
        product = g * flat
        pull = (product @ gain)[:, None] * rate.square() / -flat.shape[-1]
        d_gain = rate[:, 0] @ product  # a matrix-vector product is faster than a sum over rows
        return torch.addcmul(g * gain, flat, pull).mul_(rate).view_as(upstream), d_gain
