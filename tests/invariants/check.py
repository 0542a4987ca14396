"""Show that a refactor changed no bit: ``make golden-check BASE=<commit>``.

Records the golden trajectories of the commit and of this tree on this machine and compares them exactly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def record(tree: Path, file: Path) -> dict[str, dict[str, list[float]]]:
    """Trajectories of a source tree, made by its own code."""
    environment = {**os.environ, "PYTHONPATH": f"{tree / 'src'}{os.pathsep}{tree}"}
    subprocess.run([sys.executable, "-m", "tests.invariants.record", str(file)], cwd=tree, env=environment, check=True)
    trajectories: dict[str, dict[str, list[float]]] = json.loads(file.read_text(encoding="utf-8"))
    return trajectories


def main(base: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(tree), base], cwd=ROOT, check=True)
        try:
            before, after = record(tree, Path(folder) / "before.json"), record(ROOT, Path(folder) / "after.json")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    different = []
    for objective, terms in before.items():
        for name, old in terms.items():
            new = after.get(objective, {}).get(name, [])
            moved = [step for step, pair in enumerate(zip(old, new, strict=False), start=1) if pair[0] != pair[1]]
            if moved or len(old) != len(new):
                different.append(f"{objective} {name}: from step {moved[0] if moved else len(new) + 1}")
    print("\n".join(different) or f"bit-identical to {base}: {', '.join(before)}")
    return int(bool(different))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("name the commit to compare with: make golden-check BASE=<commit>")
    sys.exit(main(sys.argv[1]))
