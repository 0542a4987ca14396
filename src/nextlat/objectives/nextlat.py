"""Next-latent prediction: next-token cross-entropy plus the model's own next hidden state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nextlat import options
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model.head import OutputHead, Readout
from nextlat.model.interfaces import LMOutput
from nextlat.model.trunk import Transformer
from nextlat.objectives.base import Objective, StateModel, Term, check_horizon, check_weight
from nextlat.objectives.dynamics import find_dynamics
from nextlat.objectives.losses import smooth_l1_sum
from nextlat.objectives.positions import at, counted, token_positions, transitions
from nextlat.objectives.token_losses import Kind, plain_token_losses, token_losses

Dynamics = Callable[[Tensor, Tensor], Tensor]


def roll(dynamics: Dynamics, hidden: Tensor, embeddings: Tensor, horizon: int) -> Iterator[Tensor]:
    """Roll the dynamics from every position at once, feeding predicted states back.

    Step i consumes token t + i, so that the state made from source t is a guess of the state at t + i.
    Rollouts that cross a document boundary are made too; they are left out when a loss selects.

    Args:
        dynamics: ``(state, embedding) -> state``.
        hidden: (B, T, D) trunk states.
        embeddings: (B, T, D) raw embeddings of the row's own tokens.
        horizon: number of steps d.

    Yields:
        for i = 1 ... d, (B, max(T - i, 0), D): row t is the prediction for position t + i.
    """
    state = hidden
    for step in range(1, horizon + 1):
        state = dynamics(state[:, :-1], embeddings[:, step:])
        yield state


def nextlat_sums(
    hidden: Tensor,
    embedding_weight: Tensor,
    head_weight: Tensor,
    batch: Batch,
    dynamics: Dynamics,
    horizon: int,
    *,
    latent: bool = True,
    kl: bool = True,
    aux_ce: bool = False,
    tv: bool = False,
    detach_source: bool = False,
    detach_embeddings: bool = False,
    stop_target: bool = True,
    stop_head: bool = True,
    source: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The NextLat loss as sums and counts, for any model (arXiv 2511.05963, equations of section 3).

    With a row ``x_0 ... x_4`` whose third token opens a new document and horizon 2, the transitions of one
    step are 0->1, 2->3 and 3->4, and of two steps only 2->4: 0->2 and 1->3 would cross the boundary.

    Gradients: target states, teacher logits and the head under the predicted states are cut; the source
    states, every rolled state, the embeddings of the consumed tokens and the dynamics are live in both losses.

    Args:
        hidden: (B, T, D) states the output head reads.
        embedding_weight: (V, D).
        head_weight: (V, D).
        batch: (B, T) tokens, targets and documents.
        dynamics: ``(state, embedding) -> state``.
        horizon: number of rollout steps d.
        latent: make ``latent_i``, SmoothL1 to the stopped target state, summed over features.
        kl: make ``kl_i``, KL from the model's own next-token distribution to that of the predicted state.
        aux_ce: make ``aux_ce_i``, cross-entropy of the predicted state on the true token (not in the paper).
        tv: make ``tv_i``, total variation between the two distributions (not in the paper).
        detach_source: cut the gradient into the trunk; for fitting a drafter on a frozen model.
        detach_embeddings: cut the gradient into the embedding table; likewise.
        stop_target: ablation when false: the target state is live.
        stop_head: ablation when false: the head is live under the predicted states.
        source: (B, T, D) the same states by another path of gradients, for the rollouts to start from.

    Returns:
        ``{"ce", "latent_1" ..., "kl_1" ...}: (sum, count)``.

    Raises:
        NextLatError: shapes that do not fit each other, or a horizon below 1.
    """
    check_horizon(horizon, 1)
    if hidden.ndim != 3 or hidden.shape[:2] != batch.tokens.shape:
        raise NextLatError(
            f"states have shape {tuple(hidden.shape)} for tokens of shape {tuple(batch.tokens.shape)}; "
            "they must be (B, T, D), one for each token"
        )
    rows, length, width = hidden.shape
    for name, weight in (("embedding_weight", embedding_weight), ("head_weight", head_weight)):
        if weight.ndim != 2 or weight.shape[1] != width:
            raise NextLatError(
                f"{name} has shape {tuple(weight.shape)}; it must be (V, {width}), as wide as the states"
            )
    if batch.documents is not None:
        # A rollout over padding is left out of every sum, but NaN times a gradient of zero would not be zero.
        padding = (batch.documents < 0)[..., None]
        hidden = hidden.masked_fill(padding, 0)
        source = None if source is None else source.masked_fill(padding, 0)
    mask = counted(batch)
    head = partial(plain_token_losses, live_head=True) if not stop_head else token_losses
    asked: dict[Kind, bool] = {"kl": kl, "aux_ce": aux_ce, "tv": tv}
    kinds = [kind for kind, wanted in asked.items() if wanted]
    source = hidden if source is None else source
    source = source.detach() if detach_source else source
    embeddings = F.embedding(batch.tokens, embedding_weight.detach() if detach_embeddings else embedding_weight)
    target = hidden.detach() if stop_target else hidden
    latents: list[tuple[Tensor, Tensor]] = []
    students: list[tuple[Tensor, Tensor]] = []
    for step, state in enumerate(roll(dynamics, source, embeddings, horizon), start=1):
        if latent:
            allowed = transitions(batch.documents, step, rows, length, hidden.device)
            if batch.documents is None:
                value = smooth_l1_sum(state, target[:, step:])
            else:
                value = smooth_l1_sum(state[allowed], target[:, step:][allowed])
            latents.append((value, allowed.sum() * width))
        if kinds:
            # The guess made at t is put beside the state it guesses, at t + step.
            before = length - state.shape[1]
            reached = at(mask, F.pad(token_positions(batch, step), (before, 0)))
            students.append((at(mask, F.pad(state, (0, 0, before, 0))), reached))  # (#C_0, D), (#C_0,)
    values = iter(head(at(mask, hidden), head_weight, at(mask, batch.targets), students, kinds).unbind())
    sums = {"ce": (next(values), mask.sum())}
    for step in range(1, horizon + 1):
        if latent:
            sums[f"latent_{step}"] = latents[step - 1]
        for kind in kinds:
            sums[f"{kind}_{step}"] = (next(values), students[step - 1][1].sum())
    return sums


class DynamicsOptions(options.Options):
    """The latent dynamics network."""

    hidden_dim: int = Field(ge=1)
    kind: Literal["mlp", "normalised", "gru"] = "mlp"
    zero_init_output: bool = False


class NextLatOptions(options.Options):
    """``objectives.nextlat``; see :class:`NextLat` and :func:`nextlat_sums`."""

    horizon: int = Field(1, ge=1)
    latent_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    kl_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    ce_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    tv_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    dynamics: DynamicsOptions
    detach_source: bool = False
    detach_embeddings: bool = False
    stop_target: bool = True
    stop_head: bool = True


class NextLat(Objective):
    """Cross-entropy plus next-latent prediction over a horizon.

    Args:
        model: our trunk, a Hugging Face causal language model, or any other wrapped in :class:`TorchModel`.
        horizon: rollout steps d >= 1.
        latent_weight: lambda_h, weight of the SmoothL1 terms together.
        kl_weight: lambda_KL, weight of the KL terms together.
        ce_weight: weight of a cross-entropy of the predicted states; an experiment, 0 in the method.
        tv_weight: weight of a total variation to the model's own law; likewise.
        dynamics: the latent dynamics, or the hidden width of one.
        kind: which one to make of that width; see :data:`DYNAMICS`.
        zero_init_output: start the dynamics as the identity on the state.
        detach_source, detach_embeddings, stop_target, stop_head: see :func:`nextlat_sums`.
        generator: source of the initial weights of the dynamics.

    Raises:
        NextLatError: a horizon below 1, a negative or infinite weight, or no auxiliary weight above 0.
    """

    Options = NextLatOptions

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
        """The trunk and a latent dynamics network beside it."""
        if not isinstance(options, NextLatOptions):
            raise TypeError(f"NextLatOptions expected, {type(options).__name__} given")
        network = options.dynamics
        return cls(
            trunk,
            dynamics=network.hidden_dim,
            kind=network.kind,
            zero_init_output=network.zero_init_output,
            generator=generator,
            **options.model_dump(exclude={"dynamics"}),
        )

    def __init__(
        self,
        model: nn.Module,
        horizon: int = 1,
        latent_weight: float = 1.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        tv_weight: float = 0.0,
        dynamics: nn.Module | int | None = None,
        kind: str = "mlp",
        zero_init_output: bool = False,
        detach_source: bool = False,
        detach_embeddings: bool = False,
        stop_target: bool = True,
        stop_head: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model)
        self.horizon = check_horizon(horizon, 1)
        self.weights = {
            "latent": check_weight("latent_weight", latent_weight),
            "kl": check_weight("kl_weight", kl_weight),
            "aux_ce": check_weight("ce_weight", ce_weight),
            "tv": check_weight("tv_weight", tv_weight),
        }
        if not any(self.weights.values()):
            raise NextLatError(
                "latent_weight, kl_weight, ce_weight and tv_weight are all 0; set one above 0, or use the gpt objective"
            )
        width = self.model.embedding_weight.shape[1]
        if not isinstance(dynamics, nn.Module):
            hidden_dim = width if dynamics is None else dynamics
            dynamics = find_dynamics(kind)(width, hidden_dim, zero_init_output, generator)
            dynamics.to(self.model.embedding_weight.device, self.model.embedding_weight.dtype)
        self.dynamics = dynamics
        self.options = {
            "detach_source": detach_source,
            "detach_embeddings": detach_embeddings,
            "stop_target": stop_target,
            "stop_head": stop_head,
        }

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Counts of ``ce`` and of every active ``latent_i`` (transitions times D), ``kl_i``, ``aux_ce_i``, ``tv_i``."""
        rows, length = batch.tokens.shape
        width = self.model.embedding_weight.shape[1]
        counts = {"ce": counted(batch).sum()}
        for step in range(1, self.horizon + 1):
            if self.weights["latent"]:
                allowed = transitions(batch.documents, step, rows, length, batch.tokens.device)
                counts[f"latent_{step}"] = allowed.sum() * width
            for kind in ("kl", "aux_ce", "tv"):
                if self.weights[kind]:
                    counts[f"{kind}_{step}"] = token_positions(batch, step).sum()
        return counts

    def forward(self, batch: Batch, scale: Mapping[str, float] | None = None) -> dict[str, Term]:
        """``ce`` with weight 1 and each step's terms with weight lambda / d."""
        sums = nextlat_sums(
            self.model.hidden_states(batch.tokens, batch.documents),
            self.model.embedding_weight,
            self.model.head_weight,
            batch,
            self.dynamics,
            self.horizon,
            source=None,
            **{kind: weight > 0 for kind, weight in self.weights.items()},
            **self.options,
        )
        return {name: Term(value, count, self.term_weight(name)) for name, (value, count) in sums.items()}

    def term_weight(self, name: str) -> float:
        """1 for ``ce``, lambda / d for a step of a group."""
        return 1.0 if name == "ce" else self.weights[name.rsplit("_", 1)[0]] / self.horizon

    def auxiliary(self) -> nn.Module:
        """The latent dynamics."""
        return self.dynamics

    def latent_dynamics(self) -> nn.Module:
        """The latent dynamics."""
        return self.dynamics

    def drafter(self) -> LatentDrafter:
        """Rolls the latent dynamics on the tokens it drafts; any length, no attention and no cache."""
        return LatentDrafter(self.dynamics, self.model)


class LatentDrafter:
    """Drafts by rolling the latent dynamics: ``s <- p(s, E[token])``, next law ``softmax(W s)``.

    The first token of a round is drawn from the model's own next-token law; the length is not bounded by the
    horizon of training.

    Args:
        dynamics: ``(state, embedding) -> state``.
        model: gives the embedding table and the output head.
    """

    max_length: int | None = None
    vocabulary: Tensor | None = None

    def __init__(self, dynamics: nn.Module, model: StateModel) -> None:
        self.network, self.model = dynamics, model
        self.head: Readout = OutputHead(model)

    def observe(self, output: LMOutput, accepted: Tensor) -> Tensor:
        """(B, D) trunk states at each row's last accepted position, an index (B,) into the call's positions."""
        return output.hidden[torch.arange(len(accepted), device=accepted.device), accepted]

    def step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Feed (B,) tokens; next (B, D) state and (B, V) logits of the token after them."""
        state = self.network(state, F.embedding(token, self.model.embedding_weight))
        return state, self.head(state)

    def select(self, state: Tensor, rows: Tensor) -> Tensor:
        """The states of chosen rows."""
        return state[rows]
