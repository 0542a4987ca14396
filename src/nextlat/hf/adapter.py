"""A Hugging Face causal language model behind the three things an objective needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.errors import NextLatError
from nextlat.model.attention import document_layout, run_index
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.objectives.base import StateModel
from nextlat.objectives.trials import check_packing, close, evaluating, trial

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask of one value for every pair of positions."""
_TRIAL = 8
"""Tokens of the rows that a model is tried on."""
_FAR = 100.0
"""A logit that no cap lets through as it is."""


class HFModel(StateModel):
    """Presents a model of the transformers library; adds nothing to it and changes nothing in it.

    States are those after the final norm: what ``last_hidden_state`` of the model's body holds and the output head
    reads. That the head times these states gives the model's own logits is checked on a few tokens when the
    adapter is made; that packed documents do not see each other, when the first packed rows arrive.

    Args:
        model: any causal language model whose logits are a bias-free linear function of its last state; peft
            may have put adapters into its blocks.

    Raises:
        NextLatError: no input or output embeddings, widths that differ, a head with a bias, logits that are
            capped, scaled or otherwise more than head times state, adapters in embeddings or head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._packs = False
        self._check_head()

    @property
    def embedding_weight(self) -> Tensor:
        """(V, D) the input embedding table."""
        weight: Tensor = self._hf.get_input_embeddings().weight
        return weight

    @property
    def head_weight(self) -> Tensor:
        """(V, D) the output head."""
        weight: Tensor = self._hf.get_output_embeddings().weight
        return weight

    def hidden_states(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: TokenCache | None = None,
    ) -> Tensor:
        """(B, T, D) states after the final norm.

        Args:
            tokens: (B, T) int64.
            documents: (B, T) ids of packed documents; excludes ``mask``.
            positions: (T,) or (B, T) positions; by default they count from 0 in each document.
            mask: (T, T) or (B, 1, T, T) bool, True where a query may look.
            cache: what came before each row; excludes all the others. With one the model decodes, and dropout is off
                whatever mode it is in.
        """
        if cache is not None:
            if documents is not None or positions is not None or mask is not None:
                raise NextLatError(
                    "a Hugging Face model takes a cache with tokens alone: no documents, positions or mask"
                )
            whole, places = cache.extended(tokens)
            with evaluating(self.model) if self.model.training else nullcontext():
                states = self._states(whole)
            return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
        if documents is not None:
            if mask is not None:
                raise NextLatError("documents cannot be combined with a mask; give one of them")
            self._check_packing(tokens.shape[1])
        return self._states(tokens, documents, positions, mask)

    def _states(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        given: dict[str, Any] = {}
        if documents is not None:
            positions, mask = document_layout(documents).positions, document_mask(documents)
        if positions is not None:
            given["position_ids"] = positions if positions.ndim == 2 else positions[None]
        if mask is not None:
            given["attention_mask"] = self._as_taken(mask if mask.ndim == 4 else mask[None, None])
        states: Tensor = self._hf.base_model(input_ids=tokens, use_cache=False, **given).last_hidden_state
        return states

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: TokenCache | None = None,
        logits_at: Tensor | None = None,
    ) -> LMOutput:
        """Next-token logits, at (B,) positions only if ``logits_at`` names them, and :meth:`hidden_states`."""
        h = self.hidden_states(tokens, documents, positions, mask, cache)
        logits = F.linear(states_at(h, logits_at), self.head_weight)
        return LMOutput(logits, hidden=h, cache=cache, probe_state=h)  # type: ignore[arg-type]

    def new_cache(self, rows: int, capacity: int) -> TokenCache:
        """An empty cache for ``rows`` rows of up to ``capacity`` positions."""
        return TokenCache(torch.zeros(rows, capacity, dtype=torch.int64, device=self.embedding_weight.device))

    @property
    def _hf(self) -> Any:
        """The model itself: what peft puts around one names its own layers ``base_model``."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def _text_config(self) -> Any:
        """The configuration of the decoder, which models of several kinds of input keep in a section."""
        return self._hf.config.get_text_config()

    def _as_taken(self, mask: Tensor) -> Tensor:
        """The bool mask as this attention implementation reads it: eager attention adds it to the scores."""
        if self._attention() == "eager":
            dtype = self.embedding_weight.dtype
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask

    def _attention(self) -> str:
        return str(self._hf.config._attn_implementation)

    def _check_head(self) -> None:
        name = type(self._hf).__name__
        head, table = self._hf.get_output_embeddings(), self._hf.get_input_embeddings()
        if head is None or table is None or self._hf.base_model is self._hf:
            raise NextLatError(
                f"{name} has no body with an output head on top; give a causal language model, such as one of "
                "AutoModelForCausalLM"
            )
        for part, module in (("output head", head), ("embedding", table)):
            if hasattr(module, "base_layer"):  # the mark of a layer that peft adds a trained change to
                raise NextLatError(
                    f"the {part} of {name} is an adapter ({type(module).__name__}) whose trained change its weight "
                    "does not show; leave it out of target_modules"
                )
        if getattr(head, "bias", None) is not None:
            raise NextLatError(f"the output head of {name} has a bias, and an objective reads its logits as W h alone")
        if head.weight.shape[1] != table.weight.shape[1]:
            raise NextLatError(
                f"embeddings of {name} are {table.weight.shape[1]} wide and states {head.weight.shape[1]}; "
                "the latent dynamics needs both of one width"
            )
        cap = getattr(self._text_config, "final_logit_softcapping", None)
        if cap is not None:
            raise NextLatError(
                f"{name} caps its logits (final_logit_softcapping is {cap}), and the losses on predicted states would "
                "not match them; use a model without a cap, or set it to None and train with that"
            )
        tokens = (torch.arange(1, _TRIAL + 1, device=table.weight.device) % len(table.weight))[None]
        with trial(self.model, table.weight.device):
            expected = self._logits(tokens)
            found = F.linear(self.hidden_states(tokens), self.head_weight).float()
            unchanged = self._hands_out_head(tokens)
        same = found.shape == expected.shape and close(found, expected, self.embedding_weight.dtype, 8)
        if not (same and unchanged):
            raise NextLatError(
                f"the logits of {name} are not its output head times its last state: they are capped, scaled or "
                "shifted, or more is put before its input, and the losses on predicted states would not match them. "
                "Wrap it in nextlat.TorchModel with states that fit"
            )

    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits.float()

    def _hands_out_head(self, tokens: Tensor) -> bool:
        """Whether what the head computes leaves the model as it is.

        Tried with made-up values, because a cap moves small ones by less than bf16 rounds.
        """
        given: list[Tensor] = []

        def replace(head: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            wide = torch.linspace(-_FAR, _FAR, output.shape[-1], dtype=output.dtype, device=output.device)
            given.append(wide.expand_as(output).float())
            return wide.expand_as(output).clone()

        handle = self._hf.get_output_embeddings().register_forward_hook(replace)
        try:
            found = self._logits(tokens)
        finally:
            handle.remove()
        return not given or torch.equal(found, given[0])  # a model may read the weight without calling the module

    def _check_packing(self, length: int) -> None:
        """Refuse packed rows where documents would see each other."""
        name = type(self._hf).__name__
        attention = self._attention()
        if attention not in MASKED_ATTENTION:
            raise NextLatError(
                f"packed documents need a mask for every pair of positions, and {name} uses {attention!r} attention; "
                "load it with attn_implementation='sdpa', or train on rows of one document (documents=None)"
            )
        window = getattr(self._text_config, "sliding_window", None)
        if window is not None and length > window:
            raise NextLatError(
                f"rows of {length} tokens are longer than the sliding window ({window}) of {name}, which a mask for "
                "packed documents would widen; pack shorter rows, or train on rows of one document (documents=None)"
            )
        if not self._packs:
            check_packing(self._hf, self._states, self.embedding_weight, _TRIAL)
            self._packs = True


class TokenCache:
    """Remembers tokens, not keys and values, so that any causal model can be decoded and rolled back row by row.

    Every call computes its rows anew: exact, and slow. Where speed matters, use the model's own ``generate``.

    Args:
        tokens: (B, capacity) int64, filled by the calls.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.lengths = [0] * len(tokens)
        """Positions that each row remembers; what lies behind is overwritten by the next call."""

    def extended(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, T) tokens behind each row; all rows up to the longest, and the (B, T) places of the new ones."""
        places = torch.tensor(self.lengths, device=new.device)[:, None] + torch.arange(new.shape[1], device=new.device)
        longest = int(places.max()) + 1
        if longest > self.tokens.shape[1]:
            raise NextLatError(f"the cache holds {self.tokens.shape[1]} positions and {longest} are needed")
        self.tokens.scatter_(1, places, new)
        self.lengths = [length + new.shape[1] for length in self.lengths]
        return self.tokens[:, :longest], places

    def keep(self, places: Sequence[Sequence[int]], begins: Sequence[int]) -> None:
        """Of what was stored behind ``begins``, remember chosen places of each row, moved together in order."""
        for row, (chosen, begin) in enumerate(zip(places, begins, strict=True)):
            self.tokens[row, begin : begin + len(chosen)] = self.tokens[row, [begin + place for place in chosen]]
        self.lengths = [begin + len(chosen) for chosen, begin in zip(places, begins, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with chosen rows only, in the order given."""
        self.tokens = self.tokens[torch.tensor(rows, device=self.tokens.device)]
        self.lengths = [self.lengths[row] for row in rows]


def document_mask(documents: Tensor) -> Tensor:
    """(B, 1, T, T) bool: which earlier positions of its own document each position sees.

    Args:
        documents: (B, T) document ids; every change of id is a boundary.
    """
    run = run_index(documents)
    return ((run[:, :, None] == run[:, None, :]).tril())[:, None]


def is_hf_model(model: nn.Module) -> bool:
    """Whether a module looks like a causal language model of the transformers library."""
    return all(hasattr(model, name) for name in ("get_input_embeddings", "get_output_embeddings", "base_model"))
