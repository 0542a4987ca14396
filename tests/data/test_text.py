"""Text to shards: every kind of file, held-out documents, and one result for any number of processes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nextlat.data import text as module
from nextlat.data.shards import ShardedTokens
from nextlat.data.text import FIRST_SHARD, Reading, find_files, hold_out, read_documents, sample, tokenise
from nextlat.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from nextlat.data.writer import ShardWriter
from nextlat.errors import NextLatError

TEXTS = [f"document {i} " + "x" * (i % 17) for i in range(120)]


def as_file(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def test_a_file_is_a_document_unless_lines_or_a_separator_divide_it(tmp_path: Path) -> None:
    path = as_file(tmp_path, "a.txt", "one\n%\ntwo\nlines\n%\n  \n%\nthree\n")
    assert list(read_documents([path])) == ["one\n%\ntwo\nlines\n%\n  \n%\nthree\n"]
    assert list(read_documents([path], Reading(per_line=True)))[:3] == ["one", "%", "two"]
    assert list(read_documents([path], Reading(separator=r"\n%\n"))) == ["one", "two\nlines", "three\n"]
    with pytest.raises(NextLatError, match="choose one"):
        list(read_documents([path], Reading(per_line=True, separator="%")))
    with pytest.raises(NextLatError, match=r"separator '\(' is not a regular expression"):
        list(read_documents([path], Reading(separator="(")))


@pytest.mark.parametrize("size", [1, 5, 64, 1 << 20])
def test_separators_are_found_wherever_a_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A greedy separator that straddles blocks must not be found twice, and not in parts."""
    monkeypatch.setattr(module, "READ_CHARACTERS", size)
    monkeypatch.setattr(module, "LONGEST_SEPARATOR", 8)
    path = as_file(tmp_path, "a.txt", "one--two---three--\n--four" + "-" * 7 + "five")
    assert list(read_documents([path], Reading(separator="--+"))) == ["one", "two", "three", "four", "five"]


def test_jsonl_parquet_and_compressed_text_are_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"story": text, "other": 1}) + "\n" for text in TEXTS[:5])
    plain = as_file(tmp_path, "a.jsonl", lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    reading = Reading(column="story")
    assert list(read_documents([plain], reading)) == TEXTS[:5]
    assert list(read_documents([tmp_path / "b.jsonl.gz"], reading)) == TEXTS[:5]
    with pytest.raises(NextLatError, match=r"a\.jsonl, line 1 .*'text'.*--column"):
        list(read_documents([plain]))
    with pytest.raises(NextLatError, match=r"'other' is int, not text"):
        list(read_documents([plain], Reading(column="other")))


def test_parquet_is_read_by_column(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [*TEXTS[:3], None], "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert list(read_documents([tmp_path / "a.parquet"])) == TEXTS[:3]
    with pytest.raises(NextLatError, match=r"a\.parquet has no column 'story', only text, id"):
        list(read_documents([tmp_path / "a.parquet"], Reading(column="story")))
    bad = as_file(tmp_path, "bad.parquet", "no parquet")
    with pytest.raises(NextLatError, match=r"bad\.parquet cannot be read as parquet"):
        list(read_documents([bad]))


ENDLESS = """
import itertools, pathlib, sys
from nextlat.data import text
from nextlat.data.tokenizer import byte_tokenizer

if __name__ == "__main__":
    batches = ([text.Document("train", "word " * 1000, False)] for _ in itertools.count())
    for done, _ in enumerate(text._encoded(batches, byte_tokenizer(), "<u2", 2)):
        if done == 4:
            print("working", flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
def test_processes_that_tokenise_end_with_the_one_that_is_killed(tmp_path: Path) -> None:
    script = as_file(tmp_path, "endless.py", ENDLESS)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "working\n"
        children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        assert len(children) >= 2
        parent.kill()
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline, "processes are left behind"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(NextLatError, match=r"a\.txt is not utf-8 text"):
        list(read_documents([tmp_path / "a.txt"]))
    assert list(read_documents([tmp_path / "a.txt"], Reading(encoding="latin-1"))) == ["caf\u00e9"]


def test_folders_are_walked_in_order_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    made = [as_file(tmp_path, name, "x") for name in ("b.txt", "sub/a.txt", "a.txt", ".hidden", ".git/c.txt")]
    assert find_files([tmp_path]) == [made[2], made[0], made[1]]
    with pytest.raises(NextLatError, match="no file or folder"):
        find_files([tmp_path / "none"])


def test_held_out_documents_depend_on_their_text_alone() -> None:
    texts = [f"story {i}" for i in range(4000)]
    pairs = {text: split for split, text in hold_out(texts, 0.1)}
    assert pairs == {text: split for split, text in hold_out(reversed([*texts, *texts]), 0.1)}
    share = sum(split == "validation" for split in pairs.values()) / len(pairs)
    assert abs(share - 0.1) < 0.02  # four standard errors
    assert {split for split, _ in hold_out(texts, 0)} == {"train"}


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(
    out: Path,
    pairs: Iterator[tuple[str, str]],
    splits: Sequence[str] = ("train", "validation"),
    workers: int = 1,
    max_tokens: int | None = None,
    counted: str | None = None,
    shard_tokens: int = 400,
) -> ShardedTokens:
    tokenizer = byte_tokenizer()
    with ShardWriter(out, 257, 256, shard_tokens, tokenizer, command="make it") as writer:
        tokenise(pairs, writer, tokenizer, workers, max_tokens, counted)
        writer.finish(*splits)
    return ShardedTokens.open(out)


def documents(shards: ShardedTokens, split: str) -> list[str]:
    tokens = shards.read(split, [0], shards.tokens(split))[0]
    return byte_tokenizer().decode(tokens.tolist()).split("<|endoftext|>")[1:]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 100)


@pytest.mark.usefixtures("small_batches")
def test_documents_come_out_whole_in_order_and_in_their_split(tmp_path: Path) -> None:
    shards = run(tmp_path, hold_out(TEXTS, 0.2))
    for split in ("train", "validation"):
        assert documents(shards, split) == [text for name, text in hold_out(TEXTS, 0.2) if name == split]
    assert shards.documents("validation") > 10


@pytest.mark.usefixtures("small_batches")
def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    run(tmp_path / "one", hold_out(TEXTS, 0.2))
    run(tmp_path / "two", hold_out(TEXTS, 0.2), workers=2)
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("after", [10, 45, 100])
def test_an_interrupted_run_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, first: bool
) -> None:
    def pairs(stop: int | None = None) -> Iterator[tuple[str, str]]:
        given = ((FIRST_SHARD, text) for text in TEXTS) if first else hold_out(TEXTS, 0.2)
        for number, pair in enumerate(given):
            if number == stop:
                raise KeyboardInterrupt
            yield pair

    run(tmp_path / "whole", pairs())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", pairs(after))
    encoded: list[int] = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda s, texts: encoded.append(len(texts)) or encode(s, texts))
    run(tmp_path / "part", pairs())
    assert everything(tmp_path / "part") == everything(tmp_path / "whole")
    assert after == 10 or sum(encoded) < len(TEXTS), "finished shards were tokenised again"
    encoded.clear()
    (tmp_path / "part" / "train-000001.bin").unlink()
    run(tmp_path / "part", pairs())
    assert everything(tmp_path / "part") == everything(tmp_path / "whole")
    assert sum(encoded) < 40, "more than the missing shard was tokenised"


@pytest.mark.usefixtures("small_batches")
def test_the_first_shard_can_be_held_out(tmp_path: Path) -> None:
    shards = run(tmp_path, ((FIRST_SHARD, text) for text in TEXTS))
    held = [shard for shard in shards.manifest.shards if shard.split == "validation"]
    assert len(held) == 1 and 400 <= held[0].tokens < 430
    assert documents(shards, "validation") + documents(shards, "train") == TEXTS


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("limit", [1, 350, 900])
def test_tokens_are_limited_to_the_document_that_reaches_the_limit(tmp_path: Path, limit: int) -> None:
    shards = run(tmp_path, hold_out(TEXTS, 0), ["train"], max_tokens=limit)
    total, expected = 0, 0
    while total < limit:
        total += len(TEXTS[expected]) + 1
        expected += 1
    assert documents(shards, "train") == TEXTS[:expected]
    assert shards.tokens("train") == total
    assert documents(run(tmp_path, hold_out(TEXTS, 0), ["train"], max_tokens=limit), "train") == TEXTS[:expected]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("held_out", [0, 0.2, None])
@pytest.mark.parametrize("limit", [1300, 1310, 1320, 1330])
def test_damage_is_repaired_whatever_the_limit_was_passed_by(
    tmp_path: Path, limit: int, held_out: float | None
) -> None:
    """The last document passes the limit by some tokens; a damaged shard may end with one that is shorter."""

    def pairs() -> Iterator[tuple[str, str]]:
        return iter([(FIRST_SHARD, text) for text in TEXTS]) if held_out is None else hold_out(TEXTS, held_out)

    def make() -> dict[str, bytes]:
        run(tmp_path, pairs(), ["train"] if held_out == 0 else ["train", "validation"], max_tokens=limit)
        return everything(tmp_path)

    whole = make()
    assert sum(name.endswith(".bin") for name in whole) >= 4
    for name in (name for name in whole if name.endswith(".bin")):
        (tmp_path / name).unlink()
        assert make() == whole


@pytest.mark.usefixtures("small_batches")
def test_a_limit_may_count_one_split(tmp_path: Path) -> None:
    shards = run(tmp_path, hold_out(TEXTS, 0.2), max_tokens=600, counted="train")
    assert 600 <= shards.tokens("train") < 630 and shards.tokens("validation") > 0


def test_no_more_than_a_few_batches_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1)  # a batch a document
    ahead: list[int] = []

    def pairs() -> Iterator[tuple[str, str]]:
        for number, text in enumerate(TEXTS[:30]):
            ahead.append(number - writer.documents_added)  # type: ignore[attr-defined]
            yield "train", text

    with ShardWriter(tmp_path, 257, 256, 400) as writer:
        writer.documents_added = 0  # type: ignore[attr-defined]

        def added(count: int, *_: int) -> None:
            writer.documents_added += count  # type: ignore[attr-defined]

        tokenise(pairs(), writer, byte_tokenizer(), 2, progress=added)
    assert max(ahead) <= 2 * 2 + 2


def die(texts: list[str]) -> None:
    os._exit(1)


def test_a_long_document_is_tokenised_in_pieces_to_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer takes hundreds of bytes a character: a file of 100 MB would not fit into memory at once."""
    words = ["duck", "it's", "12", "na\u00efve", "a\nb", "x.\n\n", "  two", "\ttab", "end ", '"Hi,"', "\u3000wide"]
    text = " ".join(words[i * i % 11] + words[i % 7] for i in range(400))
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 200)
    parts = list(module.pieces(text))
    assert "".join(parts) == text and len(parts) > 50
    assert list(module.pieces("x" * 100)) == ["x" * 100]
    longest: list[int] = []
    encode = Tokenizer.encode_batch
    for tokenizer in (train_bpe([text], 400, "bytes"), byte_tokenizer()):
        whole = [tokenizer.encode(one) for one in ("short", text, "", text[:99])]
        with monkeypatch.context() as patch:
            patch.setattr(Tokenizer, "encode_batch", lambda s, t: longest.append(sum(map(len, t))) or encode(s, t))
            tokens, lengths = module._flat(tokenizer, ["short", text, "", text[:99]], "<u2")
        assert lengths.tolist() == [len(one) for one in whole]
        assert tokens.tolist() == [token for one in whole for token in one]
    assert max(longest) < 300
    assert "".join(sample([("train", text)], 1)) == text[:40]


def test_a_process_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_work", die)
    with pytest.raises(NextLatError, match="a process that tokenises died"):
        run(tmp_path, hold_out(TEXTS, 0), ["train"], workers=2)
    with pytest.raises(NextLatError, match="workers is 0"):
        run(tmp_path, hold_out(TEXTS, 0), ["train"], workers=0)


def test_a_tokenizer_learns_from_documents_that_are_not_held_out() -> None:
    pairs = [("validation", "secret"), ("train", "one"), ("train", "two"), ("train", "three")]
    assert sample(pairs, 5) == ["one", "two"]
    with pytest.raises(NextLatError, match="no documents"):
        sample(pairs[:1], 5)
