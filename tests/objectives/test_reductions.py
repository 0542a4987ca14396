"""Sums, counts and what only global counts give: equal gradients however a batch is split."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError
from nextlat.objectives.base import Objective, Term, total_loss
from nextlat.objectives.gpt import GPT
from nextlat.objectives.losses import cross_entropy_sum, kl_sum, smooth_l1_sum
from nextlat.objectives.nextlat import NextLat, nextlat_sums
from tests.batches import random_batch
from tests.objectives.cases import (
    VOCABULARY,
    assert_same_gradients,
    gradients,
    halfway,
    parts,
    small_nextlat,
    small_trunk,
)


def objective_named(name: str) -> Objective:
    return GPT(small_trunk()) if name == "gpt" else small_nextlat(horizon=3)


def uneven_batch() -> Batch:
    """Four rows with 8, 1, 0 and about half of their targets asked for, documents of many lengths."""
    batch = random_batch(0, 4, 8, VOCABULARY)
    targets = batch.targets.clone()
    targets[0] = batch.tokens[0]
    targets[1] = IGNORE
    targets[1, 2] = 3
    targets[2] = IGNORE
    return batch._replace(targets=targets)


def added_counts(objective: Objective, pieces: list[Batch]) -> dict[str, Tensor]:
    counts = [objective.counts(piece) for piece in pieces]
    return {name: torch.stack([count[name] for count in counts]).sum() for name in counts[0]}


@pytest.mark.parametrize("name", ["gpt", "nextlat"])
@pytest.mark.parametrize("cuts", [[0, 2, 4], [0, 1, 2, 3, 4], [0, 3, 4]])
def test_accumulated_gradient_equals_that_of_the_whole_batch(name: str, cuts: list[int]) -> None:
    # a mean per micro-batch weighs uneven pieces equally and fails here
    objective, batch = objective_named(name), uneven_batch()
    pieces = [batch.rows(a, b) for a, b in pairwise(cuts)]
    counts = added_counts(objective, pieces)
    assert {key: int(value) for key, value in counts.items()} == {
        key: int(value) for key, value in objective.counts(batch).items()
    }
    expected = gradients(total_loss(objective(batch)), objective)
    found = {key: torch.zeros_like(value) for key, value in expected.items()}
    for piece in pieces:
        for key, gradient in gradients(total_loss(objective(piece), counts), objective).items():
            found[key] += gradient
    assert_same_gradients(found, expected)

    means = {key: torch.zeros_like(value) for key, value in expected.items()}
    for piece in pieces:
        loss = total_loss(objective(piece)) / len(pieces)
        for key, gradient in zip(
            means, torch.autograd.grad(loss, list(objective.parameters()), materialize_grads=True), strict=True
        ):
            means[key] += gradient
    assert (means["model.lm_head.weight"] - expected["model.lm_head.weight"]).abs().max() > 1e-4


def test_accumulation_in_fp32_agrees_to_1e_6() -> None:
    objective, batch = small_nextlat().float(), uneven_batch()
    pieces = [batch.rows(0, 2), batch.rows(2, 4)]
    counts = added_counts(objective, pieces)
    expected = gradients(total_loss(objective(batch)), objective)
    halves = [gradients(total_loss(objective(piece), counts), objective) for piece in pieces]
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(halves[0][name] + halves[1][name], gradient, rtol=0, atol=1e-6 * max(1.0, scale))


def test_averaging_ranks_after_multiplying_by_their_number_equals_one_rank() -> None:
    objective, batch = small_nextlat(), uneven_batch()
    ranks = [batch.rows(0, 1), batch.rows(1, 4)]
    counts = added_counts(objective, ranks)
    parts_of_it = [gradients(2 * total_loss(objective(rank), counts), objective) for rank in ranks]
    averaged = {name: (parts_of_it[0][name] + parts_of_it[1][name]) / 2 for name in parts_of_it[0]}
    assert_same_gradients(averaged, gradients(total_loss(objective(batch)), objective))


@pytest.mark.parametrize("name", ["gpt", "nextlat"])
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    objective, batch = objective_named(name), uneven_batch()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Batch(batch.tokens[order], batch.targets[order], batch.documents[order])
    assert_same_gradients(
        gradients(total_loss(objective(shuffled)), objective), gradients(total_loss(objective(batch)), objective)
    )


def empty_batches() -> dict[str, Batch]:
    tokens = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    nothing = torch.full_like(tokens, IGNORE)
    return {
        "all prompt": Batch(tokens, nothing),
        "all padding": Batch(tokens, tokens, torch.full_like(tokens, -1)),
        "one token a row": Batch(tokens[:, :1], tokens[:, 1:2]),
        "one token a row, packed": Batch(tokens[:, :1], tokens[:, 1:2], torch.zeros(2, 1, dtype=torch.long)),
        "one token a document": Batch(tokens, tokens, torch.arange(4).repeat(2, 1)),
        "horizon as long as the row": Batch(tokens[:, :3], tokens[:, 1:]),
        "horizon longer than the row": Batch(tokens[:, :2], tokens[:, 2:]),
    }


@pytest.mark.parametrize("case", list(empty_batches()))
@pytest.mark.parametrize("tied", [False, True])
def test_terms_without_positions_are_exactly_zero_with_zero_gradients(case: str, tied: bool) -> None:
    # a mean over nothing is NaN; a missing gradient stalls data-parallel training
    objective, batch = small_nextlat(horizon=3, tied=tied, ce_weight=1.0, tv_weight=1.0), empty_batches()[case]
    terms, counts = objective(batch), objective.counts(batch)
    assert [*terms] == [*objective(uneven_batch())] == [*counts]
    empty = [name for name, count in counts.items() if int(count) == 0]
    assert empty
    for name in empty:
        assert int(terms[name].count) == 0
        assert terms[name].sum.item() == 0.0
        reached = torch.autograd.grad(
            terms[name].sum, list(objective.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        assert all((gradient == 0).all() for gradient in reached)
    loss = total_loss(terms)
    assert loss.isfinite()
    loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("case", ["all prompt", "all padding"])
def test_gpt_without_positions_is_zero_with_zero_gradients(case: str) -> None:
    objective = GPT(small_trunk())
    loss = total_loss(objective(empty_batches()[case]))
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients(loss, objective).values())


def test_all_padding_has_zero_gradient_everywhere() -> None:
    objective = small_nextlat(horizon=2)
    found = gradients(total_loss(objective(empty_batches()["all padding"])), objective)
    assert all((gradient == 0).all() for gradient in found.values())


def test_total_divides_each_sum_by_its_count_and_applies_the_weight() -> None:
    terms = {
        "a": Term(torch.tensor(6.0), torch.tensor(3), 1.0),
        "b": Term(torch.tensor(5.0), torch.tensor(0), 0.5),  # an empty count divides by 1
        "c": Term(torch.tensor(8.0), torch.tensor(4), 0.25),
    }
    assert total_loss(terms).item() == 6 / 3 + 0.5 * 5 + 0.25 * 8 / 4
    assert total_loss(terms, {"a": 6, "b": 5, "c": 8}).item() == 1 + 0.5 + 0.25
    with pytest.raises(NextLatError, match="no terms"):
        total_loss({})


@pytest.mark.parametrize("packed", [False, True])
def test_bf16_autocast_losses_are_fp32_and_within_two_percent(packed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    objective = NextLat(small_trunk().float(), horizon=2, dynamics=16, generator=g)
    batch = random_batch(0, 16, 32, VOCABULARY, packed=packed)
    exact = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(batch)
    for name, term in rough.items():
        assert term.sum.dtype is torch.float32, name
        assert int(term.count) == int(exact[name].count), name
        assert term.sum.item() == pytest.approx(exact[name].sum.item(), rel=0.02), name
    total_loss(rough).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_softmax_losses_of_low_precision_logits_are_computed_in_fp32() -> None:
    g = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(64, 50, generator=g).bfloat16() for _ in range(2))
    targets = torch.randint(50, (64,), generator=g)
    log_teacher = teacher.double().log_softmax(-1)
    assert cross_entropy_sum(teacher, targets).item() == pytest.approx(
        -log_teacher.gather(1, targets[:, None]).sum().item(), rel=1e-5
    )
    expected = (log_teacher.exp() * (log_teacher - student.double().log_softmax(-1))).sum().item()
    assert kl_sum(log_teacher.float(), student).item() == pytest.approx(expected, rel=1e-5)
    assert smooth_l1_sum(teacher, student).item() == pytest.approx(
        torch.nn.functional.smooth_l1_loss(teacher.double(), student.double(), reduction="sum").item(), rel=1e-5
    )


def test_sums_over_a_million_positions_keep_their_precision() -> None:
    # a running fp32 sum of 2^24 ones stops growing; one of 10^6 irregular values is off by far more than 1e-6
    n = 1_000_000
    logits = torch.tensor([0.3, -0.2]).repeat(n, 1)
    targets = torch.zeros(n, dtype=torch.long)
    each = -torch.tensor([0.3, -0.2], dtype=torch.float64).log_softmax(-1)[0].item()
    assert cross_entropy_sum(logits, targets).item() == pytest.approx(n * each, rel=1e-6)
    log_p = torch.tensor([0.3, -0.2], dtype=torch.float64).log_softmax(-1)
    log_q = torch.tensor([-0.1, 0.4], dtype=torch.float64).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum().item()
    found = kl_sum(log_p.float().repeat(n, 1), torch.tensor([-0.1, 0.4]).repeat(n, 1))
    assert found.item() == pytest.approx(n * divergence, rel=3e-6)  # fp32 rounding of one entry, not of the sum
    assert smooth_l1_sum(torch.full((n,), 0.7), torch.zeros(n)).item() == pytest.approx(n * 0.245, rel=1e-6)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_stay_finite(size: float) -> None:
    leaves = parts(2, 5)
    with torch.no_grad():
        leaves.head.mul_(size)
    sums = nextlat_sums(*leaves, random_batch(0, 2, 5, 5, packed=False), halfway, 2)
    assert all(math.isfinite(value.item()) for value, _ in sums.values())
    assert sums["kl_1"][0].item() > 100
    loss = sum(value for value, _ in sums.values())
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves))


def test_padding_states_that_are_not_finite_do_not_reach_a_term() -> None:
    # selection before reduction: multiplying a NaN by a zero mask would keep it
    leaves = parts(1, 6)
    with torch.no_grad():
        leaves.hidden[0, 4:] = torch.inf
    batch = Batch(
        torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 6, dtype=torch.long), torch.tensor([[0] * 4 + [-1] * 2])
    )
    for name, (value, _) in nextlat_sums(*leaves, batch, halfway, 3).items():
        assert value.isfinite(), name
