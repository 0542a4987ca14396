"""The public evaluation harness, lm-eval, on a run of any objective that was trained on text."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nextlat.errors import NextLatError
from nextlat.files import explained, write_json
from nextlat.hf.tokenizer import task_tokenizer
from nextlat.statistics import Z95, Metric
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
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if not names:
        raise NextLatError(f"harness needs --tasks: names of lm-eval, {PAPER}, YAML files or folders of them")
    return list(dict.fromkeys(task for name in names for task in (PAPER_TASKS if name == PAPER else (name,))))


def evaluate_harness(
    trained: Trained, tasks: Sequence[str], limit: int | None = None, batch_size: int = 16
) -> tuple[dict[str, Metric], Path]:
    """Run harness tasks on a loaded run and write ``evaluations/harness.json``.

    Returns:
        metrics ``<task>.<metric>``, and the file written.
    """
    from nextlat.hf.lm_adapter import HarnessLM

    task = trained.built.task
    tokenizer = task_tokenizer(task)
    if tokenizer is None or not task.next_token:
        raise NextLatError(
            f"{trained.path} was trained on {trained.config.task}, which is not text; harness tasks are texts"
        )
    lm = HarnessLM(trained.built.objective.as_lm(), tokenizer, task.sequence_length, batch_size, trained.device)
    metrics = run_harness(lm, tasks, limit)
    file = trained.path / "evaluations" / ("harness-best.json" if trained.best else "harness.json")
    with explained("creating", file.parent):
        file.parent.mkdir(exist_ok=True)
    setting = {"tasks": list(tasks), "limit": limit, "lm_eval": version("lm_eval"), "longest": task.sequence_length}
    write_json(file, {**results(metrics, trained.config, trained.step, commit()), "harness": setting})
    return metrics, file


def run_harness(lm: Any, tasks: Sequence[str], limit: int | None = None) -> dict[str, Metric]:
    """Run tasks zero-shot on anything lm-eval takes as a model.

    Args:
        lm: an ``lm_eval.api.model.LM``.
        tasks: names that lm-eval knows, YAML files, or folders of YAML files.
        limit: examples a task; ``None`` is all.

    Returns:
        ``<task>.<metric>``: value with its 95 % interval from the standard error the harness gives, and, if all
        eight tasks of the paper's average are there, ``nextlat_paper.average`` (of ``acc``) and
        ``nextlat_paper.average_norm`` (of ``acc_norm`` where a task has it).

    Raises:
        NextLatError: lm-eval is missing, a task is unknown, or its data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise NextLatError('harness needs lm-eval: pip install "nextlat[harness]"') from None
    names, folders = find_tasks(tasks)
    own = {name for name in names if name not in tasks}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=folders or None, include_defaults=own != set(names))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise NextLatError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists those it has")
    try:
        found = simple_evaluate(
            lm, tasks=names, num_fewshot=0, limit=limit, task_manager=manager, bootstrap_iters=1000, log_samples=False
        )
    except (OSError, ValueError) as error:  # what its data sets raise offline and for files that are not there
        reason = " ".join(str(error).split())[:300]
        raise NextLatError(
            f"harness tasks {', '.join(names)} could not be run ({type(error).__name__}: {reason}); tasks named by "
            "lm-eval need their data from the Hugging Face hub, online or in its cache; YAML tasks need their files"
        ) from error
    assert found is not None
    return paper_average(to_metrics(found["results"], found["n-samples"]))


def find_tasks(tasks: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Names of tasks, and the folders that lm-eval must look into for those that are files.

    Raises:
        NextLatError: a file or folder without a task in it.
    """
    names: list[str] = []
    folders: list[Path] = []
    for task in tasks:
        path = Path(task)
        if path.is_dir():
            files = sorted(path.glob("*.yaml"))
        elif path.suffix in (".yaml", ".yml"):
            files = [path]
        else:
            names.append(task)
            continue
        called = [name for file in files if (name := _task_name(file)) is not None]
        if not called:
            raise NextLatError(f"{task} holds no lm-eval task: a YAML file with a line `task: NAME`")
        names += called
        folders.append(path if path.is_dir() else path.parent)
    return names, list(dict.fromkeys(folders))


def _task_name(file: Path) -> str | None:
    """The ``task:`` line; the file as a whole may name Python functions, which is the harness's business."""
    if not file.is_file():
        raise NextLatError(f"there is no task file {file}")
    found = re.search(r"^task:\s*[\"']?([\w.+-]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None


def to_metrics(found: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Any]) -> dict[str, Metric]:
    """The harness's table in ours. A proportion's interval stays within 0 and 1."""
    metrics: dict[str, Metric] = {}
    for task, row in found.items():
        n = samples[task]["effective"] if task in samples else None
        for key, value in row.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = f"{task}.{name}" if kind == "none" else f"{task}.{name}.{kind}"
            error = row.get(f"{name}_stderr,{kind}")
            bounds = (0.0, 1.0) if name.startswith(("acc", "exact_match", "f1")) else (-math.inf, math.inf)
            metrics[label] = with_error(float(value), error, n, bounds)
    return metrics


def with_error(value: float, error: Any, n: int | None, bounds: tuple[float, float]) -> Metric:
    """A value with the 95 % interval of its standard error, if it has one."""
    if not isinstance(error, int | float) or not math.isfinite(error):
        return Metric(value, n=n)
    return Metric(value, max(bounds[0], value - Z95 * error), min(bounds[1], value + Z95 * error), n)


def paper_average(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """The metrics, with the paper's averages if all their parts are there."""
    averages = {}
    for name, wanted in (("average", ("acc",)), ("average_norm", ("acc_norm", "acc"))):
        parts = [
            next((metrics[f"{task}.{key}"] for key in wanted if f"{task}.{key}" in metrics), None)
            for task in ACCURACIES
        ]
        if any(part is None or part.low is None or part.high is None for part in parts):
            continue
        values = [float(part.value) for part in parts if part is not None]
        errors = [(part.high - part.low) / (2 * Z95) for part in parts if part and part.high and part.low is not None]
        error = math.sqrt(sum(e * e for e in errors)) / len(parts)
        averages[f"{PAPER}.{name}"] = with_error(sum(values) / len(values), error, None, (0.0, 1.0))
    return {**metrics, **averages}
