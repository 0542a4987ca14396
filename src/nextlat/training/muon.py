"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024), beside AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nextlat.objectives import Objective

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
Scale = Literal["original", "match_rms_adamw"]


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, n) with the singular vectors of ``matrix`` and singular values near 1: five Newton-Schulz steps.

    Args:
        matrix: (m, n).
        dtype: what the steps are computed in.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def rate_factor(shape: torch.Size, scale: Scale) -> float:
    """What the learning rate of an (rows, columns) matrix is multiplied with.

    ``original``: sqrt(max(1, rows / columns)). ``match_rms_adamw``: 0.2 sqrt(max(rows, columns)), which gives the
    update the root mean square of AdamW's, so that a rate and a decay tuned for AdamW carry over.
    """
    rows, columns = shape
    return math.sqrt(max(1.0, rows / columns)) if scale == "original" else 0.2 * math.sqrt(max(rows, columns))


class Muon(torch.optim.Optimizer):
    """Nesterov momentum 0.95, orthogonalised, with decoupled decay.

    ``torch.optim.Muon`` does the same, always in bf16; a CPU emulates that at a third of the speed, so here the steps
    are in fp32 there.

    Args:
        parameters: matrices, strictly two-dimensional.
        lr: learning rate, before :func:`rate_factor`.
        weight_decay: decoupled decay.
        scale: see :func:`rate_factor`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, scale: Scale) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "scale": scale})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                direction = p.grad.lerp(momentum, MOMENTUM)
                update = orthogonalized(direction, torch.bfloat16 if p.is_cuda else torch.float32)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * rate_factor(p.shape, group["scale"]))


class Together:
    """Several optimisers that are stepped, saved and loaded as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """One update of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for optimizer, one in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(one)


def split(objective: Objective) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters, as matrices for Muon and the others.

    Muon takes strictly two-dimensional weights: those of blocks, further heads, latent dynamics, Fetch and text
    head. Embedding table and output head, whose rows are tokens, gains and the bias table of Fetch go to AdamW.
    """
    tables = {id(objective.model.embedding_weight), id(objective.model.head_weight)}
    parameters = [p for p in objective.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in parameters if id(p) not in chosen]
