"""Every objective against brute force on random rows: documents, prompts, padding, and horizons beyond them all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextlat.batch import IGNORE, Batch
from nextlat.objectives import OBJECTIVES, Objective
from nextlat.objectives.dynamics import LatentDynamics
from tests.batches import as_rows
from tests.objectives.rivals import END, VOCABULARY, small
from tests.oracles.bst import bst_terms, pairs_of
from tests.oracles.jtp import jtp_terms
from tests.oracles.mtp import mtp_terms, row_states
from tests.oracles.nextlat import Reference, Rows, dynamics_reference, nextlat_reference

LENGTH = 8
LEAST = {"gpt": 0, "mtp": 0, "jtp": 1, "bst": 0, "nextlat": 1}
"""The least horizon; gpt and bst have none."""
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


@st.composite
def rows_of_documents(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Tokens, targets and ids of one row: up to three documents, each with a prompt, and padding between and behind.

    An id may come back, at once or behind padding: adjoining documents of one id are one document. Next-token
    targets, so that all objectives take them; the last is the end token, another or nothing.
    """
    ids: list[int] = []
    for name in draw(st.sampled_from([(0, 1, 0), (0, 1, 2), (2, 2, 1), (0,), ()])):
        ids += [name] * draw(st.integers(1, 4))
        ids += [draw(st.sampled_from([-1, -2]))] * draw(st.sampled_from([0, 0, 0, 1, 2]))
    ids = (ids + [-1] * LENGTH)[:LENGTH]
    tokens = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=LENGTH, max_size=LENGTH))
    targets = []
    prompt = 0
    for t in range(LENGTH):
        if t == 0 or ids[t] != ids[t - 1]:
            prompt = draw(st.integers(0, 4))
        inside = t + 1 < LENGTH and ids[t + 1] == ids[t]
        target = tokens[t + 1] if inside else draw(st.sampled_from([END, END, 2, IGNORE]))
        targets.append(IGNORE if prompt > 1 else target)  # with n prompt tokens, the first n - 1 targets
        prompt -= 1
    return tokens, targets, ids


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """One or two rows of one to eight tokens; at times without ids."""
    rows = draw(st.lists(rows_of_documents(), min_size=1, max_size=2))
    batch = Batch(*(torch.tensor(part) for part in zip(*rows, strict=True)))
    length = draw(st.integers(1, LENGTH))
    batch = Batch(*(part[:, :length] for part in batch[:3] if part is not None))
    whole = Batch(batch.tokens, torch.cat([batch.tokens[:, 1:], torch.full((len(rows), 1), END)], 1))
    return draw(st.sampled_from([batch, batch, batch, whole]))


RETURNING = Batch(
    torch.tensor([[1, 2, 3, 4, 1, 2, 3, 0]]),
    torch.tensor([[2, END, 2, IGNORE, 2, 3, END, IGNORE]]),
    torch.tensor([[0, 0, 1, 0, 0, 0, 0, -1]]),
)
"""An id that comes back behind one token: what lies between two positions matters, not their ids."""


def make(name: str, horizon: int = 2, tie: bool = False) -> Objective:
    """A small float64 objective with rough weights; one block, or two where some are shared."""
    options: dict[str, object] = {} if name in ("gpt", "bst") else {"horizon": max(horizon, LEAST[name])}
    if name == "nextlat":
        options["dynamics"] = {"hidden_dim": 3}
    return small(name, tie=tie, n_layers=2 if name == "mtp" else 1, **options)


def brute_force(name: str, objective: Objective, rows: Rows) -> dict[str, Reference]:
    """All terms from plain loops; shares no code with the objectives."""
    if name == "bst":
        return {"pair": bst_terms(objective, rows, END, pairs_of(rows, END))["pair"]}
    if name in ("mtp", "gpt"):
        return mtp_terms(objective, rows, objective.horizon)
    if name == "jtp":
        return jtp_terms(objective, rows, objective.horizon)
    dynamics = objective.latent_dynamics()
    assert isinstance(dynamics, LatentDynamics)
    matrices = [layer.weight for layer in (dynamics.layer_1, dynamics.layer_2, dynamics.layer_3)]
    model = objective.model

    def step(state: Tensor, e: Tensor) -> Tensor:
        return dynamics_reference(state, e, dynamics.norm.weight, *matrices)

    hidden = torch.stack(row_states(model, rows))
    terms = nextlat_reference(hidden, model.embedding_weight, model.head_weight, rows, step, objective.horizon)
    return {key: term for key, term in terms.items() if not key.startswith(("aux_ce", "tv"))}


def gradients(value: Tensor, objective: Objective, may_miss: bool = False) -> dict[str, Tensor]:
    """Gradient of every parameter; only brute force may leave some out."""
    named = dict(objective.named_parameters())
    if may_miss and not value.requires_grad:
        return {key: torch.zeros_like(parameter) for key, parameter in named.items()}
    found = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
    for key, gradient in zip(named, found, strict=True):
        assert may_miss or gradient is not None, f"{key} got no gradient"
    filled = (torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True))
    return dict(zip(named, filled, strict=True))


def weighed(sums: dict[str, Tensor]) -> Tensor:
    """One number whose gradient tells the terms apart."""
    return sum(((1 + 0.37 * index) * value for index, value in enumerate(sums.values())), torch.zeros(()))


@each_objective
@settings(max_examples=12)
@given(batches(), st.integers(0, 4), st.booleans())
@example(RETURNING, 3, False)
def test_every_sum_count_and_gradient_equals_brute_force(name: str, batch: Batch, horizon: int, tie: bool) -> None:
    objective = make(name, horizon, tie)
    terms, expected = objective(batch), brute_force(name, objective, as_rows(batch))
    # tolerances: rotary angles are fp32 in every model, and the oracle's are not
    counts = {key: term.count for key, term in expected.items()}
    assert {key: int(term.count) for key, term in terms.items()} == counts
    assert {key: int(count) for key, count in objective.counts(batch).items()} == counts
    for key, term in terms.items():
        torch.testing.assert_close(term.sum, expected[key].sum, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    found = gradients(weighed({key: term.sum for key, term in terms.items()}), objective)
    reference = gradients(weighed({key: term.sum for key, term in expected.items()}), objective, may_miss=True)
    for key, value in found.items():
        limit = 1e-5 * (1 + reference[key].abs().max().item())
        torch.testing.assert_close(value, reference[key], rtol=0, atol=limit, msg=lambda m, k=key: f"{k}: {m}")


@each_objective
@settings(max_examples=15)
@given(batches(), st.integers(0, 9))
def test_a_term_without_positions_is_exactly_zero_with_exactly_zero_gradients(
    name: str, batch: Batch, horizon: int
) -> None:
    """Not NaN and not missing: other ranks may have positions for it."""
    objective = make(name, horizon)
    terms = objective(batch)
    assert len(terms) == {"gpt": 1, "bst": 1, "nextlat": 1 + 2 * objective.horizon}.get(name, 1 + objective.horizon)
    named = dict(objective.named_parameters())
    for key, term in terms.items():
        assert torch.isfinite(term.sum)
        if term.count == 0:
            assert term.sum.item() == 0.0, key
            found = torch.autograd.grad(term.sum, list(named.values()), retain_graph=True, allow_unused=True)
            assert not any(gradient is not None and gradient.any() for gradient in found), key
    everything = gradients(weighed({key: term.sum for key, term in terms.items()}), objective)
    assert all(torch.isfinite(gradient).all() for gradient in everything.values())
    if not any(int(term.count) for term in terms.values()):
        assert not any(gradient.any() for gradient in everything.values())


ONES = torch.ones(2, 4, dtype=torch.int64)
EMPTY = {
    "all padding": Batch(ONES, ONES, -ONES),
    "all prompt": Batch(ONES, ONES * IGNORE, ONES * 0),
    "documents of one token": Batch(ONES, ONES * 2, torch.arange(4).repeat(2, 1)),
    "rows of one token": Batch(ONES[:, :1], ONES[:, :1] * 2),
}


@each_objective
@pytest.mark.parametrize("case", EMPTY)
def test_rows_in_which_little_is_asked(name: str, case: str) -> None:
    """What is left of each term, by hand: single tokens keep their own target, and nothing else."""
    batch = EMPTY[case]
    objective = make(name, 4)
    found = {key: int(term.count) for key, term in objective(batch).items() if term.count}
    expected = {"all padding": {}, "documents of one token": {"ce": 8}, "rows of one token": {"ce": 2}}.get(case, {})
    if name == "bst":  # a document of one token has pairs only if its end is known
        expected = {}
    if case == "all prompt" and name == "nextlat":  # the latent term covers prompts: 3, 2, 1 steps of width 8, two rows
        expected = {"latent_1": 48, "latent_2": 32, "latent_3": 16}
    assert found == expected
    gradient = gradients(weighed({key: term.sum for key, term in objective(batch).items()}), objective)
    assert any(value.any() for value in gradient.values()) == bool(expected)


@each_objective
@settings(max_examples=10)
@given(batches(), st.integers(1, 4))
def test_padding_at_the_end_and_what_it_holds_change_nothing(name: str, batch: Batch, horizon: int) -> None:
    ids = batch.documents if batch.documents is not None else torch.zeros_like(batch.tokens)
    padding = torch.ones(len(ids), 3, dtype=torch.int64)
    longer = Batch(
        *(torch.cat(part, 1) for part in ((batch.tokens, padding), (batch.targets, padding), (ids, -padding)))
    )
    objective = make(name, horizon)
    one, other = objective(batch), objective(longer)
    assert [int(term.count) for term in one.values()] == [int(term.count) for term in other.values()]
    sums = [{key: term.sum for key, term in terms.items()} for terms in (one, other)]
    for key, value in sums[0].items():
        torch.testing.assert_close(value, sums[1][key], rtol=1e-10, atol=1e-11)
    pair = [gradients(weighed(part), objective) for part in sums]
    for key, value in pair[0].items():
        torch.testing.assert_close(value, pair[1][key], rtol=1e-9, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
