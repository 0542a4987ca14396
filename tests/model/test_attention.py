"""Attention over packed documents against a mask written out position by position."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextlat.model.attention import attend, document_layout, run_index
from tests.batches import document_ids
from tests.oracles.trunk import attention, document_positions


@st.composite
def packed_documents(draw: st.DrawFn) -> Tensor:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    return torch.tensor([draw(document_ids(length)) for _ in range(rows)])


def queries_keys_values(rows: int, length: int, n_heads: int = 2, head_width: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows * 1000 + length)
    shape = (rows, length, n_heads, head_width)
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]


@given(packed_documents())
def test_packed_attention_equals_a_dense_mask(documents: Tensor) -> None:
    q, k, v = queries_keys_values(*documents.shape)
    mixed = attend(q, k, v, document_layout(documents))
    for row, ids in enumerate(documents.tolist()):
        expected = attention(q[row], k[row], v[row], ids).flatten(1)
        torch.testing.assert_close(mixed[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_packed_attention_has_the_gradients_of_a_dense_mask(seed: int) -> None:
    # lengths are ragged enough that some documents are stacked with repeated positions
    documents = (torch.rand(2, 40, generator=torch.Generator().manual_seed(seed)) < 0.12).cumsum(1)
    assert any(group.valid is not None for group in document_layout(documents).groups)
    q, k, v = queries_keys_values(2, 40)
    upstream = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = torch.autograd.grad((attend(q, k, v, document_layout(documents)) * upstream).sum(), (q, k, v))

    boundaries = F.pad((documents[:, 1:] != documents[:, :-1]).long(), (1, 0))
    run = torch.stack([boundaries[:, : t + 1].sum(1) for t in range(40)], 1)
    mask = (run[:, :, None] == run[:, None, :]).tril()
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2.0  # sqrt(head width 4)
    weights = weights.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    dense = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
    expected = torch.autograd.grad((dense * upstream).sum(), (q, k, v))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@given(packed_documents())
def test_positions_restart_in_every_document(documents: Tensor) -> None:
    expected = [document_positions(ids, len(ids)) for ids in documents.tolist()]
    assert document_layout(documents).positions.tolist() == expected


def test_an_id_that_comes_back_is_a_new_document() -> None:
    documents = torch.tensor([[0, 0, 1, 0, 0, -1, -1]])
    assert run_index(documents).tolist() == [[0, 0, 1, 2, 2, 3, 3]]
    assert document_layout(documents).positions.tolist() == [[0, 1, 0, 0, 1, 0, 1]]


def test_the_same_id_in_the_next_row_is_a_new_document() -> None:
    documents = torch.tensor([[0, 0, 0], [0, 0, 0]])
    assert document_layout(documents).positions.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("seed", range(4))
def test_attention_work_is_proportional_to_the_squared_document_lengths(seed: int) -> None:
    # a T x T mask would need 256^2 cells a row whatever the documents are
    documents = (torch.rand(4, 256, generator=torch.Generator().manual_seed(seed)) < 0.05).cumsum(1)
    lengths = [int(n) for row in documents for n in torch.unique_consecutive(row, return_counts=True)[1]]
    cells = sum(group.source.shape[0] * group.source.shape[1] ** 2 for group in document_layout(documents).groups)
    assert sum(n * n for n in lengths) <= cells <= 1.25**2 * sum(n * n for n in lengths) < 4 * 256**2


def test_every_position_is_attended_exactly_once() -> None:
    documents = (torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.2).cumsum(1)
    layout = document_layout(documents)
    assert sorted(layout.order.tolist()) == list(range(150))
    assert sum(g.source.numel() if g.valid is None else int(g.valid.sum()) for g in layout.groups) == 150


def test_attention_without_documents_is_plain_causal() -> None:
    q, k, v = queries_keys_values(2, 6)
    torch.testing.assert_close(
        attend(q, k, v), attend(q, k, v, document_layout(torch.zeros(2, 6, dtype=torch.long))), rtol=0, atol=1e-12
    )
