"""Draft trees: what is kept is a tree, its nodes are judged as if alone, and the text keeps the model's own law."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nextlat import generate
from nextlat.decoding import Sampling, Static, Statistics, Tree, decode
from nextlat.decoding.drafting import Uniform, draft
from nextlat.decoding.rounds import Setting
from nextlat.decoding.sampling import draw
from nextlat.decoding.tree import TokenTree, follow, grow, play_tree
from nextlat.errors import NextLatError
from nextlat.model.interfaces import Drafter, LMOutput
from tests.decoding.enumeration import World
from tests.decoding.test_speculative import VOCABULARY, prompts, trained
from tests.decoding.tree_enumeration import Plan, Rule, TableDrafter, distance, grown, kept, text_of

EXACT = 1e-12
SAMPLINGS = {
    "temperature 1": Sampling(1.0),
    "temperature 2, top 2": Sampling(2.0, top_k=2),
    "top p 0.7": Sampling(0.8, top_p=0.7),
    "greedy": Sampling(0.0),
}
TREES = {"leaves": Tree(3, 1, 3), "chain": Tree(3, 3, 1), "narrow": Tree(4, 2, 2), "deep": Tree(6, 3, 2)}


def no_coins(*shape: int) -> Tensor:
    raise AssertionError("temperature 0 needs no coins")


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("tree", TREES)
def test_a_round_puts_out_the_models_own_law(tree: str, sampling: str) -> None:
    world = World(4, TREES[tree].depth + 1, seed=0, closeness=0.4)
    assert distance(world, Plan(SAMPLINGS[sampling], TREES[tree])) < EXACT


def test_so_it_does_for_another_vocabulary_and_a_drafter_that_speaks_a_part_of_it() -> None:
    assert distance(World(5, 3, seed=1), Plan(Sampling(1.0), Tree(5, 2, 3))) < EXACT
    plan = Plan(Sampling(1.0), Tree(4, 2, 2), vocabulary=(1, 4))
    world = World(5, 3, seed=1)
    assert distance(world, plan) < EXACT
    assert set(grown(world, plan).tokens[0, 1:].tolist()) == {1, 4}


@dataclass
class InOrder:
    """The rule as it is usually told, with a coin for every child; and the mistakes that can be made in it."""

    renormalise: bool = True
    residual: bool = True
    drafter: World | None = None
    """Children are judged as if they had been drawn from this one's laws."""
    stale: bool = False
    """The law above an accepted child is used below it as well."""

    def __call__(
        self, tree: TokenTree, logits: Tensor, sampling: Sampling, uniform: Uniform
    ) -> tuple[Tensor, Tensor, Tensor]:
        path = [0]
        while True:
            above = int(tree.parents[0, path[-1]]) if self.stale and len(path) > 1 else path[-1]
            law = sampling.law(logits[0, above])
            for child in (tree.parents[0] == path[-1]).nonzero()[:, 0].tolist():
                token = int(tree.tokens[0, child])
                q = torch.zeros_like(law)
                q[token] = 1.0
                if self.drafter is not None:
                    q = sampling.law(self.drafter.drafter[text_of(tree, path[-1])])
                if float(uniform(1)) * q[token] < law[token]:
                    path.append(child)
                    break
                if self.residual:
                    law = (law - q * law[token]).clamp(min=0) if self.drafter is None else (law - q).clamp(min=0)
                if self.renormalise:
                    law = law / law.sum()
            else:
                return torch.tensor([path]), torch.tensor([len(path) - 1]), draw(law[None], uniform(1))


def test_one_draw_looked_up_among_the_children_is_the_rule_that_tries_them_in_order() -> None:
    world = World(4, 3, seed=2, closeness=0.4)
    plan = Plan(Sampling(1.3, top_k=3), Tree(5, 2, 2))
    one, other = kept(world, plan), kept(world, replace(plan, rule=InOrder()))
    assert len(one) > 10
    assert all(abs(one.get(text, 0) - other.get(text, 0)) < EXACT for text in one | other)


def drawn_again(tree: TokenTree, logits: Tensor, sampling: Sampling, uniform: Uniform) -> tuple[Tensor, Tensor, Tensor]:
    path, accepted, _ = follow(tree, logits, sampling, uniform)
    last = logits[:, int(path[0, int(accepted)])]
    return path, accepted, draw(sampling.law(last), uniform(1))


MISTAKES: dict[str, Callable[[World], Rule]] = {
    "a law that is not renormalised after a rejection": lambda world: InOrder(renormalise=False),
    "chosen children judged as if drawn": lambda world: InOrder(drafter=world),
    "rejected children left in the law": lambda world: InOrder(residual=False),
    "the law above an accepted child used below it": lambda world: InOrder(stale=True),
    "a token drawn afresh where the text leaves the tree": lambda world: drawn_again,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_known_mistake_is_seen(mistake: str) -> None:
    world = World(3, 3, seed=3, closeness=0.4)
    right = Plan(Sampling(1.0), Tree(4, 2, 2))
    assert distance(world, right) < EXACT
    assert distance(world, replace(right, rule=MISTAKES[mistake](world))) > 1e-2


def all_texts(world: World, depth: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every text of 1 ... depth tokens with its log-probability under the drafter, best first."""
    found = []
    for length in range(1, depth + 1):
        for text in itertools.product(range(world.vocabulary), repeat=length):
            steps = (world.drafter[text[:i]].log_softmax(-1)[text[i]] for i in range(length))
            found.append((float(sum(steps)), text))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("nodes", [1, 2, 5, 9, 30])
def test_the_most_probable_texts_of_all_are_kept(nodes: int) -> None:
    world = World(3, 4, seed=4, closeness=0.0)
    tree = grown(world, Plan(Sampling(1.0), Tree(nodes, 3, 9)))  # so wide that nothing is left out on the way
    best = [text for _, text in all_texts(world, 3)[:nodes]]
    assert sorted(text_of(tree, place) for place in range(1, nodes + 1)) == sorted(best)


@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0, 2000.0])
def test_what_is_kept_is_a_tree_also_where_probabilities_are_equal_or_certain(scale: float) -> None:
    # 0: all equal; 40: many are 1 in fp32, so that a child is as probable as its parent; 2000: many are 0
    g = torch.Generator().manual_seed(0)
    table = {
        text: (scale * torch.randint(3, (4,), generator=g)).float()
        for length in range(5)
        for text in itertools.product(range(4), repeat=length)
    }
    states: list[Any] = [()] * 6
    room = torch.tensor([5, 4, 2, 1, 0, 5])
    for shape in (Tree(1, 5, 2), Tree(7, 5, 2), Tree(16, 5, 4)):
        tree = grow(TableDrafter(table), states, torch.arange(6) % 4, Sampling(1.0), shape, room)
        for row in range(6):
            real = [place for place in range(tree.tokens.shape[1]) if tree.depths[row, place] > 0]
            assert real == list(range(1, len(real) + 1))
            assert len(real) <= shape.nodes
            assert tree.parents[row, len(real) + 1 :].eq(-1).all()
            for place in real:
                parent = int(tree.parents[row, place])
                assert 0 <= parent < place
                assert tree.depths[row, place] == tree.depths[row, parent] + 1 <= room[row]
            assert len({text_of(tree, place, row) for place in real}) == len(real)


def test_a_tree_of_width_1_is_the_chain() -> None:
    objective, one, other = trained(), Statistics(), Statistics()
    drafter = objective.drafter()
    assert drafter is not None
    state, token, room = torch.randn(3, 16, dtype=torch.float64), torch.tensor([1, 2, 3]), torch.tensor([4, 4, 4])
    with torch.no_grad():
        tree = grow(drafter, state, token, Sampling(), Tree(16, 4, 1), room)
        chain = draft(drafter, state, token, Sampling(), Static(4), room, VOCABULARY, no_coins)
    assert chain is not None
    assert torch.equal(tree.tokens[:, 1:], chain.tokens)
    assert tree.parents.tolist() == [[-1, 0, 1, 2, 3]] * 3
    generate(objective.as_lm(), prompts(), 20, drafter=drafter, policy=Tree(4, 4, 1), statistics=one)
    generate(objective.as_lm(), prompts(), 20, drafter=drafter, policy=Static(4), statistics=other)
    assert one == other


@torch.no_grad()
def test_nodes_are_judged_as_if_alone_and_the_path_stays_in_the_cache() -> None:
    objective, lengths, room = trained(), [6, 3, 5], torch.tensor([3, 0, 2])
    lm, drafter, texts = objective.as_lm(), objective.drafter(), prompts(3, 6)
    assert drafter is not None
    cache = lm.new_cache(3, 24)
    output = lm(texts, cache=cache)
    cache.lengths = list(lengths)
    last = torch.tensor(lengths) - 1
    pending = output.logits[torch.arange(3), last].argmax(-1)
    setting = Setting(lm, drafter, cache, Sampling(), no_coins, VOCABULARY)
    played = play_tree(setting, Tree(7, 3, 3), drafter.observe(output, last), pending, room)
    tree = grow(drafter, drafter.observe(output, last), pending, Sampling(), Tree(7, 3, 3), room)
    assert torch.equal(tree.tokens, played.tokens)
    assert played.tokens.shape == (3, 8)
    assert played.drafted[1] == 0
    places = [way[: 1 + kept] for way, kept in zip(played.path.tolist(), played.accepted.tolist(), strict=True)]
    cache.keep(places, lengths)
    for row, length in enumerate(lengths):
        before = [*texts[row, :length].tolist(), int(pending[row])]
        for place in range(8):
            if place == 0 or tree.depths[row, place] > 0:
                alone = lm(torch.tensor([before + list(text_of(tree, place, row))])).logits[0, -1]
                torch.testing.assert_close(played.output.logits[row, place], alone, rtol=0, atol=1e-10)
        fresh = lm.new_cache(1, 24)
        lm(torch.tensor([before + list(text_of(tree, places[row][-1], row))]), cache=fresh)
        assert cache.lengths[row] == fresh.lengths[0]
        for store, wanted in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
            kept_part = slice(fresh.lengths[0])
            torch.testing.assert_close(store[:, row, :, kept_part], wanted[:, 0, :, kept_part], rtol=0, atol=1e-10)


class Itself:
    """A model as its own drafter; the state is the text that it has seen."""

    max_length: int | None = None
    vocabulary: Tensor | None = None

    def __init__(self, lm: Any) -> None:
        self.lm = lm

    def observe(self, output: Any, accepted: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.cat([state, token[:, None]], 1)
        return state, self.lm(state).logits[:, -1]

    def select(self, state: Tensor, rows: Tensor) -> Tensor:
        return state[rows]


@torch.no_grad()
@pytest.mark.parametrize(
    ("sampling", "tree"),
    [(Sampling(0.0), Tree(5, 5, 1)), (Sampling(1.0), Tree(VOCABULARY + VOCABULARY**2, 2, VOCABULARY))],
)
def test_a_tree_that_is_sure_to_hold_the_text_is_kept_to_its_full_depth(sampling: Sampling, tree: Tree) -> None:
    lm, texts = trained().as_lm(), prompts(3)
    cache = lm.new_cache(3, 200)
    pending = lm(texts, cache=cache).logits[:, -1].argmax(-1)
    coins = partial(torch.rand, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    setting = Setting(lm, Itself(lm), cache, sampling, coins, VOCABULARY)
    played = play_tree(setting, tree, texts, pending, torch.full((3,), tree.depth))
    assert played.accepted.tolist() == [tree.depth] * 3
    assert played.drafted.tolist() == [tree.depth] * 3


@pytest.mark.parametrize("kind", ["nextlat", "mtp", "jtp"])
@pytest.mark.parametrize("tree", [Tree(), Tree(5, 3, 2)])
def test_greedy_text_is_that_of_plain_decoding(kind: str, tree: Tree) -> None:
    objective, counted, lengths = trained(kind), Statistics(), [5, 2, 4, 1]
    plain = generate(objective.as_lm(), prompts(), 40, lengths=lengths)
    fast = generate(
        objective.as_lm(),
        prompts(),
        40,
        lengths=lengths,
        drafter=objective.drafter(),
        policy=tree,
        statistics=counted,
    )
    assert torch.equal(fast, plain)
    assert 0 < sum(counted.accepted) < sum(counted.reached)
    # nothing is made in vain: a token a row at first, then those kept and the one behind them
    assert counted.tokens == 4 * 40 == 4 + counted.rounds + sum(counted.accepted)
    if kind != "nextlat":
        assert len(counted.drafted) == 3  # of four with horizon 3, the pending token is the first


def test_one_row_sampled_with_a_tree_is_the_plain_text_of_the_same_seed() -> None:
    # every token is drawn once, with a coin of its own, inside the tree and where it ends
    objective, counted = trained(), Statistics()
    made = [
        generate(
            objective.as_lm(),
            prompts(1),
            100,
            1.0,
            torch.Generator().manual_seed(5),
            top_p=0.9,
            drafter=objective.drafter(),
            policy=policy,
            statistics=counted,
        )
        for policy in (None, Tree(12, 4, 3))
    ]
    assert torch.equal(*made)
    assert sum(counted.accepted) > 20


class Watched:
    """A drafter whose states after the model's calls are written down."""

    max_length: int | None = None
    vocabulary: Tensor | None = None

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.seen = drafter, list[Tensor]()

    def observe(self, output: LMOutput, accepted: Tensor) -> Tensor:
        self.seen.append(self.drafter.observe(output, accepted))
        return self.seen[-1]

    def step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return self.drafter.step(state, token)

    def select(self, state: Tensor, rows: Tensor) -> Any:
        return self.drafter.select(state, rows)


@torch.no_grad()
def test_the_drafter_goes_on_from_the_last_kept_node() -> None:
    # the state of another node would leave the text right and make drafts worse
    objective = trained()
    drafter = objective.drafter()
    assert drafter is not None
    watched = Watched(drafter)
    text, lengths = prompts(1)[0].tolist(), []
    for step in decode(objective.as_lm(), prompts(1), 40, Sampling(), drafter=watched, policy=Tree(12, 4, 3)):
        text += step[0][1]
        lengths.append(len(text) - 1)  # the model has seen all but the last
    assert max(after - before for before, after in itertools.pairwise(lengths)) > 2
    whole = objective.as_lm()(torch.tensor([text])).hidden[0]
    for state, length in zip(watched.seen, lengths, strict=True):
        torch.testing.assert_close(state[0], whole[length - 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("new", [1, 2, 7])
def test_rows_end_at_the_number_asked_for_and_at_stop_tokens(new: int) -> None:
    objective = trained()
    free = generate(objective.as_lm(), prompts(6), 25)
    stop = int(free[0, 9])
    given: dict[str, Any] = {"drafter": objective.drafter(), "policy": Tree(9, 4, 3)}
    assert torch.equal(generate(objective.as_lm(), prompts(6), new, **given), free[:, :new])
    ended = generate(objective.as_lm(), prompts(6), 25, stop_tokens=[stop], **given)
    for row, whole in zip(ended.tolist(), free.tolist(), strict=True):
        length = whole.index(stop) + 1 if stop in whole else 25
        assert row == whole[:length] + [stop] * (25 - length)


@pytest.mark.parametrize("name", ["nodes", "depth", "width"])
def test_an_empty_tree_is_refused(name: str) -> None:
    with pytest.raises(NextLatError, match=f"{name} of the draft tree is 0; it must be at least 1"):
        Tree(**{name: 0})
