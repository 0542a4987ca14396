"""Whether the states are alive: their size, their spread, and how well the latent dynamics follows them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nextlat.evaluation.rank import effective_rank, held_out_states
from nextlat.evaluation.rollout import rollout
from nextlat.evaluation.subject import Subject
from nextlat.statistics import Metric

STATES = 2048
"""So many states, evenly spaced over the held-out positions, tell enough."""
LEAST_DEVIATION = 0.05
"""Deviation over RMS below which states hardly depend on what was read."""
LEAST_RANK = 2.0
"""Centred effective rank below which one number would do for the state."""


@torch.no_grad()
def health(subject: Subject) -> dict[str, Metric]:
    """Figures that show a collapse of the states, which a small latent loss alone would hide.

    ``rms`` of the states' entries; ``deviation`` and ``deviation_min``, the mean and the least standard deviation
    of a dimension over positions, over ``rms``; ``effective_rank`` of the centred states; and, with a latent
    dynamics, ``transition_error_k``: see :func:`rollout`.
    """
    h = held_out_states(subject)
    h = h[:: max(1, len(h) // STATES)].double()  # (n, D)
    rms = h.square().mean().sqrt()
    deviation = h.std(0, unbiased=False) / rms.clamp(min=1e-30)
    metrics = {
        "rms": Metric(float(rms), n=len(h)),
        "deviation": Metric(float(deviation.mean()), n=len(h)),
        "deviation_min": Metric(float(deviation.min()), n=len(h)),
        "effective_rank": Metric(effective_rank(h - h.mean(0)), n=len(h)),
    }
    if subject.dynamics is not None:
        followed = rollout(subject)
        metrics |= {name: metric for name, metric in followed.items() if name.startswith("transition_error")}
    return metrics


def collapse(metrics: Mapping[str, Metric]) -> str | None:
    """A sentence that says the states have collapsed, if they have."""
    deviation, rank = (float(metrics[name].value) for name in ("deviation", "effective_rank"))
    if deviation < LEAST_DEVIATION:
        return (
            f"warning: the states are collapsing: they deviate by {deviation:.1%} of their size, and hardly depend on "
            "what was read; lower latent_weight, or check that target states are stopped"
        )
    if rank < LEAST_RANK:
        return (
            f"warning: the states are collapsing: their effective rank is {rank:.2f}; "
            "lower latent_weight, or check that target states are stopped"
        )
    return None
