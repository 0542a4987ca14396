"""Runs that differ only in their seed, and what is known about them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from nextlat.errors import NextLatError
from nextlat.reporting.runs import Reading, Run, headline_metric
from nextlat.statistics import proportion, seeds_interval

NOT_A_SETTING = ("task", "objective", "seed", "name", "sweep", "training.threads")
NOT_RATES = ("ce", "perplexity", "bits_per_byte")
"""Metrics that are no share of items, even where they lie between 0 and 1."""
SOLVED = "solved"


@dataclass(frozen=True)
class Group:
    """Runs with the same configuration but for the seed."""

    benchmark: str
    """Task, with the options of its data that differ between the runs of that task."""
    objective: str
    settings: str
    """Whatever else differs, as ``horizon=2, width=64``; empty where nothing does."""
    runs: tuple[Run, ...]
    """In the order of their seeds."""

    @property
    def task(self) -> str:
        """Registry name of the benchmark."""
        return self.runs[0].task

    @property
    def label(self) -> str:
        """Objective and settings."""
        return f"{self.objective} ({self.settings})" if self.settings else self.objective


@dataclass(frozen=True)
class Summary:
    """A group's headline metric over its seeds; only seeds that reached their last step enter the mean."""

    group: Group
    metric: str
    readings: tuple[Reading | None, ...]
    """Latest reading of each run of the group."""
    mean: float | None
    low: float | None
    high: float | None
    interval: str | None
    """``seeds``: Student over two or more seeds; ``items``: the interval of the only seed; none without either."""
    solved: int
    judged: int
    """Finished runs whose evaluation names a basin."""
    chance: float | None
    rate: bool
    """Whether the metric is a share of items, to be shown in percent."""

    @property
    def solve_rate(self) -> tuple[float, float, float] | None:
        """Share of solved seeds with its 95 % Wilson interval; none where no basin is named."""
        return proportion(self.solved, self.judged)[:3] if self.judged else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        runs = [
            {
                "run": run.name,
                "seed": run.seed,
                "value": reading.value if reading and isfinite(reading.number) else None,
                "low": reading.low if reading else None,
                "high": reading.high if reading else None,
                "n": reading.n if reading else None,
                "step": reading.step if reading else None,
                "finished": run.final(self.metric) is not None,
            }
            for run, reading in zip(self.group.runs, self.readings, strict=True)
        ]
        return {
            "benchmark": self.group.benchmark,
            "objective": self.group.objective,
            "settings": self.group.settings,
            "metric": self.metric,
            "runs": runs,
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "interval": self.interval,
            "solved": self.solved,
            "judged": self.judged,
            "solve_rate": self.solve_rate,
            "chance": self.chance,
        }


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ only in seed, name and thread count, in the order of first appearance.

    Settings of the objective are compared within that objective, all others over the runs of a task, so that a
    learning rate that differs between two objectives shows in both of their rows. An option that did not exist yet when
    a run was made has its default.
    """
    configs = _completed(runs)
    members: dict[tuple[str, str, str], list[Run]] = {}
    for task in dict.fromkeys(run.task for run in runs):
        of_task = [run for run in runs if run.task == task]
        common = {id(run): _common_settings(configs[id(run)]) for run in of_task}
        differing = _differing(list(common.values()))
        for objective in dict.fromkeys(run.objective for run in of_task):
            of_objective = [run for run in of_task if run.objective == objective]
            own = {id(run): _flat(configs[id(run)].get("objectives", {}).get(objective) or {}) for run in of_objective}
            own_differing = _differing(list(own.values()))
            for run in of_objective:
                data = [key for key in differing if key.startswith("data.")]
                other = [key for key in differing if not key.startswith("data.")]
                benchmark = " ".join(filter(None, [task, _shown(common[id(run)], data)]))
                settings = [_shown(own[id(run)], own_differing), _shown(common[id(run)], other)]
                members.setdefault((benchmark, objective, ", ".join(filter(None, settings))), []).append(run)
    groups = [Group(*key, tuple(sorted(group, key=lambda run: run.seed))) for key, group in members.items()]
    return [group for of_benchmark in benchmarks(groups).values() for group in of_benchmark]


def summarise(runs: Sequence[Run], metric: str | None = None) -> list[Summary]:
    """One summary per group of runs.

    The interval over seeds is Student's, cut to [0, 1] where all values are rates: a mean of rates is one.

    Args:
        runs: at least one.
        metric: name of a metric of the headline evaluation; by default the headline of the group's task.

    Raises:
        NextLatError: no run has that metric.
    """
    if metric is not None:
        headline_metric(runs, metric)
    headlines, rates = {}, {}
    for task in {run.task for run in runs}:
        of_task = [run for run in runs if run.task == task]
        headlines[task] = metric or headline_metric(of_task)
        rates[task] = headlines[task] not in NOT_RATES and is_rate([run.reading(headlines[task]) for run in of_task])
    return [_summary(group, headlines[group.task], rates[group.task]) for group in group_runs(runs)]


def notes(summaries: Sequence[Summary]) -> list[str]:
    """What a reader must know before believing the numbers: unfinished runs, seeds that occur twice."""
    lines = []
    for summary in summaries:
        group = summary.group
        open_ended = [run.name for run in group.runs if run.final(summary.metric) is None]
        if open_ended:
            lines.append(
                f"{group.benchmark}, {group.label}: not in the mean, for want of a last step or its "
                f"evaluation: {', '.join(open_ended)}."
            )
        twice = [str(seed) for seed, count in Counter(run.seed for run in group.runs).items() if count > 1]
        if twice:
            lines.append(
                f"{group.benchmark}, {group.label}: several runs with seed {', '.join(twice)}; the interval "
                "takes them for independent."
            )
    return lines


def is_rate(readings: Sequence[Reading | None]) -> bool:
    """Whether readings are shares of items: from 0 to 1 and, where the number of items is known, a count over it."""
    known = [reading for reading in readings if reading is not None and isfinite(reading.number)]
    counts = [reading.number * reading.n for reading in known if reading.n]
    return all(0 <= r.number <= 1 for r in known) and all(abs(c - round(c)) < 1e-6 * max(c, 1) for c in counts)


def _summary(group: Group, metric: str, rate: bool) -> Summary:
    final = [reading for run in group.runs if (reading := run.final(metric)) and isfinite(reading.number)]
    values = [reading.number for reading in final]
    mean = low = high = interval = None
    if len(final) > 1:
        mean, low, high = seeds_interval(values)
        if rate:
            low, high = max(low, 0.0), min(high, 1.0)
        interval = "seeds"
    elif final:
        mean, low, high = values[0], final[0].low, final[0].high
        interval = None if low is None else "items"
    basins = [reading.value for run in group.runs if (reading := run.final("basin"))]
    levels = {chance for run in group.runs if (chance := run.chance(metric)) is not None}
    return Summary(
        group=group,
        metric=metric,
        readings=tuple(run.reading(metric) for run in group.runs),
        mean=mean,
        low=low,
        high=high,
        interval=interval,
        solved=sum(basin == SOLVED for basin in basins),
        judged=len(basins),
        chance=levels.pop() if len(levels) == 1 else None,
        rate=rate,
    )


def _completed(runs: Sequence[Run]) -> dict[int, Mapping[str, Any]]:
    """Configurations by the run's ``id``; with all options of today where some runs name options that others lack."""
    configs: dict[int, Mapping[str, Any]] = {id(run): run.config for run in runs}
    if len({frozenset(_flat(config)) for config in configs.values()}) == 1:
        return configs
    from nextlat.config import resolve

    for run in runs:
        try:
            configs[id(run)] = resolve(run.config).model_dump(mode="json")
        except NextLatError:  # of a version that knew other options: as it stands
            continue
    return configs


def _common_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = _flat({key: value for key, value in config.items() if key != "objectives"})
    return {key: value for key, value in flat.items() if key not in NOT_A_SETTING}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(repr(one.get(key)) != repr(settings[0].get(key)) for one in settings)]


def _shown(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """``width=64, horizon=2``: the last part of each key, or all of it where two would read the same."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    pieces = []
    for key in keys:
        short = key.rpartition(".")[2]
        value = settings.get(key, "unset")
        text = f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
        pieces.append(f"{short if last[short] == 1 else key}={text}")
    return ", ".join(pieces)


def benchmarks(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups by benchmark, in the order of first appearance."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.benchmark, []).append(group)
    return found
