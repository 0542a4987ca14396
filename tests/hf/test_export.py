"""Exported runs: stock folders that need none of our code, equal to the run bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from nextlat import NextLatError, generate
from nextlat.data.tokenizer import Tokenizer
from nextlat.hf import load_dynamics, load_llama
from nextlat.hf.export import export_run
from nextlat.hf.tokenizer import write_tokenizer
from nextlat.training.checkpoint import newest
from nextlat.training.trained import load_run
from tests.hf.calls import call, run
from tests.hf.models import TextTask, same_llama, trunk
from tests.tiny import files_below

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


def test_an_export_loads_where_nextlat_is_not_installed_and_says_the_same(copied_text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert "differ from the run's by at most" in run("export", copied_text, folder)
    prompt = "the cat sat"
    said = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US, str(folder), prompt],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    ours = run("generate", copied_text, "--prompt", prompt, "--max-new-tokens", "12")
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
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    ends = {"eos_token_id": trained.built.task.end_token, "pad_token_id": trained.built.task.end_token}
    assert generation == {**ends, "do_sample": False, "use_cache": True}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "float32"  # older loaders read the first
    assert json.loads((tmp_path / "out/nextlat_dynamics.json").read_text())["horizon"] == 2
    dynamics = load_dynamics(tmp_path / "out")
    assert dynamics.state_dict().keys() == trained.built.objective.latent_dynamics().state_dict().keys()


def test_a_tied_export_has_no_head_of_its_own(copied_text: Path, tmp_path: Path) -> None:
    export_run(copied_text, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Ends(LogitsProcessor):
    """The first row says the end token as its third; the others never do."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 256] = -torch.inf
        if tokens.shape[1] == self.prompt + 2:
            scores[0, 256] = torch.inf
        return scores


def test_generation_of_an_export_stops_at_the_end_token_and_fills_up_with_it(copied_text: Path, tmp_path: Path) -> None:
    export_run(copied_text, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.bos_token_id == 256
    prompts = torch.tensor([[256, 116, 104, 101], [256, 99, 97, 116]])
    said = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, logits_processor=[Ends(4)]
    )[:, 4:]
    assert said[0, 2:].tolist() == [256] * 4
    assert not (said[1] == 256).any()


def test_tokens_inside_words_that_carry_a_prefix_are_read_right_in_an_exported_folder(tmp_path: Path) -> None:
    letters = "abĠ"
    vocabulary = {name: place for place, name in enumerate(["<|eos|>", *letters, *(f"##{c}" for c in letters)])}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], continuing_subword_prefix="##"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens(["<|eos|>"])
    own = Tokenizer(engine, "<|eos|>")
    write_tokenizer(own, tmp_path, 24)
    assert AutoTokenizer.from_pretrained(tmp_path).decode(own.encode("ab ba")) == "ab ba"


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


def test_bf16_exports_round_weights_and_nothing_else(kept: dict[str, Path], tmp_path: Path) -> None:
    run("export", kept["nextlat"], tmp_path / "out", "--dtype", "bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    own = load_file(newest(kept["nextlat"]) / "model.safetensors")
    for name, value in own.items():
        assert torch.equal(stored[name if name == "lm_head.weight" else f"model.{name}"], value.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16
    assert {value.dtype for value in load_dynamics(tmp_path / "out").state_dict().values()} == {torch.bfloat16}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


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
    with pytest.raises(NextLatError, match=part):
        load_llama(tmp_path)


def test_a_tied_stock_llama_loads_tied(tmp_path: Path) -> None:
    own = trunk(tie=True)
    same_llama(own).save_pretrained(tmp_path)
    loaded = load_llama(tmp_path)
    assert loaded.head_weight is loaded.embedding_weight
    tokens = torch.arange(8)[None]
    assert torch.equal(generate(loaded, tokens, 5), generate(own, tokens, 5))


def test_llamas_with_further_weights_are_refused(tmp_path: Path) -> None:
    same_llama(trunk()).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, "model.layers.0.mlp.gate_proj.bias": torch.ones(128)}, tmp_path / "model.safetensors")
    with pytest.raises(NextLatError, match=r"holds model\.layers\.0\.mlp\.gate_proj\.bias"):
        load_llama(tmp_path)


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
