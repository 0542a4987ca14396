"""Drafts that go on while another token is worth what it costs, judged by what this very run has seen."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt

import numpy as np

from nextlat.decoding.costs import Costs
from nextlat.decoding.drafting import Drafted
from nextlat.decoding.policies import Known, Static
from nextlat.errors import NextLatError

Estimator = Callable[[Drafted], Sequence[float]]
"""For each row a guess in [0, 1] of the chance that the drafted token is kept; what it is worth is learned from the
run."""

EDGES = (0.2, 0.35, 0.5, 0.65, 0.78, 0.88, 0.95, 0.985)
"""Guesses between two of them share what is learned; finer near 1, where long drafts are decided."""
CENTRES = tuple((low + high) / 2 for low, high in pairwise((0.0, *EDGES, 1.0)))
BINS = len(CENTRES)
WHOLE, CUT, PLAIN, IDLE = range(BINS, BINS + 4)
"""States before the first token of a draft, behind those of a token in one of the bins: the row's last draft was kept
whole, or was not, or there was none, or none for as long as :data:`LONG_AGO`."""
STATES = BINS + 4
LONG_AGO = 8
"""Rounds without drafts after which the text may have become another."""
SHRINK = 64.0
"""How many observations a bin needs to count as much as the line through all bins, and a position as the one before."""
GUESS, SPREAD = 0.6, 0.05
"""Mean and variance of the guesses that are expected before any was seen."""


def by_probability(drafted: Drafted) -> list[float]:
    """The root of the token's probability: laws that agree keep unlikely tokens too, so it is a hopeful guess."""
    return [sqrt(p) for p in drafted.probability.tolist()]


def bin_of(guess: float) -> int:
    """Number of the bin of a guess."""
    return bisect_right(EDGES, guess)


class Forecast:
    """Chances that drafted tokens are kept: of those that were drafted, and of those that would come after them.

    Tokens fall into bins by a guess. Of each bin is counted how often a token was kept among those whose turn came,
    and which bin followed it, among those that were kept: a Markov chain, so that a draft in an easy passage is
    expected to stay there for as long as such passages have lasted. Chances are pooled so that they grow with the
    guess (pool adjacent violators), shrunk towards a line through all bins, so that a guess that means nothing is
    soon known to mean nothing, and scaled by position in the draft. Old counts fade.

    Args:
        longest: draft that is looked ahead to.
        trust: how many observations count as much as what is expected at first.
        memory: rounds after which a count has faded to 1/e.
        mean: share of tokens that is expected to be kept at first.
        slope: by how much more per guess; 1 believes the guess.
    """

    def __init__(self, longest: int, trust: float, memory: float, mean: float = 0.7, slope: float = 0.3) -> None:
        self.longest, self.memory = longest, memory
        self.trust, self.mean, self.slope = trust, mean, slope
        self._turns, self._kept = [0.0] * BINS, [0.0] * BINS
        # before anything is known, the next token is half as surely like this one as like any
        self._follows = [[4.0 / BINS * (1 + (b == a)) for b in range(BINS)] for a in range(BINS)]
        # and a draft is hoped to begin well, so that a first token is tried some times in every state
        self._follows += [[0.1] * (BINS - 3) + [1.5] * 3 for _ in range(BINS, STATES)]
        self._at = [[0.0, 0.0] for _ in range(longest)]
        self._rounds, self._refreshed = 0, 0
        self.refresh()

    def learn(self, start: int, bins: Sequence[int], accepted: int) -> None:
        """Count a row's draft, begun in a state, of which a beginning was kept."""
        for i, b in enumerate(bins[: accepted + 1]):
            kept = float(i < accepted)
            self.count(b, kept)
            self._follows[bins[i - 1] if i else start][b] += 1
            self._at[i][0] += kept
            self._at[i][1] += self.chance[b]

    def count(self, b: int, kept: float) -> None:
        """Count a token of a bin: 1 if it was kept, 0 if not, or the chance of that."""
        self._turns[b] += 1
        self._kept[b] += kept

    def end_round(self) -> None:
        """Make the tables anew now and then: often at first, and every 64 rounds in the end."""
        self._rounds += 1
        since = self._rounds - self._refreshed
        if since >= min(64, 1 + self._refreshed // 4):
            fade = (1 - 1 / self.memory) ** since
            self._turns, self._kept = ([fade * x for x in counts] for counts in (self._turns, self._kept))
            self._follows, self._at = (
                [[fade * x for x in row] for row in table] for table in (self._follows, self._at)
            )
            self._refreshed = self._rounds
            self.refresh()

    def refresh(self) -> None:
        """Chances, and what they say of tokens further ahead, from the counts."""
        self.chance = self._chances()
        """Of a token in each bin."""
        laws = np.array(self._follows) + 1e-9  # what has faded away says nothing
        laws *= np.array(self.chance) / laws.sum(1, keepdims=True)
        ahead = np.zeros((self.longest + 1, STATES))
        surviving = np.ones(BINS)
        for j in range(1, self.longest + 1):
            ahead[j] = laws @ surviving
            surviving = ahead[j, :BINS]
        self.ahead: list[list[float]] = ahead.tolist()
        """[j][b] chance that all of the next j tokens are kept, behind a token of bin b that was."""
        scale, self.scale = 1.0, [1.0]
        """[i] by how much chances of the first i tokens together differ from what their bins say."""
        for kept, expected in self._at:
            scale = (kept + SHRINK * scale) / (expected + SHRINK)
            self.scale.append(self.scale[-1] * scale)

    def _chances(self) -> list[float]:
        # as if `trust` tokens had been seen that were kept as expected
        n, trust = sum(self._turns), self.trust
        guess = (sum(t * c for t, c in zip(self._turns, CENTRES, strict=True)) + trust * GUESS) / (n + trust)
        mean = (sum(self._kept) + trust * self.mean) / (n + trust)
        spread = sum(t * (c - guess) ** 2 for t, c in zip(self._turns, CENTRES, strict=True))
        together = sum((k - t * mean) * (c - guess) for k, t, c in zip(self._kept, self._turns, CENTRES, strict=True))
        slope = min(max((together + trust * SPREAD * self.slope) / (spread + trust * SPREAD), 0.0), 1.5)
        line = [min(max(mean + slope * (c - guess), 0.01), 0.995) for c in CENTRES]
        kept = [k + SHRINK * share for k, share in zip(self._kept, line, strict=True)]
        return pooled(kept, [t + SHRINK for t in self._turns])


def pooled(kept: Sequence[float], turns: Sequence[float]) -> list[float]:
    """Shares ``kept / turns`` that do not fall from one bin to the next, by pooling neighbours that do."""
    blocks: list[tuple[float, float, int]] = []
    for k, t in zip(kept, turns, strict=True):
        block = (k, t, 1)
        while blocks and blocks[-1][0] * block[1] > block[0] * blocks[-1][1]:
            before = blocks.pop()
            block = (before[0] + block[0], before[1] + block[1], before[2] + block[2])
        blocks.append(block)
    return [k / t for k, t, size in blocks for _ in range(size)]


class CostAware(Static):
    """Draft one token more while the tokens it promises are worth more than the time it takes.

    A draft of i tokens is lengthened if for any number j of further ones

        P_i (S_1 + ... + S_j)  >  rate (j c + V(i + j + 1) - V(i + 1)),

    with P_i the chance that all drafted tokens are kept, S_j that of the next j then, and the rate of tokens per
    time that this run has reached so far. Maximising tokens minus rate times time at the rate reached maximises the
    rate itself (Dinkelbach 1967). All j are looked at because V is a staircase: a step up can be worth its
    price only together with the level ground behind it. The chances are learned from this run (:class:`Forecast`).

    Rows of a batch share one decision: a call costs what its longest draft costs, and a draft step runs for all rows
    anyway, so that a row that went on alone would make all others pay. What the rows promise is added up.

    Where drafts do not seem to pay, or not beyond one token, two are tried now and then: for as much time as 8 plain
    steps at the beginning, and 0.4 % of the time after that.

    Decisions depend on tokens that have been drafted, all of which are verified, and on rounds that are over, so what
    comes out follows the model's law exactly.

    Args:
        costs: of drafting and verifying, for as many rows as are decoded.
        max_length: no draft gets longer.
        estimator: guesses chances, and is believed until the run says otherwise; ``None`` takes the drafter's own
            probabilities, of which less is expected.
        trust: how many observations what is expected counts for; default 10, with an estimator 200.
        memory: rounds after which an observation has faded to 1/e.

    Raises:
        NextLatError: numbers out of range.
    """

    EXPLORE_AT_FIRST = 8.0
    EXPLORE = 0.004

    def __init__(
        self,
        costs: Costs,
        max_length: int = 16,
        estimator: Estimator | None = None,
        trust: float | None = None,
        memory: float = 2000.0,
    ) -> None:
        super().__init__(max_length)
        trust = (200.0 if estimator else 10.0) if trust is None else trust
        if not trust > 0 or not memory > 1:
            raise NextLatError(f"trust is {trust} and memory {memory}; trust must be above 0 and memory above 1")
        self.costs = costs
        self.estimator = estimator or by_probability
        self.forecast = Forecast(max_length, trust, memory, *((GUESS, 1.0) if estimator else ()))
        self._round = [costs.round(length) for length in range(max_length + 1)]
        self._fade = 1 - 1 / memory
        # as if a few plain steps had been made
        self._tokens = self._time = 4.0
        self._typical = 0.0
        self._budget, self._forced, self._paid = self.EXPLORE_AT_FIRST, 0, False
        self._states: list[int] = []
        self._table: list[list[float]] = []
        self._table_of: list[list[float]] | None = None
        self._idle = 0
        self._bins: list[list[int]] = []
        self._survival: list[list[float]] = [[1.0]]

    @property
    def rate(self) -> float:
        """Tokens that a row has gained per cost of a plain step, of late."""
        return self._tokens / self._time

    def plan(self, known: Known) -> int:
        """As many as may follow, or none."""
        return self.max_length if self.starts() else 0

    def starts(self) -> bool:
        """Whether a first token, or several, are worth their cost."""
        self._bins, self._forced, self._paid = [], 0, False
        if not self.max_length:
            return False
        if self._budget > 0 and self._typical < 1.5:
            self._forced = min(2, self.max_length)
        if len(self._states) == 1:
            return self._alone(0, self._states[0], 1.0) or self._explores(0)
        begins = {state: float(self._states.count(state)) for state in set(self._states)} or {PLAIN: 1.0}
        return self._worth(0, begins, max(len(self._states), 1)) or self._explores(0)

    def goes_on(self, drafted: Drafted) -> bool:
        """All rows or none."""
        return self.decide(
            drafted.position, self.estimator(drafted), None if drafted.going is None else drafted.going.tolist()
        )

    def decide(self, position: int, guesses: Sequence[float], going: Sequence[bool] | None = None) -> bool:
        """Whether a draft of ``position`` tokens gets one more.

        Args:
            position: 1, 2, ...
            guesses: of each row's last drafted token.
            going: rows that drafted it; ``None``: all.
        """
        bins = [bin_of(guess) for guess in guesses]
        before = [1.0] * len(bins) if position == 1 else self._survival[position - 1]
        chance = self.forecast.chance
        del self._bins[position - 1 :], self._survival[position:]
        self._bins.append(bins)
        self._survival.append([s * chance[b] for s, b in zip(before, bins, strict=True)])
        if position >= self.max_length:
            return False
        if len(bins) == 1:
            return self._alone(position, bins[0], self._survival[position][0]) or self._explores(position)
        promise: dict[int, float] = {}
        rows = 0
        for row, (b, s) in enumerate(zip(bins, self._survival[-1], strict=True)):
            if going is None or going[row]:
                promise[b] = promise.get(b, 0.0) + s
                rows += 1
        if not rows:
            return False
        return self._worth(position, promise, rows) or self._explores(position)

    def learn(self, drafted: list[int], accepted: list[int]) -> None:
        """Count what was kept, and what it cost."""
        length, rows, gained = max(drafted, default=0), 0, 0
        known = self._states if len(self._states) == len(drafted) else [PLAIN] * len(drafted)
        for row, (n, kept) in enumerate(zip(drafted, accepted, strict=True)):
            if n:
                self.forecast.learn(known[row], [bins[row] for bins in self._bins[:n]], kept)
            if n or not length:
                rows, gained = rows + 1, gained + kept + 1
        self._idle = 0 if length else self._idle + 1
        none = IDLE if self._idle >= LONG_AGO else PLAIN
        self._states = [(WHOLE if kept == n else CUT) if n else none for n, kept in zip(drafted, accepted, strict=True)]
        if rows:
            time = self._round[length]
            self._tokens = self._fade * self._tokens + gained / rows
            self._time = self._fade * self._time + time
            self._typical += 0.05 * (length - self._typical)
            self._budget += self.EXPLORE * time
        self.forecast.end_round()

    def _worth(self, position: int, promise: dict[int, float], rows: int) -> bool:
        """Whether some number of further tokens gains more than it costs; rows share the cost."""
        price, before, scale = self.rate * rows, self._round[position], self.forecast.scale
        ahead, costs = self.forecast.ahead, self._round
        shares = list(promise.items())
        tokens = 0.0
        for j in range(1, self.max_length - position + 1):
            further = ahead[j]
            tokens += scale[position + j] * sum(s * further[b] for b, s in shares)
            if tokens > price * (costs[position + j] - before):
                return True
        return False

    def _alone(self, position: int, state: int, survival: float) -> bool:
        """The same for one row, by a table that is made when the forecast is: decisions themselves take time."""
        if self._table_of is not self.forecast.ahead:
            self._table_of, self._table = self.forecast.ahead, self._prices()
        return survival > self.rate * self._table[position][state]

    def _prices(self) -> list[list[float]]:
        """[position][state] least cost of a further token, over the numbers of further tokens."""
        ahead, scale, costs = (np.array(x) for x in (self.forecast.ahead, self.forecast.scale, self._round))
        table = []
        for position in range(self.max_length):
            further = slice(1, self.max_length - position + 1)
            tokens = (scale[position + 1 :, None] * ahead[further]).cumsum(0)  # (numbers, states)
            table.append(((costs[position + 1 :] - costs[position])[:, None] / tokens).min(0).tolist())
        return table

    def _explores(self, position: int) -> bool:
        """Whether to go on in order to learn; the round pays for it once, when the draft would have ended."""
        if position >= self._forced:
            return False
        if not self._paid:
            self._budget -= self._round[self._forced] - self._round[position]
            self._paid = True
        return True
