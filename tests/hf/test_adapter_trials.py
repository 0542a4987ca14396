"""Models that are refused, or not, after they were tried on a few tokens; models inside of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from nextlat import GPT, NextLat, NextLatError, generate, total_loss
from nextlat.hf import HFModel
from tests.hf.models import V, gpt2, gradients, larger, llama, qwen, rows


def mamba() -> Any:
    torch.manual_seed(0)
    return larger(MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=1)))


def bloom() -> Any:
    torch.manual_seed(0)
    return larger(BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2)))


def gemma2(cap: float | None) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(
        vocab_size=V, num_key_value_heads=2, head_dim=8, sliding_window=64, final_logit_softcapping=cap, **sizes
    )
    return Gemma2ForCausalLM(config).eval()


class Capped(LlamaForCausalLM):
    """Logits pressed under 30, and nothing in the configuration that says so."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits = torch.tanh(output.logits / 30) * 30
        return output


class Nowhere(GPT2LMHeadModel):
    """Keeps to masks and ignores positions."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        body = self.transformer.forward

        def forward(*arguments: Any, position_ids: Any = None, **options: Any) -> Any:
            return body(*arguments, **options)

        self.transformer.forward = forward


class Watched(LlamaForCausalLM):
    """Remembers whether autocast was on."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen: list[bool] = []

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return super().forward(*arguments, **options)


class Tuner(nn.Module):
    """As peft's: holds the model, hands on what is asked of it, and is no body of a language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.model(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class LowRank(nn.Module):
    """A linear layer that is frozen and a trained change of rank 2 beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.up(self.down(x))
        return out


class Adapted(Tuner):
    """The outside of peft: ``base_model`` is the tuner, and ``get_base_model()`` the model."""

    def __init__(self, model: Any) -> None:
        nn.Module.__init__(self)
        model.requires_grad_(False)
        for block in model.model.layers:
            block.self_attn.q_proj = LowRank(block.self_attn.q_proj)
        self.base_model = Tuner(model)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.base_model(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "base_model"), name)

    def get_base_model(self) -> Any:
        return self.base_model.model


@pytest.mark.parametrize("make", [mamba, bloom])
def test_models_that_cannot_take_packed_rows_say_so(make: Any) -> None:
    objective = GPT(make())
    for _ in range(2):
        with pytest.raises(NextLatError, match=r"documents=None"):
            objective(rows())
    total_loss(objective(rows(packed=False))).backward()


def test_a_trial_that_was_cut_short_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = GPT(Nowhere(gpt2().config).eval())
    body = objective.model._hf.transformer

    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(body, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            objective(rows())
    with pytest.raises(NextLatError, match="does not keep to"):
        objective(rows())


def test_a_model_that_keeps_masks_and_ignores_positions_is_refused() -> None:
    model = larger(Nowhere(gpt2().config))
    with pytest.raises(NextLatError, match="than alone"):
        GPT(model)(rows())


def test_the_trial_is_made_without_autocast() -> None:
    model = Watched(llama().config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        GPT(model)
    assert model.seen
    assert not any(model.seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caps_that_small_logits_do_not_show_are_refused(dtype: torch.dtype) -> None:
    model = Capped(llama().config).to(dtype).eval()
    assert model(torch.arange(8)[None]).logits.abs().max() < 5
    with pytest.raises(NextLatError, match="capped, scaled or shifted"):
        GPT(model)
    with pytest.raises(NextLatError, match=r"final_logit_softcapping is 30\.0"):
        GPT(gemma2(30.0).to(dtype))
    GPT(gemma2(None).to(dtype))


def test_the_window_of_a_decoder_in_a_section_of_the_configuration_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen()
    inner = type(model.config)(sliding_window=8, use_sliding_window=True)
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self, *_, **__: inner, raising=False)
    with pytest.raises(NextLatError, match=r"sliding window \(8\)"):
        GPT(model)(rows(length=12))


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_with_adapters_around_it_trains_them_and_nothing_else(packed: bool) -> None:
    outside = Adapted(llama())
    objective = NextLat(outside, horizon=2)
    assert objective.model.model is outside
    batch = rows(packed)
    total_loss(objective(batch)).backward()
    found = gradients(objective)
    assert {name for name in found if not name.startswith("dynamics.")} == {
        f"model.model.base_model.model.model.layers.{layer}.self_attn.q_proj.{part}.weight"
        for layer in range(2)
        for part in ("down", "up")
    }
    assert all(value.abs().max() > 0 for value in found.values())
    expected = outside(input_ids=batch.tokens).logits
    torch.testing.assert_close(HFModel(outside)(batch.tokens).logits, expected)


def test_adapters_in_the_head_or_the_embedding_are_refused() -> None:
    model = llama()
    model.lm_head = LowRank(model.lm_head)
    with pytest.raises(NextLatError, match="output head of LlamaForCausalLM is an adapter"):
        GPT(model)


def test_something_that_is_put_before_the_input_is_refused() -> None:
    class Prompted(Adapted):
        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            return self.base_model(torch.cat([input_ids[:, :1] * 0, input_ids], 1), **options)

    with pytest.raises(NextLatError, match="more is put before its input"):
        GPT(Prompted(llama()))


def test_decoding_is_without_dropout_whatever_the_mode() -> None:
    model = gpt2(resid_pdrop=0.5)
    prompts = rows().tokens[:, :4]
    objective = GPT(model)
    expected = generate(objective.as_lm(), prompts, 8)
    model.train()
    for _ in range(2):
        assert torch.equal(generate(objective.as_lm(), prompts, 8), expected)
    assert all(module.training for module in model.modules())
