"""A Hugging Face causal language model behind the three things an objective needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.errors import NextLatError
from nextlat.model.attention import document_layout, run_index
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.objectives.base import StateModel

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask of one value for every pair of positions."""
_TRIAL = 8
"""Tokens of the rows that a model is tried on."""


class HFModel(StateModel):
    """Presents a model of the transformers library; adds nothing to it and changes nothing in it.

    States are those after the final norm: what ``last_hidden_state`` of the model's body holds and the output head
    reads. That the head times these states gives the model's own logits is checked on a few tokens when the
    adapter is made; that packed documents do not see each other, when the first packed rows arrive.

    Args:
        model: any causal language model whose logits are a bias-free linear function of its last state.

    Raises:
        NextLatError: no input or output embeddings, widths that differ, a head with a bias, logits that are
            capped, scaled or otherwise more than head times state.
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
    ) -> Tensor:
        """(B, T, D) states after the final norm.

        Args:
            tokens: (B, T) int64.
            documents: (B, T) ids of packed documents; excludes ``mask``.
            positions: (T,) or (B, T) positions; by default they count from 0 in each document.
            mask: (T, T) or (B, 1, T, T) bool, True where a query may look.
        """
        given: dict[str, Any] = {}
        if documents is not None:
            if mask is not None:
                raise NextLatError("documents cannot be combined with a mask; give one of them")
            self._check_packing(tokens.shape[1])
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
        """Next-token logits, at (B,) positions only if ``logits_at`` names them, and states.

        A cache excludes documents, positions and a mask.
        """
        if cache is None:
            h = self.hidden_states(tokens, documents, positions, mask)
        elif documents is None and positions is None and mask is None:
            whole, places = cache.extended(tokens)
            h = self.hidden_states(whole).gather(1, places[..., None].expand(-1, -1, self.head_weight.shape[1]))
        else:
            raise NextLatError("a Hugging Face model takes a cache with tokens alone: no documents, positions or mask")
        logits = F.linear(states_at(h, logits_at), self.head_weight)
        return LMOutput(logits, hidden=h, cache=cache, probe_state=h)  # type: ignore[arg-type]

    def new_cache(self, rows: int, capacity: int) -> TokenCache:
        """An empty cache for ``rows`` rows of up to ``capacity`` positions."""
        return TokenCache(torch.zeros(rows, capacity, dtype=torch.int64, device=self.embedding_weight.device))

    @property
    def _hf(self) -> Any:
        return self.model

    def _as_taken(self, mask: Tensor) -> Tensor:
        """The bool mask as this attention implementation reads it: eager attention adds it to the scores."""
        if self._attention() == "eager":
            dtype = self.embedding_weight.dtype
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask

    def _attention(self) -> str:
        return str(self._hf.config._attn_implementation)

    def _check_head(self) -> None:
        name = type(self.model).__name__
        head, table = self._hf.get_output_embeddings(), self._hf.get_input_embeddings()
        if head is None or table is None or self._hf.base_model is self.model:
            raise NextLatError(
                f"{name} has no body with an output head on top; give a causal language model, such as one of "
                "AutoModelForCausalLM"
            )
        if getattr(head, "bias", None) is not None:
            raise NextLatError(f"the output head of {name} has a bias, and an objective reads its logits as W h alone")
        if head.weight.shape[1] != table.weight.shape[1]:
            raise NextLatError(
                f"embeddings of {name} are {table.weight.shape[1]} wide and states {head.weight.shape[1]}; "
                "the latent dynamics needs both of one width"
            )
        tokens = self._trial_tokens(_TRIAL)
        with self._trial():
            expected = self._hf(input_ids=tokens, use_cache=False).logits.float()
            found = F.linear(self.hidden_states(tokens), self.head_weight).float()
        if not _close(found, expected, self.embedding_weight.dtype, 8):
            raise NextLatError(
                f"the logits of {name} are not its output head times its last state (they differ by up to "
                f"{float((found - expected).abs().max()):.3g}): they are capped, scaled or shifted, and the losses on "
                "predicted states would not match them. Wrap it in nextlat.TorchModel with states that fit"
            )

    def _check_packing(self, length: int) -> None:
        """Refuse packed rows where documents would see each other."""
        name = type(self.model).__name__
        attention = self._attention()
        if attention not in MASKED_ATTENTION:
            raise NextLatError(
                f"packed documents need a mask for every pair of positions, and {name} uses {attention!r} attention; "
                "load it with attn_implementation='sdpa', or train on rows of one document (documents=None)"
            )
        window = getattr(self._hf.config, "sliding_window", None)
        if window is not None and length > window:
            raise NextLatError(
                f"rows of {length} tokens are longer than the sliding window ({window}) of {name}, which a mask for "
                "packed documents would widen; pack shorter rows, or train on rows of one document (documents=None)"
            )
        if self._packs:
            return
        half = _TRIAL // 2
        one = self._trial_tokens(_TRIAL)
        tokens = torch.cat([one, torch.cat([one[:, half:], one[:, half:]], 1)])  # one document behind two others
        documents = torch.arange(_TRIAL, device=tokens.device).expand(2, -1) // half
        self._packs = True  # the trial itself passes here
        with self._trial():
            packed = self.hidden_states(tokens, documents)[:, half:].float()
            alone = self.hidden_states(one[:, half:]).float()
        dtype = self.embedding_weight.dtype
        # whatever lies before must not matter at all; another kernel may round in another way
        self._packs = _close(packed[:1], packed[1:], dtype, 1) and _close(packed[:1], alone, dtype, 16)
        if not self._packs:
            raise NextLatError(
                f"a document packed behind another gets other states in {name} than alone: it does not keep to "
                "the mask or the positions it is given. Train on rows of one document (documents=None)"
            )

    def _trial_tokens(self, length: int) -> Tensor:
        vocabulary = len(self.embedding_weight)
        return (torch.arange(1, length + 1, device=self.embedding_weight.device) % vocabulary)[None]

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """No gradient, no dropout, no autocast; every module's mode is as before afterwards."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        device = self.embedding_weight.device.type
        try:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                yield
        finally:
            for module, training in modes:
                module.training = training


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


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype, roundings: int) -> bool:
    """Equal up to so many roundings of the largest value in this dtype."""
    limit = roundings * torch.finfo(dtype).eps * (1 + float(expected.abs().max()))
    return bool(((found - expected).abs() <= limit).all())
