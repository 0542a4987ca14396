"""Text into token shards: documents are streamed, tokenised by several processes, and written in their order."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nextlat.data.tokenizer import Tokenizer, text_module
from nextlat.data.writer import ShardWriter
from nextlat.errors import NextLatError

T = TypeVar("T", bound=tuple[Any, ...])

FIRST_SHARD = ""
"""Instead of a split's name: documents fill one shard of ``validation`` first, then ``train``."""
BATCH_CHARACTERS = 1 << 19
"""What a process gets at a time; fixed, so that the result does not depend on the number of processes."""
PIECE_CHARACTERS = 1 << 18
"""Longer documents are tokenised in pieces."""
SURROGATE = re.compile("[\ud800-\udfff]")
WORD = re.compile(r"(?<=\S) (?=\S)")
READ_CHARACTERS = 1 << 20
LONGEST_SEPARATOR = 1024

Progress = Callable[[int, int, int], None]
"""Is told the documents, tokens and characters that were added."""


class Document(NamedTuple):
    """A document that has to be tokenised."""

    split: str
    text: str
    again: bool
    """Whether a damaged shard held it."""


class Reading(NamedTuple):
    """How files become documents."""

    per_line: bool = False
    """Each line of a text file is one; otherwise each file."""
    separator: str | None = None
    """Regular expression between the documents of a text file, e.g. ``\\n%\\n``; at most 1,024 characters match."""
    column: str = "text"
    """Where jsonl and parquet files hold the text."""
    encoding: str = "utf-8"


def find_files(sources: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Files, and all files below folders, in the order of their names; hidden ones, and those in ``out``, are left out.

    Raises:
        NextLatError: a source that does not exist, or nothing found.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_file():
            found.append(source)
        elif source.is_dir():
            below = (path for path in source.rglob("*") if path.is_file())
            seen = (p for p in below if not any(part.startswith(".") for part in p.relative_to(source).parts))
            found += sorted(p for p in seen if out is None or out.resolve() not in p.resolve().parents)
        else:
            raise NextLatError(f"there is no file or folder {source}")
    if not found:
        raise NextLatError(f"there are no files in {', '.join(map(str, sources))}")
    return found


def read_documents(files: Iterable[Path], reading: Reading = Reading()) -> Iterator[str]:  # noqa: B008 - immutable
    """The documents of text (also ``.gz``), ``.jsonl`` and ``.parquet`` files; blank ones are left out.

    Raises:
        NextLatError: a file that is not what its name says, by name and line.
    """
    if reading.separator is not None and reading.per_line:
        raise NextLatError("documents are either lines or lie between separators; choose one")
    for path in files:
        kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        if kind in (".jsonl", ".ndjson"):
            texts = _jsonl(path, reading)
        elif kind == ".parquet":
            texts = _parquet(path, reading.column)
        else:
            texts = _plain(path, reading)
        yield from (text for text in texts if text and not text.isspace())


@contextmanager
def _opened(path: Path, encoding: str) -> Iterator[IO[str]]:
    try:
        with gzip.open(path, "rt", encoding=encoding) if path.suffix == ".gz" else path.open(encoding=encoding) as file:
            yield file
    except (UnicodeDecodeError, LookupError) as error:
        raise NextLatError(f"{path} is not {encoding} text ({error}); name its --encoding, or leave it out") from error
    except (OSError, EOFError, zlib.error) as error:
        raise NextLatError(f"{path} cannot be read: {error}") from error


def _plain(path: Path, reading: Reading) -> Iterator[str]:
    with _opened(path, reading.encoding) as file:
        if reading.per_line:
            yield from (line.rstrip("\n") for line in file)
        elif reading.separator is None:
            yield file.read()
        else:
            yield from _separated(file, reading.separator)


def _separated(file: IO[str], separator: str) -> Iterator[str]:
    try:
        pattern = re.compile(separator)
    except re.error as error:
        raise NextLatError(f"separator {separator!r} is not a regular expression: {error}") from error
    rest, ended = "", False
    while not ended:
        more = file.read(READ_CHARACTERS)
        ended = not more
        rest += more
        begin = 0
        for match in pattern.finditer(rest):
            # a match near the end might go on in what is not read yet
            if not ended and match.end() > len(rest) - LONGEST_SEPARATOR:
                break
            if match.end() > match.start():
                yield rest[begin : match.start()]
                begin = match.end()
        rest = rest[begin:]
    yield rest


def _jsonl(path: Path, reading: Reading) -> Iterator[str]:
    with _opened(path, reading.encoding) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                text = json.loads(line)[reading.column]
            except (ValueError, KeyError, TypeError) as error:
                raise NextLatError(
                    f"{path}, line {number} is not a JSON object with {reading.column!r}; name its --column"
                ) from error
            if not isinstance(text, str):
                raise NextLatError(f"{path}, line {number}: {reading.column!r} is {type(text).__name__}, not text")
            if SURROGATE.search(text):
                raise NextLatError(
                    f"{path}, line {number}: {reading.column!r} holds half a character, an unpaired surrogate such as "
                    "\\ud83d; remove it"
                )
            yield text


def _parquet(path: Path, column: str) -> Iterator[str]:
    arrow, parquet = text_module("pyarrow"), text_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise NextLatError(f"{path} has no column {column!r}, only {', '.join(names)}; name its --column")
            kind = file.schema_arrow.field(column).type
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                raise NextLatError(f"{path}: column {column!r} is {kind}, not text; name its --column")
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (arrow.ArrowException, OSError) as error:
        raise NextLatError(f"{path} cannot be read as parquet: {error}") from error


def hold_out(texts: Iterable[str], fraction: float) -> Iterator[tuple[str, str]]:
    """Documents with their split: ``validation`` for a fraction of them by the hash of their text.

    The order does not matter, and copies of a document go to the same split.
    """
    if not 0 <= fraction < 1:
        raise NextLatError(f"the validation fraction is {fraction}; it must be at least 0 and below 1")
    limit = int(fraction * 2**64)
    for text in texts:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        yield ("validation" if int.from_bytes(digest, "big") < limit else "train"), text


def tokenise(
    pairs: Iterable[tuple[str, str]],
    writer: ShardWriter,
    tokenizer: Tokenizer,
    workers: int = 1,
    max_tokens: int | None = None,
    counted: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Tokenise documents into a writer's shards.

    What is written does not depend on ``workers``, nor on interruptions: documents whose shards are there are not
    tokenised again. At most ``2 * workers + 2`` batches are in memory.

    Args:
        pairs: split and text of each document; for the split ``FIRST_SHARD`` see there.
        writer: open; closing and finishing it is the caller's.
        tokenizer: for all of them.
        workers: processes; 1 tokenises in this one.
        max_tokens: stop with the document that makes this many; those of damaged shards are made again in any case.
        counted: of this split alone; ``None`` counts all.
        progress: is told what was added.

    Raises:
        NextLatError: a process died, or what the writer raises.
    """
    if workers < 1:
        raise NextLatError(f"workers is {workers}; at least one process must work")

    def so_far() -> int:
        return writer.tokens.total() if counted is None else writer.tokens[counted]

    def done() -> bool:
        return max_tokens is not None and so_far() >= max_tokens and not writer.wanting(counted)

    if done():
        return
    with closing(_encoded(_batches(_missing(pairs, writer)), tokenizer, writer.settings.dtype, workers)) as encoded:
        for batch, (tokens, lengths) in encoded:
            sizes = lengths + (lengths > 0)  # with end tokens
            count = len(lengths)
            if max_tokens is not None:
                again = np.array([document.again for document in batch])
                counts = ~again & [counted in (None, document.split) for document in batch]
                before = so_far() + np.cumsum(sizes * counts) - sizes * counts
                count = next(iter(np.flatnonzero((before >= max_tokens) & ~again).tolist()), count)
            splits = [document.split for document in batch[:count]]
            _write(writer, splits, tokens[: int(lengths[:count].sum())], lengths[:count])
            if progress is not None:
                progress(count, int(sizes[:count].sum()), sum(len(document.text) for document in batch[:count]))
            if count < len(batch) or done():
                return


def _missing(pairs: Iterable[tuple[str, str]], writer: ShardWriter) -> Iterator[Document]:
    """The documents whose shards are not there yet."""
    places: Counter[str] = Counter()
    listed: Counter[str] = Counter()
    for (split, _), shard in writer.listed.items():
        listed[split] += shard.documents + shard.empty
    first = writer.listed.get(("validation", 0))
    held_out = first.documents + first.empty if first is not None else 0
    listed[FIRST_SHARD] = listed["train"] + held_out
    for split, text in pairs:
        place = places[split]
        places[split] += 1
        if split != FIRST_SHARD:
            there = writer.has(split, place)
        elif place < held_out:
            there = writer.has("validation", place)
        else:
            there = writer.has("train", place - held_out)
        if not there:
            yield Document(split, text, place < listed[split])


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Items whose second entry is a text, in lists of about as many characters."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def pieces(text: str) -> Iterator[str]:
    """A text, cut if it is long: tokenizers take hundreds of bytes of memory for a character.

    Cuts lie before single spaces, where tokenizers cut that keep a space with the word behind it, so the tokens are
    those of the whole. One that marks the beginning of a text in its own way marks pieces too.
    """
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS and (cut := WORD.search(text, begin + PIECE_CHARACTERS)):
        yield text[begin : cut.start()]
        begin = cut.start()
    yield text[begin:]


Encoded = tuple[NDArray[Any], NDArray[np.int64]]
"""Tokens of many documents one behind the other, and the tokens of each."""


def _encoded(
    batches: Iterator[list[Document]], tokenizer: Tokenizer, dtype: str, workers: int
) -> Generator[tuple[list[Document], Encoded], None, None]:
    """Batches with their tokens, in order."""
    if workers == 1:
        for batch in batches:
            yield batch, _flat(tokenizer, [document.text for document in batch], dtype)
        return
    # a forked copy of a process with threads may hang; a fresh one imports this module and little else
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (tokenizer.json, tokenizer.end_token, dtype))
    waiting: deque[tuple[list[Document], Future[Encoded]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_work, [document.text for document in batch])))
            if len(waiting) > 2 * workers:
                batch, result = waiting.popleft()
                yield batch, result.result()
        while waiting:
            batch, result = waiting.popleft()
            yield batch, result.result()
    except BrokenProcessPool as error:
        raise NextLatError("a process that tokenises died, perhaps out of memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(tokenizer: str, end_token: int, dtype: str) -> None:
    global _own
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_after, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _own = Tokenizer(text_module("tokenizers").Tokenizer.from_str(tokenizer), end_token), dtype


def _leave_after(parent: BaseProcess) -> None:
    """End this process with the one that started it, which may be killed without a chance to end it."""
    parent.join()
    os._exit(1)


_own: tuple[Tokenizer, str]


def _work(texts: list[str]) -> Encoded:
    tokenizer, dtype = _own
    return _flat(tokenizer, texts, dtype)


def _flat(tokenizer: Tokenizer, texts: list[str], dtype: str) -> Encoded:
    lengths, parts = np.zeros(len(texts), np.int64), [np.zeros(0, dtype)]
    for group in _batches((number, piece) for number, text in enumerate(texts) for piece in pieces(text)):
        found = tokenizer.encode_batch([piece for _, piece in group])
        counts = np.array([len(tokens) for tokens in found], np.int64)
        np.add.at(lengths, [number for number, _ in group], counts)
        parts.append(np.fromiter(chain.from_iterable(found), dtype, int(counts.sum())))
    return np.concatenate(parts), lengths


def _write(writer: ShardWriter, splits: list[str], tokens: NDArray[Any], lengths: NDArray[np.int64]) -> None:
    if splits and splits[0] == FIRST_SHARD:
        done, ends = 0, lengths.cumsum()
        while done < len(splits) and ("validation", 0) not in writer.good:
            writer.add("validation", tokens[ends[done] - lengths[done] : ends[done]])
            done += 1
        writer.extend("train", tokens[int(lengths[:done].sum()) :], lengths[done:])
        return
    names = np.array(splits)
    for split in dict.fromkeys(splits):
        chosen = names == split
        writer.extend(split, tokens[np.repeat(chosen, lengths)], lengths[chosen])


def sample(pairs: Iterable[tuple[str, str]], characters: int) -> list[str]:
    """The first documents that are not held out, about this many characters, to train a tokenizer on."""
    texts: list[str] = []
    for split, text in pairs:
        if split != "validation":
            texts += pieces(text[: max(characters, PIECE_CHARACTERS)])
            characters -= len(text)
            if characters <= 0:
                break
    if not texts:
        raise NextLatError("there are no documents to train a tokenizer on; give more text")
    return texts
