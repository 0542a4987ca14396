"""Attention over packed documents against a mask written out position by position."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextlat.model import attention as ways
from nextlat.model.attention import attend, attend_flex, attend_grouped, document_layout, implementation, run_index
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
    assert len(document_layout(documents).groups.source) > 80
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
    cells = sum(count * size**2 for count, size in document_layout(documents).groups.shapes)
    assert sum(n * n for n in lengths) <= cells <= 1.25**2 * sum(n * n for n in lengths) < 4 * 256**2


def test_every_position_is_attended_exactly_once() -> None:
    documents = (torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.2).cumsum(1)
    _, source, place = document_layout(documents).groups
    assert source[place].tolist() == list(range(150))


def test_attention_without_documents_is_plain_causal() -> None:
    q, k, v = queries_keys_values(2, 6)
    torch.testing.assert_close(
        attend(q, k, v), attend(q, k, v, document_layout(torch.zeros(2, 6, dtype=torch.long))), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 127, 128, 129])
def test_causal_attention_has_output_and_gradients_of_all_pairs_written_out(length: int) -> None:
    q, k, v = queries_keys_values(2, length)
    upstream = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2.0  # sqrt(head width 4)
    weights = weights.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    dense = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
    mixed = attend(q, k, v)
    assert mixed.grad_fn is not None
    assert ("_ShortRows" in str(mixed.grad_fn.next_functions)) == (length <= 128)
    torch.testing.assert_close(mixed, dense, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad((x * upstream).sum(), (q, k, v)) for x in (mixed, dense))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "dtype", "head_width", "varlen", "expected"),
    [
        ("cpu", torch.float32, 64, True, "grouped"),
        ("cpu", torch.bfloat16, 64, True, "grouped"),
        ("mps", torch.float16, 64, True, "grouped"),
        ("cuda", torch.bfloat16, 64, True, "varlen"),
        ("cuda", torch.float16, 256, True, "varlen"),
        ("cuda", torch.bfloat16, 64, False, "flex"),
        ("cuda", torch.bfloat16, 20, True, "flex"),  # the kernel takes multiples of 8
        ("cuda", torch.bfloat16, 264, True, "flex"),
        ("cuda", torch.float32, 64, True, "flex"),  # and no full precision
        ("cuda", torch.float64, 64, True, "grouped"),
    ],
)
def test_the_way_follows_from_device_type_and_kernels(
    device: str, dtype: torch.dtype, head_width: int, varlen: bool, expected: str
) -> None:
    assert implementation(device, dtype, head_width, varlen) == expected


def test_documents_are_described_to_variable_length_kernels() -> None:
    layout = document_layout(torch.tensor([[0, 0, 1, 0], [0, -1, -1, -1]]))
    assert layout.cumulative_lengths.tolist() == [0, 2, 3, 4, 5, 8]
    assert layout.cumulative_lengths.dtype is torch.int32
    assert layout.longest == 3


@pytest.mark.parametrize("seed", range(3))
def test_the_variable_length_way_equals_the_grouped_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is stood in for by a loop over its bounds, so that what is handed to it and back is checked."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor, longest: int, other: int) -> Tensor:
        assert q.ndim == 3 and first is second and longest == other == int(first.diff().max())
        bounds = first.tolist()
        return torch.cat([attention(q[a:b], k[a:b], v[a:b], None) for a, b in pairwise(bounds)])

    documents = (torch.rand(2, 14, generator=torch.Generator().manual_seed(seed)) < 0.3).cumsum(1)
    q, k, v = queries_keys_values(2, 14)
    expected = attend(q, k, v, document_layout(documents))
    monkeypatch.setattr(ways, "_varlen", lambda: kernel)
    monkeypatch.setattr(ways, "implementation", lambda *_: "varlen")
    torch.testing.assert_close(attend(q, k, v, document_layout(documents)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 127, 128, 300, 512])
@pytest.mark.parametrize("often", [0.0, 0.004, 0.05, 1.0])
def test_the_block_mask_is_the_one_torch_makes_from_all_pairs(length: int, often: float) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    documents = (torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < often).cumsum(1)
    documents[1, length // 3 : 2 * length // 3] = -1
    run = run_index(documents)
    expected = create_block_mask(
        lambda b, h, q, k: (run[b, q] == run[b, k]) & (q >= k), 2, None, length, length, device="cpu"
    )
    found = document_layout(documents).block_mask
    assert found.shape == expected.shape
    for kind in ("kv", "q", "full_kv", "full_q"):
        counts, other = (getattr(mask, f"{kind}_num_blocks") for mask in (found, expected))
        assert torch.equal(counts, other) and counts.dtype is other.dtype
        listed, others = (getattr(mask, f"{kind}_indices") for mask in (found, expected))
        assert listed.shape == others.shape and listed.dtype is others.dtype
        read = torch.arange(listed.shape[-1]) < counts[..., None]
        assert torch.equal(listed[read], others[read])


def test_flex_attention_equals_a_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled and forward only, which is what a CPU offers; the GPU check compares gradients."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(ways, "_flex", lambda: flex_attention.flex_attention)
    documents = (torch.rand(2, 150, generator=torch.Generator().manual_seed(1)) < 0.05).cumsum(1)
    documents[1, 100:] = -1
    q, k, v = (x.detach() for x in queries_keys_values(2, 150))
    mixed = attend_flex(q, k, v, document_layout(documents))
    for row, ids in enumerate(documents.tolist()):
        torch.testing.assert_close(mixed[row], attention(q[row], k[row], v[row], ids).flatten(1), rtol=0, atol=1e-12)


Way = Callable[[Tensor, Tensor, Tensor, ways.Layout], Tensor]


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, layout: ways.Layout) -> Tensor:
    return attend_grouped(q, k.detach() * 2 - k, v, layout)


def broken(*_: object) -> Tensor:
    raise RuntimeError("no compiler\nand a long story")


@pytest.mark.parametrize(
    ("flex", "message"), [(attend_grouped, None), (wrong_gradient, "relative error"), (broken, "RuntimeError: no comp")]
)
def test_flex_attention_is_used_only_where_it_proves_right(
    flex: Way, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "attend_flex", flex)
    monkeypatch.setattr(ways, "implementation", lambda *_: "flex")
    monkeypatch.setattr(ways, "_flex_checked", {})
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, -1, -1]])
    q, k, v = queries_keys_values(1, 8)
    before = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            found = [attend(q, k, v, document_layout(documents)) for _ in range(2)]
            expected = attend_grouped(q, k, v, document_layout(documents))
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
    assert [message in str(w.message) for w in caught if message] == ([True] if message else [])  # once, not each call
    assert ways.flex_is_right(q, document_layout(documents)) == (message is None)
    assert torch.equal(torch.get_rng_state(), before)


def test_flex_attention_proves_right_with_documents_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their queries and keys have no gradient, so nothing can be relative to it."""
    monkeypatch.setattr(ways, "attend_flex", attend_grouped)
    monkeypatch.setattr(ways, "_flex_checked", {})
    assert ways.flex_is_right(queries_keys_values(1, 5)[0], document_layout(torch.arange(5)[None]))


def test_flex_attention_is_not_compiled_for_ever_new_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "attend_flex", attend_grouped)
    monkeypatch.setattr(ways, "_flex_checked", {})
    answers = []
    for length in (4, 5, 6, 7, 4):
        documents = torch.zeros(1, length, dtype=torch.int64)
        answers.append(ways.flex_is_right(queries_keys_values(1, length)[0], document_layout(documents)))
    assert answers == [True, True, True, False, True]


def test_attention_on_a_cpu_does_not_import_the_compiler() -> None:
    """It takes seconds; a fresh interpreter, because other tests import it."""
    code = (
        "import sys, torch; from nextlat.model import Transformer; x = torch.zeros(1, 4, dtype=torch.int64);"
        "before = set(sys.modules); Transformer(3, 1, 1, 2)(x, documents=x);"
        "assert not any(m.startswith(('torch._dynamo', 'torch._inductor')) for m in set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
