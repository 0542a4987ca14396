"""Drafting several continuations at once, as a tree, and following the model's own text through it.

The drafter's most likely children of the most likely nodes are tried together: one call of the model judges all of
them, each node seeing the text before the tree and its own ancestors. A drafter whose state is a vector for each node
needs no cache and no mask for this, so that a level of the tree is one batched step (compare EAGLE-2, arXiv
2406.16858, whose drafter attends, and ReDrafter, arXiv 2403.09919).

The candidates are chosen, not drawn, and from the drafter's laws alone. The rule for such candidates tries the
children of a node in order, keeps child x with probability p(x) of what is left of the model's law p, strikes x out
if it is not kept, and draws from the rest when all children are struck out. Child x is then kept with the probability
p(x) that it had at first, and any other token is drawn with its own. So one draw from p, looked up among the children,
does the same; here the model's text is drawn as without drafts, for as long as it stays inside the tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextlat.decoding.drafting import Uniform
from nextlat.decoding.rounds import Round, Setting
from nextlat.decoding.sampling import Sampling, draw
from nextlat.errors import NextLatError
from nextlat.model.interfaces import Drafter


@dataclass(frozen=True)
class Tree:
    """Drafts that branch: in place of a policy, which says how long drafts without branches are.

    Args:
        nodes: most drafted tokens that the model judges in one call.
        depth: most tokens behind each other; fewer where the drafter makes no more.
        width: how many nodes of a level get children, and how many children each gets.

    Raises:
        NextLatError: a number below 1.
    """

    nodes: int = 16
    depth: int = 6
    width: int = 4

    def __post_init__(self) -> None:
        for name, value in (("nodes", self.nodes), ("depth", self.depth), ("width", self.width)):
            if value < 1:
                raise NextLatError(f"{name} of the draft tree is {value}; it must be at least 1")

    @property
    def max_length(self) -> int:
        """Most drafted tokens that can be kept."""
        return self.depth


class TokenTree(NamedTuple):
    """The trees of all rows, each with T - 1 drafted tokens or fewer; the known token is the root, at place 0.

    Parents stand before their children, and siblings in falling order of probability.
    """

    tokens: Tensor
    """(B, T) int64; anything where a row has fewer."""
    parents: Tensor
    """(B, T) int64 place of the parent; -1 for the root and where a row has fewer."""
    depths: Tensor
    """(B, T) int64 distance from the root; 0 where a row has fewer."""

    def ancestors(self) -> Tensor:
        """(B, T, T) bool: whether the second is an ancestor of the first, or the same."""
        rows, places = self.tokens.shape
        same = torch.eye(places, dtype=torch.bool, device=self.tokens.device).expand(rows, -1, -1)
        upwards = self.parents.clamp(min=0)[..., None].expand(-1, -1, places)
        found = same
        for _ in range(int(self.depths.max())):
            found = same | found.gather(1, upwards)
        return found

    def mask(self, begins: Tensor) -> Tensor:
        """What each node may look at when the tree stands behind (B,) cached positions: (B, 1, T, S) bool."""
        ancestors = self.ancestors()
        places = ancestors.shape[1]
        keys = torch.arange(int(begins.max()) + places, device=begins.device)
        cached = (keys < begins[:, None])[:, None].repeat(1, places, 1)
        here = begins[:, None] + keys[:places]
        return cached.scatter(2, here[:, None].expand_as(ancestors), ancestors)[:, None]


def grow(drafter: Drafter, state: Any, token: Tensor, sampling: Sampling, tree: Tree, room: Tensor) -> TokenTree:
    """The most likely tokens ahead, as far as the drafter can tell.

    Level by level the nodes that are reached with the highest probability get their most likely children; of all
    these the most probable are kept. A child is never more probable than its parent, and comes after it where they
    are equal, so that what is kept is a tree.

    Args:
        drafter: any that can gather rows of its state.
        state: its state after the last accepted position.
        token: (B,) int64 the known tokens behind it.
        sampling: makes laws of logits; at temperature 0 the drafter's own law counts.
        tree: size and shape.
        room: (B,) int64 most tokens behind each other, for each row.
    """
    rows = torch.arange(len(token), device=token.device)
    tokens, parents = token[:, None], torch.zeros_like(token)[:, None]  # (B, candidates), the root first
    scores = torch.zeros(tokens.shape, device=token.device)  # (B, candidates) log-probability of the path
    depths = [0]
    leaves, above = tokens, parents  # (B, L) tokens of the nodes that get children, and which candidates they are
    for depth in range(1, int(room.max()) + 1):
        state, logits = drafter.step(state, leaves.flatten())
        law = logits.float().softmax(-1) if sampling.greedy else sampling.law(logits)
        chances, columns = law.topk(min(tree.width, law.shape[-1]))
        children = columns if drafter.vocabulary is None else drafter.vocabulary[columns]
        # clamped, because no rounding may make a child more probable than its parent
        reached = scores.gather(1, above)[..., None] + chances.log().clamp(max=0).view(*above.shape, -1)
        reached = reached.flatten(1).masked_fill((depth > room)[:, None], float("-inf"))
        fan = chances.shape[-1]
        tokens = torch.cat([tokens, children.view_as(reached)], 1)
        parents = torch.cat([parents, above.repeat_interleave(fan, 1)], 1)
        before, scores = scores.shape[1], torch.cat([scores.to(reached.dtype), reached], 1)
        depths += [depth] * reached.shape[1]
        best = reached.argsort(dim=1, descending=True, stable=True)[:, : tree.width]
        if scores.shape[1] > tree.nodes:
            bar = scores.topk(tree.nodes + 1).values[:, -1:]
            if bool((reached <= bar).all()):
                break  # nothing below this level would be kept
        state = drafter.select(state, (rows[:, None] * above.shape[1] + best // fan).flatten())
        leaves, above = children.view_as(reached).gather(1, best), before + best
    return _best(tokens, parents, torch.tensor(depths, device=token.device), scores, tree.nodes)


def _best(tokens: Tensor, parents: Tensor, depths: Tensor, scores: Tensor, nodes: int) -> TokenTree:
    """The most probable of (B, C) candidates that are possible at all, beside the root, in the order of their listing.

    Args:
        tokens: (B, C).
        parents: (B, C) which candidate each one's parent is; it stands before it.
        depths: (C,).
        scores: (B, C) log-probabilities, of no candidate greater than of its parent.
        nodes: how many to keep.
    """
    chosen = scores.argsort(dim=1, descending=True, stable=True)[:, : nodes + 1]
    possible = scores.gather(1, chosen) > float("-inf")
    size = int(possible.sum(1).max())
    none = scores.shape[1]
    chosen = chosen.where(possible, none).sort(1).values[:, :size]
    real, chosen = chosen < none, chosen.clamp(max=none - 1)
    # where a row has fewer, the last candidate fills up; it is of the last level and nobody's parent
    place = torch.zeros_like(tokens).scatter(1, chosen, torch.arange(size, device=tokens.device).expand_as(chosen))
    depth = depths[chosen] * real
    parent = place.gather(1, parents.gather(1, chosen)).where(depth > 0, -1)
    return TokenTree(tokens.gather(1, chosen), parent, depth)


def follow(drafted: TokenTree, logits: Tensor, sampling: Sampling, uniform: Uniform) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the model's text token by token while the tree holds what is drawn.

    Args:
        drafted: the tree.
        logits: (B, T, V) of the model behind each node.
        sampling: makes laws of them.
        uniform: source of the draws, one a token and row.

    Returns:
        (B, P) places on the way, the root first; (B,) how many of them were drafted; (B,) the token behind them.
    """
    rows = torch.arange(len(logits), device=logits.device)
    node = torch.zeros_like(rows)
    accepted, pending = node, node
    going = torch.ones_like(rows, dtype=torch.bool)
    path = [node]
    while True:
        behind = logits[rows, node]
        drawn = behind.argmax(-1) if sampling.greedy else draw(sampling.law(behind), uniform(len(rows)))
        pending = drawn.where(going, pending)
        fits = (drafted.parents == node[:, None]) & (drafted.tokens == drawn[:, None])  # at most one: siblings differ
        going = going & fits.any(1)
        if not bool(going.any()):
            return torch.stack(path, 1), accepted, pending
        node = fits.int().argmax(1).where(going, node)
        accepted = accepted + going
        path.append(node)


def play_tree(setting: Setting, tree: Tree, state: Any, pending: Tensor, room: Tensor) -> Round:
    """A round with a tree of drafts.

    Args:
        setting: model, drafter and sampling.
        tree: size and shape of the tree.
        state: the drafter's state after the last accepted position.
        pending: (B,) int64 the known tokens behind it.
        room: (B,) int64 most tokens behind each other that each row may draft.
    """
    lm, drafter, cache, sampling, uniform, _ = setting
    assert drafter is not None
    if drafter.max_length is not None:
        room = room.clamp(max=drafter.max_length - 1)  # the pending token is its first
    drafted = grow(drafter, state, pending, sampling, tree, room)
    begins = torch.tensor(cache.lengths, device=pending.device)
    output = lm(drafted.tokens, positions=begins[:, None] + drafted.depths, mask=drafted.mask(begins), cache=cache)
    path, accepted, pending = follow(drafted, output.logits, sampling, uniform)
    return Round(output, drafted.tokens, drafted.depths.amax(1), accepted, path, pending)
