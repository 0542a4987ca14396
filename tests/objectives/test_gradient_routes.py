"""Which paths carry gradient and which are cut (arXiv 2511.05963): zero means exactly zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nextlat.batch import IGNORE, Batch
from nextlat.objectives.base import total_loss
from nextlat.objectives.nextlat import NextLat, nextlat_sums
from tests.batches import random_batch
from tests.objectives.cases import VOCABULARY, gradients, halfway, parts, small_nextlat, small_trunk

AUXILIARY = ("latent_1", "kl_1", "latent_2", "kl_2")


def two_documents() -> Batch:
    """Six tokens in two documents; every target is asked for."""
    return Batch(
        torch.tensor([[1, 2, 3, 4, 0, 2]]), torch.tensor([[2, 3, 1, 0, 2, 4]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    )


def reached(gradient: Tensor | None) -> list[bool]:
    """Which rows of a (n, D) gradient are not exactly zero."""
    assert gradient is not None
    return (gradient != 0).any(-1).tolist()


@pytest.mark.parametrize("name", AUXILIARY)
def test_target_states_are_cut_and_source_states_are_live(name: str) -> None:
    leaves = parts(1, 6)
    term = nextlat_sums(*leaves, two_documents(), halfway, 2)[name][0]
    (hidden,) = torch.autograd.grad(term, leaves.hidden)
    sources = [True, True, False] * 2 if name.endswith("1") else [True, False, False] * 2
    assert reached(hidden[0]) == sources


@pytest.mark.parametrize(
    ("name", "consumed"),
    [("latent_1", {2, 3, 0}), ("latent_2", {2, 3, 0}), ("kl_1", {2, 3, 0}), ("kl_2", {2, 3, 0})],
)
def test_exactly_the_consumed_tokens_get_an_embedding_gradient(name: str, consumed: set[int]) -> None:
    # tokens 1 and 4 open their documents and are never consumed
    leaves = parts(1, 6)
    term = nextlat_sums(*leaves, two_documents(), halfway, 2)[name][0]
    (embedding,) = torch.autograd.grad(term, leaves.embedding)
    assert reached(embedding) == [token in consumed for token in range(5)]


@pytest.mark.parametrize("name", AUXILIARY)
def test_auxiliary_terms_never_reach_an_untied_head(name: str) -> None:
    objective = small_nextlat()
    term = objective(random_batch(0, 2, 6, VOCABULARY))[name]
    assert term.sum.item() > 0
    (head,) = torch.autograd.grad(term.sum, [objective.model.head_weight], allow_unused=True, materialize_grads=True)
    assert (head == 0).all()


@pytest.mark.parametrize("name", AUXILIARY)
def test_a_tied_matrix_gets_only_the_gradient_of_its_lookup(name: str) -> None:
    # sending the KL through the live head when it is tied is a known mistake
    batch, leaves = random_batch(1, 2, 6, 5), parts(2, 6)
    tied = nextlat_sums(leaves.hidden, leaves.embedding, leaves.embedding, batch, halfway, 2)[name][0]
    copy = leaves.embedding.detach().clone()
    apart = nextlat_sums(leaves.hidden, leaves.embedding, copy, batch, halfway, 2)[name][0]
    (found,) = torch.autograd.grad(tied, leaves.embedding)
    (expected,) = torch.autograd.grad(apart, leaves.embedding)
    assert (found != 0).any()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_the_tied_model_sends_the_kl_through_its_lookup_and_trunk_only() -> None:
    tied, batch = small_nextlat(tied=True, latent_weight=0.0), random_batch(2, 2, 6, VOCABULARY)
    model = tied.model
    copy = model.head_weight.detach().clone()
    hidden = model.hidden_states(batch.tokens, batch.documents)
    apart = nextlat_sums(hidden, model.embedding_weight, copy, batch, tied.dynamics, 2, latent=False)
    for step in (1, 2):
        found = gradients(tied(batch)[f"kl_{step}"].sum, tied)
        (lookup,) = torch.autograd.grad(apart[f"kl_{step}"][0], model.embedding_weight, retain_graph=True)
        assert (lookup != 0).any()
        torch.testing.assert_close(found["model.embed_tokens.weight"], lookup, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", AUXILIARY)
def test_auxiliary_terms_train_the_trunk_its_embedding_and_the_dynamics(name: str) -> None:
    # "gradients flow only through the dynamics" holds for the head only
    # many sources, because the first token of a document has nothing to choose from, and its queries no gradient
    objective = small_nextlat()
    term = objective(random_batch(0, 4, 12, VOCABULARY))[name]
    assert int(term.count) >= 8
    named = {key: value for key, value in objective.named_parameters() if key != "model.lm_head.weight"}
    for key, gradient in zip(named, torch.autograd.grad(term.sum, list(named.values())), strict=True):
        assert (gradient != 0).any(), key


def test_rolled_states_are_not_detached_between_steps() -> None:
    # p(s, e) = 3 s + e, so the second step multiplies the source's gradient by 9
    leaves = parts(1, 3)
    batch = Batch(torch.tensor([[0, 1, 2]]), torch.full((1, 3), IGNORE))
    term = nextlat_sums(*leaves, batch, lambda s, e: 3 * s + e, 2, kl=False)["latent_2"][0]
    hidden, embedding = torch.autograd.grad(term, (leaves.hidden, leaves.embedding))
    difference = 9 * leaves.hidden[0, 0] + 3 * leaves.embedding[1] + leaves.embedding[2] - leaves.hidden[0, 2]
    slope = difference.clamp(-1, 1)  # rho'
    torch.testing.assert_close(hidden[0, 0], 9 * slope)
    torch.testing.assert_close(embedding[1], 3 * slope)
    torch.testing.assert_close(embedding[2], slope)


def test_detach_source_cuts_the_trunk_and_keeps_dynamics_and_embeddings() -> None:
    leaves = parts(1, 6)
    sums = nextlat_sums(*leaves, two_documents(), halfway, 2, detach_source=True)
    for name in AUXILIARY:
        hidden, embedding = torch.autograd.grad(
            sums[name][0], (leaves.hidden, leaves.embedding), retain_graph=True, materialize_grads=True
        )
        assert not hidden.any()
        assert (embedding != 0).any()
    (hidden,) = torch.autograd.grad(sums["ce"][0], leaves.hidden)
    assert reached(hidden[0]) == [True] * 6


def test_detach_embeddings_cuts_the_table_and_keeps_the_source() -> None:
    leaves = parts(1, 6)
    sums = nextlat_sums(*leaves, two_documents(), halfway, 2, detach_embeddings=True)
    for name in AUXILIARY:
        hidden, embedding = torch.autograd.grad(
            sums[name][0], (leaves.hidden, leaves.embedding), retain_graph=True, materialize_grads=True
        )
        assert not embedding.any()
        assert (hidden != 0).any()


def test_both_detached_leave_the_auxiliary_terms_to_the_dynamics_alone() -> None:
    objective = small_nextlat(detach_source=True, detach_embeddings=True)
    terms = objective(random_batch(0, 2, 6, VOCABULARY))
    auxiliary = total_loss({name: term for name, term in terms.items() if name != "ce"})
    named = dict(objective.named_parameters())
    found = torch.autograd.grad(auxiliary, list(named.values()), materialize_grads=True)
    for name, gradient in zip(named, found, strict=True):
        assert bool(gradient.any()) == name.startswith("dynamics."), name


def test_a_live_target_gets_the_opposite_gradient_of_its_source() -> None:
    # with the identity as dynamics, SmoothL1 pulls both ends by the same force
    leaves = parts(1, 2)
    batch = Batch(torch.tensor([[0, 1]]), torch.full((1, 2), IGNORE))
    term = nextlat_sums(*leaves, batch, lambda s, e: s, 1, kl=False, stop_target=False)["latent_1"][0]
    (hidden,) = torch.autograd.grad(term, leaves.hidden)
    torch.testing.assert_close(hidden[0, 0], -hidden[0, 1])
    assert (hidden[0, 1] != 0).any()


def test_a_live_target_leaves_the_kl_teacher_cut() -> None:
    leaves = parts(1, 6)
    term = nextlat_sums(*leaves, two_documents(), halfway, 1, stop_target=False)["kl_1"][0]
    (hidden,) = torch.autograd.grad(term, leaves.hidden)
    assert reached(hidden[0]) == [True, True, False] * 2


def test_a_live_head_gets_a_gradient_from_the_kl_and_none_from_the_latent_term() -> None:
    leaves = parts(1, 6)
    sums = nextlat_sums(*leaves, two_documents(), halfway, 1, stop_head=False)
    (head,) = torch.autograd.grad(sums["kl_1"][0], leaves.head, retain_graph=True)
    assert (head != 0).any()
    assert torch.autograd.grad(sums["latent_1"][0], leaves.head, allow_unused=True) == (None,)


def test_the_auxiliary_cross_entropy_leaves_the_head_alone() -> None:
    leaves = parts(1, 6)
    sums = nextlat_sums(*leaves, two_documents(), halfway, 2, latent=False, kl=False, aux_ce=True)
    for step in (1, 2):
        hidden, embedding, head = torch.autograd.grad(
            sums[f"aux_ce_{step}"][0], leaves, retain_graph=True, materialize_grads=True
        )
        assert not head.any()
        assert (hidden != 0).any()
        assert (embedding != 0).any()


@pytest.mark.parametrize("tied", [False, True])
def test_cross_entropy_trains_head_embedding_and_trunk_but_not_the_dynamics(tied: bool) -> None:
    objective = small_nextlat(tied=tied)
    named = dict(objective.named_parameters())
    term = objective(random_batch(0, 2, 6, VOCABULARY))["ce"]
    for name, gradient in zip(
        named, torch.autograd.grad(term.sum, list(named.values()), materialize_grads=True), strict=True
    ):
        assert bool(gradient.any()) != name.startswith("dynamics."), name


def test_the_head_is_the_live_one_after_an_update_not_a_stale_copy() -> None:
    # a head copied when the objective is made would keep the old KL
    objective, batch = small_nextlat(), random_batch(0, 2, 6, VOCABULARY)
    before = objective(batch)["kl_1"].sum.item()
    with torch.no_grad():
        objective.model.lm_head.weight.mul_(2.0)
    model = objective.model
    hidden = model.hidden_states(batch.tokens, batch.documents)
    expected = nextlat_sums(hidden, model.embedding_weight, model.head_weight, batch, objective.dynamics, 1)
    after = objective(batch)["kl_1"].sum.item()
    assert after == pytest.approx(expected["kl_1"][0].item(), rel=1e-12)
    assert abs(after - before) > 1e-3


def test_one_ordinary_backward_gives_every_parameter_its_gradient() -> None:
    objective = NextLat(small_trunk(), horizon=2, dynamics=4).double()
    total_loss(objective(random_batch(0, 2, 6, VOCABULARY))).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name
    assert not any(isinstance(module, nn.Dropout) for module in objective.modules())
