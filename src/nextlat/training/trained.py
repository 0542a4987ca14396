"""Loading a trained run, measuring it, and fitting a latent dynamics network to it afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nextlat.config import Config
from nextlat.data.manifest import TOKENIZER
from nextlat.data.tokenizer import load_tokenizer
from nextlat.errors import NextLatError
from nextlat.evaluation import find_evaluation
from nextlat.files import explained, write_json
from nextlat.objectives import NextLat, total_loss
from nextlat.objectives.base import check_length
from nextlat.objectives.dynamics import LatentDynamics
from nextlat.statistics import Metric
from nextlat.training.build import Built, build, stream
from nextlat.training.checkpoint import load_weights, newest
from nextlat.training.environment import commit
from nextlat.training.loop import add_counts, micro_batches, prepare, results, subject
from nextlat.training.optimizers import make_optimizer
from nextlat.training.run import RunDirectory

POSTHOC_STREAM = 2
POSTHOC_SHARE = 0.4
"""Share of the training steps that the control is fitted for."""


class Trained(NamedTuple):
    """A run with its weights loaded, in evaluation mode on its device."""

    path: Path
    config: Config
    built: Built
    step: int
    device: torch.device
    best: bool = False
    """Whether this is the best checkpoint on request, not the newest."""


def load_run(path: Path, device: str | None = None, which: str = "newest") -> Trained:
    """Load a run's newest checkpoint, or its ``best``.

    Raises:
        NextLatError: no run, no checkpoint, a damaged one, or another word than ``newest`` and ``best``.
    """
    if which not in ("newest", "best"):
        raise NextLatError(f"--checkpoint is {which!r}; choose newest or best")
    config = RunDirectory.open(path, lock=False).config
    if device is not None:
        config = config.model_copy(update={"training": config.training.model_copy(update={"device": device})})
    checkpoint = newest(path)
    if which == "best":
        pointer = path / "checkpoints" / "best"
        if not pointer.is_file():
            raise NextLatError(f"{path} has no best checkpoint; train with training.save=best")
        checkpoint = checkpoint.with_name(pointer.read_text(encoding="utf-8").strip())
    built = build(config)
    if (path / TOKENIZER).is_file():  # an imported run has its own; the data may not be on this machine
        cast(Any, built.task).tokenizer = load_tokenizer(path / TOKENIZER, built.task.end_token)
    step = load_weights(checkpoint, built.objective)
    place = prepare(config)
    built.objective.to(place).eval()
    return Trained(path, config, built, step, place, which == "best")


def evaluate_run(
    trained: Trained, names: Sequence[str], dynamics: str = "own", split: str | None = None
) -> dict[str, dict[str, Metric]]:
    """Run measurements on all held-out examples and write ``evaluations/<name>.json``.

    Args:
        trained: a loaded run.
        names: measurements.
        dynamics: ``own``, or ``posthoc`` for the network fitted to the frozen model; the file is then called
            ``<name>-posthoc.json``.
        split: another split than the configuration's; the file then carries its name, as it carries ``best``
            for the best checkpoint, so that ``<name>.json`` is always the newest one on the configured split.
    """
    config = trained.config
    network = posthoc_dynamics(trained) if dynamics == "posthoc" else None
    looked = subject(config, trained.built, trained.device, None, network)
    if split is not None:
        looked = looked.__class__(**{**looked.__dict__, "split": split})
    measurements = {name: find_evaluation(name) for name in names}
    found: dict[str, dict[str, Metric]] = {}
    folder = trained.path / "evaluations"
    for name, measure in measurements.items():
        found[name] = measure(looked)
        with explained("creating", folder):
            folder.mkdir(exist_ok=True)
        marks = [dynamics if dynamics == "posthoc" else "", split or "", "best" if trained.best else ""]
        write_json(
            folder / f"{'-'.join([name, *filter(None, marks)])}.json",
            results(found[name], config, trained.step, commit()),
        )
    return found


def posthoc_path(run: Path) -> Path:
    """Where the fitted dynamics of a run lies."""
    return run / "posthoc" / "dynamics.safetensors"


def posthoc_dynamics(trained: Trained) -> LatentDynamics:
    """The dynamics fitted to the frozen model."""
    path = posthoc_path(trained.path)
    if not path.is_file():
        raise NextLatError(f"{path} does not exist; fit it with `nextlat fit-dynamics {trained.path}`")
    try:
        weights = load_file(path)
        fitted_to = json.loads(path.with_name("fit.json").read_text(encoding="utf-8"))["model_step"]
    except (SafetensorError, OSError, ValueError, KeyError):
        raise NextLatError(
            f"{path.parent} is damaged; fit it again with `nextlat fit-dynamics {trained.path}`"
        ) from None
    if fitted_to != trained.step:
        raise NextLatError(
            f"{path} was fitted to the model of step {fitted_to}, and this is step {trained.step}; "
            f"fit it again with `nextlat fit-dynamics {trained.path}`"
        )
    hidden_dim, twice = weights["layer_1.weight"].shape
    dynamics = LatentDynamics(twice // 2, hidden_dim)
    dynamics.load_state_dict(weights)
    return dynamics.to(trained.device).eval()


def fit_dynamics(
    trained: Trained,
    steps: int | None = None,
    hidden_dim: int | None = None,
    horizon: int | None = None,
    kl_weight: float = 0.0,
) -> tuple[Path, list[float]]:
    """Fit p_psi to the frozen model of any objective: the control for every measurement that needs one.

    Same data and optimiser as the run, at its learning rate without warm-up, schedule or clipping; the trunk,
    the embedding and the head never change. By default SmoothL1 alone, for 40 % of the training steps, at the
    width and horizon that the configuration gives ``nextlat``.

    Returns:
        the file written, and the latent loss of every step.
    """
    config = trained.config
    if kl_weight and not trained.built.objective.stock_model:
        raise NextLatError(
            f"--kl-weight is {kl_weight}, and the next-token law of {config.objective} is more than its head times the "
            "state; fit it with SmoothL1 alone (leave --kl-weight out)"
        )
    section = config.objectives.get("nextlat")
    steps = steps or max(1, round(POSTHOC_SHARE * config.training.steps))
    hidden_dim = hidden_dim or (section.dynamics.hidden_dim if section else None)  # type: ignore[attr-defined]
    horizon = horizon or (section.horizon if section else 1)  # type: ignore[attr-defined]
    check_length(horizon, trained.built.task.sequence_length)
    model = trained.built.objective.model.requires_grad_(False)
    width = model.embedding_weight.shape[1]
    dynamics = LatentDynamics(width, hidden_dim or width, generator=stream(config.seed, POSTHOC_STREAM))
    fitted = NextLat(
        model, horizon, kl_weight=kl_weight, dynamics=dynamics, detach_source=True, detach_embeddings=True
    ).to(trained.device)
    optimizer = make_optimizer(fitted, config.training)
    losses = []
    for step in range(steps):
        batches = micro_batches(trained.built.task, config, step, trained.device)
        counts = add_counts(fitted, batches)
        optimizer.zero_grad(set_to_none=True)
        latent = 0.0
        for batch in batches:
            terms = {name: term for name, term in fitted(batch).items() if name != "ce"}
            total_loss(terms, counts).backward()  # type: ignore[no-untyped-call]
            latent += float(terms["latent_1"].sum.detach() / counts["latent_1"].clamp(min=1))
        if not math.isfinite(latent):
            raise NextLatError(
                f"the latent loss is {latent} at step {step + 1} of the fit; nothing was written. "
                "Fit a run with a lower training.learning_rate"
            )
        optimizer.step()
        losses.append(latent)
    path = posthoc_path(trained.path)
    aside = path.with_name(".writing-dynamics.safetensors")
    with explained("writing", path):
        path.parent.mkdir(exist_ok=True)
        save_file({name: value.cpu() for name, value in dynamics.state_dict().items()}, aside)
        aside.replace(path)
        write_json(
            path.with_name("fit.json"),
            {
                "steps": steps,
                "horizon": horizon,
                "kl_weight": kl_weight,
                "model_step": trained.step,
                "loss": losses[-1],
            },
        )
    return path, losses
