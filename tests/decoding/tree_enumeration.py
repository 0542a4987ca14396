"""The exact law of what a round with a tree of drafts puts out.

The tree comes from the code under test, on a table of logits. The rule that follows the model's text through it is run
with every combination of coins that matters: where its outcome changes with a coin is found by bisection, so that any
rule can be put to the test, however it uses its coins.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextlat.decoding.drafting import Uniform
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.tree import TokenTree, Tree, follow, grow
from tests.decoding.enumeration import TableDrafter, Text, World, continuation

Rule = Callable[[TokenTree, Tensor, Sampling, Uniform], tuple[Tensor, Tensor, Tensor]]
LAST = 1 - 2.0**-53
"""The greatest coin."""


@dataclass
class Plan:
    """How a round is played."""

    sampling: Sampling
    tree: Tree
    rule: Rule = follow
    vocabulary: tuple[int, ...] | None = None
    """What the drafter speaks."""


def text_of(tree: TokenTree, place: int, row: int = 0) -> Text:
    """Tokens from the root, which is left out, to a place."""
    if place == 0:
        return ()
    return (*text_of(tree, int(tree.parents[row, place]), row), int(tree.tokens[row, place]))


def grown(world: World, plan: Plan, tree: Tree | None = None) -> TokenTree:
    """The tree of one row behind a known token 0."""
    drafter = TableDrafter(world.drafter, None if plan.vocabulary is None else torch.tensor(plan.vocabulary))
    tree = tree if tree is not None else plan.tree
    return grow(drafter, [()], torch.tensor([0]), plan.sampling, tree, torch.tensor([tree.depth]))


def breaks(outcome: Callable[[float], object]) -> Iterator[float]:
    """Where a piecewise constant function on [0, 1) changes, if it never comes back to a value it had."""

    def between(low: float, at_low: object, high: float, at_high: object) -> Iterator[float]:
        middle = (low + high) / 2
        if at_low == at_high:
            return
        if middle in (low, high):
            yield high
            return
        at_middle = outcome(middle)
        yield from between(low, at_low, middle, at_middle)
        yield from between(middle, at_middle, high, at_high)

    yield from between(0.0, outcome(0.0), LAST, outcome(LAST))


def outcomes(play: Callable[[Uniform], Text]) -> dict[Text, float]:
    """Every outcome of a function of coins, with its probability."""
    found: dict[Text, float] = {}

    def run(coins: list[float]) -> tuple[Text, int]:
        used = 0

        def uniform(*shape: int) -> Tensor:
            nonlocal used
            assert shape == (1,)
            used += 1
            return torch.tensor([coins[used - 1] if used <= len(coins) else 0.0], dtype=torch.float64)

        text = play(uniform)
        return text, used

    def explore(coins: list[float], probability: float) -> None:
        text, used = run(coins)
        if used <= len(coins):
            found[text] = found.get(text, 0.0) + probability
            return
        bounds = [0.0, *breaks(lambda coin: run([*coins, coin])), 1.0]
        for low, high in itertools.pairwise(bounds):
            explore([*coins, (low + high) / 2], probability * (high - low))

    explore([], 1.0)
    return found


def kept(world: World, plan: Plan) -> dict[Text, float]:
    """Every text that a round can put out, with its probability."""
    tree = grown(world, plan)
    logits = torch.stack([world.target[text_of(tree, place)] for place in range(tree.tokens.shape[1])])[None]

    def play(uniform: Uniform) -> Text:
        path, accepted, pending = plan.rule(tree, logits, plan.sampling, uniform)
        places = path[0, 1 : 1 + int(accepted)].tolist()
        return (*(int(tree.tokens[0, place]) for place in places), int(pending))

    return outcomes(play)


def distance(world: World, plan: Plan) -> float:
    """Total variation between the first depth + 1 tokens of a round, with the target behind it, and the target's."""
    length = plan.tree.depth + 1
    total = torch.zeros((world.vocabulary,) * length, dtype=torch.float64)
    for text, probability in kept(world, plan).items():
        total[text] += probability * continuation(world, plan.sampling, text, length)
    return float((total - continuation(world, plan.sampling, (), length)).abs().sum()) / 2
