"""The limit of dialled drafts is made of prices that are timed in turn with the texts."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from nextlat.bench import decode
from nextlat.bench.replay import Replay, steady
from nextlat.decoding.costs import Costs
from nextlat.decoding.generate import generate
from nextlat.decoding.packed import Packed, packed
from nextlat.decoding.policies import Static
from nextlat.decoding.speculative import Statistics
from nextlat.timing import Prepared, Timing

TOOK = {"plain": 30.0, "packed": 24.0, "drafted": 9.0, "step": 2.0, "call": 3.0, "round": 3.9}
BEFOREHAND = Costs(0.05, {1: 1.0, 2: 1.1, 4: 1.2, 5: 9.0, 17: 99.0}, overhead=0.3)
"""Three tokens are drafted where all are kept."""
CONTEXT, NEW = 6, 27
LIMIT = 26 / (6 * (3.0 / 2.0 + 3 * 0.15) + (1.1 + 0.15))
"""After the first token six rounds of 3 drafts and one of 1, for which there is room: of the call over 2 positions only
the price beforehand is known."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """All drafts are kept and arms take known seconds; returns the calls of packed weights by arm, in the last turn."""
    found: dict[str, list[Any]] = {}
    call, arm_of = Packed.__call__, [""]

    def watched(self: Packed, tokens: Tensor, *args: Any, cache: Any, **options: Any) -> Any:
        found.setdefault(arm_of[0], []).append((tuple(tokens.shape), cache.lengths))
        return call(self, tokens, *args, cache=cache, **options)

    def interleave(arms: Any, repetitions: int) -> dict[str, Timing]:
        for _ in range(1 + repetitions):
            found.clear()
            for arm_of[0], arm in arms.items():
                if isinstance(arm, Prepared):
                    arm_of[0], within = "prompts", arm_of[0]
                    arm = arm.arm()
                    arm_of[0] = within
                arm()
        took = {name: TOOK[name.split()[0]] for name in arms}
        return {name: Timing((value,) * repetitions, (value,) * repetitions) for name, value in took.items()}

    monkeypatch.setattr(Packed, "__call__", watched)
    monkeypatch.setattr(decode, "interleave", interleave)
    monkeypatch.setattr(decode, "measure_costs", lambda *args, **options: BEFOREHAND)
    monkeypatch.setattr(decode, "SPEEDUPS", {1.0: 5.0})
    monkeypatch.setattr(decode, "BATCH_ACCEPTANCE", 1.0)
    return found


def check_parts(calls: dict[str, list[Any]], rows: int) -> None:
    """Three repeats of each, in the middle of the text, over one position or over a draft and one."""
    step, call = (((rows, count), [CONTEXT + NEW // 2] * rows) for count in (1, 4))
    assert [calls[part] for part in ("step", "call", "round")] == [[step] * 3, [call] * 3, [call] * 3]


def test_the_limit_of_dialled_drafts_is_that_of_prices_timed_with_them(calls: dict[str, list[Any]]) -> None:
    found = {made.name: made for made in decode.dialled(decode.TINY, CONTEXT, NEW, 3)}
    check_parts(calls, 1)
    assert found["decoding, acceptance 1.0: plain / drafted"].limit == pytest.approx(LIMIT)
    # the first token comes with the prompt, and is not timed
    assert [shape for shape, _ in calls["prompts"]] == [(1, CONTEXT)] * (1 + decode.COINS)
    assert len(calls["packed"]) == NEW - 1
    assert [len(calls[f"drafted {number}"]) for number in range(decode.COINS)] == [7] * decode.COINS
    share = found["share of the bound reached, acceptance 1.0"]
    assert share.value == pytest.approx((24 / 9) / LIMIT)
    assert "timed in turn" in share.note
    # what is measured beforehand is printed as before
    assert found["draft step / cached step"].value == 0.05
    assert found["verifying 4 positions / one"].value == 1.2


def test_luck_with_the_coins_moves_gain_and_bound_of_a_repetition_alike() -> None:
    lucky = Statistics(rounds=5, tokens=21, opening=1, drafted=[5, 5, 5])
    poor = Statistics(rounds=10, tokens=21, opening=1, drafted=[10, 10, 10])
    costs = Costs(0.1, {1: 1.0, 4: 1.7})  # 2 a round: bounds of 2 and 1
    found = {"packed": Timing((30.0, 36.0), (1.0, 1.0)), "drafted": Timing((20.0, 40.0), (1.0, 1.0))}
    made = decode.Replayed(found, [lucky, poor], costs)
    assert made.reached() == [(1.5, pytest.approx(2.0)), (0.9, pytest.approx(1.0))]
    assert made.counted == Statistics(rounds=15, tokens=42, opening=2, drafted=[15, 15, 15])
    assert decode.share_of_bound("share", made.reached(), {}).value == pytest.approx((0.75 + 0.9) / 2)


def test_texts_with_drafts_stand_beside_those_without_of_their_turn() -> None:
    first, second = Timing((1.0, 2.0), (5.0, 6.0)), Timing((3.0, 4.0), (7.0, 8.0))
    assert decode.side_by_side([first, second]) == Timing((1.0, 3.0, 2.0, 4.0), (5.0, 7.0, 6.0, 8.0))


def test_what_is_counted_is_of_the_texts_that_were_timed_and_not_of_those_before(calls: dict[str, list[Any]]) -> None:
    objective = decode.TINY.build()
    lm, drafter, prompts = objective.as_lm(), objective.drafter(), decode.prompt(1, CONTEXT, decode.TINY.vocab)
    recorded = generate(lm, prompts, NEW)
    costs = Costs(0.01, {1: 1.0, 17: 1.1})
    with packed(lm) as fast:
        made = decode.in_turn(lm, fast, drafter, prompts, recorded, 0.5, costs, 2)
    expected = []
    for seed in range(decode.COINS, 3 * decode.COINS):
        expected.append(Statistics())
        drafts = Replay(drafter, recorded, steady(0.5), seed=seed)
        generate(lm, prompts, NEW, drafter=drafts, policy=Static(costs.best_length(0.5, 16)), statistics=expected[-1])
    assert made.texts == expected
    assert len({text.rounds for text in expected}) > 1


def test_texts_that_are_not_the_recorded_one_are_noticed() -> None:
    lm = decode.TINY.build().as_lm()
    prompts = decode.prompt(1, CONTEXT, decode.TINY.vocab)
    recorded = generate(lm, prompts, NEW)
    decode.behind_prompts(lm, prompts, recorded)()
    for place in (0, NEW - 1):
        other = recorded.clone()
        other[0, place] += 1
        with pytest.raises(AssertionError, match="not the text that was recorded"):
            decode.behind_prompts(lm, prompts, other)()


def test_the_limit_of_rows_is_that_of_prices_timed_with_all_of_them(calls: dict[str, list[Any]]) -> None:
    (made,) = decode.batched(decode.TINY, CONTEXT, NEW, 3)
    check_parts(calls, decode.BATCH)
    assert made.limit == pytest.approx(LIMIT)
