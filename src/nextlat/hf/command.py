"""What ``export``, ``import`` and ``evaluate RUN harness`` do, once their arguments are read."""

from __future__ import annotations

from pathlib import Path

from nextlat.errors import NextLatError


def export_command(run: Path, folder: Path, checkpoint: str, dtype: str) -> None:
    """Export and say what was checked."""
    from nextlat.hf.export import export_run

    if checkpoint not in ("newest", "best"):
        raise NextLatError(f"--checkpoint is {checkpoint!r}; choose newest or best")
    done = export_run(run, folder, checkpoint, dtype)
    print(f"wrote {done.folder}; its logits in transformers differ from the run's by at most {done.difference:.2g}")
    if not done.tokenizer:
        print("the task has no tokenizer: the model reads and writes token ids")


def import_command(folder: Path, runs_dir: Path, name: str | None) -> None:
    """Import and say what can be done now."""
    from nextlat.hf.restore import import_run

    run = import_run(folder, runs_dir, name)
    print(f"wrote {run}; measure it with: nextlat evaluate {run}")


def harness_command(
    run: Path, tasks: str | None, limit: int | None, batch_size: int, checkpoint: str, device: str | None
) -> None:
    """Run lm-eval tasks on a run and print what was found."""
    from nextlat.commands import show_metrics
    from nextlat.hf.harness import evaluate_harness, remark, split_tasks
    from nextlat.training.trained import load_run

    names = split_tasks(tasks)
    trained = load_run(run, device, checkpoint)
    metrics, file = evaluate_harness(trained, names, limit, batch_size)
    print(f"harness of {run} at step {trained.step}: {file}")
    show_metrics(metrics)
    said = remark(metrics)
    if said is not None:
        print(said)
