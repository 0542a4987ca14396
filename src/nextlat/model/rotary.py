"""Rotary position embedding, entry j of a head paired with entry j + half of its width, as in Llama."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROPE_BASE = 10_000.0

Angles = tuple[Tensor, ...]
"""Cosines and signed sines of :func:`rotary_angles`, or the turns of :func:`rotary_turns` alone."""


def _angles(positions: Tensor, n_heads: int, head_width: int) -> Tensor:
    """(..., n_heads, head_width / 2) fp32, the same for every head.

    They are laid out for all heads: a product over contiguous memory is twice as fast on a CPU as one that
    broadcasts over heads.
    """
    rate = ROPE_BASE ** (-torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width)
    angle = positions[..., None, None].float() * rate
    return angle.expand(*positions.shape, n_heads, head_width // 2)


def rotary_angles(positions: Tensor, n_heads: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for :func:`rotate`.

    Args:
        positions: (T,) or (B, T) integer positions.
        n_heads: number of heads.
        head_width: even width of a head.

    Returns:
        two (T, n_heads, head_width) or (B, T, n_heads, head_width) fp32 tensors.
    """
    angle = _angles(positions, n_heads, head_width)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotary_turns(positions: Tensor, n_heads: int, head_width: int) -> tuple[Tensor]:
    """The same rotations as complex numbers, (..., n_heads, head_width / 2)."""
    angle = _angles(positions, n_heads, head_width)
    return (torch.complex(angle.cos(), angle.sin()),)


def rotate(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, n_heads, head_width)."""
    return torch.addcmul(u * cos, u.roll(u.shape[-1] // 2, -1), sin).to(u.dtype)


def rotated(projection: nn.Module, u: Tensor, n_heads: int, angles: Angles) -> Tensor:
    """Project (B, T, D) states into heads and rotate them, (B, T, n_heads, head_width).

    With complex turns the entries of a head come out in the order of :func:`turned`.
    """
    if len(angles) == 2:
        return rotate(projection(u).unflatten(-1, (n_heads, -1)), *angles)
    (turn,) = angles
    return turned(projection(u).unflatten(-1, (n_heads, 2, -1)).transpose(-1, -2).flatten(-3), turn)


def turned(made: Tensor, turn: Tensor) -> Tensor:
    """Rotate (B, T, D) projections of :func:`neighbours`, (B, T, n_heads, head_width).

    The entries of a head come as (0, half, 1, half + 1, ...): one product of complex numbers then does in a third of
    the time what two products, a sum and a shifted copy do. Scores do not depend on the order of entries, as long as
    queries and keys share it.
    """
    pairs = made.view(*made.shape[:-1], *turn.shape[-2:], 2)
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)


def neighbours(weight: Tensor, n_heads: int) -> Tensor:
    """The rows of a (D, D) projection in an order that makes neighbours of what is rotated together.

    It is cheaper to reorder them than what they make.
    """
    half = weight.shape[0] // n_heads // 2
    return weight.view(n_heads, 2, half, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
