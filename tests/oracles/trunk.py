"""The Llama-shaped trunk one position at a time, from its weights: no batching, no library attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nextlat.model import Transformer


def rms_norm(u: Tensor, gain: Tensor) -> Tensor:
    """(D,) -> (D,)."""
    return gain * u / torch.sqrt((u * u).sum() / len(u) + 1e-5)


def rotate_half(u: Tensor, position: int) -> Tensor:
    """RoPE of one head: entry j turns with entry j + dh/2 by ``position * 10000^(-2j/dh)``."""
    half = len(u) // 2
    out = torch.empty_like(u)
    for j in range(half):
        angle = position * 10000 ** (-2 * j / len(u))
        cos, sin = math.cos(angle), math.sin(angle)
        out[j] = u[j] * cos - u[j + half] * sin
        out[j + half] = u[j + half] * cos + u[j] * sin
    return out


def visible(documents: list[int] | None, t: int, s: int) -> bool:
    """Whether position t may look at s: not in the future, no boundary in between."""
    return s <= t and (documents is None or all(documents[k] == documents[k - 1] for k in range(s + 1, t + 1)))


def attention(q: Tensor, k: Tensor, v: Tensor, documents: list[int] | None) -> Tensor:
    """(T, n_heads, dh) each -> (T, n_heads, dh), softmax over an explicit list of visible positions."""
    out = []
    for t in range(len(q)):
        seen = [s for s in range(len(k)) if visible(documents, t, s)]
        heads = []
        for n in range(q.shape[1]):
            score = torch.stack([(q[t, n] * k[s, n]).sum() / math.sqrt(q.shape[2]) for s in seen])
            weight = torch.exp(score - score.max())
            weight = weight / weight.sum()
            heads.append(sum(w * v[s, n] for w, s in zip(weight, seen, strict=True)))
        out.append(torch.stack(heads))
    return torch.stack(out)


def document_positions(documents: list[int] | None, length: int) -> list[int]:
    """Positions that restart at 0 at every change of id."""
    positions: list[int] = []
    for t in range(length):
        new = t == 0 or (documents is not None and documents[t] != documents[t - 1])
        positions.append(0 if new else positions[-1] + 1)
    return positions


def trunk_states(model: Transformer, tokens: list[int], documents: list[int] | None) -> Tensor:
    """(T, D) states after the final norm of one row."""
    weights = dict(model.named_parameters())
    heads = model.n_heads
    u = torch.stack([weights["embed_tokens.weight"][x] for x in tokens])
    positions = document_positions(documents, len(tokens))
    for index in range(len(model.layers)):
        prefix = f"layers.{index}."

        def weight(name: str, prefix: str = prefix) -> Tensor:
            return weights[f"{prefix}{name}.weight"]

        normed = torch.stack([rms_norm(x, weight("input_layernorm")) for x in u])
        q, k, v = (
            (normed @ weight(f"self_attn.{name}_proj").T).view(len(tokens), heads, -1) for name in ("q", "k", "v")
        )
        q, k = (
            torch.stack([torch.stack([rotate_half(x, p) for x in row]) for row, p in zip(part, positions, strict=True)])
            for part in (q, k)
        )
        u = u + attention(q, k, v, documents).flatten(1) @ weight("self_attn.o_proj").T
        normed = torch.stack([rms_norm(x, weight("post_attention_layernorm")) for x in u])
        gate = normed @ weight("mlp.gate_proj").T
        u = u + (gate / (1 + torch.exp(-gate)) * (normed @ weight("mlp.up_proj").T)) @ weight("mlp.down_proj").T
    return torch.stack([rms_norm(x, weights["norm.weight"]) for x in u])
