"""Cheap drafts change how often drafts are kept and nothing else; 8-bit products are as close as they say."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat import IGNORE, Batch, generate
from nextlat.decoding import Confidence, Policy, Sampling, Static, Statistics, cheap
from nextlat.decoding.cheap import Int8Linear, cheaper, count_targets, frequent_tokens, int8_works
from nextlat.decoding.drafting import Drafts, draft
from nextlat.decoding.verification import VERIFICATIONS, token_wise
from nextlat.errors import NextLatError
from tests.decoding.enumeration import Rules, World, distance
from tests.decoding.test_speculative import VOCABULARY, prompts, trained

EXACT = 1e-12
SAMPLINGS = {
    "temperature 1": Sampling(1.0),
    "temperature 0.6, top 2": Sampling(0.6, top_k=2),
    "temperature 2, top p 0.7": Sampling(2.0, top_p=0.7),
    "top 3, top p 0.9": Sampling(1.0, top_k=3, top_p=0.9),
    "greedy": Sampling(0.0),
}
needs_int8 = pytest.mark.skipif(not int8_works(), reason="this torch has no 8-bit products on this machine")


def quantised(world: World) -> tuple[World, World]:
    """The same target with a drafter's head in full precision, and in 8 bits."""
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(world.vocabulary, 16, generator=g)
    head = Int8Linear(weight)
    full, rounded = copy.copy(world), copy.copy(world)
    states = {text: torch.randn(1, 16, generator=g) for text in world.drafter}
    full.drafter = {text: F.linear(state, weight)[0].double() for text, state in states.items()}
    rounded.drafter = {text: head(state)[0].double() for text, state in states.items()}
    return full, rounded


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("judge", VERIFICATIONS)
@pytest.mark.parametrize("policy", [Static(2), Confidence(3, 0.6)])
def test_a_reduced_vocabulary_leaves_the_law_as_it_is(policy: Policy, judge: str, sampling: str) -> None:
    world = World(4, policy.max_length + 1, seed=4, closeness=0.6)
    assert distance(world, Rules(SAMPLINGS[sampling], policy, VERIFICATIONS[judge], vocabulary=(0, 2))) < EXACT


@needs_int8
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("judge", VERIFICATIONS)
def test_eight_bit_logits_leave_the_law_as_it_is(judge: str, sampling: str) -> None:
    _, rounded = quantised(World(4, 3, seed=4))
    rules = Rules(SAMPLINGS[sampling], Static(2), VERIFICATIONS[judge])
    assert distance(rounded, rules) < EXACT
    assert distance(rounded, replace(rules, vocabulary=(1, 2, 3))) < EXACT


def telling(world: World) -> Callable[..., Drafts | None]:
    """A mistake: drafting that declares laws of the whole vocabulary of another drafter."""

    def broken(drafter: Any, state: Any, token: Tensor, sampling: Sampling, *rest: Any) -> Drafts | None:
        made = draft(drafter, state, token, sampling, *rest)
        assert made is not None
        texts = [[tuple(row[:i]) for i in range(len(row))] for row in made.tokens.tolist()]
        laws = [torch.stack([sampling.law(world.drafter[text]) for text in row]) for row in texts]
        return made._replace(laws=torch.stack(laws))

    return broken


def test_declaring_the_whole_vocabulary_for_drafts_of_a_part_is_seen() -> None:
    world = World(4, 3, seed=4, closeness=0.6)
    right = Rules(Sampling(1.0), Static(2), token_wise, vocabulary=(0, 2))
    assert distance(world, right) < EXACT
    assert distance(world, replace(right, draft=telling(world))) > 1e-2


@needs_int8
def test_declaring_full_precision_for_eight_bit_drafts_is_seen() -> None:
    full, rounded = quantised(World(4, 3, seed=4))
    right = Rules(Sampling(1.0), Static(2), token_wise)
    assert distance(rounded, right) < EXACT
    assert distance(rounded, replace(right, draft=telling(full))) > 1e-5


class Table:
    """A drafter whose logits are of three tokens, whatever is fed."""

    max_length: int | None = None
    vocabulary: Tensor | None = torch.tensor([1, 4, 5])

    def observe(self, output: Any, accepted: Tensor) -> int:
        return 0

    def step(self, state: int, token: Tensor) -> tuple[int, Tensor]:
        return state + 1, torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64) * (state + 1)

    def select(self, state: int, rows: Tensor) -> int:
        return state


def test_drafted_tokens_and_declared_laws_are_of_the_whole_vocabulary() -> None:
    def middle(*shape: int) -> Tensor:
        return torch.full(shape, 0.5, dtype=torch.float64)

    for sampling in (Sampling(1.0), Sampling(0.0)):
        made = draft(Table(), 0, torch.tensor([0, 3]), sampling, Static(2), torch.tensor([2, 2]), 7, middle)
        assert made is not None
        assert made.tokens.tolist() == [[1, 1], [5, 5]]
    made = draft(Table(), 0, torch.tensor([0, 3]), Sampling(1.0), Static(2), torch.tensor([2, 2]), 7, middle)
    assert made is not None
    for step in (0, 1):
        law = torch.zeros(2, 7, dtype=torch.float64)
        law[:, [1, 4, 5]] = Table().step(step, torch.tensor([0, 3]))[1].softmax(-1)
        torch.testing.assert_close(made.laws[:, step], law)


@pytest.fixture
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also tiny layers are held in 8 bits."""
    monkeypatch.setattr(cheap, "INT8_LEAST", 1)


@needs_int8
@pytest.mark.usefixtures("every_layer")
@pytest.mark.parametrize("kind", ["nextlat", "mtp", "jtp"])
@pytest.mark.parametrize("vocabulary", [None, [0, 1, 3, 4, 7, 9]])
def test_greedy_text_is_that_of_plain_decoding(kind: str, vocabulary: list[int] | None) -> None:
    objective, counted = trained(kind), Statistics()
    lm, drafter = objective.as_lm(), objective.drafter()
    assert drafter is not None
    ids = None if vocabulary is None else torch.tensor(vocabulary)
    made = cheaper(drafter, ids, int8=True)
    output = lm(prompts())
    _, logits = made.step(made.observe(output, torch.full((4,), 4)), torch.tensor([1, 2, 3, 4]))
    assert logits.shape == (4, VOCABULARY if vocabulary is None else len(vocabulary))
    plain = generate(lm, prompts(), 30)
    fast = generate(lm, prompts(), 30, drafter=made, policy=Static(3), statistics=counted)
    assert torch.equal(fast, plain)
    assert 0 < sum(counted.accepted) < sum(counted.reached)


@needs_int8
@pytest.mark.usefixtures("every_layer")
@pytest.mark.parametrize("kind", ["nextlat", "mtp", "jtp"])
def test_cheap_logits_are_columns_of_the_full_ones_and_the_old_drafter_stays(kind: str) -> None:
    objective = trained(kind)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    modules = list(objective.modules())
    drafter = objective.drafter()
    assert drafter is not None
    output, ids = objective.as_lm()(prompts()), torch.tensor([2, 3, 8])
    token, accepted = torch.tensor([1, 2, 3, 4]), torch.full((4,), 4)

    def logits(one: Any) -> Tensor:
        made: Tensor = one.step(one.observe(output, accepted), token)[1]
        return made

    full = logits(drafter)
    torch.testing.assert_close(logits(cheaper(drafter, ids)), full[:, ids])
    rounded = logits(cheaper(drafter, ids, int8=True))
    assert 0 < (rounded - full[:, ids]).abs().max() < 0.1 * full.std()
    assert torch.equal(logits(drafter), full)
    assert drafter.vocabulary is None
    assert list(objective.modules()) == modules
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name])


@needs_int8
@pytest.mark.usefixtures("every_layer")
def test_the_dynamics_are_held_in_eight_bits_too() -> None:
    objective = trained()
    drafter: Any = objective.drafter()
    made: Any = cheaper(drafter, int8=True)
    kinds = [type(module) for module in made.network.modules()]
    assert kinds.count(Int8Linear) == 3 and nn.Linear not in kinds
    assert [type(module) for module in drafter.network.modules()].count(nn.Linear) == 3
    assert made.network.norm.weight is drafter.network.norm.weight  # only the layers are copied


def test_small_layers_stay_in_full_precision() -> None:
    drafter: Any = trained().drafter()
    made: Any = cheaper(drafter, int8=True)
    assert made.head is drafter.head
    assert [type(module) for module in made.network.modules()].count(nn.Linear) == 3


@needs_int8
def test_eight_bit_products_keep_to_their_bound_where_one_scale_for_all_outputs_would_not() -> None:
    g = torch.Generator().manual_seed(0)
    size = torch.logspace(-3, 0, 40)[:, None]  # outputs of very different sizes, as rare and frequent tokens have
    weight, bias = torch.randn(40, 64, generator=g) * size, torch.randn(40, generator=g)
    u = torch.randn(5, 64, generator=g) * torch.tensor([[1.0], [1e-3], [1e3], [1.0], [1.0]])
    exact = F.linear(u.double(), weight.double())
    error = (Int8Linear(weight)(u) - exact).abs()
    largest = u.abs().amax(-1, keepdim=True)
    bound = largest / 126 * weight.abs().sum(1) + weight.abs().amax(1) / 254 * (
        u.abs().sum(-1, keepdim=True) + 64 * largest / 126
    )
    assert (error <= bound * 1.001).all()
    typical = u.norm(dim=-1, keepdim=True) * weight.norm(dim=1) / 8  # the size of a logit of random weights
    assert (error / typical).max() < 0.06
    scale = weight.abs().max() / 127
    one_scale = (F.linear(u, (weight / scale).round() * scale) - exact).abs()
    assert (one_scale > bound).any()
    assert (one_scale / typical).mean(0).max() > 0.5
    torch.testing.assert_close(Int8Linear(weight, bias)(u), Int8Linear(weight)(u) + bias)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="8-bit products are for x86 processors")
@pytest.mark.skipif(not hasattr(torch.ops.quantized, "linear_prepack"), reason="this torch has no 8-bit products")
def test_where_the_operators_are_they_are_used() -> None:
    """The tests above are left out where 8-bit products come out wrong; here that is a failure."""
    assert int8_works()


@needs_int8
def test_large_sums_do_not_overflow() -> None:
    """Products of all 8 bits, added in 16, would stop at 32,767 on processors without VNNI."""
    found = Int8Linear(torch.ones(8, 256))(torch.ones(3, 256))
    torch.testing.assert_close(found, torch.full((3, 8), 256.0), rtol=1e-4, atol=0)


@needs_int8
def test_a_row_does_not_depend_on_those_beside_it() -> None:
    g = torch.Generator().manual_seed(0)
    head, u = Int8Linear(torch.randn(30, 32, generator=g)), torch.randn(3, 32, generator=g)
    u[1] *= 1e4
    u[2] = 0
    assert torch.equal(head(u), torch.cat([head(u[row : row + 1]) for row in range(3)]))
    assert not head(u)[2].any()


def test_without_eight_bit_products_drafts_are_made_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(cheap, "Int8Linear", missing)
    int8_works.cache_clear()
    try:
        assert not int8_works()
        drafter: Any = trained().drafter()
        with pytest.warns(UserWarning, match="made in full precision: torch .* lacks 8-bit products"):
            made: Any = cheaper(drafter, torch.tensor([1, 2]), int8=True)
    finally:
        int8_works.cache_clear()
    assert made.network is drafter.network
    state = torch.randn(2, 16, dtype=torch.float64)
    torch.testing.assert_close(made.head(state), drafter.head(state)[:, 1:3])


def test_frequent_tokens_are_sorted_ids_and_the_lower_of_equals() -> None:
    counts = torch.tensor([3, 9, 0, 3, 7, 3])
    assert frequent_tokens(counts, 1).tolist() == [1]
    assert frequent_tokens(counts, 3).tolist() == [0, 1, 4]
    assert frequent_tokens(counts, 4).tolist() == [0, 1, 3, 4]
    assert frequent_tokens(counts, 6).tolist() == [0, 1, 2, 3, 4, 5]
    for size in (0, -1, 7):
        with pytest.raises(NextLatError, match=f"of {size} tokens is asked for; it must have 1 to 6"):
            frequent_tokens(counts, size)


class Counted:
    """A task whose row r of step s asks for token s, then r, then for nothing."""

    vocab_size, next_token = 5, True

    def rows(self, step: int, start: int, stop: int) -> Batch:
        targets = torch.tensor([[step, row, IGNORE] for row in range(start, stop)])
        return Batch(torch.full_like(targets, 4), targets)


def test_only_targets_are_counted() -> None:
    task: Any = Counted()
    assert count_targets(task, 3, 2).tolist() == [2 + 3, 2 + 3, 2, 0, 0]
    with pytest.raises(NextLatError, match="steps is 0"):
        count_targets(task, 3, 0)
    task.next_token = False
    with pytest.raises(NextLatError, match="labels and not the next tokens"):
        count_targets(task, 3, 1)


@pytest.mark.parametrize(
    ("vocabulary", "says"),
    [
        (torch.tensor([], dtype=torch.int64), "at least one"),
        (torch.tensor([[1, 2]]), "in one dimension"),
        (torch.tensor([1.0, 2.0]), "is torch.float32"),
        (torch.tensor([1, 3, 2]), "not increasing"),
        (torch.tensor([1, 1]), "not increasing"),
        (torch.tensor([-1, 2]), "ids of this model lie between 0 and 10"),
        (torch.tensor([2, 11]), "holds tokens 2 to 11"),
    ],
)
def test_what_is_no_draft_vocabulary_is_refused(vocabulary: Tensor, says: str) -> None:
    drafter = trained().drafter()
    assert drafter is not None
    with pytest.raises(NextLatError, match=says):
        cheaper(drafter, vocabulary)


def test_a_drafter_that_is_cheaper_already_is_refused() -> None:
    drafter = trained().drafter()
    assert drafter is not None
    with pytest.raises(NextLatError, match="ask for a draft vocabulary and int8 together"):
        cheaper(cheaper(drafter, torch.tensor([1, 2])), torch.tensor([0]))
