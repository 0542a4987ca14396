"""From a configuration to the things that are trained, with the checks that need them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nextlat.config import Config
from nextlat.errors import NextLatError
from nextlat.evaluation import find_evaluation
from nextlat.model import Transformer
from nextlat.objectives import Objective, find_objective
from nextlat.objectives.base import check_length
from nextlat.tasks import Prompted, Task, Textual, find_task
from nextlat.training.tracking import package

AUXILIARY_STREAM = 1
"""Networks beside the trunk draw from a second stream, so that all objectives start from the same trunk."""

NEEDS = {"accuracy": Prompted, "cross_entropy": Textual, "probes": Textual}
"""What some evaluations ask of a task."""


class Built(NamedTuple):
    """A task and a freshly initialised objective."""

    task: Task
    objective: Objective


def stream(seed: int, number: int) -> torch.Generator:
    """Independent CPU random streams of a seed."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def build(config: Config) -> Built:
    """Build task and objective on the CPU.

    Raises:
        NextLatError: sizes that do not fit each other, or names of evaluations that do not exist.
    """
    for name in config.evaluation.after:
        find_evaluation(name)
    task: Task = find_task(config.task)(config.data, config.seed, config.training.batch_size)
    model = config.model
    trunk = Transformer(
        task.vocab_size, model.n_layers, model.n_heads, model.width, model.tie_embeddings, stream(config.seed, 0)
    )
    trunk.checkpoint_activations = config.training.checkpoint_activations
    objective = find_objective(config.objective).build(
        trunk,
        config.selected,
        generator=stream(config.seed, AUXILIARY_STREAM),
        end_token=task.end_token,
        next_token=task.next_token,
    )
    check_length(objective.horizon, task.sequence_length)
    return Built(task, objective)


def check(config: Config, built: Built) -> None:
    """Refuse, before a run directory is made, what only its first evaluation or tracker would stumble over.

    Raises:
        NextLatError: no such device, tracker's package or split, or an evaluation that is not for this task.
    """
    pick_device(config.training.device)
    for name in config.training.track:
        package(name)
    task, split = built.task, config.evaluation.split
    if split not in task.splits:
        raise NextLatError(f"{config.task} has no split {split!r}; choose {' or '.join(task.splits)}")
    for asked in config.evaluation.after:
        if not isinstance(task, NEEDS.get(asked, Task)):
            raise NextLatError(
                f"evaluation.after asks for {asked}, which is not for {config.task}; "
                f"set evaluation.after=[{task.headline}]"
            )


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise NextLatError("training.device is cuda and torch sees no CUDA GPU; use device=auto or cpu")
    return torch.device(name)
