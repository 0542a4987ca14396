"""Twenty steps of a tiny run of every objective; record them anew with ``python -m tests.invariants.record``.

Record only in a commit that changes what is computed, and say there why the trajectories moved.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from tests.tiny import ALL, metrics, run_whole, tiny

FILE = Path(__file__).with_name("golden.json")
OPTIONS = ("training.steps=20", "training.evaluate_every=null", "training.threads=1")
KEPT = ("loss", "grad_norm")
Trajectory = dict[str, list[float]]


def trajectory(objective: str, runs_dir: Path, *more: str) -> Trajectory:
    """Loss terms and gradient norm of every step."""
    rows = metrics(run_whole(tiny(objective, *OPTIONS, *more), runs_dir))
    columns = [name for name in rows[0] if name in KEPT or f"{name}.share" in rows[0]]
    return {name: [float(row[name]) for row in rows] for name in columns}


def main(file: Path = FILE) -> None:
    """Write ``golden.json``, or another file."""
    torch.set_num_threads(1)
    golden = {}
    for objective in ALL:
        with tempfile.TemporaryDirectory() as folder:
            golden[objective] = trajectory(objective, Path(folder))
    file.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {file}: {', '.join(golden)}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
