"""Brute force for gpt and nextlat: plain loops over (row, source, step), written from arXiv 2511.05963.

Nothing here is vectorised over positions and nothing is shared with the library. Autograd over these scalars
gives the reference gradients; the cuts are explicit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
Place = tuple[int, int]


class Rows(NamedTuple):
    """A batch as nested lists."""

    tokens: list[list[int]]
    targets: list[list[int]]
    documents: list[list[int]] | None


class Reference(NamedTuple):
    """The sum and the count of one term."""

    sum: Tensor
    count: int


def same_document(documents: list[int] | None, first: int, last: int) -> bool:
    """No change of id on the way from ``first`` to ``last``, looked at one neighbour after the other."""
    if documents is None:
        return True
    return all(documents[s] == documents[s - 1] for s in range(first + 1, last + 1))


def is_real(documents: list[int] | None, t: int) -> bool:
    """Not padding."""
    return documents is None or documents[t] >= 0


def transition_set(rows: Rows, steps: int) -> list[Place]:
    """A_i: all (b, t) that may be rolled ``steps`` steps."""

    def allowed(b: int, t: int) -> bool:
        documents = None if rows.documents is None else rows.documents[b]
        inside = t + steps < len(rows.tokens[b])
        return inside and is_real(documents, t) and same_document(documents, t, t + steps)

    return [(b, t) for b, row in enumerate(rows.tokens) for t in range(len(row)) if allowed(b, t)]


def token_set(rows: Rows, steps: int) -> list[Place]:
    """C_i: the transitions that end where a target is asked for."""
    return [(b, t) for b, t in transition_set(rows, steps) if rows.targets[b][t + steps] != -100]


def log_probabilities(logits: Tensor) -> list[Tensor]:
    """Log-softmax of (V,) logits, entry by entry."""
    top = max(logits.tolist())
    total = sum((torch.exp(x - top) for x in logits), torch.zeros((), dtype=logits.dtype))
    return [x - top - torch.log(total) for x in logits]


def scores(state: Tensor, head: Tensor) -> Tensor:
    """(V,) logits, one dot product after the other."""
    return torch.stack([(row * state).sum() for row in head])


def smooth_l1(r: Tensor) -> Tensor:
    """rho(r)."""
    return r * r / 2 if abs(r.item()) < 1 else abs(r) - 0.5


def nextlat_reference(
    hidden: Tensor,
    embedding: Tensor,
    head: Tensor,
    rows: Rows,
    step: Step,
    horizon: int,
    *,
    detach_source: bool = False,
    detach_embeddings: bool = False,
    stop_target: bool = True,
    stop_head: bool = True,
) -> dict[str, Reference]:
    """All terms, ``aux_ce_i`` and ``tv_i`` included, as sums and counts."""
    zero = 0.0 * (hidden.sum() + embedding.sum() + head.sum())
    terms: dict[str, Reference] = {}
    total = zero
    for b, t in token_set(rows, 0):
        total = total - log_probabilities(scores(hidden[b, t], head))[rows.targets[b][t]]
    terms["ce"] = Reference(total, len(token_set(rows, 0)))

    student_head = head.detach() if stop_head else head
    for i in range(1, horizon + 1):
        latent, kl, aux, tv = zero, zero, zero, zero
        allowed, asked = transition_set(rows, i), token_set(rows, i)
        for b, t in allowed:
            state = hidden[b, t].detach() if detach_source else hidden[b, t]
            for k in range(1, i + 1):
                e = embedding[rows.tokens[b][t + k]]
                state = step(state, e.detach() if detach_embeddings else e)
            goal = hidden[b, t + i].detach() if stop_target else hidden[b, t + i]
            for j in range(hidden.shape[-1]):
                latent = latent + smooth_l1(state[j] - goal[j])
            if (b, t) in asked:
                teacher = log_probabilities(scores(hidden[b, t + i].detach(), head.detach()))
                student = log_probabilities(scores(state, student_head))
                for p, q in zip(teacher, student, strict=True):
                    kl = kl + torch.exp(p) * (p - q)
                    tv = tv + torch.abs(torch.exp(p) - torch.exp(q)) / 2
                aux = aux - student[rows.targets[b][t + i]]
        terms[f"latent_{i}"] = Reference(latent, len(allowed) * hidden.shape[-1])
        terms[f"kl_{i}"] = Reference(kl, len(asked))
        terms[f"aux_ce_{i}"] = Reference(aux, len(asked))
        terms[f"tv_{i}"] = Reference(tv, len(asked))
    return terms


def dynamics_reference(
    state: Tensor, e: Tensor, gain: Tensor, layer_1: Tensor, layer_2: Tensor, layer_3: Tensor
) -> Tensor:
    """``p(s, e)`` for one state: [e ; s] through RMSNorm and three matrices, GELU by the error function."""
    joint = [*e, *state]
    scale = torch.sqrt(sum(x * x for x in joint) / len(joint) + 1e-5)
    u = [g * x / scale for g, x in zip(gain, joint, strict=True)]
    for matrix in (layer_1, layer_2):
        u = [sum(w * x for w, x in zip(row, u, strict=True)) for row in matrix]
        u = [x * (1 + torch.erf(x / math.sqrt(2))) / 2 for x in u]
    return torch.stack(
        [s + sum(w * x for w, x in zip(row, u, strict=True)) for s, row in zip(state, layer_3, strict=True)]
    )
