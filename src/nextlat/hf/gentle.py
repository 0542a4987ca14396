"""Next-latent prediction on a model that can speak already, without shouting at it: an experiment.

A fresh latent dynamics guesses about as well as chance, so its first losses are several times the
cross-entropy of a pretrained model and send a gradient to match into it. Three remedies, each off by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.objectives.base import Term
from nextlat.objectives.nextlat import NextLat, nextlat_sums
from nextlat.objectives.trials import constant


class GentleNextLat(NextLat):
    """:class:`NextLat` in two phases, with weights that are functions of the step.

    1. **Warm-up**: only p_psi is trained. States, embeddings and head are constants, without dropout, and the
       cross-entropy is reported with weight 0 and without a gradient, so that not even weight decay touches the model.
    2. **Joint**: the objective as it is, its auxiliary weights raised from ``1 / ramp_steps`` to 1 of their
       values, and its gradient into the states held to a share of that of the cross-entropy.

    Call :meth:`advance` after every optimiser step.

    Args:
        model: a Hugging Face causal language model, our trunk, or a :class:`~nextlat.objectives.TorchModel`.
        horizon: rollout steps d >= 1.
        warmup_steps: at most so many steps train p_psi alone.
        warmup_kl: end the warm-up earlier, after the first step whose mean ``kl_1`` is below this, in nats.
        ramp_steps: after the warm-up, step k = 1, 2, ... has ``min(1, k / ramp_steps)`` of the auxiliary weights.
        gradient_cap: the auxiliary gradient that enters the hidden states has at most this many times the norm
            of the cross-entropy's there. Norms are taken over a micro-batch; the gradients into the embeddings
            of consumed tokens and into p_psi are left alone. ``None``: no cap.
        options: as for :class:`NextLat`.

    Raises:
        NextLatError: a negative number of steps, a threshold or cap that is not above 0, ``warmup_kl`` without a KL
            term or without ``warmup_steps``, or a cap with targets or a head that are live.
    """

    def __init__(
        self,
        model: nn.Module,
        horizon: int = 1,
        *,
        warmup_steps: int = 0,
        warmup_kl: float | None = None,
        ramp_steps: int = 0,
        gradient_cap: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, horizon, **options)
        for name, steps in (("warmup_steps", warmup_steps), ("ramp_steps", ramp_steps)):
            if steps < 0:
                raise NextLatError(f"{name} is {steps}; it must be 0 (off) or more")
        for name, value in (("warmup_kl", warmup_kl), ("gradient_cap", gradient_cap)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise NextLatError(f"{name} is {value}; it must be a finite number above 0, or None for off")
        if warmup_kl is not None and not (self.weights["kl"] and warmup_steps):
            raise NextLatError("warmup_kl ends a warm-up by its KL: give warmup_steps >= 1 and a kl_weight above 0")
        live = [name for name in ("stop_target", "stop_head") if not self.options[name]]
        if gradient_cap is not None and live:
            raise NextLatError(
                f"gradient_cap is {gradient_cap} and {live[0]} is false: auxiliary gradients that reach the model "
                "beside the rollout would count as the cross-entropy's, or not at all; leave gradient_cap or the "
                "ablation out"
            )
        self.warmup_steps, self.warmup_kl = warmup_steps, warmup_kl
        self.ramp_steps, self.gradient_cap = ramp_steps, gradient_cap
        self.steps_made = 0
        self.joint_from = None if warmup_steps else 0
        self._kl: list[tuple[Tensor, Tensor]] = []

    @property
    def warming_up(self) -> bool:
        """Whether the next step trains p_psi alone."""
        return self.joint_from is None

    @property
    def share(self) -> float:
        """The share of their values that the auxiliary weights have in the next step."""
        if self.joint_from is None or not self.ramp_steps:
            return 1.0
        return min(1.0, (self.steps_made - self.joint_from + 1) / self.ramp_steps)

    def advance(self, kl: float | None = None) -> None:
        """Say that an optimiser step was made.

        Args:
            kl: the step's mean ``kl_1`` over all processes, for ``warmup_kl``; by default that of the batches
                this process has seen since the last call.
        """
        self.steps_made += 1
        if self.joint_from is not None:
            return
        if self.warmup_kl is not None and kl is None and self._kl:
            sums, counts = zip(*self._kl, strict=True)
            kl = float(sum(sums)) / max(int(sum(counts)), 1)
        self._kl.clear()
        learned = self.warmup_kl is not None and kl is not None and kl < self.warmup_kl
        if learned or self.steps_made >= self.warmup_steps:
            self.joint_from = self.steps_made

    def forward(self, batch: Batch, scale: Mapping[str, float] | None = None) -> dict[str, Term]:
        """The terms of this phase; names, sums and counts are those of :class:`NextLat`."""
        alone = self.warming_up
        with constant(self.model) if alone else nullcontext():
            hidden = self.model.hidden_states(batch.tokens, batch.documents)
        table, head = self.model.embedding_weight, self.model.head_weight
        if alone:
            table, head = table.detach(), head.detach()
        source = None
        if self.gradient_cap is not None and hidden.requires_grad:
            hidden, source = _Fork.apply(hidden, self.gradient_cap)  # type: ignore[no-untyped-call]
        sums = nextlat_sums(
            hidden,
            table,
            head,
            batch,
            self.dynamics,
            self.horizon,
            source=source,
            **{kind: weight > 0 for kind, weight in self.weights.items()},
            **self.options,
        )
        if alone and self.warmup_kl is not None and self.training:
            self._kl.append((sums["kl_1"][0].detach(), sums["kl_1"][1]))
        return {name: Term(value, count, self.term_weight(name)) for name, (value, count) in sums.items()}

    def term_weight(self, name: str) -> float:
        """As for :class:`NextLat`, times the share of this step; 0 for ``ce`` in the warm-up."""
        if name == "ce":
            return 0.0 if self.warming_up else 1.0
        return super().term_weight(name) * self.share

    def get_extra_state(self) -> dict[str, int | None]:
        """Where the schedule stands; part of ``state_dict``."""
        return {"steps_made": self.steps_made, "joint_from": self.joint_from}

    def set_extra_state(self, state: dict[str, int | None]) -> None:
        """Go on where a ``state_dict`` was taken."""
        self.steps_made, self.joint_from = int(state["steps_made"] or 0), state["joint_from"]


class _Fork(torch.autograd.Function):
    """States twice, for the cross-entropy and for the rollouts; the gradient of the second is capped by the first."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, cap: float) -> tuple[Tensor, Tensor]:
        ctx.cap = cap
        return hidden.view_as(hidden), hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, main: Tensor, side: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(main.dtype, torch.float32)
        limit = ctx.cap * torch.linalg.vector_norm(main, dtype=wide)
        norm = torch.linalg.vector_norm(side, dtype=wide)
        factor = (limit / norm.clamp(min=torch.finfo(wide).tiny)).clamp(max=1)
        return main + side * factor.to(side.dtype), None
