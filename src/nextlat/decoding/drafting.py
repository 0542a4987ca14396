"""Drafting a chain of tokens, one by one, while a policy says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextlat.decoding.graphs import roll
from nextlat.decoding.policies import Policy, Static
from nextlat.decoding.sampling import Sampling, draw
from nextlat.model.interfaces import Drafter

Uniform = Callable[..., Tensor]
"""``uniform(*shape)``: float64 draws from [0, 1), on the CPU."""


@dataclass
class Drafted:
    """The token that all rows have just drafted: what a policy may look at.

    Columns are those of the drafter's vocabulary, which may be a part of the model's.
    """

    position: int
    """1, 2, ... in this draft."""
    column: Tensor
    """(B,) int64 the drafted token, as a column of ``logits``; at temperature 0 the most likely one."""
    logits: Tensor
    """(B, V) of the drafter."""
    state: Any
    """The drafter's state that gave them; for nextlat (B, D)."""
    drawn_from: Tensor | None = None
    """(B, V) the law that the token was drawn from; ``None`` at temperature 0."""
    going: Tensor | None = None
    """(B,) bool rows that drafted it; the others had stopped before, and it is not verified. ``None``: all."""

    @cached_property
    def law(self) -> Tensor:
        """(B, V) the law that the token was drawn from; at temperature 0 the drafter's own law."""
        return self.logits.float().softmax(-1) if self.drawn_from is None else self.drawn_from

    @cached_property
    def probability(self) -> Tensor:
        """(B,) probability of the token under :attr:`law`."""
        if self.drawn_from is None:
            return self.law.amax(-1)
        return self.law.gather(-1, self.column[:, None])[:, 0]


class Drafts(NamedTuple):
    """What all rows drafted in a round."""

    tokens: Tensor
    """(B, K) int64."""
    laws: Tensor
    """(B, K, V) laws they were drawn from, over the model's vocabulary; empty at temperature 0."""
    lengths: Tensor
    """(B,) int64 how many of the K each row drafted."""


def draft(
    drafter: Drafter,
    state: Any,
    token: Tensor,
    sampling: Sampling,
    policy: Policy,
    room: Tensor,
    vocab_size: int,
    uniform: Uniform,
) -> Drafts | None:
    """Draft behind the known tokens while some row may.

    Args:
        drafter: makes the laws.
        state: its state after the last accepted position.
        token: (B,) the known tokens behind it.
        sampling: how laws are made of logits.
        policy: is shown every drafted token, and asked whether to go on.
        room: (B,) int64 most tokens that each row may draft.
        vocab_size: size V of the model's vocabulary.
        uniform: source of the draws.

    Returns:
        ``None`` if no row may draft anything.
    """
    tokens, laws = [], []
    vocabulary = drafter.vocabulary
    longest = int(room.max())
    if sampling.greedy and longest and type(policy).goes_on is Static.goes_on:  # nothing to decide on the way
        rollout = getattr(drafter, "rollout", None) or partial(roll, drafter)
        return Drafts(rollout(state, token, longest), torch.empty(0, device=room.device), room)
    rooms = room.tolist()
    ends = [longest] * len(rooms)  # where a policy has stopped a row
    going = None if min(rooms) else room > 0
    for position in range(1, longest + 1):
        state, logits = drafter.step(state, token)
        law = None if sampling.greedy else sampling.law(logits)
        column = logits.argmax(-1) if law is None else draw(law, uniform(len(law)))
        token = column if vocabulary is None else vocabulary[column]
        tokens.append(token)
        if law is not None:
            laws.append(over_all(law, vocabulary, vocab_size))
        decision = policy.goes_on(Drafted(position, column, logits, state, law, going))
        if isinstance(decision, Tensor):
            ends = [end if on else min(end, position) for end, on in zip(ends, decision.tolist(), strict=True)]
        elif not decision:
            ends = [min(end, position) for end in ends]
        left = [min(end, rest) > position for end, rest in zip(ends, rooms, strict=True)]
        if not any(left):
            break
        going = None if all(left) else torch.tensor(left, device=room.device)
    if not tokens:
        return None
    lengths = torch.tensor([min(pair) for pair in zip(ends, rooms, strict=True)], device=room.device)
    stacked = torch.stack(laws, 1) if laws else torch.empty(0, device=room.device)
    return Drafts(torch.stack(tokens, 1), stacked, lengths)


def over_all(law: Tensor, vocabulary: Tensor | None, vocab_size: int) -> Tensor:
    """(B, V) over the model's vocabulary, of a law over the tokens that a drafter knows; ``None`` are all."""
    return law if vocabulary is None else law.new_zeros(len(law), vocab_size).index_copy_(1, vocabulary, law)
