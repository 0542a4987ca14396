"""The objectives on Hugging Face models: same terms, same isolation of documents, nothing added to the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM, LlamaForCausalLM

from nextlat import GPT, NextLat, NextLatError, generate, total_loss
from nextlat.batch import Batch
from nextlat.decoding import Static
from nextlat.hf import HFModel
from nextlat.objectives import JTP
from tests.hf.models import MODELS, V, gpt2, llama, qwen, rows, same_llama, trunk

ATTENTION = ("sdpa", "eager")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("objective", [GPT, NextLat])
def test_terms_and_gradients_equal_those_of_our_trunk(objective: Any, attention: str, packed: bool) -> None:
    own = trunk()
    stock = same_llama(own, attention)
    options = {"horizon": 3, "generator": torch.Generator().manual_seed(2)} if objective is NextLat else {}
    ours = objective(own, **options)
    options = {"horizon": 3, "dynamics": copy.deepcopy(ours.dynamics)} if objective is NextLat else {}
    theirs = objective(stock, **options)
    batch = rows(packed)
    found, expected = theirs(batch), ours(batch)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].count == expected[name].count
        torch.testing.assert_close(found[name].sum, expected[name].sum, rtol=1e-5, atol=1e-5)
    total_loss(found).backward()
    total_loss(expected).backward()
    for name, parameter in own.named_parameters():
        stock_name = name if name.startswith("lm_head") else f"model.{name}"
        other = stock.get_parameter(stock_name).grad
        torch.testing.assert_close(other, parameter.grad, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_get_the_states_they_get_alone(name: str, attention: str) -> None:
    model = HFModel(MODELS[name](attention))
    batch = rows()
    assert batch.documents is not None
    packed = model.hidden_states(batch.tokens, batch.documents)
    for row in range(len(packed)):
        runs = batch.documents[row].unique_consecutive(return_counts=True)[1].tolist()
        start = 0
        for length in runs:
            part = slice(start, start + length)
            alone = model.hidden_states(batch.tokens[row : row + 1, part])
            torch.testing.assert_close(packed[row : row + 1, part], alone, rtol=1e-4, atol=1e-5)
            start += length


@pytest.mark.parametrize("name", MODELS)
def test_the_head_times_the_states_gives_the_models_own_logits(name: str) -> None:
    model = MODELS[name]()
    tokens = rows().tokens
    torch.testing.assert_close(HFModel(model)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", MODELS)
def test_generation_through_the_adapter_equals_that_of_transformers(name: str) -> None:
    model = MODELS[name]()
    prompts = rows().tokens[:, :5]
    ours = generate(GPT(model).as_lm(), prompts, 9)
    theirs = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=9, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ours, theirs[:, 5:])


def test_rows_that_were_rolled_back_unevenly_go_on_as_if_nothing_had_been_there() -> None:
    model = HFModel(llama())
    tokens = rows().tokens
    cache = model.new_cache(3, 12)
    model(tokens[:, :9], cache=cache)
    cache.lengths = [4, 9, 7]
    cache.select([2, 0])
    found = model(torch.stack([tokens[2, 7:9], tokens[0, 4:6]]), cache=cache).logits
    torch.testing.assert_close(found[0], model(tokens[2:, :9]).logits[0, 7:9])
    torch.testing.assert_close(found[1], model(tokens[:1, :6]).logits[0, 4:6])
    cache.keep([[0], [0, 1]], [7, 4])
    assert cache.lengths == [8, 6]
    cache.keep([[3, 5], []], [2, 6])  # places of row 2 that lie at 5 and 7 move behind its first two
    assert cache.lengths == [4, 6]
    assert cache.tokens[0, :4].tolist() == tokens[2, [0, 1, 5, 7]].tolist()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_both_losses_train_embeddings_trunk_and_dynamics_but_not_the_head(make: Any) -> None:
    untied = {"tie_word_embeddings": False}
    for weights in ({"latent_weight": 1.0, "kl_weight": 0.0}, {"latent_weight": 0.0, "kl_weight": 1.0}):
        model = make(**untied)
        objective = NextLat(model, horizon=2, **weights)
        terms = objective(rows())
        total_loss({name: term for name, term in terms.items() if name != "ce"}).backward()
        assert model.get_input_embeddings().weight.grad.abs().max() > 0
        body = next(p for n, p in model.base_model.named_parameters() if "mlp" in n and p.ndim == 2)
        assert body.grad.abs().max() > 0
        assert all(p.grad.abs().max() > 0 for p in objective.dynamics.parameters())
        head = model.get_output_embeddings().weight.grad
        assert head is None or head.abs().max() == 0


def test_jtp_trains_on_a_hugging_face_model_too() -> None:
    own = trunk()
    ours, theirs = (JTP(m, horizon=2, generator=torch.Generator().manual_seed(4)) for m in (own, same_llama(own)))
    expected, found = ours(rows()), theirs(rows())
    for name in expected:
        torch.testing.assert_close(found[name].sum, expected[name].sum, rtol=1e-5, atol=1e-5)
    prompts = rows().tokens[:, :5]
    expected_text = generate(ours.as_lm(), prompts, 9)
    assert torch.equal(generate(theirs.as_lm(), prompts, 9), expected_text)
    drafted = generate(theirs.as_lm(), prompts, 9, drafter=theirs.drafter(), policy=Static(2))
    assert torch.equal(drafted, expected_text)


def test_dropout_is_left_as_it_was_set() -> None:
    model = gpt2(resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    objective = GPT(model)
    objective(rows())
    assert model.training
    assert not model.transformer.h[0].training
    assert model.transformer.h[1].attn.resid_dropout.training
    one, other = (objective(rows())["ce"].sum for _ in range(2))
    assert one != other


def test_a_bf16_model_trains_in_bf16() -> None:
    model = llama().to(torch.bfloat16)
    objective = NextLat(model, horizon=2)
    assert {p.dtype for p in objective.parameters()} == {torch.bfloat16}
    terms = objective(rows())
    reference = NextLat(llama(), horizon=2, dynamics=copy.deepcopy(objective.dynamics).float())(rows())
    for name, term in terms.items():
        assert term.sum.dtype is torch.float32
        torch.testing.assert_close(term.sum, reference[name].sum, rtol=0.05, atol=0.5)
    total_loss(terms).backward()
    assert model.get_input_embeddings().weight.grad.dtype is torch.bfloat16


def test_the_plain_model_saves_and_generates_as_before(tmp_path: Path) -> None:
    model = gpt2()
    before = set(model.state_dict())
    NextLat(model, horizon=2)(rows())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(again.state_dict()) == before
    tokens = rows().tokens
    assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)


class Scaled(LlamaForCausalLM):
    """Logits divided by two after the head, as some models do."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits = output.logits / 2
        return output


class Deaf(LlamaForCausalLM):
    """Ignores masks and positions, as a state-space model may."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        body = self.model.forward

        def forward(*arguments: Any, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
            return body(*arguments, **options)

        self.model.forward = forward


def test_logits_that_are_scaled_after_the_head_are_refused() -> None:
    with pytest.raises(NextLatError, match="are not its output head times its last state"):
        GPT(Scaled(llama().config))


def test_a_head_with_a_bias_is_refused() -> None:
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=V, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32)
    with pytest.raises(NextLatError, match="has a bias"):
        GPT(GPTJForCausalLM(config))


def test_a_body_without_a_head_is_refused() -> None:
    with pytest.raises(NextLatError, match="causal language model"):
        GPT(llama().model)


def test_a_module_that_is_no_language_model_is_sent_to_the_three_callables() -> None:
    with pytest.raises(NextLatError, match=r"nextlat\.TorchModel"):
        GPT(nn.Linear(2, 2))


def test_packed_rows_are_refused_where_documents_would_leak() -> None:
    objective = GPT(Deaf(llama().config))
    objective(rows(packed=False))
    with pytest.raises(NextLatError, match="does not keep to the mask"):
        objective(rows())


def test_packed_rows_longer_than_a_sliding_window_are_refused() -> None:
    model = qwen()
    model.config.sliding_window = 8
    objective = GPT(model)
    batch = rows(length=8)
    objective(batch)
    with pytest.raises(NextLatError, match=r"sliding window \(8\)"):
        objective(rows(length=12))


def test_packed_rows_need_an_attention_that_takes_masks() -> None:
    model = llama()
    objective = GPT(model)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(NextLatError, match="attn_implementation='sdpa'"):
        objective(rows())


def test_a_whole_row_as_one_document_equals_no_documents() -> None:
    model = HFModel(llama())
    batch = Batch(*rows(packed=False)[:2], documents=torch.zeros(3, 12, dtype=torch.int64))
    found = model.hidden_states(batch.tokens, batch.documents)
    torch.testing.assert_close(found, model.hidden_states(batch.tokens))
