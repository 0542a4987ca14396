"""Self-speculative decoding measured by kind of text: what is accepted, and what it gains over cached decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextlat.decoding.generate import collected
from nextlat.decoding.policies import Policy
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.speculative import Statistics, decode
from nextlat.decoding.tree import Tree
from nextlat.model.interfaces import CausalLM, Drafter
from nextlat.statistics import Metric, mean_interval

PLAIN = "plain"


@dataclass
class Arm:
    """One way of drafting on one domain, over all its prompts."""

    statistics: Statistics = field(default_factory=Statistics)
    seconds: list[float] = field(default_factory=list)
    """Of each continuation from its first token on: processor time with one thread, else wall time."""
    prompt_seconds: list[float] = field(default_factory=list)
    """Of the call over each prompt, which gives the first token; no way of drafting makes it faster."""
    accepted: list[float] = field(default_factory=list)
    """Drafted tokens kept per round, of each prompt; the token that every round yields anyway is not counted."""
    different: int = 0
    """Prompts whose text is not that of plain decoding; at temperature 0 there should be none but by rounding."""

    @property
    def acceptance(self) -> list[float]:
        """Share of drafted tokens kept, by position, among those whose turn it was."""
        return self.statistics.acceptance


def measure_domain(
    lm: CausalLM,
    drafter: Drafter,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    policies: Mapping[str, Callable[[], Policy | Tree]],
    stop_tokens: Sequence[int] = (),
    baseline: CausalLM | None = None,
) -> dict[str, Arm]:
    """Continue every prompt, alone, in every way; the ways take turns, so that a busy machine slows all alike.

    Args:
        lm: the model.
        drafter: of the model.
        prompts: (P,) int64 each.
        max_new_tokens: tokens to add to each.
        sampling: how tokens are drawn; every way gets the same seed for a prompt.
        policies: makes the policy, or the tree, of each way. It is made once, after a warm-up with another: a policy
            that learns goes on learning over prompts.
        stop_tokens: end a continuation.
        baseline: the model for plain decoding, where ``lm`` was prepared for drafts; default ``lm``.

    Returns:
        ``plain``, cached decoding without drafts, and each of ``policies``.
    """
    arms = {name: Arm() for name in (PLAIN, *policies)}
    names = list(arms)
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first warms up, with policies that are thrown away
        if number < 2:
            made: dict[str, Policy | Tree | None] = {PLAIN: None, **{name: make() for name, make in policies.items()}}
        texts = {}
        for turn in range(len(names)):
            name = names[(turn + number) % len(names)]
            policy, counted = made[name], Statistics()
            g = torch.Generator().manual_seed(number)
            began = now()
            rounds = decode(
                lm if policy is not None or baseline is None else baseline,
                prompt[None],
                max_new_tokens,
                sampling,
                drafter=None if policy is None else drafter,
                policy=policy,
                stop_tokens=stop_tokens,
                generator=g,
                statistics=counted,
            )
            opening = next(rounds)
            opened = now()
            texts[name] = collected([opening, *rounds], 1, max_new_tokens)
            ended = now()
            if number:
                arm = arms[name]
                arm.statistics.add(counted)
                arm.prompt_seconds.append(opened - began)
                arm.seconds.append(ended - opened)
                arm.accepted.append(sum(counted.accepted) / max(counted.rounds, 1))
        for name, arm in arms.items():
            arm.different += bool(number) and not torch.equal(texts[name], texts[PLAIN])
    return arms


def now() -> float:
    """Seconds: of this process on one thread, which a neighbour does not inflate, else on the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def metrics(domains: Mapping[str, Mapping[str, Arm]], sampling: Sampling) -> dict[str, Metric]:
    """Everything as ``<domain>.<figure>_<way>``; see docs/decoding.md."""
    out = {}
    for domain, arms in domains.items():
        for name, arm in arms.items():
            counted, n = arm.statistics, len(arm.seconds)
            out[f"{domain}.seconds_{name}"] = Metric(sum(arm.seconds), n=n)
            out[f"{domain}.prompt_seconds_{name}"] = Metric(sum(arm.prompt_seconds), n=n)
            if name == PLAIN:
                continue
            out[f"{domain}.ratio_{name}"] = Metric(ratio(arms, name), n=n, chance=1.0)
            out[f"{domain}.accepted_{name}"] = mean_interval(arm.accepted)
            out[f"{domain}.drafted_{name}"] = Metric(sum(counted.drafted) / max(counted.rounds, 1), n=counted.rounds)
            out[f"{domain}.tokens_per_round_{name}"] = Metric(counted.tokens_per_round, n=counted.rounds)
            for position, (share, turns) in enumerate(zip(arm.acceptance, counted.reached, strict=False), 1):
                out[f"{domain}.acceptance_{name}_{position}"] = Metric(share, n=turns)
            if sampling.greedy:
                out[f"{domain}.different_{name}"] = Metric(arm.different, n=n)
    return out


def ratio(arms: Mapping[str, Arm], name: str) -> float:
    """Time of cached decoding over that of a way, both from the first token on."""
    return sum(arms[PLAIN].seconds) / sum(arms[name].seconds)
