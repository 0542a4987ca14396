"""What frequencies alone make of a token: unigrams, and pairs of tokens k places apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextlat.batch import Batch

if TYPE_CHECKING:
    from nextlat.evaluation.probes import Pairs

MOST_PAIRS = 2**22
"""Different pairs of each offset that are counted; a table that has so many gets no more. Vocabularies of up to 2,048
tokens never get there."""
WAITING = 2**21
"""Pairs of an offset that are kept before they are counted."""


class Skipgrams:
    """Counts of tokens and of pairs of tokens k places apart.

    A pair is smoothed by Witten and Bell's rule: after a token with n pairs to d different others, weight
    ``d / (n + d)`` goes to the unigram, which has one added to every count. No parameter is chosen.

    Args:
        vocab_size: V.
        offsets: K; k runs from 1 to K.
    """

    def __init__(self, vocab_size: int, offsets: int) -> None:
        self.vocab_size = vocab_size
        self._waiting: list[list[Tensor]] = [[] for _ in range(offsets)]
        nothing = torch.zeros(0, dtype=torch.int64)
        self._counted = [(nothing, nothing) for _ in range(offsets)]
        """Sorted pairs and how often each was seen."""
        self._tables: dict[int, tuple[Tensor, ...]] = {}
        self._unigram = torch.zeros(vocab_size, dtype=torch.int64)

    def add(self, batch: Batch, found: Sequence[Pairs]) -> None:
        """Count the pairs of a batch, one entry of ``found`` for each offset."""
        tokens = batch.tokens.flatten()
        self._unigram += torch.bincount(found[0].target.cpu(), minlength=self.vocab_size)
        for place, pairs in enumerate(found):
            if len(self._counted[place][0]) < MOST_PAIRS:
                self._waiting[place].append((tokens[pairs.source] * self.vocab_size + pairs.target).cpu())
                if sum(map(len, self._waiting[place])) >= WAITING:
                    self._count(place)
        self._tables.clear()

    def _count(self, place: int) -> None:
        """Move what waits into the counts."""
        keys, counts = self._counted[place]
        waiting = torch.cat([keys[:0], *self._waiting[place]])
        weights = torch.cat([counts, torch.ones_like(waiting)])
        merged, where = torch.cat([keys, waiting]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        self._counted[place] = merged, torch.zeros_like(merged).index_add_(0, where, weights)
        self._waiting[place] = []

    def unigram(self, targets: Tensor) -> Tensor:
        """(n,) ``-log p(y)`` by frequency, on the CPU."""
        return -self._log_unigram()[targets.cpu()]

    def bigram(self, offset: int, before: Tensor, targets: Tensor) -> Tensor:
        """(n,) ``-log p(y at k | x)`` for tokens x ``before`` and y, on the CPU."""
        keys, counts, total, different = self._table(offset)
        x, y = before.cpu(), targets.cpu()
        wanted = x * self.vocab_size + y
        place = torch.searchsorted(keys, wanted).clamp(max=max(len(keys) - 1, 0))
        seen = torch.where(keys[place] == wanted, counts[place], 0).double()
        n, d = total[x].double(), different[x].double()
        unigram = self._log_unigram()[y].exp()
        known = n > 0
        mixed = (seen + d * unigram) / (n + d).clamp(min=1)
        return -torch.where(known, mixed, unigram).log()

    def _log_unigram(self) -> Tensor:
        counts = self._unigram.double() + 1
        return (counts / counts.sum()).log()

    def _table(self, offset: int) -> tuple[Tensor, ...]:
        """Sorted pairs and their counts; of each token its pairs and how many different ones."""
        if offset not in self._tables:
            self._count(offset - 1)
            keys, counts = self._counted[offset - 1]
            first = keys // self.vocab_size
            total = torch.zeros(self.vocab_size, dtype=torch.int64).index_add_(0, first, counts)
            different = torch.bincount(first, minlength=self.vocab_size)
            self._tables[offset] = (keys, counts, total, different)
        return self._tables[offset]
