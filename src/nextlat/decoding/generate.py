"""Generation as one tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from nextlat.decoding.policies import Policy
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.speculative import Statistics, Step, decode
from nextlat.decoding.tree import Tree
from nextlat.model.interfaces import CausalLM, Drafter


def generate(
    lm: CausalLM,
    prompts: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    lengths: Sequence[int] | None = None,
    stop_tokens: Collection[int] = (),
    context_length: int | None = None,
    drafter: Drafter | None = None,
    policy: Policy | Tree | None = None,
    verification: str = "block",
    statistics: Statistics | None = None,
) -> Tensor:
    """Continue prompts by exactly ``max_new_tokens`` tokens; see :func:`nextlat.decoding.speculative.decode`.

    Args:
        lm: the language model.
        prompts: (B, P) int64, padded at their end where shorter than P.
        max_new_tokens: at least 1.
        temperature: 0 is greedy.
        generator: CPU generator for temperatures above 0; ``None`` uses torch's global one.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest most likely tokens that reach probability p together.
        lengths: true lengths of the prompts.
        stop_tokens: a row ends with the first of them and is filled up with it.
        context_length: most positions of prompt and continuation together.
        drafter: guesses tokens ahead, which changes the speed and not the law of what comes out.
        policy: how long drafts are, or the shape of drafts that branch; needed with a drafter.
        verification: ``block`` or ``token``, for drafts that do not branch.
        statistics: filled while decoding.

    Returns:
        (B, max_new_tokens) int64 new tokens.

    Raises:
        NextLatError: what is asked for is out of range; the message says what, and the limit.
    """
    rounds = decode(
        lm,
        prompts,
        max_new_tokens,
        Sampling(temperature, top_k, top_p),
        drafter=drafter,
        policy=policy,
        verification=verification,
        lengths=lengths,
        stop_tokens=stop_tokens,
        context_length=context_length,
        generator=generator,
        statistics=statistics,
    )
    return collected(rounds, len(prompts), max_new_tokens).to(prompts.device)


def collected(rounds: Iterable[Step], rows: int, length: int) -> Tensor:
    """(rows, length) int64 of what :func:`nextlat.decoding.speculative.decode` yields; short rows repeat their last."""
    found: list[list[int]] = [[] for _ in range(rows)]
    for step in rounds:
        for row, tokens in step:
            found[row] += tokens
    return torch.tensor([row + row[-1:] * (length - len(row)) for row in found])
