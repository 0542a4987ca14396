"""Settings shared by all tests: one thread, and property tests that draw the same examples every time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "nextlat",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nextlat")


@pytest.fixture(autouse=True)
def _torch_settings() -> Iterator[None]:
    """Runs may ask for threads and determinism; the next test starts from the usual settings."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(1)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An empty folder for run directories."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder
