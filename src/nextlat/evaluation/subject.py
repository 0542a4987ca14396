"""What a measurement is given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from nextlat.batch import Batch
from nextlat.config import ProbeOptions
from nextlat.errors import NextLatError
from nextlat.model.interfaces import CausalLM
from nextlat.tasks.base import Prompted, Prompts, Task, Textual


@dataclass(frozen=True)
class Subject:
    """A trained model, the task it is measured on, and how much of it is looked at."""

    task: Task
    lm: CausalLM
    embedding_weight: torch.Tensor
    """(V, D)"""
    head_weight: torch.Tensor | None
    """(V, D); ``None`` where more than a matrix lies between a state and its next-token law."""
    dynamics: nn.Module | None
    """p_psi: the objective's own, or one fitted afterwards; ``None`` if there is none."""
    device: torch.device
    seed: int = 0
    split: str = "test"
    examples: int | None = None
    """At most so many held-out examples; ``None`` is all."""
    batch_size: int = 500
    horizon: int = 0
    """Steps that the objective looks ahead."""
    probes: ProbeOptions = field(default_factory=lambda: ProbeOptions.model_validate({}))

    def prompts(self) -> Prompts:
        """The prompts to answer."""
        tokens, answers, forced, parallel = self.need_prompted().prompts(self.split)
        return Prompts(tokens[: self.examples], answers[: self.examples], forced[: self.examples], parallel)

    def batches(self) -> list[Batch]:
        """The held-out batches, on the device."""
        batches, left = [], self.examples
        for batch in self.task.evaluation(self.split):
            if left is not None:
                batch = batch.rows(0, left)
                left -= len(batch.tokens)
            batches.append(batch.to(self.device))
            if left == 0:
                break
        return batches

    def need_prompted(self) -> Prompted:
        """The task, or an error if it asks for no answers."""
        if not isinstance(self.task, Prompted):
            raise NextLatError(f"this task has no prompts to answer; measure {self.task.headline} instead of accuracy")
        return self.task

    def need_textual(self) -> Textual:
        """The task, or an error if it is not running text."""
        if not isinstance(self.task, Textual):
            raise NextLatError(
                f"this task is not running text, which cross_entropy and probes need; measure {self.task.headline}"
            )
        return self.task

    def need_dynamics(self) -> nn.Module:
        """The dynamics, or an error that says how to get one."""
        if self.dynamics is None:
            raise NextLatError(
                "this measurement rolls a latent dynamics network and the objective has none; fit one to the frozen "
                "model with `nextlat fit-dynamics RUN`, then evaluate with --dynamics posthoc"
            )
        return self.dynamics
