"""Claims on the value of the NextLat loss: what is computed at a position that counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nextlat.conformance import reference
from nextlat.conformance.cases import (
    HORIZON,
    IGNORE,
    Case,
    draw,
    halfway,
    leaf,
    random_case,
    turning,
    worked_example,
)
from nextlat.conformance.claims import claim, expect, expect_number, expect_same, gradient
from nextlat.conformance.contract import Dynamics, Losses, expect_term, step_names

WORKED_TERMS = {
    "ce": (4.32207351, 3),
    "latent_1": (5.5, 6),
    "latent_2": (1.5, 2),
    "kl_1": (0.82568725, 2),
    "kl_2": (0.30190069, 1),
}
"""Sum and count of each term of the worked example."""
WORKED_TOTAL = 2.63139666
WORKED_GRADIENTS = {
    "hidden": [
        [
            [0.032348, -0.411618],
            [0.172853, -0.037497],
            [-0.316293, 0.315001],
            [0.028253, -0.058263],
            [0.0, 0.0],
        ]
    ],
    "embedding_weight": [[0.0, 0.0], [-0.041667, 0.041667], [0.208581, -0.585911]],
    "head_weight": [[0.299566, -0.712389], [-0.106359, 0.679147], [-0.193207, 0.033242]],
}
"""Gradient of the total with both weights 1."""


@claim("worked-example")
def worked(losses: Losses) -> None:
    """The five-token example has the printed sums, counts, total and gradients."""
    case = worked_example()
    terms = losses(case, 2, halfway)
    for name, (value, number) in WORKED_TERMS.items():
        expect_term(name, terms[name], value, number, 1e-7)
    means = {name: term.value / term.number for name, term in terms.items()}
    total = means["ce"] + sum((means[name] / 2 for name in step_names(2, "latent", "kl")), torch.zeros(()).double())
    expect_number("the total", total.item(), WORKED_TOTAL, 1e-7)
    for name, part in case.leaves().items():
        expected = torch.tensor(WORKED_GRADIENTS[name], dtype=torch.float64)
        expect_same(f"the gradient of {name}", gradient(total, part), expected, 1e-6)


@claim("brute-force")
def brute_force(losses: Losses) -> None:
    """Random packed rows with prompts and padding: every sum, count and gradient is that of plain loops."""
    documents = [[0] * 4 + [1] * 4, [4, 4, 2, 4, 4, 4, -1, -1], [-1] + [7] * 7, [0] * 2 + [1] * 6]
    case = random_case(4, 8, documents, seed=5)
    case.targets[:2, -1] = IGNORE
    case.targets[0, [0, 4]] = IGNORE
    case.targets[2, 1:3] = IGNORE
    found, expected = losses(case, HORIZON, turning), reference.losses(case, HORIZON, turning)
    for name, term in expected.items():
        expect_term(name, found[name], term.value.item(), term.number)
        for label, part in case.leaves().items():
            what = f"the gradient of {name} in {label}"
            expect_same(what, gradient(found[name].value, part), gradient(term.value, part))


@claim("cross-entropy")
def cross_entropy(losses: Losses) -> None:
    """The term ce is the summed -log softmax(W h)[y], with gradients into states and head."""
    case = random_case(2, 5, width=4)
    case.targets[:, -1] = IGNORE
    found, expected = losses(case, 1)["ce"], reference.losses(case, 1, halfway)["ce"]
    expect_term("ce", found, expected.value.item(), expected.number)
    for name, part in case.leaves().items():
        expect_same(f"the gradient of ce in {name}", gradient(found.value, part), gradient(expected.value, part))


@claim("tagging-targets")
def tagging_targets(losses: Losses) -> None:
    """Targets are read as given: ce of a tagging batch, whose targets are not the tokens that follow."""
    case = random_case(2, 4)
    case = case._replace(targets=torch.tensor([[0, 3, 0, 2], [4, 0, 1, 0]]))
    found, expected = losses(case, 1)["ce"], reference.losses(case, 1, halfway)["ce"]
    expect_term("ce", found, expected.value.item(), expected.number, why="are targets made from tokens?")


def with_true_states(case: Case, dynamics: Dynamics) -> Case:
    """The case with each state made by the dynamics from the one before: rolled states are then the true ones."""
    states = [case.hidden.detach()[:, 0]]
    for t in range(1, case.tokens.shape[1]):
        states.append(dynamics(states[-1], F.embedding(case.tokens[:, t], case.embedding.detach())))
    return case._replace(hidden=leaf(torch.stack(states, 1)))


def with_still_dynamics(case: Case) -> Case:
    """The case with an embedding table of zeros, so that ``halfway`` leaves the state as it is."""
    return case._replace(embedding=leaf(torch.zeros_like(case.embedding)))


@claim("horizon-alignment")
def horizon_alignment(losses: Losses) -> None:
    """Horizon 6: step i feeds the tokens t+1 ... t+i in order and compares with the state and the teacher at t+i."""
    case = with_true_states(random_case(3, HORIZON + 1, width=4), turning)
    for name, term in losses(case, HORIZON, turning).items():
        if name != "ce":
            expect_number(name, term.value.item(), 0.0, why="each state is rolled from the one before")
    case.hidden.data[:, -1] += torch.arange(4.0)
    for name, term in losses(case, HORIZON, turning).items():
        if name != "ce":
            expect(term.value.item() > 1e-6, f"{name} does not see that the last state is no longer the rolled one")


@claim("kl-direction")
def kl_direction(losses: Losses) -> None:
    """kl_i is KL(teacher || student) in nats, summed over the vocabulary: the teacher is the true state's law."""
    case = with_still_dynamics(random_case(4, 2))
    found = losses(case, 1)["kl_1"].value.item()
    expected, swapped = (
        sum(reference.kl(states[teacher], states[1 - teacher], case.head).item() for states in case.hidden)
        for teacher in (1, 0)
    )
    why = "this is KL(student || teacher)" if abs(found - swapped) < 1e-9 else ""
    expect_number("the sum of kl_1", found, expected, why=why, count=4)


@claim("smooth-l1")
def smooth_l1(losses: Losses) -> None:
    """latent_i is r^2 / 2 below |r| = 1 and |r| - 1/2 above: beta 1, and linear far out, unlike a squared error."""
    residuals = torch.tensor([0.1, -0.5, 0.99, 1.0, -1.01, 2.0, -30.0], dtype=torch.float64)
    for r in residuals:
        case = with_still_dynamics(random_case(1, 2, width=1))
        case.hidden.data[:, 1] = case.hidden.data[:, 0] - r
        found = losses(case, 1)["latent_1"].value.item()
        expect_number(f"latent_1 of the residual {r:g}", found, reference.smooth_l1(r).item())


@claim("feature-mean")
def feature_mean(losses: Losses) -> None:
    """latent_i sums over features and counts D for each transition, so that its mean does not grow with D."""
    narrow = random_case(3, 2, width=1)
    wide = narrow._replace(
        hidden=leaf(narrow.hidden.detach().expand(-1, -1, 6)),
        embedding=leaf(narrow.embedding.detach().expand(-1, 6)),
        head=leaf(narrow.head.detach().expand(-1, 6)),
    )
    one, six = losses(narrow, 1)["latent_1"], losses(wide, 1)["latent_1"]
    expect_number("the count of latent_1 for 3 transitions of width 1", one.number, 3)
    expect_number("the count of latent_1 for 3 transitions of width 6", six.number, 18)
    what = "the sum of latent_1 when each feature is there six times, relative to once,"
    expect_number(what, six.value.item() / one.value.item(), 6.0)


@claim("embedding-table")
def embedding_table(losses: Losses) -> None:
    """Consumed tokens are looked up in the embedding_weight of the call: no own table, no earlier copy."""
    case = random_case(3, 4, width=5, vocabulary=6)
    before = losses(case, 3, turning)
    case.embedding.data.copy_(draw(5, seed=7).expand(6, 5))  # all tokens alike: which one is fed is not judged here
    after = losses(case, 3, turning)
    true = losses(with_true_states(case, turning), 3, turning)
    for name in step_names(3, "latent"):
        expect(before[name].value.item() != after[name].value.item(), f"{name} ignores that embedding_weight changed")
        expect_number(name, true[name].value.item(), 0.0, why="the states were rolled with the embedding_weight given")


@claim("head-weight")
def head_weight(losses: Losses) -> None:
    """The head_weight of the call is read by ce, teacher and student alike: no earlier copy."""
    case = with_still_dynamics(random_case(3, 4, width=5, vocabulary=7))
    before = losses(case, 3)
    case.head.data.copy_(draw(7, 5, seed=7))
    after = losses(case, 3)
    for name in ("ce", *step_names(3, "kl")):
        expect(before[name].value.item() != after[name].value.item(), f"{name} ignores that head_weight changed")
    case.hidden.data.copy_(case.hidden.data[:, :1].expand_as(case.hidden))
    for name, term in losses(case, 3).items():
        if name.startswith("kl"):
            expect_number(name, term.value.item(), 0.0, why="teacher and student, of equal states, read other heads")


@claim("per-step-terms")
def per_step_terms(losses: Losses) -> None:
    """Each step is a term with its own sum and count; steps are not pooled into one mean, nor weighed."""
    case = random_case(2, 3)
    both = losses(case, 2)
    middle = case._replace(hidden=leaf(case.hidden))
    middle.hidden.data[:, 1] += 1.0
    moved = losses(middle, 2)
    for kind in ("latent", "kl"):
        one, two = both[f"{kind}_1"], both[f"{kind}_2"]
        expect_number(f"the count of {kind}_1 over that of {kind}_2", one.number / max(two.number, 1), 2.0)
        what = f"the sum of {kind}_2 after the state in the middle of a row of 3 changed"
        expect_number(what, moved[f"{kind}_2"].value.item(), two.value.item(), why="it is neither source nor target")
    still = with_still_dynamics(random_case(2, 3, vocabulary=8))
    ends, rows = losses(still.cut([0, 1], [0, 2]), 1), losses(still, 2)
    for kind in ("latent", "kl"):
        found, expected = rows[f"{kind}_2"].value.item(), ends[f"{kind}_1"].value.item()
        why = f"with dynamics that keep the state it is {kind}_1 of the first and the last position"
        expect_number(f"the sum of {kind}_2", found, expected, why=why)


CLAIMS = [
    worked,
    brute_force,
    cross_entropy,
    tagging_targets,
    horizon_alignment,
    kl_direction,
    smooth_l1,
    feature_mean,
    per_step_terms,
    embedding_table,
    head_weight,
]
