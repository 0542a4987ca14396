"""Claims on sums of nothing, splits of a batch, and numbers that are large or coarse."""

from __future__ import annotations

import torch

from nextlat.conformance import reference
from nextlat.conformance.cases import IGNORE, Case, halfway, leaf, random_case, with_prompts
from nextlat.conformance.claims import claim, expect, expect_number, expect_same, gradient
from nextlat.conformance.contract import Losses, Terms, step_names
from nextlat.conformance.loss_positions import expect_same_terms, live, mixed


def expect_zero(terms: Terms, leaves: dict[str, torch.Tensor], names: list[str]) -> None:
    """Fail unless the named terms are exactly 0, with count 0, on the graph, with zero gradients."""
    for name in names:
        value, number = terms[name]
        expect(number == 0, f"the count of {name} is {number}, expected 0")
        expect(value.item() == 0, f"the sum of {name} is {value.item():.8g}, expected exactly 0")
        expect(value.requires_grad, f"the sum of {name} is not attached to the graph (requires_grad is False)")
        made = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        expect(any(found is not None for found in made), f"the sum of {name} is not attached to any of its inputs")
        for label, found in zip(leaves, made, strict=True):
            zero = found is None or bool((found == 0).all())
            expect(zero, f"the gradient of {name} in {label} is not exactly 0")


@claim("zero-prompt")
def zero_prompt(losses: Losses) -> None:
    """With nothing asked for, ce and kl_i are exactly 0 with zero gradients, and never NaN."""
    case = random_case(2, 3)
    case.targets[:] = IGNORE
    expect_zero(losses(case, 2), case.leaves(), ["ce", *step_names(2, "kl")])


@claim("zero-transitions")
def zero_transitions(losses: Losses) -> None:
    """A step longer than every document, or documents of one token, gives exactly 0 with zero gradients."""
    short = random_case(2, 4, [[0, 0, -1, -1], [5, 5, -1, -1]])
    expect_zero(losses(short, 3), short.leaves(), ["latent_2", "latent_3", "kl_2", "kl_3"])
    singles = random_case(1, 3, [[0, 1, 2]])
    expect_zero(losses(singles, 2), singles.leaves(), step_names(2, "latent", "kl"))


@claim("horizon-beyond-row")
def horizon_beyond_row(losses: Losses) -> None:
    """A horizon as long as the row or longer returns every name; the steps without room are exactly 0."""
    case = random_case(2, 2)
    names = [name for name in step_names(4, "latent", "kl") if not name.endswith("_1")]
    expect_zero(losses(case, 4), case.leaves(), names)


def _weighted(terms: Terms, counts: dict[str, int]) -> torch.Tensor:
    """The loss of a part of a batch, divided by the counts of the whole batch."""
    parts = (terms[name].value / max(number, 1) for name, number in counts.items())
    return sum(parts, torch.zeros((), dtype=torch.float64))


@claim("accumulation")
def accumulation(losses: Losses) -> None:
    """Sums and counts of micro-batches add up to those of the batch, and so do gradients over global counts."""
    case = with_prompts(random_case(130, 3), [1, 3, 2, 3, 2] * 26)  # a cap on rows or positions shows
    whole = losses(case, 2)
    names = live(case, 2)
    counts = {name: whole[name].number for name in names}
    parts = [case.rows([0]), case.rows(range(1, 130))]
    terms = [losses(part, 2) for part in parts]
    for name in names:
        number = sum(part[name].number for part in terms)
        expect_number(f"the count of {name} of two micro-batches", number, counts[name], why="as of the batch")
        value = sum(part[name].value.item() for part in terms)
        expect_number(f"the sum of {name} of two micro-batches", value, whole[name].value.item(), why="as of the batch")
    totals = [_weighted(part, counts) for part in terms]
    states = torch.cat([gradient(total, part.hidden) for total, part in zip(totals, parts, strict=True)])
    expected = gradient(_weighted(whole, counts), case.hidden)
    expect_same("the gradient of hidden of two micro-batches", states, expected)
    for name in ("embedding_weight", "head_weight"):
        found = gradient(totals[0], parts[0].leaves()[name]) + gradient(totals[1], parts[1].leaves()[name])
        expected = gradient(_weighted(whole, counts), case.leaves()[name])
        expect_same(f"the gradient of {name} of two micro-batches", found, expected)


@claim("row-permutation")
def row_permutation(losses: Losses) -> None:
    """Rows do not know each other: in another order they give the same terms and gradients."""
    case = random_case(3, 3, [[0, 0, 1], [4, 4, 4], [7, 8, 8]])
    order = [1, 0, 2]
    other = case.rows(order)
    names = live(case, 2)
    found, expected = losses(other, 2), losses(case, 2)
    expect_same_terms(found, expected, names, "the same rows stand in another order")
    moved = gradient(mixed(found, names), other.hidden)
    same = gradient(mixed(expected, names), case.hidden)[order]
    expect_same("the gradient of hidden with the rows in another order", moved, same)


def _cast(case: Case, dtype: torch.dtype) -> Case:
    return case._replace(**{part: leaf(getattr(case, part).to(dtype)) for part in ("hidden", "embedding", "head")})


@claim("low-precision")
def low_precision(losses: Losses) -> None:
    """bfloat16 states and tables give sums in float32 or wider, within 2 % of the float64 ones."""
    coarse = _cast(random_case(24, 2, width=4), torch.bfloat16)
    found, expected = losses(coarse, 1), losses(_cast(coarse, torch.float64), 1)
    for name, term in found.items():
        wide = term.value.dtype in (torch.float32, torch.float64)
        expect(wide, f"the sum of {name} is {term.value.dtype}, expected torch.float32 or wider")
        ratio = term.value.item() / expected[name].value.item()
        expect_number(f"the sum of {name} in bfloat16 over float64", ratio, 1.0, 0.02)


@claim("huge-logits")
def huge_logits(losses: Losses) -> None:
    """Logits of +-10,000 give finite sums and gradients, and the exact ce."""
    case = random_case(4, 2, vocabulary=4, width=2)
    case.head.data.copy_(torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 1e4], [0.0, -1e4]]))
    terms = losses(case, 1)
    for name, term in terms.items():
        finite = bool(torch.isfinite(term.value))
        expect(finite, f"the sum of {name} is {term.value.item()} with logits of 10,000")
        for label, part in case.leaves().items():
            finite = bool(torch.isfinite(gradient(term.value, part)).all())
            expect(finite, f"the gradient of {name} in {label} is not finite with logits of 10,000")
    expected = reference.losses(case, 0, halfway)["ce"].value.item()
    expect_number("the sum of ce with logits of 10,000", terms["ce"].value.item(), expected)


CLAIMS = [
    zero_prompt,
    zero_transitions,
    horizon_beyond_row,
    accumulation,
    row_permutation,
    low_precision,
    huge_logits,
]
