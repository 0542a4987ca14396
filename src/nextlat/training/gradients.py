"""How the loss terms pull at the model: the size of each one's gradient, and whether it agrees with the others."""

from __future__ import annotations

import torch
from torch import Tensor

from nextlat.batch import Batch
from nextlat.objectives import Objective


def group_of(term: str) -> str:
    """``latent`` of ``latent_3``: the steps of a horizon are one group."""
    kind, _, number = term.rpartition("_")
    return kind if kind and number.isdigit() else term


def gradient_health(objective: Objective, batch: Batch) -> dict[str, float]:
    """Norms of each group's weighted gradient over the plain model, and cosines with the cross-entropy's.

    ``grad_norm.<group>`` and ``cosine.<group>``, where the steps of a horizon are added up with their weights. A
    cosine near -1 means that a group undoes what the cross-entropy does; norms show which one leads. Gradients
    stored in parameters are left alone.

    Args:
        objective: its plain model's parameters are looked at, networks beside it are not.
        batch: (B, T) rows.
    """
    totals: dict[str, Tensor] = {}
    for name, term in objective(batch).items():
        part = term.weight * term.sum / term.count.clamp(min=1)
        totals[group_of(name)] = totals[group_of(name)] + part if group_of(name) in totals else part
    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    gradients = {
        name: torch.cat(
            [
                g.flatten().float()
                for g in torch.autograd.grad(total, parameters, retain_graph=True, materialize_grads=True)
            ]
        )
        for name, total in totals.items()
    }
    norms = {name: gradient.norm() for name, gradient in gradients.items()}
    row = {f"grad_norm.{name}": float(norm) for name, norm in norms.items()}
    if "ce" in gradients:
        for name in gradients.keys() - {"ce"}:
            size = (norms[name] * norms["ce"]).clamp(min=1e-30)
            row[f"cosine.{name}"] = float(gradients[name] @ gradients["ce"] / size)
    return dict(sorted(row.items()))
