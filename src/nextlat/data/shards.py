"""Token shards: documents one behind the other in a few large files, read without loading them.

A folder holds, for each split, ``<split>-000000.bin``, ``<split>-000001.bin``, ...: raw little-endian uint16 (uint32
for more than 65,536 tokens), nothing else, so that a file's size follows from its tokens, a file can be written
before its length is known, and every language can map it. Each document begins with the end token. ``manifest.json``
says what must be there and is written last: a folder without one is not finished.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nextlat.data.manifest import MANIFEST, UNFINISHED, Manifest, Shard, complaint, complaints, read_manifest
from nextlat.data.writer import ShardWriter
from nextlat.errors import NextLatError, unknown
from nextlat.files import explained, locked

if TYPE_CHECKING:
    from nextlat.data.tokenizer import Tokenizer

T = TypeVar("T")

OPEN_SHARDS = 256
"""Shards mapped at a time: each map holds a file descriptor, and a corpus may have thousands of shards."""


class ShardedTokens:
    """Tokens in shards, memory-mapped; made by :meth:`open`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.vocab_size, self.end_token, self.splits = manifest.vocab_size, manifest.end_token, manifest.splits
        self._shards = {split: [s for s in manifest.shards if s.split == split] for split in manifest.splits}
        self._bounds = {  # (shards + 1,) where each shard begins in its split, and the split's tokens
            split: np.concatenate([[0], np.cumsum([s.tokens for s in shards], dtype=np.int64)]).astype(np.int64)
            for split, shards in self._shards.items()
        }
        self._map = lru_cache(OPEN_SHARDS)(self._map_file)
        self._verified: set[str] = set()

    @classmethod
    def open(
        cls, folder: Path | str, verify: bool = False, looked_at: Callable[[Shard], None] | None = None
    ) -> ShardedTokens:
        """Open a folder that is whole.

        Args:
            folder: with ``manifest.json``.
            verify: read every file and compare its sha256 now; without it names and sizes are compared, and each
                shard's sha256 when it is read first.
            looked_at: is told each shard when that is done.

        Raises:
            NextLatError: no manifest, or files that are missing, of a wrong size or damaged: each by name, with the
                command that repairs them.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            if (folder / UNFINISHED).is_file():
                raise NextLatError(f"{folder} is not finished; {read_manifest(folder / UNFINISHED).repair}")
            raise NextLatError(f"there is no {folder / MANIFEST}; make a folder of tokens with `nextlat data`")
        manifest = read_manifest(folder / MANIFEST)
        wrong = complaints(folder, manifest.shards, verify, looked_at)
        if manifest.tokenizer is not None:
            path = folder / manifest.tokenizer
            if not path.is_file():
                wrong.append(f"{path} is missing")
            elif hashlib.sha256(path.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
                wrong.append(f"{path} is not the tokenizer that made the tokens")
        if wrong:
            more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise NextLatError("; ".join(wrong[:8]) + more + f"; {manifest.repair}")
        shards = cls(folder, manifest)
        if verify:
            shards._verified.update(shard.file for shard in manifest.shards)
        return shards

    def tokens(self, split: str) -> int:
        """How many tokens a split has, end tokens counted."""
        return int(self._split(self._bounds, split)[-1])

    def documents(self, split: str) -> int:
        """How many documents a split has."""
        return sum(shard.documents for shard in self._split(self._shards, split))

    def read(self, split: str, begins: ArrayLike, length: int) -> NDArray[np.int64]:
        """Tokens from some places of a split on, as if its shards were one file.

        Args:
            split: one of ``splits``.
            begins: (B,) places.
            length: tokens to read from each.

        Returns:
            (B, length); end tokens after the last token of the split.

        Raises:
            NextLatError: an unknown split, a place outside it, or a damaged shard.
        """
        bounds = self._split(self._bounds, split)
        starts = np.atleast_1d(np.asarray(begins, np.int64))
        if len(starts) and (starts.min() < 0 or starts.max() >= bounds[-1]):
            raise NextLatError(f"a place outside 0 to {bounds[-1] - 1} of split {split!r} was asked for")
        found = np.full((len(starts), length), self.end_token, np.int64)
        for row, begin in zip(found, starts.tolist(), strict=True):
            place = 0
            shard = int(np.searchsorted(bounds, begin, "right")) - 1
            while place < length and shard < len(bounds) - 1:
                part = self._map(split, shard)[begin + place - int(bounds[shard]) :][: length - place]
                row[place : place + len(part)] = part
                place += len(part)
                shard += 1
        return found

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            NextLatError: the folder was written without one.
        """
        from nextlat.data.tokenizer import load_tokenizer

        if self.manifest.tokenizer is None:
            raise NextLatError(f"{self.folder} holds tokens that were written without a tokenizer")
        return load_tokenizer(self.folder / self.manifest.tokenizer, self.end_token)

    def _map_file(self, split: str, number: int) -> NDArray[Any]:
        shard = self._shards[split][number]
        path = self.folder / shard.file
        if shard.file not in self._verified:
            if wrong := complaint(self.folder, shard, verify=True):
                raise NextLatError(f"{wrong}; {self.manifest.repair}")
            self._verified.add(shard.file)
        with explained("reading", path):
            return np.memmap(path, self.manifest.dtype, "r")

    def _split(self, table: dict[str, T], split: str) -> T:
        if split not in table:
            raise unknown("split", split, table)
        return table[split]


def write_shards(
    documents: Iterable[Sequence[int] | NDArray[Any]],
    out: Path,
    *,
    vocab_size: int,
    end_token: int,
    tokenizer: Tokenizer | None = None,
    split: str = "train",
    shard_tokens: int = 100_000_000,
    source: dict[str, Any] | None = None,
    command: str = "",
) -> ShardedTokens:
    """Write documents as one split of a folder; other splits that are there stay.

    A split that is whole already is left as it is and ``documents`` is not read; one that was interrupted goes on
    after its finished shards, so the same documents must come in the same order.

    Args:
        documents: token ids without end tokens.
        out: the folder.
        vocab_size: V; up to 65,536 tokens are stored in 2 bytes each, more in 4.
        end_token: is put before every document.
        tokenizer: is stored beside the shards.
        split: its name.
        shard_tokens: a shard ends with the document that reaches this many.
        source: what the documents are; the folder's splits must agree.
        command: that makes the folder; shown when it has to be repaired.

    Returns:
        The folder, open.

    Raises:
        NextLatError: the folder was made with other settings, or another process is writing to it.
    """
    with (
        locked(out, wait=False),
        ShardWriter(out, vocab_size, end_token, shard_tokens, tokenizer, source, command) as writer,
    ):
        if not writer.complete(split):
            for place, document in enumerate(documents):
                if not writer.has(split, place):
                    writer.add(split, document)
            writer.finish(split)
    return ShardedTokens.open(out)
