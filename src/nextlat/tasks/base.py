"""What a benchmark is: rows that are pure functions of their number, and what its held-out part is good for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from nextlat.batch import Batch
from nextlat.statistics import Metric


class Prompts(NamedTuple):
    """What to answer, all rows of equal length."""

    tokens: Tensor
    """(n, P) int64 prompts."""
    answers: Tensor
    """(n, L) int64 true answers."""
    forced: Tensor
    """(n, P + L) int64 what teacher-forced evaluation reads; the logits at P-1 ... P+L-2 answer it."""
    parallel: bool = False
    """All answer tokens are read off one forward pass over ``forced`` instead of one after the other."""


class Outputs(NamedTuple):
    """What a model did with the prompts."""

    greedy: Tensor
    """(n, L) tokens, the most likely one at each step."""
    sampled: Tensor
    """(n, L) tokens, drawn at temperature 1."""
    forced_logits: Tensor
    """(n, L, V) logits with the true answer as input."""
    prompts: Prompts


class Passages(NamedTuple):
    """Held-out texts with known facts, one a row from its first token on, cut or padded to the row."""

    batch: Batch
    """(n, T) rows; ``documents`` is 0 on the text and -1 on padding."""
    slots: Tensor
    """(n, T) int64, which slot each token is of; -1 on the opening token and on padding."""
    ends: Tensor
    """(n, S) int64, position of the last token of each slot; -1 where the row is too short to hold it."""
    facts: Tensor
    """(n, F) int64, the value of each fact."""
    nats: Tensor
    """(n, S) float64, what each slot costs a reader who knows how the texts are made."""


@runtime_checkable
class Task(Protocol):
    """A benchmark."""

    vocab_size: int
    sequence_length: int
    end_token: int | None
    next_token: bool
    """False in tagging tasks, where targets are not the shifted tokens; generation and bst refuse them."""
    headline: str
    """The evaluation that is made while training; its first metric ranks checkpoints."""
    splits: tuple[str, ...]
    """What ``evaluation`` knows, the held-out one first."""

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` of the global batch of a step: a pure function of (seed, step, row)."""
        ...

    def evaluation(self, split: str) -> Iterable[Batch]:
        """Held-out batches with the targets of training."""
        ...

    def description(self) -> dict[str, Any]:
        """Facts about the data for the run's records: sizes, chance level."""
        ...


@runtime_checkable
class Prompted(Task, Protocol):
    """A benchmark that asks for answers: its headline is ``accuracy``."""

    def prompts(self, split: str) -> Prompts:
        """What is to be answered on a split."""
        ...

    def score(self, outputs: Outputs) -> dict[str, Metric]:
        """Metrics of the answers, each with its interval and chance level."""
        ...


@runtime_checkable
class Textual(Task, Protocol):
    """A benchmark of running text: its headline is ``cross_entropy``."""

    slots: tuple[str, ...]
    """The parts of texts with known facts, in their order; empty where nothing is known of texts."""
    facts: dict[str, int]
    """Names of the facts and how many values each has."""
    ready: bool
    """Whether the tokens are there, so that nothing has to be made before the first row."""

    def bytes_of(self, tokens: Tensor) -> int:
        """UTF-8 bytes that tokens stand for; end tokens stand for none."""
        ...

    def passages(self, split: str, count: int) -> Passages:
        """The first texts of a split with what is known of them."""
        ...

    def stand_in(self, rows: int) -> Batch:
        """Rows of the right shape made of nothing, for timing a model before its data are there."""
        ...
