"""What ``export``, ``import``, ``generate`` and ``evaluate RUN harness`` do, once their arguments are read."""

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


def generate_command(
    run: Path,
    prompt: str | None,
    tokens: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    checkpoint: str,
    device: str | None,
) -> None:
    """Continue one prompt and print what is new: text for text, token ids for token ids."""
    import torch

    from nextlat.decoding import generate
    from nextlat.hf.tokenizer import task_tokenizer
    from nextlat.training.trained import load_run

    if (prompt is None) == (tokens is None):
        raise NextLatError('give either --prompt "some text" or --tokens 1,2,3')
    if checkpoint not in ("newest", "best"):
        raise NextLatError(f"--checkpoint is {checkpoint!r}; choose newest or best")
    trained = load_run(run, device, checkpoint)
    task = trained.built.task
    if not task.next_token:
        raise NextLatError(f"{run} was trained on {trained.config.task} to label its input; it cannot continue it")
    tokenizer = task_tokenizer(task)
    if prompt is None:
        assert tokens is not None
        ids = read_tokens(tokens, task.vocab_size)
    elif tokenizer is None:
        raise NextLatError(f"{trained.config.task} has no tokenizer; give token ids with --tokens 1,2,3")
    else:
        ids = [tokenizer.end_token, *tokenizer.encode(prompt)]  # the end token opens a document
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([ids], device=trained.device)
    lm = trained.built.objective.as_lm()
    stop = () if task.end_token is None else (task.end_token,)
    new = generate(lm, rows, max_new_tokens, temperature, generator, stop_tokens=stop)[0].tolist()
    if task.end_token in new:
        new = new[: new.index(task.end_token)]  # the rest repeats it
    if prompt is None or tokenizer is None:
        print(",".join(map(str, new)))
    else:
        print(tokenizer.decode(new))


def read_tokens(text: str, vocab_size: int) -> list[int]:
    """``1,2,3`` as token ids of a vocabulary."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise NextLatError(f"--tokens is {text!r}; write ids with commas between them, such as 1,2,3") from None
    for token in ids:
        if not 0 <= token < vocab_size:
            raise NextLatError(f"--tokens names {token}, and the vocabulary has the tokens 0 to {vocab_size - 1}")
    return ids


def harness_command(
    run: Path, tasks: str | None, limit: int | None, batch_size: int, checkpoint: str, device: str | None
) -> None:
    """Run lm-eval tasks on a run and print what was found."""
    from nextlat.commands import show_metrics
    from nextlat.hf.harness import evaluate_harness, split_tasks
    from nextlat.training.trained import load_run

    names = split_tasks(tasks)
    trained = load_run(run, device, checkpoint)
    metrics, file = evaluate_harness(trained, names, limit, batch_size)
    print(f"harness of {run} at step {trained.step}: {file}")
    show_metrics(metrics)
