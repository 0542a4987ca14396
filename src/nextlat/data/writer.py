"""Writing token shards, so that an interruption costs one unfinished shard and a damaged one can be made again."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nextlat.data.manifest import MANIFEST, TOKENIZER, UNFINISHED, Manifest, Shard, complaint, read_manifest
from nextlat.errors import NextLatError
from nextlat.files import explained, sync_folder, write_json

if TYPE_CHECKING:
    from nextlat.data.tokenizer import Tokenizer


class ShardWriter:
    """Writes documents into shards, and goes on where an interrupted one stopped.

    A shard ends with the document that fills it. It is written aside, synchronised and renamed, then noted in
    ``unfinished.json``; :meth:`finish` turns that into ``manifest.json``. Opened on a folder that has shards already,
    good ones are kept (their sha256 is compared): ask :meth:`has` before making a document's tokens, and leave it out
    if its shard is there.

    Args:
        out: the folder; is made.
        vocab_size: V.
        end_token: opens every document and occurs nowhere else.
        shard_tokens: tokens that fill a shard.
        tokenizer: is stored beside the shards.
        source: where the documents come from; a folder goes on only with the same.
        command: makes the folder; shown in errors.
        looked_at: is told each shard that was there when it has been read and compared.

    Raises:
        NextLatError: the folder was made with other settings.
    """

    def __init__(
        self,
        out: Path,
        vocab_size: int,
        end_token: int,
        shard_tokens: int,
        tokenizer: Tokenizer | None = None,
        source: dict[str, Any] | None = None,
        command: str = "",
        looked_at: Callable[[Shard], None] | None = None,
    ) -> None:
        if shard_tokens < 1:
            raise NextLatError(f"shard_tokens is {shard_tokens}; a shard needs at least 1")
        if not 0 <= end_token < vocab_size <= 2**32:
            raise NextLatError(f"end_token is {end_token} of {vocab_size} tokens; it must be one of at most 2**32")
        self.out = out
        self.settings = Manifest(
            vocab_size=vocab_size,
            end_token=end_token,
            dtype="<u2" if vocab_size <= 2**16 else "<u4",
            shard_tokens=shard_tokens,
            tokenizer=None if tokenizer is None else TOKENIZER,
            tokenizer_sha256=None if tokenizer is None else tokenizer.hash,
            source=source or {},
            command=command,
            splits=[],
            shards=[],
        )
        with explained("making", out):
            out.mkdir(parents=True, exist_ok=True)
        before = self._before()
        self.splits: list[str] = [] if before is None else list(before.splits)
        """Splits that were whole when the folder was opened."""
        self.listed: dict[tuple[str, int], Shard] = {}
        """Shards an earlier writer finished."""
        self.good: dict[tuple[str, int], Shard] = {}
        """Shards that are on the disk as they should be."""
        self.damaged: list[str] = []
        numbers: dict[str, int] = {}
        for shard in [] if before is None else before.shards:
            number = numbers.setdefault(shard.split, 0)
            numbers[shard.split] += 1
            self.listed[shard.split, number] = shard
            wrong = complaint(out, shard, verify=True)
            if wrong is None:
                self.good[shard.split, number] = shard
            else:
                self.damaged.append(wrong)
            if looked_at is not None:
                looked_at(shard)
        self.tokens: Counter[str] = Counter()
        """Tokens of each split: of listed shards, damaged ones too, and of what was added behind them."""
        for (split, _), shard in self.listed.items():
            self.tokens[split] += shard.tokens
        self._spans: dict[str, list[list[int]]] = {}  # places of the documents whose shards are good
        for split in numbers:
            self._spans[split] = []
            place = 0
            for number in range(numbers[split]):
                shard = self.listed[split, number]
                begin, place = place, place + shard.documents + shard.empty
                if (split, number) in self.good:
                    if self._spans[split] and self._spans[split][-1][1] == begin:
                        self._spans[split][-1][1] = place
                    else:
                        self._spans[split].append([begin, place])
        self._open: dict[str, _OpenShard] = {}
        if tokenizer is not None:
            tokenizer.save(out / TOKENIZER)

    def _before(self) -> Manifest | None:
        present = [self.out / name for name in (UNFINISHED, MANIFEST) if (self.out / name).is_file()]
        if not present:
            return None
        before = read_manifest(present[0])
        old, new = before.identity, self.settings.identity
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if changed:
            told = "; ".join(f"{key} was {_short(old.get(key))} and is now {_short(new.get(key))}" for key in changed)
            raise NextLatError(f"{self.out} was made with other settings: {told}; choose another folder, or delete it")
        return before

    def wanting(self, split: str | None = None) -> bool:
        """Whether a listed shard, of this split or of any, has to be made again."""
        return any(key not in self.good for key in self.listed if split in (None, key[0]))

    def complete(self, split: str) -> bool:
        """Whether a split was whole when the folder was opened, and still is."""
        return split in self.splits and not self.wanting(split)

    def has(self, split: str, place: int) -> bool:
        """Whether the shard of a document is there already, by the document's place in its split."""
        return any(begin <= place < end for begin, end in self._spans.get(split, ()))

    def add(self, split: str, tokens: ArrayLike) -> None:
        """Write one document, without end tokens."""
        document = np.asarray(tokens)
        if document.ndim != 1 or (document.size and document.dtype.kind not in "iu"):
            raise NextLatError(f"a document is a list of token ids, not {document.ndim}-dimensional {document.dtype}")
        self.extend(split, document, [len(document)])

    def extend(self, split: str, tokens: NDArray[Any], lengths: ArrayLike) -> None:
        """Write many documents.

        Args:
            split: what they are for.
            tokens: (N,) all of them one behind the other, without end tokens.
            lengths: (n,) tokens of each; empty ones are left out and counted.

        Raises:
            NextLatError: a token that is not in the vocabulary, an end token, or a full disk.
        """
        sizes = np.asarray(lengths, np.int64)
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= self.settings.vocab_size):
            worst = tokens.min() if tokens.min() < 0 else tokens.max()
            raise NextLatError(f"a document holds token {worst}; ids run from 0 to {self.settings.vocab_size - 1}")
        if (tokens == self.settings.end_token).any():
            raise NextLatError(
                f"a document holds the end token {self.settings.end_token}; leave end tokens out, they are added"
            )
        ends = sizes.cumsum()
        first = 0
        while first < len(sizes):
            shard = self._current(split)
            begin = int(ends[first] - sizes[first])
            # a document takes one place more than its tokens, for the end token that opens it
            filled = shard.tokens + ends[first:] - begin + np.cumsum(sizes[first:] > 0)
            stop = min(first + int(np.searchsorted(filled, self.settings.shard_tokens)) + 1, len(sizes))
            real = sizes[first:stop][sizes[first:stop] > 0]
            opened = np.insert(tokens[begin : ends[stop - 1]], real.cumsum() - real, self.settings.end_token)
            shard.write(opened.astype(self.settings.dtype), len(real), stop - first - len(real))
            if (split, shard.number) not in self.listed:
                self.tokens[split] += len(opened)
            if shard.tokens >= self.settings.shard_tokens:
                self._close(split)
            first = stop

    def _current(self, split: str) -> _OpenShard:
        if split not in self._open:
            number = 0
            while (split, number) in self.good:
                number += 1
            self._open[split] = _OpenShard(self.out, split, number)
        return self._open[split]

    def _close(self, split: str) -> None:
        shard = self._open[split]
        key = split, shard.number
        listed = self.listed.get(key)
        if listed is not None and listed != shard.record():
            raise NextLatError(
                f"{shard.path} could not be repaired: the documents are not those it was made of; "
                f"delete {self.out} and make it again"
            )
        shard.finish()
        del self._open[split]
        self.good[key] = shard.record()
        self._note(UNFINISHED)

    def _note(self, name: str) -> None:
        known = self.listed | self.good
        shards = [known[key] for key in sorted(known)]
        write_json(
            self.out / name, self.settings.model_copy(update={"splits": self.splits, "shards": shards}).model_dump()
        )

    def finish(self, *splits: str) -> None:
        """Close the last shards and write the manifest; these splits are whole.

        Raises:
            NextLatError: a split without documents, or a damaged shard that was not repaired.
        """
        for split in list(self._open):
            self._close(split)
        for split in splits:
            if (split, 0) not in self.good:
                count = sum(shard.documents for shard in self.good.values())
                raise NextLatError(
                    f"none of the {count} documents is in split {split!r}; cut files into more documents (--per-line, "
                    "--separator), give more text or smaller shards (--shard-tokens), or another part to hold out"
                )
        missing = [shard.file for key, shard in self.listed.items() if key not in self.good]
        if missing:
            raise NextLatError(
                f"{', '.join(missing)} in {self.out} could not be repaired: too few documents came; delete the folder "
                "and make it again"
            )
        self.splits += [split for split in splits if split not in self.splits]
        self._note(MANIFEST)
        (self.out / UNFINISHED).unlink(missing_ok=True)
        sync_folder(self.out)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the shards that are still being written; finished ones stay."""
        for shard in self._open.values():
            shard.abandon()
        self._open.clear()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


class _OpenShard:
    """A shard that is being written, aside."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self.split, self.number = split, number
        self.path = folder / f"{split}-{number:06d}.bin"
        self._aside = self.path.with_name(f".{self.path.name}.part")
        self.tokens = self.documents = self.empty = self.bytes = 0
        self._hash = hashlib.sha256()
        with explained("writing", self._aside):
            self._file = self._aside.open("wb")

    def write(self, tokens: NDArray[Any], documents: int, empty: int) -> None:
        data = tokens.tobytes()
        with explained("writing", self.path):
            self._file.write(data)
        self._hash.update(data)
        self.tokens += len(tokens)
        self.bytes += len(data)
        self.documents += documents
        self.empty += empty

    def record(self) -> Shard:
        return Shard(
            file=self.path.name,
            split=self.split,
            tokens=self.tokens,
            documents=self.documents,
            empty=self.empty,
            bytes=self.bytes,
            sha256=self._hash.hexdigest(),
        )

    def finish(self) -> None:
        with explained("writing", self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._aside, self.path)
            sync_folder(self.path.parent)

    def abandon(self) -> None:
        with suppress(OSError):  # what is left in its buffer may not fit on a full disk, and is not wanted
            self._file.close()
        self._aside.unlink(missing_ok=True)
