"""One round of decoding: draft, have the model judge the draft in one call, keep what holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextlat.decoding.drafting import Uniform, draft
from nextlat.decoding.policies import Known, Policy
from nextlat.decoding.sampling import Sampling, draw
from nextlat.decoding.verification import Verification, greedy
from nextlat.model.cache import Cache
from nextlat.model.interfaces import CausalLM, Drafter, LMOutput


class Setting(NamedTuple):
    """What stays the same from round to round."""

    lm: CausalLM
    drafter: Drafter | None
    cache: Cache
    """Of the model; each round extends it by all places of its call, and leaves it to the caller to forget."""
    sampling: Sampling
    uniform: Uniform
    """Source of all draws."""
    vocab_size: int
    """Of the model."""


class Round(NamedTuple):
    """What a round came to, for all rows."""

    output: LMOutput
    """Of the model's call."""
    tokens: Tensor
    """(B, T) int64 what it was called on: the pending token, then the drafted ones."""
    drafted: Tensor
    """(B,) int64 length of the draft: the most drafted tokens that could have been kept."""
    accepted: Tensor
    """(B,) int64 how many were kept."""
    path: Tensor
    """(B, P) places in ``tokens`` of the pending token and of those kept behind it; junk beyond 1 + ``accepted``."""
    pending: Tensor
    """(B,) int64 the token behind them, known and not yet seen by the model."""


def play_chain(
    setting: Setting,
    policy: Policy,
    judge: Verification,
    state: Any,
    pending: Tensor,
    room: Tensor,
    states: Tensor | None = None,
) -> Round:
    """A round with a draft of one token behind the other; with none where there is no drafter, or the policy says so.

    Args:
        setting: model, drafter and sampling.
        policy: how long the draft is.
        judge: which of the drafted tokens are kept.
        state: the drafter's state after the last accepted position.
        pending: (B,) int64 the known tokens behind it.
        room: (B,) int64 most tokens that each row may draft.
        states: (B, D) of the model at that position, for a policy that reads them.
    """
    _, drafter, cache, sampling, uniform, vocab_size = setting
    made = None
    longest = 0 if drafter is None else policy.plan(Known(pending, room, states))
    if drafter is not None and longest:
        room = room if longest >= policy.max_length else room.clamp(max=longest)
        made = draft(drafter, state, pending, sampling, policy, room, vocab_size, uniform)
    tokens = pending[:, None] if made is None else torch.cat([pending[:, None], made.tokens], 1)
    output = setting.lm(tokens, cache=cache)
    drafts = tokens[:, 1:]
    drafted = torch.zeros_like(room) if made is None else made.lengths
    if sampling.greedy:
        accepted, pending = greedy(output.logits.argmax(-1), drafts, drafted)
    elif made is None:
        accepted, pending = drafted, draw(sampling.law(output.logits[:, 0]), uniform(len(room)))
    else:
        coins = uniform(*drafts.shape).to(drafts.device)
        p = sampling.law(output.logits)
        verdict = judge(p, made.laws, drafts, drafted, coins.to(p.dtype))
        accepted, pending = verdict.accepted, draw(verdict.law, uniform(len(room)))
    policy.learn(drafted.tolist(), accepted.tolist())
    path = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Round(output, tokens, drafted, accepted, path, pending)
