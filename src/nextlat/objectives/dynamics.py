"""Latent dynamics networks p_psi: next hidden state from the current one and the next token.

:class:`LatentDynamics` is the method's; the others are experiments behind the same interface.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.errors import NextLatError, unknown
from nextlat.model.norm import RMSNorm
from nextlat.model.trunk import init_normal, multiplied


def check_hidden_dim(hidden_dim: int) -> None:
    """Refuse a width that would leave no dynamics at all."""
    if hidden_dim < 1:
        raise NextLatError(f"dynamics.hidden_dim is {hidden_dim}; the latent dynamics needs a width of at least 1")


class LatentDynamics(nn.Module):
    """``p(s, e) = s + L3 gelu(L2 gelu(L1 RMSNorm([e ; s])))`` (arXiv 2511.05963, section 3 and appendix).

    The embedding comes first in the concatenation, the norm runs over all 2D entries jointly, GELU is the
    exact one, and there are no biases. The output is not normalised again: it lives in the space after the
    trunk's final norm, goes straight into the output head and back into this network.

    Args:
        width: model width D.
        hidden_dim: width m of the two hidden layers.
        zero_init_output: start as the identity on the state.
        generator: source of the initial weights, N(0, 0.02^2).

    Raises:
        NextLatError: ``hidden_dim`` is below 1.
    """

    def __init__(
        self,
        width: int,
        hidden_dim: int,
        zero_init_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_hidden_dim(hidden_dim)
        self.norm = RMSNorm(2 * width)
        self.layer_1 = nn.Linear(2 * width, hidden_dim, bias=False)
        self.layer_2 = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.layer_3 = nn.Linear(hidden_dim, width, bias=False)
        init_normal(self, generator if generator is not None else torch.default_generator)
        if zero_init_output:
            nn.init.zeros_(self.layer_3.weight)

    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        """Next state.

        Args:
            state: (..., D) states after the final norm.
            embedding: (..., D) raw embeddings of the tokens that come next.

        Returns:
            (..., D).
        """
        u = self.norm(torch.cat([embedding, state], dim=-1))
        u = F.gelu(multiplied(self.layer_2, F.gelu(multiplied(self.layer_1, u))))
        return state + multiplied(self.layer_3, u)


class NormalisedDynamics(LatentDynamics):
    """``RMSNorm(p(s, e))`` with a gain of its own, started at 1: an experiment.

    The trunk's states come out of a norm. Here a rolled state does so as well, so that its length cannot drift
    over a long rollout. Arguments as for :class:`LatentDynamics`; with ``zero_init_output`` the rollout starts
    as the identity on states of unit RMS.
    """

    def __init__(
        self,
        width: int,
        hidden_dim: int,
        zero_init_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, hidden_dim, zero_init_output, generator)
        self.output_norm = RMSNorm(width)

    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        """Next state of unit RMS times the gain, (..., D) from (..., D) states and raw embeddings."""
        out: Tensor = self.output_norm(super().forward(state, embedding))
        return out


class GatedDynamics(nn.Module):
    """A gated recurrent cell, ``s + z * (c - s)``, in the form of a GRU (Cho et al., arXiv 1406.1078): an experiment.

    With ``u = RMSNorm([e ; s])``, update gate ``z = sigmoid(Z u)`` and reset gate ``r = sigmoid(R u)``, the candidate
    is ``c = L2 gelu(L1 RMSNorm([e ; r * s]))``. It is not squashed as a GRU's is, because states are not confined to
    (-1, 1). No biases.

    Args:
        width: model width D.
        hidden_dim: width m of the candidate's hidden layer.
        zero_init_output: not available; a gated cell never is the identity.
        generator: source of the initial weights, N(0, 0.02^2).

    Raises:
        NextLatError: ``hidden_dim`` is below 1, or ``zero_init_output`` is asked for.
    """

    def __init__(
        self,
        width: int,
        hidden_dim: int,
        zero_init_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_hidden_dim(hidden_dim)
        if zero_init_output:
            raise NextLatError(
                "dynamics.zero_init_output starts a residual network as the identity, and kind gru is not one; "
                "leave it false, or use kind mlp or normalised"
            )
        self.gate_norm, self.candidate_norm = RMSNorm(2 * width), RMSNorm(2 * width)
        self.update = nn.Linear(2 * width, width, bias=False)
        self.reset = nn.Linear(2 * width, width, bias=False)
        self.layer_1 = nn.Linear(2 * width, hidden_dim, bias=False)
        self.layer_2 = nn.Linear(hidden_dim, width, bias=False)
        init_normal(self, generator if generator is not None else torch.default_generator)

    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        """Next state, (..., D) from (..., D) states and raw embeddings."""
        u = self.gate_norm(torch.cat([embedding, state], dim=-1))
        update, reset = torch.sigmoid(self.update(u)), torch.sigmoid(self.reset(u))
        candidate = self.layer_2(
            F.gelu(self.layer_1(self.candidate_norm(torch.cat([embedding, reset * state], dim=-1))))
        )
        return torch.lerp(state, candidate, update)


DYNAMICS: dict[str, type[LatentDynamics] | type[GatedDynamics]] = {
    "mlp": LatentDynamics,
    "normalised": NormalisedDynamics,
    "gru": GatedDynamics,
}


def find_dynamics(kind: str) -> type[LatentDynamics] | type[GatedDynamics]:
    """The latent dynamics class of a name."""
    if kind not in DYNAMICS:
        raise unknown("dynamics.kind", kind, DYNAMICS)
    return DYNAMICS[kind]
