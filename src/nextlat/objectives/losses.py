"""Losses in fp32 or wider: cross-entropy, KL and total variation to a teacher, SmoothL1. Sums, never means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype is torch.float64 else x.float()


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """``sum of -log softmax(logits)[target]`` over (n, V) logits and (n,) targets, in nats."""
    return F.cross_entropy(wide(logits), targets, reduction="sum")


def kl_sum(teacher: Tensor, student: Tensor) -> Tensor:
    """``sum of KL(teacher || student)`` in nats.

    Args:
        teacher: (n, V) log-probabilities, detached by the caller.
        student: (n, V) logits.
    """
    return F.kl_div(F.log_softmax(wide(student), -1), teacher, reduction="sum", log_target=True)


def total_variation_sum(teacher: Tensor, student: Tensor) -> Tensor:
    """``sum of |softmax(teacher) - softmax(student)| / 2``; arguments as for :func:`kl_sum`."""
    return (teacher.exp() - F.softmax(wide(student), -1)).abs().sum() / 2


def smooth_l1_sum(predicted: Tensor, target: Tensor) -> Tensor:
    """``sum of rho(predicted - target)`` with rho(r) = r^2 / 2 inside |r| < 1, |r| - 1/2 outside."""
    return F.smooth_l1_loss(wide(predicted), wide(target), reduction="sum", beta=1.0)
