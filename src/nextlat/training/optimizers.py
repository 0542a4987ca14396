"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from nextlat.config import TrainingConfig
from nextlat.objectives import Objective
from nextlat.training.muon import Muon, Together, split

BETAS = (0.9, 0.95)
EPS = 1e-8


def make_optimizer(module: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer | Together:
    """The configured optimiser of a module's trained parameters.

    ``adamw`` decays every tensor of two or more dimensions and no other. ``muon`` takes an objective, gives its
    matrices to Muon and the rest to AdamW without decay.
    """
    if training.optimizer == "muon":
        matrices, others = split(cast(Objective, module))
        return Together(
            Muon(matrices, training.learning_rate, training.weight_decay, training.muon_scale),
            _adamw([{"params": others, "weight_decay": 0.0}], training),
        )
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return _adamw(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        training,
    )


def _adamw(groups: list[dict[str, object]], training: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=BETAS, eps=EPS, fused=True)


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Learning rate of update ``step`` = 0 ... steps - 1.

    All schedules warm up by ``lr (s + 1) / w`` for ``s < w``. Then ``constant`` stays, ``cosine`` falls to
    ``min_lr_ratio`` over ``decay_steps``, or over the rest, and stays there if the run goes on for longer, and ``wsd``
    stays until the last ``decay_steps`` and falls linearly.
    """
    peak, steps, warmup, least = training.learning_rate, training.steps, training.warmup_steps, training.min_lr_ratio
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.schedule == "cosine":
        phase = min((step - warmup) / (training.decay_steps or steps - warmup), 1.0)
        return peak * (least + (1 - least) * (1 + math.cos(math.pi * phase)) / 2)
    if training.schedule == "wsd" and step >= steps - training.decay_steps:
        return peak * max((steps - step) / training.decay_steps, least)
    return peak
