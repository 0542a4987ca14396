"""What a run will cost: parameters, and time and memory read off a small trial."""

from __future__ import annotations

import time
from contextlib import nullcontext
from statistics import median
from typing import NamedTuple

import torch

from nextlat.config import Config
from nextlat.objectives import total_loss
from nextlat.tasks import Textual
from nextlat.training.build import Built, build
from nextlat.training.loop import precision, prepare
from nextlat.training.optimizers import make_optimizer

TRIAL_TOKENS = 2048


class Estimate(NamedTuple):
    """Cost of a run on this machine."""

    model_parameters: int
    auxiliary_parameters: int
    seconds_per_step: float
    hours: float
    memory_gb: float
    """Weights, gradients, optimiser state and the activations of one micro-batch."""


def count(built: Built) -> tuple[int, int]:
    """Parameters of the plain model, and of what is trained beside it."""
    model = sum(p.numel() for p in built.objective.model.parameters())
    return model, sum(p.numel() for p in built.objective.parameters()) - model


def estimate(config: Config, built: Built) -> Estimate:
    """Time two depths and two numbers of rows of the same model, and extrapolate both linearly.

    The trial runs one to two blocks on at most ``TRIAL_TOKENS`` tokens; expect the right figure within a factor
    of about 1.5 on an idle machine. Evaluation is not included.
    """
    device = prepare(config)
    layers = config.model.n_layers
    micro = config.training.batch_size // config.training.accumulation
    rows = max(1, min(micro, TRIAL_TOKENS // built.task.sequence_length))
    times = {depth: _trial(config, depth, rows, device) for depth in sorted({1, min(2, layers)})}
    per_layer = max(times[max(times)][0] - times[1][0], 0.0) if len(times) > 1 else 0.0
    scale = micro / rows
    seconds = (times[1][0] + per_layer * (layers - 1)) * scale * config.training.accumulation
    stored_layer = max(times[max(times)][1] - times[1][1], 0) if len(times) > 1 else 0
    activations = (times[1][1] + stored_layer * (layers - 1)) * scale
    parameters, beside = count(built)
    return Estimate(
        parameters,
        beside,
        seconds,
        seconds * config.training.steps / 3600,
        (16 * (parameters + beside) + activations) / 1e9,
    )


def _trial(config: Config, depth: int, rows: int, device: torch.device) -> tuple[float, int]:
    shallow = config.model_copy(update={"model": config.model.model_copy(update={"n_layers": depth})})
    task, objective = build(shallow)
    objective = objective.to(device)
    optimizer = make_optimizer(objective, config.training)
    batch = (task.stand_in(rows) if isinstance(task, Textual) else task.rows(0, 0, rows)).to(device)
    stored = 0

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal stored
        if not isinstance(tensor, torch.nn.Parameter):
            stored += tensor.numel() * tensor.element_size()
        return tensor

    seconds = []
    for attempt in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(remember, lambda kept: kept)
        with hooks if attempt == 0 else nullcontext(), precision(config, device):
            loss = total_loss(objective(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:]), stored
