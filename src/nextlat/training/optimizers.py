"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from nextlat.config import TrainingConfig

BETAS = (0.9, 0.95)
EPS = 1e-8


def make_optimizer(module: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with decoupled decay on every tensor of two or more dimensions and none on the others."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=BETAS, eps=EPS, fused=True)


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Learning rate of update ``step`` = 0 ... steps - 1.

    All schedules warm up by ``lr (s + 1) / w`` for ``s < w``. Then ``constant`` stays, ``cosine`` falls to
    ``min_lr_ratio`` over the rest, and ``wsd`` stays until the last ``decay_steps`` and falls linearly.
    """
    peak, steps, warmup, least = training.learning_rate, training.steps, training.warmup_steps, training.min_lr_ratio
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.schedule == "cosine":
        phase = (step - warmup) / (steps - warmup)
        return peak * (least + (1 - least) * (1 + math.cos(math.pi * phase)) / 2)
    if training.schedule == "wsd" and step >= steps - training.decay_steps:
        return peak * max((steps - step) / training.decay_steps, least)
    return peak
