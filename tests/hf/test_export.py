"""Exported runs: stock folders that need none of our code, equal to the run bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from nextlat import generate, tasks
from nextlat.cli import app
from nextlat.hf import export, load_dynamics, load_llama
from nextlat.hf.export import export_run
from nextlat.training.checkpoint import newest
from nextlat.training.trained import load_run
from tests.hf.models import TextTask, same_llama, text_config, trunk
from tests.tiny import files_below, run_whole, tiny

WITHOUT_US = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nextlat":
            raise ImportError("nextlat is not here")
sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(tokenizer.bos_token + sys.argv[2], return_tensors="pt")
new = model.generate(ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=12)
print(tokenizer.decode(new[0, ids.input_ids.shape[1]:], skip_special_tokens=True))
assert not any(name.startswith("nextlat") for name in sys.modules)
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in arguments])


def run(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained runs of all objectives on Path-Star."""
    folder = tmp_path_factory.mktemp("kept")
    names = ("gpt", "nextlat", "mtp", "jtp", "bst")
    return {name: run_whole(tiny(name, name=name), folder) for name in names}


@pytest.fixture
def text_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on text that has learned some of it, tied."""
    monkeypatch.setitem(tasks.TASKS, "text", TextTask)
    options = ("objective.horizon=2", "objective.dynamics.hidden_dim=16", "model.tie_embeddings=true")
    options += ("model.width=32", "objective.latent_weight=0.01", "objective.kl_weight=0.01")
    config = text_config(*options, "training.steps=100", "training.learning_rate=0.02")
    return run_whole(config, tmp_path / "runs")


def test_an_export_loads_where_nextlat_is_not_installed_and_says_the_same(text_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert "differ from the run's by at most" in run("export", text_run, folder)
    prompt = "the cat sat"
    said = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US, str(folder), prompt],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    ours = run("generate", text_run, "--prompt", prompt, "--max-new-tokens", "12")
    assert said.stdout == ours
    assert len(set(ours.strip())) > 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the cät").input_ids == TextTask().tokenizer.encode("the cät")
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 256


def test_files_fields_and_weights_of_an_untied_export(kept: dict[str, Path], tmp_path: Path) -> None:
    export_run(kept["nextlat"], tmp_path / "out")
    assert files_below(tmp_path / "out") == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "nextlat.json",
        "nextlat_dynamics.json",
        "nextlat_dynamics.safetensors",
    ]
    trained = load_run(kept["nextlat"], "cpu")
    config = LlamaConfig.from_pretrained(tmp_path / "out")
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (16, 128, 1)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 8)
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (False, False, False)
    assert config.hidden_act == "silu"
    assert config.max_position_embeddings == trained.built.task.sequence_length
    assert config.vocab_size == trained.built.task.vocab_size
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, trained.built.task.end_token, None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    own = load_file(newest(kept["nextlat"]) / "model.safetensors")
    assert stored.keys() == {name if name == "lm_head.weight" else f"model.{name}" for name in own}
    assert all(torch.equal(stored[n if n == "lm_head.weight" else f"model.{n}"], value) for n, value in own.items())
    dynamics = load_dynamics(tmp_path / "out")
    assert dynamics.state_dict().keys() == trained.built.objective.latent_dynamics().state_dict().keys()


def test_a_tied_export_has_no_head_of_its_own(text_run: Path, tmp_path: Path) -> None:
    export_run(text_run, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("objective", ["gpt", "mtp", "nextlat"])
def test_logits_of_the_stock_model_are_those_of_the_run(objective: str, kept: dict[str, Path], tmp_path: Path) -> None:
    assert export_run(kept[objective], tmp_path / "out").difference < 1e-5
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    lm = load_run(kept[objective], "cpu").built.objective.as_lm()
    tokens = torch.randint(stock.config.vocab_size, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, lm(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", ["jtp", "bst"])
def test_objectives_that_are_no_stock_llama_are_refused(objective: str, kept: dict[str, Path], tmp_path: Path) -> None:
    result = call("export", kept[objective], tmp_path / "out")
    assert result.exit_code == 1
    assert f"was trained with {objective}" in str(result.exception)
    assert files_below(tmp_path) == []


def test_a_folder_that_exists_is_refused(kept: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in str(call("export", kept["gpt"], tmp_path / "out").exception)
    assert files_below(tmp_path / "out") == []


def test_an_export_that_computes_something_else_is_not_left_behind(
    kept: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct = export.llama_config
    monkeypatch.setattr(export, "llama_config", lambda *a: {**correct(*a), "rms_norm_eps": 1e-2})
    result = call("export", kept["gpt"], tmp_path / "out")
    assert "rows differ by" in str(result.exception)
    monkeypatch.setattr(export, "llama_config", lambda *a: {**correct(*a), "rope_parameters": {"rope_theta": 500.0}})
    assert "rows differ by" in str(call("export", kept["gpt"], tmp_path / "out").exception)
    assert files_below(tmp_path) == []


def test_the_card_tells_numbers_origin_and_limits(kept: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "runs" / "nextlat"
    shutil.copytree(kept["nextlat"], source)
    run("evaluate", source)
    run("export", source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    measured = json.loads((source / "evaluations/accuracy.json").read_text(encoding="utf-8"))
    metric = measured["metrics"]["whole_path_greedy"]
    assert f"| accuracy | whole_path_greedy | {metric['value']:.4g} | {metric['low']:.4g} to" in card
    for part in ("seed: 0", "hardware:", "configuration hash:", "not claimed to give a better perplexity", "bare ids"):
        assert part in card


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


def test_bf16_exports_round_weights_and_nothing_else(kept: dict[str, Path], tmp_path: Path) -> None:
    run("export", kept["nextlat"], tmp_path / "out", "--dtype", "bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    own = load_file(newest(kept["nextlat"]) / "model.safetensors")
    for name, value in own.items():
        assert torch.equal(stored[name if name == "lm_head.weight" else f"model.{name}"], value.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16
    assert {value.dtype for value in load_dynamics(tmp_path / "out").state_dict().values()} == {torch.bfloat16}


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


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, not 2"),
        ({"intermediate_size": 24}, "intermediate_size is 24, not 128"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta is 500000"),
        ({"model_type": "qwen2"}, "'qwen2' model"),
    ],
)
def test_llamas_of_another_shape_are_refused(change: dict[str, object], part: str, tmp_path: Path) -> None:
    same_llama(trunk()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(Exception, match=part):
        load_llama(tmp_path)


def test_a_tied_stock_llama_loads_tied(tmp_path: Path) -> None:
    own = trunk(tie=True)
    same_llama(own).save_pretrained(tmp_path)
    loaded = load_llama(tmp_path)
    assert loaded.head_weight is loaded.embedding_weight
    tokens = torch.arange(8)[None]
    assert torch.equal(generate(loaded, tokens, 5), generate(own, tokens, 5))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "give either --prompt"),
        (("--prompt", "x", "--tokens", "1"), "give either --prompt"),
        (("--prompt", "x"), "has no tokenizer"),
        (("--tokens", "1,x"), "write ids with commas"),
        (("--tokens", "1,99999"), "names 99999"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(arguments: tuple[str, ...], part: str, kept: dict[str, Path]) -> None:
    assert part in str(call("generate", kept["gpt"], *arguments).exception)


def test_sampling_is_a_function_of_the_seed(kept: dict[str, Path]) -> None:
    def said(seed: int) -> str:
        return run("generate", kept["gpt"], "--tokens", "1,2", "--temperature", "1", "--seed", str(seed))

    assert said(1) == said(1)
    assert said(1) != said(2)
