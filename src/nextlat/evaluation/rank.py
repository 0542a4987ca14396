"""How many directions the states use."""

from __future__ import annotations

import torch
from torch import Tensor

from nextlat.evaluation.subject import Subject
from nextlat.statistics import Metric


def effective_rank(states: Tensor) -> float:
    """``exp(entropy of the normalised singular values)`` of an (n, D) matrix, as given (not centred)."""
    singular = torch.linalg.svdvals(states.double())
    share = singular[singular > 1e-12 * singular.max()]  # what is smaller is rounding
    share = share / share.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def participation_ratio(states: Tensor) -> float:
    """``(sum e)^2 / sum e^2`` over the eigenvalues e of the covariance of (n, D) states."""
    eigen = torch.linalg.svdvals((states - states.mean(0)).double()).square()
    return float(eigen.sum().square() / eigen.square().sum())


def held_out_states(subject: Subject) -> Tensor:
    """(n, D) states the output head reads, fp32, of all held-out positions that are not padding; on the CPU."""
    states = []
    for batch in subject.batches():
        hidden = subject.lm(batch.tokens, batch.documents).hidden.float()
        states.append((hidden.flatten(0, 1) if batch.documents is None else hidden[batch.documents >= 0]).cpu())
    return torch.cat(states)


@torch.no_grad()
def rank(subject: Subject) -> dict[str, Metric]:
    """Effective rank of the states the output head reads, raw and centred, and their participation ratio."""
    h = held_out_states(subject)  # (n, D)
    return {
        "effective_rank": Metric(effective_rank(h), n=len(h)),
        "effective_rank_centred": Metric(effective_rank(h - h.mean(0)), n=len(h)),
        "participation_ratio": Metric(participation_ratio(h), n=len(h)),
        "width": Metric(float(h.shape[1])),
    }
