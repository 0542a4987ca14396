"""Brute force for the belief state transformer: one document, one prefix and one suffix at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.oracles.mtp import Stack
from tests.oracles.nextlat import Reference, Rows, log_probabilities
from tests.oracles.trunk import rms_norm, trunk_states


class Document(NamedTuple):
    """One real document of a row."""

    row: int
    start: int
    tokens: list[int]
    targets: list[int]


class Pair(NamedTuple):
    """A prefix up to t and a suffix from s in row b, with what they predict."""

    b: int
    t: int
    s: int
    next: int
    prev: int


def documents_of(rows: Rows) -> list[Document]:
    """The row cut at each change of id, padding thrown away."""
    found = []
    for b, tokens in enumerate(rows.tokens):
        ids = rows.documents[b] if rows.documents is not None else [0] * len(tokens)
        start = 0
        for stop in range(1, len(tokens) + 1):
            if stop == len(tokens) or ids[stop] != ids[start]:
                if ids[start] >= 0:
                    found.append(Document(b, start, tokens[start:stop], rows.targets[b][start:stop]))
                start = stop
    return found


def suffix_row(document: Document, end_token: int) -> list[int]:
    """Tokens that a suffix may start with: u_{a+1} ... u_last."""
    closed = document.targets[-1] == end_token
    return document.tokens[1:] + ([end_token] if closed else [])


def pairs_of(
    rows: Rows, end_token: int, min_gap: int = 1, max_gap: int | None = None, gap_one: str = "eos"
) -> list[Pair]:
    """All valid pairs, in row order."""
    found = []
    for document in documents_of(rows):
        a, length = document.start, len(document.tokens)
        last = len(suffix_row(document, end_token))
        for t in range(length):
            for s in range(t + 1, last + 1):
                gap = s - t
                if document.targets[t] == -100 or gap < min_gap or (max_gap is not None and gap > max_gap):
                    continue
                following, previous = document.targets[t], document.tokens[s - 1]
                if gap == 1 and gap_one == "eos":
                    following = previous = end_token
                found.append(Pair(document.row, a + t, a + s, following, previous))
    return found


def backward_states(objective: nn.Module, document: Document, end_token: int) -> dict[int, Tensor]:
    """State of the suffix that starts at row position s, read from the document's end."""
    networks, model = objective.networks, objective.model
    encoder = networks.backward_encoder
    stack = Stack(model.embed_tokens, list(encoder.layers), encoder.norm, model.n_heads)
    read = suffix_row(document, end_token)
    if not read:
        return {}
    states = trunk_states(stack, read[::-1], None)
    return {document.start + 1 + k: states[len(read) - 1 - k] for k in range(len(read))}


def text_head(objective: nn.Module, f: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two states of a pair."""
    head = objective.networks.text_head
    q = torch.cat([f, b])
    gate = head.mlp.gate_proj.weight @ q
    inner = gate / (1 + torch.exp(-gate)) * (head.mlp.up_proj.weight @ q)
    out = rms_norm(q + head.mlp.down_proj.weight @ inner, head.norm.weight)
    return out[: len(f)], out[len(f) :]


def bst_terms(objective: nn.Module, rows: Rows, end_token: int, pairs: list[Pair]) -> dict[str, Reference]:
    """The sum over pairs and twice their number; ``next`` and ``prev`` are its halves."""
    model = objective.model
    forward: dict[tuple[int, int], Tensor] = {}
    backward: dict[tuple[int, int], Tensor] = {}
    for document in documents_of(rows):
        for k, state in enumerate(trunk_states(model, document.tokens, None)):
            forward[document.row, document.start + k] = state
        for s, state in backward_states(objective, document, end_token).items():
            backward[document.row, s] = state
    halves = [torch.zeros((), dtype=model.lm_head.weight.dtype) for _ in range(2)]
    for pair in pairs:
        states = text_head(objective, forward[pair.b, pair.t], backward[pair.b, pair.s])
        for half, (state, target) in enumerate(zip(states, (pair.next, pair.prev), strict=True)):
            halves[half] = halves[half] - log_probabilities(model.lm_head.weight @ state)[target]
    return {
        "pair": Reference(halves[0] + halves[1], 2 * len(pairs)),
        "next": Reference(halves[0], len(pairs)),
        "prev": Reference(halves[1], len(pairs)),
    }
