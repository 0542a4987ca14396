"""Runs to export, and what tests of the evaluation harness share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nextlat import tasks
from tests.hf.models import TextTask, text_config
from tests.tiny import run_whole, tiny


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached in the test's folder, and nothing is fetched."""
    pytest.importorskip("lm_eval", reason='needs pip install "nextlat[harness]"')
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def text_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains a tiny run of an objective on a task of text."""

    def made(objective: str, *overrides: str, task: Any = TextTask) -> Path:
        monkeypatch.setitem(tasks.TASKS, "text", task)
        return run_whole(text_config(f"objective={objective}", "training.steps=20", *overrides), tmp_path / objective)

    return made


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained runs of all objectives on Path-Star; not to be changed."""
    folder = tmp_path_factory.mktemp("kept")
    names = ("gpt", "nextlat", "mtp", "jtp", "bst")
    return {name: run_whole(tiny(name, name=name), folder) for name in names}


@pytest.fixture(scope="session")
def trained_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text that has learned some of it, tied."""
    options = ("objective.horizon=2", "objective.dynamics.hidden_dim=16", "model.tie_embeddings=true")
    options += ("model.width=32", "objective.latent_weight=0.01", "objective.kl_weight=0.01")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "text", TextTask)
        config = text_config(*options, "training.steps=100", "training.learning_rate=0.02")
        return run_whole(config, tmp_path_factory.mktemp("text"))


@pytest.fixture
def copied_text(trained_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, with its task registered."""
    monkeypatch.setitem(tasks.TASKS, "text", TextTask)
    return Path(shutil.copytree(trained_text, tmp_path / "runs" / "text"))
