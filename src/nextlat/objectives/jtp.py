"""Joint multi-token prediction: a Fetch module combines a state with the tokens that follow it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nextlat import options
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model.cache import Cache
from nextlat.model.head import OutputHead, Readout
from nextlat.model.interfaces import CausalLM, LMOutput, states_at
from nextlat.model.trunk import Transformer
from nextlat.objectives.base import Objective, Term, check_horizon, check_weight
from nextlat.objectives.fetch import MAX_HEADS, Fetch, windows
from nextlat.objectives.immediate import Piece, immediate_sums
from nextlat.objectives.positions import at, counted, token_positions
from nextlat.objectives.token_losses import token_losses


class JTPOptions(options.Options):
    """``objectives.jtp``; see :class:`JTP` and :class:`Fetch`."""

    horizon: int = Field(1, ge=1)
    mtp_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    residual_next: bool = False
    gamma_init: float = Field(0.1, allow_inf_nan=False)
    relative_bias: bool = False
    rms_combine: bool = False


class JTP(Objective):
    """Cross-entropy plus the next d targets, each predicted from the state and the true tokens in between.

    Args:
        model: our trunk, or any model wrapped in :class:`TorchModel`.
        horizon: tokens d >= 1 beyond the next one.
        mtp_weight: lambda_MTP, weight of the further tokens together.
        heads: attention heads of Fetch.
        residual_next, gamma_init, relative_bias, rms_combine: see :class:`Fetch`.
        generator: source of the initial weights of Fetch.

    Raises:
        NextLatError: a horizon below 1, a negative or infinite weight, heads that do not divide the width.
    """

    Options = JTPOptions
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
        """The trunk and a Fetch module beside it."""
        return cls(trunk, **options.model_dump(), heads=min(MAX_HEADS, trunk.n_heads), generator=generator)

    def __init__(
        self,
        model: nn.Module,
        horizon: int = 1,
        mtp_weight: float = 1.0,
        residual_next: bool = False,
        gamma_init: float = 0.1,
        relative_bias: bool = False,
        rms_combine: bool = False,
        heads: int = MAX_HEADS,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model)
        self.horizon = check_horizon(horizon, 1)
        self.weight = check_weight("mtp_weight", mtp_weight)
        width = self.model.embedding_weight.shape[1]
        self.fetch = Fetch(width, horizon, heads, residual_next, gamma_init, relative_bias, rms_combine, generator)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Counts of ``ce`` and ``jtp_1 ... jtp_d``: positions whose target i steps ahead counts."""
        return {name: chosen.sum() for name, chosen in self._chosen(batch).items()}

    def forward(self, batch: Batch, scale: Mapping[str, float] | None = None) -> dict[str, Term]:
        """``ce`` with weight 1 and ``jtp_i`` with weight lambda_MTP / d.

        Windows that run past a document's or the row's end hold foreign tokens or zeros there. A slot sees
        only the slots before it, so these reach no prediction that is summed.
        """
        chosen = self._chosen(batch)
        hidden = self.model.hidden_states(batch.tokens, batch.documents)
        embeddings = F.embedding(batch.tokens, self.model.embedding_weight)
        fetched = self.fetch(hidden, windows(embeddings, len(chosen)))  # (B, T, d + 1, D)
        states = [at(mask, fetched[:, : mask.shape[1], step]) for step, mask in enumerate(chosen.values())]

        def piece(step: int, mask: Tensor) -> Piece:
            targets = at(mask, batch.targets[:, step:])
            return Piece(step, lambda *states: token_losses(states[step], self.model.head_weight, targets)[0])

        sums = immediate_sums(
            [piece(step, mask) for step, mask in enumerate(chosen.values())],
            len(chosen),
            states,
            [self.model.head_weight],
            None if scale is None else [float(scale[name]) for name in chosen],
        )
        return {
            name: Term(sums[step], mask.sum(), self.term_weight(name))
            for step, (name, mask) in enumerate(chosen.items())
        }

    def _chosen(self, batch: Batch) -> dict[str, Tensor]:
        """Positions that each active term sums over: ``ce``, then ``jtp_i`` (B, T - i)."""
        steps = range(1, self.horizon + 1 if self.weight else 1)
        return {"ce": counted(batch)} | {f"jtp_{step}": token_positions(batch, step) for step in steps}

    def term_weight(self, name: str) -> float:
        """1 for ``ce``, lambda_MTP / d for a further step."""
        return 1.0 if name == "ce" else self.weight / self.horizon

    def auxiliary(self) -> nn.Module:
        """The Fetch module."""
        return self.fetch

    def as_lm(self) -> JTPModel:
        """The trunk with slot 0 of Fetch, which the next-token prediction passes through."""
        return JTPModel(self)

    def drafter(self) -> JTPDrafter:
        """The further slots of Fetch."""
        return JTPDrafter(self)


class JTPModel:
    """The next-token model behind :class:`JTP`: trunk, slot 0 of Fetch, output head.

    ``hidden`` and ``probe_state`` are the trunk's states. Slot 0 sees only itself, so a cache is the trunk's.
    """

    def __init__(self, objective: JTP) -> None:
        self.objective = objective

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for ``rows`` rows of up to ``capacity`` positions."""
        return cast(CausalLM, self.objective.model).new_cache(rows, capacity)

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
        given = {"positions": positions, "mask": mask, "cache": cache}
        extra: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        hidden = objective.model.hidden_states(tokens, documents, **extra)
        embeddings = F.embedding(tokens, objective.model.embedding_weight)
        state = objective.fetch.alone(states_at(hidden, logits_at), states_at(embeddings, logits_at))
        # our trunk's head as a module, so that whatever stands in for it is used
        model = objective.model
        logits = model.lm_head(state) if isinstance(model, Transformer) else F.linear(state, model.head_weight)
        return LMOutput(logits, hidden, cache, probe_state=hidden, draft_features=embeddings)


class JTPState(NamedTuple):
    """A draft in progress."""

    hidden: Tensor
    """(B, D) trunk state at the last accepted position."""
    embedding: Tensor
    """(B, D) of the token there; slot 0 is made of it when a token is drafted."""
    keys: Tensor | None = None
    """(B, slots so far, heads, D / heads)."""
    values: Tensor | None = None
    """Likewise."""


class JTPDrafter:
    """Drafts the first token from the model's own logits, token i + 1 from slot i after the tokens drafted so far."""

    max_length: int | None
    vocabulary: Tensor | None = None
    network: None = None

    def __init__(self, objective: JTP) -> None:
        self.objective = objective
        self.head: Readout = OutputHead(objective.model)
        self.max_length = objective.horizon + 1

    def observe(self, output: LMOutput, accepted: Tensor) -> JTPState:
        """State after a call of the model.

        Args:
            output: of :class:`JTPModel`.
            accepted: (B,) index into the call's positions of each row's last accepted one.
        """
        rows = torch.arange(len(accepted), device=accepted.device)
        return JTPState(output.hidden[rows, accepted], output.draft_features[rows, accepted])

    def step(self, state: JTPState, token: Tensor) -> tuple[JTPState, Tensor]:
        """Feed (B,) tokens; next state and (B, V) logits of the token after them.

        Raises:
            NextLatError: the draft is d + 1 tokens long already.
        """
        slot = 1 if state.keys is None else state.keys.shape[1]
        if slot > self.objective.horizon:
            raise NextLatError(
                f"jtp with horizon = {self.objective.horizon} drafts at most {self.max_length} tokens a round; "
                f"draft {self.max_length} or fewer, or train with a longer horizon"
            )
        fetch = self.objective.fetch
        embedding = F.embedding(token, self.objective.model.embedding_weight)
        first = state.keys is None
        embeddings = torch.stack([state.embedding, embedding], 1) if first else embedding[:, None]
        slots = fetch.combine(state.hidden[:, None], embeddings)
        keys, values = fetch.keys_values(slots)
        if state.keys is not None and state.values is not None:
            keys, values = torch.cat([state.keys, keys], 1), torch.cat([state.values, values], 1)
        predicting = fetch.mix(state.hidden, slots[:, -1:], keys, values, first=slot)[:, 0]
        state = state._replace(keys=keys, values=values)
        return state, self.head(predicting)

    def select(self, state: JTPState, rows: Tensor) -> JTPState:
        """The state of chosen rows."""
        keys, values = (None if part is None else part[rows] for part in (state.keys, state.values))
        return JTPState(state.hidden[rows], state.embedding[rows], keys, values)
