"""Cost-aware drafts beat the best fixed length where acceptance comes in bursts, and lose nothing elsewhere."""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import NamedTuple

import pytest
import torch

from nextlat import generate
from nextlat.decoding import Sampling, Statistics
from nextlat.decoding.adaptive import BINS, CENTRES, CUT, CostAware, Forecast, bin_of, pooled
from nextlat.decoding.costs import Costs
from nextlat.decoding.drafting import Drafted
from nextlat.decoding.policies import Heuristic
from nextlat.decoding.verification import VERIFICATIONS
from nextlat.errors import NextLatError
from tests.decoding.enumeration import Rules, World, distance
from tests.decoding.test_costs import NAIVE, PACKED
from tests.decoding.test_speculative import prompts, trained

COSTS = {
    "packed": Costs(0.07, PACKED),
    "naive": Costs(0.107, NAIVE),
    "flat": Costs(0.03, {32: 1.0}),
    "stairs": Costs(0.05, {3: 1.0, 4: 1.6, 7: 1.6, 8: 2.4, 32: 2.6}),
    "dear": Costs(0.6, PACKED),
    "too dear": Costs(1.2, PACKED),
}
LONGEST = 20
TOKENS = 8_000


class Token(NamedTuple):
    """One place of a text."""

    acceptance: float
    """Chance that its draft is kept."""
    guess: float
    """What the drafter says of that."""


@cache
def spans(power: float = 1.0) -> list[Token]:
    """Easy and hard passages in turn; the drafter knows the chances, or their power."""
    rng, text = random.Random(1), []
    for easy in itertools.cycle([True, False]):
        for _ in range(1 + int(rng.expovariate(1 / (30 if easy else 15)))):
            a = rng.betavariate(20, 1) if easy else rng.betavariate(2, 4)
            text.append(Token(a, a**power))
        if len(text) >= TOKENS:
            return text[:TOKENS]
    raise AssertionError


@cache
def independent() -> list[Token]:
    """Every token as easy as it happens to be, and the drafter knows."""
    rng = random.Random(1)
    return [Token(a, a) for a in (rng.betavariate(0.7, 0.35) for _ in range(TOKENS))]


@cache
def blind(acceptance: float) -> list[Token]:
    """All alike, and the drafter's guesses mean nothing."""
    rng = random.Random(1)
    return [Token(acceptance, rng.random()) for _ in range(TOKENS)]


def play(text: list[Token], costs: Costs, policy: CostAware | int, decay: float = 1.0) -> float:
    """Tokens per plain step of a simulated run.

    Coins decide where rounds begin; of the tokens of each round the expectation is counted, which is less noisy.

    Args:
        text: what is decoded.
        costs: of a round.
        policy: or a fixed length.
        decay: share of the chance that is left with every position of a draft.
    """
    draw, prices = random.Random(2).random, [costs.round(n) for n in range(LONGEST + 1)]
    place, time, tokens = 0, 0.0, 0.0
    while place < len(text) - LONGEST - 1:
        drafted = 0
        if isinstance(policy, int):
            drafted = policy
        elif policy.starts():
            drafted = 1
            while drafted < policy.max_length and policy.decide(drafted, [text[place + drafted - 1].guess]):
                drafted += 1
        kept, falls, survives = 0, False, 1.0
        tokens += 1
        for i in range(drafted):
            chance = text[place + i].acceptance * decay**i
            survives *= chance
            tokens += survives
            falls = falls or draw() >= chance
            kept += not falls
        if not isinstance(policy, int):
            policy.learn([drafted], [kept])
        place, time = place + kept + 1, time + prices[drafted]
    return tokens / time


@cache
def best_fixed(world: str, costs: str, decay: float = 1.0) -> float:
    """Tokens per plain step of the best fixed length, all of them tried."""
    return max(play(WORLDS[world](), COSTS[costs], length, decay) for length in range(LONGEST + 1))


WORLDS = {
    "spans": spans,
    "spans, too sure": lambda: spans(0.2),
    "spans, too timid": lambda: spans(4.0),
    "independent": independent,
    "blind": lambda: blind(0.8),
    "blind, 0.9": lambda: blind(0.9),
}


def gain(world: str, costs: str, decay: float = 1.0) -> float:
    policy = CostAware(COSTS[costs], LONGEST)
    return play(WORLDS[world](), COSTS[costs], policy, decay) / best_fixed(world, costs, decay)


def test_the_best_fixed_length_of_equal_tokens_is_that_of_the_cost_model() -> None:
    costs = COSTS["packed"]
    assert best_fixed("blind", "packed") == pytest.approx(costs.speedup(0.8, costs.best_length(0.8)), rel=1e-9)


@pytest.mark.parametrize("world", ["spans", "spans, too sure", "spans, too timid"])
def test_bursts_are_used_also_by_a_drafter_that_is_too_sure_or_too_timid(world: str) -> None:
    assert gain(world, "packed") > 1.15


@pytest.mark.parametrize("costs", ["naive", "flat", "stairs"])
def test_bursts_are_used_on_every_curve(costs: str) -> None:
    assert gain("spans", costs) > 1.08


@pytest.mark.parametrize("costs", COSTS)
def test_nothing_is_lost_to_the_best_fixed_length_on_independent_tokens(costs: str) -> None:
    assert gain("independent", costs) > 0.99


@pytest.mark.parametrize("costs", COSTS)
def test_nothing_is_lost_where_the_drafter_says_nothing(costs: str) -> None:
    assert gain("blind", costs) > 0.99


@pytest.mark.parametrize("costs", ["packed", "naive", "flat"])
def test_nothing_is_lost_where_drafts_get_worse_with_every_token(costs: str) -> None:
    assert gain("blind, 0.9", costs, decay=0.85) > 0.99


def lengths(text: list[Token], costs: Costs) -> list[int]:
    """Drafted tokens of every round."""
    policy, found = CostAware(costs, LONGEST), []
    learn = policy.learn
    policy.learn = lambda drafted, accepted: (found.append(drafted[0]), learn(drafted, accepted))[1]  # type: ignore[method-assign]
    play(text, costs, policy)
    return found


def test_drafting_stops_where_it_costs_more_than_it_gains() -> None:
    found = lengths(blind(0.8), COSTS["too dear"])
    assert sum(n == 0 for n in found) > 0.98 * len(found)
    found = lengths(blind(0.8), COSTS["dear"])  # one token gains 0.8 and costs 0.62, a second 0.64 and 0.65
    assert sum(n in (1, 2) for n in found) > 0.95 * len(found)


def test_drafting_begins_again_when_the_text_becomes_easy() -> None:
    costs = COSTS["dear"]
    policy = CostAware(costs, LONGEST, memory=500)
    play(blind(0.1), costs, policy)
    easy = blind(0.97)
    assert play(easy, costs, policy) > 1.1  # 1 without drafts, 1.33 with the best


def test_all_numbers_of_further_tokens_are_looked_at() -> None:
    # the second token alone costs 1; the five behind it nothing
    costs = Costs(0.01, {1: 1.0, 2: 1.01, 3: 2.0, 8: 2.01})
    policy = CostAware(costs, 7)
    policy.EXPLORE = 0.0
    rng = random.Random(0)
    for _ in range(400):
        n = 0
        assert policy.starts()
        while True:
            n += 1
            if not policy.decide(n, [0.96]):
                break
        policy.learn([n], [next((i for i in range(n) if rng.random() > 0.95), n)])
    assert n == 7
    assert costs.speedup(0.95, 7) > costs.speedup(0.95, 1) > costs.speedup(0.95, 2)


def test_rows_share_one_decision_and_rows_that_have_stopped_do_not_count() -> None:
    policy = CostAware(COSTS["dear"], 4)
    policy._budget = 0.0
    policy.forecast.chance = [0.0] * (BINS // 2) + [1.0] * (BINS - BINS // 2)
    for step in policy.forecast.ahead[1:]:
        step[:BINS] = policy.forecast.chance
    for guesses, going, goes in (
        ([0.99, 0.99], None, True),
        ([0.01, 0.01], None, False),
        ([0.99, 0.01, 0.01], None, False),  # one row of three is worth a third of what all of them pay
        ([0.99, 0.01, 0.01], [True, False, False], True),
        ([0.99, 0.99], [False, False], False),
    ):
        laws = torch.tensor([[g, 1 - g] for g in guesses])
        columns = torch.zeros(len(guesses), dtype=torch.int64)
        policy.estimator = lambda drafted: drafted.probability.tolist()
        drafted = Drafted(1, columns, laws.log(), None, laws, None if going is None else torch.tensor(going))
        assert policy.goes_on(drafted) is goes


def test_the_cap_holds_and_a_length_of_nothing_drafts_nothing() -> None:
    policy = CostAware(Costs(0.0), 3)
    assert policy.starts()
    assert [policy.decide(i, [1.0]) for i in (1, 2, 3)] == [True, True, False]
    assert not CostAware(Costs(0.0), 0).starts()
    with pytest.raises(NextLatError, match="trust is 0"):
        CostAware(Costs(0.1), 3, trust=0)
    with pytest.raises(NextLatError, match="draft length is -1"):
        CostAware(Costs(0.1), -1)


def test_what_has_faded_away_leaves_chances_that_are_numbers() -> None:
    forecast = Forecast(4, trust=10.0, memory=1.05)
    for _ in range(400):
        forecast.learn(CUT, [3, 3], 1)
        forecast.end_round()
    forecast.refresh()
    assert all(0 <= chance <= 1 for row in forecast.ahead[1:] for chance in row)


def test_shares_are_pooled_where_they_fall() -> None:
    assert pooled([1, 9, 3], [10, 10, 10]) == pytest.approx([0.1, 0.6, 0.6])
    assert pooled([9, 5, 1], [10, 10, 10]) == pytest.approx([0.5, 0.5, 0.5])
    assert pooled([1, 2, 3], [10, 10, 10]) == pytest.approx([0.1, 0.2, 0.3])


def test_a_forecast_learns_chances_and_how_long_passages_last() -> None:
    # bin 1 is kept 3 times in 10 and bin 7 always; each follows itself
    forecast, rng = Forecast(6, trust=10, memory=1e9), random.Random(0)
    for _ in range(3000):
        easy = rng.random() < 0.5
        kept = 4 if easy else next((i for i in range(4) if rng.random() > 0.3), 4)
        forecast.learn(CUT, [7 if easy else 1] * 4, kept)
    forecast.refresh()
    assert forecast.chance[1] == pytest.approx(0.3, abs=0.03)
    assert forecast.chance[7] == pytest.approx(1.0, abs=0.01)
    assert forecast.ahead[3][7] == pytest.approx(1.0, abs=0.02)
    assert forecast.ahead[3][1] == pytest.approx(0.3**3, abs=0.02)
    assert forecast.ahead[1][CUT] == pytest.approx(0.65, abs=0.03)


def test_a_forecast_without_a_look_at_anything_is_what_it_is_told_to_expect() -> None:
    believed = Forecast(4, trust=10, memory=100, mean=0.6, slope=1.0).chance
    assert believed == pytest.approx(CENTRES, abs=0.01)
    doubted = Forecast(4, trust=10, memory=100).chance
    assert doubted == pytest.approx([0.7 + 0.3 * (centre - 0.6) for centre in CENTRES], abs=0.01)
    assert [bin_of(centre) for centre in CENTRES] == list(range(BINS))


def test_what_only_the_position_tells_is_learned_too() -> None:
    forecast, rng = Forecast(3, trust=10, memory=1e9), random.Random(0)
    for _ in range(4000):
        kept = next((i for i in range(3) if rng.random() > (0.9, 0.6, 0.3)[i]), 3)
        forecast.learn(CUT, [5, 5, 5], kept)
        forecast.end_round()
    joint = [forecast.scale[i] * forecast.chance[5] ** i for i in (1, 2, 3)]
    assert joint == pytest.approx([0.9, 0.54, 0.162], abs=0.03)


SAMPLINGS = {"temperature 1": Sampling(1.0), "top 2": Sampling(2.0, top_k=2), "greedy": Sampling(0.0)}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("judge", VERIFICATIONS)
@pytest.mark.parametrize("explores", [0, 12])
def test_a_round_puts_out_the_models_own_law(judge: str, sampling: str, explores: int) -> None:
    # what was learned before the round does not change in it; decisions follow from the drafted tokens alone
    policy = CostAware(Costs(0.45, PACKED), 3)
    policy._budget = float(explores)
    world = World(3, 4, seed=0, closeness=0.3)
    found = {policy.decide(1, [guess]) for guess in CENTRES}
    assert explores or found == {True, False}  # it does choose
    assert distance(world, Rules(SAMPLINGS[sampling], policy, VERIFICATIONS[judge])) < 1e-12


@pytest.mark.parametrize("costs", ["packed", "dear", "too dear"])
def test_greedy_text_is_that_of_plain_decoding_and_rows_may_end(costs: str) -> None:
    objective, counted = trained(), Statistics()
    plain = generate(objective.as_lm(), prompts(5), 40)
    stop = int(plain[0, 9])
    policy = CostAware(COSTS[costs], 6)
    for stops in ([], [stop]):
        made = generate(
            objective.as_lm(),
            prompts(5),
            40,
            stop_tokens=stops,
            drafter=objective.drafter(),
            policy=policy,
            statistics=counted,
        )
        for row, whole in zip(made.tolist(), plain.tolist(), strict=True):
            length = whole.index(stop) + 1 if stop in whole and stops else 40
            assert row[:length] == whole[:length]
    assert sum(counted.drafted) > 0
    assert 0.3 < policy.rate < 7


def test_sampled_text_follows_the_seed() -> None:
    objective = trained()
    made = [
        generate(
            objective.as_lm(),
            prompts(),
            12,
            1.0,
            torch.Generator().manual_seed(0),
            drafter=objective.drafter(),
            policy=CostAware(COSTS["packed"], 5),
        )
        for _ in range(2)
    ]
    assert torch.equal(made[0], made[1])


def test_the_heuristic_grows_by_two_and_shrinks_by_one() -> None:
    policy = Heuristic(8, first=5)
    found = []
    for drafted, accepted in (([5], [5]), ([7], [7]), ([8], [3]), ([7, 2], [7, 2]), ([8, 8], [8, 2]), ([0], [0])):
        policy.learn(drafted, accepted)
        found.append(policy.current)
    assert found == [7, 8, 7, 8, 7, 7]
    for _ in range(20):
        policy.learn([3], [0])
    assert policy.current == 1
    column = torch.zeros(2, dtype=torch.int64)
    assert policy.goes_on(Drafted(1, column, torch.zeros(2, 3), None)) is False
