"""Runs on text from end to end: resumed on the next token, measured by default, exported, brought back elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nextlat.batch import Batch
from nextlat.cli import app
from nextlat.config import Config, load_config
from nextlat.data.rows import TokenRows
from tests.tiny import assert_same_weights, go_on, run_whole

pytest.importorskip("tokenizers")

STEPS, ROWS = 6, 8
SMALL = [
    *("data.stories=8", "data.validation_stories=10", "data.length=64", "data.vocab_size=300"),
    *("model.width=16", "model.n_layers=1", "model.n_heads=2", "objective.dynamics.hidden_dim=16"),
    *(f"training.steps={STEPS}", f"training.batch_size={ROWS}", "training.warmup_steps=2"),
    *("training.evaluate_every=null", "evaluation.after=[]", "evaluation.health=false"),
]


def config(name: str) -> Config:
    return load_config("tiny_stories/mini", [*SMALL, f"name={name}"])


def call(*words: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output or str(result.exception)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_stopped_in_an_epoch_goes_on_with_its_next_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Batch] = []
    batch = TokenRows.batch

    def remembered(rows: TokenRows, first: int, last: int) -> Batch:
        if rows.seed is not None:
            read.append(batch(rows, first, last))
        return batch(rows, first, last)

    monkeypatch.setattr(TokenRows, "batch", remembered)
    straight = run_whole(config("straight"), home)
    expected = torch.cat([rows.tokens for rows in read])
    assert len(expected) == STEPS * ROWS
    read.clear()
    broken = run_whole(config("broken"), home, stop_after=2)
    assert go_on(broken).step == STEPS
    assert torch.equal(torch.cat([rows.tokens for rows in read]), expected)
    assert_same_weights(broken, straight)
    each = {tuple(row) for row in expected.tolist()}
    assert 2 * ROWS < len(each) < STEPS * ROWS, "the stop should lie in the first of several epochs"


def test_a_run_does_not_go_on_with_other_data(home: Path) -> None:
    call("train", "tiny_stories/mini", *SMALL, "name=run", "--stop-after", "2")
    (folder,) = (home / "data").iterdir()
    shutil.rmtree(folder)
    call("train", "--resume", "runs/run")  # the stories are made again
    assert (home / "runs/run/checkpoints/step_000000006").is_dir()
    record = home / "runs/run/environment.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({**facts, "data_sha256": "other"}))
    assert "are not those it began with (data_sha256 was other" in call("train", "--resume", "runs/run", code=1)


def test_a_run_is_measured_exported_and_brought_back_where_its_data_are_not(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    run = run_whole(config("run"), home / "runs")
    assert call("evaluate", run).startswith("cross_entropy of")
    asked = ("--prompt", "Once there was", "--max-new-tokens", "6")
    said = call("generate", run, *asked)
    call("export", run, "exported")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("exported"), AutoTokenizer.from_pretrained("exported")
    ids = tokenizer(tokenizer.bos_token + "Once there was", return_tensors="pt").input_ids
    assert ids[0, 0] == 1
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)[0, ids.shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) + "\n" == said
    shown = Path("exported/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(shown.replace("PATH", "exported").replace('"Once"', '"Once there was"').replace("50", "6"), {})
    assert said.strip() in capsys.readouterr().out
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    call("import", home / "exported", "--name", "again")
    assert call("generate", "runs/again", *asked) == said
    assert not Path("data").exists()
