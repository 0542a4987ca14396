"""The losses written out: loops over row, source and step, one state at a time, as in arXiv 2511.05963.

Slow on purpose and independent of the library's own losses, so that agreement means something.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nextlat.conformance.cases import IGNORE, Case
from nextlat.conformance.contract import Sum, Terms

Pair = tuple[int, int]
"""(row, source)."""


def transition_pairs(case: Case, steps: int) -> list[Pair]:
    """A_i: sources from which ``steps`` steps stay in one real document; ``steps`` = 0 gives the real positions."""
    ids = None if case.documents is None else case.documents.tolist()
    rows, length = case.tokens.shape
    pairs = []
    for b in range(rows):
        for t in range(length - steps):
            line = [0] * length if ids is None else ids[b]
            if line[t] >= 0 and all(line[s] == line[t] for s in range(t, t + steps + 1)):
                pairs.append((b, t))
    return pairs


def token_pairs(case: Case, steps: int) -> list[Pair]:
    """C_i: transitions that end where a target is asked for."""
    targets = case.targets.tolist()
    return [(b, t) for b, t in transition_pairs(case, steps) if targets[b][t + steps] != IGNORE]


def log_softmax(logits: Tensor) -> Tensor:
    """Of (V,) logits."""
    top = logits.detach().max()
    return logits - top - torch.log(torch.exp(logits - top).sum())


def cross_entropy(state: Tensor, head: Tensor, target: int) -> Tensor:
    """``-log softmax(W s)[target]`` of one state (D,)."""
    return -log_softmax((head * state).sum(-1))[target]


def kl(teacher: Tensor, student: Tensor, head: Tensor) -> Tensor:
    """``KL(softmax(W h) || softmax(W s))`` of two states (D,)."""
    p, q = (log_softmax((head * state).sum(-1)) for state in (teacher, student))
    return sum((torch.exp(p[v]) * (p[v] - q[v]) for v in range(len(p))), torch.zeros((), dtype=p.dtype))


def smooth_l1(residual: Tensor) -> Tensor:
    """``r^2 / 2`` below 1, ``|r| - 1/2`` above, of one residual."""
    return residual * residual / 2 if abs(residual.item()) < 1 else residual.abs() - 0.5


def losses(case: Case, horizon: int, dynamics: Callable[[Tensor, Tensor], Tensor]) -> Terms:
    """All terms, with the stops of the method: target state, teacher, and the head under the predicted state."""
    hidden, embedding, head, tokens, targets, _ = case
    zero = 0.0 * (hidden.sum() + embedding.sum() + head.sum())
    total = zero
    for b, t in token_pairs(case, 0):
        total = total + cross_entropy(hidden[b, t], head, int(targets[b, t]))
    terms = {"ce": Sum(total, len(token_pairs(case, 0)))}
    for step in range(1, horizon + 1):
        latent, divergence = zero, zero
        allowed, asked = transition_pairs(case, step), token_pairs(case, step)
        for b, t in allowed:
            state = hidden[b, t]
            for s in range(t + 1, t + step + 1):
                state = dynamics(state, embedding[tokens[b, s]])
            goal = hidden[b, t + step].detach()
            for j in range(len(goal)):
                latent = latent + smooth_l1(state[j] - goal[j])
            if (b, t) in asked:
                divergence = divergence + kl(goal, state, head.detach())
        terms[f"latent_{step}"] = Sum(latent, len(allowed) * hidden.shape[-1])
        terms[f"kl_{step}"] = Sum(divergence, len(asked))
    return terms


def head_terms(states: Tensor, case: Case) -> Terms:
    """Cross-entropy of slot i on the target i positions ahead; slot 0 is ``ce``."""
    terms = {}
    for step in range(len(states)):
        pairs = token_pairs(case, step)
        total = 0.0 * (states.sum() + case.head.sum())
        for b, t in pairs:
            total = total + cross_entropy(states[step, b, t], case.head, int(case.targets[b, t + step]))
        terms[f"mtp_{step}" if step else "ce"] = Sum(total, len(pairs))
    return terms


def dynamics(
    state: Tensor, embedding: Tensor, gain: Tensor, layer_1: Tensor, layer_2: Tensor, layer_3: Tensor
) -> Tensor:
    """``s + L3 gelu(L2 gelu(L1 RMSNorm([e ; s])))`` of one state (D,), matrices as (out, in)."""
    joint = torch.cat([embedding, state])
    u = gain * joint / torch.sqrt((joint * joint).mean() + 1e-5)
    for matrix in (layer_1, layer_2):
        u = (matrix * u).sum(-1)
        u = u * (1 + torch.erf(u / math.sqrt(2))) / 2
    return state + (layer_3 * u).sum(-1)
