"""Runs made before and after an option was added to the library."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from nextlat.config import load_config
from nextlat.reporting.groups import group_runs
from nextlat.reporting.runs import Run


def run(config: dict[str, Any], seed: int) -> Run:
    return Run(Path(f"runs/s{seed}"), {**config, "seed": seed}, {}, {}, {})


def older(config: dict[str, Any]) -> dict[str, Any]:
    """As it would have been written before three options existed."""
    old = copy.deepcopy(config)
    del old["training"]["optimizer"], old["evaluation"]["probes"], old["objectives"]["nextlat"]["tv_weight"]
    return old


def test_an_option_that_did_not_exist_yet_has_its_default() -> None:
    new = load_config("path_star/mini", []).plain()
    assert new["objectives"]["nextlat"]["tv_weight"] == 0.0
    groups = group_runs([run(older(new), 0), run(new, 1)])
    assert [(group.settings, len(group.runs)) for group in groups] == [("", 2)]


def test_and_another_value_of_it_is_a_setting() -> None:
    new = load_config("path_star/mini", ["objective.tv_weight=0.5", "training.optimizer=muon"]).plain()
    groups = group_runs([run(older(new), 0), run(new, 1)])
    assert sorted(group.settings for group in groups) == [
        "tv_weight=0, optimizer=adamw",
        "tv_weight=0.5, optimizer=muon",
    ]


def test_an_option_that_the_library_does_not_know_leaves_a_run_as_it_is() -> None:
    new = load_config("path_star/mini", []).plain()
    strange = copy.deepcopy(new)
    strange["training"]["warp"] = 3
    groups = group_runs([run(strange, 0), run(new, 1)])
    assert sorted(group.settings for group in groups) == ["warp=3", "warp=unset"]
