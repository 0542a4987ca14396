"""What tests of the evaluation harness share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextlat import tasks
from tests.hf.models import TextTask, text_config
from tests.tiny import run_whole


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
