"""Decoding: the cache, drafts of a dialled acceptance, and the drafts of trained runs against cached decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextlat.bench.replay import Replay, steady
from nextlat.bench.results import Effort, Result, milliseconds
from nextlat.decoding.cheap import cheaper, frequent_tokens
from nextlat.decoding.costs import Costs, measure_costs, parts_of_rounds, priced
from nextlat.decoding.generate import collected, generate
from nextlat.decoding.packed import packed
from nextlat.decoding.policies import Static
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.speculative import Statistics, decode
from nextlat.model.interfaces import CausalLM, Drafter
from nextlat.model.trunk import Transformer
from nextlat.objectives.nextlat import NextLat
from nextlat.timing import Arm, Prepared, Timing, compare, counting, interleave, seconds

SPEEDUPS = {0.8: 2.3, 0.9: 3.2, 0.95: 4.2}
"""Acceptance -> least accepted gain over cached decoding."""
EFFICIENCY = 0.9
"""Least accepted share of the bound that is reached."""
COINS = 3
"""Texts with drafts for each without: the former depend on luck."""
BATCH, BATCH_ACCEPTANCE, BATCH_SPEEDUP = 8, 0.8, 1.7
DRAFT_COST = 0.05
VERIFIED = (2, 3, 4, 5, 6, 8, 10, 12, 16)
"""Positions that calls are timed over."""


class Size(NamedTuple):
    """A model of random weights: for what things cost, not for what they say."""

    layers: int
    width: int
    heads: int
    vocab: int
    draft_vocab: int

    def build(self) -> NextLat:
        """The model with its dynamics, whose hidden layers are as wide as its states."""
        g = torch.Generator().manual_seed(0)
        trunk = Transformer(self.vocab, self.layers, self.heads, self.width, generator=g)
        made: NextLat = NextLat(trunk, dynamics=self.width, generator=g).eval().requires_grad_(False)
        return made

    @property
    def setting(self) -> dict[str, int]:
        """For the table."""
        return {"layers": self.layers, "width": self.width, "V": self.vocab}


class Small(NamedTuple):
    """A model that is trained on the spot, so that drafts that were not arranged stand beside those that were."""

    configuration: str
    steps: int
    overrides: tuple[str, ...]


class Plan(NamedTuple):
    """What to measure at an effort."""

    cache: tuple[Size, tuple[int, ...], int] | None
    """Size, lengths of single steps, repetitions."""
    dialled: tuple[tuple[Size, int, int, int], ...]
    """Size, prompt tokens, new tokens, repetitions; without repetitions only costs are measured."""
    batched: tuple[Size, int, int, int] | None
    """Likewise."""
    trained: Small
    """A model to train on the spot."""
    here: tuple[int, int, int]
    """How much is measured of it: prompts of each domain, passes, and texts that its acceptance heads are fitted to."""
    runs: tuple[int, int, int]
    """Likewise of runs that are given."""


LARGE, SMALL = Size(12, 768, 12, 50_257, 4_096), Size(8, 768, 12, 1_000, 1_000)
TINY = Size(2, 16, 2, 50, 20)
LENGTHS = (257, 320, 384, 448, 512)

PLANS: dict[Effort, Plan] = {
    "full": Plan(
        (LARGE, LENGTHS, 7),
        ((LARGE, 64, 96, 3), (SMALL, 64, 192, 5)),
        (SMALL, 64, 64, 5),
        Small("fineweb_edu/mini", 600, ()),
        (4, 2, 2048),
        (8, 2, 8192),
    ),
    "quick": Plan(
        (LARGE, (257, 512), 3),
        ((LARGE, 64, 8, 0), (SMALL, 64, 40, 2)),
        (SMALL, 64, 16, 2),
        Small("fineweb_edu/mini", 100, ("training.warmup_steps=30", "training.decay_steps=50")),
        (1, 1, 64),
        (2, 1, 96),
    ),
    "tiny": Plan(
        (TINY, (5, 8), 2),
        ((TINY, 6, 8, 0), (TINY, 6, 8, 2)),
        (TINY, 4, 6, 2),
        Small("path_star/mini", 2, ("model.width=16", "model.n_layers=1", "model.n_heads=2", "data.test_size=40")),
        (1, 2, 6),
        (1, 2, 6),
    ),
}


def run(effort: Effort, runs: Sequence[Path] = ()) -> Iterator[Result]:
    """All of decoding; with ``runs``, these trained ones on text of this machine and nothing else."""
    from nextlat.bench.trained import Survey, compare_runs, trained_here

    plan = PLANS[effort]
    if runs:
        yield from compare_runs(runs, Survey(*plan.runs))
        return
    if plan.cache is not None:
        yield from cached(*plan.cache)
    for size, context, new, repetitions in plan.dialled:
        yield from dialled(size, context, new, repetitions)
    if plan.batched is not None:
        yield from batched(*plan.batched)
    with trained_here(plan.trained) as path:
        yield from compare_runs([path], Survey(*plan.here))


@torch.inference_mode()
def cached(size: Size, lengths: Sequence[int], repetitions: int) -> Iterator[Result]:
    """A text that grows from the first length to the last: a step with the cache against the whole text again."""
    lm = size.build().as_lm()
    tokens = prompt(1, lengths[-1], size.vocab)
    arms: dict[str, Arm] = {}
    for length in lengths:
        arms[f"cached {length}"] = one_step(lm, tokens[:, :length])
        arms[f"whole {length}"] = partial(lm, tokens[:, :length])
    found = interleave(arms, repetitions)
    total = {kind: integral(lengths, [seconds(found[f"{kind} {n}"]) for n in lengths]) for kind in ("cached", "whole")}
    wall = {
        kind: integral(lengths, [median(found[f"{kind} {n}"].wall) for n in lengths]) for kind in ("cached", "whole")
    }
    yield Result(
        "generation: whole text again / cached",
        total["whole"] / total["cached"],
        12.0,
        wall=wall["whole"] / wall["cached"],
        of=f"{total['whole']:.1f}/{total['cached']:.1f} s",
        setting=size.setting | {"prompt": lengths[0] - 1, "new": lengths[-1] - lengths[0] + 1},
        note=f"generation: single steps at {', '.join(map(str, lengths))} tokens, integrated",
        details={f"{kind}_seconds": value for kind, value in total.items()},
    )


def one_step(lm: CausalLM, tokens: Tensor) -> Arm:
    """The last of (1, T) tokens, with the others in the cache."""
    cache = lm.new_cache(1, tokens.shape[1])
    lm(tokens[:, :-1], cache=cache)

    def step() -> None:
        lm(tokens[:, -1:], cache=cache)
        cache.lengths = [tokens.shape[1] - 1]

    return step


def integral(places: Sequence[int], values: Sequence[float]) -> float:
    """Area under a line through points."""
    pairs = zip(places, places[1:], values, values[1:], strict=False)
    return sum((b - a) * (x + y) / 2 for a, b, x, y in pairs)


def dialled(size: Size, context: int, new: int, repetitions: int) -> Iterator[Result]:
    """Gain at given acceptances, and how much of what costs and kept tokens allow is reached.

    Costs that are measured before choose the lengths; those of the bound are timed in turn with the texts.
    """
    objective = size.build()
    plain = objective.as_lm()
    prompts = prompt(1, context, size.vocab)
    recorded = generate(plain, prompts, new)
    vocabulary = draft_vocabulary(size, recorded)
    full = objective.drafter()
    cheap = cheaper(full, vocabulary, int8=True)
    setting = size.setting | {"prompt": context, "new": new}
    with packed(plain) as fast:
        costs = {
            name: measure_costs(lm, drafter, 1, context + new // 2, VERIFIED, budget=3.0)
            for name, lm, drafter in (("plain", plain, full), ("packed", fast, cheap))
        }
        yield Result(
            "draft step / cached step",
            costs["packed"].draft,
            DRAFT_COST,
            at_least=False,
            setting=setting,
            note=f"draft step: with {len(vocabulary):,} tokens and an int8 head; {costs['plain'].draft:.2f} without",
        )
        for count in (4, 8, 16):
            yield Result(
                f"verifying {count} positions / one",
                costs["packed"].verification(count),
                setting=setting,
                note=f"verifying: {curve(costs['plain'])} with plain weights, {curve(costs['packed'])} as decoded",
            )
        for acceptance, target in SPEEDUPS.items() if repetitions else ():
            made = in_turn(plain, fast, cheap, prompts, recorded, acceptance, costs["packed"], repetitions)
            yield gain(f"decoding, acceptance {acceptance}: plain / drafted", made, target, setting)
            yield share_of_bound(
                f"share of the bound reached, acceptance {acceptance}",
                made.reached(),
                setting,
            )


def batched(size: Size, context: int, new: int, repetitions: int) -> Iterator[Result]:
    """Rows that advance independently, against the same rows without drafts."""
    objective = size.build()
    plain = objective.as_lm()
    prompts = prompt(BATCH, context, size.vocab)
    recorded = generate(plain, prompts, new)
    cheap = cheaper(objective.drafter(), draft_vocabulary(size, recorded), int8=True)
    with packed(plain) as fast:
        costs = measure_costs(fast, cheap, BATCH, context + new // 2, VERIFIED, budget=3.0)
        made = in_turn(plain, fast, cheap, prompts, recorded, BATCH_ACCEPTANCE, costs, repetitions)
    setting = size.setting | {"prompt": context, "new": new, "rows": BATCH}
    yield gain(f"{BATCH} rows, acceptance {BATCH_ACCEPTANCE}: plain / drafted", made, BATCH_SPEEDUP, setting)


class Replayed(NamedTuple):
    """Texts with drafts of a dialled acceptance, beside the same without."""

    found: dict[str, Timing]
    """``drafted`` texts, and beside each the ``plain`` and ``packed`` one of its turn."""
    texts: list[Statistics]
    """What the drafts came to, in each of them."""
    costs: Costs
    """Of rounds, timed in turn with the texts."""

    @property
    def counted(self) -> Statistics:
        """What they came to in all."""
        total = Statistics()
        for text in self.texts:
            total.add(text)
        return total

    def reached(self) -> list[tuple[float, float]]:
        """Gain over plain decoding with packed weights, and its :func:`bound`, of each text.

        Luck with the coins moves both alike.
        """
        times = zip(counting(self.found["packed"]), counting(self.found["drafted"]), strict=True)
        gains = [plain / drafted for plain, drafted in times]
        return [(gain, bound(text, self.costs)) for gain, text in zip(gains, self.texts, strict=True)]


def in_turn(
    plain: CausalLM,
    fast: CausalLM,
    drafter: Drafter,
    prompts: Tensor,
    recorded: Tensor,
    acceptance: float,
    costs: Costs,
    repetitions: int,
) -> Replayed:
    """The recorded text without drafts, with plain and packed weights, and with drafts of the length that costs choose.

    Decoding is timed from the first token on: the call over the prompts, which gives it, is the same in every way.

    What rounds with these drafts are made of is timed in turn with the texts, in the middle of one: prices of another
    minute, of which a neighbour had more or less, would make a bound that these texts miss or exceed.
    """
    rows, context, new = *prompts.shape, recorded.shape[1]
    length = costs.best_length(acceptance, 16)
    counted: list[Statistics] = []
    texts: dict[str, Arm | Prepared] = {
        "plain": Prepared(lambda: behind_prompts(plain, prompts, recorded)),
        "packed": Prepared(lambda: behind_prompts(fast, prompts, recorded)),
    }
    drafted = replayed(fast, drafter, prompts, recorded, acceptance, length, counted)
    texts |= {f"drafted {number}": Prepared(drafted) for number in range(COINS)}
    repeats = max(2, new // 8)  # each of the parts then takes about as long as a text with drafts
    parts = parts_of_rounds(fast, drafter, length, rows, context + new // 2, repeats)
    found = interleave(texts | parts, repetitions)
    beside = {name: side_by_side([found[name]] * COINS) for name in ("plain", "packed")}
    beside["drafted"] = side_by_side([found[f"drafted {number}"] for number in range(COINS)])
    return Replayed(beside, counted[-repetitions * COINS :], priced(costs, found, length))  # those before warmed up


def side_by_side(timings: Sequence[Timing]) -> Timing:
    """The seconds of several arms in the order that they took turns in."""
    cpu, wall = ([x for turn in zip(*times, strict=True) for x in turn] for times in zip(*timings, strict=True))
    return Timing(tuple(cpu), tuple(wall))


def replayed(
    lm: CausalLM,
    drafter: Drafter,
    prompts: Tensor,
    recorded: Tensor,
    acceptance: float,
    length: int,
    counted: list[Statistics],
) -> Callable[[], Arm]:
    """Makes arms that decode with drafts that are right with a probability; other coins, and counts, every time."""

    def prepare() -> Arm:
        drafts = Replay(drafter, recorded, steady(acceptance), seed=len(counted))
        counted.append(Statistics())
        return behind_prompts(lm, prompts, recorded, drafter=drafts, policy=Static(length), statistics=counted[-1])

    return prepare


def behind_prompts(lm: CausalLM, prompts: Tensor, recorded: Tensor, **options: Any) -> Arm:
    """Decoding of the recorded text from its second token on; the first is made here and now."""
    rounds = decode(lm, prompts, recorded.shape[1], Sampling(), **options)
    opening = next(rounds)

    def arm() -> None:
        if not torch.equal(collected([opening, *rounds], *recorded.shape), recorded):
            raise AssertionError("what is decoded is not the text that was recorded")

    return arm


def bound(counted: Statistics, costs: Costs) -> float:
    """Most that rounds can gain over plain decoding with the same weights: their tokens over what they must cost.

    They must draft and verify. The overhead is part of what is measured against this bound, and not of the bound.
    """
    costs = replace(costs, overhead=0.0)
    at_least = [counted.rounds, *counted.drafted, 0]  # rounds that drafted 0, 1, ... tokens or more
    spent = sum((n - more) * costs.round(length) for length, (n, more) in enumerate(pairwise(at_least)))
    return counted.tokens_per_round * counted.rounds / spent


def share_of_bound(name: str, reached: Sequence[tuple[float, float]], setting: dict[str, Any]) -> Result:
    """How much of :func:`bound` is left when everything is timed.

    Args:
        name: of the result.
        reached: gain and bound of each repetition.
        setting: for the table.
    """
    gains, bounds = zip(*reached, strict=True)
    return Result(
        name,
        median(gain / most for gain, most in reached),
        EFFICIENCY,
        setting=setting,
        of=f"{median(gains):.2f}/{median(bounds):.2f}",
        note="bound: tokens per round over the cost of drafting and verifying them, timed in turn with the texts; it "
        "is set beside the gain over plain decoding with the weights that drafts get, packed where that pays",
    )


def gain(name: str, made: Replayed, target: float, setting: dict[str, int]) -> Result:
    """What drafts gain over decoding without, with plain or packed weights, whichever is faster; and what was kept."""
    found, counted = made.found, made.counted
    baseline = min("plain", "packed", key=lambda arm: seconds(found[arm]))
    ratio = compare(found[baseline], found["drafted"])
    return Result(
        name,
        ratio.value,
        target,
        wall=ratio.wall,
        spread=(ratio.low, ratio.high),
        limit=bound(counted, made.costs) * seconds(found[baseline]) / seconds(found["packed"]),
        of=milliseconds(seconds(found[baseline]), seconds(found["drafted"])),
        setting=setting,
        note=f"{name.partition(':')[0]}: over {baseline} weights; {len(counted.drafted)} drafted, "
        f"{sum(counted.accepted) / counted.rounds:.2f} kept, {counted.tokens_per_round:.2f} tokens a round; "
        f"acceptance measured {mean_acceptance(counted):.2f}",
    )


def mean_acceptance(counted: Statistics) -> float:
    """Kept among those whose turn it was."""
    return sum(counted.accepted) / max(sum(counted.reached), 1)


def draft_vocabulary(size: Size, recorded: Tensor) -> Tensor:
    """As many tokens as asked for, with all that drafts will have to name."""
    return frequent_tokens(recorded.flatten().bincount(minlength=size.vocab), size.draft_vocab)


def curve(costs: Costs) -> str:
    """``V(4) 1.20, V(8) 1.41``."""
    return ", ".join(f"V({k}) {costs.verification(k):.2f}" for k in (2, 4, 8, 16))


def prompt(rows: int, length: int, vocab: int) -> Tensor:
    """Random tokens."""
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))
