"""Train steps: nextlat against gpt, gpt against other loops, bst against a loop over sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from nextlat.allocator import keep_freed_memory
from nextlat.batch import Batch
from nextlat.bench.belief import closed_batch, looped_step, make_bst
from nextlat.bench.by_hand import by_hand_step
from nextlat.bench.floors import nextlat_floor
from nextlat.bench.loops import (
    Shape,
    Step,
    bare_llama_step,
    gpt2_step,
    hf_llama_step,
    objective_step,
    ours_step,
    random_batch,
)
from nextlat.bench.results import Effort, Result, milliseconds
from nextlat.timing import Timing, compare, interleave, seconds

OVERHEADS = {1: 1.15, 4: 1.45}
"""Horizon -> largest accepted time of a nextlat step, in gpt steps."""

LOOPS: dict[str, tuple[Callable[[Shape, Batch], Step], float, str]] = {
    "bare Llama": (bare_llama_step, 1.05, ""),
    "Hugging Face Llama": (hf_llama_step, 1.25, ""),
    "nanoGPT-shaped": (
        gpt2_step,
        0.85,
        "nanoGPT-shaped: no rotation, no gate, a tied head",
    ),
}
"""Other loops -> how one is made, least accepted ratio of our tokens per second to its, and a remark."""


class Plan(NamedTuple):
    """What to measure at an effort."""

    overhead: tuple[Shape, int, int]
    """Shape, width of the dynamics, repetitions."""
    loops: tuple[tuple[Shape, int], ...]
    """Shape and repetitions."""
    belief: tuple[tuple[Shape, int], ...]
    """Likewise; the first shape carries the target."""


SIX, FOUR = Shape(6, 256, 4, 1_000, 8, 128), Shape(4, 128, 4, 64, 32, 64)
SHORT_ROWS, LONGER_ROWS = Shape(1, 32, 2, 32, 256, 8), Shape(3, 64, 2, 32, 128, 16)
TINY = Shape(1, 8, 2, 11, 2, 6)

PLANS: dict[Effort, Plan] = {
    "full": Plan((SIX, 256, 11), ((SIX, 31), (FOUR, 61)), ((SHORT_ROWS, 15), (LONGER_ROWS, 9))),
    "quick": Plan((SIX, 256, 5), ((SIX, 5), (FOUR, 7)), ((SHORT_ROWS, 7), (LONGER_ROWS, 3))),
    "tiny": Plan((TINY, 8, 2), ((TINY, 2),), ((TINY, 2),)),
}


def run(effort: Effort) -> Iterator[Result]:
    """All train steps."""
    plan = PLANS[effort]
    keep_freed_memory()  # as in training, and for all arms alike
    yield from overhead(*plan.overhead)
    for shape, repetitions in plan.loops:
        yield from loops(shape, repetitions)
    for index, (shape, repetitions) in enumerate(plan.belief):
        yield from belief(shape, repetitions, 5.0 if index == 0 else None)


def overhead(shape: Shape, hidden_dim: int, repetitions: int) -> Iterator[Result]:
    """What nextlat costs beside gpt."""
    batch = random_batch(shape)
    arms = {"gpt": ours_step("gpt", shape, batch)}
    arms |= {f"nextlat_{h}": ours_step("nextlat", shape, batch, h, hidden_dim) for h in OVERHEADS}
    found = interleave(arms, repetitions, warmup=2)
    for horizon, target in OVERHEADS.items():
        ratio = compare(found[f"nextlat_{horizon}"], found["gpt"])
        yield Result(
            "train step: nextlat / gpt",
            ratio.value,
            target,
            at_least=False,
            wall=ratio.wall,
            spread=(ratio.low, ratio.high),
            limit=nextlat_floor(shape, horizon, hidden_dim),
            note="limit of nextlat / gpt: multiply-adds counted from the shapes, before the optimiser",
            of=milliseconds(seconds(found[f"nextlat_{horizon}"]), seconds(found["gpt"])),
            setting={**shape.described(), "horizon": horizon, "m": hidden_dim, "reps": repetitions},
            details=_seconds(found),
        )


def loops(shape: Shape, repetitions: int) -> Iterator[Result]:
    """Tokens per second of our gpt loop over those of others."""
    batch = random_batch(shape)
    arms = {"ours": ours_step("gpt", shape, batch), "by hand": by_hand_step(shape, batch)}
    missing = {}
    for name, (make, _, _) in LOOPS.items():
        try:
            arms[name] = make(shape, batch)
        except ImportError as error:
            missing[name] = f'{name} is not measured: {error}; pip install "nextlat[hf]"'
    found = interleave(arms, repetitions, warmup=2)
    setting = {**shape.described(), "reps": repetitions}
    for name, (_, target, remark) in LOOPS.items():
        title = f"tokens/s: ours / {name}"
        if name in missing:
            yield Result(title, None, target, note=missing[name], setting=setting)
            continue
        ratio = compare(found[name], found["ours"])
        yield Result(
            title,
            ratio.value,
            target,
            wall=ratio.wall,
            spread=(ratio.low, ratio.high),
            limit=compare(found[name], found["by hand"]).value,
            note=remark
            or "limit of tokens/s: measured, the same step differentiated by hand, in memory made beforehand",
            of=milliseconds(seconds(found[name]), seconds(found["ours"])),
            setting=setting,
            details={**_seconds(found), "ours_tokens_per_second": shape.tokens / seconds(found["ours"])},
        )


def belief(shape: Shape, repetitions: int, target: float | None) -> Iterator[Result]:
    """The batched loss of all pairs against one sequence after another."""
    batch, objective = closed_batch(shape), make_bst(shape)
    arms = {"looped": looped_step(make_bst(shape), batch), "ours": objective_step(objective, batch)}
    difference = abs(float(arms["looped"]()) - float(arms["ours"]()))
    found = interleave(arms, repetitions)
    ratio = compare(found["looped"], found["ours"])
    setting = {**shape.described(), "pairs": len(objective.pairs(batch).row), "reps": repetitions}
    yield Result(
        "bst step: loop over sequences / ours",
        ratio.value,
        target,
        wall=ratio.wall,
        spread=(ratio.low, ratio.high),
        note="bst: ours makes the first layer once for each state and not for each pair; the rest of the gain is in "
        "small calls, of which long rows have few",
        of=milliseconds(seconds(found["looped"]), seconds(found["ours"])),
        setting=setting,
        details=_seconds(found),
    )
    yield Result("bst step: difference of the losses", difference, 1e-5, at_least=False, setting=setting)


def _seconds(found: dict[str, Timing]) -> dict[str, float]:
    return {f"{name}_seconds": seconds(timing) for name, timing in found.items()}
