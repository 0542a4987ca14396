"""Brute force for joint multi-token prediction: one window, one slot and one attention head at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.oracles.mtp import row_states
from tests.oracles.nextlat import Reference, Rows, log_probabilities, token_set
from tests.oracles.trunk import rms_norm


def layer_norm(u: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Mean-subtracting, eps 1e-5."""
    mean = sum(u) / len(u)
    variance = sum((x - mean) ** 2 for x in u) / len(u)
    return gain * (u - mean) / torch.sqrt(variance + 1e-5) + bias


def slot_state(fetch: nn.Module, state: Tensor, embeddings: list[Tensor], slot: int) -> Tensor:
    """What the output head reads for slot ``slot`` of a window whose tokens so far are given."""
    weights = dict(fetch.named_parameters())
    inputs = []
    for e in embeddings[: slot + 1]:
        u = e + weights["gamma"] * state
        norm = "combine_norm"
        if f"{norm}.bias" in weights:
            inputs.append(layer_norm(u, weights[f"{norm}.weight"], weights[f"{norm}.bias"]))
        else:
            inputs.append(rms_norm(u, weights[f"{norm}.weight"]))
    width = len(state) // fetch.heads
    mixed = []
    for n in range(fetch.heads):
        part = slice(n * width, (n + 1) * width)
        query = (weights["q_proj.weight"] @ inputs[slot])[part]
        scores = []
        for other in range(slot + 1):
            key = (weights["k_proj.weight"] @ inputs[other])[part]
            bias = weights["bias"][n, slot - other, 0] if fetch.relative else weights["bias"][n, slot, other]
            scores.append(query @ key / math.sqrt(width) + bias)
        exps = [torch.exp(s) for s in scores]
        values = [(weights["v_proj.weight"] @ a)[part] for a in inputs]
        mixed.append(sum(x / sum(exps) * v for x, v in zip(exps, values, strict=True)))
    out = weights["o_proj.weight"] @ torch.cat(mixed)
    if slot > 0 or fetch.residual_next:
        out = out + state
    return rms_norm(out, weights["norm.weight"])


def jtp_terms(objective: nn.Module, rows: Rows, horizon: int) -> dict[str, Reference]:
    """Sums and counts of ``ce``, ``jtp_1`` ... ``jtp_d``."""
    model = objective.model
    states = row_states(model, rows)
    terms = {}
    for step in range(horizon + 1):
        total = torch.zeros((), dtype=model.lm_head.weight.dtype)
        places = token_set(rows, step)
        for b, t in places:
            window = [model.embed_tokens.weight[rows.tokens[b][t + i]] for i in range(step + 1)]
            state = slot_state(objective.fetch, states[b][t], window, step)
            total = total - log_probabilities(model.lm_head.weight @ state)[rows.targets[b][t + step]]
        terms[f"jtp_{step}" if step else "ce"] = Reference(total, len(places))
    return terms
