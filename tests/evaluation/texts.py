"""Tasks of text and models of it that are made by hand, so that what is measured is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.batch import Batch
from nextlat.model.interfaces import LMOutput
from nextlat.tasks.base import Passages

STREAM_ROWS = 64


class Stream:
    """Rows cut from one stream of tokens; a document begins at each end token."""

    headline = "cross_entropy"
    splits = ("validation", "train")
    next_token = True
    ready = True

    def __init__(self, stream: Tensor, length: int, vocab_size: int, end_token: int | None = 0) -> None:
        self.stream, self.sequence_length = stream, length
        self.vocab_size, self.end_token = vocab_size, end_token
        self.slots: tuple[str, ...] = ()
        self.facts: dict[str, int] = {}
        self.asked: list[tuple[int, int, int]] = []

    def whole(self) -> Batch:
        rows = (len(self.stream) - 1) // self.sequence_length
        tokens = self.stream[: rows * self.sequence_length].view(rows, -1)
        targets = self.stream[1 : rows * self.sequence_length + 1].view(rows, -1)
        opens = tokens == (-1 if self.end_token is None else self.end_token)
        opens[:, 0] = False
        return Batch(tokens, targets, opens.long().cumsum(1))

    def rows(self, step: int, start: int, stop: int) -> Batch:
        self.asked.append((step, start, stop))
        whole = self.whole()
        index = torch.arange(step * 8 + start, step * 8 + stop) % len(whole.tokens)
        return Batch(whole.tokens[index], whole.targets[index], whole.documents[index])  # type: ignore[index]

    def evaluation(self, split: str) -> Iterable[Batch]:
        whole = self.whole()
        for start in range(0, len(whole.tokens), STREAM_ROWS):
            yield whole.rows(start, start + STREAM_ROWS)

    def bytes_of(self, tokens: Tensor) -> int:
        return 3 * int((tokens != self.end_token).sum())

    def passages(self, split: str, count: int) -> Passages:
        raise NotImplementedError

    def stand_in(self, rows: int) -> Batch:
        return self.rows(0, 0, rows)

    def description(self) -> dict[str, Any]:
        return {}


class States:
    """A model whose state is a function of the tokens and documents, and whose next-token law is uniform."""

    def __init__(self, states: Callable[[Tensor, Tensor | None], Tensor], vocab_size: int) -> None:
        self.states, self.vocab_size = states, vocab_size

    def new_cache(self, rows: int, capacity: int) -> Any:
        raise NotImplementedError

    def __call__(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
    ) -> LMOutput:
        states = self.states(tokens, documents)
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        return LMOutput(logits, torch.full_like(states, torch.nan), probe_state=states)


def constant(tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Nothing is remembered."""
    return torch.ones(*tokens.shape, 1)


def last_token(vocab_size: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The token just read, one-hot."""
    return lambda tokens, documents=None: F.one_hot(tokens, vocab_size).float()


def window(vocab_size: int, width: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The last ``width`` tokens, one-hot beside each other; zero before the row."""

    def states(tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        parts = [
            F.pad(F.one_hot(tokens[:, : tokens.shape[1] - back], vocab_size), (0, 0, back, 0)) for back in range(width)
        ]
        return torch.cat(parts, -1).float()

    return states
