"""Multi-token prediction with parallel heads (Gloeckle et al., arXiv 2404.19737)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from nextlat import options
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model.cache import Cache
from nextlat.model.head import OutputHead, Readout
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.model.norm import RMSNorm
from nextlat.model.rotary import Angles
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

    def remember(self, shared: Tensor, angles: Angles, cache: Cache, layer: int) -> None:
        """Store keys and values of (B, T, D) shared states without running the block."""
        cache.extend(layer, *self.block.self_attn.keys_values(self.block.input_layernorm(shared), angles))


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


class DraftFeatures(NamedTuple):
    """What the further heads need of one call of the model."""

    shared: Tensor
    """(B, T, D) residual stream after the shared blocks."""
    context: Context
    """Positions and visibility of that call; its cache holds the heads' keys and values up to that call."""


class _StoredKeys(Cache):
    """A cache as one call left it, read again for the same positions instead of being extended."""

    def __init__(self, cache: Cache) -> None:
        self.keys, self.values, self.lengths = cache.keys, cache.values, list(cache.lengths)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen = slice(self.longest)
        return self.keys[layer, :, :, seen].transpose(1, 2), self.values[layer, :, :, seen].transpose(1, 2)


class MTPModel:
    """The plain model behind :class:`MTP`: shared blocks, head 0 and the output head.

    ``hidden`` is the state of head 0; ``probe_state`` is the residual stream after the shared blocks, the
    last state that serves all heads. A cache also holds keys and values of the further heads, written along
    with the model's own, so that rolling it back rolls them back too.
    """

    def __init__(self, objective: MTP) -> None:
        self.objective = objective

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for ``rows`` rows of up to ``capacity`` positions."""
        model = self.objective.trunk
        layers = len(model.layers) + len(self.objective.heads)
        shape = (layers, rows, capacity, model.n_heads, model.width // model.n_heads)
        return Cache(shape, model.embedding_weight)

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
        context = objective.trunk.context(tokens, documents, positions, mask, cache)
        shared = objective.shared_states(tokens, context)
        hidden = objective.plain_head(shared, context)
        stored = None
        if cache is not None:
            for layer, head in enumerate(objective.heads, start=len(objective.trunk.layers)):
                cast(Head, head).remember(shared, context.angles, cache, layer)
            cache.advance(tokens.shape[1])
            stored = _StoredKeys(cache)
        features = DraftFeatures(shared, context._replace(cache=stored))
        logits = objective.trunk.lm_head(states_at(hidden, logits_at))
        return LMOutput(logits, hidden, cache, shared, draft_features=features)


class MTPState(NamedTuple):
    """A draft in progress."""

    states: Tensor
    """(B, d, D) states of the further heads at the last accepted position."""
    drafted: int
    """How many tokens have been fed since."""


class MTPDrafter:
    """Drafts the first token from the model's own logits, token j + 1 from head j, independent of each other."""

    max_length: int | None
    vocabulary: Tensor | None = None
    network: None = None

    def __init__(self, objective: MTP) -> None:
        self.objective = objective
        self.head: Readout = OutputHead(objective.trunk)
        self.max_length = objective.horizon + 1

    def observe(self, output: LMOutput, accepted: Tensor) -> MTPState:
        """State after a call of the model, before its cache is rolled back or reordered.

        Args:
            output: of :class:`MTPModel`.
            accepted: (B,) index into the call's positions of each row's last accepted one.
        """
        features: DraftFeatures = output.draft_features
        rows = torch.arange(len(accepted), device=accepted.device)
        steps = range(1, self.objective.horizon + 1)
        states = [self.objective.head_states(step, *features)[rows, accepted] for step in steps]
        return MTPState(torch.stack(states, 1), 0)

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
        logits = self.head(state.states[:, state.drafted])
        return state._replace(drafted=state.drafted + 1), logits

    def select(self, state: MTPState, rows: Tensor) -> MTPState:
        """The state of chosen rows."""
        return state._replace(states=state.states[rows])
