"""What is concluded from surveys of trained runs, on surveys made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextlat.bench.trained import (
    ADAPTIVE,
    Contender,
    adaptive_against_static,
    against_rivals,
    best_speed,
    best_static,
    check_alike,
    on_domain,
)
from nextlat.decoding.costs import Costs
from nextlat.decoding.speculative import Statistics
from nextlat.errors import NextLatError
from nextlat.evaluation.speculative import PLAIN, Arm
from nextlat.training.trained import load_run
from tests.tiny import run_whole, tiny


def arm(seconds: float, tokens: int = 30) -> Arm:
    counted = Statistics(calls=9, rounds=10, tokens=tokens, drafted=[10, 10], reached=[10, 5], accepted=[5, 3])
    return Arm(counted, [seconds / 2, seconds / 2], [0.8, 0.8])


RUN: Any = type("Run", (), {"path": Path("run"), "step": 9})()


def contender(name: str, trained: Any = None, **seconds: float) -> Contender:
    way = {"plain": PLAIN, "adaptive": ADAPTIVE}
    arms = {way.get(key, key.removeprefix("s")): arm(value) for key, value in seconds.items()}
    drafter: Any = type("Any length", (), {"max_length": None})()
    nothing: Any = None
    return Contender(name, trained, nothing, drafter, Costs(0.1, {1: 1.0, 4: 1.5}), {"prose": arms})


def test_the_best_fixed_length_took_least_time_and_packing_alone_is_one_of_them() -> None:
    assert best_static(contender("nextlat", plain=9, s0=5, s2=3, s8=4, adaptive=1).found["prose"]) == "2"
    assert best_static(contender("nextlat", plain=9, s0=2, s2=3, s8=4, adaptive=1).found["prose"]) == "0"


def test_speed_is_tokens_over_seconds_of_all_domains() -> None:
    found = {
        "prose": {PLAIN: arm(4, 30), "2": arm(1, 30)},
        "code": {PLAIN: arm(4, 30), "2": arm(9, 40)},
    }
    assert best_speed(found) == (PLAIN, pytest.approx(60 / 8))


def test_a_rival_that_is_slower_makes_a_ratio_above_one() -> None:
    ours = contender("nextlat", plain=9, s2=3, adaptive=2)
    rivals = [contender("mtp", plain=9, s1=6, adaptive=7), contender("jtp", plain=9, s1=1.5, adaptive=7)]
    found = {result.name: result for result in against_rivals([*rivals, ours], 0.0)}
    assert found["tokens/s: nextlat / mtp"].value == pytest.approx(3)
    assert found["tokens/s: nextlat / jtp"].value == pytest.approx(0.75)
    assert found["tokens/s: nextlat / jtp"].of == f"{ADAPTIVE}, 1"


def test_the_gain_of_adapting_is_over_the_best_fixed_length_of_each_domain() -> None:
    one = contender("nextlat", RUN, plain=8, s0=6, s2=3, adaptive=2)
    one.found["code"] = {PLAIN: arm(8), "0": arm(1), "2": arm(3), ADAPTIVE: arm(2)}
    found = {result.name: result.value for result in adaptive_against_static(one, 0.0)}
    assert found["adaptive / best fixed length: geometric mean"] == pytest.approx((1.5 * 0.5) ** 0.5)
    assert found["adaptive / best fixed length: least"] == pytest.approx(0.5)


def test_a_domain_has_gains_over_plain_decoding_and_a_bound_in_units_of_the_weights_that_drafts_get() -> None:
    one = contender("nextlat", RUN, plain=8, s0=6, s2=3, adaptive=2)
    found = {result.name: result.value for result in on_domain(one, "prose", 0.0)}
    assert found["plain / drafts of 2, the best fixed length"] == pytest.approx(8 / 3)
    assert found["plain / adaptive"] == pytest.approx(4)
    assert found["adaptive / the best fixed length"] == pytest.approx(1.5)
    # 3 tokens a round, which costs V(3) = 1 + 2 / 3 * 0.5 and two draft steps of 0.1
    assert found["share of the bound reached"] == pytest.approx((6 / 3) / (3 / (4 / 3 + 0.2)))
    nothing = contender("nextlat", RUN, plain=8, s0=2, s2=3, adaptive=2)
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
