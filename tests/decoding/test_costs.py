"""What drafts cost and gain: closed forms, simulation, and published tables."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import nextlat.decoding.costs as module
from nextlat.decoding import Sampling
from nextlat.decoding.cheap import cheaper
from nextlat.decoding.costs import Costs, expected_tokens, measure_costs, parts_of_rounds, priced
from nextlat.decoding.sampling import draw
from nextlat.errors import NextLatError
from nextlat.objectives import MTP
from nextlat.timing import Timing
from tests.decoding.test_speculative import trained

PACKED = {1: 1.0, 2: 1.02, 3: 1.07, 4: 1.15, 6: 1.18, 8: 1.33, 12: 1.46, 16: 1.61, 32: 2.25}
"""V(k) of a model of 12 layers, width 768 and 50k tokens on one CPU thread, weights packed."""
NAIVE = {1: 1.0, 2: 1.08, 3: 1.10, 4: 1.87, 6: 1.91, 8: 2.57, 12: 3.28, 16: 2.41, 32: 3.04}
"""The same with the library's usual matrix product: a staircase that even falls once."""


@pytest.mark.parametrize(
    ("costs", "acceptance", "speedup", "length"),
    [
        (Costs(0.067, PACKED), 0.6, 1.63, 2),
        (Costs(0.067, PACKED), 0.8, 2.44, 5),
        (Costs(0.067, PACKED), 0.9, 3.27, 11),
        (Costs(0.04, PACKED), 0.9, 3.78, 11),
        (Costs(0.30, PACKED), 0.8, 1.46, 2),
        (Costs(0.30, NAIVE), 0.6, 1.16, 1),
        (Costs(0.30, NAIVE), 0.95, 1.68, 2),
        (Costs(0.03), 0.8, 3.52, 10),
        (Costs(0.03), 0.95, 8.42, 26),
    ],
)
def test_best_length_and_speedup_of_measured_curves(
    costs: Costs, acceptance: float, speedup: float, length: int
) -> None:
    assert costs.speedup(acceptance, length) == pytest.approx(speedup, rel=0.01)
    best = costs.best_length(acceptance)
    assert abs(best - length) <= 1  # the prices are rounded, and 10 and 11 tokens are equally fast at 0.9
    assert costs.speedup(acceptance, best) == pytest.approx(speedup, rel=0.01)
    assert costs.speedup(acceptance, best) == max(costs.speedup(acceptance, n) for n in range(33))


@pytest.mark.parametrize("length", [0, 1, 4, 9])
@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 0.99])
def test_expected_tokens_are_the_geometric_sum(a: float, length: int) -> None:
    assert expected_tokens(a, length) == pytest.approx((1 - a ** (length + 1)) / (1 - a), rel=1e-12)
    assert expected_tokens([a] * (length + 2), length) == pytest.approx(expected_tokens(a, length), rel=1e-12)


def test_a_perfect_drafter_yields_every_token_and_positions_multiply() -> None:
    assert expected_tokens(1.0, 7) == 8
    assert expected_tokens([0.9, 0.5, 0.2], 3) == pytest.approx(1 + 0.9 + 0.45 + 0.09)
    with pytest.raises(NextLatError, match="known for 2 positions and the draft has 3"):
        expected_tokens([0.9, 0.5], 3)
    with pytest.raises(NextLatError, match="between 0 and 1"):
        expected_tokens(1.2, 3)


def test_tokens_per_time_are_those_of_a_simulated_run() -> None:
    costs, acceptance, length, rng = Costs(0.1, PACKED, overhead=0.05), [0.9, 0.6, 0.8], 3, random.Random(0)
    tokens, rounds = 0, 200_000
    for _ in range(rounds):
        kept = 0
        while kept < length and rng.random() < acceptance[kept]:
            kept += 1
        tokens += kept + 1
    time = rounds * (PACKED[4] + 0.3 + 0.05)
    assert costs.speedup(acceptance, length) == pytest.approx(tokens / time, rel=0.005)


def test_the_cost_of_a_round_without_a_draft_is_one() -> None:
    costs = Costs(0.3, {2: 1.5}, overhead=0.2)
    assert costs.round(0) == 1.0
    assert costs.round(1) == pytest.approx(1.5 + 0.3 + 0.2)


def test_verification_is_measured_between_interpolated_and_beyond_on_a_line() -> None:
    costs = Costs(0.1, {4: 1.6, 2: 1.2, 8: 2.0})
    assert [costs.verification(k) for k in (1, 2, 3, 4, 5, 8)] == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.7, 2.0])
    assert [costs.verification(k) for k in (9, 12)] == pytest.approx([2.1, 2.4])  # as from 4 to 8
    falling = Costs(0.1, {2: 2.0, 4: 1.5})
    assert falling.verification(9) == 1.5
    assert Costs(0.1).verification(100) == 1.0


@pytest.mark.parametrize("costs", [Costs(0.067, PACKED), Costs(0.3, NAIVE), Costs(0.9), Costs(0.05, {2: 1.8, 3: 1.9})])
def test_at_the_break_even_drafts_begin_to_pay(costs: Costs) -> None:
    edge = costs.break_even()
    assert edge is not None
    assert costs.best_length(max(edge - 1e-6, 0.0)) == 0
    assert costs.best_length(edge + 1e-6) > 0
    assert max(costs.speedup(edge, n) for n in range(1, 33)) == pytest.approx(1.0, abs=1e-9)


def test_break_even_in_closed_form_and_where_there_is_none() -> None:
    # one token: 1 + a > 1 + c; more tokens need more
    assert Costs(0.25).break_even(longest=1) == pytest.approx(0.25)
    assert Costs(1.0).break_even() is None
    assert Costs(1.5, PACKED).break_even() is None
    assert Costs(0.0).break_even() == pytest.approx(0.0, abs=1e-9)


def test_acceptance_by_position_bounds_the_best_length() -> None:
    costs = Costs(0.03)
    assert costs.best_length([0.9, 0.9, 0.9]) == 3
    assert costs.best_length([0.9, 0.9, 0.0, 0.9]) == 2
    assert costs.best_length([0.01]) == 0


@pytest.mark.parametrize(
    "given", [{"draft": -0.1}, {"draft": 0.1, "verify": {0: 1.0}}, {"draft": 0.1, "verify": {2: 0.0}}]
)
def test_impossible_costs_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(NextLatError, match="costs are draft="):
        Costs(**given)


ROUNDS = {"plain round": 4.0, "round of 1": 4.0 * 1.7, "round of 4": 4.0 * 2.68}
"""Seconds: of a plain step 1 and 0.1 or 0.2 more than drafting and verifying take."""


def fake_clock(monkeypatch: pytest.MonkeyPatch, rounds: dict[str, float] = ROUNDS) -> dict[str, int]:
    """Every arm runs once and takes the seconds that its name says; returns how often each was run."""
    runs: dict[str, int] = {}

    def took(name: str) -> float:
        if name.isdigit():
            return 2.0 + 0.5 * int(name)
        return {"draft": 4 * 0.5, "renew": 9.0, **rounds}[name]

    def interleave(arms: Any, repetitions: int, warmup: int = 1) -> dict[str, Timing]:
        out = {}
        for name, arm in arms.items():
            arm()
            runs[name] = runs.get(name, 0) + 1
            out[name] = Timing((took(name),) * repetitions, (took(name),) * repetitions)
        return out

    monkeypatch.setattr(module, "interleave", interleave)
    return runs


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=5)])
@pytest.mark.parametrize("rows", [1, 3])
def test_measured_costs_are_in_units_of_a_plain_step(
    rows: int, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fake_clock(monkeypatch)
    objective, lengths = trained(), []
    lm = objective.as_lm()

    class Watched:
        def __call__(self, tokens: Tensor, cache: Any) -> Any:
            lengths.append((tokens.shape, cache.longest))
            return lm(tokens, cache=cache)

        new_cache = staticmethod(lm.new_cache)

    drafter = objective.drafter()
    assert drafter is not None
    costs = measure_costs(Watched(), drafter, rows, 6, [2, 5], sampling=sampling)  # type: ignore[arg-type]
    assert costs.draft == pytest.approx(0.5 / 2.5)
    assert costs.verify == pytest.approx({1: 1.0, 2: 3 / 2.5, 5: 4.5 / 2.5})
    # a round of 1 takes 1.7 plain rounds and must take 1.2 + 0.2, a round of 4 2.68 and 1.8 + 0.8
    assert costs.overhead == pytest.approx((0.3 + 0.08) / 2)
    assert runs == dict.fromkeys(["1", "2", "5", *ROUNDS, "renew", "draft"], 2)
    # every call stands behind the same context, and rounds behind each other
    assert lengths[0] == (torch.Size([rows, 6]), 0)
    calls = [(length[1], begin) for length, begin in lengths[1:]]
    assert calls[:9] == [(1, 6), (2, 6), (5, 6), (1, 6), (2, 6), (2, 8), (5, calls[6][1]), (1, 6), (2, 6)]
    assert calls[6][1] in (9, 10)


def test_an_overhead_is_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch, {"plain round": 4.0, "round of 1": 4.0, "round of 4": 4.0})
    objective = trained()
    assert measure_costs(objective.as_lm(), objective.drafter(), 1, 6, [2, 5]).overhead == 0  # type: ignore[arg-type]


@torch.no_grad()
def test_what_a_drafter_puts_off_is_paid_in_the_arm_that_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that knew their keys from the turn before would look cheaper than they are when decoding."""
    objective = trained("mtp")
    assert isinstance(objective, MTP)
    made, arm_of = dict[str, list[int]](), [""]

    def interleave(arms: Any, repetitions: int, warmup: int = 1) -> dict[str, Timing]:
        for _ in range(repetitions):
            for arm_of[0], arm in arms.items():
                arm()
        return dict.fromkeys(arms, Timing((1.0,), (1.0,)))

    def count(_: object, inputs: tuple[Tensor], output: Tensor) -> None:
        made.setdefault(arm_of[0], []).append(inputs[0].shape[1])

    monkeypatch.setattr(module, "interleave", interleave)
    for head in objective.heads:
        head.block.self_attn.k_proj.register_forward_hook(count)  # type: ignore[union-attr]
    measure_costs(objective.as_lm(), objective.drafter(), 1, 6, [2], budget=0.01)  # type: ignore[arg-type]
    longest = objective.horizon
    assert set(made) == {"round of 1", f"round of {longest}", "draft"}
    turns = len(made["round of 1"])
    assert made["round of 1"] == [8, *[2] * (turns - 1)]  # first the context, then what the call before it added
    assert [len(made[f"round of {longest}"]), len(made["draft"])] == [turns * longest] * 2


def test_costs_of_a_drafter_with_a_horizon_and_real_clock() -> None:
    objective = trained("mtp")  # at most three drafted tokens
    costs = measure_costs(objective.as_lm(), objective.drafter(), 1, 4, [2], budget=0.01)  # type: ignore[arg-type]
    assert costs.draft > 0
    assert list(costs.verify) == [1, 2]
    with pytest.raises(NextLatError, match="rows=0"):
        measure_costs(objective.as_lm(), objective.drafter(), 0, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_of_rounds_stand_behind_one_context_and_drafts_behind_a_call(rows: int) -> None:
    objective, made = trained(), list[tuple[str, Any]]()
    lm, drafter = objective.as_lm(), cheaper(objective.drafter(), torch.tensor([2, 3, 5, 7]))  # type: ignore[arg-type]
    fed, proposed = list[list[int]](), list[list[int]]()

    class WatchedLM:
        def __call__(self, tokens: Tensor, cache: Any) -> Any:
            assert torch.is_inference_mode_enabled()
            made.append(("call", (tuple(tokens.shape), cache.lengths)))
            return lm(tokens, cache=cache)

        new_cache = staticmethod(lm.new_cache)

    class WatchedDrafter:
        max_length, vocabulary, observe = None, drafter.vocabulary, staticmethod(drafter.observe)

        def step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
            made.append(("draft", len(token)))
            state, logits = drafter.step(state, token)
            fed.append(token.tolist())
            proposed.append(self.vocabulary[logits.argmax(-1)].tolist())
            return state, logits

    arms = parts_of_rounds(WatchedLM(), WatchedDrafter(), 4, rows, 6, 3)  # type: ignore[arg-type]
    step, call = (("call", ((rows, count), [6] * rows)) for count in (1, 5))
    assert made == [("call", ((rows, 6), [0] * rows))]
    for name, part in (("step", [step]), ("call", [call]), ("round", [call, *[("draft", rows)] * 4]), ("step", [step])):
        made.clear()
        arms[name]()
        assert made == part * 3
    # a draft begins behind the same known token, and goes on with its own
    assert fed == [[0] * rows, *proposed[:3]] * 3
    assert proposed[:4] * 3 == proposed


def test_parts_of_rounds_draw_as_the_texts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, drawn = trained(), list[int]()
    lm, drafter = objective.as_lm(), objective.drafter()
    assert drafter is not None
    monkeypatch.setattr(module, "draw", lambda law, u: drawn.append(1) or draw(law, u))  # type: ignore[func-returns-value]
    for sampling, draws in ((None, 0), (Sampling(0.7), 3)):
        drawn.clear()
        parts_of_rounds(lm, drafter, 2, 1, 6, 1, sampling)["round"]()
        assert len(drawn) == draws  # two drafted tokens, and the one behind them


def test_prices_of_a_round_are_what_its_parts_took() -> None:
    found = {name: Timing((took,) * 3, (took,) * 3) for name, took in {"step": 2.0, "call": 3.0, "round": 4.0}.items()}
    costs = Costs(0.9, {1: 1.0, 2: 1.1, 5: 7.0, 9: 8.0}, overhead=0.5)
    assert priced(costs, found, 4) == Costs(1.0 / 4 / 2, {1: 1.0, 2: 1.1, 5: 1.5, 9: 8.0})
    assert priced(costs, found, 0) == Costs(0.9, costs.verify)
    assert priced(costs, {**found, "round": found["step"]}, 4).draft == 0  # noise makes no draft cheaper than nothing
