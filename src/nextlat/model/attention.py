"""Causal attention that never looks across a document boundary and never builds a T x T mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_GROWTH = 1.25
"""Documents whose lengths differ by less than this factor share one attention call."""


def run_index(documents: Tensor) -> Tensor:
    """Number of boundaries at or before each position.

    Args:
        documents: (B, T) document ids. Each change of id starts a new run, so an id that returns later
            in the row names a new document.

    Returns:
        (B, T) int64, constant inside a document, growing at each boundary.
    """
    change = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)
    return change.cumsum(1)


class Group(NamedTuple):
    """Documents of similar length that are attended in one call."""

    source: Tensor
    """(n, L) flat positions in the (B * T) row-major order; a short document repeats its last one."""
    valid: Tensor | None
    """(n, L) bool, False on the repeats; ``None`` when every document has length L."""


class Layout(NamedTuple):
    """Where the documents of a batch lie: made once per batch, used by every layer."""

    positions: Tensor
    """(B, T) int64 position inside the document."""
    groups: tuple[Group, ...]
    """All documents, by length."""
    order: Tensor
    """(B * T,) where each flat position stands in the concatenation of all groups' valid outputs."""


def document_layout(documents: Tensor) -> Layout:
    """Group the documents of a batch by length.

    Causal attention inside a document needs no mask: padding a document at its end changes nothing
    before it. So documents of similar length are stacked and attended with ``is_causal``; work is
    proportional to the sum of squared document lengths instead of T squared.
    """
    rows, length = documents.shape
    device = documents.device
    first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
    starts = first.nonzero().squeeze(1)  # (documents,)
    ends = torch.cat([starts[1:], starts.new_tensor([rows * length])])
    lengths = ends - starts
    flat = torch.arange(rows * length, device=device)
    positions = flat - starts.repeat_interleave(lengths)

    by_length = lengths.argsort(descending=True, stable=True)
    sizes = lengths[by_length].tolist()
    groups: list[Group] = []
    pieces: list[Tensor] = []
    begin = 0
    while begin < len(sizes):
        longest = sizes[begin]
        stop = begin
        while stop < len(sizes) and sizes[stop] * _GROWTH >= longest:
            stop += 1
        chosen = by_length[begin:stop]
        offsets = torch.arange(longest, device=device)
        valid = offsets < lengths[chosen, None]
        source = starts[chosen, None] + torch.minimum(offsets, lengths[chosen, None] - 1)
        even = sizes[stop - 1] == longest
        groups.append(Group(source, None if even else valid))
        pieces.append(source[valid])
        begin = stop
    order = torch.empty_like(flat)
    order[torch.cat(pieces)] = flat
    return Layout(positions.view(rows, length), tuple(groups), order)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: (B, T, n_heads, head_width) rotated queries.
        k: (B, S, n_heads, head_width) rotated keys, S = T unless a cache or a mask is used.
        v: (B, S, n_heads, head_width) values.
        layout: documents of the batch; ``None`` means one document a row.
        mask: (T, S) or (B, 1, T, S) bool, True where a query may look; replaces the causal rule.

    Returns:
        (B, T, n_heads * head_width).
    """
    if layout is None:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return mixed.transpose(1, 2).flatten(2)
    rows, length = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    pieces = []
    for source, valid in layout.groups:
        a, b, c = (x[source].transpose(1, 2) for x in (q, k, v))  # (n, n_heads, L, head_width)
        mixed = F.scaled_dot_product_attention(a, b, c, is_causal=True).transpose(1, 2).flatten(2)
        pieces.append(mixed.flatten(0, 1) if valid is None else mixed[valid])
    return torch.cat(pieces)[layout.order].view(rows, length, -1)
