"""Multi-token prediction with parallel heads (Gloeckle et al., arXiv 2404.19737)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from nextlat import options
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model.attention import attend
from nextlat.model.cache import Cache
from nextlat.model.head import OutputHead, Readout
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.model.norm import RMSNorm
from nextlat.model.rotary import Angles, rotary_angles
from nextlat.model.trunk import Block, Context, Transformer, init_normal, run_blocks
from nextlat.objectives.base import Objective, Term, check_horizon, check_weight
from nextlat.objectives.immediate import Piece, immediate_sums
from nextlat.objectives.positions import at, counted, token_positions
from nextlat.objectives.token_losses import token_losses


class Head(nn.Module):
    """One trunk block and its own final norm, on top of the shared blocks."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.block = Block(width, n_heads)
        self.norm = RMSNorm(width)

    def forward(self, shared: Tensor, context: Context, layer: int) -> Tensor:
        """(B, T, D) shared states -> (B, T, D) states for the output head."""
        state: Tensor = self.norm(self.block(shared, *context, layer))
        return state

    def behind(self, cache: HeadsCache, number: int, ends: Sequence[int]) -> Tensor:
        """(B, D) states for the output head at the last position that each row of a cache shall look at.

        The block is run there only. Before that, keys and values are made of the positions that this head lacks.

        Args:
            cache: of the model.
            number: of this head, from 0.
            ends: for each row of the cache, how many of its positions are looked at; at least 1.
        """
        rows, places = where = cache.unseen(number, ends)
        keys, values = (part.transpose(1, 2) for part in cache.of_head(number))  # (B, capacity, n_heads, head_width)
        shared = cache.shared[0, :, 0][where]
        # queries of all these positions: mostly two or three, and one product more costs less than cutting angles
        _, queries, keys[where], values[where] = self.block.project(shared, *(part[places] for part in cache.angles))
        stop, mask = max(ends), None
        if isinstance(rows, Tensor):
            mask = torch.arange(stop, device=rows.device) < torch.tensor(ends, device=rows.device)[:, None]
            mask = mask[:, None, None]
        attended = attend(queries[:, -1:], keys[:, :stop], values[:, :stop], mask=mask)
        state: Tensor = self.norm(self.block.mix(shared[:, -1:], attended))
        return state[:, 0]


class MTPOptions(options.Options):
    """``objectives.mtp``; see :class:`MTP`."""

    horizon: int = Field(1, ge=0)
    mtp_weight: float = Field(1.0, ge=0, allow_inf_nan=False)


class MTP(Objective):
    """Cross-entropy plus one parallel head for each further token.

    All blocks but the last are shared. Head j = 0 ... d is one more block with its own norm, reads the shared
    states and predicts the target j positions ahead from tokens up to its own position only; one output head
    serves them all. Head 0 is the last block and the final norm of the plain model, so that the plain model is
    an ordinary trunk of ``n_layers`` blocks and horizon 0 is plain next-token prediction.

    Args:
        model: our trunk.
        horizon: number d >= 0 of heads beyond the next token.
        mtp_weight: lambda_MTP, weight of the further heads together; at 0 they are not trained.
        generator: source of the initial weights of the further heads, N(0, 0.02^2).

    Raises:
        NextLatError: another model than our trunk, a negative horizon, a negative or infinite weight.
    """

    Options = MTPOptions

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
        """The trunk and the further heads beside it."""
        return cls(trunk, **options.model_dump(), generator=generator)

    def __init__(
        self,
        model: nn.Module,
        horizon: int = 1,
        mtp_weight: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(model, Transformer):
            raise NextLatError(
                f"mtp needs the blocks of nextlat's own Transformer, and got {type(model).__name__}; "
                "train this model with gpt, jtp or nextlat"
            )
        super().__init__(model)
        self.horizon = check_horizon(horizon, 0)
        self.weight = check_weight("mtp_weight", mtp_weight)
        self.heads = nn.ModuleList(Head(model.width, model.n_heads) for _ in range(horizon))
        init_normal(self.heads, generator if generator is not None else torch.default_generator)
        # Data-parallel training waits for every parameter that may get a gradient.
        self.heads.requires_grad_(self.weight > 0)

    @property
    def trunk(self) -> Transformer:
        """The plain model."""
        return cast(Transformer, self.model)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Counts of ``ce`` and ``mtp_1 ... mtp_d``: positions whose target i steps ahead counts."""
        return {name: chosen.sum() for name, chosen in self._chosen(batch).items()}

    def forward(self, batch: Batch, scale: Mapping[str, float] | None = None) -> dict[str, Term]:
        """``ce`` with weight 1 and ``mtp_i`` with weight lambda_MTP / d.

        The shared blocks are run once. Then one head at a time is run and differentiated into the shared
        states, so only one head's activations and logits exist at once.
        """
        chosen = self._chosen(batch)
        context = self.trunk.context(batch.tokens, batch.documents)
        shared = self.shared_states(batch.tokens, context)
        if len(chosen) == 1:
            hidden = at(chosen["ce"], self.plain_head(shared, context))
            (ce,) = token_losses(hidden, self.trunk.head_weight, at(chosen["ce"], batch.targets))
            return {"ce": Term(ce, chosen["ce"].sum(), 1.0)}

        last = self.trunk.layers[len(self.trunk.layers) - 1]

        def piece(step: int, mask: Tensor) -> Piece:
            def value(z: Tensor) -> Tensor:
                state = at(mask, self.head_states(step, z, context)[:, : mask.shape[1]])  # (#C_i, D)
                return token_losses(state, self.trunk.head_weight, at(mask, batch.targets[:, step:]))[0]

            return Piece(step, value)

        sums = immediate_sums(
            [piece(step, mask) for step, mask in enumerate(chosen.values())],
            len(chosen),
            [shared],
            [*last.parameters(), *self.trunk.norm.parameters(), *self.heads.parameters(), self.trunk.head_weight],
            None if scale is None else [float(scale[name]) for name in chosen],
        )
        return {
            name: Term(sums[step], mask.sum(), self.term_weight(name))
            for step, (name, mask) in enumerate(chosen.items())
        }

    def _chosen(self, batch: Batch) -> dict[str, Tensor]:
        """Positions that each active term sums over: ``ce``, then ``mtp_i`` (B, T - i)."""
        steps = range(1, self.horizon + 1 if self.weight else 1)
        return {"ce": counted(batch)} | {f"mtp_{step}": token_positions(batch, step) for step in steps}

    def shared_states(self, tokens: Tensor, context: Context) -> Tensor:
        """(B, T, D) the residual stream that all heads read; no norm."""
        shared = list(self.trunk.layers)[:-1]
        return run_blocks(shared, self.trunk.embed_tokens(tokens), context, self.trunk.checkpoint_activations)

    def plain_head(self, shared: Tensor, context: Context) -> Tensor:
        """(B, T, D) head 0: the last block and the final norm of the plain model."""
        last = len(self.trunk.layers) - 1
        state: Tensor = self.trunk.norm(self.trunk.layers[last](shared, *context, last))
        return state

    def head_states(self, step: int, shared: Tensor, context: Context) -> Tensor:
        """(B, T, D) states of head ``step``; beyond head 0, keys and values lie behind the plain model's."""
        if step == 0:
            return self.plain_head(shared, context)
        state: Tensor = self.heads[step - 1](shared, context, len(self.trunk.layers) + step - 1)
        return state

    def term_weight(self, name: str) -> float:
        """1 for ``ce``, lambda_MTP / d for a further step."""
        return 1.0 if name == "ce" else self.weight / self.horizon

    def auxiliary(self) -> nn.Module | None:
        """The further heads."""
        return self.heads if len(self.heads) else None

    def as_lm(self) -> MTPModel:
        """The plain model, which also keeps what the drafter needs."""
        return MTPModel(self)

    def drafter(self) -> MTPDrafter | None:
        """The further heads; ``None`` if there are none."""
        return MTPDrafter(self) if self.horizon else None


class HeadsCache(Cache):
    """A cache that also holds what the further heads read, for drafts that may come or not.

    Every call stores the shared residual stream. A head's keys and values are made of it when the head first drafts,
    and then only of positions that are new to it: who does not draft does not pay for heads. What was forgotten
    and written anew since is new.

    Args:
        shape: (n_layers, rows, capacity, n_heads, head_width) of the plain model.
        heads: number of further heads; their keys and values lie behind the plain model's.
        like: a tensor whose dtype and device the cache takes.
    """

    stores = (*Cache.stores, "shared")

    def __init__(self, shape: tuple[int, int, int, int, int], heads: int, like: Tensor) -> None:
        layers, rows, capacity, n_heads, head_width = shape
        super().__init__((layers + heads, *shape[1:]), like)
        self.plain_layers = layers
        self.shared = torch.zeros(1, rows, 1, capacity, n_heads * head_width, dtype=like.dtype, device=like.device)
        """The residual stream after the shared blocks."""
        self.known = [[0] * rows for _ in range(heads)]
        """For each head, of how many positions of each row it has keys and values."""
        self.rows = list(range(rows))
        """Which row of the last call each row is."""

    @cached_property
    def angles(self) -> Angles:
        """Of all positions."""
        _, _, n_heads, capacity, head_width = self.keys.shape
        return rotary_angles(torch.arange(capacity, device=self.keys.device), n_heads, head_width)

    def of_head(self, number: int) -> tuple[Tensor, Tensor]:
        """(B, n_heads, capacity, head_width) keys and values of a further head."""
        return self.keys[self.plain_layers + number], self.values[self.plain_layers + number]

    def store(self, shared: Tensor) -> None:
        """Put (B, T, D) shared states behind each row's length; what the heads knew there is forgotten."""
        self._forget(self.lengths)
        self.rows = list(range(len(self.lengths)))
        self.put(self.shared[0], shared[:, :, None])

    def unseen(self, number: int, ends: Sequence[int]) -> tuple[slice | Tensor, slice | Tensor]:
        """Index (rows, positions) of W positions before ``ends`` that hold all that a head lacks; it now knows them.

        Each row's last one is always among them, because the head is asked there.
        """
        known = self.known[number]
        self.known[number] = [max(pair) for pair in zip(known, ends, strict=True)]
        width = max(1, *(end - begin for end, begin in zip(ends, known, strict=True)))
        stop = max(ends)
        if min(ends) == stop:
            return slice(None), slice(stop - width, stop)
        device = self.keys.device
        places = torch.tensor(ends, device=device)[:, None] + torch.arange(-width, 0, device=device)
        # a row with fewer positions makes its first one several times, and the same each time
        return torch.arange(len(ends), device=device)[:, None], places.clamp(min=0)

    def keep(self, places: Sequence[Sequence[int]], begins: Sequence[int]) -> None:
        """As of any cache; what is moved is new to the heads."""
        super().keep(places, begins)
        self._forget(begins)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with chosen rows only, in the order given."""
        super().select(rows)
        self.rows = [self.rows[row] for row in rows]
        self.known = [[known[row] for row in rows] for known in self.known]

    def _forget(self, lengths: Sequence[int]) -> None:
        self.known = [[min(pair) for pair in zip(known, lengths, strict=True)] for known in self.known]


class DraftFeatures(NamedTuple):
    """What the further heads need of one call of the model."""

    shared: Tensor
    """(B, T, D) residual stream after the shared blocks."""
    context: Context
    """Positions and visibility of that call, and its cache."""
    positions: Tensor | None
    """(T,) or (B, T) positions of a call with a cache."""


class MTPModel:
    """The plain model behind :class:`MTP`: shared blocks, head 0 and the output head.

    ``hidden`` is the state of head 0; ``probe_state`` is the residual stream after the shared blocks, the
    last state that serves all heads. A cache also holds that stream, so that heads can draft from it.
    """

    def __init__(self, objective: MTP) -> None:
        self.objective = objective

    def new_cache(self, rows: int, capacity: int) -> HeadsCache:
        """An empty cache for ``rows`` rows of up to ``capacity`` positions."""
        model = self.objective.trunk
        shape = (len(model.layers), rows, capacity, model.n_heads, model.width // model.n_heads)
        return HeadsCache(shape, len(self.objective.heads), model.embedding_weight)

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
        objective = self.objective
        if cache is not None and not isinstance(cache, HeadsCache):
            raise NextLatError(f"mtp got a {type(cache).__name__}; decode with a cache of its own new_cache()")
        if cache is not None and positions is None:
            positions = cache.positions(tokens.shape[1])
        context = objective.trunk.context(tokens, documents, positions, mask, cache)
        shared = objective.shared_states(tokens, context)
        hidden = objective.plain_head(shared, context)
        if cache is not None:
            cache.store(shared)
            cache.advance(tokens.shape[1])
        features = DraftFeatures(shared, context, positions)
        logits = objective.trunk.lm_head(states_at(hidden, logits_at))
        return LMOutput(logits, hidden, cache, shared, draft_features=features)


@dataclass
class Accepted:
    """A call of the model, and the last accepted position of each of its rows."""

    features: DraftFeatures
    index: Tensor
    """(B,) among the positions of the call."""

    @cached_property
    def ends(self) -> list[int]:
        """How many positions of a cache each row may look at, once it holds the accepted ones only."""
        positions = self.features.positions
        assert positions is not None
        last = positions.expand(len(self.index), -1).gather(1, self.index[:, None])
        return [place + 1 for place in last[:, 0].tolist()]


class MTPState(NamedTuple):
    """A draft in progress; a head is run when its token is asked for."""

    call: Accepted
    rows: list[int]
    """Rows of the call that are drafted for."""
    drafted: int
    """How many tokens have been fed since."""


class MTPDrafter:
    """Drafts the first token from the model's own logits, token j + 1 from head j, independent of each other.

    A step runs one head at one position of each row. It reads the cache of the call that was observed: roll it back to
    the accepted positions before drafting, and draft before the model's next call.
    """

    max_length: int | None
    vocabulary: Tensor | None = None
    network: None = None

    def __init__(self, objective: MTP) -> None:
        self.objective = objective
        self.head: Readout = OutputHead(objective.trunk)
        self.max_length = objective.horizon + 1

    def observe(self, output: LMOutput, accepted: Tensor) -> MTPState:
        """State after a call of the model.

        Args:
            output: of :class:`MTPModel`.
            accepted: (B,) index into the call's positions of each row's last accepted one.
        """
        return MTPState(Accepted(output.draft_features, accepted), list(range(len(accepted))), 0)

    def step(self, state: MTPState, token: Tensor) -> tuple[MTPState, Tensor]:
        """Next state and (B, V) logits of the next token; they do not depend on the token fed.

        Raises:
            NextLatError: the draft is d + 1 tokens long already.
        """
        if state.drafted >= self.objective.horizon:
            raise NextLatError(
                f"mtp with horizon = {self.objective.horizon} drafts at most {self.max_length} tokens a round; "
                f"draft {self.max_length} or fewer, or train with a longer horizon"
            )
        held, states = self._states(state.call, state.drafted)
        logits = self.head(states)
        if state.rows != held:
            place = {row: i for i, row in enumerate(held)}
            logits = logits[torch.tensor([place[row] for row in state.rows], device=logits.device)]
        return state._replace(drafted=state.drafted + 1), logits

    def _states(self, call: Accepted, number: int) -> tuple[list[int], Tensor]:
        """Rows of a call, and the (B, D) states of a further head, numbered from 0, at what was accepted of them."""
        shared, context, _ = call.features
        cache = context.cache
        if isinstance(cache, HeadsCache):
            head = cast(Head, self.objective.heads[number])
            return cache.rows, head.behind(cache, number, [call.ends[row] for row in cache.rows])
        rows = torch.arange(len(call.index), device=call.index.device)
        return rows.tolist(), self.objective.head_states(number + 1, shared, context)[rows, call.index]

    def select(self, state: MTPState, rows: Tensor) -> MTPState:
        """The state of chosen rows."""
        return state._replace(rows=[state.rows[row] for row in rows.tolist()])
