"""The Fetch module of joint multi-token prediction: attention over a state combined with the tokens that follow it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.errors import NextLatError
from nextlat.model.norm import EPS, RMSNorm
from nextlat.model.trunk import init_normal
from nextlat.objectives.losses import wide

MAX_HEADS = 4


class Fetch(nn.Module):
    """One self-attention over the window (x_t, x_{t+1}, ..., x_{t+d}), each token combined with the state at t.

    Slot i holds ``a_i = LayerNorm(E[x_{t+i}] + gamma * h_t)`` and sees slots up to i. There are no rotary
    positions; a learned table, indexed by query and key slot, is added to the scores. The published module is
    the default; each option mends one of its weak points.

    Args:
        width: model width D.
        horizon: slots beyond the first, d.
        heads: attention heads; must divide ``width``.
        residual_next: add the state in slot 0 too, which otherwise reaches the next token only through gamma.
        gamma_init: first value of gamma.
        relative_bias: index the table by query slot minus key slot.
        rms_combine: RMSNorm instead of LayerNorm.
        generator: source of the initial weights, N(0, 0.02^2).

    Raises:
        NextLatError: the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        horizon: int,
        heads: int = MAX_HEADS,
        residual_next: bool = False,
        gamma_init: float = 0.1,
        relative_bias: bool = False,
        rms_combine: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise NextLatError(
                f"jtp's Fetch module has {heads} heads, which do not divide width = {width}; "
                f"choose a width that is a multiple of {heads}, or fewer heads"
            )
        self.horizon, self.heads, self.residual_next, self.relative = horizon, heads, residual_next, relative_bias
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        init_normal(self, generator if generator is not None else torch.default_generator)
        self.gamma = nn.Parameter(torch.tensor(float(gamma_init)))
        self.combine_norm = RMSNorm(width) if rms_combine else nn.LayerNorm(width, eps=EPS)
        # Three axes in both cases: optimisers treat two-dimensional parameters as matrices.
        self.bias = nn.Parameter(torch.zeros(heads, horizon + 1, 1 if relative_bias else horizon + 1))
        self.norm = RMSNorm(width)

    def combine(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Slot inputs from (..., D) states and (..., D) token embeddings."""
        slots: Tensor = self.combine_norm(embedding + self.gamma * hidden)
        return slots

    def table(self) -> Tensor:
        """(heads, d + 1, d + 1) what is added to the scores, by query and key slot."""
        if not self.relative:
            return self.bias
        slot = torch.arange(self.horizon + 1, device=self.bias.device)
        return self.bias[:, (slot[:, None] - slot).clamp(min=0), 0]

    def keys_values(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (..., k, heads, D / heads) each, of (..., k, D) slot inputs."""
        k, v = (projection(slots).unflatten(-1, (self.heads, -1)) for projection in (self.k_proj, self.v_proj))
        return k, v

    def mix(self, hidden: Tensor, slots: Tensor, keys: Tensor, values: Tensor, first: int = 0) -> Tensor:
        """States that predict, from slots ``first`` on.

        Args:
            hidden: (..., D) the states at the windows' starts.
            slots: (..., k, D) inputs of slots first ... first + k - 1.
            keys: (..., first + k, heads, D / heads) of all slots so far.
            values: likewise.
            first: number of the first slot asked for.

        Returns:
            (..., k, D), normed: exactly what the output head reads.
        """
        count = slots.shape[-2]
        query = self.q_proj(slots).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("...ihe,...jhe->...hij", query, keys) * query.shape[-1] ** -0.5
        table = self.table()[:, first : first + count, : first + count]
        scores = wide(scores) + table
        if count > 1:  # the last of all slots sees all
            future = torch.ones(count, first + count, dtype=torch.bool, device=slots.device).triu(first + 1)
            scores = scores.masked_fill(future, float("-inf"))
        weights = scores.softmax(-1).to(values.dtype)
        out = self.o_proj(torch.einsum("...hij,...jhe->...ihe", weights, values).flatten(-2))
        kept = hidden[..., None, :]
        if not (first or self.residual_next):
            kept = torch.where(torch.arange(count, device=slots.device)[:, None] > 0, kept, 0.0)
        state: Tensor = self.norm(out + kept)
        return state

    def alone(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """(..., D) states that predict the next target: slot 0 sees only itself, so that no scores are needed.

        Args:
            hidden: (..., D) trunk states h_t.
            embedding: (..., D) raw embeddings of x_t.
        """
        out = self.o_proj(self.v_proj(self.combine(hidden, embedding)))
        state: Tensor = self.norm(out + hidden if self.residual_next else out)
        return state

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """States that predict the targets at t, t + 1, ... from whole windows.

        Args:
            hidden: (..., D) trunk states h_t.
            embeddings: (..., k, D) raw embeddings of x_t ... x_{t+k-1}, k <= d + 1.

        Returns:
            (..., k, D).
        """
        slots = self.combine(hidden[..., None, :], embeddings)
        return self.mix(hidden, slots, *self.keys_values(slots))


def windows(embeddings: Tensor, count: int) -> Tensor:
    """(B, T, D) -> (B, T, count, D): each position with those that follow it, zeros beyond the row."""
    length = embeddings.shape[1]
    return torch.stack([F.pad(embeddings[:, i:], (0, 0, 0, min(i, length))) for i in range(count)], 2)
