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
from torch import Tensor

from nextlat.batch import Batch
from nextlat.decoding import generate
from nextlat.errors import NextLatError, unknown
from nextlat.files import explained, write_json, write_text
from nextlat.hf.adapter import HFModel
from nextlat.hf.card import model_card
from nextlat.hf.dynamics import save_dynamics
from nextlat.hf.llama import DTYPES, WEIGHTS, llama_config, llama_weights
from nextlat.hf.tokenizer import task_tokenizer, write_tokenizer
from nextlat.model import Transformer
from nextlat.training.environment import commit
from nextlat.training.trained import Trained, load_run

RECORD = "nextlat.json"
TOLERANCE = 1e-5
"""Largest difference of logits in fp32, relative to the largest logit where that is above 1."""
_ROWS, _LONGEST, _NEW = 4, 256, 16


class Exported(NamedTuple):
    """What an export left."""

    folder: Path
    difference: float
    """Largest difference found between logits of the run and of the folder, in fp32."""
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
        difference = verify(aside, trunk, trained)
        write_text(aside / "README.md", model_card(trained, record(trained, dtype), difference))
    return Exported(folder, difference, task_tokenizer(trained.built.task) is not None)


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
        "format": 1,
        "config": trained.config.plain(),
        "step": trained.step,
        "dtype": dtype,
        "complete": trained.built.objective.auxiliary() is trained.built.objective.latent_dynamics(),
        "environment": json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {},
        "evaluations": evaluations(trained),
        "exported_by": commit(),
    }


def evaluations(trained: Trained) -> dict[str, Any]:
    """Measurements of the exported step, by file name."""
    found = {}
    for file in sorted((trained.path / "evaluations").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("step") == trained.step:
            found[file.stem] = content
    return found


def verify(folder: Path, trunk: Transformer, trained: Trained) -> float:
    """Compare the folder, loaded by transformers alone, with our own model.

    Logits of random, real and packed rows agree, and so does the greedy continuation of prompts.

    Returns:
        the largest difference of logits.
    """
    from transformers import LlamaForCausalLM

    stock: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    stock.eval()
    ours = llama_weights(trunk)
    theirs = stock.state_dict()
    wrong = [name for name, value in ours.items() if name not in theirs or not torch.equal(value, theirs[name])]
    if wrong:
        raise NextLatError(f"transformers loads {wrong[0]} with other values than were written; this is a bug")
    adapter = HFModel(stock)
    worst = 0.0
    for kind, rows in _rows(trained, trunk.vocab_size).items():
        with torch.no_grad():
            expected = trunk(rows.tokens, rows.documents).logits
            found = adapter(rows.tokens, rows.documents).logits
        if rows.documents is not None:
            expected, found = expected[rows.documents >= 0], found[rows.documents >= 0]
        difference = float((expected - found).abs().max())
        limit = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not difference <= limit:
            raise NextLatError(
                f"logits of {kind} rows differ by {difference:.3g} between the run and its export, more than "
                f"{limit:.3g}; nothing was exported"
            )
        worst = max(worst, difference)
    if trained.built.task.next_token:
        _compare_greedy(stock, trunk, _rows(trained, trunk.vocab_size)["real"].tokens)
    return worst


def _rows(trained: Trained, vocab_size: int) -> dict[str, Batch]:
    """Rows to compare on: random, packed, and the first held-out ones."""
    task = trained.built.task
    length = min(task.sequence_length, _LONGEST)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (_ROWS, length), generator=generator)
    bounds = torch.rand(_ROWS, length, generator=generator) < 3 / length
    real = next(iter(task.evaluation(trained.config.evaluation.split))).rows(0, _ROWS)
    documents = None if real.documents is None else real.documents[:, :length]
    return {
        "random": Batch(tokens, tokens),
        "packed": Batch(tokens, tokens, bounds.cumsum(1)),
        "real": Batch(real.tokens[:, :length], real.targets[:, :length], documents),
    }


def _compare_greedy(stock: Any, trunk: Transformer, tokens: Tensor) -> None:
    """Greedy continuations are equal, up to the first place where two tokens are tied within rounding."""
    prompts = tokens[:, : max(1, tokens.shape[1] // 2)]
    new = min(_NEW, max(1, tokens.shape[1] - prompts.shape[1]))
    ours = generate(trunk, prompts, new)
    with torch.no_grad():
        theirs = stock.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, prompts.shape[1] :]
    for row in (ours != theirs).any(1).nonzero()[:, 0].tolist():
        place = int((ours[row] != theirs[row]).nonzero()[0])
        with torch.no_grad():
            logits = trunk(torch.cat([prompts[row], ours[row, :place]])[None]).logits[0, -1]
        lead = float(logits[ours[row, place]] - logits[theirs[row, place]])
        if not lead <= 2 * TOLERANCE * max(1.0, float(logits.abs().max())):
            raise NextLatError(
                f"the greedy continuation of prompt {row} differs at token {place + 1} between the run and its export; "
                "nothing was exported"
            )
