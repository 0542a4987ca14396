"""Brute force for parallel multi-token prediction: each head is a whole Llama, one (row, source, step) at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.oracles.nextlat import Reference, Rows, log_probabilities, token_set
from tests.oracles.trunk import trunk_states


class Stack(nn.Module):
    """Some blocks and a norm under the names of a trunk."""

    def __init__(self, embed_tokens: nn.Module, layers: list[nn.Module], norm: nn.Module, n_heads: int) -> None:
        super().__init__()
        self.embed_tokens, self.layers, self.norm, self.n_heads = embed_tokens, nn.ModuleList(layers), norm, n_heads


def head_as_stack(objective: nn.Module, step: int) -> Stack:
    """Shared blocks, then the block and the norm of one head."""
    model = objective.model
    head = objective.heads[step - 1] if step else None
    block, norm = (model.layers[-1], model.norm) if head is None else (head.block, head.norm)
    return Stack(model.embed_tokens, [*list(model.layers)[:-1], block], norm, model.n_heads)


def mtp_terms(objective: nn.Module, rows: Rows, horizon: int) -> dict[str, Reference]:
    """Sums and counts of ``ce``, ``mtp_1`` ... ``mtp_d``."""
    head_weight = objective.model.lm_head.weight
    terms = {}
    for step in range(horizon + 1):
        stack = head_as_stack(objective, step)
        total = torch.zeros((), dtype=head_weight.dtype)
        places = token_set(rows, step)
        states = row_states(stack, rows)
        for b, t in places:
            total = total - log_probabilities(head_weight @ states[b][t])[rows.targets[b][t + step]]
        terms[f"mtp_{step}" if step else "ce"] = Reference(total, len(places))
    return terms


def row_states(stack: nn.Module, rows: Rows) -> list[Tensor]:
    """(T, D) states of each row."""
    documents = rows.documents if rows.documents is not None else [None] * len(rows.tokens)
    return [trunk_states(stack, tokens, ids) for tokens, ids in zip(rows.tokens, documents, strict=True)]
