"""Decoding with a cache, and with drafts that the model verifies in one call a round."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nextlat.decoding.policies import Policy, Static
from nextlat.decoding.rounds import Round, Setting, play_chain
from nextlat.decoding.sampling import Sampling, draw
from nextlat.decoding.tree import Tree, play_tree
from nextlat.decoding.verification import Verification, find_verification
from nextlat.errors import NextLatError
from nextlat.model.interfaces import CausalLM, Drafter, LMOutput

Step = list[tuple[int, list[int]]]
"""(row, its new tokens) of a round, or of the call over the prompts; rows that gained none are left out."""


@dataclass
class Statistics:
    """What decoding did, over all rows."""

    calls: int = 0
    """Calls of the model, the one over the prompts included."""
    rounds: int = 0
    """Rounds of single rows: a call counts once for each row that was still going."""
    tokens: int = 0
    """Tokens produced."""
    opening: int = 0
    """Tokens among them that the call over the prompts gave, before any round."""
    drafted: list[int] = field(default_factory=list)
    """How often a token was drafted at position 1, 2, ... of a draft. The token that every round yields without a
    draft, the one behind the last kept token, is not counted. A tree counts at 1, 2, ... as far as it is deep."""
    reached: list[int] = field(default_factory=list)
    """How often all drafted tokens before it were kept, so that it was its turn; in a tree, the turn of that depth,
    whether or not the kept node had children there."""
    accepted: list[int] = field(default_factory=list)
    """How often it was kept."""

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a row gains by a round; 1 without drafts."""
        return (self.tokens - self.opening) / self.rounds if self.rounds else 1.0

    @property
    def acceptance(self) -> list[float]:
        """Share of drafted tokens that were kept, by position, among those whose turn it was; as far as it ever was."""
        return [kept / turns for kept, turns in zip(self.accepted, self.reached, strict=True) if turns]

    def add(self, other: Statistics) -> None:
        """Add what another decoding did."""
        self.calls += other.calls
        self.rounds += other.rounds
        self.tokens += other.tokens
        self.opening += other.opening
        for name in ("drafted", "reached", "accepted"):
            one, more = getattr(self, name), getattr(other, name)
            longest = max(len(one), len(more))
            padded = ([*counts, *[0] * (longest - len(counts))] for counts in (one, more))
            setattr(self, name, [a + b for a, b in zip(*padded, strict=True)])

    def count(self, drafted: int, accepted: int) -> None:
        """Add a row's round."""
        self.rounds += 1
        for counts in (self.drafted, self.reached, self.accepted):
            counts += [0] * (drafted - len(counts))
        for position in range(drafted):
            self.drafted[position] += 1
            self.reached[position] += position <= accepted
            self.accepted[position] += position < accepted


@dataclass
class _Row:
    """What a row has produced and may still produce."""

    number: int
    left: int
    stops: Collection[int]
    done: bool = False

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Tokens up to a stop token, which is kept, and up to the number asked for."""
        taken: list[int] = []
        for token in tokens:
            if self.done:
                break
            taken.append(token)
            self.left -= 1
            self.done = self.left == 0 or token in self.stops
        return taken


def decode(
    lm: CausalLM,
    prompts: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    drafter: Drafter | None = None,
    policy: Policy | Tree | None = None,
    verification: str = "block",
    lengths: Sequence[int] | None = None,
    stop_tokens: Collection[int] = (),
    context_length: int | None = None,
    generator: torch.Generator | None = None,
    statistics: Statistics | None = None,
) -> Iterator[Step]:
    """Continue prompts, yielding tokens as they are known.

    Each round drafts some tokens, has the model judge them in one call, keeps a beginning of them and adds the token
    behind it, so that what comes out follows the model's own law under ``sampling`` exactly, whatever the drafter.
    Rows advance independently.

    Args:
        lm: the model.
        prompts: (B, P) int64; rows shorter than P are padded at their end.
        max_new_tokens: tokens for each row, exactly, unless it meets a stop token.
        sampling: how laws are made of logits, of the model and of the drafter alike.
        drafter: guesses tokens ahead; ``None`` decodes token by token.
        policy: how long drafts are, or the shape of drafts that branch; needed with a drafter.
        verification: ``block`` or ``token``; see :mod:`nextlat.decoding.verification`. A tree has a rule of its own.
        lengths: true lengths of the prompts; default P each.
        stop_tokens: a row ends with the first of them, also inside a draft.
        context_length: most positions of prompt and continuation together; ``None`` for no limit.
        generator: CPU generator of all draws; ``None`` uses torch's global one.
        statistics: filled while decoding.

    Yields:
        the first token of each row, which the call over the prompts gives; then, for each round, what rows gained.

    Raises:
        NextLatError: an empty prompt, a length or a token out of range, a draft longer than the drafter makes, or a
            context that is too short.
    """
    lengths = list(lengths) if lengths is not None else [prompts.shape[1]] * len(prompts)
    _check(lm, prompts, lengths, max_new_tokens, context_length)
    policy = policy if drafter is not None and policy is not None else Static(0)
    longest = drafter.max_length if drafter is not None else None
    if longest is not None and not isinstance(policy, Tree) and policy.max_length >= longest:
        raise NextLatError(
            f"a draft of {policy.max_length} tokens behind the known one is asked for, and this drafter makes at most "
            f"{longest - 1}; ask for less, or train with a longer horizon"
        )
    return _rounds(
        lm,
        prompts,
        max_new_tokens,
        sampling,
        drafter,
        policy,
        find_verification(verification),
        lengths,
        stop_tokens,
        generator,
        statistics if statistics is not None else Statistics(),
    )


@torch.inference_mode()
def _rounds(
    lm: CausalLM,
    prompts: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    drafter: Drafter | None,
    policy: Policy | Tree,
    judge: Verification,
    lengths: list[int],
    stop_tokens: Collection[int],
    generator: torch.Generator | None,
    statistics: Statistics,
) -> Iterator[Step]:
    rows = [_Row(number, max_new_tokens, stop_tokens) for number in range(len(prompts))]
    device = prompts.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    spare = policy.nodes if isinstance(policy, Tree) else policy.max_length
    cache = lm.new_cache(len(rows), prompts.shape[1] + max_new_tokens + spare)
    last = torch.tensor(lengths, device=device) - 1
    output = lm(prompts, cache=cache, logits_at=last)
    statistics.calls += 1
    cache.lengths = list(lengths)
    logits = output.logits[:, 0]
    pending = logits.argmax(-1) if sampling.greedy else draw(sampling.law(logits), uniform(len(rows)))
    state: Any = drafter.observe(output, last) if drafter is not None else None
    reads = drafter is not None and not isinstance(policy, Tree) and policy.reads_states
    states = _states(output, last) if reads else None
    setting = Setting(lm, drafter, cache, sampling, uniform, logits.shape[-1])
    play: Callable[..., Round]
    if isinstance(policy, Tree):
        play = partial(play_tree, setting, policy)
    else:
        play = partial(play_chain, setting, policy, judge)
    opening = _emit(rows, [[token] for token in pending.tolist()], statistics)
    statistics.opening += len(opening)
    yield opening
    while not all(row.done for row in rows):
        if 2 * sum(not row.done for row in rows) <= len(rows):
            going = [index for index, row in enumerate(rows) if not row.done]
            cache.select(going)
            rows, index = [rows[i] for i in going], torch.tensor(going, device=device)
            pending = pending[index]
            state = drafter.select(state, index) if drafter is not None else None
            states = states[index] if states is not None else None
        # a row gains at least one token without a draft
        room = torch.tensor([0 if row.done else min(policy.max_length, row.left - 1) for row in rows], device=device)
        begins = list(cache.lengths)
        made = play(state, pending, room) if states is None else play(state, pending, room, states=states)
        output, tokens, drafted, accepted, path, pending = made
        statistics.calls += 1
        if drafter is not None:
            last = path.gather(1, accepted[:, None])[:, 0]
            state = drafter.observe(output, last)
            states = _states(output, last) if reads else None
        kept = accepted.tolist()
        places = [one[: n + 1] for one, n in zip(path.tolist(), kept, strict=True)]
        cache.keep([[] if row.done else one for row, one in zip(rows, places, strict=True)], begins)
        for row, n, m in zip(rows, drafted.tolist(), kept, strict=True):
            if not row.done:
                statistics.count(n, m)
        seen = zip(tokens.tolist(), places, pending.tolist(), strict=True)
        news = [[*(one[place] for place in way[1:]), token] for one, way, token in seen]
        yield _emit(rows, news, statistics)


def _states(output: LMOutput, places: Tensor) -> Tensor:
    """(B, D) of (B,) places in a call."""
    return output.hidden[torch.arange(len(places), device=places.device), places]


def _emit(rows: list[_Row], news: list[list[int]], statistics: Statistics) -> Step:
    out = []
    for row, new in zip(rows, news, strict=True):
        taken = row.take(new)
        statistics.tokens += len(taken)
        if taken:
            out.append((row.number, taken))
    return out


def _check(lm: CausalLM, prompts: Tensor, lengths: list[int], max_new_tokens: int, context_length: int | None) -> None:
    if not len(prompts):
        raise NextLatError("there are no prompts; give at least one")
    if prompts.shape[1] < 1 or min(lengths) < 1:
        raise NextLatError("a prompt is empty; give at least one token")
    if len(lengths) != len(prompts) or max(lengths) > prompts.shape[1]:
        raise NextLatError(
            f"lengths are {lengths} for {len(prompts)} prompts of {prompts.shape[1]} places; "
            "give one for each, none longer"
        )
    if max_new_tokens < 1:
        raise NextLatError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if context_length is not None and max(lengths) + max_new_tokens > context_length:
        raise NextLatError(
            f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones do not fit a context of "
            f"{context_length}; shorten the prompt, or ask for at most {max(context_length - max(lengths), 0)} tokens"
        )
    least, most = int(prompts.min()), int(prompts.max())
    size = getattr(lm, "vocab_size", None)
    if least < 0 or (size is not None and most >= size):
        wrong = least if least < 0 else most
        raise NextLatError(f"a prompt holds token {wrong}; ids lie between 0 and {'V' if size is None else size} - 1")
