"""Measuring: order of the arms, ratios of medians, and memory that is known beforehand."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref

import pytest
import torch

from nextlat.bench.measure import peak_memory
from nextlat.bench.results import Result, notes, number
from nextlat.timing import Arm, Prepared, Timing, compare, interleave

MEGABYTE = 2**20


def test_arms_run_in_turn_and_the_warm_up_is_not_timed() -> None:
    order: list[str] = []
    found = interleave({name: lambda name=name: order.append(name) for name in "ABC"}, repetitions=2, warmup=1)
    assert "".join(order) == "ABCABCABC"
    assert list(found) == ["A", "B", "C"]
    assert all(len(times) == 2 for timing in found.values() for times in timing)


def test_what_is_made_for_an_arm_is_made_anew_each_time_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [0.0], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[0] / 2)

    def takes(seconds: float) -> None:
        now[0] += seconds

    def prepare() -> Arm:
        takes(100)
        made.append(now[0])
        return lambda: takes(len(made))

    found = interleave({"prepared": Prepared(prepare), "plain": lambda: takes(7)}, repetitions=2)
    assert found == {"prepared": Timing((1.5, 2.0), (3.0, 4.0)), "plain": Timing((3.5, 3.5), (7.0, 7.0))}


def test_the_collector_rests_while_arms_run_and_works_again_afterwards() -> None:
    enabled: list[bool] = []
    interleave({"arm": lambda: enabled.append(gc.isenabled())}, repetitions=2)
    assert enabled == [False, False, False]
    assert gc.isenabled()


def test_garbage_of_a_round_is_collected_before_the_next_and_older_objects_are_not_gone_through() -> None:
    class Knot:
        """Frees itself only by the collector."""

        def __init__(self) -> None:
            self.self = self

    alive: weakref.WeakSet[Knot] = weakref.WeakSet()
    left, frozen = [], []

    def arm() -> None:
        left.append(len(alive))
        frozen.append(gc.get_freeze_count())
        alive.add(Knot())

    interleave({"arm": arm}, repetitions=3)
    assert left == [0, 0, 0, 0]
    assert min(frozen) > 1000
    assert gc.get_freeze_count() == 0


def test_the_collector_works_again_after_an_arm_has_failed() -> None:
    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        interleave({"arm": fail}, repetitions=1)
    assert gc.isenabled()


def test_a_ratio_is_that_of_medians_of_processor_time_on_one_thread() -> None:
    slow, fast = Timing((6.0, 9.0, 30.0), (1.0, 1.0, 1.0)), Timing((3.0, 2.0, 4.0), (4.0, 2.0, 1.0))
    ratio = compare(slow, fast)
    assert ratio.value == 3.0  # 9 / 3; the mean of the ratios would be 4.67
    assert ratio.wall == 0.5
    assert (ratio.low, ratio.high) == (3.25, 6.0)  # of 2, 4.5 and 7.5


def test_a_ratio_is_that_of_wall_time_on_several_threads() -> None:
    torch.set_num_threads(2)
    assert compare(Timing((8.0,), (3.0,)), Timing((1.0,), (2.0,))).value == 1.5


def test_peak_memory_finds_a_known_allocation_and_forgets_what_was_freed() -> None:
    def call() -> torch.Tensor:
        first = torch.ones(40 * MEGABYTE // 4)
        first = first[:1].clone()  # frees 40 MB
        second = torch.ones(60 * MEGABYTE // 4)
        third = torch.ones(10 * MEGABYTE // 4)
        return second[:1] + third[:1] + first

    before = torch.ones(30 * MEGABYTE // 4)
    peak = peak_memory(call)
    assert 70 * MEGABYTE <= peak.tensors < 70 * MEGABYTE + 10_000
    assert before.numel()


RESIDENT = """
import torch
from nextlat.bench.measure import peak_memory
peak_memory(lambda: torch.ones(100))  # the profiler's own buffers
peak = peak_memory(lambda: (torch.ones(40 * 2**18).sum(), torch.ones(70 * 2**18))[1])
print(-1 if peak.resident is None else peak.resident)
"""


def test_resident_memory_grows_by_what_a_call_holds_at_once() -> None:
    # in a process of its own: what other tests left to the C library's allocator would be reused or given back
    said = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True).stdout
    resident = int(said.split()[-1])
    assert resident == -1 or 60 * MEGABYTE < resident < 90 * MEGABYTE


def test_of_several_calls_the_least_resident_growth_counts() -> None:
    sizes = iter([2**25, 2**21, 2**21])  # floats: 128 MiB, then 8; the last call is the profiler's
    peak = peak_memory(lambda: torch.ones(next(sizes)), calls=2)
    if peak.resident is None:
        pytest.skip("this system does not tell the resident set's peak")
    assert peak.resident < 2**26
    assert peak.tensors == 2**23


def test_an_inplace_operation_costs_no_memory() -> None:
    x = torch.ones(MEGABYTE)
    assert peak_memory(lambda: x.mul_(2)).tensors < 1000


def test_results_know_whether_they_meet_their_target() -> None:
    assert Result("a", 2.0, 2.0).met is True
    assert Result("a", 1.9, 2.0).met is False
    assert Result("a", 1.9, 2.0, at_least=False).met is True
    assert Result("a", 2.1, 2.0, at_least=False).met is False
    assert Result("a", None, 2.0).met is None
    assert Result("a", 2.0).met is None
    assert Result("a", 1.9, 2.0).plain()["met"] is False


def test_notes_come_once_and_numbers_keep_three_digits() -> None:
    assert notes([Result("a", 1.0, note="x"), Result("a", 2.0, note="x"), Result("b", 1.0)]) == ["x"]
    assert [number(x) for x in (12_345.678, 2.5, 0.1234, 0.00012, 0.0)] == [
        "12,345.68",
        "2.50",
        "0.123",
        "1.2e-04",
        "0",
    ]
