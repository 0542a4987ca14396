"""An exported folder as a run directory again."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from nextlat.config import resolve
from nextlat.data.manifest import TOKENIZER
from nextlat.errors import NextLatError
from nextlat.files import explained, write_json
from nextlat.hf.dynamics import load_dynamics
from nextlat.hf.export import RECORD
from nextlat.hf.llama import is_tied, load_llama, read_facts
from nextlat.model import Transformer
from nextlat.training.build import build
from nextlat.training.checkpoint import save_checkpoint
from nextlat.training.run import RunDirectory

_RECORDED = {
    "config": dict,
    "step": int,
    "dtype": str,
    "complete": bool,
    "environment": dict,
    "evaluations": dict,
}


def import_run(folder: Path, runs_dir: Path, name: str | None = None) -> Path:
    """Make a run directory that can be evaluated and generated from; it has no optimiser state to train on with.

    Measurements that were made before the weights were rounded are not those of the new run: they are kept in
    ``evaluations-float32``, where nothing takes them for its own.

    Args:
        folder: what ``nextlat export`` wrote.
        runs_dir: folder of the run directories.
        name: of the new run; by default the exported run's.

    Returns:
        The run directory.

    Raises:
        NextLatError: a folder without the record of a run, a record of another format or one that the weights do
            not fit, an export that left something out, or a run directory that exists.
    """
    if not (folder / RECORD).is_file():
        load_llama(folder)  # says what is wrong with a folder that is no model at all
        raise NextLatError(
            f"{folder} has no {RECORD}, which names the task that a run needs; a Llama that nextlat did not export is "
            "read by nextlat.hf.load_llama(folder), or trained where it is with nextlat.NextLat(model, ...)"
        )
    facts = read_facts(folder / RECORD, _RECORDED)
    config = resolve(facts["config"])
    if name is not None:
        config = resolve({**facts["config"], "name": name})
    if not facts["complete"]:
        raise NextLatError(
            f"{folder} is the plain model of a run of {config.objective}, without the networks beside it; "
            "read it with nextlat.hf.load_llama(folder)"
        )
    built = build(config)
    _load(folder, built.objective.model, load_llama(folder))
    dynamics = built.objective.latent_dynamics()
    if dynamics is not None:
        _load(folder, dynamics, load_dynamics(folder))
    run = RunDirectory.create(config, runs_dir, {})
    try:
        write_json(
            run.path / "environment.json",
            {**facts["environment"], "imported_from": str(folder.resolve()), "exported_dtype": facts["dtype"]},
        )
        save_checkpoint(run.checkpoints, facts["step"], built.objective, {})
        with explained("writing", run.path):
            if (folder / TOKENIZER).is_file():
                shutil.copyfile(folder / TOKENIZER, run.path / TOKENIZER)
            measured = run.path / ("evaluations" if facts["dtype"] == "float32" else "evaluations-float32")
            measured.mkdir()
        for label, content in facts["evaluations"].items():
            write_json(measured / f"{Path(label).name}.json", content)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    finally:
        run.close()
    return run.path


def _load(folder: Path, network: nn.Module, stored: nn.Module) -> None:
    """Take over the weights of a network, if it is the one that the configuration asks for."""
    asked, found = _shape(network), _shape(stored)
    for name in [*asked, *(found.keys() - asked.keys())]:
        if asked.get(name) != found.get(name):
            raise NextLatError(
                f"{name} is {found.get(name, 'not there')} in {folder}, and the configuration in its {RECORD} asks for "
                f"{asked.get(name, 'none')}; one of the files was changed, export the run again"
            )
    network.load_state_dict(stored.state_dict())


def _shape(network: nn.Module) -> dict[str, object]:
    """What must agree so that the same weights mean the same."""
    own: dict[str, object] = {"network": type(network).__name__}
    if isinstance(network, Transformer):
        own |= {"n_heads": network.n_heads, "tie_embeddings": is_tied(network)}
    return own | {name: tuple(value.shape) for name, value in network.state_dict().items()}
