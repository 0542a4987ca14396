"""Rows of tokens for training: an epoch shows every chunk of a split once, in an order that is a function of a key."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nextlat.batch import Batch
from nextlat.data.shards import ShardedTokens
from nextlat.errors import NextLatError

ROUNDS = 8


class Shuffle:
    """A permutation of ``0 ... size - 1`` that is computed, not stored.

    A Feistel network over pairs ``(left, right)`` with ``left < a``, ``right < b`` and ``a b`` the smallest such
    product not below ``size``: each round adds to one half a hash of the other, which can be undone, so pairs map to
    pairs one to one. A pair beyond ``size`` is mapped again until it falls inside; that keeps the map one to one.

    Args:
        size: how many there are.
        key: numbers that choose the permutation.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._a = math.isqrt(max(size - 1, 0)) + 1
        self._b = -(-size // self._a) or 1
        digest = hashlib.shake_256(repr(key).encode()).digest(8 * ROUNDS)
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, places: ArrayLike) -> NDArray[np.int64]:
        """Where the permutation takes places."""
        found = self._pass(np.array(places, np.int64, ndmin=1))
        while (outside := found >= self.size).any():
            found[outside] = self._pass(found[outside])
        return found

    def _pass(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        left, right = np.divmod(values.astype(np.uint64), np.uint64(self._b))
        for number, key in enumerate(self._keys):
            if number % 2:
                right = (right + _hash(left, key) % np.uint64(self._b)) % np.uint64(self._b)
            else:
                left = (left + _hash(right, key) % np.uint64(self._a)) % np.uint64(self._a)
        return (left * np.uint64(self._b) + right).astype(np.int64)


def _hash(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 on ``values`` xor ``key``."""
    mixed = values ^ key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


class TokenRows:
    """Rows of a split as a function of their global number.

    The split is one stream of tokens, cut every ``length`` of them; a tail that does not fill a row is dropped, and
    rows may begin and stop inside a document. Row ``r`` belongs to epoch ``r // rows_per_epoch``, whose order depends
    on the seed and the epoch alone. So resuming needs a row number, and ranks and micro-batches ask for their rows.

    Args:
        shards: where the tokens are.
        split: which of them.
        length: T.
        seed: of the order; ``None`` leaves the chunks in the order of the files, as evaluation reads them.

    Raises:
        NextLatError: an unknown split, rows shorter than 2, or longer than the split.
    """

    def __init__(self, shards: ShardedTokens, split: str, length: int, seed: int | None) -> None:
        if length < 2:
            raise NextLatError(f"length is {length}; a row needs at least 2 tokens")
        tokens = shards.tokens(split)
        if tokens < length:
            raise NextLatError(f"split {split!r} of {shards.folder} has {tokens} tokens, fewer than a row of {length}")
        self.shards, self.split, self.length, self.seed = shards, split, length, seed
        self.rows_per_epoch: int = tokens // length
        """Chunks of the split."""

    def chunks(self, first_row: int, last_row: int) -> NDArray[np.int64]:
        """Which chunk each of the global rows ``first_row ... last_row - 1`` is."""
        if not 0 <= first_row <= last_row:
            raise NextLatError(
                f"rows {first_row} to {last_row} were asked for; the first must be 0 or more, and not after"
            )
        epochs, places = np.divmod(np.arange(first_row, last_row, dtype=np.int64), self.rows_per_epoch)
        if self.seed is None:
            return places
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = Shuffle(self.rows_per_epoch, self.seed, epoch)(places[here])
        return found

    def batch(self, first_row: int, last_row: int) -> Batch:
        """The global rows ``first_row ... last_row - 1``; they may span epochs.

        The end token opens a document and is the target of the last token of the one before, so every target is the
        next token of the stream, also in the last column; after the whole split it is the end token.

        Returns:
            ``tokens``, ``targets`` and ``documents`` (B, T), documents numbered from 0 in each row; ``keys`` (B,)
            are the global rows.
        """
        begins = self.chunks(first_row, last_row) * self.length
        stream = torch.from_numpy(self.shards.read(self.split, begins, self.length + 1))  # (B, T + 1)
        tokens = stream[:, :-1].contiguous()
        opens = tokens == self.shards.end_token
        opens[:, :1] = False  # a row that begins with a document has no boundary there
        return Batch(tokens, stream[:, 1:].contiguous(), opens.cumsum(1), torch.arange(first_row, last_row))
