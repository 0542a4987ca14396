"""From logits to a law, and from a law to a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nextlat.errors import NextLatError


@dataclass(frozen=True)
class Sampling:
    """How next-token laws are made of logits; models that draft and models that verify are treated alike.

    Args:
        temperature: 0 is greedy: all probability on the most likely token.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest most likely tokens whose probabilities reach p together, after ``top_k``.

    Raises:
        NextLatError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise NextLatError(f"temperature is {self.temperature}; it must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise NextLatError(f"top_k is {self.top_k}; keep at least 1 token, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise NextLatError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """Whether the law is all on one token."""
        return self.temperature == 0

    def law(self, logits: Tensor) -> Tensor:
        """Probabilities, fp32 or wider, of (..., V) logits."""
        logits = logits if logits.dtype is torch.float64 else logits.float()
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        law = (logits / self.temperature).softmax(-1)
        if self.top_k is None and self.top_p in (None, 1.0):
            return law
        ordered, order = law.sort(dim=-1, descending=True, stable=True)
        kept = torch.ones_like(ordered, dtype=torch.bool)
        if self.top_k is not None:
            kept[..., self.top_k :] = False
        if self.top_p is not None:
            ordered = ordered * kept
            before = (ordered.cumsum(-1) - ordered) / ordered.sum(-1, keepdim=True)
            kept &= before < self.top_p
        law = torch.zeros_like(law).scatter_(-1, order, ordered * kept)
        return law / law.sum(-1, keepdim=True)


def draw(law: Tensor, u: Tensor) -> Tensor:
    """The token at which the cumulative law passes u.

    Args:
        law: (B, V) probabilities.
        u: (B,) uniform in [0, 1), on the CPU, so that draws do not depend on the device.

    Returns:
        (B,) int64 tokens of positive probability.
    """
    # on the CPU: the cumulative sum of floats has no deterministic CUDA kernel
    cumulative = law.double().cpu().cumsum(-1)
    below = (cumulative <= u.double()[:, None] * cumulative[:, -1:]).sum(
        -1
    )  # u = 0 must not find a token of probability 0
    last = (law > 0).cpu().cumsum(-1).argmax(-1)  # rounding may leave the sum short of u
    return torch.minimum(below, last).to(law.device)
