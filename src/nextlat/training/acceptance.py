"""Fitting an acceptance head to the drafter of a trained run, and reading it back."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from nextlat.decoding.acceptance import AcceptanceHead
from nextlat.decoding.foresight import Fit, collect, fit
from nextlat.decoding.sampling import Sampling
from nextlat.errors import NextLatError
from nextlat.evaluation.domains import fitting_prompts
from nextlat.files import explained, write_bytes
from nextlat.hf.tokenizer import task_tokenizer
from nextlat.model.interfaces import Drafter
from nextlat.tasks import Prompted
from nextlat.tasks.base import Task
from nextlat.training.build import stream
from nextlat.training.trained import Trained

ACCEPTANCE_STREAM = 3
PROMPTS, LENGTH = 4096, 16
"""Texts that a head is fitted to, and length of the drafts."""


def acceptance_path(run: Path) -> Path:
    """Where the fitted head of a run lies."""
    return run / "posthoc" / "acceptance.safetensors"


def fit_acceptance(
    trained: Trained,
    temperature: float = 0.0,
    prompts: int = PROMPTS,
    length: int = LENGTH,
    steps: int | None = None,
    domains: Sequence[str] = (),
) -> tuple[Path, Fit]:
    """Fit a head with :func:`fitted_head` and write it beside the run.

    Returns:
        the file written, and the head with its calibration on held-out drafts.
    """
    found = fitted_head(trained, need_drafts(trained), temperature, prompts, length, steps, domains)
    path = acceptance_path(trained.path)
    about = {"model_step": trained.step, "temperature": temperature, "length": length, "domains": list(domains)}
    with explained("creating", path.parent):
        path.parent.mkdir(exist_ok=True)
    weights = {name: value.contiguous().cpu() for name, value in found.head.state_dict().items()}
    write_bytes(path, save(weights, {"about": json.dumps(about)}))
    return path, found


def fitted_head(
    trained: Trained,
    drafter: Drafter,
    temperature: float = 0.0,
    prompts: int = PROMPTS,
    length: int = LENGTH,
    steps: int | None = None,
    domains: Sequence[str] = (),
) -> Fit:
    """Fit a head to drafts behind prompts of the training data, and of other kinds of text that will be decoded.

    Args:
        trained: a loaded run.
        drafter: of the run.
        temperature: of the text that is continued; 0 is greedy. A head is for one temperature.
        prompts: texts to continue, in all; a fifth of them is only measured on.
        length: of the drafts, at most what the drafter makes.
        steps: of the fit; by default they grow with the number of drafts.
        domains: kinds of text of :mod:`nextlat.evaluation.domains`, which each have as large a part in the prompts as
            the training data, as far as they are that long.

    Returns:
        the head with its calibration on held-out drafts.

    Raises:
        NextLatError: an objective without a drafter, a task that is not continued, or numbers out of range.
    """
    if prompts < 3 or length < 1 or (steps is not None and steps < 1):
        raise NextLatError(f"prompts={prompts}, length={length}, steps={steps}; at least 3, 1 and 1 are needed")
    if drafter.max_length is not None:
        length = min(length, drafter.max_length - 1)
    if length < 1:
        raise NextLatError(f"{trained.path} drafts no token behind the known one; train it with a longer horizon")
    found = _mixture(trained, prompts, domains)
    examples = collect(
        trained.built.objective.as_lm(),
        drafter,
        [(prompt.to(trained.device), new) for prompt, new in found],
        Sampling(temperature),
        length,
        stream(trained.config.seed, ACCEPTANCE_STREAM),
    )
    return fit(examples, trained.built.objective.model.embedding_weight, steps, seed=trained.config.seed)


def _mixture(trained: Trained, count: int, domains: Sequence[str]) -> list[tuple[Tensor, int]]:
    """Prompts of the training data and of domains, in an order that puts all kinds everywhere; how long they go on."""
    task, share = trained.built.task, -(-count // (1 + len(domains)))
    found = list(texts(task, trained.config.training.batch_size, share))
    half = task.sequence_length // 2
    folder = trained.path.parent.parent / "data" / "domains"
    for name in domains:
        made = fitting_prompts(name, task, task_tokenizer(task), share, half, folder)
        found += [(prompt, task.sequence_length - half) for prompt in made]
    if domains:
        random.Random(0).shuffle(found)
    return found


def need_drafts(trained: Trained) -> Drafter:
    """The run's drafter, or an error that says what it lacks."""
    if not trained.built.task.next_token:
        raise NextLatError(
            f"{trained.path} was trained on {trained.config.task} to label its input; it cannot continue it, and so "
            "nothing is drafted"
        )
    drafter = trained.built.objective.drafter()
    if drafter is None:
        raise NextLatError(
            f"{trained.path} was trained with {trained.config.objective}, which drafts nothing; fit a run of nextlat, "
            "mtp or jtp"
        )
    return drafter


def texts(task: Task, batch_size: int, count: int) -> Iterator[tuple[Tensor, int]]:
    """Prompts of the training data, and how many tokens to continue each by.

    Prompts with answers are continued by as many tokens as the answer has. Of running text half a row is given: the
    document that its middle lies in, from its beginning.
    """
    if isinstance(task, Prompted):
        found = task.prompts("train" if "train" in task.splits else task.splits[0])
        if found.parallel:
            raise NextLatError("the answers of this task are read off one pass and not continued; nothing is drafted")
        for row in found.tokens[:count]:
            yield row, max(found.answers.shape[1], 3)  # the first is known before any draft, the last behind it
        return
    for number in range(count):
        step, row = divmod(number, batch_size)
        batch = task.rows(step, row, row + 1)
        half = batch.tokens.shape[1] // 2
        begin = 0
        if batch.documents is not None:
            places = torch.nonzero(batch.documents[0, :half] == batch.documents[0, half - 1])
            begin = int(places[0])
        yield batch.tokens[0, begin:half], batch.tokens.shape[1] - half


def acceptance_head(trained: Trained, temperature: float | None = None) -> AcceptanceHead:
    """The head that was fitted to a run.

    Args:
        trained: the run.
        temperature: that it will be used at, to be checked; what is accepted depends on it.

    Raises:
        NextLatError: there is none, it is damaged, or it was fitted to another step of the model or at another
            temperature.
    """
    path, again = acceptance_path(trained.path), f"`nextlat fit-acceptance {trained.path}`"
    if not path.is_file():
        raise NextLatError(f"{path} does not exist; fit it with {again}")
    try:
        weights = load_file(path)
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        length, hidden = weights["out.weight"].shape
        embedding = trained.built.objective.model.embedding_weight
        width = weights["layers.0.weight"].shape[1] - embedding.shape[1]
        head = AcceptanceHead(embedding, width, length, hidden)
        head.load_state_dict(weights)
        step, fitted_at = about["model_step"], float(about["temperature"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError):
        raise NextLatError(f"{path} is damaged; fit it again with {again}") from None
    if step != trained.step:
        raise NextLatError(
            f"{path} was fitted to the model of step {step}, and this is step {trained.step}; fit it again with {again}"
        )
    if temperature is not None and temperature != fitted_at:
        raise NextLatError(
            f"{path} was fitted at temperature {fitted_at:g}, and this is temperature {temperature:g}; fit it again "
            f"with {again} --temperature {temperature:g}, or remove it"
        )
    return head.to(trained.device).eval().requires_grad_(False)
