"""Drafts of trained runs on text of this machine: fixed lengths, the adaptive one, one objective against another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import exp, log
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from nextlat.bench.decode import Small, bound, share_of_bound
from nextlat.bench.headroom import foreseen_from, headroom, headroom_of_chances, kept_from
from nextlat.bench.results import Result
from nextlat.decoding.acceptance import Planned
from nextlat.decoding.adaptive import CostAware
from nextlat.decoding.command import CheapDrafts, load, longest_draft, need_drafter, prepared, spared
from nextlat.decoding.costs import Costs, parts_of_rounds, priced
from nextlat.decoding.foresight import Fit
from nextlat.decoding.policies import Policy, Static
from nextlat.decoding.sampling import Sampling
from nextlat.errors import NextLatError
from nextlat.evaluation.domains import LOCAL, domain_names, domain_prompts
from nextlat.evaluation.speculative import PLAIN, Arm, measure_domain, ratio
from nextlat.hf.tokenizer import task_tokenizer
from nextlat.model.interfaces import CausalLM, Drafter
from nextlat.timing import interleave
from nextlat.training.acceptance import fitted_head
from nextlat.training.trained import Trained

ADAPTIVE, LEARNED = "adaptive", "adaptive, fitted head"
"""Lengths by cost: token by token by the drafter's own probabilities, or once a round by a head that was fitted to
drafts of the training data."""
MEAN, LEAST = 1.15, 0.99
"""The latter over the best static length: least accepted geometric mean over domains, and least accepted in any."""
RIVALS = {"mtp": 1.3, "jtp": 1.2}
"""Objective -> least accepted ratio of nextlat's tokens per second to its."""
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
"""Fixed lengths that are tried; 0 is plain decoding with the weights that drafts get, packed where that pays."""
ALIKE = ("task", "model", "data", "training")
"""Sections of the configuration in which runs that are set against each other must agree."""
ANEW = 2
"""As many passes more over the ways whose ratio is asked for as over all of them: these are few."""
REPEATS, TURNS = 24, 3
"""Of what rounds are made of, within an arm, and of the arms behind every pass."""
CHEAP_LENGTH = 4
"""Drafted tokens where cheap drafts are set beside full ones."""
SHOWN = 6
"""Positions of a draft whose acceptance is printed."""

HINDSIGHT = "limit of adapting: lengths chosen in hindsight, knowing what would be kept, by the measured costs"
CHANCES = "limit of adapting: lengths chosen knowing how likely each place's drafts are kept, by the measured costs"

BY_COSTS = "by costs: counted by c and V(k) alone, as on a model beside which deciding takes no time"

Found = dict[str, dict[str, Arm]]
"""Domain -> way of drafting -> what it did."""


class Contender(NamedTuple):
    """A run that drafts."""

    name: str
    trained: Trained
    fast: CausalLM
    """The model with packed weights where they pay; plain decoding uses the plain one."""
    drafter: Drafter
    costs: Costs
    fit: Fit
    """An acceptance head for the temperature."""
    found: Found
    headroom: dict[str, float]
    """Domain -> :func:`headroom` at temperature 0, :func:`headroom_of_chances` above."""
    best: dict[str, str]
    """Domain -> the fixed length that took least time when all were tried."""
    reached: dict[str, list[tuple[float, float]]]
    """Domain -> what drafts of that length gained over none, and their bound by prices of that minute, pass by pass."""


@contextmanager
def trained_here(small: Small) -> Iterator[Path]:
    """A nextlat run, trained on text of this machine and thrown away afterwards.

    Raises:
        NextLatError: it could not be trained.
    """
    with TemporaryDirectory() as folder:
        overrides = ["objective=nextlat", "name=trained-here", f"training.steps={small.steps}", *small.overrides]
        overrides += ["training.evaluate_every=null", "evaluation.after=[]"]
        command = [sys.executable, "-m", "nextlat", "train", small.configuration, *overrides, "--runs-dir", folder]
        made = subprocess.run(command, capture_output=True, text=True, cwd=folder)  # tokens go to ./data
        if made.returncode:
            raise NextLatError(f"a model to measure drafts of could not be trained: {made.stderr.strip()}")
        yield Path(folder) / "trained-here"


class Survey(NamedTuple):
    """How much is measured of each run."""

    prompts: int
    """Of each domain."""
    passes: int
    """How often all ways are tried; of each text and way the fastest counts. The best are timed anew twice as often."""
    fitted: int
    """Texts that acceptance heads are fitted to: of the training data, and of the kinds that are measured on, but other
    documents."""


def compare_runs(paths: Sequence[Path], size: Survey) -> Iterator[Result]:
    """Measure runs in turn on every domain, at temperatures 0 and 1.

    Raises:
        NextLatError: two runs of one objective, or runs that were not trained alike.
    """
    loaded = [load(path, "newest", None) for path in paths]
    check_alike(loaded)
    for temperature in (0.0, 1.0):
        contenders = [contender(trained, Sampling(temperature), size.fitted) for trained in loaded]
        task = contenders[0].trained.built.task
        domains = domain_names(task, task_tokenizer(task))
        for one in contenders:
            yield from prices(one, temperature)
        for domain in domains:
            for one in contenders:
                survey(one, domain, size, Sampling(temperature))
                yield from on_domain(one, domain, temperature)
        for one in contenders:
            yield from adaptive_against_static(one, temperature)
            yield from cheap_drafts(one, size.prompts, Sampling(temperature))
        yield from against_rivals(contenders, temperature)


def check_alike(runs: Sequence[Trained]) -> None:
    """Refuse a comparison that would say something else than which objective drafts better."""
    first = runs[0]
    for number, one in enumerate(runs):
        for other in runs[:number]:
            if other.config.objective == one.config.objective:
                raise NextLatError(
                    f"{other.path} and {one.path} are both runs of {one.config.objective}; give one of each objective"
                )
        for section in ALIKE:
            if getattr(one.config, section) != getattr(first.config, section):
                raise NextLatError(
                    f"{first.path} and {one.path} differ in `{section}:`; compare runs that were trained alike"
                )


def contender(trained: Trained, sampling: Sampling, fitted: int) -> Contender:
    """A run, what its drafts cost at a temperature, and a head that foresees which are kept."""
    drafter = need_drafter(trained)
    length = trained.built.task.sequence_length
    fast, costs = prepared(trained, drafter, length * 3 // 4, sampling)  # between half a row of prompt and a whole row
    task = trained.built.task
    kinds = [name for name in domain_names(task, task_tokenizer(task)) if name in LOCAL]
    fit = fitted_head(trained, drafter, sampling.temperature, fitted, domains=kinds)
    return Contender(trained.config.objective, trained, fast, drafter, costs, fit, {}, {}, {}, {})


def survey(one: Contender, domain: str, size: Survey, sampling: Sampling) -> None:
    """Try all ways of drafting on a domain, then time the best fixed length and the adaptive ones anew.

    The fastest of eleven owes a part of its lead to luck, as many of them differ by less than a clock does from one
    time to the next. So what finds it is not what it is measured by.
    """
    task = one.trained.built.task
    length = task.sequence_length // 2
    texts = domain_prompts(domain, task, task_tokenizer(task), size.prompts, length, one.trained.path / "domains")
    longest = longest_draft(one.drafter)
    ways: dict[str, Callable[[], Policy]] = {str(n): partial(Static, n) for n in LENGTHS if n <= longest}
    ways[ADAPTIVE] = partial(CostAware, one.costs, longest)
    ways[LEARNED] = partial(Planned, one.costs, one.fit.head, longest)
    lm = one.trained.built.objective.as_lm()

    def tried(ways: Mapping[str, Callable[[], Policy]]) -> dict[str, Arm]:
        return measure_domain(one.fast, one.drafter, texts, length, sampling, ways, baseline=lm)

    found = fastest([tried(ways) for _ in range(size.passes)])
    best = one.best[domain] = best_static(found)
    parts = parts_of_rounds(one.fast, one.drafter, int(best), 1, length * 3 // 2, REPEATS, sampling)
    again = {way: ways[way] for way in (best, "0", ADAPTIVE, LEARNED)}
    anew = []
    one.reached[domain] = []
    for _ in range(ANEW * size.passes):
        anew.append(tried(again))
        costs = priced(one.costs, interleave(parts, TURNS), int(best))
        gain = spent(anew[-1]["0"]) / spent(anew[-1][best])
        one.reached[domain].append((gain, bound(anew[-1][best].statistics, costs)))
    one.found[domain] = found | fastest(anew)
    fixed = [n for n in LENGTHS if n <= longest]
    if sampling.greedy:
        kept = [kept_from(one.fast, one.drafter, text, length, longest) for text in texts]
        one.headroom[domain] = headroom(kept, one.costs, longest, fixed)
    else:
        foreseen = [foreseen_from(one.fast, one.drafter, text, length, longest, sampling) for text in texts]
        one.headroom[domain] = headroom_of_chances(foreseen, one.costs, longest, fixed)


def fastest(passes: Sequence[Mapping[str, Arm]]) -> dict[str, Arm]:
    """Of each text and way the least time; a way that learns has made different rounds, and counts are of the first."""
    return {
        way: replace(arm, seconds=[min(times) for times in zip(*(each[way].seconds for each in passes), strict=True)])
        for way, arm in passes[0].items()
    }


def setting(one: Contender, temperature: float) -> dict[str, Any]:
    """For the table."""
    run = one.trained
    return {"objective": one.name, "run": run.path.name, "step": run.step, "temperature": f"{temperature:g}"}


def prices(one: Contender, temperature: float) -> Iterator[Result]:
    """What a run's drafts cost here, and what they must yield to pay."""
    about, longest = setting(one, temperature), longest_draft(one.drafter)
    yield Result("draft step / cached step", one.costs.draft, setting=about)
    for count in (4, 8):
        yield Result(f"verifying {count} positions / one", one.costs.verification(count), setting=about)
    note = f"{one.name} at temperature {temperature:g}: {one.costs.advice(longest)}"
    yield Result("acceptance from which drafts pay", one.costs.break_even(longest), setting=about, note=note)
    head, constant = one.fit.head_score.log_loss, one.fit.constant.log_loss
    yield Result(
        "log loss of being kept: by position / fitted head",
        constant / head,
        setting=about,
        of=f"{constant:.3f}/{head:.3f}",
    )


def on_domain(one: Contender, domain: str, temperature: float) -> Iterator[Result]:
    """The gain of a run's drafts on a kind of text: of the best fixed length, and of adapting it."""
    arms = one.found[domain]
    about = setting(one, temperature) | {"text": domain}
    best = one.best[domain]
    kept, moved = arms[best].statistics, arms[LEARNED].statistics
    speed = decoded(arms[best]) / spent(arms[best])
    yield Result(
        f"plain / drafts of {best}, the best fixed length",
        ratio(arms, best),
        setting=about,
        of=f"{speed:,.0f} tokens/s",
        note=f"{one.name} at temperature {temperature:g}, {domain}: {best} tokens keep "
        f"{sum(kept.accepted) / max(kept.rounds, 1):.2f} a round, adaptive "
        f"{sum(moved.accepted) / max(moved.rounds, 1):.2f} of {sum(moved.drafted) / max(moved.rounds, 1):.2f}; kept by "
        "position " + " ".join(f"{share:.2f}" for share in arms[str(max(map(int, statics(arms))))].acceptance[:SHOWN]),
    )
    if best != "0":
        yield share_of_bound("share of the bound reached", one.reached[domain], about)
    for way in (ADAPTIVE, LEARNED):
        yield Result(f"plain / {way}", ratio(arms, way), setting=about)
        yield Result(
            f"{way} / the best fixed length",
            spent(arms[best]) / spent(arms[way]),
            limit=one.headroom.get(domain),
            note=CHANCES if temperature else HINDSIGHT,
            setting=about,
        )


def adaptive_against_static(one: Contender, temperature: float) -> Iterator[Result]:
    """The gain of adapting the length over the best fixed one of each domain."""
    about = setting(one, temperature) | {"texts": len(one.found)}
    limit = geometric_mean(list(one.headroom.values()))
    for way, mean_target, least_target in ((ADAPTIVE, None, None), (LEARNED, MEAN, LEAST)):
        gains = [spent(arms[one.best[domain]]) / spent(arms[way]) for domain, arms in one.found.items()]
        name = f"{way} / best fixed length"
        yield Result(f"{name}: geometric mean", geometric_mean(gains), mean_target, limit=limit, setting=about)
        yield Result(f"{name}: least", min(gains), least_target, setting=about)
        counted = [by_costs(arms, way, one.costs) for arms in one.found.values()]
        yield Result(f"{name}, by costs: geometric mean", geometric_mean(counted), setting=about, note=BY_COSTS)
        yield Result(f"{name}, by costs: least", min(counted), setting=about)


def by_costs(arms: Mapping[str, Arm], way: str, costs: Costs) -> float:
    """What a way gains over the best fixed length if c and V(k) were all that rounds cost."""
    speeds = {name: bound(arms[name].statistics, costs) for name in (*statics(arms), way)}
    return speeds[way] / max(speeds[name] for name in statics(arms))


def cheap_drafts(one: Contender, count: int, sampling: Sampling) -> Iterator[Result]:
    """What fewer tokens to draft from, and 8 bits, cost in kept tokens, with drafts of one length on held-out text."""
    task = one.trained.built.task
    length = task.sequence_length // 2
    texts = domain_prompts("held_out", task, task_tokenizer(task), count, length, one.trained.path)
    ways = {"all tokens": CheapDrafts(), "int8": CheapDrafts(int8=True)}
    for size in (max(1, task.vocab_size // share) for share in (2, 4, 8)):
        ways[f"{size:,} of {task.vocab_size:,} tokens"] = CheapDrafts(size)
    drafted = min(CHEAP_LENGTH, longest_draft(one.drafter))
    kept = {}
    for name, cheap in ways.items():
        drafter = spared(one.trained, one.drafter, cheap)
        arm = measure_domain(one.fast, drafter, texts, length, sampling, {"fixed": partial(Static, drafted)})["fixed"]
        kept[name] = sum(arm.statistics.accepted) / max(arm.statistics.rounds, 1)
    for name, value in kept.items():
        if name != "all tokens":
            yield Result(
                f"tokens kept of {drafted}: {name} / all tokens",
                value / max(kept["all tokens"], 1e-9),
                of=f"{value:.2f}/{kept['all tokens']:.2f}",
                setting=setting(one, sampling.temperature) | {"text": "held_out"},
                note="int8: layers of fewer than half a million weights stay as they are; small models do not change",
            )


def against_rivals(contenders: Sequence[Contender], temperature: float) -> Iterator[Result]:
    """Tokens per second of nextlat over those of the others, each with its best way over all domains."""
    speeds = {one.name: best_speed(one.found) for one in contenders}
    for rival, target in RIVALS.items():
        if rival in speeds and "nextlat" in speeds:
            ours, theirs = speeds["nextlat"], speeds[rival]
            yield Result(
                f"tokens/s: nextlat / {rival}",
                ours[1] / theirs[1],
                target,
                of=f"{ours[0]}, {theirs[0]}",
                setting={"runs": len(contenders), "temperature": f"{temperature:g}"},
                note="tokens/s: over all domains, each objective with its best way of drafting",
            )


def best_speed(found: Found) -> tuple[str, float]:
    """The way with the most tokens per second over all domains, and how many; ``plain`` is one of them."""
    ways = next(iter(found.values()))
    speeds = {
        way: sum(decoded(arms[way]) for arms in found.values()) / sum(spent(arms[way]) for arms in found.values())
        for way in ways
    }
    best = max(speeds, key=lambda way: speeds[way])
    return best, speeds[best]


def statics(arms: Mapping[str, Arm]) -> list[str]:
    """The ways of a fixed length."""
    return [name for name in arms if name not in (PLAIN, ADAPTIVE, LEARNED)]


def best_static(arms: Mapping[str, Arm]) -> str:
    """The fixed length that took least time."""
    return min(statics(arms), key=lambda name: spent(arms[name]))


def spent(arm: Arm) -> float:
    """Seconds over all prompts, behind the first token of each."""
    return sum(arm.seconds)


def decoded(arm: Arm) -> int:
    """Tokens that were made in these."""
    return arm.statistics.tokens - arm.statistics.opening


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return exp(mean(log(value) for value in values))
