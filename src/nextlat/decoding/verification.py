"""Which drafted tokens to keep so that what is kept follows the model's own law, exactly.

A draft of up to K tokens x_1 ... x_n came from laws q_1 ... q_n, and one call of the model gave its laws p_0, before
x_1, to p_n, behind x_n. Both rules keep a beginning of the draft and name the law of the token that follows it. The
length n may have been chosen while drafting, from anything but tokens that were then thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nextlat.errors import unknown


class Verdict(NamedTuple):
    """What becomes of the drafts."""

    accepted: Tensor
    """(B,) int64 how many drafted tokens are kept."""
    law: Tensor
    """(B, V) law of the token behind them."""


Verification = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Verdict]


def token_wise(p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor, u: Tensor) -> Verdict:
    """Keep each token with probability ``min(1, p / q)``, up to the first that is not kept.

    Source: Leviathan et al., arXiv 2211.17192, algorithm 1.

    Args:
        p: (B, K + 1, V) the model's laws.
        q: (B, K, V) the laws that tokens were drafted from.
        drafts: (B, K) int64 tokens.
        lengths: (B,) how many of them each row drafted; the rest is ignored.
        u: (B, K) uniform in [0, 1).
    """
    real = torch.arange(drafts.shape[1], device=drafts.device) < lengths[:, None]
    kept = real & (u * _at(q, drafts) < _at(p[:, :-1], drafts))
    accepted = kept.cumprod(1).sum(1)
    return Verdict(accepted, _leftover(p, q, accepted, lengths, torch.ones_like(u[:, 0]) if u.shape[1] else None))


def block_wise(p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor, u: Tensor) -> Verdict:
    """Judge the draft as a whole: never fewer kept tokens on average (Sun et al., arXiv 2403.10444, algorithm 2).

    The probability ``w_i = min(1, w_{i-1} p / q)`` that the first i tokens are jointly worth keeping replaces the
    product of single verdicts, and the longest beginning whose own coin falls well is kept. Arguments as for
    :func:`token_wise`.
    """
    rows, longest = drafts.shape
    accepted = torch.zeros(rows, dtype=torch.int64, device=drafts.device)
    worth = torch.ones(rows, dtype=p.dtype, device=p.device)
    kept_worth = worth.clone()
    ratio = _at(p[:, :-1], drafts) / _at(q, drafts)
    for i in range(1, longest + 1):
        worth = torch.minimum(worth * ratio[:, i - 1], torch.ones_like(worth))
        chance = worth
        if i < longest:
            gain = (worth[:, None] * p[:, i] - q[:, i]).clamp(min=0).sum(-1)
            inner = gain / (gain + 1 - worth).clamp(min=torch.finfo(p.dtype).tiny)
            chance = torch.where(lengths == i, worth, torch.where(worth >= 1, torch.ones_like(worth), inner))
        keep = (i <= lengths) & (u[:, i - 1] < chance)
        accepted = torch.where(keep, i, accepted)
        kept_worth = torch.where(keep, worth, kept_worth)
    return Verdict(accepted, _leftover(p, q, accepted, lengths, kept_worth))


VERIFICATIONS: dict[str, Verification] = {"token": token_wise, "block": block_wise}


def find_verification(name: str) -> Verification:
    """The rule of a name."""
    if name not in VERIFICATIONS:
        raise unknown("verification", name, VERIFICATIONS)
    return VERIFICATIONS[name]


def greedy(best: Tensor, drafts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Both rules at temperature 0, without laws: keep tokens while they are the most likely ones.

    Args:
        best: (B, K + 1) the model's most likely tokens.
        drafts: (B, K) int64 tokens.
        lengths: (B,) how many of them each row drafted.

    Returns:
        (B,) how many are kept, and (B,) the token behind them.
    """
    real = torch.arange(drafts.shape[1], device=drafts.device) < lengths[:, None]
    accepted = (real & (drafts == best[:, :-1])).cumprod(1).sum(1)
    return accepted, best.gather(1, accepted[:, None])[:, 0]


def _at(laws: Tensor, tokens: Tensor) -> Tensor:
    """(B, K) probabilities of (B, K) tokens."""
    return laws.gather(-1, tokens[..., None])[..., 0]


def _leftover(p: Tensor, q: Tensor, accepted: Tensor, lengths: Tensor, worth: Tensor | None) -> Tensor:
    """Law behind the kept tokens: p where all were kept, else what p has above q, weighed by the kept part's worth."""
    rows = torch.arange(len(p), device=p.device)
    law = p[rows, accepted]
    if worth is None:
        return law
    rest = (worth[:, None] * law - q[rows, accepted.clamp(max=q.shape[1] - 1)]).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    # Rounding can leave nothing where p and q are equal; then p is as good.
    cut = (accepted < lengths)[:, None] & (total > 0)
    return torch.where(cut, rest / total.clamp(min=torch.finfo(p.dtype).tiny), law)
