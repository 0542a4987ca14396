"""Language modelling on packed text: TinyStories and FineWeb-Edu, or whatever text is at hand.

Nothing is downloaded here. A folder of token shards comes from ``nextlat data``; generated stories and text that lies
on this machine are tokenised on first use into a folder that later runs find again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from nextlat.batch import IGNORE, Batch
from nextlat.data.corpora import CORPORA, find_corpus
from nextlat.data.synthstories import FACTS, SLOTS, Story, stories
from nextlat.errors import NextLatError
from nextlat.files import explained, locked
from nextlat.options import Options
from nextlat.tasks.base import Passages

if TYPE_CHECKING:
    from nextlat.data.rows import TokenRows
    from nextlat.data.shards import ShardedTokens
    from nextlat.data.tokenizer import Tokenizer

TRAINED_END, BYTES_END = 1, 256
"""End tokens of tokenizers that are trained here, and of bytes."""
BYTES = 257
"""A vocabulary of this size is the bytes and an end token."""
LESSON = 5_000_000
"""Characters that a tokenizer is trained on."""
SHARD_TOKENS = 50_000_000
FORMAT = 1
"""Raised when the same options make other tokens."""
BATCH_OF_EVALUATION = 100


class TextOptions(Options):
    """The ``data:`` section of a text configuration."""

    source: str = Field(description="stories, python, pydoc, licences, fortunes, or a folder made by nextlat data")
    length: int = Field(256, ge=2, description="tokens T of a row")
    vocab_size: int = Field(1000, ge=2, description="tokens V; 257 is bytes")
    end_token: int | None = Field(None, ge=0, description="of a folder's tokens; null for text that is tokenised here")
    stories: int = Field(20_000, ge=1, description="generated stories to train on")
    validation_stories: int = Field(2000, ge=1, description="generated stories held out")
    validation_share: float = Field(0.05, gt=0, lt=1, description="documents of local text held out")
    validation_rows: int | None = Field(None, ge=1, description="held-out rows at most; null is all")
    folder: str = Field("data", description="where text is tokenised to, once for all runs")
    seed: int = Field(0, ge=0, lt=2**64, description="seed of the stories; the run's seed orders the rows")

    @property
    def made_here(self) -> bool:
        """Whether the tokens are made on first use rather than by ``nextlat data``."""
        return self.source == "stories" or self.source in CORPORA

    @model_validator(mode="after")
    def _whole(self) -> TextOptions:
        if not self.made_here and self.end_token is None:
            raise ValueError(
                f"source {self.source!r} is a folder of tokens; set data.end_token to its end token (50256 for GPT-2's "
                f"tokenizer), or choose a source that is tokenised here: stories, {', '.join(CORPORA)}"
            )
        if self.made_here and self.end_token is not None:
            raise ValueError(
                f"end_token is {self.end_token}; {self.source} is tokenised here, leave data.end_token out"
            )
        if self.end_token is not None and self.end_token >= self.vocab_size:
            raise ValueError(f"end_token is {self.end_token}; it must be below data.vocab_size = {self.vocab_size}")
        return self


class TinyStories:
    """Packed text, ``T`` tokens a row.

    The end token opens a document and is the target of the last token of the one before. Rows are cut from the
    stream of all documents, so they may begin and stop inside one; an epoch shows each of them once, in an order that
    depends on the run's seed and the epoch.

    Args:
        options: the data options.
        seed: the run's seed; orders the rows.
        batch_size: global rows of a step.
    """

    Options = TextOptions
    next_token = True
    headline = "cross_entropy"
    splits = ("validation", "train")
    name: ClassVar[str] = "tiny_stories"

    def __init__(self, options: TextOptions, seed: int, batch_size: int) -> None:
        self.options, self.seed, self.batch_size = options, seed, batch_size
        self.vocab_size, self.sequence_length = options.vocab_size, options.length
        here = BYTES_END if options.vocab_size == BYTES else TRAINED_END
        self.end_token: int | None = here if options.end_token is None else options.end_token
        self.slots: tuple[str, ...] = SLOTS if options.source == "stories" else ()
        self.facts = {name: len(values) for name, values in FACTS.items()} if self.slots else {}

    @property
    def place(self) -> Path:
        """The folder that holds, or will hold, the tokens."""
        options = self.options
        if not options.made_here:
            return Path(options.source)
        made_of: dict[str, Any] = {"format": FORMAT, "source": options.source, "vocab_size": options.vocab_size}
        if options.source == "stories":
            made_of |= {key: getattr(options, key) for key in ("stories", "validation_stories", "seed")}
        else:
            made_of |= {"version": CORPORA[options.source].version, "validation_share": options.validation_share}
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
        return Path(options.folder) / f"{options.source}-{digest}"

    @property
    def ready(self) -> bool:
        """Whether the tokens are there."""
        return (self.place / "manifest.json").is_file()

    @cached_property
    def shards(self) -> ShardedTokens:
        """The tokens; made on first use where they can be made here.

        Raises:
            NextLatError: a folder that is not there, or holds other tokens than the configuration says.
        """
        from nextlat.data.shards import ShardedTokens

        if not self.ready:
            if not self.options.made_here:
                raise NextLatError(
                    f"there are no tokens in {self.place}; make them with `nextlat data {self.name} --out {self.place}`"
                    ", or use text of this machine: data.source=stories data.end_token=null data.vocab_size=1000"
                )
            self._make()
        shards = ShardedTokens.open(self.place)
        for key, found, wanted in (
            ("vocab_size", shards.vocab_size, self.vocab_size),
            ("end_token", shards.end_token, self.end_token),
        ):
            if found != wanted:
                raise NextLatError(f"data.{key} is {wanted} and {self.place} has {found}; set data.{key}={found}")
        if lacking := set(self.splits) - set(shards.splits):
            raise NextLatError(f"{self.place} has no split {lacking.pop()}; make it again with a part that is held out")
        return shards

    def _make(self) -> None:
        """Tokenise into a folder aside and rename it; a second process waits and finds it there."""
        place = self.place
        with locked(place.parent):
            if self.ready:
                return
            for left in place.parent.glob(f".{place.name}.*"):  # of a process that was killed: we hold the lock
                shutil.rmtree(left)
            print(f"making {place}, once for all runs", file=sys.stderr, flush=True)
            aside = place.with_name(f".{place.name}.{os.getpid()}")
            try:
                self._write(aside)
                with explained("making", place):
                    os.rename(aside, place)
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    def _write(self, out: Path) -> None:
        from nextlat.data.command import tokenising
        from nextlat.data.text import sample, tokenise
        from nextlat.data.tokenizer import byte_tokenizer, train_bpe
        from nextlat.data.writer import ShardWriter

        options = self.options
        if self.vocab_size == BYTES:
            tokenizer = byte_tokenizer()
        else:
            alphabet: Literal["ascii", "bytes"] = "ascii" if options.source == "stories" else "bytes"
            tokenizer = train_bpe(sample(self._documents(), LESSON), self.vocab_size, alphabet)
        assert tokenizer.end_token == self.end_token
        command = f"delete {self.place} and train again"
        source = options.model_dump(mode="json")
        with ShardWriter(out, self.vocab_size, tokenizer.end_token, SHARD_TOKENS, tokenizer, source, command) as writer:
            with tokenising() as add:
                tokenise(self._documents(), writer, tokenizer, progress=add)
            writer.finish("train", "validation")

    def _documents(self) -> Iterator[tuple[str, str]]:
        """Split and text of every document."""
        from nextlat.data.text import hold_out

        if self.options.source != "stories":
            yield from hold_out(find_corpus(self.options.source).documents(), self.options.validation_share)
            return
        for split in ("validation", "train"):
            for story in stories(self.options.seed, *self._numbers(split)):
                yield split, story.text

    def _numbers(self, split: str) -> tuple[int, int]:
        """First and last (exclusive) number of a split's stories; those held out come first."""
        held_out = self.options.validation_stories
        return (0, held_out) if split == "validation" else (held_out, held_out + self.options.stories)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens."""
        return self.shards.tokenizer()

    @cached_property
    def _train(self) -> TokenRows:
        from nextlat.data.rows import TokenRows

        return TokenRows(self.shards, "train", self.options.length, self.seed)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows of the global batch of a step."""
        return self._train.batch(step * self.batch_size + start, step * self.batch_size + stop)

    def evaluation(self, split: str = "validation") -> Iterable[Batch]:
        """Rows of a split in the order of the files; of ``train`` as many as are held out."""
        from nextlat.data.rows import TokenRows

        rows, held_out = (TokenRows(self.shards, name, self.options.length, None) for name in (split, "validation"))
        count = min(
            rows.rows_per_epoch, held_out.rows_per_epoch, self.options.validation_rows or held_out.rows_per_epoch
        )
        for start in range(0, count, BATCH_OF_EVALUATION):
            yield rows.batch(start, min(start + BATCH_OF_EVALUATION, count))

    def stand_in(self, rows: int) -> Batch:
        """Random tokens in one document a row."""
        length = self.sequence_length + 1
        stream = torch.randint(self.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
        return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), torch.zeros(rows, length - 1).long())

    def bytes_of(self, tokens: Tensor) -> int:
        """UTF-8 bytes of the text that tokens stand for; end tokens stand for none."""
        written = tokens[tokens != self.end_token].tolist()
        return len(self.tokenizer.decode(written).encode())

    def passages(self, split: str, count: int) -> Passages:
        """The first stories of a split, one a row.

        Raises:
            NextLatError: nothing is known of this text.
        """
        if not self.slots:
            raise NextLatError(f"nothing is known of the facts of {self.options.source}; use data.source=stories")
        first, last = self._numbers(split)
        told = list(stories(self.options.seed, first, min(last, first + count)))
        return self.lay_out(told)

    def lay_out(self, told: Sequence[Story]) -> Passages:
        """Stories one a row, from their opening end token on."""
        end, length = self.end_token, self.options.length
        assert end is not None
        n = len(told)
        # words are cut before spaces, so a story's tokens are those of its slots, each with the space before it
        texts = [story.text[max(begin - 1, 0) : stop] for story in told for begin, stop in story.spans]
        parts = self.tokenizer.encode_batch(texts)
        sizes = np.array([len(part) for part in parts]).reshape(n, len(SLOTS))
        tokens = np.full((n, length + 1), end, np.int64)
        slots = np.full((n, length), -1, np.int64)
        documents = np.full((n, length), -1, np.int64)
        last = sizes.cumsum(1)  # the opening end token is at 0, so a slot's last token is at its running sum
        for row in range(n):
            text = np.concatenate(parts[row * len(SLOTS) : (row + 1) * len(SLOTS)])
            kept = min(len(text), length)
            tokens[row, 1 : kept + 1] = text[:kept]
            slots[row, 1:][:kept] = np.repeat(np.arange(len(SLOTS)), sizes[row])[: length - 1][:kept]
            documents[row, : len(text) + 1] = 0
        targets = np.where(documents == 0, tokens[:, 1:], IGNORE)
        ends = np.where(last < length, last, -1)
        batch = Batch(*(torch.from_numpy(part) for part in (tokens[:, :-1].copy(), targets, documents)))
        facts = np.array([story.facts for story in told])
        nats = np.array([story.nats for story in told])
        return Passages(batch, *(torch.from_numpy(part) for part in (slots, ends, facts, nats)))

    def description(self) -> dict[str, Any]:
        """Sizes, and what fixes the tokens."""
        shards = self.shards
        facts = {"data": str(self.place), "train_tokens": shards.tokens("train")}
        facts |= {"validation_tokens": shards.tokens("validation")}
        digest = hashlib.sha256("".join(shard.sha256 for shard in shards.manifest.shards).encode()).hexdigest()
        return {**facts, "tokenizer_sha256": shards.manifest.tokenizer_sha256, "data_sha256": digest}


class FineWebEdu(TinyStories):
    """Packed web text; the same rows as :class:`TinyStories`."""

    name: ClassVar[str] = "fineweb_edu"
