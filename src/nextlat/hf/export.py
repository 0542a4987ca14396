"""A trained run as a stock Llama folder that every engine loads without code of ours."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from nextlat.errors import NextLatError, unknown
from nextlat.files import explained, write_json, write_text
from nextlat.hf.card import model_card
from nextlat.hf.dynamics import save_dynamics
from nextlat.hf.llama import DTYPES, FORMAT, WEIGHTS, llama_config, llama_weights
from nextlat.hf.parity import verify
from nextlat.hf.tokenizer import task_tokenizer, write_tokenizer
from nextlat.model import Transformer
from nextlat.training.environment import commit
from nextlat.training.trained import Trained, load_run

RECORD = "nextlat.json"


class Exported(NamedTuple):
    """What an export left."""

    folder: Path
    difference: float
    """Largest difference found between logits of the run and of the folder, both computed in fp32."""
    tokenizer: bool
    """Whether the folder has tokenizer files."""


def export_run(run: Path, folder: Path, checkpoint: str = "newest", dtype: str = "float32") -> Exported:
    """Write a stock ``LlamaForCausalLM`` folder, check it through transformers, and only then put it in its place.

    Args:
        run: a run directory of an objective whose decoding is the plain model.
        folder: where to; it must not exist.
        checkpoint: ``newest`` or ``best``.
        dtype: ``float32``, or ``bfloat16``, which rounds the weights.

    Raises:
        NextLatError: an objective that is no stock Llama, a folder that exists, transformers missing, or a check
            that failed; nothing is left then.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if folder.exists():
        raise NextLatError(f"{folder} exists already; choose another folder, or remove it")
    require_transformers("export")
    trained = load_run(run, "cpu", checkpoint)
    with written_aside(folder) as aside:
        trunk = exported_trunk(trained, dtype)
        write_model(trained, trunk, aside, dtype)
        parity = verify(aside, trunk, trained)
        write_text(aside / "README.md", model_card(trained, record(trained, dtype), parity))
    return Exported(folder, parity.single, task_tokenizer(trained.built.task) is not None)


def require_transformers(what: str) -> None:
    """Say which extra brings transformers, if it is missing."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise NextLatError(f'{what} needs transformers: pip install "nextlat[hf]"') from None


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder under another name, renamed when all is written; removed when something fails."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.writing")
    with explained("writing", folder):
        try:
            aside.mkdir(parents=True)
            yield aside
            os.rename(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def exported_trunk(trained: Trained, dtype: str) -> Transformer:
    """The plain model in fp32 with the values that are exported.

    Raises:
        NextLatError: the objective's next-token law is more than a stock Llama's.
    """
    objective, name = trained.built.objective, trained.config.objective
    if not objective.stock_model or not isinstance(objective.model, Transformer):
        raise NextLatError(
            f"{trained.path} was trained with {name}, whose next-token law is more than its head times a state, so "
            "no stock Llama computes it; export a run of gpt, mtp or nextlat"
        )
    trunk = objective.model
    if dtype != "float32":
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.copy_(parameter.to(DTYPES[dtype]))
    return trunk


def write_model(trained: Trained, trunk: Transformer, folder: Path, dtype: str) -> None:
    """Everything but the card."""
    task, objective = trained.built.task, trained.built.objective
    tokenizer, end = task_tokenizer(task), task.end_token
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, task.sequence_length)
    config = llama_config(trunk, task.sequence_length, end, tokenizer is not None, dtype)
    write_json(folder / "config.json", config)
    special = {"bos_token_id": config["bos_token_id"], "eos_token_id": end, "pad_token_id": end}
    special = {name: token for name, token in special.items() if token is not None}
    write_json(folder / "generation_config.json", {**special, "do_sample": False, "use_cache": True})
    weights = {name: value.to(DTYPES[dtype]) for name, value in llama_weights(trunk).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    dynamics = objective.latent_dynamics()
    if dynamics is not None:
        save_dynamics(folder, dynamics.to(DTYPES[dtype]), objective.horizon)
        dynamics.float()
    write_json(folder / RECORD, record(trained, dtype))


def record(trained: Trained, dtype: str) -> dict[str, Any]:
    """What ``nextlat import`` needs to make a run directory again."""
    environment = trained.path / "environment.json"
    return {
        "format": FORMAT,
        "config": trained.config.plain(),
        "step": trained.step,
        "dtype": dtype,
        "complete": trained.built.objective.auxiliary() is trained.built.objective.latent_dynamics(),
        "environment": json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {},
        "evaluations": evaluations(trained),
        "exported_by": commit(),
    }


def evaluations(trained: Trained) -> dict[str, Any]:
    """Measurements of the exported step, by file name; not those of a dynamics that is not in the folder."""
    found = {}
    for file in sorted((trained.path / "evaluations").glob("*.json")):
        if "posthoc" in file.stem.split("-"):
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("step") == trained.step:
            found[file.stem] = content
    return found
