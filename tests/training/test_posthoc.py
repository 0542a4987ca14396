"""The control: a latent dynamics network fitted to a frozen model, whatever trained it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nextlat.training.trained as module
from nextlat.config import TrainingConfig
from nextlat.errors import NextLatError
from nextlat.training.trained import evaluate_run, fit_dynamics, load_run, posthoc_dynamics, posthoc_path
from tests.tiny import ALL, files_below, run_whole, tiny, weights


@pytest.fixture(scope="module")
def trained_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("posthoc")
    options = ("training.steps=20", "training.evaluate_every=null", "training.learning_rate=1e-2")
    return {name: run_whole(tiny(name, *options, name=name), folder) for name in ALL}


@pytest.mark.parametrize("objective", ALL)
def test_fitting_changes_the_dynamics_alone_and_the_loss_falls(
    objective: str, trained_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained_paths[objective]
    fitted: list[nn.Parameter] = []
    usual = module.make_optimizer

    def watching(network: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
        optimizer = usual(network, training)
        fitted.extend(p for group in optimizer.param_groups for p in group["params"])
        return optimizer

    monkeypatch.setattr(module, "make_optimizer", watching)
    trained = load_run(path)
    before = {name: value.clone() for name, value in trained.built.objective.state_dict().items()}
    on_disk = weights(path)
    file, losses = fit_dynamics(trained, steps=30)
    objective_after = trained.built.objective.state_dict()
    assert all(torch.equal(value, objective_after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in trained.built.objective.model.parameters())
    assert all(torch.equal(value, weights(path)[name]) for name, value in on_disk.items())
    model = {id(parameter) for parameter in trained.built.objective.parameters()}
    assert len(fitted) == 4  # three matrices and the gain of the norm
    assert not model & {id(parameter) for parameter in fitted}
    assert len(losses) == 30
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert file == posthoc_path(path)


def test_the_file_holds_what_was_fitted(trained_paths: dict[str, Path]) -> None:
    path = trained_paths["gpt"]
    file, losses = fit_dynamics(load_run(path), steps=5, hidden_dim=24)
    assert {name: tuple(value.shape) for name, value in load_file(file).items()} == {
        "norm.weight": (32,),
        "layer_1.weight": (24, 32),
        "layer_2.weight": (24, 24),
        "layer_3.weight": (16, 24),
    }
    dynamics = posthoc_dynamics(load_run(path))
    assert all(torch.equal(value, load_file(file)[name]) for name, value in dynamics.state_dict().items())
    fit = json.loads(file.with_name("fit.json").read_text())
    assert fit == {"steps": 5, "horizon": 2, "kl_weight": 0.0, "model_step": 20, "loss": losses[-1]}
    assert files_below(file.parent) == ["dynamics.safetensors", "fit.json"]


def test_by_default_the_fit_takes_two_fifths_of_the_steps_at_the_configured_width(
    trained_paths: dict[str, Path],
) -> None:
    file, losses = fit_dynamics(load_run(trained_paths["nextlat"]))
    assert len(losses) == 8
    assert load_file(file)["layer_1.weight"].shape == (16, 32)


def test_fitting_twice_gives_the_same_network_and_the_kl_term_another(trained_paths: dict[str, Path]) -> None:
    path = trained_paths["nextlat"]
    found = [load_file(fit_dynamics(load_run(path), steps=4, kl_weight=w)[0])["layer_1.weight"] for w in (0, 0, 1.0)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("objective", ["gpt", "nextlat"])
def test_rollout_with_the_posthoc_network_uses_it_and_nothing_else(
    objective: str, trained_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained_paths[objective]
    fit_dynamics(load_run(path), steps=3)
    trained = load_run(path)
    metrics = evaluate_run(trained, ["rollout"], dynamics="posthoc")["rollout"]
    used: list[Any] = []
    monkeypatch.setattr(module, "find_evaluation", lambda name: lambda subject: used.append(subject.dynamics) or {})
    evaluate_run(trained, ["rollout"], dynamics="posthoc")
    assert torch.equal(used[0].layer_1.weight, load_file(posthoc_path(path))["layer_1.weight"])
    monkeypatch.undo()
    written = json.loads((path / "evaluations" / "rollout-posthoc.json").read_text())
    assert written["metrics"] == {}
    evaluate_run(trained, ["rollout"], dynamics="posthoc")
    written = json.loads((path / "evaluations" / "rollout-posthoc.json").read_text())
    assert written["metrics"]["kl_1"]["value"] == metrics["kl_1"].value
    if objective == "nextlat":
        own = evaluate_run(trained, ["rollout"])["rollout"]
        assert own["transition_error_1"].value != metrics["transition_error_1"].value
    else:
        with pytest.raises(NextLatError, match="fit-dynamics"):
            evaluate_run(trained, ["rollout"])
