"""What an objective is: a wrapper around a plain model that returns loss terms as sums and counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, Self, cast

import torch
from torch import Tensor, nn

from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model.interfaces import CausalLM, Drafter
from nextlat.model.trunk import Transformer
from nextlat.objectives.trials import check_packing
from nextlat.options import Options as BaseOptions


class Term(NamedTuple):
    """One additive loss term, not yet divided.

    The total loss is ``sum over terms of weight * sum / max(count, 1)``, with sums and counts taken over all
    micro-batches and ranks of an optimiser step.
    """

    sum: Tensor
    """Scalar with gradient, in nats or squared units, unnormalised."""
    count: Tensor  # type: ignore[assignment]  # a tuple has a method of this name, not needed here
    """Scalar int64: how many elements the sum runs over."""
    weight: float


class StateModel(nn.Module):
    """The three things an objective needs of a language model; a module that offers them need not inherit."""

    @property
    def embedding_weight(self) -> Tensor:
        """(V, D) the embedding table."""
        raise NotImplementedError

    @property
    def head_weight(self) -> Tensor:
        """(V, D) the output head, without bias."""
        raise NotImplementedError

    def hidden_states(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """(B, T, D) the states the output head reads."""
        raise NotImplementedError


class TorchModel(StateModel):
    """Presents any torch language model through the three things an objective needs.

    At the first packed rows it is tried: a document behind another must get the states it gets alone. It cannot be
    decoded: of the model only states are known, so use its own code for that.

    Args:
        model: the module that is trained and saved.
        hidden: ``hidden(tokens, documents) -> (B, T, D)``, the states the output head reads. ``documents`` is
            ``None`` unless packed rows are trained.
        embedding: ``embedding() -> (V, D)``, the input embedding table.
        head: ``head() -> (V, D)``, the output head; a bias beside it would not be seen.
    """

    def __init__(
        self,
        model: nn.Module,
        hidden: Callable[[Tensor, Tensor | None], Tensor],
        embedding: Callable[[], Tensor],
        head: Callable[[], Tensor],
    ) -> None:
        super().__init__()
        self.model = model
        self._hidden, self._embedding, self._head = hidden, embedding, head
        self._packs = False

    @property
    def embedding_weight(self) -> Tensor:
        """(V, D) the embedding table."""
        return self._embedding()

    @property
    def head_weight(self) -> Tensor:
        """(V, D) the output head."""
        return self._head()

    def hidden_states(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """(B, T, D) the states the output head reads."""
        if documents is not None and not self._packs and tokens.shape[1] > 1:
            check_packing(self.model, self._hidden, self.embedding_weight, tokens.shape[1])
            self._packs = True
        return self._hidden(tokens, documents)

    def new_cache(self, rows: int, capacity: int) -> NoReturn:
        """Refuse to be decoded."""
        raise NextLatError(
            f"{type(self.model).__name__} is known by its states only and cannot be decoded through "
            "nextlat.TorchModel; generate with the model's own code"
        )


class Objective(nn.Module):
    """Owns the plain model: the thing that is wrapped, trained and saved.

    A subclass implements :meth:`counts` and :meth:`forward`; everything else of the house treats all
    objectives alike.

    Args:
        model: a module that offers what :class:`StateModel` asks for, or a Hugging Face causal language model,
            which is presented that way (see :class:`nextlat.hf.HFModel`).
    """

    Options: ClassVar[type[BaseOptions]]
    """The objective's section of a configuration; its fields are keyword arguments of the constructor."""
    model: StateModel
    """The plain language model."""
    stock_model: ClassVar[bool] = True
    """Whether next-token logits are ``W h`` with the model's own head, so that ``as_lm()`` is a stock Llama."""
    horizon: int = 0
    """Steps beyond the next token that the objective looks ahead."""

    @classmethod
    def build(
        cls,
        trunk: Transformer,
        options: BaseOptions,
        *,
        generator: torch.Generator,
        end_token: int | None,
        next_token: bool,
    ) -> Self:
        """The objective around a freshly initialised trunk.

        Args:
            trunk: drawn from the model seed, so that every objective starts from the same one.
            options: an instance of :attr:`Options`.
            generator: second stream of random numbers, for networks beside the trunk.
            end_token: the task's end token, if it has one.
            next_token: whether targets are the shifted tokens; false for tagging tasks.
        """
        raise NotImplementedError

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # hasattr, because a run-time protocol does not see parameters of a module from Python 3.12 on
        if not all(hasattr(model, name) for name in ("hidden_states", "embedding_weight", "head_weight")):
            from nextlat.hf.adapter import HFModel, is_hf_model

            if is_hf_model(model):
                model = HFModel(model)
            else:
                raise NextLatError(
                    f"{type(model).__name__} does not offer hidden_states, embedding_weight and head_weight; "
                    "wrap it in nextlat.TorchModel(model, hidden=..., embedding=..., head=...)"
                )
        self.model = cast(StateModel, model)
        self.logged: dict[str, Term] = {}
        """Of the last forward pass: figures that are logged beside the terms, without gradient."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The count of every term, from the batch alone, so that it can be summed over ranks beforehand."""
        raise NotImplementedError

    def forward(self, batch: Batch, scale: Mapping[str, float] | None = None) -> dict[str, Term]:
        """The loss terms of a batch.

        Args:
            batch: (B, T) tokens, targets and documents.
            scale: the factor the trainer will apply to each term's sum, for objectives that make gradients
                in the forward pass.
        """
        raise NotImplementedError

    def term_weight(self, name: str) -> float:
        """The weight of a term; known before any batch is seen."""
        return 1.0

    def auxiliary(self) -> nn.Module | None:
        """The networks that are trained beside the plain model and saved beside it."""
        return None

    def latent_dynamics(self) -> nn.Module | None:
        """p_psi, if the objective trains one: ``(state, embedding) -> state``."""
        return None

    def as_lm(self) -> CausalLM:
        """The model as plain decoding sees it. Evaluation never asks which objective it is."""
        return cast(CausalLM, cast(object, self.model))

    def drafter(self) -> Drafter | None:
        """What guesses ahead of the model in self-speculative decoding; ``None`` if nothing can."""
        return None


def total_loss(terms: Mapping[str, Term], counts: Mapping[str, Any] | None = None) -> Tensor:
    """``sum of weight * sum / max(count, 1)`` over the terms.

    Args:
        terms: what an objective returned for a micro-batch.
        counts: global counts of the optimiser step; by default the terms' own.
    """
    total: Tensor | None = None
    for name, term in terms.items():
        count = torch.as_tensor(term.count if counts is None else counts[name])
        part = term.weight * term.sum / count.to(term.sum.device).clamp(min=1)
        total = part if total is None else total + part
    if total is None:
        raise NextLatError("the objective returned no terms; give at least one of them a weight above 0")
    return total


def check_weight(name: str, value: float) -> float:
    """A term's weight, if it is finite and not negative."""
    if not math.isfinite(value) or value < 0:
        raise NextLatError(f"{name} is {value}; a loss weight must be a finite number >= 0")
    return value


def check_horizon(horizon: int, least: int) -> int:
    """A horizon, if it is at least ``least``."""
    if horizon < least:
        raise NextLatError(f"horizon is {horizon}; it must be at least {least}")
    return horizon


def check_length(horizon: int, length: int) -> None:
    """Refuse a horizon that no row is long enough for."""
    if horizon >= length:
        raise NextLatError(
            f"horizon = {horizon} needs rows longer than {horizon} tokens, and the task's rows have {length}; "
            f"choose a horizon of at most {length - 1}"
        )
