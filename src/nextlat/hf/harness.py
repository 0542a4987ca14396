"""The public evaluation harness, lm-eval, on a run of any objective that was trained on text."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from nextlat.errors import NextLatError
from nextlat.files import explained, write_json
from nextlat.hf.tokenizer import task_tokenizer
from nextlat.options import split_names
from nextlat.statistics import Z95, Metric, proportion
from nextlat.training.environment import commit
from nextlat.training.loop import results
from nextlat.training.trained import Trained

PAPER = "nextlat_paper"
"""The group of the paper's nine zero-shot tasks (arXiv 2511.05963)."""
ACCURACIES = (
    "lambada_standard",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "social_iqa",
    "sciq",
)
"""Tasks of the group whose accuracies its average is taken over."""
PAPER_TASKS = ("wikitext", *ACCURACIES)


def split_tasks(text: str | None) -> list[str]:
    """``wikitext,piqa`` as names, the paper's group spelled out, each once."""
    names = split_names(text)
    if not names:
        raise NextLatError(f"harness needs --tasks: names of lm-eval, {PAPER}, YAML files or folders of them")
    return list(dict.fromkeys(task for name in names for task in (PAPER_TASKS if name == PAPER else (name,))))


class TaskFigures(NamedTuple):
    """What was measured of one task."""

    metrics: dict[str, Metric]
    """By ``<task>.<metric>``."""
    errors: dict[str, float | None]
    """Standard errors as the harness gives them, by the same names; averages are made with them."""
    lm_eval: str
    """Version of the harness."""


def evaluate_harness(
    trained: Trained, tasks: Sequence[str], limit: int | None = None, batch_size: int = 16
) -> tuple[dict[str, Metric], Path]:
    """Run harness tasks on a loaded run and write ``evaluations/harness.json``.

    Tasks that the file has already, of the same step, stay in it unless they are among these. Trials have files of
    their own, ``harness-limit-<N>.json``.

    Returns:
        metrics ``<task>.<metric>`` of these tasks and averages of all in the file, and the file.

    Raises:
        NextLatError: as for :func:`run_harness`, a run that was not trained on text, or a file that cannot be read.
    """
    require_lm_eval()
    from nextlat.hf.lm_adapter import HarnessLM

    task = trained.built.task
    tokenizer = task_tokenizer(task)
    if tokenizer is None or not task.next_token:
        raise NextLatError(
            f"{trained.path} was trained on {trained.config.task}, which is not text; harness tasks are texts"
        )
    marks = ["harness", *([f"limit-{limit}"] if limit is not None else []), *(["best"] if trained.best else [])]
    file = trained.path / "evaluations" / f"{'-'.join(marks)}.json"
    earlier_figures(file, trained.step)  # one that cannot be read is told before hours of work
    lm = HarnessLM(trained.built.objective.as_lm(), tokenizer, task.sequence_length, batch_size, trained.device)
    new = measure_tasks(lm, tasks, limit)
    together = {**earlier_figures(file, trained.step), **new}
    average = paper_average(together)
    with explained("creating", file.parent):
        file.parent.mkdir(exist_ok=True)
    content = results(all_metrics(together) | average, trained.config, trained.step, commit())
    setting = {
        "limit": limit,
        "longest": task.sequence_length,
        "tasks": {
            name: {"lm_eval": figures.lm_eval, "standard_errors": figures.errors} for name, figures in together.items()
        },
    }
    write_json(file, {**content, "harness": setting})
    return all_metrics(new) | average, file


def require_lm_eval() -> None:
    """Say which extra brings lm-eval, if it is missing or too old to be asked for files."""
    try:
        from lm_eval.models.utils import normalize_gen_kwargs  # noqa: F401
        from lm_eval.tasks._index import TaskIndex  # noqa: F401
    except ImportError as error:
        raise NextLatError(
            f'harness needs lm-eval, and one that has what 0.4.13 has ({error}): pip install -U "nextlat[harness]"'
        ) from None


def earlier_figures(file: Path, step: int) -> dict[str, TaskFigures]:
    """What a file holds of each task; nothing if it is of another step, or not there.

    Raises:
        NextLatError: a file that :func:`evaluate_harness` did not write.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["step"] != step:
            return {}
        return {
            task: TaskFigures(
                {label: Metric(**content["metrics"][label]) for label in kept["standard_errors"]},
                kept["standard_errors"],
                kept["lm_eval"],
            )
            for task, kept in content["harness"]["tasks"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise NextLatError(
            f"{file} is damaged or of another version of nextlat ({type(error).__name__}: {error}), so no task can be "
            "added to it; move it away"
        ) from error


def all_metrics(figures: Mapping[str, TaskFigures]) -> dict[str, Metric]:
    """The metrics of all tasks in one dictionary."""
    return {label: metric for one in figures.values() for label, metric in one.metrics.items()}


def run_harness(lm: Any, tasks: Sequence[str], limit: int | None = None) -> dict[str, Metric]:
    """Run tasks zero-shot on anything lm-eval takes as a model.

    Args:
        lm: an ``lm_eval.api.model.LM``.
        tasks: names that lm-eval knows, YAML files, or folders of YAML files.
        limit: examples a task; ``None`` is all.

    Returns:
        ``<task>.<metric>``: value with its 95 % interval from the standard error the harness gives, and, if all
        eight tasks of the paper's average are there, ``nextlat_paper.average`` (of ``acc``) and
        ``nextlat_paper.average_norm`` (of ``acc_norm`` where a task has it). Of runs of this library also, where
        they are not 0, ``<task>.cut_contexts``, ``<task>.cut_answers`` and ``<task>.lost_characters``.

    Raises:
        NextLatError: lm-eval is missing, a task is unknown, or its data cannot be had.
    """
    figures = measure_tasks(lm, tasks, limit)
    return all_metrics(figures) | paper_average(figures)


def measure_tasks(lm: Any, tasks: Sequence[str], limit: int | None = None) -> dict[str, TaskFigures]:
    """:func:`run_harness` by task, without the averages."""
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from torch import OutOfMemoryError

    from nextlat.hf.lm_adapter import HarnessLM

    found_tasks = find_tasks(tasks)
    known = [name for name, spec in found_tasks.items() if name == spec]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=bool(known))
    unknown = [name for name in known if name not in manager.all_tasks]
    if unknown:
        raise NextLatError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists those it has")
    ours = lm if isinstance(lm, HarnessLM) else None
    if ours is not None:
        ours.counts.clear()
    try:
        found = simple_evaluate(
            lm,
            tasks=list(found_tasks.values()),
            num_fewshot=0,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except NextLatError:
        raise
    except OutOfMemoryError as error:
        raise NextLatError(f"the device has no room for a batch ({error}); lower --batch-size") from error
    except Exception as error:  # task files name data sets, fields and Python functions, which raise what they like
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise NextLatError(
            f"harness tasks {', '.join(found_tasks)} could not be run ({type(error).__name__}: {reason}); tasks named "
            "by lm-eval need their data from the Hugging Face hub, online or in its cache; YAML tasks need their "
            "files, and in these every field that the YAML names"
        ) from error
    assert found is not None
    figures = read_table(found["results"], found["n-samples"])
    for label, metric in (ours.counted() if ours is not None else {}).items():
        one = figures[label.rpartition(".")[0]]
        one.metrics[label], one.errors[label] = metric, None
    return figures


def find_tasks(tasks: Sequence[str]) -> dict[str, str]:
    """For the name of each task what lm-eval is to be asked for: that name, or the path of a file.

    Files are named by their paths, because lm-eval looks up names in whole trees of folders and among its own tasks.

    Raises:
        NextLatError: a file or folder without a task in it, a group, or two files that give their tasks one name.
    """
    found: dict[str, str] = {}
    for task in tasks:
        path = Path(task)
        called: dict[str, str] = {}
        if path.is_dir() and task not in PAPER_TASKS:
            for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")]):
                if (name := _task_name(file)) is not None:
                    _add(called, name, str(file.resolve()))
        elif path.suffix in (".yaml", ".yml"):
            if (name := _task_name(path)) is not None:
                called[name] = str(path.resolve())
        else:
            called[task] = task
        if not called:
            raise NextLatError(
                f"{task} holds no lm-eval task: a YAML file with a line `task: NAME`; of a group, name the files of "
                "its tasks or their folder"
            )
        for name, spec in called.items():
            _add(found, name, spec)
    return found


def _add(found: dict[str, str], name: str, spec: str) -> None:
    if found.setdefault(name, spec) != spec:
        raise NextLatError(f"the task {name!r} is asked for twice, as {found[name]} and as {spec}; rename one of them")


def _task_name(file: Path) -> str | None:
    """Of the task that a file defines; ``None`` for groups and for parts that other files include."""
    import yaml
    from lm_eval.tasks._index import Kind, TaskIndex

    if not file.is_file():
        raise NextLatError(f"there is no task file {file}")
    try:
        entry = TaskIndex.entry_from_path(file)  # without running the Python functions that it may name
    except ValueError:
        return None
    except (OSError, yaml.YAMLError) as error:
        raise NextLatError(f"{file} cannot be read as an lm-eval task ({' '.join(str(error).split())})") from error
    return entry.name if entry is not None and entry.kind is not Kind.GROUP and isinstance(entry.name, str) else None


def read_table(found: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Any]) -> dict[str, TaskFigures]:
    """The harness's table in ours. A proportion's interval stays within 0 and 1."""
    figures = {}
    for task, row in found.items():
        n = samples[task]["effective"] if task in samples else None
        one = figures[task] = TaskFigures({}, {}, version("lm_eval"))
        for key, value in row.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = f"{task}.{name}" if kind == "none" else f"{task}.{name}.{kind}"
            given = row.get(f"{name}_stderr,{kind}")
            error = float(given) if isinstance(given, int | float) and math.isfinite(given) else None
            share = name.startswith(("acc", "exact_match", "f1"))
            one.metrics[label], one.errors[label] = with_error(float(value), error, n, share), error
    return figures


def with_error(value: float, error: float | None, n: int | None, share: bool) -> Metric:
    """A value with its 95 % interval, if it has a standard error.

    Args:
        value: a mean.
        error: its standard error.
        n: items it is of.
        share: whether it lies between 0 and 1. Where all items were 0 or 1 the interval is Wilson's, which is one at
            0 of n and n of n too.
    """
    if error is None:
        return Metric(value, n=n)
    if not share:
        return Metric(value, value - Z95 * error, value + Z95 * error, n)
    # items between 0 and 1 vary as much as this only if each is one or the other
    if n and n > 1 and math.isclose(error, math.sqrt(max(0.0, value * (1 - value)) / (n - 1)), rel_tol=1e-6):
        return Metric(value, *proportion(round(value * n), n)[1:3], n)
    return Metric(value, max(0.0, value - Z95 * error), min(1.0, value + Z95 * error), n)


def paper_average(figures: Mapping[str, TaskFigures]) -> dict[str, Metric]:
    """The paper's averages, if all their parts are there; with an interval if all parts have standard errors."""
    averages = {}
    for name, wanted in (("average", ("acc",)), ("average_norm", ("acc_norm", "acc"))):
        parts = [
            (float(one.metrics[label].value), one.errors[label])
            for task in ACCURACIES
            if (one := figures.get(task)) is not None
            for label in [next((f"{task}.{key}" for key in wanted if f"{task}.{key}" in one.metrics), None)]
            if label is not None
        ]
        if len(parts) < len(ACCURACIES):
            continue
        errors = [error for _, error in parts if error is not None]
        error = math.sqrt(sum(e * e for e in errors)) / len(parts) if len(errors) == len(parts) else None
        averages[f"{PAPER}.{name}"] = with_error(sum(value for value, _ in parts) / len(parts), error, None, True)
    return averages


def remark(metrics: Mapping[str, Metric]) -> str | None:
    """One line about texts that did not fit the run's rows or its tokenizer, if there were some."""
    from nextlat.hf.lm_adapter import COUNTED

    parts = [
        f"{label} {metric.value:,.0f} of {metric.n:,} {COUNTED[what]}"
        for label, metric in metrics.items()
        if (what := label.rpartition(".")[2]) in COUNTED
    ]
    return f"not everything fitted the run's rows and tokenizer: {', '.join(parts)}" if parts else None
