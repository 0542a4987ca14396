"""The belief state transformer (Hu et al., arXiv 2410.23506): prefix and suffix together predict what touches them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nextlat import options
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model.cache import Cache
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.model.norm import RMSNorm
from nextlat.model.trunk import (
    Block,
    Context,
    FeedForward,
    Transformer,
    feed_forward_width,
    init_normal,
    multiplied,
    run_blocks,
)
from nextlat.objectives.base import Objective, Term
from nextlat.objectives.immediate import Piece, immediate_sums, zero_sums
from nextlat.objectives.pairs import Pairs, check_next_token, sample_pairs, suffixes
from nextlat.objectives.token_losses import token_losses

PAIRS_AT_ONCE = {"cpu": 4608, "cuda": 32768}
"""How many pairs the text head takes together: on a CPU few enough for its caches, as far as calls do not cost more."""


class Encoder(nn.Module):
    """Blocks and final norm of a trunk, without embedding and output head."""

    def __init__(self, width: int, n_heads: int, n_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))
        self.norm = RMSNorm(width)

    def forward(self, u: Tensor, context: Context, recompute: bool) -> Tensor:
        """(B, T, D) embeddings -> (B, T, D) states."""
        state: Tensor = self.norm(run_blocks(self.layers, u, context, recompute))
        return state


class TextHead(nn.Module):
    """``RMSNorm(q + SwiGLU(q))`` of ``q = [f ; b]``: one half speaks of the next token, one of the previous."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = FeedForward(2 * width, feed_forward_width(2 * width))
        self.norm = RMSNorm(2 * width)

    def forward(self, prefix: Tensor, suffix: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) forward and backward states -> (..., D) states of the next and of the previous token."""
        q = torch.cat([prefix, suffix], -1)
        return self._read(q, self.mlp(q))

    def prepared(self, prefixes: Tensor, suffixes: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`pairs` looks up rows of: the states, (2 N, D), and what they add to gate and up.

        The first layer is linear in q, so it is a sum of what each half adds, and there are fewer states than pairs
        by half the length of a document.
        """
        width = prefixes.shape[-1]
        weight = torch.cat([self.mlp.gate_proj.weight, self.mlp.up_proj.weight])  # (2 m, 2 D)
        added = torch.cat([F.linear(prefixes, weight[:, :width]), F.linear(suffixes, weight[:, width:])])
        return torch.cat([prefixes, suffixes]), added

    def pairs(self, ends: Tensor, states: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """(P, D) states of the next and of the previous token, from (P, 2) rows of what :meth:`prepared` made."""
        q = states.index_select(0, ends.flatten()).view(-1, 2 * states.shape[1])
        gated: Tensor = _GatedPairs.apply(ends, added)  # type: ignore[no-untyped-call]
        return self._read(q, multiplied(self.mlp.down_proj, gated))

    def _read(self, q: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        following, previous = self.norm(q + change).chunk(2, -1)
        return following, previous


class _GatedPairs(torch.autograd.Function):
    """``silu(gate) * up`` of ``[gate ; up] = table[ends[:, 0]] + table[ends[:, 1]]``.

    Written out so that neither the two looked up halves nor the gradients through them are tensors of their own.
    """

    @staticmethod
    def forward(ctx: Any, ends: Tensor, table: Tensor) -> Tensor:
        both = F.embedding_bag(ends, table, mode="sum")
        gate, up = both.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(ends, both, activated)
        ctx.rows = len(table)
        return activated * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        ends, both, activated = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, -1)
        torch.mul(upstream, activated, out=d_up)
        torch.ops.aten.silu_backward.grad_input(upstream * up, gate, grad_input=d_gate)
        d_table = both.new_zeros(ctx.rows, both.shape[1])
        return None, d_table.index_add_(0, ends[:, 0], d_both).index_add_(0, ends[:, 1], d_both)


class BeliefNetworks(nn.Module):
    """What is trained beside the plain model: backward encoder and text head."""

    def __init__(self, trunk: Transformer, generator: torch.Generator | None) -> None:
        super().__init__()
        self.backward_encoder = Encoder(trunk.width, trunk.n_heads, len(trunk.layers))
        self.text_head = TextHead(trunk.width)
        init_normal(self, generator if generator is not None else torch.default_generator)


class BSTOptions(options.Options):
    """``objectives.bst``; see :class:`BST`."""

    min_gap: int = Field(1, ge=1)
    max_gap: int | None = Field(None, ge=1)
    pair_fraction: float = Field(1.0, gt=0, le=1)
    gap_one: Literal["eos", "copy"] = "eos"


class BST(Objective):
    """Next and previous token from every pair of a prefix and a suffix of a document.

    A forward encoder (the plain model) reads the prefix up to t, a backward encoder the suffix from s > t; from
    both states a text head predicts the token after the prefix and the one before the suffix.

    Args:
        model: our trunk, which becomes the forward encoder.
        end_token: id of the end token, the empty suffix.
        min_gap: least s - t. With 2, the pairs that teach stopping vanish: only for answers of fixed length.
        max_gap: greatest s - t, inclusive; ``None`` for no bound.
        pair_fraction: part of each row's pairs that is kept on average.
        gap_one: targets when nothing lies between prefix and suffix: ``"eos"`` the end token twice, ``"copy"``
            the suffix's first and the prefix's last token.
        chunk_pairs: most pairs processed at once, by default :data:`PAIRS_AT_ONCE`; the result does not depend on it.
        generator: source of the initial weights of backward encoder and text head, N(0, 0.02^2).

    Raises:
        NextLatError: another model than our trunk, no end token, an option out of range.
    """

    Options = BSTOptions
    stock_model = False

    @classmethod
    def build(
        cls,
        trunk: Transformer,
        options: options.Options,
        *,
        generator: torch.Generator,
        end_token: int | None,
        next_token: bool,
    ) -> Self:
        """The trunk as forward encoder, a second one for suffixes, and the text head."""
        if not next_token:
            raise NextLatError(
                "bst needs a next-token task, and this task's targets are not the tokens that follow; "
                "train it with gpt, mtp, jtp or nextlat"
            )
        return cls(trunk, end_token, **options.model_dump(), generator=generator)

    def __init__(
        self,
        model: nn.Module,
        end_token: int | None,
        min_gap: int = 1,
        max_gap: int | None = None,
        pair_fraction: float = 1.0,
        gap_one: Literal["eos", "copy"] = "eos",
        chunk_pairs: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(model, Transformer):
            raise NextLatError(
                f"bst needs the blocks of nextlat's own Transformer, and got {type(model).__name__}; "
                "train this model with gpt, jtp or nextlat"
            )
        super().__init__(model)
        if end_token is None:
            raise NextLatError("bst reads the end token as the empty suffix, and this task has none; give it one")
        if min_gap < 1:
            raise NextLatError(f"min_gap is {min_gap}; it must be at least 1")
        if max_gap is not None and max_gap < min_gap:
            raise NextLatError(f"max_gap is {max_gap}, below min_gap = {min_gap}; raise it, or leave it out")
        if not 0 < pair_fraction <= 1:
            raise NextLatError(f"pair_fraction is {pair_fraction}; it must be above 0 and at most 1")
        if gap_one not in ("eos", "copy"):
            raise NextLatError(f"gap_one is {gap_one!r}; it must be 'eos' or 'copy'")
        self.end_token, self.gap_one = end_token, gap_one
        self.min_gap, self.max_gap, self.pair_fraction = min_gap, max_gap, pair_fraction
        self.chunk_pairs = chunk_pairs
        self.networks = BeliefNetworks(model, generator)

    @property
    def trunk(self) -> Transformer:
        """The plain model: the forward encoder, the embedding table and the output head."""
        return cast(Transformer, self.model)

    def pairs(self, batch: Batch) -> Pairs:
        """The pairs of a batch; see :func:`sample_pairs`."""
        check_next_token(batch)
        return sample_pairs(batch, self.end_token, self.min_gap, self.max_gap, self.pair_fraction)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``{"pair": two predictions for each pair}``."""
        row = self.pairs(batch).row
        return {"pair": row.new_tensor(2 * len(row))}

    def forward(self, batch: Batch, scale: Mapping[str, float] | None = None) -> dict[str, Term]:
        """``{"pair": ...}`` with weight 1; its halves, ``next`` and ``prev``, are in :attr:`logged`.

        Both encoders run once. Pairs grow with the square of the document length, so the text head takes them
        in chunks and differentiates each at once.
        """
        pairs = self.pairs(batch)
        row, t, p = pairs
        first = row * batch.tokens.shape[1]
        prefixes, t_row = _those_used(self.trunk.hidden_states(batch.tokens, batch.documents), first + t)
        behind, p_row = _those_used(self.suffix_states(batch), first + p)
        following, previous = batch.targets[row, t], batch.tokens[row, p]
        if self.gap_one == "eos":
            touching = t == p
            following, previous = (x.masked_fill(touching, self.end_token) for x in (following, previous))
        ends = torch.stack([t_row, len(prefixes) + p_row], 1)  # (P, 2) rows of prefixes, and of states behind
        head, states = self.networks.text_head, self.networks.text_head.prepared(prefixes, behind)
        halves = zero_sums(2, prefixes)
        most = self.chunk_pairs or PAIRS_AT_ONCE.get(prefixes.device.type, PAIRS_AT_ONCE["cpu"])
        parts = max(1, math.ceil(len(row) / most))

        def piece(ends: Tensor, *asked: Tensor) -> Piece:
            def value(*made: Tensor) -> Tensor:
                pair = head.pairs(ends, *made)
                sums = [token_losses(s, self.trunk.head_weight, y)[0] for s, y in zip(pair, asked, strict=True)]
                halves.add_(torch.stack(sums).detach())
                return sums[0] + sums[1]

            return Piece(0, value)

        total = immediate_sums(
            [piece(*part) for part in zip(*(x.chunk(parts) for x in (ends, following, previous)), strict=True)],
            1,
            states,
            [*head.parameters(), self.trunk.head_weight],
        )[0]
        half = row.new_tensor(len(row))
        self.logged = {"next": Term(halves[0], half, 0.0), "prev": Term(halves[1], half, 0.0)}
        return {"pair": Term(total, 2 * half, 1.0)}

    def suffix_states(self, batch: Batch) -> Tensor:
        """(B, T, D) backward states: entry p is that of the suffix that starts at p + 1.

        The row is read from its end, so that a suffix is a prefix and its document's last token has position 0.
        """
        suffix = suffixes(batch, self.end_token)
        # The unused place behind an open document must not be seen, nor counted as a position.
        runs = suffix.run.masked_fill(~suffix.used, -1).flip(1)
        backward_tokens = suffix.tokens.flip(1)
        return self._encode_backward(backward_tokens, runs).flip(1)

    def empty_suffix(self) -> Tensor:
        """(D,) backward state of a lone end token: nothing follows."""
        token = torch.full((1, 1), self.end_token, device=self.trunk.embedding_weight.device)
        return self._encode_backward(token, None)[0, 0]

    def _encode_backward(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        context = self.trunk.context(tokens, documents)
        embeddings, recompute = self.trunk.embed_tokens(tokens), self.trunk.checkpoint_activations
        states: Tensor = self.networks.backward_encoder(embeddings, context, recompute)
        return states

    def auxiliary(self) -> nn.Module:
        """Backward encoder and text head."""
        return self.networks

    def as_lm(self) -> BSTModel:
        """The forward encoder and the text head with the empty suffix."""
        return BSTModel(self)


def _those_used(states: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, T, D) states the (N, D) that are in a pair, by (P,) places in B * T; and where among them the places are.

    Behind a long prompt most are in none.
    """
    flat = states.flatten(0, 1)
    used = torch.zeros(len(flat), dtype=torch.bool, device=flat.device).index_fill_(0, rows, True)
    if used.all():
        return flat, rows
    return flat.index_select(0, used.nonzero()[:, 0]), (used.cumsum(0) - 1)[rows]


class BSTModel:
    """The next-token model behind :class:`BST`: forward encoder and text head with nothing behind the prefix.

    ``hidden`` and ``probe_state`` are the forward states.
    """

    def __init__(self, objective: BST) -> None:
        self.objective = objective
        self.empty: Tensor | None = None

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for ``rows`` rows of up to ``capacity`` positions."""
        return self.objective.trunk.new_cache(rows, capacity)

    def __call__(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_at: Tensor | None = None,
    ) -> LMOutput:
        """Next-token logits, at (B,) positions only if ``logits_at`` names them, and states of (B, T) tokens."""
        model = self.objective.trunk
        # Weights do not change within a sequence that a cache continues, and may before any other call.
        if self.empty is None or cache is None or not cache.longest:
            self.empty = self.objective.empty_suffix()
        hidden = model.hidden_states(tokens, documents, positions, mask, cache)
        read = states_at(hidden, logits_at)
        following, _ = self.objective.networks.text_head(read, self.empty.expand_as(read))
        return LMOutput(model.lm_head(following), hidden, cache, probe_state=hidden)
