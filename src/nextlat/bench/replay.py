"""A drafter whose acceptance is dialled in: what a round costs is real, what it proposes is arranged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextlat.model.interfaces import Drafter, LMOutput

Chances = Callable[[Tensor], Tensor]
"""Places in the continuation, int64, to the probabilities with which the token there is proposed rightly."""


class ReplayState(NamedTuple):
    """The real drafter's state, and where each row stands."""

    inner: Any
    fed: Tensor
    """(B,) place in the continuation of the next token to be fed."""
    rows: Tensor
    """(B,) number of each row."""


class Replay:
    """Proposes the tokens of a recorded continuation with given probabilities, and others otherwise.

    The real drafter makes its step all the same, so that drafting costs what it costs. Its logits are replaced by
    ones that are as sure as the proposal is probable, which is what a well-calibrated drafter shows. For temperature
    0 only, where a proposal is kept if it is the recorded token.

    Args:
        drafter: of the model.
        recorded: (B, N) int64 what plain decoding gave; with a reduced vocabulary, tokens of it.
        chances: probability of a right proposal for each place.
        seed: of the coins.
    """

    def __init__(self, drafter: Drafter, recorded: Tensor, chances: Chances, seed: int = 0) -> None:
        self.drafter, self.recorded = drafter, recorded
        self.max_length, self.vocabulary = drafter.max_length, drafter.vocabulary
        self.chances = chances(torch.arange(recorded.shape[1]))
        coins = torch.rand(recorded.shape, generator=torch.Generator().manual_seed(seed))
        self.right = coins < self.chances
        self.columns = recorded if self.vocabulary is None else torch.searchsorted(self.vocabulary, recorded)
        if self.vocabulary is not None and not bool(torch.isin(recorded, self.vocabulary).all()):
            raise ValueError("the draft vocabulary lacks tokens of the recorded text")
        self.place = torch.full((len(recorded),), -1)
        self.rows = torch.arange(len(recorded))

    def observe(self, output: LMOutput, accepted: Tensor) -> ReplayState:
        """State after a call; the first one of a text is over its prompt and keeps nothing of the record."""
        self.place = self.place + accepted + 1 if bool((self.place >= 0).all()) else torch.zeros_like(self.place)
        return ReplayState(self.drafter.observe(output, accepted), self.place, self.rows)

    def step(self, state: ReplayState, token: Tensor) -> tuple[ReplayState, Tensor]:
        """The real step, with the arranged proposal for the place behind the token fed."""
        inner, logits = self.drafter.step(state.inner, token)
        place = (state.fed + 1).clamp(max=self.recorded.shape[1] - 1)
        column = self.columns[state.rows, place]
        wrong = (column + 1) % logits.shape[-1]
        column = torch.where(self.right[state.rows, place], column, wrong)
        chance = self.chances[place].clamp(2 / logits.shape[-1], 1 - 1e-3)  # a proposal is the most likely token
        sure = (chance / (1 - chance) * (logits.shape[-1] - 1)).log()
        arranged = torch.zeros_like(logits).scatter_(1, column[:, None], sure[:, None].to(logits.dtype))
        return ReplayState(inner, state.fed + 1, state.rows), arranged

    def select(self, state: ReplayState, rows: Tensor) -> ReplayState:
        """Go on with chosen rows."""
        self.place, self.rows = self.place[rows], self.rows[rows]
        return ReplayState(self.drafter.select(state.inner, rows), state.fed[rows], state.rows[rows])


def steady(chance: float) -> Chances:
    """The same probability everywhere."""
    return lambda places: torch.full(places.shape, chance)


def spans(easy: float, hard: float, length: int) -> Chances:
    """Easy and hard stretches of a length in turn."""
    return lambda places: torch.where(places // length % 2 == 0, easy, hard)
