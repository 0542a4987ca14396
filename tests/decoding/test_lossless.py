"""A round puts out the model's own law, exactly; and the enumeration that shows it sees every known mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nextlat.decoding import rounds
from nextlat.decoding.drafting import Drafts, draft
from nextlat.decoding.policies import Confidence, Entropy, Known, Policy, Static
from nextlat.decoding.rounds import Round, Setting, play_chain
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.verification import VERIFICATIONS, Verdict, block_wise, token_wise
from tests.decoding.enumeration import Rules, TableDrafter, Text, World, distance, outcomes, output_law

EXACT = 1e-12


class Plans(Static):
    """Fewer than there is room for, decided by what is known before the draft."""

    def plan(self, known: Known) -> int:
        assert (known.room == 3).all()
        return 1 + int((known.tokens >= 0).all())


POLICIES: dict[str, Policy] = {
    "one": Static(1),
    "two": Static(2),
    "three": Static(3),
    "confidence": Confidence(3, 0.55),
    "entropy": Entropy(3, 0.62),
    "planned": Plans(3),
}
SAMPLINGS = {
    "temperature 1": Sampling(1.0),
    "temperature 0.4": Sampling(0.4),
    "temperature 2, top 2": Sampling(2.0, top_k=2),
    "top p 0.7": Sampling(1.0, top_p=0.7),
    "top 3, top p 0.9": Sampling(1.3, top_k=3, top_p=0.9),
    "greedy": Sampling(0.0),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("judge", VERIFICATIONS)
def test_a_round_puts_out_the_models_own_law(judge: str, policy: str, sampling: str) -> None:
    world = World(3, 4, seed=0, closeness=0.3)
    assert distance(world, Rules(SAMPLINGS[sampling], POLICIES[policy], VERIFICATIONS[judge])) < EXACT


@pytest.mark.parametrize(("vocabulary", "length", "closeness"), [(5, 2, 0.0), (4, 3, 0.7), (2, 3, 0.5)])
@pytest.mark.parametrize("judge", VERIFICATIONS)
def test_so_it_does_for_other_vocabularies(judge: str, vocabulary: int, length: int, closeness: float) -> None:
    world = World(vocabulary, length + 1, seed=vocabulary, closeness=closeness)
    assert distance(world, Rules(Sampling(1.0), Static(length), VERIFICATIONS[judge])) < EXACT


@pytest.mark.parametrize("judge", VERIFICATIONS)
def test_a_perfect_drafter_is_always_kept(judge: str) -> None:
    world = World(3, 4, seed=0, closeness=1.0)
    rules = Rules(Sampling(1.0), Static(3), VERIFICATIONS[judge])
    assert distance(world, rules) < EXACT
    p = torch.stack([Sampling(1.0).law(world.target[text]) for text in ((), (1,), (1, 2), (1, 2, 0))])[None]
    verdict = VERIFICATIONS[judge](
        p, p[:, :-1], torch.tensor([[1, 2, 0]]), torch.tensor([3]), torch.full((1, 3), 1 - 1e-12, dtype=torch.float64)
    )
    assert verdict.accepted.tolist() == [3]
    assert torch.equal(verdict.law, p[:, 3])


def no_residual(p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor, u: Tensor) -> Verdict:
    accepted = token_wise(p, q, drafts, lengths, u).accepted
    return Verdict(accepted, p[torch.arange(len(p)), accepted])


def residual_after_the_rejected(p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor, u: Tensor) -> Verdict:
    accepted = token_wise(p, q, drafts, lengths, u).accepted
    return Verdict(accepted, p[torch.arange(len(p)), (accepted + 1).clamp(max=p.shape[1] - 1)])


def early_bonus(p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor, u: Tensor) -> Verdict:
    verdict = token_wise(p, q, drafts, lengths, u)
    stale = p[torch.arange(len(p)), (lengths - 1).clamp(min=0)]
    return Verdict(verdict.accepted, torch.where((verdict.accepted == lengths)[:, None], stale, verdict.law))


def block_without_worth(p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor, u: Tensor) -> Verdict:
    return Verdict(block_wise(p, q, drafts, lengths, u).accepted, token_wise(p, q, drafts, lengths, u * 0 + 1).law)


def redeclared(law: Callable[[Tensor, Sampling], Tensor], drawn: Sampling | None = None) -> Callable[..., Drafts]:
    """Drafting that tells the verification another law of the drafter's logits, or also draws from another."""

    def broken(drafter: TableDrafter, state: list[Text], token: Tensor, sampling: Sampling, *rest: Any) -> Any:
        made = draft(drafter, state, token, drawn or sampling, *rest)
        assert made is not None
        told = [
            torch.stack([law(drafter.table[tuple(row[:i])], sampling) for i in range(len(row))])
            for row in made.tokens.tolist()
        ]
        return made._replace(laws=torch.stack(told))

    return broken


def discarding(*arguments: Any) -> Any:
    """Drafting that throws away, unverified, tokens that are less likely than 0.3, and all behind them."""
    made = draft(*arguments)
    assert made is not None
    likely = made.laws.gather(-1, made.tokens[..., None])[..., 0] >= 0.3
    return made._replace(lengths=torch.minimum(made.lengths, likely.cumprod(1).sum(1)))


def one_coin_twice(setting: Setting, *rest: Any) -> Round:
    """A round whose last token is drawn with the first coin of the verification."""
    kept: list[Tensor] = []

    def uniform(*shape: int) -> Tensor:
        if kept:
            return kept[0][:, 0]
        drawn = setting.uniform(*shape)
        if len(shape) == 2:
            kept.append(drawn)
        return drawn

    return play_chain(setting._replace(uniform=uniform), *rest)


def raw_target(setting: Setting, *rest: Any) -> Round:
    """A round whose drafts are of the truncated law, and whose verification is not."""
    sampling = setting.sampling

    def broken(*arguments: Any) -> Any:
        return draft(*arguments[:3], sampling, *arguments[4:])

    with mock.patch.object(rounds, "draft", broken):
        return play_chain(setting._replace(sampling=Sampling(1.0)), *rest)


def stale_logits(setting: Setting, *rest: Any) -> Round:
    """A round that reads the model's answer one place too late."""

    def model(tokens: Tensor, cache: Any) -> Any:
        output = setting.lm(tokens, cache=cache)
        return output._replace(logits=torch.cat([output.logits[:, 1:], output.logits[:, -1:]], 1))

    return play_chain(setting._replace(lm=model), *rest)  # type: ignore[arg-type]


def whole_law(logits: Tensor, sampling: Sampling) -> Tensor:
    return logits.softmax(-1)


MISTAKES: dict[str, dict[str, Any]] = {
    "laws declared before temperature and truncation": {"draft": redeclared(whole_law)},
    "a drafted token discarded for its own probability": {"draft": discarding},
    "greedy drafts declared as sampled ones": {
        "draft": redeclared(lambda logits, sampling: sampling.law(logits), Sampling(0.0))
    },
    "no residual after a rejection": {"judge": no_residual},
    "residual of the position behind the rejected token": {"judge": residual_after_the_rejected},
    "bonus token from the last but one law": {"judge": early_bonus},
    "block verdicts with the residual of single ones": {"judge": block_without_worth},
    "the last token drawn with the first coin": {"play": one_coin_twice},
    "a truncated draft against the whole law": {"play": raw_target},
    "the model's answer one place too late": {"play": stale_logits},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_known_mistake_is_seen(mistake: str) -> None:
    # truncated sampling, so that declared and drafted laws can differ
    world = World(4, 4, seed=1, closeness=0.3)
    right = Rules(Sampling(0.7, top_k=3), Static(3), token_wise)
    assert distance(world, right) < EXACT
    assert distance(world, replace(right, **MISTAKES[mistake])) > 1e-2


def kept(world: World, judge: str, length: int) -> float:
    """Tokens that a round keeps of a draft, on average, by going through every draft and coin."""
    found = outcomes(world, Rules(Sampling(1.0), Static(length), VERIFICATIONS[judge]))
    return sum(probability * (len(text) - 1) for text, probability in found.items())


@pytest.mark.parametrize("closeness", [0.2, 0.5, 0.8])
def test_judging_a_block_keeps_more_and_one_token_equally_much(closeness: float) -> None:
    world = World(4, 4, seed=2, closeness=closeness)
    assert kept(world, "block", 1) == pytest.approx(kept(world, "token", 1), abs=1e-12)
    assert kept(world, "block", 3) > kept(world, "token", 3) + 1e-3


def test_the_output_law_is_a_law() -> None:
    world = World(3, 4, seed=3)
    law = output_law(world, Rules(Sampling(1.0), Confidence(3, 0.5), block_wise))
    assert law.shape == (3, 3, 3, 3)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    assert (law >= 0).all()
