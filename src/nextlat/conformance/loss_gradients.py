"""Claims on where gradients of the NextLat loss go and where they are cut.

A live path is checked against differences of the function's own values, so that a wrong value does not fail it.
"""

from __future__ import annotations

from torch import Tensor

from nextlat.conformance.cases import HORIZON, Case, Mixing, draw, leaf, random_case
from nextlat.conformance.claims import claim, expect, expect_number, expect_same, gradient
from nextlat.conformance.contract import Losses, step_names
from nextlat.conformance.loss_positions import mixed

STEP = 1e-6
"""Width of a difference quotient."""


def expect_live(
    losses: Losses, case: Case, part: Tensor, direction: Tensor, names: list[str], path: str, dynamics: Mixing
) -> None:
    """Fail unless the gradient of each term along a direction is its slope there, and not zero."""
    horizon = case.tokens.shape[1] - 1
    terms = losses(case, horizon, dynamics)
    found = {name: (gradient(terms[name].value, part) * direction).sum().item() for name in names}
    start = part.detach().clone()
    values = []
    for sign in (1.0, -1.0):
        part.data.copy_(start + sign * STEP * direction)
        values.append({name: losses(case, horizon, dynamics)[name].value.item() for name in names})
    part.data.copy_(start)
    for name in names:
        slope = (values[0][name] - values[1][name]) / (2 * STEP)
        expect(abs(slope) > 1e-3, f"{name} does not depend on {path}")
        why = "the path is cut" if found[name] == 0 else "the path is cut in part"
        expect_number(f"the gradient of {name} in {path}", found[name], slope, 1e-6, why)


def expect_cut(value: Tensor, part: Tensor, what: str, positions: slice = slice(None)) -> None:
    """Fail unless the gradient is exactly zero."""
    largest = gradient(value, part)[:, positions].abs().max().item()
    expect(largest == 0, f"{what} is as large as {largest:.3g}, expected exactly 0")


@claim("target-cut")
def target_cut(losses: Losses) -> None:
    """latent_i sends no gradient into its target state."""
    case = random_case(3, 3)
    terms = losses(case, 2)
    for name in step_names(2, "latent"):
        expect_cut(terms[name].value, case.hidden, f"the gradient of {name} in the target state", slice(2, None))


@claim("teacher-cut")
def teacher_cut(losses: Losses) -> None:
    """kl_i sends no gradient into the teacher's state."""
    case = random_case(3, 3)
    terms = losses(case, 2)
    for name in step_names(2, "kl"):
        expect_cut(terms[name].value, case.hidden, f"the gradient of {name} in the teacher's state", slice(2, None))


@claim("head-cut")
def head_cut(losses: Losses) -> None:
    """Neither kl_i nor latent_i sends a gradient into the output head."""
    case = random_case(3, 3)
    terms = losses(case, 2)
    for name in step_names(2, "latent", "kl"):
        expect_cut(terms[name].value, case.head, f"the gradient of {name} in head_weight")


@claim("tied-head")
def tied_head(losses: Losses) -> None:
    """When embedding_weight is head_weight, latent_i and kl_i give it the gradient of the lookup alone."""
    case = random_case(3, 3)
    tied = case._replace(embedding=case.head)
    split = tied._replace(embedding=leaf(case.head))
    names = step_names(2, "latent", "kl")
    found, expected = losses(tied, 2), losses(split, 2)
    for name in names:
        lookup = gradient(expected[name].value, split.embedding)
        expect_same(f"the gradient of {name} in a tied table", gradient(found[name].value, tied.head), lookup)
    lookup = gradient(mixed(expected, names), split.embedding)
    expect_same("the gradient in a tied table", gradient(mixed(found, names), tied.head), lookup)


@claim("source-live")
def source_live(losses: Losses) -> None:
    """latent_i and kl_i train the state that the rollout starts from."""
    case = random_case(3, 2)
    direction = draw(3, 2, 3, seed=4)
    direction[:, 1] = 0.0
    expect_live(losses, case, case.hidden, direction, ["latent_1", "kl_1"], "the source state", Mixing(3))


@claim("embeddings-live")
def embeddings_live(losses: Losses) -> None:
    """latent_i and kl_i train the embeddings of the tokens that the rollout consumes."""
    case = random_case(3, 2)
    direction = draw(5, 3, seed=4)
    expect_live(losses, case, case.embedding, direction, ["latent_1", "kl_1"], "embedding_weight", Mixing(3))


@claim("dynamics-live")
def dynamics_live(losses: Losses) -> None:
    """latent_i and kl_i train the dynamics."""
    dynamics = Mixing(3)
    direction = draw(3, 3, seed=4)
    names = ["latent_1", "kl_1"]
    expect_live(losses, random_case(3, 2), dynamics.weight, direction, names, "the dynamics", dynamics)


@claim("rolled-states-live")
def rolled_states_live(losses: Losses) -> None:
    """The gradient runs back through every rolled state to the first step."""
    dynamics = Mixing(3)
    direction = draw(3, 3, seed=4)
    names = step_names(HORIZON, "latent", "kl", start=2)
    path = "the dynamics through all steps"
    expect_live(losses, random_case(3, HORIZON + 1), dynamics.weight, direction, names, path, dynamics)


CLAIMS = [
    target_cut,
    teacher_cut,
    head_cut,
    tied_head,
    source_live,
    embeddings_live,
    dynamics_live,
    rolled_states_live,
]
