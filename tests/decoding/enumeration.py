"""The exact law of what one round of drafting and verifying puts out, by going through every case.

The target and the drafter are tables: logits for every text of up to K tokens over a small vocabulary. All drafts are
listed with their probabilities, every coin of the verification is resolved into the probability with which it falls
well (found by bisection of the code under test, not by its formula), and each outcome is continued with the target's
law. What comes out must be the target's law of texts, to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextlat.decoding.drafting import Drafted
from nextlat.decoding.policies import Policy
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.verification import Verification

Text = tuple[int, ...]
FAIL = 1 - 2.0**-53
"""A coin that falls badly whatever the chance, unless it is 1."""


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


@dataclass
class Rules:
    """How a round is played; each field can be replaced by a mistake."""

    sampling: Sampling
    policy: Policy
    judge: Verification
    draft_law: Callable[[Tensor, Sampling], Tensor] = lambda logits, sampling: sampling.law(logits)
    """Law that tokens are drafted from."""
    declared_law: Callable[[Tensor, Sampling], Tensor] = lambda logits, sampling: sampling.law(logits)
    """Law that the verification is told."""
    discard_below: float = 0.0
    """A mistake: a drafted token that is less likely than this is thrown away, unverified."""


def drafts(world: World, rules: Rules) -> dict[Text, float]:
    """Every draft that can come about, with its probability."""
    out: dict[Text, float] = {}

    def grow(text: Text, probability: float) -> None:
        law = rules.draft_law(world.drafter[text], rules.sampling)
        for token in range(world.vocabulary):
            chance = probability * float(law[token])
            if chance == 0:
                continue
            if float(law[token]) < rules.discard_below:
                out[text] = out.get(text, 0.0) + chance
                continue
            longer = (*text, token)
            logits = world.drafter[text]
            seen = Drafted(len(longer), torch.tensor([token]), logits[None], logits[None], law[None])
            if len(longer) < rules.policy.max_length and bool(rules.policy.goes_on(seen)):
                grow(longer, chance)
            else:
                out[longer] = out.get(longer, 0.0) + chance

    grow((), 1.0)
    return out


def output_law(world: World, rules: Rules) -> Tensor:
    """(V,) * (K + 1) law of the first K + 1 tokens that a round and the target behind it put out."""
    listed = drafts(world, rules)
    longest, vocabulary = max(rules.policy.max_length, 1), world.vocabulary
    texts = list(listed)
    padded = torch.zeros(len(texts), longest, dtype=torch.int64)
    p = torch.full((len(texts), longest + 1, vocabulary), 1.0 / vocabulary, dtype=torch.float64)
    q = torch.full((len(texts), longest, vocabulary), 1.0 / vocabulary, dtype=torch.float64)
    for row, text in enumerate(texts):
        for i in range(len(text) + 1):
            p[row, i] = rules.sampling.law(world.target[text[:i]])
            if i < len(text):
                padded[row, i] = text[i]
                q[row, i] = rules.declared_law(world.drafter[text[:i]], rules.sampling)
    lengths = torch.tensor([len(text) for text in texts])
    chances = coin_chances(rules.judge, p, q, padded, lengths)
    total = torch.zeros((vocabulary,) * (longest + 1), dtype=torch.float64)
    for falls in itertools.product([True, False], repeat=longest):
        coins = torch.tensor([0.0 if well else FAIL for well in falls], dtype=torch.float64).expand(len(texts), -1)
        verdict = rules.judge(p, q, padded, lengths, coins)
        weight = torch.ones(len(texts), dtype=torch.float64)
        for i, well in enumerate(falls):
            weight = weight * (chances[:, i] if well else 1 - chances[:, i])
        for row, text in enumerate(texts):
            share = float(weight[row]) * listed[text]
            if share == 0:
                continue
            kept = text[: int(verdict.accepted[row])]
            for token in range(vocabulary):
                after = share * float(verdict.law[row, token])
                if after:
                    total[(*kept, token)] += after * continuation(world, rules.sampling, (*kept, token), longest + 1)
    return total


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


def distance(world: World, rules: Rules) -> float:
    """Total variation between what a round puts out and the target's law."""
    found = output_law(world, rules)
    wanted = continuation(world, rules.sampling, (), max(rules.policy.max_length, 1) + 1)
    return float((found - wanted).abs().sum()) / 2
