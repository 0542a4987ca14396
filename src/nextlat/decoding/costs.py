"""What drafting and verifying cost on a machine, and what that makes of an acceptance rate."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nextlat.decoding.policies import Static, check_length
from nextlat.decoding.rounds import Setting, play_chain
from nextlat.decoding.sampling import Sampling, draw
from nextlat.decoding.verification import Verification, find_verification
from nextlat.errors import NextLatError
from nextlat.model.interfaces import CausalLM, Drafter, LMOutput
from nextlat.timing import Arm, Timing, interleave, seconds

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
LONGEST = 32
"""Longest draft that is looked at where no limit is named."""
DRAFT_STEPS = 4
"""Draft steps that are timed together: one alone can be shorter than what a clock tells apart."""


@dataclass(frozen=True)
class Costs:
    """Prices of a round of drafting and verifying, in units of one cached step of plain decoding.

    With acceptance ``a`` at each of n drafted tokens, a round yields ``1 + a + ... + a^n`` tokens and costs
    ``V(n + 1) + n c`` and the overhead; Leviathan et al. (arXiv 2211.17192) have ``V = 1`` and none. On a CPU V is a
    staircase, so the best n lies at the end of a step and not where a smooth curve would have it.

    Args:
        draft: c, one draft step.
        verify: V(k) for some numbers k of positions in one call; ``V(1) = 1`` may be left out.
        overhead: of a round with drafts, beyond drafting and verifying: what keeping books on them takes.

    Raises:
        NextLatError: a price that is not positive, or a call over fewer than one position.
    """

    draft: float
    verify: Mapping[int, float] = field(default_factory=dict)
    overhead: float = 0.0

    def __post_init__(self) -> None:
        prices = {1: 1.0, **{int(k): float(price) for k, price in self.verify.items()}}
        wrong = {k: price for k, price in prices.items() if k < 1 or not 0 < price < float("inf")}
        if wrong or not self.draft >= 0 or not self.overhead >= 0:
            raise NextLatError(
                f"costs are draft={self.draft}, overhead={self.overhead}, verify={dict(self.verify)}; they are in "
                "units of a plain step: draft and overhead at least 0, verify above 0 for 1, 2, ... positions"
            )
        object.__setattr__(self, "verify", dict(sorted(prices.items())))

    def verification(self, positions: int) -> float:
        """V(k): interpolated between measured k; beyond them along the line over the upper half of what was measured.

        The line never falls: a plateau that was measured to its end says nothing of the next step.
        """
        known = list(self.verify)
        last = known[-1]
        if positions > last:
            middle = max(1, last // 2)
            slope = (self.verify[last] - self.verification(middle)) / (last - middle) if last > 1 else 0.0
            return self.verify[last] + (positions - last) * max(slope, 0.0)
        right = known[bisect_left(known, positions)]
        if right == positions:
            return self.verify[right]
        left = known[bisect_left(known, positions) - 1]
        share = (positions - left) / (right - left)
        return (1 - share) * self.verify[left] + share * self.verify[right]

    def round(self, length: int) -> float:
        """Cost of a round that drafts ``length`` tokens; 1 without drafts."""
        drafts = length * self.draft + self.overhead if check_length(length) else 0.0
        return self.verification(length + 1) + drafts

    def speedup(self, acceptance: float | Sequence[float], length: int) -> float:
        """Tokens per unit of time with drafts of a length, over plain decoding.

        Args:
            acceptance: of every token alike, or by position in the draft given that its turn came, as
                :attr:`nextlat.decoding.Statistics.acceptance` has it.
            length: of all drafts.
        """
        return expected_tokens(acceptance, length) / self.round(length)

    def best_length(self, acceptance: float | Sequence[float], longest: int = LONGEST) -> int:
        """The length of drafts that is fastest, the shortest of equals; 0 where drafting does not pay."""
        longest = longest if isinstance(acceptance, float | int) else min(longest, len(acceptance))
        return max(range(longest + 1), key=lambda length: self.speedup(acceptance, length))

    def break_even(self, longest: int = LONGEST) -> float | None:
        """Smallest acceptance above which drafts of some length are faster than none; ``None`` if they never are."""

        def pays(acceptance: float) -> bool:
            return any(self.speedup(acceptance, length) > 1 for length in range(1, longest + 1))

        if not pays(1.0):
            return None
        low, high = 0.0, 1.0
        while high - low > 1e-12:  # more acceptance is more tokens at the same cost
            middle = (low + high) / 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        return high

    def advice(self, longest: int = LONGEST) -> str:
        """What the measured costs mean for drafts of up to ``longest`` tokens, in a sentence."""
        prices = (
            f"a draft step costs {self.draft:.2f} of a decoding step, a call over 4 tokens {self.verification(4):.2f}, "
            f"and {self.overhead:.2f} are added to a round with drafts"
        )
        least = self.break_even(longest)
        if least is None:
            return f"{prices}: drafts do not pay here, whatever is accepted"
        best = self.best_length(0.8, longest)
        return (
            f"{prices}: drafts pay from an acceptance of {least:.0%} on; "
            f"at 80 % the best length is {best}, {self.speedup(0.8, best):.2f}x plain decoding"
        )


def expected_tokens(acceptance: float | Sequence[float], length: int) -> float:
    """Tokens that a round yields: the kept part of a draft, and the one behind it."""
    if isinstance(acceptance, float | int):
        acceptance = [acceptance] * length
    if len(acceptance) < length:
        raise NextLatError(
            f"acceptance is known for {len(acceptance)} positions and the draft has {length}; "
            "measure it with drafts at least as long"
        )
    if not all(0 <= a <= 1 for a in acceptance):
        raise NextLatError(f"acceptance is {acceptance}; it must lie between 0 and 1")
    tokens, survives = 1.0, 1.0
    for a in acceptance[:length]:
        survives *= a
        tokens += survives
    return tokens


class Midway:
    """The middle of a text, at which calls, drafts and rounds can be made again and again, as decoding makes them.

    Args:
        lm: the model.
        drafter: what drafts.
        rows: decoded together.
        context: positions in the cache.
        room: most positions that are added to them.
        sampling: how tokens are drawn.
        judge: which drafted tokens are kept.
        device: of the model.
    """

    def __init__(
        self,
        lm: CausalLM,
        drafter: Drafter,
        rows: int,
        context: int,
        room: int,
        sampling: Sampling,
        judge: Verification,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lm, self.drafter, self.sampling, self.judge, self.device = lm, drafter, sampling, judge, device
        self.rows, self.context = rows, context
        self.state: Any = None
        """The drafter's, behind the call that it observed last."""
        self.coins = even(rows)
        self.cache = lm.new_cache(rows, context + room)
        self.vocab_size = lm(self.tokens(context), cache=self.cache).logits.shape[-1]
        self.go_back()

    def tokens(self, count: int) -> Tensor:
        """(B, count) of them."""
        return torch.zeros(self.rows, count, dtype=torch.int64, device=self.device)

    def go_back(self) -> None:
        """To the context."""
        self.cache.lengths = [self.context] * self.rows

    def call(self, count: int) -> LMOutput:
        """Over positions behind the context: a known token and a draft, which is judged; one token more is drawn."""
        self.go_back()
        output = self.lm(self.tokens(count), cache=self.cache)
        if self.sampling.greedy:
            output.logits.argmax(-1).tolist()  # waits for a GPU
            return output
        p = self.sampling.law(output.logits)
        law = p[:, 0]
        if count > 1:
            drafted = torch.full((self.rows,), count - 1, device=self.device)
            coins = self.coins.to(p)[:, None].expand(-1, count - 1)
            law = self.judge(p, p[:, 1:], self.tokens(count - 1), drafted, coins).law
        draw(law, self.coins)
        return output

    def verify(self, count: int) -> None:
        """A call of which nothing is left."""
        self.call(count)
        self.go_back()

    def observe(self, count: int) -> None:
        """A call of which all is kept, and the drafter's state behind it."""
        self.state = self.drafter.observe(self.call(count), torch.full((self.rows,), count - 1, device=self.device))

    def draft(self, length: int) -> None:
        """Draft behind what was observed, which is then forgotten."""
        state, token, vocabulary = self.state, self.tokens(1)[:, 0], self.drafter.vocabulary
        for _ in range(length):
            state, logits = self.drafter.step(state, token)
            column = logits.argmax(-1) if self.sampling.greedy else draw(self.sampling.law(logits), self.coins)
            token = column if vocabulary is None else vocabulary[column]
        token.tolist()
        self.go_back()

    def play(self, length: int | None) -> None:
        """A round behind the one before, with a draft of a length; ``None`` is without a drafter."""
        drafter = None if length is None else self.drafter
        setting = Setting(self.lm, drafter, self.cache, self.sampling, even, self.vocab_size)
        begins, room = list(self.cache.lengths), torch.full((self.rows,), length or 0, device=self.device)
        made = play_chain(setting, Static(length or 0), self.judge, self.state, self.tokens(1)[:, 0], room)
        if drafter is not None:
            self.state = drafter.observe(made.output, made.path.gather(1, made.accepted[:, None])[:, 0])
        places = [one[: n + 1] for one, n in zip(made.path.tolist(), made.accepted.tolist(), strict=True)]
        self.cache.keep(places, begins)


def even(*shape: int) -> Tensor:
    """Draws of which none is lucky."""
    return torch.full(shape, 0.5, dtype=torch.float64)


@torch.inference_mode()
def measure_costs(
    lm: CausalLM,
    drafter: Drafter,
    rows: int = 1,
    context: int = 256,
    lengths: Sequence[int] = LENGTHS,
    *,
    sampling: Sampling | None = None,
    verification: str = "block",
    device: torch.device | str = "cpu",
    budget: float = 1.0,
) -> Costs:
    """Time draft steps, calls over 1, 2, ... positions behind a cache, and whole rounds, as decoding makes them.

    Drawing tokens and judging drafts are part of what is timed. Draft steps begin right behind a call of the model, so
    that a drafter that puts work off pays for it there. The overhead is what rounds take beyond their calls and draft
    steps, observing the call included, on average over rounds of one and of several tokens. The arms take turns, so
    that a busy neighbour slows all alike, and medians are compared: of processor time on one thread, of wall time on
    several.

    Args:
        lm: the model.
        drafter: what drafts.
        rows: decoded together.
        context: positions in the cache.
        lengths: numbers of positions to time calls over; 1 is always among them.
        sampling: how tokens are drawn; ``None`` is greedy.
        verification: ``block`` or ``token``.
        device: of the model.
        budget: about how many seconds to spend; three turns are made whatever they take.

    Returns:
        costs in units of a step of plain decoding: calls and drafts over a call over one position, rounds over a round
        without a drafter; they depend on machine, threads, rows and context.
    """
    if rows < 1 or context < 1 or not lengths or min(lengths) < 1:
        raise NextLatError(f"rows={rows}, context={context}, lengths={list(lengths)}; all must be at least 1")
    sampling, judge = sampling or Sampling(), find_verification(verification)
    counts = sorted({1, *lengths})
    steps = DRAFT_STEPS if drafter.max_length is None else max(1, min(DRAFT_STEPS, drafter.max_length - 1))
    drafts = sorted({1, steps})
    # rounds stand behind each other: two known positions, and all that each may add
    room = max(counts[-1], 3 + sum(n + 1 for n in drafts))
    midway = Midway(lm, drafter, rows, context, room, sampling, judge, device)
    # each of the rounds, and the draft, begins with the state that the arm before it has left
    arms: dict[str, Arm] = {str(count): partial(midway.verify, count) for count in counts}
    arms |= {"plain round": partial(midway.play, None), "renew": partial(midway.observe, 2)}
    arms |= {f"round of {length}": partial(midway.play, length) for length in drafts}
    arms |= {"draft": partial(midway.draft, steps)}
    trial = interleave(arms, 1)
    turns = int(budget / max(sum(t.wall[0] for t in trial.values()), 1e-9))
    found = {name: seconds(timing) for name, timing in interleave(arms, min(max(turns, 3), 25), 0).items()}
    step = found["1"]
    bare = Costs(found["draft"] / steps / step, {count: found[str(count)] / step for count in counts})
    beyond = [found[f"round of {n}"] / found["plain round"] - bare.round(n) for n in drafts]
    return replace(bare, overhead=max(sum(beyond) / len(beyond), 0.0))


@torch.inference_mode()
def parts_of_rounds(
    lm: CausalLM,
    drafter: Drafter,
    length: int,
    rows: int,
    context: int,
    repeats: int,
    sampling: Sampling | None = None,
) -> dict[str, Arm]:
    """What rounds with drafts of a length are made of, as arms to time in turn with whole texts.

    Args:
        lm: the model.
        drafter: what drafts.
        length: tokens of a draft.
        rows: decoded together.
        context: positions in the cache.
        repeats: of the part within its arm, so that the arm takes about as long as those that it is timed with.
        sampling: how tokens are drawn; ``None`` is greedy.

    Returns:
        ``step``, plain ones; ``call``, over the positions of a draft and the one before it; ``round``, such calls with
        a draft behind each, for which the drafter observes the call. What they took is for :func:`priced`.
    """
    midway = Midway(lm, drafter, rows, context, length + 1, sampling or Sampling(), find_verification("block"))

    def again(part: Arm) -> Arm:
        @torch.inference_mode()  # as decoding has it, whoever runs the arm
        def arm() -> None:
            for _ in range(repeats):
                part()

        return arm

    def round_() -> None:
        midway.observe(length + 1)
        midway.draft(length)

    step, call = (partial(midway.verify, count) for count in (1, length + 1))
    return {"step": again(step), "call": again(call), "round": again(round_)}


def priced(costs: Costs, found: Mapping[str, Timing], length: int) -> Costs:
    """Costs in which the prices of rounds with drafts of a length are those that :func:`parts_of_rounds` found.

    A draft costs what it adds to calls: its own time, and what the next call loses by finding other weights in the
    processor's caches. There is no overhead.

    Args:
        costs: for calls over other numbers of positions.
        found: what the parts took, beside anything else.
        length: of the drafts; a round of 0 has no price but that of a step, which is 1.
    """
    if not length:
        return replace(costs, overhead=0.0)
    step, call, whole = (seconds(found[part]) for part in ("step", "call", "round"))
    draft = max(whole - call, 0.0) / length / step
    return replace(costs, draft=draft, verify={**costs.verify, length + 1: call / step}, overhead=0.0)
