"""Claims on the terms of mtp and jtp: which states are asked about which target, given one state for each slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextlat.conformance import reference
from nextlat.conformance.cases import HORIZON, IGNORE, Case, draw, leaf, random_case, with_prompts
from nextlat.conformance.claims import claim, expect, expect_number, expect_same, gradient
from nextlat.conformance.contract import HeadTerms, Terms, expect_term, step_names
from nextlat.conformance.loss_positions import PASSED, REPEATED
from nextlat.conformance.loss_robustness import expect_zero


def slots(case: Case, horizon: int) -> Tensor:
    """(d + 1, B, T, D) leaf of random states."""
    rows, length, width = case.hidden.shape
    return leaf(draw(horizon + 1, rows, length, width, seed=6))


def call(terms: HeadTerms, states: Tensor, case: Case) -> Terms:
    """The terms of a case."""
    return terms(states, case.head, case.targets, case.documents)


def expect_reached(terms: HeadTerms, case: Case, steps: Sequence[int]) -> None:
    """Fail unless slot i is asked exactly where the plain loops say, whatever its loss is."""
    states = slots(case, max(steps))
    found = call(terms, states, case)
    for step in steps:
        name = f"mtp_{step}" if step else "ce"
        moved = gradient(found[name].value, states).abs().sum(-1) > 0  # (d + 1, B, T)
        reached = [(int(b), int(t)) for b, t in moved[step].nonzero()]
        expected = reference.token_pairs(case, step)
        expect(reached == expected, f"{name} reaches the sources (row, t) {reached}, expected {expected}")
        expect_number(f"the count of {name}", found[name].number, len(expected))


@claim("brute-force")
def brute_force(terms: HeadTerms) -> None:
    """Random packed rows with prompts and padding: every sum, count and gradient is that of plain loops."""
    documents = [[0] * 4 + [1] * 4, [4, 4, 2, 4, 4, 4, 4, -1], [-1] + [7] * 7, [0] * 2 + [1] * 6]
    case = random_case(4, 8, documents)
    case.targets[0, [0, 4]] = IGNORE
    case.targets[2, 1:3] = IGNORE
    states = slots(case, HORIZON)
    found, expected = call(terms, states, case), reference.head_terms(states, case)
    for name, term in expected.items():
        expect_term(name, found[name], term.value.item(), term.number)
        for label, part in (("states", states), ("head_weight", case.head)):
            what = f"the gradient of {name} in {label}"
            expect_same(what, gradient(found[name].value, part), gradient(term.value, part))


@claim("targets-ahead")
def targets_ahead(terms: HeadTerms) -> None:
    """Slot i at t is asked about the target at t + i."""
    case = random_case(2, HORIZON + 1)
    states = slots(case, HORIZON)
    found, expected = call(terms, states, case), reference.head_terms(states, case)
    for name, term in expected.items():
        mean = found[name].value.item() / max(found[name].number, 1)
        expect_number(f"the mean of {name}", mean, term.value.item() / term.number)


@claim("every-position")
def every_position(terms: HeadTerms) -> None:
    """Every position with room for i more targets is asked."""
    expect_reached(terms, random_case(2, 10), range(HORIZON + 1))


@claim("first-answer-token")
def first_answer_token(terms: HeadTerms) -> None:
    """The first answer token is a target of every slot that reaches it, and no prompt token is."""
    expect_reached(terms, with_prompts(random_case(4, 4), [1, 2, 3, 4]), [0, 1, 2])


@claim("boundary")
def boundary(terms: HeadTerms) -> None:
    """Slot 1 asks for no target of the next document."""
    expect_reached(terms, random_case(2, 4, [[0, 0, 1, 1], [5, 6, 6, 6]]), [0, 1])


@claim("boundary-passed")
def boundary_passed(terms: HeadTerms) -> None:
    """Slots beyond 1 ask for no target past a boundary, nor past a short document."""
    expect_reached(terms, random_case(6, 8, PASSED), range(2, HORIZON + 1))


@claim("repeated-ids")
def repeated_ids(terms: HeadTerms) -> None:
    """An id that comes back later in the row is another document."""
    expect_reached(terms, random_case(3, 8, REPEATED), range(2, HORIZON + 1))


@claim("padding")
def padding(terms: HeadTerms) -> None:
    """Padding is neither asked nor a source, even where it holds a target other than -100."""
    case = random_case(2, 6, [[0, 0, 0, 0, -1, -1], [6, 6, 6, 6, -1, -1]])
    case.targets[:, 4:] = 1
    expect_reached(terms, case, [0, 1, 2])


@claim("padding-values")
def padding_values(terms: HeadTerms) -> None:
    """NaN, infinite or huge states on padding leave sums and gradients as they are: selected away, not multiplied."""
    case = random_case(1, 5, [[0, 0, 0, -1, -1]])
    plain = slots(case, 2)
    expected = call(terms, plain, case)
    for value in (1e300, torch.inf, torch.nan):
        spoilt = leaf(plain)
        spoilt.data[:, :, 3:] = value
        why = f"padding states of {value} leak"
        for name, term in call(terms, spoilt, case).items():
            expect_number(f"the sum of {name}", term.value.item(), expected[name].value.item(), why=why)
            for label, found, same in (("states", spoilt, plain), ("head_weight", case.head, case.head)):
                moved, still = gradient(term.value, found), gradient(expected[name].value, same)
                expect_same(f"the gradient of {name} in {label}", moved, still, why=why)


@claim("documents-none")
def documents_none(terms: HeadTerms) -> None:
    """Without documents (None) each row is one, as if all its ids were equal, whatever its targets are."""
    case = random_case(2, 4)
    case.targets[0, 1] = 0
    states = slots(case, 2)
    expected = call(terms, states, case._replace(documents=torch.zeros_like(case.targets)))
    for name, term in call(terms, states, case).items():
        expect_term(name, term, expected[name].value.item(), expected[name].number)


@claim("zero-counts")
def zero_counts(terms: HeadTerms) -> None:
    """With nothing asked, documents of one token, or a horizon beyond the row, a term is exactly 0, never NaN."""
    prompt = random_case(2, 3)
    prompt.targets[:] = IGNORE
    singles, short = random_case(1, 3, [[0, 1, 2]]), random_case(2, 2)
    for case, horizon, names in (
        (prompt, 2, ["ce", "mtp_1", "mtp_2"]),
        (singles, 2, ["mtp_1", "mtp_2"]),
        (short, 4, ["mtp_2", "mtp_3", "mtp_4"]),
    ):
        states = slots(case, horizon)
        expect_zero(call(terms, states, case), {"states": states, "head_weight": case.head}, names)


@claim("live-head")
def live_head(terms: HeadTerms) -> None:
    """Every slot trains the output head."""
    case = random_case(2, HORIZON + 1)
    states = slots(case, HORIZON)
    found = call(terms, states, case)
    for name in ("ce", *step_names(HORIZON, "mtp")):
        expect(bool(gradient(found[name].value, case.head).any()), f"{name} sends no gradient into head_weight")


@claim("live-states")
def live_states(terms: HeadTerms) -> None:
    """A slot trains its own states, and those of no other slot."""
    case = random_case(2, HORIZON + 1)
    states = slots(case, HORIZON)
    found = call(terms, states, case)
    for step, name in enumerate(("ce", *step_names(HORIZON, "mtp"))):
        moved = [slot for slot, part in enumerate(gradient(found[name].value, states)) if part.any()]
        expect(moved == [step], f"{name} trains the states of the slots {moved}, expected [{step}]")


@claim("accumulation")
def accumulation(terms: HeadTerms) -> None:
    """Sums and counts of micro-batches add up to those of the batch."""
    case = with_prompts(random_case(3, 4), [1, 3, 2])
    states = slots(case, 2)
    whole = call(terms, states, case)
    parts = [call(terms, leaf(states[:, rows]), case.rows(rows)) for rows in ([0], [1, 2])]
    for name, term in whole.items():
        expect_number(f"the count of {name} of two micro-batches", sum(p[name].number for p in parts), term.number)
        value = sum(part[name].value.item() for part in parts)
        expect_number(f"the sum of {name} of two micro-batches", value, term.value.item())


CLAIMS = [
    brute_force,
    targets_ahead,
    every_position,
    first_answer_token,
    boundary,
    boundary_passed,
    repeated_ids,
    padding,
    padding_values,
    documents_none,
    zero_counts,
    live_head,
    live_states,
    accumulation,
]
