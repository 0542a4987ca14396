"""Checkpoints: written aside, synced, renamed; verified before they are loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from nextlat.errors import NextLatError
from nextlat.files import explained, sync_folder, write_json
from nextlat.objectives import Objective

FORMAT = 1


def checkpoint_name(step: int) -> str:
    """``step_000001000``; names sort by step."""
    return f"step_{step:09d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a ``checkpoints`` folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def save_checkpoint(folder: Path, step: int, objective: Objective, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint so that it appears whole or not at all.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: optimiser updates made so far.
        objective: ``model.safetensors`` takes the plain model, ``objective.safetensors`` what lies beside it.
        state: tensors and plain values for ``state.pt``.

    Returns:
        The folder of the checkpoint.
    """
    final = folder / checkpoint_name(step)
    aside = folder / f".writing-{final.name}"
    with explained("writing checkpoint", final):
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_model(objective.model, str(aside / "model.safetensors"))
            auxiliary = objective.auxiliary()
            if auxiliary is not None:
                save_model(auxiliary, str(aside / "objective.safetensors"))
            torch.save(dict(state), aside / "state.pt")
            files = {path.name: _describe(path) for path in sorted(aside.iterdir())}
            write_json(aside / "manifest.json", {"format": FORMAT, "step": step, "files": files})
            sync_folder(aside)
            if final.exists():
                discard(final)
            os.rename(aside, final)
            sync_folder(folder)
        except (SafetensorError, RuntimeError) as error:  # what safetensors and torch.save make of a failed write
            shutil.rmtree(aside, ignore_errors=True)
            raise NextLatError(
                f"writing checkpoint {final} failed ({error}); if the disk is full, free some space and resume"
            ) from error
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return final


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; an interruption never leaves half of one under its name."""
    doomed = checkpoint.with_name(f".discarded-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def clean(folder: Path) -> None:
    """Remove what a killed process left unfinished."""
    for pattern in (".writing-*", ".discarded-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest, after every file's size and sha256 were compared with it.

    Raises:
        NextLatError: something is missing, truncated or altered.
    """
    fix = f"delete {checkpoint} to fall back to an older checkpoint, or train again"
    manifest_path = checkpoint / "manifest.json"
    if not manifest_path.is_file():
        raise NextLatError(f"checkpoint {checkpoint} has no manifest.json; {fix}")
    try:
        manifest: dict[str, Any] = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError):
        raise NextLatError(f"{manifest_path} is damaged; {fix}") from None
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise NextLatError(f"checkpoint {checkpoint} lacks {name}; {fix}")
        if path.stat().st_size != expected["bytes"]:
            raise NextLatError(
                f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}: it is truncated; {fix}"
            )
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise NextLatError(f"{path} does not match its checksum; {fix}")
    return manifest


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise NextLatError(f"{run} has no checkpoint; train it first, or start it anew under another name")
    return found[-1]


def load_weights(checkpoint: Path, objective: Objective) -> int:
    """Load the networks of a verified checkpoint; returns its step."""
    step = int(verify(checkpoint)["step"])
    try:
        load_model(objective.model, checkpoint / "model.safetensors")
        auxiliary = objective.auxiliary()
        if auxiliary is not None:
            load_model(auxiliary, checkpoint / "objective.safetensors")
    except (RuntimeError, FileNotFoundError) as error:
        raise NextLatError(f"checkpoint {checkpoint} does not fit the configuration: {error}") from None
    return step


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The training state beside the weights."""
    state: dict[str, Any] = torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu")
    if not state:
        raise NextLatError(f"{checkpoint} was imported without an optimiser's state; it can be measured, not resumed")
    return state
