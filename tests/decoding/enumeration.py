"""The exact law of what one round of drafting and verifying puts out, by going through every case.

The target and the drafter are tables: logits for every text of up to K tokens over a small vocabulary. The round is the
decoder's own, :func:`nextlat.decoding.rounds.play_chain`, with a script in place of its random numbers: every draw is
placed in the middle of each token's share, and every coin of the verification falls well or badly, with a probability
that is found by bisection of the code under test, not by its formula. Each outcome is continued with the target's law.
What comes out must be the target's law of texts, to rounding.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from nextlat.decoding import rounds
from nextlat.decoding.drafting import Drafts, draft
from nextlat.decoding.policies import Policy
from nextlat.decoding.rounds import Round, Setting, play_chain
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.verification import Verdict, Verification
from nextlat.model.interfaces import LMOutput

Text = tuple[int, ...]
FAIL = 1 - 2.0**-53
"""A coin that falls badly whatever the chance, unless it is 1."""
KNOWN = 0
"""The token behind which a round begins."""


@dataclass
class World:
    """A random target and a random drafter."""

    vocabulary: int
    longest: int
    seed: int
    closeness: float = 0.5
    """0: the drafter knows nothing of the target; 1: it is the target."""
    target: dict[Text, Tensor] = field(default_factory=dict)
    drafter: dict[Text, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        for length in range(self.longest + 1):
            for text in itertools.product(range(self.vocabulary), repeat=length):
                one, other = (2 * torch.randn(self.vocabulary, generator=g, dtype=torch.float64) for _ in range(2))
                self.target[text] = one
                self.drafter[text] = self.closeness * one + (1 - self.closeness) * other


class TableDrafter:
    """Logits from a table of texts behind the known token. Its state is the text that each row has seen."""

    max_length: int | None = None

    def __init__(self, table: dict[Text, Tensor], vocabulary: Tensor | None = None) -> None:
        self.table, self.vocabulary = table, vocabulary

    def observe(self, output: Any, accepted: Tensor) -> list[Text]:
        raise NotImplementedError

    def step(self, state: list[Text], token: Tensor) -> tuple[list[Text], Tensor]:
        state = [(*text, new) for text, new in zip(state, token.tolist(), strict=True)]
        logits = torch.stack([self.table[text[1:]] for text in state])
        return state, logits if self.vocabulary is None else logits[:, self.vocabulary]

    def select(self, state: list[Text], rows: Tensor) -> list[Text]:
        return [state[row] for row in rows.tolist()]


@dataclass
class Rules:
    """How a round is played; functions can be replaced by mistakes."""

    sampling: Sampling
    policy: Policy
    judge: Verification
    vocabulary: tuple[int, ...] | None = None
    """What the drafter speaks."""
    draft: Callable[..., Drafts | None] = draft
    play: Callable[..., Round] = play_chain


class ScriptTooShortError(Exception):
    """The script of a round is too short."""


@dataclass
class Script:
    """What the random numbers of a round are, for rows that all draft the same."""

    draws: list[float]
    """Of the drafted tokens."""
    coins: Tensor | None
    """(B, n) of the verification; ``None``: all fall badly."""
    last: Tensor
    """(B,) of the token behind what is kept."""
    judged: bool = False

    def __call__(self, *shape: int) -> Tensor:
        if self.judged and len(shape) == 2 and self.coins is None:
            return torch.full(shape, FAIL, dtype=torch.float64)
        if self.judged:
            wanted = self.coins if len(shape) == 2 else self.last
            assert wanted is not None
            assert wanted.shape == shape
            return wanted
        if not self.draws:
            raise ScriptTooShortError
        return torch.full(shape, self.draws.pop(0), dtype=torch.float64)


@dataclass
class Played:
    """A round, and what its verification was asked."""

    round: Round
    arguments: tuple[Tensor, Tensor, Tensor, Tensor] | None

    def text(self, row: int) -> Text:
        """What the round put out."""
        places = self.round.path[row, 1 : 1 + int(self.round.accepted[row])].tolist()
        return (*(int(self.round.tokens[row, place]) for place in places), int(self.round.pending[row]))


@dataclass
class Draft:
    """What can be drafted, with what probability."""

    draws: list[float]
    probability: float
    played: Played
    """A round with this draft."""


def play(world: World, rules: Rules, draws: list[float], coins: Tensor | None, last: Tensor) -> Played:
    """One round of as many rows as there are last draws, all with the same draft."""
    script = Script(list(draws), coins, last)
    rows = len(last)
    asked: list[Any] = [None]

    def model(tokens: Tensor, cache: None) -> LMOutput:
        script.judged = True
        texts = [[tuple(row[1 : i + 1]) for i in range(len(row))] for row in tokens.tolist()]
        logits = torch.stack([torch.stack([world.target[text] for text in row]) for row in texts])
        return LMOutput(logits, torch.zeros(*tokens.shape, 1), cache)

    def judge(p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor, u: Tensor) -> Verdict:
        asked[0] = p, q, drafts, lengths
        return rules.judge(p, q, drafts, lengths, u)

    drafter = TableDrafter(world.drafter, None if rules.vocabulary is None else torch.tensor(rules.vocabulary))
    nothing: Any = None  # of a cache
    setting = Setting(cast(Any, model), drafter, nothing, rules.sampling, script, world.vocabulary)
    policy = copy.deepcopy(rules.policy)  # rounds begin alike, whatever one of them teaches
    with mock.patch.object(rounds, "draft", rules.draft):
        room = torch.full((rows,), policy.max_length)
        made = rules.play(setting, policy, judge, [()] * rows, torch.full((rows,), KNOWN), room)
    return Played(made, asked[0])


def outcomes(world: World, rules: Rules) -> dict[Text, float]:
    """Every text that a round can put out, with its probability."""
    found: dict[Text, float] = {}
    alike: dict[int, list[Draft]] = {}
    for one in drafts(world, rules):
        if one.played.arguments is None:
            nothing = torch.zeros(1, 0, dtype=torch.float64)
            law = rules.sampling.law(world.target[()])[None]
            put_out(found, world, rules, one, nothing, torch.ones(1, dtype=torch.float64), law)
        else:
            alike.setdefault(one.played.arguments[2].shape[1], []).append(one)
    for n, same in alike.items():
        falls = torch.tensor(list(itertools.product([True, False], repeat=n)))  # (2^n, n)
        coins = torch.where(falls, 0.0, FAIL).double()
        arguments = [torch.cat([one.played.arguments[i] for one in same]) for i in range(4)]  # type: ignore[index]
        chances = coin_chances(rules.judge, *arguments)[:, None]
        chance = torch.where(falls, chances, 1 - chances).prod(-1)
        law = rules.judge(*(x.repeat_interleave(2**n, 0) for x in arguments), coins.repeat(len(same), 1)).law.unflatten(
            0, (len(same), 2**n)
        )
        for number, one in enumerate(same):
            put_out(found, world, rules, one, coins, chance[number], law[number])
    return found


def drafts(world: World, rules: Rules) -> list[Draft]:
    """Every draft that a round can make."""
    found = []
    columns = range(world.vocabulary) if rules.vocabulary is None else rules.vocabulary

    def explore(text: Text, draws: list[float], probability: float) -> None:
        try:
            found.append(Draft(draws, probability, play(world, rules, draws, None, torch.tensor([0.5]))))
        except ScriptTooShortError:
            law = rules.sampling.law(world.drafter[text][list(columns)])
            for column, (share, middle) in enumerate(middles(law)):
                if share:
                    explore((*text, columns[column]), [*draws, middle], probability * share)

    explore((), [], 1.0)
    return found


def put_out(
    found: dict[Text, float], world: World, rules: Rules, one: Draft, coins: Tensor, chance: Tensor, laws: Tensor
) -> None:
    """Add what becomes of one draft, under every fall of the coins and with every token behind what is kept."""
    if rules.sampling.greedy:
        ends = [(one.played.text(0), 1.0)]
    else:
        tried = [(row, *pair) for row in range(len(laws)) for pair in middles(laws[row]) if chance[row] and pair[0]]
        last = torch.tensor([middle for _, _, middle in tried], dtype=torch.float64)
        whole = play(world, rules, one.draws, coins[[row for row, _, _ in tried]], last)
        ends = [(whole.text(number), float(chance[row]) * share) for number, (row, share, _) in enumerate(tried)]
    for text, share in ends:
        found[text] = found.get(text, 0.0) + one.probability * share


def middles(law: Tensor) -> list[tuple[float, float]]:
    """Probability of each token, and a draw that finds it."""
    ends = law.double().cumsum(0) / law.double().sum()
    shares = ends.diff(prepend=ends.new_zeros(1))
    return list(zip(shares.tolist(), (ends - shares / 2).tolist(), strict=True))


def coin_chances(judge: Verification, p: Tensor, q: Tensor, drafted: Tensor, lengths: Tensor) -> Tensor:
    """(B, K) with what probability each coin falls well when those before it fell well and those behind it badly."""
    rows, longest = drafted.shape
    chances = torch.zeros(rows, longest, dtype=torch.float64)
    for i in range(longest):
        low, high = torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
        for _ in range(60):
            middle = (low + high) / 2
            coins = torch.full((rows, longest), FAIL, dtype=torch.float64)
            coins[:, :i] = 0.0
            coins[:, i] = middle.clamp(max=FAIL)
            kept = judge(p, q, drafted, lengths, coins).accepted > i
            low, high = torch.where(kept, middle, low), torch.where(kept, high, middle)
        chances[:, i] = (low + high) / 2
    return chances


def continuation(world: World, sampling: Sampling, text: Text, length: int) -> Tensor:
    """Law of the tokens behind a text up to a total length, from the target; a tensor of (V,) * what is missing."""
    if len(text) == length:
        return torch.ones((), dtype=torch.float64)
    law = sampling.law(world.target[text])
    return torch.stack([law[x] * continuation(world, sampling, (*text, x), length) for x in range(world.vocabulary)])


def output_law(world: World, rules: Rules) -> Tensor:
    """(V,) * (K + 1) law of the first K + 1 tokens that a round and the target behind it put out."""
    length = max(rules.policy.max_length, 1) + 1
    total = torch.zeros((world.vocabulary,) * length, dtype=torch.float64)
    for text, probability in outcomes(world, rules).items():
        total[text] += probability * continuation(world, rules.sampling, text, length)
    return total


def distance(world: World, rules: Rules) -> float:
    """Total variation between what a round puts out and the target's law."""
    wanted = continuation(world, rules.sampling, (), max(rules.policy.max_length, 1) + 1)
    return float((output_law(world, rules) - wanted).abs().sum()) / 2
