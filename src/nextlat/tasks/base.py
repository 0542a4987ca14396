"""What a benchmark is: rows that are pure functions of their number, prompts, and a way to score answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

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


class Task(Protocol):
    """A benchmark."""

    vocab_size: int
    sequence_length: int
    end_token: int | None
    next_token: bool
    """False in tagging tasks, where targets are not the shifted tokens; generation and bst refuse them."""

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` of the global batch of a step: a pure function of (seed, step, row)."""
        ...

    def evaluation(self, split: str) -> Iterable[Batch]:
        """Held-out batches with the targets of training."""
        ...

    def prompts(self, split: str) -> Prompts:
        """What is to be answered on a split."""
        ...

    def score(self, outputs: Outputs) -> dict[str, Metric]:
        """Metrics of the answers, each with its interval and chance level."""
        ...

    def description(self) -> dict[str, Any]:
        """Facts about the data for the run's records: sizes, chance level."""
        ...
