"""Plain cached generation for prompts of equal length."""

from __future__ import annotations

import torch
from torch import Tensor

from nextlat.errors import NextLatError
from nextlat.model.interfaces import CausalLM


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token a row: the most likely at temperature 0, else drawn from ``softmax(logits / temperature)``.

    Args:
        logits: (B, V).
        temperature: 0 or above.
        generator: CPU generator of the draws, so that they do not depend on the device.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # on the CPU: the cumulative sum of floats has no deterministic CUDA kernel
    probabilities = (logits.double() / temperature).softmax(-1).cpu()
    u = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    below = (probabilities.cumsum(-1) <= u).sum(-1)  # u = 0 must not find a token of probability 0
    last = (probabilities > 0).cumsum(-1).argmax(-1)  # rounding may leave the sum short of u
    return torch.minimum(below, last).to(logits.device)


@torch.no_grad()
def generate(
    lm: CausalLM,
    prompts: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts by exactly ``max_new_tokens`` tokens.

    Args:
        lm: the plain language model.
        prompts: (B, P) int64, P >= 1.
        max_new_tokens: at least 1.
        temperature: 0 is greedy.
        generator: CPU generator for temperatures above 0; ``None`` uses torch's global one.

    Returns:
        (B, max_new_tokens) int64 new tokens.

    Raises:
        NextLatError: an empty prompt, a temperature below 0, or fewer than one new token asked for.
    """
    if prompts.shape[1] < 1:
        raise NextLatError("a prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise NextLatError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if temperature < 0:
        raise NextLatError(f"temperature is {temperature}; it must be 0 (greedy) or above")
    cache = lm.new_cache(len(prompts), prompts.shape[1] + max_new_tokens)
    tokens, new = prompts, []
    for _ in range(max_new_tokens):
        logits = lm(tokens, cache=cache).logits[:, -1]
        new.append(draw(logits, temperature, generator))
        tokens = new[-1][:, None]
    return torch.stack(new, dim=1)
