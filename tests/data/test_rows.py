"""Rows of shards: complete, disjoint, reproducible epochs; the conventions of packing; memory of the rows asked for."""

from __future__ import annotations

import multiprocessing
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextlat.batch import Batch
from nextlat.data.packing import collect, fixed_stride, packed_rows
from nextlat.data.rows import Shuffle, TokenRows
from nextlat.data.shards import ShardedTokens, write_shards
from nextlat.errors import NextLatError

END, T = 0, 16
GOLDEN = [3, 9, 5, 2, 6, 1, 0, 8, 4, 7]


def documents() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(1, 50, random.integers(1, 40)).tolist() for _ in range(60)]


def written(folder: Path, shard_tokens: int = 150) -> ShardedTokens:
    return write_shards(
        documents(), folder, vocab_size=50, end_token=END, tokenizer=None, split="train", shard_tokens=shard_tokens
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardedTokens:
    return written(tmp_path_factory.mktemp("shards") / "tokens")


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None)


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
def test_the_shuffle_is_one_to_one(size: int, seed: int, epoch: int) -> None:
    assert sorted(Shuffle(size, seed, epoch)(np.arange(size)).tolist()) == list(range(size))


def test_the_shuffle_of_billions_is_computed_where_it_is_asked() -> None:
    size = 3_000_000_007
    found = Shuffle(size, 0, 0)(np.arange(5000))
    assert len(np.unique(found)) == 5000 and found.min() >= 0 and found.max() < size
    # 5,000 uniform draws: mean size/2 with a standard error of 0.0041 size
    assert abs(found.mean() / size - 0.5) < 0.02
    assert abs(np.corrcoef(np.arange(5000), found)[0, 1]) < 0.07


@pytest.mark.parametrize("size", [2, 3, 7, 24])
def test_over_many_epochs_every_chunk_stands_at_every_place_equally_often(size: int) -> None:
    epochs = 200 * size
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), Shuffle(size, 5, epoch)(np.arange(size))] += 1
    chi = ((counts - 200) ** 2 / 200).sum()
    degrees = (size - 1) ** 2
    assert chi < degrees + 5 * np.sqrt(2 * degrees) + 10


def test_the_order_of_a_seed_is_the_same_on_every_machine() -> None:
    assert Shuffle(10, 0, 0)(np.arange(10)).tolist() == GOLDEN


def test_an_epoch_shows_every_chunk_once_and_the_next_another_order(shards: ShardedTokens) -> None:
    rows = TokenRows(shards, "train", T, seed=3)
    n = rows.rows_per_epoch
    assert n == shards.tokens("train") // T
    first, second = rows.chunks(0, n), rows.chunks(n, 2 * n)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(n))
    assert first.tolist() != second.tolist()
    assert first.tolist() != TokenRows(shards, "train", T, seed=4).chunks(0, n).tolist()
    assert TokenRows(shards, "train", T, seed=None).chunks(0, n).tolist() == list(range(n))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_slices_of_any_sizes_are_the_rows_of_one_order(shards: ShardedTokens, sizes: list[int]) -> None:
    """Ranks, micro-batches and a resumed run ask for other slices, and read the same rows."""
    total = sum(sizes)
    whole = TokenRows(shards, "train", T, seed=3).batch(0, total)
    begin = 0
    for size in sizes:
        part = TokenRows(shards, "train", T, seed=3).batch(begin, begin + size)
        assert same(part, whole.rows(begin, begin + size))
        begin += size


def _read(folder: Path, rank: int, epochs: int, found: Any) -> None:
    rows = TokenRows(ShardedTokens.open(folder), "train", T, seed=0)
    mine = range(rank, epochs * rows.rows_per_epoch, 2)
    found.put((rank, [tuple(rows.batch(row, row + 1).tokens[0].tolist()) for row in mine]))


def test_two_processes_share_every_epoch_without_a_double_and_again_alike(shards: ShardedTokens) -> None:
    epochs, context = 3, multiprocessing.get_context("fork")
    n = shards.tokens("train") // T
    whole = [tuple(row) for row in shards.read("train", np.arange(n) * T, T).tolist()]
    assert len(set(whole)) == n
    orders = []
    for _ in range(2):
        found = context.Queue()
        both = [context.Process(target=_read, args=(shards.folder, rank, epochs, found)) for rank in range(2)]
        for process in both:
            process.start()
        read = dict(found.get(timeout=120) for _ in both)
        for process in both:
            process.join()
        order = [read[row % 2][row // 2] for row in range(epochs * n)]
        for epoch in range(epochs):
            assert sorted(order[epoch * n : (epoch + 1) * n]) == sorted(whole)
        orders.append(order)
    assert orders[0] == orders[1]
    assert orders[0][:n] != orders[0][n : 2 * n]


def test_rows_follow_the_conventions_of_packing(shards: ShardedTokens) -> None:
    rows = TokenRows(shards, "train", T, seed=3)
    batch = rows.batch(0, rows.rows_per_epoch)
    packed = collect(documents(), END)
    expected = packed_rows(packed, fixed_stride(packed, T, drop_last=True), rows.chunks(0, rows.rows_per_epoch))
    assert torch.equal(batch.tokens, expected.tokens)
    assert torch.equal(batch.targets, expected.targets)
    assert batch.documents is not None and expected.documents is not None
    assert torch.equal(batch.documents.diff(dim=1) != 0, expected.documents.diff(dim=1) != 0)
    assert batch.tokens.dtype == batch.targets.dtype == batch.documents.dtype == torch.int64


def test_rows_by_hand(tmp_path: Path) -> None:
    shards = write_shards(
        [[5, 6, 7], [8], [9, 9]], tmp_path, vocab_size=10, end_token=END, tokenizer=None, split="train", shard_tokens=5
    )
    batch = TokenRows(shards, "train", 3, seed=None).batch(0, 3)
    assert batch.tokens.tolist() == [[0, 5, 6], [7, 0, 8], [0, 9, 9]]
    assert batch.targets.tolist() == [[5, 6, 7], [0, 8, 0], [9, 9, 0]]
    assert batch.documents is not None and batch.documents.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_rows_do_not_depend_on_the_size_of_shards(shards: ShardedTokens, tmp_path: Path) -> None:
    other = written(tmp_path, shard_tokens=40)
    assert len(other.manifest.shards) > len(shards.manifest.shards)
    assert same(TokenRows(shards, "train", T, 3).batch(0, 100), TokenRows(other, "train", T, 3).batch(0, 100))


def test_keys_are_the_global_rows_so_that_epochs_differ(shards: ShardedTokens) -> None:
    batch = TokenRows(shards, "train", T, seed=3).batch(70, 75)
    assert batch.keys is not None and batch.keys.tolist() == [70, 71, 72, 73, 74]


def test_more_shards_than_may_be_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextlat.data.shards.OPEN_SHARDS", 2)
    shards = written(tmp_path, shard_tokens=40)
    rows = TokenRows(shards, "train", T, seed=0)
    found = rows.batch(0, rows.rows_per_epoch)
    assert sorted(found.tokens.flatten().tolist()) == sorted(
        shards.read("train", [0], rows.rows_per_epoch * T).flatten().tolist()
    )
    assert shards._map.cache_info().currsize == 2


def test_memory_is_that_of_the_rows_asked_for(tmp_path: Path) -> None:
    long = np.ones(4_000_000, np.int64)
    shards = write_shards(
        [long], tmp_path, vocab_size=50, end_token=END, tokenizer=None, split="train", shard_tokens=10**7
    )
    rows = TokenRows(shards, "train", 4, seed=0)
    rows.batch(0, 2)
    tracemalloc.start()
    rows.batch(rows.rows_per_epoch - 4, rows.rows_per_epoch + 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000  # the split has 8,000,000 bytes, a permutation of its rows as many


@pytest.mark.parametrize(
    ("split", "length", "message"),
    [("test", 16, "unknown split"), ("train", 1, "at least 2"), ("train", 10**6, "fewer")],
)
def test_rows_that_cannot_be_are_refused(shards: ShardedTokens, split: str, length: int, message: str) -> None:
    with pytest.raises(NextLatError, match=message):
        TokenRows(shards, split, length, 0)
    with pytest.raises(NextLatError, match="-1"):
        TokenRows(shards, "train", T, 0).batch(-1, 3)
