"""What ``nextlat data`` does, once its arguments are read."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nextlat.data.download import RemoteFile, download, endpoint, hub_files
from nextlat.data.manifest import MANIFEST, TOKENIZER, UNFINISHED, Shard, complaints, read_manifest
from nextlat.data.shards import ShardedTokens
from nextlat.data.text import FIRST_SHARD, Reading, find_files, hold_out, read_documents, sample, tokenise
from nextlat.data.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer, load_tokenizer, train_bpe
from nextlat.data.writer import ShardWriter
from nextlat.errors import NextLatError
from nextlat.files import explained, locked

Pairs = Callable[[], Iterable[tuple[str, str]]]
"""Begins the documents, with their splits, from the start."""


class Part(NamedTuple):
    """Documents, and how many of their tokens are wanted."""

    pairs: Pairs
    max_tokens: int | None
    counted: str | None = None
    """The split that counts; ``None`` for all."""


class Making(NamedTuple):
    """What all commands that make tokens ask for."""

    out: Path
    tokenizer: str
    workers: int = 1
    shard_tokens: int = 100_000_000
    max_tokens: int | None = None
    train_characters: int = 10_000_000
    end_token: str | None = None
    alphabet: Literal["ascii", "bytes"] = "bytes"
    """Of a tokenizer that is trained; ``ascii`` for data that is nothing else, because it drops the rest."""


def text_command(sources: Sequence[Path], making: Making, reading: Reading, validation: float | None) -> None:
    """Local files into shards; ``validation`` is the part held out, ``None`` the first shard."""
    files = find_files(sources, making.out)
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files):,} file{'' if len(files) == 1 else 's'}, {size / 1e6:,.1f} MB")
    listing = _contents(files, size)
    source = {"kind": "text", "files": len(files), "bytes": size, "listing": listing, **reading._asdict()}
    packed = any(path.suffix in (".gz", ".parquet") for path in files)
    _make_held_out(lambda: read_documents(files, reading), validation, making, source, None if packed else size)


def _contents(files: Sequence[Path], size: int) -> str:
    """A hash of what is in files, in their order: other text is never mixed into a folder, wherever it lies."""
    all_of_them = hashlib.sha256()
    with _bar("reading", size) as (progress, task):
        for path in files:
            with explained("reading", path), path.open("rb") as file:
                all_of_them.update(hashlib.file_digest(file, "sha256").digest())
            progress.update(task, advance=path.stat().st_size)
    return all_of_them.hexdigest()


def corpus_command(name: str, making: Making, validation: float | None) -> None:
    """A corpus of this machine into shards."""
    from nextlat.data.corpora import find_corpus

    corpus = find_corpus(name)
    source = {"kind": "corpus", "name": name, "version": corpus.version}
    _make_held_out(corpus.documents, validation, making, source)


def tiny_stories_command(making: Making, revision: str, dry_run: bool) -> None:
    """TinyStories from the hub into shards, in the splits it comes in."""
    repository = "cyrilzhang/TinyStories2-ascii"
    files = hub_files(repository, revision)
    held_out = [file for file in files if "valid" in file.name.rpartition("/")[2]]
    train = [file for file in files if file not in held_out]
    if not held_out or not train:
        raise NextLatError(
            f"{repository} lacks train or validation files, it has {', '.join(file.name for file in files)}; "
            "choose another --revision"
        )
    source = _announced(repository, revision, files, making)
    if dry_run:
        return
    limit = making.max_tokens
    parts = [
        Part(lambda: _fetched(held_out, "validation", making), limit and max(limit // 10, 1), "validation"),
        Part(lambda: _fetched(train, "train", making), limit, "train"),
    ]
    make(parts, making, ["train", "validation"], source)


def fineweb_command(making: Making, subset: str, revision: str, dry_run: bool) -> None:
    """FineWeb-Edu from the hub into shards; the first of them is the validation split."""
    repository = "HuggingFaceFW/fineweb-edu"
    files = hub_files(repository, revision, subset.replace("sample-", "sample/"))
    source = _announced(repository, revision, files, making)
    if not dry_run:
        part = Part(lambda: _fetched(files, FIRST_SHARD, making), making.max_tokens)
        make([part], _smaller_shards(making), ["train", "validation"], source)


def check_command(folder: Path) -> int:
    """Read every file of a folder and compare it with the manifest; returns 1 if something is wrong."""
    if not (folder / MANIFEST).is_file() and (folder / UNFINISHED).is_file():
        unfinished = read_manifest(folder / UNFINISHED)
        with _checking(folder) as looked_at:
            wrong = complaints(folder, unfinished.shards, True, looked_at)
        print(f"{folder} is not finished: {len(unfinished.shards) - len(wrong)} good shards", file=sys.stderr)
        print("\n".join([*wrong, unfinished.repair]), file=sys.stderr)
        return 1
    with _checking(folder) as looked_at:
        shards = ShardedTokens.open(folder, True, looked_at)
    show(shards)
    print("every file is as the manifest says")
    return 0


def show(shards: ShardedTokens) -> None:
    """Print what a folder holds."""
    print(f"{shards.folder}: {shards.vocab_size:,} token ids, end token {shards.end_token}")
    for split in shards.splits:
        files = sum(shard.split == split for shard in shards.manifest.shards)
        plural = "" if files == 1 else "s"
        print(
            f"  {split}: {shards.tokens(split):,} tokens, {shards.documents(split):,} documents, {files} shard{plural}"
        )


def make(
    parts: Sequence[Part], making: Making, splits: Sequence[str], source: dict[str, Any], size: int | None = None
) -> ShardedTokens:
    """Tokenise documents into a folder of shards; goes on with, or repairs, what is there."""
    source = {**source, "max_tokens": making.max_tokens}
    if making.tokenizer.startswith("train:"):  # another one is known by its hash, wherever it lies
        source["tokenizer"] = making.tokenizer
    with locked(making.out, wait=False):
        shards = _made(parts, making, splits, source, size)
    show(shards)
    if set(splits) == {"train", "validation"}:
        keys = {"source": making.out, "vocab_size": shards.vocab_size, "end_token": shards.end_token}
        options = shlex.join(f"data.{key}={value}" for key, value in keys.items())
        print(f"train on it, for example: nextlat train tiny_stories/mini {options}")
    return shards


def _made(
    parts: Sequence[Part], making: Making, splits: Sequence[str], source: dict[str, Any], size: int | None
) -> ShardedTokens:
    tokenizer = find_tokenizer(making, parts[-1].pairs)
    command = shlex.join(["nextlat", *sys.argv[1:]])
    with _checking(making.out) as looked_at:
        opened = ShardWriter(
            making.out,
            tokenizer.vocab_size,
            tokenizer.end_token,
            making.shard_tokens,
            tokenizer,
            source,
            command,
            looked_at,
        )
    with opened as writer:
        if all(writer.complete(split) for split in splits):
            print("everything is there already")
        else:
            for line in writer.damaged:
                print(f"making again: {line}")
            if writer.good:
                tokens = sum(shard.tokens for shard in writer.good.values())
                print(f"going on after {len(writer.good)} finished shards, {tokens:,} tokens")
            with tokenising(size) as add:
                for part in parts:
                    tokenise(part.pairs(), writer, tokenizer, making.workers, part.max_tokens, part.counted, add)
            writer.finish(*splits)
    return ShardedTokens.open(making.out)


def find_tokenizer(making: Making, pairs: Pairs) -> Tokenizer:
    """The tokenizer that was asked for: ``bytes``, ``gpt2:PATH``, ``train:N`` or a file."""
    kind, _, value = making.tokenizer.partition(":")
    if making.tokenizer == "bytes":
        return byte_tokenizer()
    if kind == "gpt2":
        return gpt2_tokenizer(value or ".")
    if kind != "train":
        return load_tokenizer(making.tokenizer, making.end_token)
    if not value.isdecimal():
        raise NextLatError(f"--tokenizer {making.tokenizer} names no number of tokens; write for example train:1000")
    kept = making.out / TOKENIZER
    manifest = next((making.out / name for name in (UNFINISHED, MANIFEST) if (making.out / name).is_file()), None)
    if manifest is not None and kept.is_file():
        found = hashlib.sha256(kept.read_bytes()).hexdigest()
        if found == read_manifest(manifest).tokenizer_sha256:
            return load_tokenizer(kept)
    texts = sample(pairs(), making.train_characters)
    print(f"training a tokenizer of {int(value):,} tokens on {sum(map(len, texts)):,} characters", flush=True)
    made = train_bpe(texts, int(value), making.alphabet)
    if made.vocab_size < int(value):
        print(f"only {made.vocab_size:,} tokens could be learned from so little text", flush=True)
    return made


def _make_held_out(
    documents: Callable[[], Iterator[str]],
    validation: float | None,
    making: Making,
    source: dict[str, Any],
    size: int | None = None,
) -> None:
    """Documents of one kind, a part of which is held out: a fraction, or the first shard for ``None``."""

    def pairs() -> Iterable[tuple[str, str]]:
        if validation is None:
            return ((FIRST_SHARD, text) for text in documents())
        return hold_out(documents(), validation)

    splits = ["train"] if validation == 0 else ["train", "validation"]
    if validation is None:
        making = _smaller_shards(making)
    make([Part(pairs, making.max_tokens)], making, splits, {**source, "validation": validation}, size)


def _smaller_shards(making: Making) -> Making:
    """A first shard that is held out is at most a tenth of all tokens."""
    if making.max_tokens is None:
        return making
    return making._replace(shard_tokens=min(making.shard_tokens, max(making.max_tokens // 10, 1)))


def _announced(repository: str, revision: str, files: Sequence[RemoteFile], making: Making) -> dict[str, Any]:
    """Say what is fetched from where; returns it as a source."""
    size = sum(file.size or 0 for file in files)
    print(f"{endpoint()}/datasets/{repository}, revision {revision}: {len(files)} files, {size / 1e9:,.2f} GB")
    print(f"fetched one by one, as far as tokens are needed, to {_downloads(making)}; delete them when all is done")
    listing = [[file.name, file.size, file.sha256] for file in files]
    return {"kind": "hub", "repository": repository, "revision": revision, "files": listing}


def _downloads(making: Making) -> Path:
    return making.out / "downloads"


def _fetched(files: Sequence[RemoteFile], split: str, making: Making) -> Iterator[tuple[str, str]]:
    """The documents of remote files; each is fetched when its turn comes."""
    command = shlex.join(["nextlat", *sys.argv[1:]])
    for file in files:
        path = _downloads(making) / file.name
        with _bar(f"fetching {file.name}", file.size) as (progress, task):
            download(file, path, command, partial(_show_bytes, progress, task))
        for text in read_documents([path]):
            yield split, text


def _show_bytes(progress: Progress, task: TaskID, done: int, total: int | None) -> None:
    progress.update(task, completed=done, total=total)


@contextmanager
def _checking(folder: Path) -> Iterator[Callable[[Shard], None]]:
    """A progress bar that is told the shards of a folder that were read."""
    manifest = next((folder / name for name in (UNFINISHED, MANIFEST) if (folder / name).is_file()), None)
    size = None if manifest is None else sum(shard.bytes for shard in read_manifest(manifest).shards)
    with _bar("checking", size) as (progress, task):
        yield lambda shard: progress.update(task, advance=shard.bytes)


@contextmanager
def tokenising(size: int | None = None) -> Iterator[Callable[[int, int, int], None]]:
    """A progress bar that is told the documents, tokens and characters that were added."""
    with _bar("tokenising", size) as (progress, task):
        counts = [0, 0, 0]

        def add(*more: int) -> None:
            counts[:] = [a + b for a, b in zip(counts, more, strict=True)]
            seconds = progress.tasks[task].elapsed or 1e-9
            note = f"{counts[0]:,} documents  {counts[1]:,} tokens  {counts[1] / seconds:,.0f} tokens/s"
            progress.update(task, completed=counts[2], note=note)

        yield add


@contextmanager
def _bar(what: str, size: int | None) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar on the error stream, gone when done, below the one it is within; ``note`` stands behind it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    made = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True)
    progress = _shown[0] if _shown else made
    with nullcontext() if _shown else made:
        _shown.append(progress)
        task = progress.add_task(what, total=size, note="")
        try:
            yield progress, task
        finally:
            progress.remove_task(task)
            _shown.pop()


_shown: list[Progress] = []
