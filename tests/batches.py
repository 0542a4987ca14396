"""Random batches of packed documents for tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from nextlat.batch import IGNORE, Batch
from tests.oracles.nextlat import Rows


def as_rows(batch: Batch) -> Rows:
    """A batch as nested lists."""
    documents = None if batch.documents is None else batch.documents.tolist()
    return Rows(batch.tokens.tolist(), batch.targets.tolist(), documents)


def document_ids(length: int) -> st.SearchStrategy[list[int]]:
    """``length`` ids in blocks: few documents, some of one token, ids that come back, padding anywhere."""
    block = st.tuples(st.sampled_from([0, 0, 1, 1, 2, -1, -2]), st.integers(1, max(1, length)))

    def lay_out(blocks: list[tuple[int, int]]) -> list[int]:
        ids = [name for name, size in blocks for _ in range(size)]
        return (ids + [blocks[-1][0]] * length)[:length]

    return st.lists(block, min_size=1, max_size=4).map(lay_out)


@st.composite
def packed_batches(draw: st.DrawFn, vocabulary: int = 5, max_rows: int = 2, max_length: int = 8) -> Batch:
    """Batches with documents, prompts and padding; padding may carry targets, which must be ignored."""
    rows, length = draw(st.integers(1, max_rows)), draw(st.integers(1, max_length))

    def table(cell: st.SearchStrategy[int]) -> Tensor:
        row = st.lists(cell, min_size=length, max_size=length)
        return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))

    documents = torch.tensor([draw(document_ids(length)) for _ in range(rows)]) if draw(st.booleans()) else None
    asked = st.one_of(st.just(IGNORE), st.integers(0, vocabulary - 1), st.integers(0, vocabulary - 1))
    return Batch(table(st.integers(0, vocabulary - 1)), table(asked), documents)


def random_batch(seed: int, rows: int, length: int, vocabulary: int, packed: bool = True) -> Batch:
    """A batch of uneven documents with prompts and, when packed, padding at the end of some rows."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (rows, length), generator=g)
    targets = torch.randint(vocabulary, (rows, length), generator=g)
    targets[torch.rand(rows, length, generator=g) < 0.3] = IGNORE
    if not packed:
        return Batch(tokens, targets)
    documents = (torch.rand(rows, length, generator=g) < 0.3).cumsum(1)
    for row in range(0, rows, 2):
        pad = int(torch.randint(1, 3, (), generator=g))
        documents[row, length - pad :] = -1
        targets[row, length - pad :] = IGNORE
    return Batch(tokens, targets, documents)
