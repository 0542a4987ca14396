"""The training loops that are timed: ours, and what one would write or use instead.

Every loop does the same things in a step: zero the gradients, loss over all positions, backward, fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.batch import Batch
from nextlat.config import TrainingConfig
from nextlat.model import Transformer
from nextlat.model.norm import EPS
from nextlat.model.rotary import ROPE_BASE
from nextlat.model.trunk import feed_forward_width
from nextlat.objectives import GPT, NextLat, Objective, total_loss
from nextlat.training.optimizers import make_optimizer

Step = Callable[[], Tensor]
"""One update; returns the loss before it."""

TRAINING = TrainingConfig.model_validate({"steps": 1, "batch_size": 1, "learning_rate": 1e-5})
"""The optimiser of every loop; the rate is small, so that no arm's model drifts away from the others'."""


class Shape(NamedTuple):
    """Sizes of a model and its batch."""

    n_layers: int
    width: int
    n_heads: int
    vocab: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.rows * self.length

    @property
    def linear_products(self) -> int:
        """Multiply-adds of one token in the blocks' matrices and the output head, forward."""
        block = 4 * self.width**2 + 3 * self.width * feed_forward_width(self.width)
        return self.n_layers * block + self.width * self.vocab

    @property
    def attention_products(self) -> int:
        """Multiply-adds of a whole batch in causal attention, forward: scores and mixture, up to the diagonal."""
        return self.rows * self.n_layers * self.width * self.length * (self.length + 1)

    def described(self) -> dict[str, int]:
        """For a table."""
        return {"layers": self.n_layers, "D": self.width, "V": self.vocab, "B": self.rows, "T": self.length}


def random_batch(shape: Shape) -> Batch:
    """Random tokens; every position predicts the next."""
    rows = torch.randint(shape.vocab, (shape.rows, shape.length + 1), generator=torch.Generator().manual_seed(1))
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), keys=torch.arange(shape.rows))


def trunk(shape: Shape) -> Transformer:
    """Our model, always with the same weights."""
    g = torch.Generator().manual_seed(0)
    return Transformer(shape.vocab, shape.n_layers, shape.n_heads, shape.width, generator=g)


def ours_objective(name: str, shape: Shape, horizon: int = 1, hidden_dim: int = 1) -> Objective:
    """``gpt`` or ``nextlat`` around :func:`trunk`."""
    if name == "gpt":
        return GPT(trunk(shape))
    return NextLat(trunk(shape), horizon=horizon, dynamics=hidden_dim, generator=torch.Generator().manual_seed(2))


def ours_step(name: str, shape: Shape, batch: Batch, horizon: int = 1, hidden_dim: int = 1) -> Step:
    """A step as the training loop makes it: counts first, then terms, gradients, update."""
    return objective_step(ours_objective(name, shape, horizon, hidden_dim), batch)


def objective_step(objective: Objective, batch: Batch) -> Step:
    """A step of any objective."""
    optimizer = make_optimizer(objective, TRAINING)

    def step() -> Tensor:
        counts = objective.counts(batch)
        scale = {name: objective.term_weight(name) / max(int(count), 1) for name, count in counts.items()}
        optimizer.zero_grad(set_to_none=True)
        loss = total_loss(objective(batch, scale), counts)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def plain_step(model: nn.Module, logits: Callable[[Tensor], Tensor], batch: Batch) -> Step:
    """A step of a model that returns the logits of all positions."""
    optimizer = make_optimizer(model, TRAINING)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits(batch.tokens).flatten(0, 1), batch.targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


class PlainNorm(nn.Module):
    """RMSNorm from its formula."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, u: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + EPS) * self.weight


def rotate_half(u: Tensor) -> Tensor:
    """(-second half, first half) of the last dimension."""
    first, second = u.chunk(2, -1)
    return torch.cat((-second, first), -1)


class PlainAttention(nn.Module):
    """Causal attention with rotary positions, heads first."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(u).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for p in projections)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class PlainFeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))
        return out


class PlainBlock(nn.Module):
    """One pre-norm block."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = PlainNorm(width), PlainNorm(width)
        self.self_attn = PlainAttention(width, n_heads)
        self.mlp = PlainFeedForward(width, feed_forward_width(width))

    def forward(self, u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        u = u + self.self_attn(self.input_layernorm(u), cos, sin)
        out: Tensor = u + self.mlp(self.post_attention_layernorm(u))
        return out


class PlainLlama(nn.Module):
    """The model of :class:`Transformer`, and its weight names, as a textbook would write it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(PlainBlock(shape.width, shape.n_heads) for _ in range(shape.n_layers))
        self.norm = PlainNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False)
        half = shape.width // shape.n_heads // 2
        rate = ROPE_BASE ** (-torch.arange(half) / half)
        angle = torch.arange(shape.length)[:, None] * torch.cat([rate, rate])
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) logits."""
        u = self.embed_tokens(tokens)
        for layer in self.layers:
            u = layer(u, self.cos, self.sin)
        logits: Tensor = self.lm_head(self.norm(u))
        return logits


class GPT2Block(nn.Module):
    """LayerNorm, fused query-key-value projection, GELU; no biases."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in self.qkv(self.norm_1(u)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        u = u + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = u + self.down(F.gelu(self.up(self.norm_2(u))))
        return out


class GPT2Shaped(nn.Module):
    """The shape of nanoGPT: learned positions, tied head. Another model than ours, of about the same size."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(shape.vocab, shape.width), nn.Embedding(shape.length, shape.width)
        self.blocks = nn.Sequential(*(GPT2Block(shape.width, shape.n_heads) for _ in range(shape.n_layers)))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) logits."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))
        return logits


def bare_llama_step(shape: Shape, batch: Batch) -> Step:
    """A hand-written eager loop, from our initial weights."""
    model = bare_llama(shape)
    return plain_step(model, model, batch)


def bare_llama(shape: Shape) -> PlainLlama:
    """With the weights of :func:`trunk`."""
    model = PlainLlama(shape)
    model.load_state_dict(trunk(shape).state_dict())
    return model


def gpt2_step(shape: Shape, batch: Batch) -> Step:
    """A loop of nanoGPT's shape."""
    model = GPT2Shaped(shape)
    return plain_step(model, model, batch)


def hf_llama_step(shape: Shape, batch: Batch) -> Step:
    """``LlamaForCausalLM`` of transformers, from our initial weights.

    Raises:
        ImportError: transformers is not installed.
    """
    model = hf_llama(shape)
    return plain_step(model, lambda tokens: model(input_ids=tokens, use_cache=False).logits, batch)


def hf_llama(shape: Shape) -> Any:
    """With the weights of :func:`trunk`."""
    transformers: Any = import_module("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=feed_forward_width(shape.width),
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_heads,
            max_position_embeddings=shape.length,
            rms_norm_eps=EPS,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )
    model.load_state_dict(hf_names(trunk(shape).state_dict()))
    return model.train()


def hf_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weight names with the prefix that a stock checkpoint has."""
    return {name if name.startswith("lm_head") else f"model.{name}": value for name, value in weights.items()}
