"""Tiny Hugging Face models built from configurations, and a task of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nextlat.batch import IGNORE, Batch
from nextlat.config import Config, apply_overrides, read_config, read_overrides, resolve
from nextlat.data.tokenizer import byte_tokenizer
from nextlat.hf.llama import llama_config, llama_weights
from nextlat.model import Transformer
from nextlat.options import Options
from nextlat.tasks import Outputs, Prompts
from tests.tiny import TINY

V = 23


def llama(attention: str = "sdpa", **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attn_implementation=attention,
        **options,
    )
    return larger(LlamaForCausalLM(config))


def gpt2(attention: str = "sdpa", **options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64, attn_implementation=attention, **options
    )
    return larger(GPT2LMHeadModel(config))


def qwen(attention: str = "sdpa") -> Qwen2ForCausalLM:
    """Like Llama, but with biases in the attention, grouped keys and tied embeddings."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    return larger(Qwen2ForCausalLM(config))


MODELS = {"llama": llama, "gpt2": gpt2, "qwen": qwen}


def larger(model: Any) -> Any:
    """Weights ten times as large, so that attention matters to the states."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return model.eval()


def trunk(tie: bool = False, layers: int = 2) -> Transformer:
    made = Transformer(V, layers, 2, 16, tie, torch.Generator().manual_seed(1))
    return larger(made)


def same_llama(model: Transformer, attention: str = "sdpa") -> LlamaForCausalLM:
    """A stock Llama with the weights of our trunk."""
    made = LlamaForCausalLM(LlamaConfig(**llama_config(model, 64, None), attn_implementation=attention))
    made.load_state_dict(llama_weights(model), strict=False)
    return made.eval()


def rows(packed: bool = True, length: int = 12) -> Batch:
    """Three rows; packed ones hold documents of every length from 1 on, and padding."""
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(V, (3, length), generator=g)
    targets = torch.cat([tokens[:, 1:], torch.full((3, 1), IGNORE)], 1)
    if not packed:
        return Batch(tokens, targets)
    documents = (torch.rand(3, length, generator=g) < 0.3).cumsum(1)
    documents[2, -3:] = -1
    targets[:, :-1][documents[:, 1:] != documents[:, :-1]] = IGNORE
    targets[documents < 0] = IGNORE
    return Batch(tokens, targets, documents)


class TextOptions(Options):
    """No options."""


class TextTask:
    """Bytes of a sentence said over and over; packed rows when trained on."""

    Options = TextOptions
    vocab_size, sequence_length, end_token, next_token = 257, 24, 256, True

    def __init__(self, options: Options | None = None, seed: int = 0, batch_size: int = 8) -> None:
        self.tokenizer = byte_tokenizer()
        text = "the cat sat on the mat. "
        self.stream = torch.tensor([256, *self.tokenizer.encode(text * 3)] * 20)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        begins = [(step * 31 + row * 17) % 900 for row in range(start, stop)]
        rows = torch.stack([self.stream[b : b + self.sequence_length + 1] for b in begins])
        tokens = rows[:, :-1]
        return Batch(tokens, rows[:, 1:].clone(), (tokens == 256).cumsum(1))

    def evaluation(self, split: str) -> Iterable[Batch]:
        yield self.rows(7, 0, 6)

    def prompts(self, split: str) -> Prompts:
        tokens = self.rows(3, 0, 4).tokens
        return Prompts(tokens[:, :12], tokens[:, 12:], tokens)

    def score(self, outputs: Outputs) -> dict[str, Any]:
        return {}

    def description(self) -> dict[str, Any]:
        return {}


def text_config(*overrides: str) -> Config:
    """A tiny run on :class:`TextTask`, which must be registered as ``text``."""
    data, _ = read_config("path_star/mini")
    words = [*(word for word in TINY if not word.startswith("data.")), "evaluation.health=false", *overrides]
    values = {**read_overrides(words), "training.evaluate_every": None, "evaluation.after": [], "name": "text"}
    return resolve(apply_overrides({**data, "task": "text", "data": {}}, values))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
