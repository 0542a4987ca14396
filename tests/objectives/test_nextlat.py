"""Next-latent prediction: the worked example, brute force, and what each mistake would change (arXiv 2511.05963)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError
from nextlat.objectives.base import Term, TorchModel, check_length, total_loss
from nextlat.objectives.dynamics import LatentDynamics
from nextlat.objectives.gpt import GPT
from nextlat.objectives.nextlat import Dynamics, NextLat, nextlat_sums, roll
from tests.batches import as_rows, packed_batches, random_batch
from tests.objectives.cases import (
    VOCABULARY,
    Parts,
    gradients,
    halfway,
    parts,
    small_nextlat,
    small_trunk,
    worked_example,
)
from tests.oracles.nextlat import Reference, nextlat_reference, token_set, transition_set


def core(batch: Batch, leaves: Parts, horizon: int, dynamics: Dynamics = halfway, **options: bool) -> dict[str, Term]:
    """Terms of the loss core with weight 1 for ce and 1/d for the rest."""
    sums = nextlat_sums(leaves.hidden, leaves.embedding, leaves.head, batch, dynamics, horizon, **options)
    return {name: Term(value, count, 1.0 if name == "ce" else 1 / horizon) for name, (value, count) in sums.items()}


# The worked example


def test_worked_example_sums_and_counts() -> None:
    batch, leaves = worked_example()
    terms = core(batch, leaves, 2)
    expected = {
        "ce": (4.32207351, 3),
        "latent_1": (5.5, 6),
        "latent_2": (1.5, 2),
        "kl_1": (0.82568725, 2),
        "kl_2": (0.30190069, 1),
    }
    assert terms.keys() == expected.keys()
    for name, (value, count) in expected.items():
        assert terms[name].sum.item() == pytest.approx(value, abs=1e-7), name
        assert int(terms[name].count) == count, name
    assert total_loss(terms).item() == pytest.approx(2.63139666, abs=1e-7)


def test_worked_example_step_by_step() -> None:
    batch, leaves = worked_example()
    embeddings = leaves.embedding[batch.tokens]
    first, second = roll(halfway, leaves.hidden, embeddings, 2)
    assert first[0, :2].tolist() == [[0.0, 0.0], [0.5, 0.5]]
    assert first[0, 3].tolist() == [0.0, 1.5]
    assert second[0, 0].tolist() == [-0.5, 0.5]


def test_worked_example_gradients_of_the_total() -> None:
    batch, leaves = worked_example()
    hidden, embedding, head = torch.autograd.grad(total_loss(core(batch, leaves, 2)), leaves)
    expected = (
        (
            hidden[0],
            [
                (0.032348, -0.411618),
                (0.172853, -0.037497),
                (-0.316293, 0.315001),
                (0.028253, -0.058263),
                (0.0, 0.0),
            ],
        ),
        (embedding, [(0.0, 0.0), (-0.041667, 0.041667), (0.208581, -0.585911)]),
        (head, [(0.299566, -0.712389), (-0.106359, 0.679147), (-0.193207, 0.033242)]),
    )
    for found, rows in expected:
        torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (embedding[0] == 0).all()  # the opening token is reached only by a rollout through the boundary


def test_worked_example_gradients_of_the_auxiliary_terms() -> None:
    batch, leaves = worked_example()
    terms = {name: term for name, term in core(batch, leaves, 2).items() if name != "ce"}
    hidden, embedding, head = torch.autograd.grad(total_loss(terms), leaves, materialize_grads=True)
    expected = [(0.032348, -0.411618), (0.224640, -0.281845), (0.0, 0.0), (-0.083333, 0.083333), (0.0, 0.0)]
    torch.testing.assert_close(hidden[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (hidden[0, 2] == 0).all()  # a target only
    assert (hidden[0, 4] == 0).all()
    expected = [(0.0, 0.0), (-0.041667, 0.041667), (0.208581, -0.585911)]
    torch.testing.assert_close(embedding, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    assert not head.any()


def test_rollout_never_passes_through_a_document_boundary() -> None:
    # a mask that drops the boundary position but not those past it lets 2 -> 4 through 3 and adds 4.5
    batch, leaves = worked_example()
    assert core(batch, leaves, 2)["latent_2"].sum.item() == pytest.approx(1.5, abs=1e-12)
    leaky = batch._replace(documents=torch.zeros_like(batch.tokens))
    assert core(leaky, leaves, 2)["latent_2"].sum.item() > 1.5 + 4.5 - 1e-9


def test_a_rollout_does_not_jump_to_a_document_whose_id_comes_back() -> None:
    # comparing the ids of both ends, and not what lies between, joins 0 -> 2
    batch = Batch(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 3, 4, 1]]), torch.tensor([[0, 1, 0, 0]]))
    terms = core(batch, parts(1, 4), 3)
    assert {name: int(term.count) for name, term in terms.items()} == {
        "ce": 4,
        "latent_1": 3,
        "kl_1": 1,
        "latent_2": 0,
        "kl_2": 0,
        "latent_3": 0,
        "kl_3": 0,
    }


def test_worked_example_averages_steps_not_positions() -> None:
    batch, leaves = worked_example()
    terms = core(batch, leaves, 2)
    total = total_loss({name: term for name, term in terms.items() if name.startswith("latent")}).item()
    assert total == pytest.approx((5.5 / 6 + 1.5 / 2) / 2, abs=1e-12)
    assert total != pytest.approx((5.5 + 1.5) / (6 + 2), abs=1e-3)  # one mean over pooled positions


# Brute force


def assert_equals_reference(terms: dict[str, Term], reference: dict[str, Reference]) -> None:
    for name, term in terms.items():
        assert int(term.count) == reference[name].count, name
        torch.testing.assert_close(
            term.sum, reference[name].sum, rtol=1e-11, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
        )


@settings(max_examples=60)
@given(packed_batches(), st.integers(1, 4), st.integers(0, 9))
def test_every_term_and_gradient_equals_brute_force(batch: Batch, horizon: int, seed: int) -> None:
    leaves = parts(*batch.tokens.shape, seed=seed)
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)

    def dynamics(state: Tensor, e: Tensor) -> Tensor:
        return state + torch.tanh(state @ mix[0] + e @ mix[1])

    terms = core(batch, leaves, horizon, dynamics, aux_ce=True, tv=True)
    reference = nextlat_reference(*leaves, as_rows(batch), dynamics, horizon)
    assert terms.keys() == reference.keys()
    assert_equals_reference(terms, reference)
    found = torch.autograd.grad(total_loss(terms), leaves)
    expected_terms = {name: Term(r.sum, torch.tensor(r.count), terms[name].weight) for name, r in reference.items()}
    for one, other in zip(found, torch.autograd.grad(total_loss(expected_terms), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


OPTIONS = ("detach_source", "detach_embeddings", "stop_target", "stop_head")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("seed", range(2))
def test_every_option_has_the_gradients_of_brute_force(option: str, seed: int) -> None:
    batch, leaves = random_batch(seed, 2, 8, 5), parts(2, 8, seed=seed)
    chosen = {option: option.startswith("detach")}
    gradient = {}
    for kind, options in (("changed", chosen), ("method", {})):
        terms = core(batch, leaves, 3, aux_ce=True, tv=True, **options)
        reference = nextlat_reference(*leaves, as_rows(batch), halfway, 3, **options)
        assert_equals_reference(terms, reference)
        gradient[kind] = torch.autograd.grad(total_loss(terms), leaves, materialize_grads=True)
        expected = total_loss({n: Term(r.sum, torch.tensor(r.count), terms[n].weight) for n, r in reference.items()})
        for one, other in zip(
            gradient[kind], torch.autograd.grad(expected, leaves, materialize_grads=True), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    leaf = {"detach_source": 0, "detach_embeddings": 1, "stop_target": 0, "stop_head": 2}[option]
    assert (gradient["changed"][leaf] - gradient["method"][leaf]).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_the_whole_objective_equals_brute_force_on_the_states_of_its_trunk(seed: int) -> None:
    batch = random_batch(seed, 3, 8, VOCABULARY)
    objective = small_nextlat(horizon=3, seed=seed, ce_weight=0.3, tv_weight=0.2)
    model = objective.model
    terms = objective(batch)
    hidden = model.hidden_states(batch.tokens, batch.documents)
    reference = nextlat_reference(
        hidden, model.embedding_weight, model.head_weight, as_rows(batch), objective.dynamics, 3
    )
    assert terms.keys() == reference.keys()
    assert_equals_reference(terms, reference)
    counts = objective.counts(batch)
    assert {name: int(count) for name, count in counts.items()} == {n: r.count for n, r in reference.items()}
    assert [*counts] == [*terms]


# Positions


def test_every_source_position_contributes_not_only_the_first() -> None:
    # one transition a row, from position 0, is a known mistake
    leaves = parts(1, 6)
    batch = Batch(torch.tensor([[0, 1, 2, 3, 4, 0]]), torch.full((1, 6), IGNORE))
    terms = core(batch, leaves, 2)
    for name, sources in (("latent_1", 5), ("latent_2", 4)):
        (gradient,) = torch.autograd.grad(terms[name].sum, leaves.hidden, retain_graph=True)
        assert (gradient[0].abs().sum(-1) > 0).tolist() == [t < sources for t in range(6)]


def test_step_i_consumes_the_tokens_t_plus_1_to_t_plus_i_in_order() -> None:
    tokens = torch.tensor([[4, 1, 3, 2, 0, 5]])
    codes = torch.arange(6, dtype=torch.float64)[:, None]  # the embedding of a token is its id

    def append(state: Tensor, e: Tensor) -> Tensor:
        return state * 10 + e

    rolled = list(roll(append, torch.zeros(1, 6, 1, dtype=torch.float64), codes[tokens], 3))
    assert [state[0, :, 0].tolist() for state in rolled] == [
        [1, 3, 2, 0, 5],
        [13, 32, 20, 5],
        [132, 320, 205],
    ]


def test_the_state_compared_is_the_one_that_has_read_the_last_consumed_token() -> None:
    # dynamics that knows the true next state has nothing to learn
    batch, leaves = random_batch(3, 3, 7, 5), parts(3, 7)
    truth: Iterator[Tensor] = iter(leaves.hidden[:, step:] for step in range(1, 4))
    terms = core(batch, leaves, 3, lambda state, e: next(truth), aux_ce=True)
    for step in range(1, 4):
        assert int(terms[f"latent_{step}"].count) > 0
        assert terms[f"latent_{step}"].sum.item() == 0.0
        assert terms[f"kl_{step}"].sum.item() == pytest.approx(0.0, abs=1e-12)
    asked = batch.targets[:, 1:] != IGNORE
    same = (batch.documents[:, 1:] == batch.documents[:, :-1]) & (batch.documents[:, 1:] >= 0) & asked
    logits = (leaves.hidden[:, 1:] @ leaves.head.T)[same]
    expected = nn.functional.cross_entropy(logits, batch.targets[:, 1:][same], reduction="sum")
    torch.testing.assert_close(terms["aux_ce_1"].sum, expected)


def test_kl_takes_the_teacher_first() -> None:
    batch, leaves = worked_example()
    teacher = (leaves.hidden[0, 2] @ leaves.head.T).log_softmax(-1)
    student = (torch.tensor([0.5, 0.5], dtype=torch.float64) @ leaves.head.T).log_softmax(-1)
    forward = (teacher.exp() * (teacher - student)).sum().item()
    backward = (student.exp() * (student - teacher)).sum().item()
    other = 0.08125508
    assert core(batch, leaves, 1)["kl_1"].sum.item() == pytest.approx(other + forward, abs=1e-7)
    assert abs(forward - backward) > 0.1


def test_smooth_l1_is_not_a_squared_error() -> None:
    batch, leaves = Batch(torch.tensor([[0, 0]]), torch.tensor([[0, 0]])), parts(1, 2, width=2)
    hidden = torch.tensor([[[0.0, 0.0], [0.5, 3.0]]], dtype=torch.float64)
    sums = nextlat_sums(hidden, leaves.embedding, leaves.head, batch, lambda s, e: s, 1, kl=False)
    assert sums["latent_1"][0].item() == pytest.approx(0.5**2 / 2 + (3 - 0.5), rel=1e-12)


def test_the_feature_mean_does_not_grow_with_the_width() -> None:
    # a sum over features multiplies the weight by the width
    means = []
    for copies in (1, 8):
        leaves = Parts(*(x.detach().repeat_interleave(copies, -1) for x in parts(2, 5)))
        term = core(random_batch(0, 2, 5, 5), leaves, 1)["latent_1"]
        means.append((term.sum / term.count).item())
    assert means[0] == pytest.approx(means[1], rel=1e-12)


@given(packed_batches(max_rows=3), st.integers(1, 5))
def test_counts_follow_the_index_sets(batch: Batch, horizon: int) -> None:
    objective = NextLat(small_trunk(), horizon=horizon)
    rows, counts = as_rows(batch), objective.counts(batch)
    assert int(counts["ce"]) == len(token_set(rows, 0))
    for step in range(1, horizon + 1):
        assert int(counts[f"latent_{step}"]) == 8 * len(transition_set(rows, step))
        assert int(counts[f"kl_{step}"]) == len(token_set(rows, step))
    assert all(count.dtype is torch.int64 and count.ndim == 0 for count in counts.values())


# Prompts, padding, packing


def test_prompt_is_left_out_of_kl_but_not_of_the_latent_term() -> None:
    # three prompt tokens: y_0 and y_1 are masked, the last prompt token predicts the first answer token
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    batch = Batch(tokens, torch.tensor([[IGNORE, IGNORE, 3, 4, IGNORE]]))
    leaves = parts(1, 5)
    terms = core(batch, leaves, 1)
    assert [int(terms[name].count) for name in ("ce", "latent_1", "kl_1")] == [2, 4 * 3, 2]
    (latent,) = torch.autograd.grad(terms["latent_1"].sum, leaves.hidden, retain_graph=True)
    (kl,) = torch.autograd.grad(terms["kl_1"].sum, leaves.hidden)
    assert (latent[0].abs().sum(-1) > 0).tolist() == [True, True, True, True, False]
    assert (kl[0].abs().sum(-1) > 0).tolist() == [False, True, True, False, False]  # the source may lie in the prompt


def test_the_prompt_mask_holds_for_every_document_of_a_row() -> None:
    # a mask made for the first document only would ask for the second prompt
    alone = Batch(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[IGNORE, IGNORE, 3, 4]]))
    twice = Batch(alone.tokens.repeat(1, 2), alone.targets.repeat(1, 2), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]))
    objective = small_nextlat()
    once = objective(alone)
    for name, term in objective(twice).items():
        assert int(term.count) == 2 * int(once[name].count), name
        torch.testing.assert_close(term.sum, 2 * once[name].sum, rtol=1e-11, atol=1e-11)


def test_packed_row_equals_its_documents_run_alone() -> None:
    objective = small_nextlat(horizon=3)
    g = torch.Generator().manual_seed(1)
    lengths = (4, 1, 6, 2)
    tokens = [torch.randint(VOCABULARY, (1, n), generator=g) for n in lengths]
    targets = [torch.randint(VOCABULARY, (1, n), generator=g) for n in lengths]
    targets[2][:, :2] = IGNORE
    ids = torch.tensor([[0] * 4 + [1] + [0] * 6 + [3] * 2])  # the first id comes back
    packed = Batch(torch.cat(tokens, 1), torch.cat(targets, 1), ids)
    terms = objective(packed)
    alone = [objective(Batch(x, y)) for x, y in zip(tokens, targets, strict=True)]
    assert int(terms["latent_3"].count) == 8 * (1 + 3)
    for name, term in terms.items():
        assert int(term.count) == sum(int(part[name].count) for part in alone), name
        torch.testing.assert_close(term.sum, sum(part[name].sum for part in alone), rtol=1e-11, atol=1e-11)
    together = gradients(total_loss(terms), objective)
    apart = [gradients(total_loss(part, objective.counts(packed)), objective) for part in alone]
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in apart), rtol=1e-9, atol=1e-11)


def test_the_order_of_documents_in_a_row_does_not_matter() -> None:
    objective = small_nextlat(horizon=2)
    first = random_batch(0, 1, 5, VOCABULARY, packed=False)
    second = random_batch(1, 1, 3, VOCABULARY, packed=False)

    def pack(*pieces: Batch) -> Batch:
        ids = torch.cat([torch.full_like(piece.tokens, n) for n, piece in enumerate(pieces)], 1)
        return Batch(torch.cat([p.tokens for p in pieces], 1), torch.cat([p.targets for p in pieces], 1), ids)

    one, other = objective(pack(first, second)), objective(pack(second, first))
    for name in one:
        torch.testing.assert_close(one[name].sum, other[name].sum, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("place", range(4))
def test_no_token_of_one_document_reaches_the_gradient_of_another(place: int) -> None:
    # the boundary lies in the middle of every rollout window of the second document's neighbours
    objective = small_nextlat(horizon=3)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2]])
    targets = torch.tensor([[IGNORE] * 4 + [6, 1, 2, 3]])
    documents = torch.tensor([[0] * 4 + [1] * 4])
    changed = tokens.clone()
    changed[0, place] = 0
    losses = []
    for row in (tokens, changed):
        # only the second document's terms: the first has no targets, and its transitions do not change in number
        total = objective(Batch(row, targets, documents))
        alone = objective(Batch(row[:, :4], targets[:, :4]))
        losses.append({name: term.sum - alone[name].sum for name, term in total.items()})
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=0, atol=1e-11)
        gradient = [gradients(loss[name], objective, single_term=True) for loss in losses]
        for parameter in gradient[0]:
            torch.testing.assert_close(gradient[0][parameter], gradient[1][parameter], rtol=0, atol=1e-10)


def test_appended_padding_changes_nothing() -> None:
    objective = small_nextlat(horizon=3)
    plain = random_batch(2, 3, 6, VOCABULARY, packed=False)
    filler = torch.randint(VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(0))
    padded = Batch(
        torch.cat([plain.tokens, filler], 1),
        torch.cat([plain.targets, filler], 1),  # targets on padding must not count
        torch.cat([torch.zeros_like(plain.tokens), torch.full_like(filler, -1)], 1),
    )
    one, other = objective(plain), objective(padded)
    for name in one:
        assert int(one[name].count) == int(other[name].count) == int(objective.counts(padded)[name]), name
        torch.testing.assert_close(one[name].sum, other[name].sum, rtol=1e-11, atol=1e-11)
    expected = gradients(total_loss(one), objective)
    for name, gradient in gradients(total_loss(other), objective).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11)


def test_padding_is_neither_source_nor_target() -> None:
    leaves = parts(1, 7)
    documents = torch.tensor([[-1, -1, 0, 0, 0, -2, -2]])
    terms = core(Batch(torch.zeros(1, 7, dtype=torch.long), torch.ones(1, 7, dtype=torch.long), documents), leaves, 1)
    assert [int(terms[name].count) for name in ("ce", "latent_1", "kl_1")] == [3, 2 * 3, 2]
    (gradient,) = torch.autograd.grad(total_loss(terms), leaves.hidden)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [False, False, True, True, True, False, False]


def test_no_documents_equal_all_zero_documents() -> None:
    objective = small_nextlat(horizon=3)
    plain = random_batch(4, 3, 6, VOCABULARY, packed=False)
    zeros = plain._replace(documents=torch.zeros_like(plain.tokens))
    one, other = objective(plain), objective(zeros)
    for name in one:
        assert int(one[name].count) == int(other[name].count)
        torch.testing.assert_close(one[name].sum, other[name].sum, rtol=1e-12, atol=1e-12)


# Weights and options


def test_each_step_carries_its_share_of_the_weight() -> None:
    objective = small_nextlat(horizon=4, latent_weight=2.0, kl_weight=0.1, ce_weight=0.6, tv_weight=2.4)
    weights = {name: term.weight for name, term in objective(random_batch(0, 2, 8, VOCABULARY)).items()}
    expected = {"ce": 1.0}
    for step in range(1, 5):
        expected |= {f"latent_{step}": 0.5, f"kl_{step}": 0.025, f"aux_ce_{step}": 0.15, f"tv_{step}": 0.6}
    assert weights == pytest.approx(expected)


def test_a_step_without_positions_leaves_the_share_of_the_others() -> None:
    # rows of three tokens have no third step; the first two keep 1/3 each
    objective = small_nextlat(horizon=3)
    batch = random_batch(0, 2, 3, VOCABULARY, packed=False)
    terms = objective(batch)
    assert terms["latent_3"].sum.item() == 0.0
    expected = terms["ce"].sum / terms["ce"].count
    for step in (1, 2):
        for kind in ("latent", "kl"):
            term = terms[f"{kind}_{step}"]
            expected = expected + term.sum / term.count.clamp(min=1) / 3
    torch.testing.assert_close(total_loss(terms), expected)


@pytest.mark.parametrize(
    ("weights", "kinds"),
    [
        ({"kl_weight": 0.0}, {"latent"}),
        ({"latent_weight": 0.0}, {"kl"}),
        ({"latent_weight": 0.0, "kl_weight": 0.0, "ce_weight": 1.0}, {"aux_ce"}),
        ({"latent_weight": 0.0, "kl_weight": 0.0, "tv_weight": 1.0}, {"tv"}),
        ({"ce_weight": 1.0, "tv_weight": 1.0}, {"latent", "kl", "aux_ce", "tv"}),
    ],
)
def test_a_term_of_weight_zero_is_absent(weights: dict[str, float], kinds: set[str]) -> None:
    objective = small_nextlat(horizon=2, **weights)
    batch = random_batch(0, 2, 5, VOCABULARY)
    expected = {"ce"} | {f"{kind}_{step}" for kind in kinds for step in (1, 2)}
    assert set(objective(batch)) == set(objective.counts(batch)) == expected


def test_a_term_of_weight_zero_cannot_poison_the_total() -> None:
    # 0 * NaN is NaN: the prompt's transitions are broken here, and only the latent term looks at them
    tokens = torch.tensor([[0, 0, 2, 3, 4]])
    batch = Batch(tokens, torch.tensor([[IGNORE, IGNORE, 3, 4, 1]]))

    def broken_on_token_0(state: Tensor, e: Tensor) -> Tensor:
        return torch.where(e[..., :1] == 9.0, torch.nan, state + e)

    leaves = parts(1, 5)
    with torch.no_grad():
        leaves.embedding[0] = 9.0
    assert core(batch, leaves, 1, broken_on_token_0)["latent_1"].sum.isnan()
    loss = total_loss(core(batch, leaves, 1, broken_on_token_0, latent=False))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon is 0; it must be at least 1"),
        ({"latent_weight": -1.0}, "latent_weight is -1.0; .*>= 0"),
        ({"kl_weight": float("nan")}, "kl_weight is nan"),
        ({"ce_weight": float("inf")}, "ce_weight is inf"),
        ({"tv_weight": -0.5}, "tv_weight is -0.5"),
        ({"latent_weight": 0.0, "kl_weight": 0.0}, "are all 0; .* gpt objective"),
        ({"dynamics": 0}, "dynamics.hidden_dim is 0"),
    ],
)
def test_impossible_settings_name_the_value_and_the_limit(options: dict[str, float], message: str) -> None:
    with pytest.raises(NextLatError, match=message):
        NextLat(small_trunk(), **options)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 3), (9, 3), (9, 3)), r"states have shape \(2, 4, 3\) for tokens of shape \(2, 5\)"),
        (((10, 3), (9, 3), (9, 3)), r"states have shape \(10, 3\).*must be \(B, T, D\)"),
        (((2, 5, 3), (9, 4), (9, 3)), r"embedding_weight has shape \(9, 4\); it must be \(V, 3\)"),
        (((2, 5, 3), (9, 3), (3,)), r"head_weight has shape \(3,\); it must be \(V, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    hidden, embedding, head = (torch.zeros(shape) for shape in shapes)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(NextLatError, match=message):
        nextlat_sums(hidden, embedding, head, Batch(tokens, tokens), halfway, 1)


def test_a_horizon_longer_than_the_rows_is_refused_with_the_largest_that_fits() -> None:
    check_length(4, 5)
    with pytest.raises(NextLatError, match=r"horizon = 5 needs rows longer than 5 tokens.*at most 4"):
        check_length(5, 5)


def test_the_dynamics_is_as_wide_as_the_model_unless_told() -> None:
    assert NextLat(small_trunk()).dynamics.layer_1.out_features == 8
    assert NextLat(small_trunk(), dynamics=5).dynamics.layer_1.out_features == 5
    own = nn.Bilinear(8, 8, 8)
    assert NextLat(small_trunk(), dynamics=own).dynamics is own


def test_inference_is_the_plain_model_and_the_dynamics_is_kept_beside_it() -> None:
    objective = small_nextlat()
    assert objective.as_lm() is objective.model
    assert objective.auxiliary() is objective.dynamics
    tokens = random_batch(0, 2, 5, VOCABULARY).tokens
    torch.testing.assert_close(objective.as_lm()(tokens).probe_state, objective.model.hidden_states(tokens))


def test_conditioning_uses_the_raw_embedding_of_the_trunk() -> None:
    # an own token table, or a normed embedding, would give another state
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
            seen.append(embedding)
            return state

    model, batch = small_trunk(), random_batch(0, 2, 5, VOCABULARY)
    NextLat(model, horizon=2, dynamics=Recorder())(batch)
    assert torch.equal(seen[0], model.embedding_weight[batch.tokens[:, 1:]])
    assert torch.equal(seen[1], model.embedding_weight[batch.tokens[:, 2:]])


def test_nextlat_trains_on_tags_that_are_not_next_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (16, 6))
    batch = Batch(tokens, tokens.cumsum(1) % VOCABULARY)
    objective = NextLat(small_trunk().float(), horizon=2, dynamics=16)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    first = total_loss({"ce": objective(batch)["ce"]}).item()
    for _ in range(80):
        optimizer.zero_grad()
        total_loss(objective(batch)).backward()
        optimizer.step()
    terms = objective(batch)
    assert (terms["ce"].sum / terms["ce"].count).item() < 0.5 * first
    objective.dynamics = LatentDynamics(8, 16, zero_init_output=True)
    identity = objective(batch)
    for name in ("latent_1", "kl_1", "kl_2"):
        assert terms[name].sum < 0.7 * identity[name].sum, name


# Other models than our trunk


class Recurrent(nn.Module):
    """A plain torch language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.recurrence = nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, VOCABULARY, bias=False)

    def states(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        assert documents is None
        out: Tensor = self.recurrence(self.embedding(tokens))[0]
        return out


def wrapped() -> TorchModel:
    torch.manual_seed(0)
    model = Recurrent()
    return TorchModel(
        model, hidden=model.states, embedding=lambda: model.embedding.weight, head=lambda: model.head.weight
    )


def test_a_plain_torch_model_gives_the_terms_of_the_loss_core() -> None:
    model, batch = wrapped(), random_batch(0, 3, 6, VOCABULARY, packed=False)
    objective = NextLat(model, horizon=2, dynamics=5)
    plain = model.model
    expected = nextlat_sums(
        plain.states(batch.tokens, None), plain.embedding.weight, plain.head.weight, batch, objective.dynamics, 2
    )
    terms = objective(batch)
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert torch.equal(term.sum, expected[name][0]), name
        assert int(term.count) == int(expected[name][1]), name
    torch.testing.assert_close(GPT(model)(batch)["ce"].sum, expected["ce"][0])


def test_a_plain_torch_model_trains_and_its_own_parameters_move() -> None:
    model = wrapped()
    objective = NextLat(model, horizon=2, dynamics=8)
    tokens = torch.arange(8).repeat(4, 1).add(torch.arange(4)[:, None]) % VOCABULARY
    batch = Batch(tokens, (tokens + 1) % VOCABULARY)
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        loss = total_loss(objective(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    for name, value in objective.named_parameters():
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("objective", [GPT, NextLat])
def test_a_model_without_the_three_things_is_refused_with_the_way_to_wrap_it(objective: type) -> None:
    with pytest.raises(NextLatError, match=r"Recurrent does not offer hidden_states.*TorchModel\(model, hidden="):
        objective(Recurrent())


def test_padding_states_that_are_not_finite_reach_no_gradient() -> None:
    batch, leaves = worked_example()
    documents = torch.tensor([[0, 0, 0, -1, -1]])
    hidden = leaves.hidden.detach().clone()
    hidden[0, 3:] = float("nan")
    dynamics = LatentDynamics(2, 3).double()
    inputs = (hidden.requires_grad_(), leaves.embedding, leaves.head, *dynamics.parameters())
    sums = nextlat_sums(hidden, leaves.embedding, leaves.head, batch._replace(documents=documents), dynamics, 2)
    total = torch.stack([value for value, _ in sums.values()]).sum()
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, inputs))
