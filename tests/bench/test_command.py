"""``nextlat bench`` at sizes whose figures mean nothing: every line is there, and the file says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nextlat.bench import SUITES, train
from nextlat.bench.results import Result
from nextlat.cli import app
from nextlat.errors import NextLatError

LINES = {
    "loss": [
        "tensor memory: materialised / ours",
        "tensor memory: recomputed / ours",
        "tensor memory, head frozen: materialised / ours",
        "tensor memory: ours at horizon 8 / at horizon 1",
        "loss time: materialised / ours",
        "loss time: recomputed / ours",
        "gradient error of ours, relative to float64",
    ],
    "attention": [
        "attention, ragged: dense mask / ours",
        "attention, ragged: the same with mask and layout made",
        "attention, ragged: largest difference of outputs",
        "attention, equal: dense mask / ours",
        "train step, ragged: dense mask / ours",
    ],
    "train": [
        "train step: nextlat / gpt",
        "tokens/s: ours / bare Llama",
        "tokens/s: ours / Hugging Face Llama",
        "tokens/s: ours / nanoGPT-shaped",
        "bst step: loop over sequences / ours",
        "bst step: difference of the losses",
    ],
    "decode": [
        "generation: whole text again / cached",
        "draft step / cached step",
        "verifying 4 positions / one",
        "decoding, acceptance 0.8: plain / drafted",
        "share of the bound reached, acceptance 0.95",
        "8 rows, acceptance 0.8: plain / drafted",
        "acceptance from which drafts pay",
        "adaptive, fitted head / best fixed length: least",
        "tokens kept of 4: int8 / all tokens",
    ],
}


@pytest.mark.parametrize("suite", list(SUITES))
def test_the_command_prints_every_figure_with_target_and_setting_and_writes_them(suite: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    said = CliRunner().invoke(app, ["bench", suite, "--tiny", "--json", str(file)])
    assert said.exit_code == 0, said.exception
    written = json.loads(file.read_text(encoding="utf-8"))
    assert list(written["results"]) == [suite]
    figures = written["results"][suite]
    for name in LINES[suite]:
        assert name in said.output
        assert any(figure["name"] == name for figure in figures)
    for figure in figures:
        assert figure["setting"]
        assert figure["value"] is not None or "not measured" in figure["note"]
    assert {"hardware", "threads", "torch", "effort", "commit"} <= written["machine"].keys()
    assert written["machine"]["threads"] == 1
    assert "threads 1, torch" in said.output


def test_targets_of_the_loss_are_those_of_its_horizon(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    CliRunner().invoke(app, ["bench", "loss", "--tiny", "--json", str(file)])
    figures = json.loads(file.read_text(encoding="utf-8"))["results"]["loss"]
    targets = {
        f["setting"]["horizon"]: f["target"] for f in figures if f["name"] == "tensor memory: materialised / ours"
    }
    assert targets == {1: 10.0, 8: 25.0}


def test_a_missing_package_is_a_line_with_its_reason_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'transformers'")

    entry = (absent, *train.LOOPS["Hugging Face Llama"][1:])
    monkeypatch.setitem(train.LOOPS, "Hugging Face Llama", entry)  # type: ignore[arg-type]
    results: dict[str, Result] = {r.name: r for r in train.loops(train.TINY, 1)}
    line = results["tokens/s: ours / Hugging Face Llama"]
    assert line.value is None
    assert line.met is None
    assert "No module named 'transformers'" in line.note
    assert 'pip install "nextlat[hf]"' in line.note
    assert results["tokens/s: ours / bare Llama"].value is not None


def test_an_unknown_suite_names_the_nearest() -> None:
    said = CliRunner().invoke(app, ["bench", "los"])
    assert isinstance(said.exception, NextLatError)
    assert "did you mean 'loss'?" in str(said.exception)


def test_a_folder_that_is_not_there_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["bench", "loss", "--json", str(tmp_path / "none" / "bench.json")])
    assert isinstance(said.exception, NextLatError)
    assert "does not exist" in str(said.exception)
