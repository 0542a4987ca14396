"""Exported folders as runs again, and folders that were changed in between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nextlat import tasks
from nextlat.errors import NextLatError
from nextlat.hf import load_dynamics, load_llama
from nextlat.hf.export import export_run
from nextlat.hf.restore import import_run
from nextlat.training.checkpoint import newest
from tests.hf.calls import call, run
from tests.hf.models import TextTask, same_llama, trunk


@pytest.mark.parametrize("objective", ["gpt", "nextlat"])
def test_import_brings_back_every_bit_and_every_measurement(
    objective: str, kept: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(kept[objective], tmp_path / "runs" / "first"))
    run("evaluate", source)
    run("export", source, tmp_path / "out")
    run("import", tmp_path / "out", "--runs-dir", tmp_path / "runs", "--name", "again")
    again = tmp_path / "runs" / "again"
    for file in ("model.safetensors", "objective.safetensors"):
        if (newest(source) / file).exists():
            one, other = load_file(newest(source) / file), load_file(newest(again) / file)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    first = (source / "evaluations/accuracy.json").read_text(encoding="utf-8")
    assert (again / "evaluations/accuracy.json").read_text(encoding="utf-8") == first
    run("evaluate", again)
    assert json.loads((again / "evaluations/accuracy.json").read_text())["metrics"] == json.loads(first)["metrics"]
    tokens = ("--tokens", "1,2,3,4", "--max-new-tokens", "5")
    assert run("generate", source, *tokens) == run("generate", again, *tokens)
    refused = call("train", "--resume", again)
    assert "it can be measured, not resumed" in str(refused.exception)


def test_what_cannot_come_back_as_a_run_says_how_to_read_it(kept: dict[str, Path], tmp_path: Path) -> None:
    export_run(kept["mtp"], tmp_path / "mtp")
    refused = call("import", tmp_path / "mtp", "--runs-dir", tmp_path / "runs")
    assert "load_llama" in str(refused.exception)
    own = trunk()
    same_llama(own).save_pretrained(tmp_path / "foreign")
    refused = call("import", tmp_path / "foreign", "--runs-dir", tmp_path / "runs")
    assert "has no nextlat.json" in str(refused.exception)
    assert not (tmp_path / "runs").exists()
    loaded = load_llama(tmp_path / "foreign")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in own.state_dict().items())


class Elsewhere(TextTask):
    """The task on a machine without its data."""

    def __init__(self, *arguments: Any) -> None:
        pass

    @cached_property
    def tokenizer(self) -> Any:  # type: ignore[override]
        raise NextLatError("the data are not here")

    def rows(self, step: int, start: int, stop: int) -> Any:
        raise NextLatError("the data are not here")


def test_a_run_on_text_speaks_where_its_data_are_not(
    copied_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run(copied_text, tmp_path / "out")
    prompt = ("--prompt", "the cat", "--max-new-tokens", "8")
    expected = run("generate", copied_text, *prompt)
    monkeypatch.setitem(tasks.TASKS, "text", Elsewhere)
    again = import_run(tmp_path / "out", tmp_path / "elsewhere")
    assert (again / "tokenizer.json").read_bytes() == (tmp_path / "out/tokenizer.json").read_bytes()
    assert run("generate", again, *prompt) == expected


def test_measurements_of_weights_that_were_rounded_since_are_put_aside(kept: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(kept["gpt"], tmp_path / "runs" / "first"))
    run("evaluate", source)
    for dtype, folder, other in (
        ("float32", "evaluations", "evaluations-float32"),
        ("bfloat16", "evaluations-float32", "evaluations"),
    ):
        export_run(source, tmp_path / dtype, dtype=dtype)
        again = import_run(tmp_path / dtype, tmp_path / "runs", dtype)
        assert [file.name for file in (again / folder).iterdir()] == ["accuracy.json"]
        assert not (again / other).exists()
        environment = json.loads((again / "environment.json").read_text(encoding="utf-8"))
        assert environment["exported_dtype"] == dtype


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def set_model(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts["config"]["model"].update({name: value})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (set_model("width", 32), r"embed_tokens\.weight is \(\d+, 16\) in .* asks for \(\d+, 32\)"),
        (set_model("n_layers", 2), r"layers\.1\.\S+ is not there"),
        (set_model("tie_embeddings", True), "tie_embeddings is False in .* asks for True"),
        (set_model("n_heads", 4), "n_heads is 2 in .* asks for 4"),
        (lambda facts: facts["config"]["objectives"]["nextlat"]["dynamics"].update(kind="normalised"), "network is"),
        (lambda facts: facts.update(format=2), "has format 2, and this version of nextlat reads 1"),
        (lambda facts: facts.pop("format"), "has format None"),
        (lambda facts: facts.pop("step"), "has None as 'step', and it must be of type int"),
        (lambda facts: facts.update(evaluations=[]), "has \\[\\] as 'evaluations'"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_with_the_place(
    change: Callable[[dict[str, Any]], Any], part: str, kept: dict[str, Path], tmp_path: Path
) -> None:
    export_run(kept["nextlat"], tmp_path / "out")
    edit(tmp_path / "out/nextlat.json", change)
    with pytest.raises(NextLatError, match=part):
        import_run(tmp_path / "out", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda facts: facts.update(format=7), "has format 7"),
        (lambda facts: facts.pop("kind"), "has None as 'kind'"),
        (lambda facts: facts.update(width="16"), "has '16' as 'width'"),
    ],
)
def test_a_description_of_dynamics_that_cannot_be_read_is_refused(
    change: Callable[[dict[str, Any]], Any], part: str, kept: dict[str, Path], tmp_path: Path
) -> None:
    export_run(kept["nextlat"], tmp_path / "out")
    edit(tmp_path / "out/nextlat_dynamics.json", change)
    with pytest.raises(NextLatError, match=part):
        load_dynamics(tmp_path / "out")
