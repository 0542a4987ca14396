"""How long a draft shall be."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from nextlat.errors import NextLatError

if TYPE_CHECKING:
    from nextlat.decoding.drafting import Drafted


class Known(NamedTuple):
    """What all rows know before a round drafts anything."""

    tokens: Tensor
    """(B,) int64 the known tokens that the model has not seen yet."""
    room: Tensor
    """(B,) int64 most tokens that each row may draft; 0 where a row is done."""
    states: Tensor | None = None
    """(B, D) the model's states before these tokens, for a policy that reads them."""


class Policy(Protocol):
    """Decides how long drafts are: before a round, and after every drafted token.

    A decision may use the laws and the tokens drafted so far, because all of them are verified. It may not look
    at a token that is then thrown away: that would bias what is kept.
    """

    max_length: int
    """No draft gets longer."""
    reads_states: bool
    """Whether :meth:`plan` wants the model's states."""

    def plan(self, known: Known) -> int:
        """Most tokens that this round may draft, 0 for none; asked before its first."""
        ...

    def goes_on(self, drafted: Drafted) -> Tensor | bool:
        """Which rows draft one token more: (B,) bool, or one answer for all of them, which costs least.

        Called after every drafted token, also when there is no room for another, so that a policy sees them all.
        A round begins with ``drafted.position == 1``; rows may be fewer than in the round before.
        """
        ...

    def learn(self, drafted: list[int], accepted: list[int]) -> None:
        """What the round came to: tokens drafted and kept, row by row; 0 of 0 for a row that is done."""
        ...


def check_length(length: int) -> int:
    """A draft length, if it is not negative."""
    if length < 0:
        raise NextLatError(f"the draft length is {length}; it must be at least 0, and 0 drafts nothing")
    return length


class Static:
    """Always the same number of tokens."""

    reads_states = False

    def __init__(self, length: int) -> None:
        self.max_length = check_length(length)

    def plan(self, known: Known) -> int:
        """The length."""
        return self.max_length

    def goes_on(self, drafted: Drafted) -> Tensor | bool:
        """Until the planned length is reached."""
        return True

    def learn(self, drafted: list[int], accepted: list[int]) -> None:
        """Nothing to learn."""


class Confidence(Static):
    """Up to a length, while the most likely token has at least a given probability."""

    def __init__(self, length: int, threshold: float) -> None:
        super().__init__(length)
        if not 0 <= threshold <= 1:
            raise NextLatError(f"the confidence threshold is {threshold}; it must lie between 0 and 1")
        self.threshold = threshold

    def goes_on(self, drafted: Drafted) -> Tensor:
        """While the drafter is sure."""
        return drafted.law.amax(-1) >= self.threshold


class Entropy(Static):
    """Up to a length, while ``1 - sqrt(scale H(q))`` stays above a limit (AdaEDL, arXiv 2410.18351).

    The left side bounds the probability of acceptance from below, with H in nats.
    """

    def __init__(self, length: int, limit: float, scale: float = 0.2) -> None:
        super().__init__(length)
        self.limit, self.scale = limit, scale

    def goes_on(self, drafted: Drafted) -> Tensor:
        """While the law is sharp."""
        entropy: Tensor = torch.special.entr(drafted.law).sum(-1)
        return 1 - (self.scale * entropy).sqrt() >= self.limit


class Heuristic(Static):
    """Two tokens more after a draft that was kept whole, one less after any other, at least one.

    The default rule of assisted generation in Hugging Face transformers before it stopped by confidence, which is
    ``Confidence(20, 0.4)`` here. The rows of a batch have one length: it grows only if all drafts were kept whole.

    Args:
        length: no draft gets longer.
        first: length of the first draft.
    """

    def __init__(self, length: int, first: int = 5) -> None:
        super().__init__(length)
        self.current = max(1, min(check_length(first), length))

    def goes_on(self, drafted: Drafted) -> bool:
        """Until the current length is reached."""
        return drafted.position < self.current

    def learn(self, drafted: list[int], accepted: list[int]) -> None:
        """Grow or shrink."""
        if any(drafted):
            change = 2 if drafted == accepted else -1
            self.current = max(1, min(self.current + change, self.max_length))
