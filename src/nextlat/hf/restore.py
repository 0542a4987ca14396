"""An exported folder as a run directory again."""

from __future__ import annotations

import shutil
from pathlib import Path

from nextlat.config import resolve
from nextlat.data.manifest import TOKENIZER
from nextlat.errors import NextLatError
from nextlat.files import explained, write_json
from nextlat.hf.dynamics import load_dynamics
from nextlat.hf.export import RECORD
from nextlat.hf.llama import load_llama, read_json
from nextlat.training.build import build
from nextlat.training.checkpoint import save_checkpoint
from nextlat.training.run import RunDirectory


def import_run(folder: Path, runs_dir: Path, name: str | None = None) -> Path:
    """Make a run directory that can be evaluated and generated from; it has no optimiser state to train on with.

    Args:
        folder: what ``nextlat export`` wrote.
        runs_dir: folder of the run directories.
        name: of the new run; by default the exported run's.

    Returns:
        The run directory.

    Raises:
        NextLatError: a folder without the record of a run, an export that left something out, or a run directory
            that exists.
    """
    if not (folder / RECORD).is_file():
        load_llama(folder)  # says what is wrong with a folder that is no model at all
        raise NextLatError(
            f"{folder} has no {RECORD}, which names the task that a run needs; a Llama that nextlat did not export is "
            "read by nextlat.hf.load_llama(folder), or trained where it is with nextlat.NextLat(model, ...)"
        )
    facts = read_json(folder / RECORD)
    config = resolve(facts["config"])
    if name is not None:
        config = resolve({**facts["config"], "name": name})
    if not facts["complete"]:
        raise NextLatError(
            f"{folder} is the plain model of a run of {config.objective}, without the networks beside it; "
            "read it with nextlat.hf.load_llama(folder)"
        )
    built = build(config)
    built.objective.model.load_state_dict(load_llama(folder).state_dict())
    dynamics = built.objective.latent_dynamics()
    if dynamics is not None:
        dynamics.load_state_dict(load_dynamics(folder).state_dict())
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
            (run.path / "evaluations").mkdir()
        for label, content in facts["evaluations"].items():
            write_json(run.path / "evaluations" / f"{Path(label).name}.json", content)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    finally:
        run.close()
    return run.path
