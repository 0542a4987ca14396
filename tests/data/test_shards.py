"""Token shards: what is written is read back; damage is named and repaired; an interruption costs one shard."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nextlat.data.shards import ShardedTokens, write_shards
from nextlat.data.tokenizer import byte_tokenizer
from nextlat.data.writer import ShardWriter
from nextlat.errors import NextLatError

END, V = 0, 50
Documents = list[list[int]]


def documents(count: int = 40, seed: int = 0) -> Documents:
    random = np.random.default_rng(seed)
    return [random.integers(1, V, random.integers(1, 30)).tolist() for _ in range(count)]


def write(
    folder: Path, given: object = None, vocab_size: int = V, shard_tokens: int = 100, split: str = "train"
) -> ShardedTokens:
    return write_shards(
        documents() if given is None else given,  # type: ignore[arg-type]
        folder,
        vocab_size=vocab_size,
        end_token=END,
        split=split,
        shard_tokens=shard_tokens,
        command="make it",
    )


def stream(of: Documents) -> list[int]:
    return [token for document in of if document for token in (END, *document)]


def everything(shards: ShardedTokens, split: str = "train") -> list[int]:
    found: list[int] = shards.read(split, [0], shards.tokens(split))[0].tolist()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_each_document_is_opened_by_the_end_token_and_shards_hold_whole_documents(tmp_path: Path) -> None:
    shards = write(tmp_path)
    assert everything(shards) == stream(documents())
    assert shards.documents("train") == 40 and len(shards.manifest.shards) > 3
    for shard in shards.manifest.shards:
        data = np.fromfile(tmp_path / shard.file, "<u2")
        assert data[0] == END and len(data) == shard.tokens and (data == END).sum() == shard.documents
        assert shard.bytes == 2 * shard.tokens
        assert shard.tokens >= 100 or shard is shards.manifest.shards[-1]


@pytest.mark.parametrize(("vocab_size", "dtype", "width"), [(65536, "<u2", 2), (65537, "<u4", 4)])
def test_tokens_take_two_bytes_up_to_65536_and_four_beyond(
    tmp_path: Path, vocab_size: int, dtype: str, width: int
) -> None:
    shards = write(tmp_path, [[vocab_size - 1, 3]], vocab_size)
    assert shards.manifest.dtype == dtype
    assert (tmp_path / "train-000000.bin").stat().st_size == 3 * width
    assert everything(shards) == [END, vocab_size - 1, 3]


def test_reading_runs_across_shards_and_ends_with_end_tokens(tmp_path: Path) -> None:
    shards = write(tmp_path)
    whole = stream(documents())
    begins = [0, 95, 210, len(whole) - 3]
    found = shards.read("train", begins, 240)
    for row, begin in zip(found.tolist(), begins, strict=True):
        expected = whole[begin : begin + 240]
        assert row == expected + [END] * (240 - len(expected))


def test_documents_without_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    given = [[], [1, 2], [], [], [3], []]
    shards = write(tmp_path, given, shard_tokens=2)
    assert everything(shards) == [END, 1, 2, END, 3]
    assert sum(shard.documents + shard.empty for shard in shards.manifest.shards) == 6
    (tmp_path / "train-000000.bin").unlink()
    assert everything(write(tmp_path, given, shard_tokens=2)) == [END, 1, 2, END, 3]


def test_splits_lie_side_by_side_and_a_whole_one_is_not_read_again(tmp_path: Path) -> None:
    def never() -> Iterator[list[int]]:
        raise AssertionError("the documents of a whole split were read")
        yield []

    write(tmp_path)
    shards = write(tmp_path, documents(5, seed=1), split="validation")
    assert sorted(shards.splits) == ["train", "validation"]
    assert everything(shards) == stream(documents())
    assert everything(write(tmp_path, never()), "validation") == stream(documents(5, seed=1))


@pytest.mark.parametrize(("token", "word"), [(END, "end token"), (V, str(V)), (-1, "-1")])
def test_tokens_that_would_be_misread_are_refused(tmp_path: Path, token: int, word: str) -> None:
    with pytest.raises(NextLatError, match=word):
        write(tmp_path, [[1, 2], [3, token]])
    assert not (tmp_path / "manifest.json").exists()


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def damage_longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def damage_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (damage_missing, "missing"),
        (damage_truncated, "truncated"),
        (damage_longer, "too long"),
        (damage_flipped, "sha256"),
    ],
)
def test_a_damaged_shard_is_named_with_the_command_and_made_again(
    tmp_path: Path, harm: Callable[[Path], None], word: str
) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    other = (tmp_path / "train-000000.bin").stat().st_mtime_ns
    harm(tmp_path / "train-000002.bin")
    with pytest.raises(NextLatError, match=rf"train-000002\.bin.*{word}.*make it") as caught:
        ShardedTokens.open(tmp_path, verify=True)
    assert "train-000001" not in str(caught.value)
    if harm is damage_flipped:  # names and sizes are right, so it is noticed when it is read
        opened = ShardedTokens.open(tmp_path)
        opened.read("train", [0], 8)
        with pytest.raises(NextLatError, match=rf"train-000002\.bin.*{word}.*make it"):
            opened.read("train", [0], opened.tokens("train"))
    write(tmp_path)
    assert contents(tmp_path) == before
    assert (tmp_path / "train-000000.bin").stat().st_mtime_ns == other, "a good shard was written again"


def test_repair_with_other_documents_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train-000001.bin").unlink()
    with pytest.raises(NextLatError, match=r"train-000001\.bin could not be repaired"):
        write(tmp_path, documents(seed=3))
    with pytest.raises(NextLatError, match=r"train-000001\.bin.*missing"):
        ShardedTokens.open(tmp_path)


def interrupted(after: int) -> Iterator[list[int]]:
    yield from documents()[:after]
    raise KeyboardInterrupt


def test_finished_shards_survive_an_interruption_and_the_result_is_the_same(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    part = tmp_path / "part"
    for after in (3, 20, 33):
        with pytest.raises(KeyboardInterrupt):
            write(part, interrupted(after))
        assert not (part / "manifest.json").exists()
        if after > 3:
            with pytest.raises(NextLatError, match="not finished; run again: make it"):
                ShardedTokens.open(part)
            kept = (part / "train-000000.bin").stat().st_mtime_ns
    write(part)
    assert contents(part) == contents(tmp_path / "whole")
    assert (part / "train-000000.bin").stat().st_mtime_ns == kept


def test_only_documents_of_missing_shards_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train-000001.bin").unlink()
    with ShardWriter(tmp_path, V, END, 100) as writer:
        asked = [place for place in range(40) if not writer.has("train", place)]
    counts = [shard.documents for shard in writer.listed.values()]
    assert asked == list(range(counts[0], counts[0] + counts[1]))


def test_a_full_disk_is_named_and_costs_only_the_unfinished_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synchronise, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        synchronise(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NextLatError, match=r"disk is full while writing .*bin"):
            write(tmp_path)
    assert json.loads((tmp_path / "unfinished.json").read_text())["shards"]
    assert not list(tmp_path.glob(".*"))
    assert everything(write(tmp_path)) == stream(documents())


def test_a_second_writer_is_refused_while_one_is_at_work(tmp_path: Path) -> None:
    def and_meanwhile() -> Iterator[list[int]]:
        for place, document in enumerate(documents()):
            if place == 20:
                with pytest.raises(NextLatError, match=f"another process is writing to {tmp_path}; wait"):
                    write(tmp_path)
            yield document

    assert everything(write(tmp_path, and_meanwhile())) == stream(documents())
    write(tmp_path)


@pytest.mark.parametrize("change", [{"vocab_size": V + 1}, {"shard_tokens": 99}])
def test_a_folder_goes_on_only_with_the_settings_it_was_made_with(tmp_path: Path, change: dict[str, int]) -> None:
    write(tmp_path)
    with pytest.raises(NextLatError, match=next(iter(change))):
        write(tmp_path, **change)  # type: ignore[arg-type]


def test_the_tokenizer_lies_beside_the_tokens_and_a_swapped_one_is_noticed(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    shards = write_shards(
        [tokenizer.encode("né")],
        tmp_path,
        vocab_size=257,
        end_token=256,
        tokenizer=tokenizer,
        split="train",
        shard_tokens=9,
    )
    assert shards.tokenizer().decode(everything(shards)) == "<|endoftext|>né"
    (tmp_path / "tokenizer.json").write_text(tokenizer.json.replace("ByteLevel", "Whitespace"))
    with pytest.raises(NextLatError, match=r"tokenizer\.json is not the tokenizer"):
        ShardedTokens.open(tmp_path)


def test_folders_and_splits_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match=r"no .*manifest\.json.*nextlat data"):
        ShardedTokens.open(tmp_path)
    with pytest.raises(NextLatError, match="unknown split 'trian'; did you mean 'train'"):
        write(tmp_path).tokens("trian")
    (tmp_path / "manifest.json").write_text('{"format": 7}')
    with pytest.raises(NextLatError, match="format 7"):
        ShardedTokens.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"forma')
    with pytest.raises(NextLatError, match="damaged"):
        ShardedTokens.open(tmp_path)
