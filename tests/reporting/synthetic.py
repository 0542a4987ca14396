"""Run directories made of arithmetic, in the format that training writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

EVALUATE_EVERY = 20
ITEMS = 2000
LENGTH = 5


def write_run(
    folder: Path,
    objective: str = "nextlat",
    seed: int = 0,
    accuracy: float | None = 0.99,
    *,
    name: str | None = None,
    steps: int = 200,
    done: int | None = None,
    chance: float = 0.5,
    torn: bool = False,
    evaluated: bool | None = None,
    overrides: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
) -> Path:
    """Write a run whose whole-path accuracy rises from 0 over chance to ``accuracy``.

    Args:
        done: steps in the log, when fewer than planned; such a run has no evaluations.
        torn: the last line of the log breaks off.
        overrides: dotted configuration keys.
        environment: more of the environment.
    """
    name = name or f"path_star-mini-{objective}-s{seed}"
    path = folder / name
    (path / "evaluations").mkdir(parents=True)
    config: dict[str, Any] = {
        "task": "path_star",
        "objective": objective,
        "seed": seed,
        "name": name,
        "model": {"n_layers": 4, "n_heads": 4, "width": 64},
        "objectives": {"gpt": {}, "nextlat": {"horizon": 2, "latent_weight": 1.0, "dynamics": {"hidden_dim": 64}}},
        "data": {"degree": 2, "length": LENGTH},
        "training": {"steps": steps, "learning_rate": 0.001, "threads": seed + 1},
    }
    for key, value in (overrides or {}).items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    facts = {"nextlat": "0.1.0", "commit": "abcdef123456", "torch": "2.13.0", "hardware": "x86, 2 cores",
             "started": f"2026-01-0{seed % 9 + 1}T00:00:00+00:00", "chance": chance}  # fmt: skip
    (path / "environment.json").write_text(json.dumps(facts | (environment or {})))
    last = steps if done is None else done
    _write_log(path / "metrics.csv", config, last, accuracy, chance, torn)
    if done is None if evaluated is None else evaluated:
        metrics = _evaluation(accuracy or 0.0, chance)
        content = {"metrics": metrics, "seed": seed, "step": last, "commit": "abcdef123456"}
        (path / "evaluations" / "accuracy.json").write_text(json.dumps(content))
    return path


def _write_log(
    path: Path, config: dict[str, Any], last: int, accuracy: float | None, chance: float, torn: bool
) -> None:
    steps, seed = config["training"]["steps"], config["seed"]
    noise = np.random.default_rng(seed)
    nextlat = config["objective"] == "nextlat"
    terms = ["ce", "latent_1", "latent_2", "kl_1", "kl_2", "latent", "kl"] if nextlat else ["ce"]
    columns = ["step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds", *terms, "ce.share"]
    columns += ["eval.whole_path_greedy", "eval.token_2", "eval.basin"]
    health = ["health.rms", "health.grad_norm.ce"]
    health += ["health.transition_error_1", "health.transition_error_2", "health.cosine.kl"] if nextlat else []
    columns += health
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for step in range(1, last + 1):
            part = step / steps
            ce = 3 * np.exp(-6 * part) + 0.05 + (0.0 if (accuracy or 0) > 0.9 else 0.12)
            values = {term: 2.5 * np.exp(-5 * part) + 0.02 for term in terms} | {"ce": ce}
            row = {term: repr(float(value * np.exp(0.15 * noise.standard_normal()))) for term, value in values.items()}
            row |= {"step": str(step), "loss": row["ce"], "ce.share": "0.5", "learning_rate": "0.001"}
            row |= {"grad_norm": "1.0", "tokens_per_second": "9000", "seconds": f"{0.25 * step}"}
            if step % EVALUATE_EVERY == 0 and accuracy is not None:
                reached = accuracy_at(part, accuracy, chance, seed)
                row |= {"eval.whole_path_greedy": repr(reached), "eval.token_2": repr(reached), "eval.basin": "partial"}
                row |= {name: repr(step + place) for place, name in enumerate(health)}
            writer.writerow(row)
        if torn:
            file.write(f"{last + 1},0.0123,0.0")


def accuracy_at(part: float, accuracy: float, chance: float, seed: int) -> float:
    """First the shortcut is learned, then, if at all, the choice."""
    turn = 0.4 + 0.07 * (seed % 5)
    late = 1 / (1 + np.exp(-(part - turn) * 40))
    value = chance * (1 - np.exp(-14 * part)) * (1 - late) + accuracy * late
    return round(ITEMS * float(accuracy if part == 1 else value)) / ITEMS


def _evaluation(accuracy: float, chance: float) -> dict[str, Any]:
    def rate(value: float, level: float | None = None) -> dict[str, Any]:
        half = 1.96 * np.sqrt(value * (1 - value) / ITEMS) + 0.001
        ends = {"low": max(0.0, value - half), "high": min(1.0, value + half)}
        return {"value": value, **ends, "n": ITEMS, "chance": level}

    solved = accuracy >= 0.9
    metrics = {"whole_path_greedy": rate(accuracy, chance), "whole_path_sampled": rate(accuracy - 0.005, chance)}
    metrics["forced_whole_path"] = rate(accuracy, chance)
    for place in range(1, LENGTH + 1):
        level = chance if place == 2 else None
        metrics[f"token_{place}"] = rate(1.0 if place == 1 else accuracy, level)
        metrics[f"forced_token_{place}"] = rate(accuracy if place == 2 else 1.0, level)
    metrics["branch_margin"] = {"value": 0.3123456, "low": 0.28, "high": 0.34, "n": ITEMS, "chance": None}
    metrics["basin"] = {
        "value": "solved" if solved else "shortcut",
        "low": None,
        "high": None,
        "n": None,
        "chance": None,
    }
    return metrics
