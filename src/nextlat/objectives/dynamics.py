"""The latent dynamics network p_psi: next hidden state from the current one and the next token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.errors import NextLatError
from nextlat.model.trunk import RMSNorm, init_normal


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
        if hidden_dim < 1:
            raise NextLatError(f"dynamics.hidden_dim is {hidden_dim}; the latent dynamics needs a width of at least 1")
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
        u = F.gelu(self.layer_2(F.gelu(self.layer_1(u))))
        out: Tensor = state + self.layer_3(u)
        return out
