"""Which pairs of a prefix and a suffix the belief state transformer learns from: from the batch alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model.attention import run_index
from nextlat.objectives.positions import counted

CELLS_AT_ONCE = 2**24
"""How many (row, start, end) combinations are looked at together."""


class Suffixes(NamedTuple):
    """The row that the backward encoder reads, one place to the left: entry p is the first token of suffix p + 1."""

    tokens: Tensor
    """(B, T) int64; the row shifted by one, with the end token behind the last token of a closed document."""
    used: Tensor
    """(B, T) bool, False where an open document has nothing behind its last token."""
    run: Tensor
    """(B, T) int64 number of the document that the suffix belongs to; that of position p."""


def suffixes(batch: Batch, end_token: int) -> Suffixes:
    """The suffixes of every document.

    A document is closed if the target of its last position is the end token. It then has the empty suffix,
    which reads as the end token alone. A truncated document gets no false end.
    """
    documents = batch.documents if batch.documents is not None else torch.zeros_like(batch.tokens)
    run = run_index(documents)
    inside = F.pad(run[:, 1:] == run[:, :-1], (0, 1), value=False)  # t and t + 1 in one document
    following = F.pad(batch.tokens[:, 1:], (0, 1), value=end_token)
    closed = ~inside & (batch.targets == end_token)
    return Suffixes(following.where(inside, end_token), inside | closed, run)


def check_next_token(batch: Batch) -> None:
    """Refuse batches whose targets are not the tokens that follow, such as those of tagging tasks.

    Raises:
        NextLatError: a target that counts differs from the next token of its document.
    """
    following = batch.tokens[:, 1:]
    asked = counted(batch)[:, :-1] & (batch.targets[:, :-1] != following)
    if batch.documents is not None:
        asked &= batch.documents[:, 1:] == batch.documents[:, :-1]
    if asked.any():
        row, t = (int(i) for i in asked.nonzero()[0])
        raise NextLatError(
            f"bst needs targets that are the next tokens, and row {row} has target {int(batch.targets[row, t])} "
            f"at position {t} before token {int(following[row, t])}; train this task with gpt, mtp, jtp or nextlat"
        )


class Pairs(NamedTuple):
    """Chosen pairs of a prefix that ends at t and a suffix that starts at s = p + 1 > t, in row order."""

    row: Tensor
    """(P,) int64."""
    t: Tensor
    """(P,) int64 last position of the prefix."""
    p: Tensor
    """(P,) int64 position before the suffix."""


def sample_pairs(
    batch: Batch, end_token: int, min_gap: int = 1, max_gap: int | None = None, pair_fraction: float = 1.0
) -> Pairs:
    """All valid pairs, or a random part of each row's.

    With a row ``x_0 x_1 x_2 | x_3`` whose first document is closed and whose second is open, and no prompt, the
    pairs (t, s) are (0, 1), (0, 2), (1, 2) and, with the empty suffix, (0, 3), (1, 3) and (2, 3).

    Args:
        batch: (B, T) next-token rows; the random numbers of a row are a function of its entry in ``keys``, t
            and s alone, so that they survive any order of rows, accumulation, sharding and resumption.
        end_token: id of the end token.
        min_gap: least s - t.
        max_gap: greatest s - t, inclusive; ``None`` for no bound.
        pair_fraction: part of a row's pairs that is kept on average. Pairs that touch an end token are kept
            always, the others with what probability is left.
    """
    rows, length = batch.tokens.shape
    if batch.keys is None:
        batch = batch._replace(keys=torch.arange(rows, device=batch.tokens.device))
    at_once = max(1, CELLS_AT_ONCE // max(1, length * length))
    parts = []
    for start in range(0, rows, at_once):
        part = _pairs(batch.rows(start, start + at_once), end_token, min_gap, max_gap, pair_fraction)
        parts.append(part._replace(row=part.row + start))
    return Pairs(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _pairs(batch: Batch, end_token: int, min_gap: int, max_gap: int | None, fraction: float) -> Pairs:
    suffix = suffixes(batch, end_token)
    position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    gap = position + 1 - position[:, None]  # (t, p)
    near = gap >= min_gap if max_gap is None else (gap >= min_gap) & (gap <= max_gap)
    together = suffix.run[:, :, None] == suffix.run[:, None, :]
    valid = near & together & counted(batch)[:, :, None] & suffix.used[:, None, :]  # (B, t, p)
    row, t, p = valid.nonzero(as_tuple=True)
    if fraction == 1.0 or batch.keys is None:
        return Pairs(row, t, p)
    ends = (batch.tokens[row, t] == end_token) | (suffix.tokens[row, p] == end_token)
    everything = torch.bincount(row, minlength=len(batch.tokens)).double()
    forced = torch.bincount(row[ends], minlength=len(batch.tokens)).double()
    # A row that is all end tokens has no other pairs, and the quotient is not looked at.
    probability = ((fraction * everything - forced) / (everything - forced).clamp(min=1)).clamp(0, 1)
    kept = ends | (keyed_uniform(batch.keys[row], t, p) < probability[row])
    return Pairs(row[kept], t[kept], p[kept])


def keyed_uniform(*numbers: Tensor) -> Tensor:
    """Uniform float64 numbers in [0, 1) that are a function of the given int64 numbers alone, on any device."""
    state = torch.zeros_like(numbers[0])
    for number in numbers:
        state = _mixed(state * 0x2545F4914F6CDD1D + number + 1)
    return ((state >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on wrapping int64, where >> copies the sign bit."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
