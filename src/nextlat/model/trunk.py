"""The Llama-shaped decoder every objective trains: RMSNorm, RoPE, SwiGLU, no biases.

Weight names are those of a stock Llama checkpoint without its ``model.`` prefix, so that export is a
renaming.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextlat.errors import NextLatError
from nextlat.model.attention import Layout, attend, document_layout
from nextlat.model.cache import Cache
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.model.norm import RMSNorm, normed_products
from nextlat.model.products import linear
from nextlat.model.rotary import Angles, neighbours, rotary_angles, rotary_turns, rotated, turned

INIT_STD = 0.02


def feed_forward_width(width: int) -> int:
    """Width of the SwiGLU layer: 8/3 of the model width, in steps of 128 (256 -> 640, 384 -> 1024)."""
    return 128 * max(1, round(8 * width / 384))


def init_normal(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every matrix from N(0, 0.02^2), in the order of ``module.parameters()``; gains stay as they are."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, INIT_STD, generator=generator)


class Context(NamedTuple):
    """What all blocks of one pass share, in the order of a block's arguments."""

    angles: Angles
    """Cosines and signed sines of the positions, or complex turns."""
    layout: Layout | None
    """Where the documents lie; ``None`` means one document a row."""
    mask: Tensor | None
    """(T, S) or (B, 1, T, S) bool, True where a query may look."""
    cache: Cache | None
    """Keys and values of earlier positions."""


class Attention(nn.Module):
    """Projections of multi-head causal self-attention with rotary positions."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def queries(self, u: Tensor, angles: Angles) -> Tensor:
        """Rotated queries, (B, T, n_heads, head_width), of (B, T, D) normed inputs."""
        return rotated(self.q_proj, u, self.n_heads, angles)

    def keys_values(self, u: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Rotated keys and values, (B, T, n_heads, head_width) each, of (B, T, D) normed inputs."""
        return rotated(self.k_proj, u, self.n_heads, angles), self.v_proj(u).unflatten(-1, (self.n_heads, -1))


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(u)) * up(u))``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.behind(multiplied(self.gate_proj, u), multiplied(self.up_proj, u))

    def behind(self, gate: Tensor, up: Tensor) -> Tensor:
        """(..., D) of both products, (..., inner)."""
        return multiplied(self.down_proj, F.silu(gate) * up)


BUILT_OF = {RMSNorm, nn.Linear, FeedForward}
"""What :func:`untouched` knows."""


def own_gradients(u: Tensor) -> bool:
    """Whether functions with a backward pass of their own save time on a tensor: gradients are made, on a CPU.

    Compilers write such passes themselves, and half precision wants its conversions.
    """
    wide = u.is_cpu and u.dtype.itemsize > 2 and not torch.is_autocast_enabled("cpu")
    return wide and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def untouched(*modules: nn.Module) -> bool:
    """Whether calling modules does what their class says and no more: no bias, no hook, nothing put in their place."""
    return all(
        type(module) in BUILT_OF
        and getattr(module, "bias", None) is None
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        for module in modules
    )


def multiplied(layer: nn.Module, u: Tensor) -> Tensor:
    """What a linear layer makes of its input."""
    if own_gradients(u) and isinstance(layer, nn.Linear) and untouched(layer):
        return linear(u, layer.weight)
    out: Tensor = layer(u)
    return out


class Block(nn.Module):
    """One pre-norm transformer block.

    What lies before and after the attention itself are methods of their own: they take tensors only, so that they
    can be compiled whatever mask, documents or cache the attention uses.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(width)
        self.self_attn = Attention(width, n_heads)
        self.post_attention_layernorm = RMSNorm(width)
        self.mlp = FeedForward(width, feed_forward_width(width))

    def project(self, u: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The (B, T, D) stream to go on with, and of it rotated queries and keys, and values.

        These are (B, T, n_heads, head_width) each.
        """
        norm, attention = self.input_layernorm, self.self_attn
        layers = attention.q_proj, attention.k_proj, attention.v_proj
        if own_gradients(u) and len(angles) == 1 and untouched(norm, *layers):
            (turn,) = angles
            rows = [neighbours(layer.weight, attention.n_heads) for layer in layers[:2]]
            u, q, k, v = normed_products(u, norm.weight, (*rows, layers[2].weight))
            q, k = turned(q, turn), turned(k, turn)
            return u, q, k, v.view_as(k)
        x = norm(u)
        return u, attention.queries(x, angles), *attention.keys_values(x, angles)

    def mix(self, u: Tensor, attended: Tensor) -> Tensor:
        """The stream behind the block, from the (B, T, D) stream before it and what its heads attended to."""
        u = u + multiplied(self.self_attn.o_proj, attended)
        norm, mlp = self.post_attention_layernorm, self.mlp
        if own_gradients(u) and untouched(norm, mlp, mlp.gate_proj, mlp.up_proj):
            u, gate, up = normed_products(u, norm.weight, (mlp.gate_proj.weight, mlp.up_proj.weight))
            return u + mlp.behind(gate, up)
        out: Tensor = u + mlp(norm(u))
        return out

    def forward(
        self,
        u: Tensor,
        angles: Angles,
        layout: Layout | None,
        mask: Tensor | None,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        u, q, k, v = self.project(u, *angles)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.mix(u, attend(q, k, v, layout, mask))


def run_blocks(
    blocks: Iterable[nn.Module], u: Tensor, context: Context, recompute: bool, layers: list[Tensor] | None = None
) -> Tensor:
    """Pass the (B, T, D) stream through blocks.

    Args:
        blocks: in order; their numbers in a cache count from 0.
        u: (B, T, D).
        context: positions and visibility.
        recompute: keep only the stream between blocks, and run each block again in the backward pass.
        layers: a list that receives the stream before each block.
    """
    for index, block in enumerate(blocks):
        if layers is not None:
            layers.append(u)
        if recompute and torch.is_grad_enabled():
            u = checkpoint(block, u, *context, index, use_reentrant=False)
        else:
            u = block(u, *context, index)
    return u


class Transformer(nn.Module):
    """Decoder-only transformer with the shape, and the weight names, of Llama.

    Args:
        vocab_size: number of token ids V.
        n_layers: number of blocks.
        n_heads: attention heads; must divide ``width`` into even head widths.
        width: model width D.
        tie_embeddings: share the output head with the embedding table.
        generator: source of the initial weights; ``None`` leaves torch's global one in charge.

    Raises:
        NextLatError: a size is below 1, or the heads do not divide the width into even parts.
    """

    complex_turns = True
    """Whether to rotate by complex numbers where they pay; compilers of kernels know real ones only."""

    def __init__(
        self,
        vocab_size: int,
        n_layers: int,
        n_heads: int,
        width: int,
        tie_embeddings: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("vocab_size", vocab_size),
            ("n_layers", n_layers),
            ("n_heads", n_heads),
            ("width", width),
        ):
            if value < 1:
                raise NextLatError(f"{name} is {value}; it must be at least 1")
        if width % n_heads or (width // n_heads) % 2:
            raise NextLatError(
                f"n_heads = {n_heads} does not split width = {width} into even head widths; "
                f"choose a width that is a multiple of {2 * n_heads}"
            )
        self.vocab_size, self.n_heads, self.width = vocab_size, n_heads, width
        self.checkpoint_activations = False
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))
        self.norm = RMSNorm(width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        init_normal(self, generator if generator is not None else torch.default_generator)

    @property
    def embedding_weight(self) -> Tensor:
        """(V, D) the embedding table E."""
        return self.embed_tokens.weight

    @property
    def head_weight(self) -> Tensor:
        """(V, D) the output head W."""
        return self.lm_head.weight

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for ``rows`` rows of up to ``capacity`` positions."""
        shape = (len(self.layers), rows, capacity, self.n_heads, self.width // self.n_heads)
        return Cache(shape, self.embed_tokens.weight)

    def context(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Context:
        """What the blocks need beside their input; see :meth:`hidden_states` for the arguments."""
        if documents is not None and (cache is not None or mask is not None):
            raise NextLatError("documents cannot be combined with a cache or a mask; run packed rows without a cache")
        length = tokens.shape[1]
        layout = None if documents is None else document_layout(documents)
        if positions is None and cache is not None:
            positions = cache.positions(length)
        elif positions is None:
            positions = layout.positions if layout is not None else torch.arange(length, device=tokens.device)
        if cache is not None and mask is None:
            mask = cache.mask(length)
        turned = cache is None and self._turns_pay()  # all keys of a cache are in one order
        angles = rotary_turns if turned else rotary_angles
        return Context(angles(positions, self.n_heads, self.width // self.n_heads), layout, mask, cache)

    def _turns_pay(self) -> bool:
        """Complex numbers save their time on a CPU and in the backward pass, and know no bf16."""
        return self.complex_turns and own_gradients(self.embed_tokens.weight)

    def hidden_states(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        layers: list[Tensor] | None = None,
    ) -> Tensor:
        """States after the final norm, exactly what the output head reads.

        Args:
            tokens: (B, T) int64.
            documents: (B, T) ids of packed documents; excludes ``cache`` and ``mask``.
            positions: (T,) or (B, T) positions; by default they count from 0 in each document.
            mask: (T, S) or (B, 1, T, S) bool, True where a query may look.
            cache: keys and values of earlier positions, extended in place.
            layers: a list that receives the residual stream after the embedding and each block.

        Returns:
            (B, T, D).
        """
        context = self.context(tokens, documents, positions, mask, cache)
        u = run_blocks(self.layers, self.embed_tokens(tokens), context, self.checkpoint_activations, layers)
        if layers is not None:
            layers.append(u)
        if cache is not None:
            cache.advance(tokens.shape[1])
        h: Tensor = self.norm(u)
        return h

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_at: Tensor | None = None,
    ) -> LMOutput:
        """Next-token logits, at (B,) positions only if ``logits_at`` names them, and states.

        See :meth:`hidden_states` for the other arguments.
        """
        h = self.hidden_states(tokens, documents, positions, mask, cache)
        return LMOutput(logits=self.lm_head(states_at(h, logits_at)), hidden=h, cache=cache, probe_state=h)
