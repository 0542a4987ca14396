"""What each command does, once its arguments are read."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from nextlat.bench import Effort, Result
from nextlat.config import Config, expand, header, load_config, packaged, read_config, resolve
from nextlat.errors import NextLatError
from nextlat.options import split_names
from nextlat.statistics import Metric


def train_command(
    source: str | None,
    overrides: Sequence[str],
    runs_dir: Path,
    resume: Path | None,
    stop_after: int | None,
    dry_run: bool,
) -> int:
    """Train, then measure; returns the exit code (128 + signal after a signal)."""
    if source is not None and resume is not None and "=" in source:
        overrides, source = [source, *overrides], None
    if source is None and resume is None:
        raise NextLatError("name a configuration, for example `nextlat train path_star/mini`, or --resume RUN")
    if source is None and overrides:
        raise NextLatError("--resume goes on with the run's own configuration; leave the overrides out")
    config = None if source is None else load_config(source, overrides)
    if dry_run:
        if config is None:
            from nextlat.training.run import read_run_config

            assert resume is not None
            config = read_run_config(resume)
        show_plan(config)
        return 0

    from nextlat.training.build import build, check
    from nextlat.training.loop import train
    from nextlat.training.run import RunDirectory, differences
    from nextlat.training.trained import evaluate_run, load_run

    if resume is not None:
        run = RunDirectory.open(resume)
        if config is not None and config.hash() != run.config.hash():
            changed = differences(run.config.plain(), config.plain())
            changed = [line for line in changed if not line.startswith(("name:", "sweep"))]
            raise NextLatError(
                f"{resume} was started with another configuration ({'; '.join(changed)}); resume it as it is"
            )
        built = build(run.config)
        run.refuse_changed_data(built.task.description())
    else:
        assert config is not None
        built = build(config)
        check(config, built)
        run = RunDirectory.create(config, runs_dir, built.task.description())
    try:
        print(f"{'resuming' if resume else 'training'} {run.path}", flush=True)
        outcome = train(run, built, resume=resume is not None, stop_after=stop_after)
        if not outcome.finished:
            print(f"stopped at step {outcome.step}; go on with: nextlat train --resume {run.path}")
            return 128 + outcome.signal if outcome.signal else 0
        for metrics in evaluate_run(load_run(run.path), run.config.evaluation.after).values():
            show_metrics(metrics)
    finally:
        run.close()
    return 0


def show_plan(config: Config) -> None:
    """Print the resolved configuration, parameter counts and cost."""
    from nextlat.tasks import Textual
    from nextlat.training.build import build, check
    from nextlat.training.estimate import estimate

    built = build(config)
    check(config, built)
    made = not isinstance(built.task, Textual) or built.task.ready
    facts = built.task.description() if made else {"data": "not made yet"}
    cost = estimate(config, built)
    plain = config.plain()
    print(yaml.safe_dump(plain, sort_keys=False).rstrip())
    print(f"# hash {config.hash()}")
    print(
        f"# vocabulary {built.task.vocab_size}, rows of {built.task.sequence_length} tokens; "
        f"{', '.join(f'{key} {value}' for key, value in facts.items())}"
    )
    print(
        f"# parameters {cost.model_parameters + cost.auxiliary_parameters:,} "
        f"(plain model {cost.model_parameters:,}, beside it {cost.auxiliary_parameters:,})"
    )
    print(
        f"# estimate on this machine: {cost.seconds_per_step:.3g} s a step, {cost.hours:.3g} h for "
        f"{config.training.steps:,} steps without evaluation, {cost.memory_gb:.2g} GB"
    )


def show_metrics(metrics: Mapping[str, Metric]) -> None:
    """Print metrics as a table."""
    table = Table(box=None, pad_edge=False)
    for column in ("metric", "value", "95 % interval", "chance", "n"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, metric in metrics.items():
        table.add_row(
            name,
            metric.value if isinstance(metric.value, str) else f"{metric.value:.4g}",
            "" if metric.low is None else f"{metric.low:.4g} to {metric.high:.4g}",
            "" if metric.chance is None else f"{metric.chance:.3g}",
            "" if metric.n is None else str(metric.n),
        )
    Console(soft_wrap=True).print(table)


def evaluate_command(
    run: Path, names: Sequence[str], dynamics: str, split: str | None, checkpoint: str, device: str | None
) -> None:
    """Measure a run, by default what ranks its checkpoints, and print what was found."""
    from nextlat.evaluation import find_evaluation
    from nextlat.training.trained import evaluate_run, load_run

    if dynamics not in ("own", "posthoc"):
        raise NextLatError(f"--dynamics is {dynamics!r}; choose own or posthoc")
    if checkpoint not in ("newest", "best"):
        raise NextLatError(f"--checkpoint is {checkpoint!r}; choose newest or best")
    for name in names:
        find_evaluation(name)
    trained = load_run(run, device, checkpoint)
    for name, metrics in evaluate_run(trained, names or [trained.built.task.headline], dynamics, split).items():
        print(f"{name} of {run} at step {trained.step}")
        show_metrics(metrics)


def fit_dynamics_command(
    run: Path, steps: int | None, hidden_dim: int | None, horizon: int | None, kl_weight: float, device: str | None
) -> None:
    """Fit the control and say where it is."""
    from nextlat.training.trained import fit_dynamics, load_run

    path, losses = fit_dynamics(load_run(run, device), steps, hidden_dim, horizon, kl_weight)
    print(f"latent loss {losses[0]:.4g} at the first step, {losses[-1]:.4g} at step {len(losses)}")
    print(f"wrote {path}; measure with: nextlat evaluate {run} rollout --dynamics posthoc")


def fit_acceptance_command(
    run: Path,
    temperature: float,
    prompts: int,
    domains: str | None,
    length: int,
    steps: int | None,
    device: str | None,
) -> None:
    """Fit an acceptance head and say how well calibrated it is on held-out drafts."""
    from nextlat.training.acceptance import fit_acceptance
    from nextlat.training.trained import load_run

    path, fit = fit_acceptance(load_run(run, device), temperature, prompts, length, steps, split_names(domains))
    print(f"fitted to {fit.examples} drafts, measured on {fit.held_out} of other prompts")
    table = Table(box=None, pad_edge=False)
    for column in ("chances from", "log loss", "Brier score"):
        table.add_column(column, justify="left" if column == "chances from" else "right")
    for name, score in (("head", fit.head_score), ("the position alone", fit.constant)):
        table.add_row(name, f"{score.log_loss:.4f}", f"{score.brier:.4f}")
    Console(soft_wrap=True).print(table)
    if fit.head_score.log_loss > fit.constant.log_loss:
        print(f"on other texts the head foresees less than positions do; fit it to more than {prompts} of them")
    print(f"wrote {path}")


def sweep_command(
    source: str, overrides: Sequence[str], runs_dir: Path, results: Path | None, jobs: int, devices: str, dry_run: bool
) -> int:
    """Run a grid; returns 1 if a run failed."""
    from nextlat.training.sweep import Sweep

    if results is None:
        results = Path("results") / f"{read_config(source)[1].replace('-', '_')}.csv"
    work = Sweep(expand(source, overrides), runs_dir, results, jobs, split_names(devices), _say)
    plan = work.plan()
    width = max(len(str(config.name)) for config, _ in plan)
    for config, state in plan:
        print(f"{config.name!s:<{width}}  {config.hash()}  {state}")
    if dry_run:
        return 0
    work.run()
    if work.signal is not None:
        return 128 + work.signal
    show_summary([runs_dir / str(config.name) for config, _ in plan], results)
    if work.failed:
        print(f"{len(work.failed)} of {len(plan)} runs failed: {', '.join(work.failed)}", file=sys.stderr)
    return 1 if work.failed else 0


def _say(line: str) -> None:
    print(line, flush=True)


def show_summary(runs: Sequence[Path], results: Path | None = None) -> None:
    """Print every seed, mean, interval and solve rate; runs that are gone are read from the results file."""
    from nextlat.reporting import load_runs, summarise, summary_grid

    there = [run for run in runs if (run / "metrics.csv").is_file()]
    found = load_runs(there) if there else []
    gone = {run.name for run in runs if run not in there}
    if gone and results is not None and results.is_file():
        found += [run for run in load_runs([results]) if run.name in gone]
    if found:
        Console(soft_wrap=True).print(summary_grid(summarise(found)).rich())


def report_command(sources: Sequence[Path], out: Path) -> None:
    """Write the report and say where it is."""
    from nextlat.reporting import write_report

    page = write_report(sources, out)
    print(f"wrote {page}")


def demo_command(runs_dir: Path, seed: int) -> int:
    """Train both models, write summary and report, print the table."""
    from nextlat.files import write_json
    from nextlat.reporting import write_report
    from nextlat.training.sweep import Sweep

    found = expand("path_star/mini", ["objective=gpt,nextlat", f"seed={seed}"])
    configs = [config.model_copy(update={"name": f"demo-{config.objective}-s{config.seed}"}) for config in found]
    work = Sweep(configs, runs_dir, None, jobs=len(configs), say=_say)
    print(
        f"training {' and '.join(c.objective for c in configs)} side by side in {runs_dir}, one thread each", flush=True
    )
    work.run()
    if work.signal is not None:
        return 128 + work.signal
    if work.failed:
        return 1
    summary = {}
    for config in configs:
        made = json.loads((runs_dir / str(config.name) / "evaluations" / "accuracy.json").read_text(encoding="utf-8"))
        metric = next(iter(made["metrics"].values()))
        summary[config.objective] = {
            "accuracy": metric["value"],
            "low": metric["low"],
            "high": metric["high"],
            "chance": metric["chance"],
            "seed": config.seed,
            "steps": made["step"],
        }
    write_json(runs_dir / "summary.json", summary)
    runs = [runs_dir / str(config.name) for config in configs]
    page = write_report(runs, runs_dir / "report")
    show_summary(runs)
    print(f"summary: {runs_dir / 'summary.json'}\nopen in a browser: {page.resolve().as_uri()}")
    return 0


def configs_command(name: str | None, commands: bool) -> None:
    """List configurations, print one, or print ready commands."""
    if name is not None:
        read_config(name)
        print(
            packaged()[name].read_text(encoding="utf-8")
            if name in packaged()
            else Path(name).read_text(encoding="utf-8")
        )
        return
    for label, file in packaged().items():
        text = file.read_text(encoding="utf-8")
        if commands:
            objectives = resolve(read_config(label)[0]).objectives
            for objective in objectives:
                print(f"nextlat train {label} objective={objective}")
        else:
            print(f"{label}\n" + "\n".join(f"    {line}" for line in header(text).splitlines()))


def conformance_command(target: str | None, kind: str, only: Sequence[str], list_claims: bool) -> int:
    """Print what became of each claim; returns 1 if one fails."""
    from nextlat.conformance import check, find_claims, find_kind, load_function
    from nextlat.conformance.loading import current_directory_first

    claims = find_claims(kind, only)
    width = max(len(claim.name) for claim in claims)
    if list_claims:
        print(f"FUNCTION{find_kind(kind).signature}")
        for claim in claims:
            print(f"{claim.name:<{width}}  {claim.sentence}")
        return 0
    target = target or find_kind(kind).own
    with current_directory_first():
        verdicts = check(load_function(target), kind, only)
    for verdict in verdicts:
        print(f"holds  {verdict.name}" if verdict.holds else f"FAILS  {verdict.name:<{width}}  {verdict.reason}")
    held = sum(verdict.holds for verdict in verdicts)
    left = "" if len(verdicts) == len(claims) else "; the others were not checked"
    print(f"{held} of {len(claims)} claims about {kind} hold for {target}{left}")
    return 0 if held == len(claims) else 1


def bench_command(suites: Sequence[str], effort: Effort, json_file: Path | None, threads: int) -> None:
    """Measure, print a table for each suite, and write all figures if asked to."""
    import torch

    from nextlat.bench import SUITES, find_suite
    from nextlat.bench.results import WIDTH, described, machine, notes, table
    from nextlat.files import write_json

    runs = [Path(name) for name in suites if (Path(name) / "config.yaml").is_file()]
    named = [name for name in suites if Path(name) not in runs]
    chosen = {name: find_suite(name) for name in named or SUITES}
    if runs and named != ["decode"]:
        raise NextLatError(f"runs are measured by decode alone: nextlat bench decode {' '.join(map(str, runs))}")
    if runs:
        chosen = {"decode": partial(chosen["decode"], runs=runs)}
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise NextLatError(f"--json {json_file}: its folder does not exist; make {json_file.absolute().parent} first")
    torch.set_num_threads(threads)
    setting = {**machine(), "effort": effort}
    print(described(setting), flush=True)
    console = Console(width=WIDTH)
    began = time.monotonic(), time.process_time()
    found: dict[str, list[Result]] = {name: [] for name in chosen}
    for name, run in chosen.items():
        for _, together in groupby(run(effort), lambda result: result.setting):
            part = list(together)
            found[name] += part
            console.print(table(part))
        for line in notes(found[name]):
            print(f"  {line}")
        print(flush=True)
    print(f"took {time.monotonic() - began[0]:.0f} s, of them {time.process_time() - began[1]:.0f} s on a processor")
    if json_file is not None:
        results = {name: [result.plain() for result in part] for name, part in found.items()}
        write_json(json_file, {"machine": setting, "results": results})
        print(f"wrote {json_file}")
