"""On CUDA, all draft steps of a round as one graph: their kernels are launched together and not one by one.

A draft step is a handful of small kernels, which a GPU finishes faster than Python launches them. A graph is recorded
once for a number of rows and replayed on its own buffers afterwards. Greedy drafts of a fixed length only: any other
policy, and any draw, looks at a token before the next one is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nextlat.model.interfaces import Drafter, LMOutput

WARMUP = 3
"""Rollouts before one is recorded: libraries choose their kernels and allocate workspaces in the first."""


def roll(drafter: Drafter, state: Any, token: Tensor, length: int) -> Tensor:
    """(B, length) the drafter's most likely tokens behind the known (B,) ones, each fed to the next step."""
    made = []
    for _ in range(length):
        state, logits = drafter.step(state, token)
        column = logits.argmax(-1)
        token = column if drafter.vocabulary is None else drafter.vocabulary[column]
        made.append(token)
    return torch.stack(made, 1)


class Graphed:
    """A drafter whose greedy rollouts are CUDA graphs; anywhere else, and in all else, the drafter as it is.

    Weights are read where they lie when a rollout is recorded: make it anew if a model is moved.

    Args:
        drafter: of an objective whose drafting state is one tensor, as nextlat's is; others stay without graphs.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.max_length, self.vocabulary = drafter.max_length, drafter.vocabulary
        self._recorded: dict[int, Recorded] = {}

    def observe(self, output: LMOutput, accepted: Tensor) -> Any:
        """As the drafter does."""
        return self.drafter.observe(output, accepted)

    def step(self, state: Any, token: Tensor) -> tuple[Any, Tensor]:
        """As the drafter does."""
        return self.drafter.step(state, token)

    def select(self, state: Any, rows: Tensor) -> Any:
        """As the drafter does."""
        return self.drafter.select(state, rows)

    def rollout(self, state: Any, token: Tensor, length: int) -> Tensor:
        """What :func:`roll` returns, replayed where that is possible."""
        if not isinstance(state, Tensor) or not recordable(state):
            return roll(self.drafter, state, token, length)
        known = self._recorded.get(len(token))
        if known is None or known.length < length:
            known = self._recorded[len(token)] = Recorded(self.drafter, state, token, length)
        return known.play(state, token)[:, :length]


class Recorded:
    """A rollout of some rows and some length, with the buffers it reads and writes."""

    def __init__(self, drafter: Drafter, state: Tensor, token: Tensor, length: int) -> None:
        self.length = length
        self._state, self._token = state.clone(), token.clone()
        self._tokens, self._replay = record(lambda: roll(drafter, self._state, self._token, length))

    def play(self, state: Tensor, token: Tensor) -> Tensor:
        """(B, length) tokens, which the next call does not overwrite."""
        self._state.copy_(state)
        self._token.copy_(token)
        self._replay()
        return self._tokens.clone()


def recordable(state: Tensor) -> bool:
    """Whether work on this tensor can be recorded."""
    return state.device.type == "cuda"


def record(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """A CUDA graph of some work: the tensor that it writes, and what makes it run again."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = work()
    return written, graph.replay
