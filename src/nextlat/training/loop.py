"""The training loop: flat, no callbacks."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextlat.allocator import keep_freed_memory
from nextlat.batch import Batch
from nextlat.config import Config
from nextlat.errors import NextLatError
from nextlat.evaluation import Subject, headline, merit
from nextlat.evaluation.health import collapse, health
from nextlat.files import write_text
from nextlat.objectives import Objective, total_loss
from nextlat.statistics import Metric
from nextlat.tasks import Task
from nextlat.training.build import Built, pick_device
from nextlat.training.checkpoint import (
    checkpoint_name,
    list_checkpoints,
    load_state,
    load_weights,
    newest,
    save_checkpoint,
)
from nextlat.training.checkpoint import discard as discard_checkpoint
from nextlat.training.compiled import compile_blocks
from nextlat.training.gradients import gradient_health, group_of
from nextlat.training.optimizers import learning_rate, make_optimizer
from nextlat.training.progress import Progress
from nextlat.training.run import RunDirectory
from nextlat.training.tracking import open_trackers
from nextlat.training.utilization import Utilization


@dataclass
class Outcome:
    """How a call of :func:`train` ended."""

    step: int
    finished: bool
    signal: int | None = None


class Interruption:
    """Remembers SIGINT and SIGTERM, so that the loop can save before it leaves."""

    signal: int | None = None

    @contextmanager
    def watched(self) -> Iterator[Interruption]:
        """Install the handlers for the duration of the block."""
        before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # asked twice means at once


def prepare(config: Config) -> torch.device:
    """Set threads and determinism for this process; returns the device."""
    training = config.training
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    keep_freed_memory()
    return pick_device(training.device)


def train(
    run: RunDirectory, built: Built, resume: bool = False, stop_after: int | None = None, bar: bool = True
) -> Outcome:
    """Train until ``training.steps`` updates are made.

    Args:
        run: a locked run directory.
        built: task and objective of the run's configuration.
        resume: go on from the newest checkpoint.
        stop_after: save and leave after so many updates in total, as a signal would make it.
        bar: draw a progress bar if the terminal can.

    Raises:
        NextLatError: a loss term or the gradient is not finite; the message names the step, the term and the
            last good checkpoint.
    """
    config, training = run.config, run.config.training
    device = prepare(config)
    task, objective = built.task, built.objective.to(device)
    optimizer = make_optimizer(objective, training)
    first, best, best_step, elapsed = 0, -math.inf, 0, 0.0
    if resume and list_checkpoints(run.checkpoints):
        checkpoint = newest(run.path)
        first = load_weights(checkpoint, objective)
        state = load_state(checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        best, best_step, elapsed = state["best"], state["best_step"], state["seconds"]
        if training.save == "best":
            point_to_best(run.checkpoints, best_step)
    save_every = training.save_every or training.evaluate_every or training.steps
    autocast = precision(config, device)
    if training.compile:
        compile_blocks(objective, micro_batches(task, config, first, device)[0], autocast, training.precision)
    utilization = Utilization(config, task.vocab_size, task.sequence_length, device)
    trackers = open_trackers(config, run.path, first)
    interruption = Interruption()
    began = time.monotonic() - elapsed
    step, last = first, min(training.steps, stop_after or training.steps)
    with interruption.watched(), Progress(run, training.steps, first, bar) as progress:
        for step in range(first + 1, last + 1):
            started = time.monotonic()
            rate = learning_rate(training, step - 1)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batches = micro_batches(task, config, step - 1, device)
            counts = add_counts(objective, batches)
            scale = {name: objective.term_weight(name) / max(int(count), 1) for name, count in counts.items()}
            optimizer.zero_grad(set_to_none=True)
            sums: dict[str, Tensor] = {}
            weights: dict[str, float] = {}
            beside: dict[str, tuple[Tensor, Tensor]] = {}
            for batch in batches:
                with autocast:
                    terms = objective(batch, scale)
                total_loss(terms, counts).backward()  # type: ignore[no-untyped-call]
                for name, term in terms.items():
                    sums[name] = sums.get(name, torch.zeros_like(term.sum)) + term.sum.detach()
                    weights[name] = term.weight
                for name, term in objective.logged.items():
                    before = beside.get(name, (0, 0))
                    beside[name] = before[0] + term.sum, before[1] + term.count
            norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), training.clip or math.inf)
            row: dict[str, float | int | str] = {"step": step}
            row |= summarize(sums, counts, weights, objective.horizon)
            row |= {name: float(total / count.clamp(min=1)) for name, (total, count) in beside.items()}
            row |= {"learning_rate": rate, "grad_norm": float(norm)}
            refuse_non_finite(row, run, step)
            optimizer.step()

            evaluated = training.evaluate_every is not None and step % training.evaluate_every == 0
            seconds = max(time.monotonic() - started, 1e-9)
            row["tokens_per_second"] = sum(b.tokens.numel() for b in batches) / seconds
            row |= utilization.row(float(row["tokens_per_second"]))
            improved = False
            if evaluated:
                metrics = headline(subject(config, built, device, config.evaluation.examples))
                row |= {f"eval.{name}": metric.value for name, metric in metrics.items()}
                reached = merit(task.headline, metrics)
                improved = reached > best
                best, best_step = (reached, step) if improved else (best, best_step)
                if config.evaluation.health:
                    figures = health(subject(config, built, device, config.evaluation.examples))
                    row |= {f"health.{name}": metric.value for name, metric in figures.items()}
                    with autocast:
                        pulls = gradient_health(objective, batches[0])
                    row |= {f"health.{name}": value for name, value in pulls.items()}
                    progress.warn(collapse(figures))
            row["seconds"] = time.monotonic() - began
            for tracker in trackers:
                tracker.log(row)
            progress.update(step, row)
            leaving = step == last or interruption.signal is not None
            if step % save_every == 0 or leaving or (improved and training.save == "best"):
                state = {
                    "optimizer": optimizer.state_dict(),
                    "rng": torch.get_rng_state(),
                    "best": best,
                    "best_step": best_step,
                    "seconds": float(row["seconds"]),
                }
                saved = save_checkpoint(run.checkpoints, step, objective, state)
                if training.save == "best":
                    point_to_best(run.checkpoints, best_step)
                thin(run, training.save, saved)
            if leaving:
                break
    for tracker in trackers:
        tracker.close()
    return Outcome(step, step == training.steps, interruption.signal)


def micro_batches(task: Task, config: Config, step: int, device: torch.device) -> list[Batch]:
    """The rows of a step, cut into equal micro-batches; every row carries its own key."""
    rows = config.training.batch_size // config.training.accumulation
    first_key = (config.seed * 2**40 + step * config.training.batch_size) % 2**62
    batches = []
    for start in range(0, config.training.batch_size, rows):
        keys = torch.arange(first_key + start, first_key + start + rows)
        batches.append(task.rows(step, start, start + rows)._replace(keys=keys).to(device))
    return batches


def add_counts(objective: Objective, batches: list[Batch]) -> dict[str, Tensor]:
    """Counts of every term over all micro-batches."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            total[name] = total[name] + count if name in total else count
    return total


def summarize(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: Mapping[str, float], horizon: int
) -> dict[str, float]:
    """Log values of a step.

    ``loss`` is the cross-entropy, or the first term where there is none; each term is its unweighted mean, and
    ``<term>.share`` its weighted share of the total. A group of horizon steps is also given as one figure,
    the mean of its per-step means.
    """
    means = {name: float(value / counts[name].clamp(min=1)) for name, value in sums.items()}
    parts = {name: weights[name] * mean for name, mean in means.items()}
    total = sum(parts.values())
    groups: dict[str, list[float]] = {}
    for name, mean in means.items():
        if group_of(name) != name:
            groups.setdefault(group_of(name), []).append(mean)
    row = {"loss": means.get("ce", next(iter(means.values())))}
    row |= means
    row |= {kind: sum(values) / horizon for kind, values in groups.items()}
    row |= {f"{name}.share": part / total if total else 0.0 for name, part in parts.items()}
    return row


def refuse_non_finite(row: Mapping[str, Any], run: RunDirectory, step: int) -> None:
    """Stop before a value that is not finite reaches the weights."""
    for name, value in row.items():
        if name.endswith(".share") or name == "loss" or not isinstance(value, float) or math.isfinite(value):
            continue
        good = list_checkpoints(run.checkpoints)
        last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was written yet"
        raise NextLatError(
            f"{name} is {value} at step {step}; training stopped before it reached the weights, and {last}. "
            "Lower training.learning_rate, add warmup_steps, or set training.clip"
        )


def precision(config: Config, device: torch.device) -> AbstractContextManager[object]:
    """What a forward pass runs under: autocast to bf16 if the configuration says so."""
    return torch.autocast(device.type, torch.bfloat16) if config.training.precision == "bf16" else nullcontext()


def subject(
    config: Config, built: Built, device: torch.device, examples: int | None, dynamics: torch.nn.Module | None = None
) -> Subject:
    """What evaluations look at; by default with the objective's own dynamics."""
    objective = built.objective
    return Subject(
        task=built.task,
        lm=objective.as_lm(),
        embedding_weight=objective.model.embedding_weight,
        head_weight=objective.model.head_weight if objective.stock_model else None,
        dynamics=objective.latent_dynamics() if dynamics is None else dynamics,
        device=device,
        seed=config.seed,
        split=config.evaluation.split,
        examples=examples,
        batch_size=config.evaluation.batch_size,
        horizon=objective.horizon,
        probes=config.evaluation.probes.model_copy(
            # more would be rows of the following steps, each many times over
            update={"batch_size": min(config.evaluation.probes.batch_size, config.training.batch_size)}
        ),
    )


def point_to_best(checkpoints: Path, step: int) -> None:
    """Name the checkpoint with the best headline metric so far, if it is there.

    Done again on resume: a killed run may have saved the checkpoint without naming it.
    """
    if (checkpoints / checkpoint_name(step)).is_dir():
        write_text(checkpoints / "best", checkpoint_name(step) + "\n")


def thin(run: RunDirectory, keep: str, saved: Path) -> None:
    """Remove checkpoints that ``training.save`` does not keep: all but the newest, and the best if asked for."""
    if keep == "every":
        return
    pointer = run.checkpoints / "best"
    best = pointer.read_text(encoding="utf-8").strip() if keep == "best" and pointer.is_file() else None
    for checkpoint in list_checkpoints(run.checkpoints):
        if checkpoint != saved and checkpoint.name != best:
            discard_checkpoint(checkpoint)


def results(metrics: Mapping[str, Metric], config: Config, step: int, commit: str | None) -> dict[str, Any]:
    """The content of ``evaluations/<name>.json``."""
    return {
        "metrics": {name: metric._asdict() for name, metric in metrics.items()},
        "seed": config.seed,
        "step": step,
        "commit": commit,
    }
