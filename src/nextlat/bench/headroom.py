"""What adapting lengths could gain at most: if what is kept, or how likely it is, were known beforehand."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextlat.decoding.costs import Costs
from nextlat.decoding.drafting import draft, over_all
from nextlat.decoding.generate import generate
from nextlat.decoding.policies import Static
from nextlat.decoding.sampling import Sampling
from nextlat.model.cache import Cache
from nextlat.model.interfaces import CausalLM, Drafter

DRAFTS = 16
"""Drafts from a place that tell how likely one is kept there."""
ROUNDS = 8
"""Most times that a rate is set to what lengths chosen by it have reached."""


@torch.inference_mode()
def kept_from(lm: CausalLM, drafter: Drafter, prompt: Tensor, new: int, longest: int) -> list[int]:
    """Of a greedy continuation by ``new`` tokens: how many drafted tokens would be kept behind each but the last.

    Args:
        lm: the model.
        drafter: of the model.
        prompt: (P,) int64.
        new: tokens to add.
        longest: draft that is tried.
    """
    greedy, policy = Sampling(), Static(longest)
    text = generate(lm, prompt[None], new)  # (1, new)
    kept = []
    for place, known, state, _ in _places(lm, drafter, prompt, text, 0):
        room = torch.tensor([min(longest, new - 2 - place)], device=prompt.device)  # the model adds one itself
        made = draft(drafter, state, known, greedy, policy, room, int(text.max()) + 1, torch.rand)
        drafted = text[:, :0] if made is None else made.tokens
        kept.append(int((drafted == text[:, place + 1 :][:, : drafted.shape[1]]).cumprod(1).sum()))
    return kept


def _places(
    lm: CausalLM, drafter: Drafter, prompt: Tensor, text: Tensor, spare: int
) -> Iterator[tuple[int, Tensor, Any, Cache]]:
    """Of every place of a (1, N) continuation but the last: number, known token, state and cache before it.

    The cache has room for ``spare`` positions more.
    """
    cache = lm.new_cache(1, len(prompt) + text.shape[1] + spare)
    last = torch.tensor([len(prompt) - 1], device=prompt.device)
    output = lm(prompt[None], cache=cache, logits_at=last)
    for place in range(text.shape[1] - 1):
        known = text[:, place]
        yield place, known, drafter.observe(output, last), cache
        output, last = lm(known[:, None], cache=cache), torch.zeros_like(last)


def headroom(texts: Sequence[Sequence[int]], costs: Costs, longest: int, tried: Sequence[int]) -> float:
    """Cost of the best fixed length over that of lengths chosen in hindsight, by measured costs: no policy gains more.

    Args:
        texts: of each, what :func:`kept_from` gives.
        costs: of rounds.
        longest: draft that may be chosen.
        tried: fixed lengths.
    """

    def fixed(length: int) -> float:
        spent = 0.0
        for kept in texts:
            place = 0
            while place < len(kept):
                spent += costs.round(min(length, len(kept) - 1 - place))
                place += 1 + min(length, kept[place])
        return spent

    spent = 0.0
    for kept in texts:
        behind = [0.0] * (len(kept) + 1)  # least cost from each place to the end
        for place in reversed(range(len(kept))):
            behind[place] = min(
                costs.round(n) + behind[place + 1 + min(n, kept[place])]
                for n in range(min(longest, len(kept) - place - 1) + 1)
            )
        spent += behind[0]
    return min(fixed(length) for length in tried) / spent if spent else 1.0


class Foreseen(NamedTuple):
    """Of every place of a sampled text but the last: how far drafts get that go on from there."""

    along: list[list[float]]
    """[place][j]: the chance that 1, ..., j + 1 drafted tokens are kept, given that the text goes on as it does."""
    expected: list[list[float]]
    """The same of any text that the model may write from there: what can be known before the draft, at best."""


@torch.inference_mode()
def foreseen_from(
    lm: CausalLM, drafter: Drafter, prompt: Tensor, new: int, longest: int, sampling: Sampling, seed: int = 0
) -> Foreseen:
    """How likely drafts from every place of a sampled continuation are kept, if they are judged token by token.

    A draft that meets the text is kept with chance ``min(1, q / p)`` a token. What is expected of a place is the mean
    over :data:`DRAFTS` drafts of the products of ``min(1, p / q)``.

    Args:
        lm: the model.
        drafter: of the model.
        prompt: (P,) int64.
        new: tokens to add.
        longest: draft that is tried.
        sampling: above temperature 0.
        seed: of all draws.
    """
    g = torch.Generator().manual_seed(seed)
    text = generate(lm, prompt[None], new, sampling.temperature, g, top_k=sampling.top_k, top_p=sampling.top_p)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    laws = sampling.law(lm(torch.cat([prompt, text[0, :-1]])[None]).logits[0, len(prompt) - 1 :])
    by_model, vocab_size = laws.gather(1, text[0][:, None])[:, 0].tolist(), laws.shape[1]
    alike = torch.zeros(DRAFTS, dtype=torch.int64, device=prompt.device)
    found = Foreseen([], [])
    for place, known, state, cache in _places(lm, drafter, prompt, text, longest):
        room = min(longest, new - 2 - place)
        rolled, survival, along = state, 1.0, []
        for token in range(place + 1, place + 1 + room):
            rolled, logits = drafter.step(rolled, text[:, token - 1])
            q = over_all(sampling.law(logits), drafter.vocabulary, vocab_size)[0, text[0, token]]
            survival *= min(1.0, float(q) / by_model[token])
            along.append(survival)
        found.along.append(along)
        many, rooms = drafter.select(state, alike), torch.full_like(alike, room)
        made = draft(drafter, many, known.expand(DRAFTS), sampling, Static(longest), rooms, vocab_size, uniform)
        if made is None:
            found.expected.append([])
            continue
        branches = copy.copy(cache)
        branches.select(alike.tolist())
        judged = lm(torch.cat([known.expand(DRAFTS)[:, None], made.tokens], 1), cache=branches)
        drafted = made.tokens[..., None]
        ratio = sampling.law(judged.logits[:, :-1]).gather(-1, drafted) / made.laws.gather(-1, drafted)
        found.expected.append(ratio[..., 0].clamp(max=1).cumprod(1).mean(0).tolist())
    return found


def headroom_of_chances(texts: Sequence[Foreseen], costs: Costs, longest: int, tried: Sequence[int]) -> float:
    """Cost of the best fixed length over that of lengths chosen by how likely drafts are kept, were this known.

    Each length has the most expected tokens for its cost, at the rate that is reached by such lengths. It is what a
    head gains that foresees as well as can be: at a temperature the coins, and the text, are not known beforehand.

    Args:
        texts: of each, what :func:`foreseen_from` gives.
        costs: of rounds.
        longest: draft that may be chosen.
        tried: fixed lengths.
    """
    tokens = sum(len(text.along) for text in texts)
    if not tokens:
        return 1.0
    fixed = min(sum(_expected_cost(text, [length] * len(text.along), costs) for text in texts) for length in tried)
    spent = fixed
    for _ in range(ROUNDS):
        rate, before = tokens / spent, spent
        spent = min(
            spent,
            sum(
                _expected_cost(text, [_worth_most(curve[:longest], costs, rate) for curve in text.expected], costs)
                for text in texts
            ),
        )
        if spent == before:
            break
    return fixed / spent


def _worth_most(survival: Sequence[float], costs: Costs, rate: float) -> int:
    """The length with the most expected tokens beyond what its time is worth."""
    return max(range(len(survival) + 1), key=lambda n: sum(survival[:n]) - rate * costs.round(n))


def _expected_cost(text: Foreseen, lengths: Sequence[int], costs: Costs) -> float:
    """Of decoding a text from its first token with given lengths at every place."""
    behind = [0.0] * (len(text.along) + 1)
    for place in reversed(range(len(text.along))):
        survival = text.along[place][: lengths[place]]
        ends = [a - b for a, b in zip([1.0, *survival], [*survival, 0.0], strict=True)]
        behind[place] = costs.round(len(survival)) + sum(
            chance * behind[place + 1 + kept] for kept, chance in enumerate(ends)
        )
    return behind[0]
