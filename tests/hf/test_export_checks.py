"""What an export must pass before it gets its name, and what is recorded in it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from nextlat import NextLatError
from nextlat.files import write_json
from nextlat.hf import export, parity
from nextlat.hf.export import export_run, exported_trunk, write_model
from nextlat.training.trained import Trained, load_run
from tests.hf.calls import call, run
from tests.hf.models import TextTask, same_llama, trunk
from tests.tiny import files_below


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


def test_a_weight_that_loads_with_another_last_bit_is_found(
    kept: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = export.save_file

    def nudged(weights: dict[str, torch.Tensor], *rest: Any, **options: Any) -> None:
        weights["model.norm.weight"][0] = torch.nextafter(weights["model.norm.weight"][0], torch.tensor(9.0))
        save(weights, *rest, **options)

    weights = export.llama_weights
    monkeypatch.setattr(export, "save_file", nudged)
    monkeypatch.setattr(export, "llama_weights", lambda model: {n: w.clone() for n, w in weights(model).items()})
    with pytest.raises(NextLatError, match=r"loads model\.norm\.weight with other values"):
        export_run(kept["gpt"], tmp_path / "out")
    assert files_below(tmp_path) == []


def test_a_continuation_that_differs_is_found(
    kept: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct = parity.generate

    def other(lm: Any, prompts: torch.Tensor, new: int) -> torch.Tensor:
        found = correct(lm, prompts, new)
        found[2, 1:] = (found[2, 1:] + 1) % lm.vocab_size
        return found

    monkeypatch.setattr(parity, "generate", other)
    with pytest.raises(NextLatError, match="continuation of prompt 2 differs at token 2"):
        export_run(kept["gpt"], tmp_path / "out")
    assert files_below(tmp_path) == []


def test_continuations_are_neither_compared_nor_claimed_where_outputs_are_labels(
    copied_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run(copied_text, tmp_path / "speaks")
    card = (tmp_path / "speaks/README.md").read_text(encoding="utf-8")
    assert "Greedy continuations are the same" in card
    assert "pipeline_tag: text-generation" in card
    monkeypatch.setattr(TextTask, "next_token", False)
    monkeypatch.delattr(parity, "generate")
    export_run(copied_text, tmp_path / "labels")
    card = (tmp_path / "labels/README.md").read_text(encoding="utf-8")
    assert "reedy" not in card
    assert "pipeline_tag" not in card


def test_every_position_of_a_long_row_is_compared(
    copied_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(parity.HFModel):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            output = super().forward(*arguments, **options)
            output.logits[:, 299:] += 0.01
            return output

    monkeypatch.setattr(TextTask, "sequence_length", 300)
    export_run(copied_text, tmp_path / "out")
    monkeypatch.setattr(parity, "HFModel", Late)
    with pytest.raises(NextLatError, match=r"rows differ by 0\.01"):
        export_run(copied_text, tmp_path / "again")


def loud(path: Path) -> Trained:
    """A run whose logits are a thousand times as large."""
    trained = load_run(path, "cpu")
    with torch.no_grad():
        trained.built.objective.model.lm_head.weight.mul_(1000)
    return trained


def test_large_logits_agree_within_the_limit_in_float64(kept: dict[str, Path], tmp_path: Path) -> None:
    trained = loud(kept["gpt"])
    model = exported_trunk(trained, "float32")
    before = copy.deepcopy(model.state_dict())
    write_model(trained, model, tmp_path, "float32")
    found = parity.verify(tmp_path, model, trained)
    assert found.single > 1e-5
    assert found.double is not None
    assert found.double < 1e-10
    assert all(value.dtype is before[name].dtype for name, value in model.state_dict().items())


def test_what_rounding_could_explain_in_fp32_is_found_in_float64(
    kept: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = loud(kept["gpt"])
    correct = export.llama_config
    monkeypatch.setattr(export, "llama_config", lambda *a: {**correct(*a), "rms_norm_eps": 1.0001e-5})
    model = exported_trunk(trained, "float32")
    write_model(trained, model, tmp_path, "float32")
    with pytest.raises(NextLatError, match=r"more than 1e-05 \(float64\)"):
        parity.verify(tmp_path, model, trained)


def test_small_logits_may_differ_by_the_limit_and_no_more() -> None:
    assert parity._rounding(0.5, 1024) == 1
    assert parity._rounding(7.0, 24) == 7
    assert parity._rounding(7.0, 512) == 14


def test_rotary_tables_are_compared_too() -> None:
    own = trunk()
    stock = same_llama(own)
    parity._compare_rotary(stock, own, 64)
    config = copy.deepcopy(stock.config)
    config.rope_parameters["rope_theta"] = 10_100.0
    with pytest.raises(NextLatError, match="rotary positions differ"):
        parity._compare_rotary(LlamaForCausalLM(config), own, 64)


def test_measurements_of_other_steps_and_of_a_dynamics_that_is_not_there_are_left_out(
    kept: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(kept["nextlat"], tmp_path / "runs" / "nextlat"))
    run("evaluate", source)
    file = source / "evaluations/accuracy.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    write_json(source / "evaluations/older.json", {**content, "step": content["step"] - 1})
    write_json(source / "evaluations/probes-posthoc.json", content)
    export_run(source, tmp_path / "out")
    assert list(json.loads((tmp_path / "out/nextlat.json").read_text())["evaluations"]) == ["accuracy"]
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "| accuracy |" in card
    assert "| older |" not in card
    assert "posthoc" not in card


def test_the_card_of_rounded_weights_says_that_it_was_measured_before(kept: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(kept["gpt"], tmp_path / "runs" / "gpt"))
    run("evaluate", source)
    for dtype, said in (("float32", False), ("bfloat16", True)):
        export_run(source, tmp_path / dtype, dtype=dtype)
        card = (tmp_path / dtype / "README.md").read_text(encoding="utf-8")
        assert ("before the weights were rounded" in card) == said
