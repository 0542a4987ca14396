"""Six synthetic runs: two objectives, three seeds, one unfinished, one with a torn log."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reporting.synthetic import write_run

GPT = (0.5025, 0.487, 0.5105)
NEXTLAT = (0.9915, 0.997, 0.9885)
ODD_NAME = 'nextlat <b>&"odd"|[red]'


@pytest.fixture
def six_runs(tmp_path: Path) -> list[Path]:
    """gpt seeds 0 to 2 (seed 1 torn), nextlat seeds 0 to 2 (seed 1 oddly named, seed 2 stopped at step 130)."""
    runs = [write_run(tmp_path / "runs", "gpt", seed, value, torn=seed == 1) for seed, value in enumerate(GPT)]
    for seed, value in enumerate(NEXTLAT):
        name = ODD_NAME if seed == 1 else None
        runs.append(write_run(tmp_path / "runs", "nextlat", seed, value, name=name, done=130 if seed == 2 else None))
    return runs
