"""What is concluded from surveys of trained runs, on surveys made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextlat.bench.decode import Replayed, bound, gain
from nextlat.bench.trained import (
    ADAPTIVE,
    LEARNED,
    Contender,
    Survey,
    adaptive_against_static,
    against_rivals,
    best_speed,
    best_static,
    by_costs,
    check_alike,
    on_domain,
    spent,
    survey,
)
from nextlat.decoding.costs import Costs
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.speculative import Statistics
from nextlat.errors import NextLatError
from nextlat.evaluation.speculative import PLAIN, Arm
from nextlat.timing import Timing
from nextlat.training.trained import load_run
from tests.tiny import run_whole, tiny


def arm(seconds: float, tokens: int = 30) -> Arm:
    counted = Statistics(calls=9, rounds=10, tokens=tokens, drafted=[10, 10], reached=[10, 5], accepted=[5, 3])
    return Arm(counted, [seconds / 2, seconds / 2], [0.8, 0.8])


RUN: Any = type("Run", (), {"path": Path("run"), "step": 9})()


def contender(name: str, trained: Any = None, **seconds: float) -> Contender:
    way = {"plain": PLAIN, "adaptive": ADAPTIVE, "learned": LEARNED}
    arms = {way.get(key, key.removeprefix("s")): arm(value) for key, value in seconds.items()}
    drafter: Any = type("Any length", (), {"max_length": None})()
    nothing: Any = None
    costs = Costs(0.1, {1: 1.0, 4: 1.5})
    statics = {key: arm for key, arm in arms.items() if key.isdigit()}
    best = {"prose": best_static(statics)} if statics else {}
    reached = {"prose": [(1.2, 2.0), (1.8, 2.0), (1.5, 2.0)]}
    return Contender(name, trained, nothing, drafter, costs, nothing, {"prose": arms}, {"prose": 1.3}, best, reached)


def test_the_best_fixed_length_took_least_time_and_packing_alone_is_one_of_them() -> None:
    assert best_static(contender("nextlat", plain=9, s0=5, s2=3, s8=4, adaptive=1, learned=1).found["prose"]) == "2"
    assert best_static(contender("nextlat", plain=9, s0=2, s2=3, s8=4, adaptive=1).found["prose"]) == "0"


def test_the_best_fixed_length_is_timed_anew_once_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 is the fastest of all by luck; its own speed, and that of the others named, is that of the later passes
    made: list[dict[str, float]] = [
        {PLAIN: 9, "0": 9, "2": 5, "3": 4, ADAPTIVE: 2, LEARNED: 3},
        {PLAIN: 9, "0": 9, "2": 5, "3": 4.5, ADAPTIVE: 2, LEARNED: 3},
        *({PLAIN: 9, "0": 8, "3": seconds, ADAPTIVE: 7, LEARNED: 6} for seconds in (6, 5.5, 5, 5.2)),
    ]
    asked = []

    def measured(lm: Any, drafter: Any, texts: Any, new: int, sampling: Any, ways: Any, baseline: Any) -> Any:
        asked.append(set(ways))
        return {way: arm(seconds) for way, seconds in made[len(asked) - 1].items()}

    def timed(arms: Any, repetitions: int) -> dict[str, Timing]:
        assert list(arms) == ["step", "call", "round"]
        slower = len(asked) - 2  # behind 1, 2, 3 and 4 passes
        took = {"step": 1.0, "call": 1.5, "round": 1.8}
        return {name: Timing((value * slower,) * repetitions, (99.0,) * repetitions) for name, value in took.items()}

    def parts(lm: Any, drafter: Any, length: int, rows: int, context: int, repeats: int, sampling: Sampling) -> Any:
        assert (length, rows, context, sampling) == (3, 1, 6, Sampling(1.0))
        return dict.fromkeys(("step", "call", "round"))

    monkeypatch.setattr("nextlat.bench.trained.interleave", timed)
    monkeypatch.setattr("nextlat.bench.trained.parts_of_rounds", parts)
    monkeypatch.setattr("nextlat.bench.trained.measure_domain", measured)
    monkeypatch.setattr("nextlat.bench.trained.domain_prompts", lambda *_: [])
    monkeypatch.setattr("nextlat.bench.trained.task_tokenizer", lambda _: None)
    task = type("Task", (), {"sequence_length": 8})()
    objective = type("Objective", (), {"as_lm": lambda self: None})()
    built = type("Built", (), {"task": task, "objective": objective})()
    fit: Any = type("Fitted", (), {"head": None})()
    one = contender("nextlat", type("Run", (), {"path": Path("run"), "built": built})())._replace(fit=fit)
    survey(one, "prose", Survey(1, 2, 3), Sampling(1.0))
    assert one.best["prose"] == "3"
    assert asked[2:] == [{"0", "3", ADAPTIVE, LEARNED}] * 4
    assert {way: spent(found) for way, found in one.found["prose"].items()} == pytest.approx(
        {PLAIN: 9, "0": 8, "2": 5, "3": 5, ADAPTIVE: 7, LEARNED: 6}
    )
    # by prices of its own minute a pass is as good in a slow one: ten rounds of two drafts make 30 tokens
    most = pytest.approx(30 / (10 * (one.costs.verification(3) + 2 * 0.1)))
    assert one.reached["prose"] == [(pytest.approx(8 / seconds), most) for seconds in (6, 5.5, 5, 5.2)]


def test_speed_is_tokens_over_seconds_of_all_domains() -> None:
    found = {
        "prose": {PLAIN: arm(4, 30), "2": arm(1, 30)},
        "code": {PLAIN: arm(4, 30), "2": arm(9, 40)},
    }
    assert best_speed(found) == (PLAIN, pytest.approx(60 / 8))
    found["prose"][PLAIN].statistics.opening = 2  # which came with the prompts, before the clock was started
    assert best_speed(found) == (PLAIN, pytest.approx(58 / 8))


def test_a_rival_that_is_slower_makes_a_ratio_above_one() -> None:
    ours = contender("nextlat", plain=9, s2=3, adaptive=2)
    rivals = [contender("mtp", plain=9, s1=6, adaptive=7), contender("jtp", plain=9, s1=1.5, adaptive=7)]
    found = {result.name: result for result in against_rivals([*rivals, ours], 0.0)}
    assert found["tokens/s: nextlat / mtp"].value == pytest.approx(3)
    assert found["tokens/s: nextlat / jtp"].value == pytest.approx(0.75)
    assert found["tokens/s: nextlat / jtp"].of == f"{ADAPTIVE}, 1"


def test_the_gain_of_adapting_is_over_the_best_fixed_length_of_each_domain() -> None:
    one = contender("nextlat", RUN, plain=8, s0=6, s2=3, adaptive=2, learned=1.5)
    one.found["code"] = {PLAIN: arm(8), "0": arm(1), "2": arm(3), ADAPTIVE: arm(2), LEARNED: arm(0.8)}
    one.best["code"] = best_static(one.found["code"])
    found = {result.name: result for result in adaptive_against_static(one, 0.0)}
    assert found["adaptive / best fixed length: geometric mean"].value == pytest.approx((1.5 * 0.5) ** 0.5)
    assert found["adaptive / best fixed length: least"].value == pytest.approx(0.5)
    mean, least = (found[f"{LEARNED} / best fixed length: {name}"] for name in ("geometric mean", "least"))
    assert (mean.value, mean.target) == (pytest.approx((2 * 1.25) ** 0.5), 1.15)
    assert (least.value, least.target) == (pytest.approx(1.25), 0.99)


def test_by_costs_lengths_are_compared_by_what_rounds_cost_and_not_by_seconds() -> None:
    arms = contender("nextlat", RUN, plain=8, s0=1, s2=3, s1=2, adaptive=9).found["prose"]
    arms["0"].statistics.__init__(rounds=20, tokens=20)  # type: ignore[misc]
    arms["1"].statistics.__init__(rounds=12, tokens=20, drafted=[12])  # type: ignore[misc]
    arms["2"].statistics.__init__(rounds=10, tokens=20, drafted=[10, 10])  # type: ignore[misc]
    arms[ADAPTIVE].statistics.__init__(rounds=11, tokens=20, drafted=[10, 6])  # type: ignore[misc]
    costs = Costs(0.1, {1: 1.0, 2: 1.2, 3: 1.5}, overhead=0.7)
    wanted = min(20, 12 * 1.3, 10 * 1.7) / (1 + 4 * 1.3 + 6 * 1.7)
    assert by_costs(arms, ADAPTIVE, costs) == pytest.approx(wanted)


def test_the_bound_charges_every_round_what_it_drafted() -> None:
    # 10 rounds: one without drafts, four of one token, five of three; 25 tokens behind the first
    counted = Statistics(rounds=10, tokens=26, opening=1, drafted=[9, 5, 5])
    costs = Costs(0.1, {1: 1.0, 2: 1.2, 4: 1.5})
    assert bound(counted, costs) == pytest.approx(25 / (1 * 1.0 + 4 * (1.2 + 0.1) + 5 * (1.5 + 0.3)))


def test_the_limit_of_a_gain_is_the_bound_in_units_of_the_faster_plain_decoding() -> None:
    times = {"plain": 3.0, "packed": 4.0, "drafted": 2.0}
    found = {name: Timing((value,) * 3, (value,) * 3) for name, value in times.items()}
    texts = [Statistics(rounds=10, tokens=25, opening=1, drafted=[10])] * 3
    made = gain("8 rows: plain / drafted", Replayed(found, texts, Costs(0.2, {1: 1.0, 2: 0.8})), 1.7, {})
    assert made.value == pytest.approx(3 / 2)
    assert made.limit == pytest.approx(2.4 * 3 / 4)


def test_a_domain_has_gains_over_plain_decoding_and_a_bound_in_units_of_the_weights_that_drafts_get() -> None:
    one = contender("nextlat", RUN, plain=8, s0=6, s2=3, adaptive=2, learned=2)
    found = {result.name: result.value for result in on_domain(one, "prose", 0.0)}
    assert found["plain / drafts of 2, the best fixed length"] == pytest.approx(8 / 3)
    assert found["plain / adaptive"] == pytest.approx(4)
    assert found["adaptive / the best fixed length"] == pytest.approx(1.5)
    assert found["share of the bound reached"] == pytest.approx(0.75)  # the median of the passes
    limits = [
        {result.name: result.limit for result in on_domain(one, "prose", temperature)}[
            "adaptive / the best fixed length"
        ]
        for temperature in (0.0, 1.0)
    ]
    assert limits == [1.3, 1.3]
    nothing = contender("nextlat", RUN, plain=8, s0=2, s2=3, adaptive=2, learned=2)
    found = {result.name: result.value for result in on_domain(nothing, "prose", 0.0)}
    assert found["plain / drafts of 0, the best fixed length"] == pytest.approx(4)
    assert "share of the bound reached" not in found


def test_runs_that_say_nothing_of_the_objective_are_not_compared(tmp_path: Path) -> None:
    quick = "training.evaluate_every=null"
    runs = [
        load_run(run_whole(tiny(objective, *options, quick, name=name), tmp_path))
        for name, objective, options in (
            ("a", "nextlat", ()),
            ("b", "nextlat", ("seed=1",)),
            ("c", "mtp", ()),
            ("d", "mtp", ("training.steps=5",)),
        )
    ]
    check_alike([runs[0], runs[2]])
    with pytest.raises(NextLatError, match=r"a and \S+b are both runs of nextlat; give one of each objective"):
        check_alike(runs[:2])
    with pytest.raises(NextLatError, match="differ in `training:`; compare runs that were trained alike"):
        check_alike([runs[0], runs[3]])
