"""Limits of adapting lengths, against all ways to choose them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch

from nextlat.bench import headroom as module
from nextlat.bench.headroom import Foreseen, foreseen_from, headroom, headroom_of_chances, kept_from
from nextlat.decoding.costs import Costs
from nextlat.decoding.generate import generate
from nextlat.decoding.policies import Static
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.speculative import Statistics
from nextlat.model import Transformer
from nextlat.objectives import NextLat
from tests.decoding.test_acceptance import Constant, Reduced


def walk(kept: list[int], length: int) -> list[tuple[int, int]]:
    """Drafted and kept tokens of every round with drafts of a length; a text ends with a token of the model's own."""
    place, rounds = 0, []
    while place < len(kept):
        room = min(length, len(kept) - 1 - place)
        rounds.append((room, min(room, kept[place])))
        place += 1 + rounds[-1][1]
    return rounds


def test_kept_tokens_behind_every_place_tell_what_every_fixed_length_does() -> None:
    # weights as large as these write a text that is not constant, and drafts of which some are right
    objective = NextLat(
        Transformer(3, 1, 2, 8, generator=torch.Generator().manual_seed(4)),
        generator=torch.Generator().manual_seed(1),
    ).eval()
    for parameter in objective.parameters():
        parameter.data.mul_(20 if parameter.ndim > 1 else 1)
    lm, drafter, prompt = objective.as_lm(), objective.drafter(), torch.tensor([0, 1, 2])
    kept = kept_from(lm, drafter, prompt, 40, 5)
    assert len(kept) == 39
    assert 0 < sum(kept) < 39 * 4
    for length in (1, 3, 5):
        counted = Statistics()
        generate(lm, prompt[None], 40, drafter=drafter, policy=Static(length), statistics=counted)
        rounds = walk(kept, length)
        assert counted.rounds == len(rounds)
        assert sum(counted.drafted) == sum(drafted for drafted, _ in rounds)
        assert sum(counted.accepted) == sum(taken for _, taken in rounds)


def test_headroom_is_that_of_the_cheapest_of_all_ways_to_choose_lengths() -> None:
    costs = Costs(0.3, {1: 1.0, 2: 1.2, 3: 1.9, 4: 2.0})
    texts = [[2, 0, 1, 0, 0], [0, 3, 0, 1, 0, 0, 0]]

    def cheapest(kept: list[int], place: int) -> float:
        if place >= len(kept):
            return 0.0
        lengths = range(min(3, len(kept) - 1 - place) + 1)
        return min(costs.round(n) + cheapest(kept, place + 1 + min(n, kept[place])) for n in lengths)

    fixed = [sum(costs.round(n) for kept in texts for n, _ in walk(kept, length)) for length in range(4)]
    least = sum(cheapest(kept, 0) for kept in texts)
    assert headroom(texts, costs, 3, range(4)) == pytest.approx(min(fixed) / least)
    assert headroom(texts, costs, 3, range(4)) > 1.05
    assert headroom(texts, costs, 3, [0, 2]) == pytest.approx(min(fixed[0], fixed[2]) / least)
    assert headroom([[0, 0, 0]], costs, 3, range(4)) == 1.0  # nothing would be kept: the best length is 0, always
    assert headroom([[]], costs, 3, range(4)) == 1.0


class Alone(Constant):
    """Its drafter's state is nothing to choose from."""

    def select(self, state: int, rows: torch.Tensor) -> int:
        return state


class AloneReduced(Reduced, Alone):
    pass


@pytest.mark.parametrize("model", [Alone(), AloneReduced()])
def test_chances_of_a_place_are_those_of_verification(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAFTS", 400)
    prompt, new, longest = torch.tensor([0]), 12, 4
    found = foreseen_from(model, model, prompt, new, longest, Sampling(1.0), seed=3)
    text = generate(model, prompt[None], new, 1.0, torch.Generator().manual_seed(3))[0].tolist()
    q = dict(zip(range(3) if model.vocabulary is None else model.vocabulary.tolist(), model.Q.tolist(), strict=True))
    kept = sum(min(float(model.P[token]), chance) for token, chance in q.items())
    rooms = [min(longest, new - 2 - place) for place in range(new - 1)]
    assert [len(row) for row in found.expected] == [len(row) for row in found.along] == rooms
    for place, row in enumerate(found.along):
        survival = 1.0
        for j, chance in enumerate(row):
            token = text[place + 1 + j]
            survival *= min(1.0, q.get(token, 0.0) / float(model.P[token]))
            assert chance == pytest.approx(survival, rel=1e-5)
    for j in range(longest):
        column = [row[j] for row in found.expected if len(row) > j]
        assert sum(column) / len(column) == pytest.approx(kept ** (j + 1), abs=0.03)


EASY, HARD = [0.95, 0.9, 0.8], [0.2, 0.05, 0.0]
STAIRS = Costs(0.3, {1: 1.0, 2: 1.2, 3: 1.9, 4: 2.0})


def in_turn(easy: list[float], hard: list[float]) -> list[list[float]]:
    """Chances at eight places, of which every third is hard."""
    return [(easy if place % 3 else hard)[: 7 - place] for place in range(8)]


def cost(curves: list[list[float]], costs: Costs, lengths: Sequence[int]) -> float:
    """Of lengths at every place: every end of every draft, one by one."""

    def behind(place: int) -> float:
        if place >= len(curves):
            return 0.0
        survival = curves[place][: lengths[place]]
        total = costs.round(len(survival))
        for kept in range(len(survival) + 1):
            chance = (survival[kept - 1] if kept else 1.0) - (survival[kept] if kept < len(survival) else 0.0)
            total += chance * behind(place + 1 + kept)
        return total

    return behind(0)


@pytest.mark.parametrize(
    ("easy", "hard", "costs"),
    [
        (EASY, HARD, STAIRS),
        # a token of 0.6 is worth 0.5 of a plain step, but not at the rate that is reached
        ([0.98, 0.96, 0.94], [0.6, 0.3, 0.1], Costs(0.3, {1: 1.0, 2: 1.2, 3: 1.4, 4: 1.6})),
    ],
)
def test_the_limit_of_foreseeing_is_that_of_lengths_by_what_is_expected(
    easy: list[float], hard: list[float], costs: Costs
) -> None:
    curves = in_turn(easy, hard)
    text = Foreseen(curves, curves)
    fixed = min(cost(curves, costs, [length] * 8) for length in range(4))
    least = min(cost(curves, costs, lengths) for lengths in product(range(4), repeat=8))
    found = headroom_of_chances([text, text], costs, 3, range(4))
    assert found == pytest.approx(fixed / least, rel=0.01)
    assert found > 1.1


def test_what_is_kept_must_be_known_beforehand_to_be_gained_by() -> None:
    mean = [[(4 * a + 3 * b) / 7 for a, b in zip(EASY, HARD, strict=True)][: 7 - place] for place in range(8)]
    found = headroom_of_chances([Foreseen(in_turn(EASY, HARD), mean)], STAIRS, 3, range(4))
    assert found == pytest.approx(1.0, abs=0.02)
    assert headroom_of_chances([Foreseen([], [])], STAIRS, 3, [0, 1]) == 1.0
