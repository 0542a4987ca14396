"""Claims on which positions count: sources, prompts, documents and padding.

They do not judge the value at a position, so that a wrong value fails its own claim only. A sum over a set of
transitions is compared with the function's own sum on rows that hold one transition each and nothing else; the
set itself comes from the plain loops of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nextlat.conformance import reference
from nextlat.conformance.cases import HORIZON, Case, leaf, random_case, with_prompts
from nextlat.conformance.claims import claim, expect, expect_number, expect_same, gradient
from nextlat.conformance.contract import Losses, Sum, Terms, expect_term, step_names

PASSED = [[0] * 8, [0] * 4 + [1] * 4, [0] * 2 + [1] * 6, [0] + [1] * 7, [0, 1] + [2] * 6, [3] * 8]
"""Documents that a rollout of several steps can leave or pass through."""
REPEATED = [[4, 4, 9, 4, 9, 4, 9, 4], [9, 2, 5, 2, 5, 2, 5, 2], [1] * 8]
"""Documents whose id comes back after another one."""


def pairs_of(case: Case, name: str) -> list[reference.Pair]:
    """The sources of a term, by plain loops."""
    kind, _, step = name.partition("_")
    find = reference.transition_pairs if kind == "latent" else reference.token_pairs
    return find(case, int(step or 0))


def alone(losses: Losses, case: Case, name: str, pairs: Sequence[reference.Pair]) -> Sum:
    """The function's own term on rows of ``step + 1`` tokens, one for each transition, all asked and unmasked."""
    step = int(name.rsplit("_", 1)[1])
    rows = torch.tensor([b for b, _ in pairs])[:, None]
    index = rows, torch.tensor([t for _, t in pairs])[:, None] + torch.arange(step + 1)
    tokens = case.tokens[index]
    single = case._replace(
        hidden=leaf(case.hidden.detach()[index]), tokens=tokens, targets=torch.ones_like(tokens), documents=None
    )
    return losses(single, step)[name]


def expect_sets(losses: Losses, case: Case, horizon: int, names: Sequence[str]) -> None:
    """Fail unless each term sums over exactly the transitions that the plain loops allow."""
    terms = losses(case, horizon)
    for name in names:
        pairs = pairs_of(case, name)
        expected = alone(losses, case, name, pairs)
        why = f"it must sum over the {len(pairs)} transitions (row, source) {', '.join(map(str, pairs))}"
        expect_term(name, terms[name], expected.value.item(), expected.number, why=why)


def expect_asked(losses: Losses, case: Case) -> None:
    """Fail unless ce reaches exactly the positions that count."""
    ce = losses(case, 1)["ce"]
    reached = gradient(ce.value, case.hidden).abs().sum(-1) > 0
    expected = reference.token_pairs(case, 0)
    found = [(int(b), int(t)) for b, t in reached.nonzero()]
    expect(found == expected, f"ce reaches the positions (row, t) {found}, expected {expected}")
    expect_number("the count of ce", ce.number, len(expected))


def expect_same_terms(found: Terms, expected: Terms, names: Sequence[str], why: str) -> None:
    """Fail unless sums and counts of the named terms agree."""
    for name in names:
        expect_term(name, found[name], expected[name].value.item(), expected[name].number, why=why)


def live(case: Case, horizon: int) -> list[str]:
    """Names of the terms that have positions; what the others must be is said by the claims on zero counts."""
    return [name for name in ("ce", *step_names(horizon, "latent", "kl")) if pairs_of(case, name)]


def mixed(terms: Terms, names: Sequence[str]) -> torch.Tensor:
    """All named sums in one number, each with a weight of its own that depends on its name alone."""
    weights = {name: 1.0 + 0.3 * int(name.partition("_")[2] or 0) + 0.1 * len(name) for name in names}
    return sum((weights[name] * terms[name].value for name in names), torch.zeros((), dtype=torch.float64))


@claim("every-source")
def every_source(losses: Losses) -> None:
    """Every position with room for i steps is a source of latent_i and kl_i, not only the first d positions."""
    expect_sets(losses, random_case(2, 2 * HORIZON), HORIZON, step_names(HORIZON, "latent", "kl"))


@claim("prompt-token-losses")
def prompt_token_losses(losses: Losses) -> None:
    """Only answer targets enter ce and kl_i; the last prompt position counts, and a source may be prompt."""
    case = with_prompts(random_case(3, 3), [1, 2, 3])
    expect_asked(losses, case)
    expect_sets(losses, case, 2, step_names(2, "kl"))


@claim("prompt-latent")
def prompt_latent(losses: Losses) -> None:
    """latent_i covers the prompt: it does not depend on which targets are asked for."""
    case = with_prompts(random_case(3, 3), [1, 2, 3])
    expect_sets(losses, case, 2, step_names(2, "latent"))


@claim("boundary")
def boundary(losses: Losses) -> None:
    """No step leaves its document."""
    case = random_case(4, 2, [[0, 0], [0, 1], [5, 5], [3, 8]])
    expect_sets(losses, case, 1, ["latent_1", "kl_1"])


@claim("boundary-passed")
def boundary_passed(losses: Losses) -> None:
    """No rollout of i >= 2 steps ends past a boundary, nor passes through a short document."""
    case = random_case(6, 8, PASSED)
    expect_sets(losses, case, HORIZON, step_names(HORIZON, "latent", "kl", start=2))


@claim("repeated-ids")
def repeated_ids(losses: Losses) -> None:
    """An id that comes back later in the row is another document."""
    case = random_case(3, 8, REPEATED)
    expect_sets(losses, case, HORIZON, step_names(HORIZON, "latent", "kl", start=2))


@claim("document-order")
def document_order(losses: Losses) -> None:
    """Ids are names: documents in another order, with falling ids, give the same terms and gradients."""
    case = random_case(1, 10, [[0] * 7 + [1, 1, 2]])
    order = [9, 7, 8, *range(7)]
    other = case.cut([0], order)
    names = live(case, 9)
    found, expected = losses(other, 9), losses(case, 9)
    expect_same_terms(found, expected, names, "the same documents stand in another order")
    moved = gradient(mixed(found, names), other.hidden)
    same = gradient(mixed(expected, names), case.hidden)[:, order]
    expect_same("the gradient of hidden with the documents in another order", moved, same)


@claim("other-documents")
def other_documents(losses: Losses) -> None:
    """Changing a document changes no term and no gradient of its neighbour."""
    case, changed = (random_case(1, 14, [[0] * 7 + [1] * 7], seed=seed) for seed in (0, 1))
    changed.hidden.data[:, 7:] = case.hidden.data[:, 7:]
    changed.tokens[:, 7:], changed.targets[:, 7:] = case.tokens[:, 7:], case.targets[:, 7:]
    before, after = losses(case, 13), losses(changed, 13)
    for name in live(case, 13):
        kept = gradient(before[name].value, case.hidden)[:, 7:]
        moved = gradient(after[name].value, changed.hidden)[:, 7:]
        expect_same(f"the gradient of {name} in a document whose neighbour changed", moved, kept)
        if name != "ce":
            pairs = [pair for pair in pairs_of(case, name) if pair[1] < 7]
            first, second = (alone(losses, c, name, pairs).value.item() for c in (case, changed))
            difference = (after[name].value - before[name].value).item()
            expect_number(f"the change of {name} when the first of two documents changes", difference, second - first)


@claim("packed-equals-alone")
def packed_equals_alone(losses: Losses) -> None:
    """A packed row, single-token documents included, gives the terms and gradients of its documents run alone."""
    ids = [0] * 7 + [1, 2, 2]
    case = random_case(1, 10, [ids])
    names = live(case, 9)
    whole = losses(case, 9)
    sums = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)
    tables = {name: torch.zeros_like(part) for name, part in case.leaves().items() if name != "hidden"}
    states = []
    for document in (0, 1, 2):
        single = case.cut([0], [t for t, other in enumerate(ids) if other == document])
        here = live(single, 9)
        terms = losses(single, 9)
        for name in here:
            sums[name] += terms[name].value.item()
            counts[name] += terms[name].number
        total = mixed(terms, here)
        states.append(gradient(total, single.hidden))
        for name in tables:
            tables[name] += gradient(total, single.leaves()[name])
    for name in names:
        expect_term(f"{name} of a packed row", whole[name], sums[name], counts[name], why="as alone")
    total = mixed(whole, names)
    expect_same("the gradient of hidden of a packed row", gradient(total, case.hidden), torch.cat(states, 1))
    for name, expected in tables.items():
        expect_same(f"the gradient of {name} of a packed row", gradient(total, case.leaves()[name]), expected)


@claim("documents-none")
def documents_none(losses: Losses) -> None:
    """Without documents (None) each row is one, as if all its ids were equal, whatever its tokens are."""
    case = random_case(2, 4)
    case.tokens[0, 2], case.targets[0, 1] = 0, 0
    names = live(case, 3)
    bare = losses(case, 3)
    for number in (0, 7):
        numbered = losses(case._replace(documents=torch.full_like(case.tokens, number)), 3)
        expect_same_terms(bare, numbered, names, f"as with every id {number}")
        for name, part in case.leaves().items():
            found, expected = (gradient(mixed(terms, names), part) for terms in (bare, numbered))
            expect_same(f"the gradient of {name} without documents", found, expected)


@claim("token-zero")
def token_zero(losses: Losses) -> None:
    """In packed rows the token 0 is one like any other: it neither ends a document nor counts as padding."""
    case = random_case(2, 6, [[0, 0, 0, 1, 1, 1], [4, 4, 4, 4, 4, -1]], vocabulary=7)
    for table in (case.embedding, case.head):
        table.data[0] = table.data[1]  # the tokens 0 and 1 differ by their number alone
    case.tokens[:, [0, 1, 3]], case.targets[:, [0, 2]] = 1, 1
    zeros = [torch.where(ids == 1, 0, ids) for ids in (case.tokens, case.targets)]
    other = case._replace(tokens=zeros[0], targets=zeros[1])
    names = live(case, 4)
    found, expected = losses(other, 4), losses(case, 4)
    why = "some tokens are 0 in place of another one with the same rows in both tables"
    expect_same_terms(found, expected, names, why)
    moved, same = (gradient(mixed(terms, names), case.hidden) for terms in (found, expected))
    expect_same("the gradient of hidden", moved, same, why=why)


def _padded(states: float | None = None) -> tuple[Case, Case]:
    """Rows of three tokens, and the same with two padding positions behind, whose states may be given."""
    padded = random_case(2, 5, [[0, 0, 0, -1, -1], [6, 6, 6, -1, -1]])
    if states is not None:
        padded.hidden.data[:, 3:] = states
    return padded.cut([0, 1], [0, 1, 2]), padded


@claim("padding")
def padding(losses: Losses) -> None:
    """Appended padding (ids below 0) changes no sum, no count and no gradient."""
    bare, padded = _padded()
    names = live(bare, 2)
    found, expected = losses(padded, 2), losses(bare, 2)
    expect_same_terms(found, expected, names, "as without the padding")
    moved = gradient(mixed(found, names), padded.hidden)
    expect_same("the gradient of hidden", moved[:, :3], gradient(mixed(expected, names), bare.hidden))
    expect_same("the gradient of hidden on padding", moved[:, 3:], torch.zeros_like(moved[:, 3:]))


@claim("padding-targets")
def padding_targets(losses: Losses) -> None:
    """Padding is not asked about, even where it holds a target other than -100."""
    bare, padded = _padded()
    padded.targets[:, 3:] = 1
    expect_asked(losses, padded)
    names = ["ce", *step_names(2, "kl")]
    expect_same_terms(losses(padded, 2), losses(bare, 2), names, "as without the padding")


@claim("padding-values")
def padding_values(losses: Losses) -> None:
    """NaN, infinite or huge states on padding leave sums and gradients as they are: selected away, not multiplied."""
    _, plain = _padded()
    names = live(plain, 2)
    expected = losses(plain, 2)
    for value in (1e300, torch.inf, torch.nan):
        _, spoilt = _padded(value)
        found = losses(spoilt, 2)
        expect_same_terms(found, expected, names, f"padding states of {value} leak")
        for name, part in spoilt.leaves().items():
            moved = gradient(mixed(found, names), part)
            same = gradient(mixed(expected, names), plain.leaves()[name])
            expect_same(f"the gradient of {name}", moved, same, why=f"padding states of {value} leak")


@claim("all-padding")
def all_padding(losses: Losses) -> None:
    """Rows of padding beside real ones add nothing to any term."""
    case = random_case(2, 3, [[0, 0, 0], [-1, -1, -1]])
    expect_same_terms(losses(case, 2), losses(case.rows([0]), 2), live(case, 2), "a row of padding was added")


CLAIMS = [
    every_source,
    prompt_token_losses,
    prompt_latent,
    boundary,
    boundary_passed,
    repeated_ids,
    document_order,
    other_documents,
    packed_equals_alone,
    documents_none,
    token_zero,
    padding,
    padding_targets,
    padding_values,
    all_padding,
]
