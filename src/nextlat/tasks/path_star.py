"""Path-Star G(d, l): find the arm of a star graph that ends in the goal (arXiv 2403.06963).

A graph has one centre and d disjoint arms; a path counts l nodes *including* the centre, so every arm has
l - 1 nodes and the graph E = d (l - 1) edges. The text is the shuffled edge list, the centre, the goal, and
the path from centre to goal. Only the first step after the centre needs a plan: a model that has learned to
follow edges, but not to look ahead, picks an arm at random and is right once in d.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from hashlib import sha256
from math import factorial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from pydantic import Field, model_validator

from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError
from nextlat.options import Options
from nextlat.statistics import SHORTCUT_WITHIN, SOLVED_FROM, Metric, mean_interval, proportion
from nextlat.tasks.base import Outputs, Prompts

Array = NDArray[np.int64]
TEST, TRAIN, FRESH, SHUFFLE = range(4)
"""Streams of random numbers: each split draws from its own."""
BATCH_OF_EVALUATION = 500


class PathStarOptions(Options):
    """The ``data:`` section of a path_star configuration."""

    degree: int = Field(2, ge=2, description="arms d")
    length: int = Field(4, ge=3, description="nodes of a path l, the centre included")
    nodes: int = Field(100, ge=2, description="node labels N to draw from")
    graphs: Literal["fixed", "fresh"] = "fixed"
    train_size: int = Field(200_000, ge=1, description="fixed graphs")
    test_size: int = Field(20_000, ge=1, description="held-out graphs")
    variant: Literal["standard", "reverse", "teacherless"] = "standard"
    seed: int = Field(0, ge=0, description="seed of the graphs; the run's seed orders them")

    @property
    def edges(self) -> int:
        """E = d (l - 1)."""
        return self.degree * (self.length - 1)

    @property
    def distinct_graphs(self) -> int:
        """Number of graphs with a goal, N! / ((N - 1 - E)! (d - 1)!)."""
        return factorial(self.nodes) // (factorial(self.nodes - 1 - self.edges) * factorial(self.degree - 1))

    @model_validator(mode="after")
    def _fits(self) -> PathStarOptions:
        if self.edges + 1 > self.nodes:
            raise ValueError(
                f"G({self.degree},{self.length}) has {self.edges + 1} nodes and only {self.nodes} labels are "
                f"allowed; set data.nodes to at least {self.edges + 1}, or lower data.degree or data.length"
            )
        wanted = self.test_size + (self.train_size if self.graphs == "fixed" else 0)
        if 2 * wanted > self.distinct_graphs:
            raise ValueError(
                f"{wanted} graphs are asked for and only {self.distinct_graphs} distinct ones exist; at most half "
                "may be used so that train and test stay apart: lower data.train_size or data.test_size, "
                "or raise data.nodes"
            )
        return self


class Graphs(NamedTuple):
    """Star graphs, the arm of the goal first."""

    centre: Array
    """(n,)"""
    arms: Array
    """(n, d, l - 1) nodes from the centre outwards; arm 0 ends in the goal."""
    order: Array
    """(n, E) a permutation of the edges, the order they are written in."""

    @property
    def path(self) -> Array:
        """(n, l) the answer, centre to goal."""
        return np.concatenate([self.centre[:, None], self.arms[:, 0]], axis=1)

    @property
    def edges(self) -> Array:
        """(n, E, 2) parent and child, in the order they are written."""
        n, degree, steps = self.arms.shape
        centre = np.broadcast_to(self.centre[:, None, None], (n, degree, 1))
        parents = np.concatenate([centre, self.arms[:, :, :-1]], axis=2)
        pairs = np.stack([parents, self.arms], axis=-1).reshape(n, degree * steps, 2)
        return np.take_along_axis(pairs, self.order[:, :, None], axis=1)

    def take(self, index: Any) -> Graphs:
        """Some of the graphs."""
        return Graphs(self.centre[index], self.arms[index], self.order[index])


def draw_graphs(options: PathStarOptions, n: int, rng: Generator) -> Graphs:
    """Draw n graphs: labels without replacement, edges in random order."""
    steps, edges = options.length - 1, options.edges
    labels = rng.random((n, options.nodes)).argsort(axis=1)[:, : edges + 1]
    order = rng.random((n, edges)).argsort(axis=1)
    return Graphs(labels[:, 0], labels[:, 1:].reshape(n, options.degree, steps), order)


def fingerprint(graphs: Graphs) -> NDArray[np.uint64]:
    """(n,) 64-bit hash of (edge set, centre, goal): the order of edges and of the other arms is ignored.

    Two different graphs that share a hash cost one needless redraw, nothing else.
    """
    others = graphs.arms[:, 1:]
    by_first = others[:, :, 0].argsort(axis=1)
    others = np.take_along_axis(others, by_first[:, :, None], axis=1)
    flat = np.concatenate([graphs.path, others.reshape(len(others), -1)], axis=1).astype(np.uint64)
    odd = default_rng(0).integers(0, 2**63, flat.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    mixed: NDArray[np.uint64] = ((flat + np.uint64(1)) * odd).sum(axis=1)
    for shift in (31, 29):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(0x9E3779B97F4A7C15)
    return mixed


def draw_avoiding(options: PathStarOptions, n: int, rng: Generator, avoid: NDArray[np.uint64]) -> Graphs:
    """Draw n graphs none of which is in ``avoid`` (sorted fingerprints); a hit is redrawn."""
    graphs = draw_graphs(options, n, rng)
    while True:
        hit = np.isin(fingerprint(graphs), avoid).nonzero()[0]
        if not hit.size:
            return graphs
        fresh = draw_graphs(options, hit.size, rng)
        for old, new in zip(graphs, fresh, strict=True):
            old[hit] = new


def draw_distinct(options: PathStarOptions, n: int, rng: Generator) -> Graphs:
    """Draw n graphs that are all different."""
    graphs = draw_graphs(options, n, rng)
    while True:
        _, first = np.unique(fingerprint(graphs), return_index=True)
        if first.size == n:
            return graphs
        again = np.setdiff1d(np.arange(n), first)
        fresh = draw_graphs(options, again.size, rng)
        for old, new in zip(graphs, fresh, strict=True):
            old[again] = new


class PathStar:
    """The Path-Star task.

    Token ids: node k is k, then ``|``, ``=``, ``/``, ``$`` (teacherless placeholder), end token.
    A row is the edges as ``u v | u v | ...``, ``/ centre goal =``, and the l nodes of the path; the end token
    is only the target of the last position. Targets are the path and the end token; everything before them
    is prompt. The plan is needed at index P = 3E + 3, where the centre is read and the arm is chosen.

    Args:
        options: the data options.
        seed: the run's seed; orders the fixed graphs, or draws the fresh ones.
        batch_size: global rows of a step.
    """

    Options = PathStarOptions
    next_token = True
    headline = "accuracy"
    splits = ("test", "train")

    def __init__(self, options: PathStarOptions, seed: int, batch_size: int) -> None:
        self.options, self.seed, self.batch_size = options, seed, batch_size
        n = options.nodes
        self.bar, self.equals, self.slash, self.blank, self.end_token = range(n, n + 5)
        self.vocab_size = n + 5
        self.prompt_length = 3 * options.edges + 3
        self.sequence_length = self.prompt_length + options.length

    @cached_property
    def test(self) -> Graphs:
        """The held-out graphs, drawn first, all distinct."""
        return draw_distinct(self.options, self.options.test_size, default_rng([self.options.seed, TEST]))

    @cached_property
    def test_fingerprints(self) -> NDArray[np.uint64]:
        """Sorted hashes that no training graph may have."""
        return np.sort(fingerprint(self.test))

    @cached_property
    def train(self) -> Graphs:
        """The fixed training graphs; none is in the test set."""
        rng = default_rng([self.options.seed, TRAIN])
        return draw_avoiding(self.options, self.options.train_size, rng, self.test_fingerprints)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows of the global batch of a step; fixed graphs come in a new order every epoch."""
        if self.options.graphs == "fresh":
            rng = default_rng([self.options.seed, FRESH, self.seed, step])
            graphs = draw_avoiding(self.options, self.batch_size, rng, self.test_fingerprints)
            return self.batch(graphs.take(slice(start, stop)))
        numbers = np.arange(step * self.batch_size + start, step * self.batch_size + stop)
        epochs, places = np.divmod(numbers, self.options.train_size)
        index = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = self._epoch_order(int(epoch))[places[epochs == epoch]]
        return self.batch(self.train.take(index))

    def _epoch_order(self, epoch: int) -> Array:
        cached: tuple[int, Array] | None = getattr(self, "_order", None)
        if cached is None or cached[0] != epoch:
            rng = default_rng([self.options.seed, SHUFFLE, self.seed, epoch])
            cached = self._order = (epoch, rng.permutation(self.options.train_size))
        return cached[1]

    def answers(self, graphs: Graphs) -> Array:
        """(n, l) the path as it must be written."""
        return graphs.path[:, ::-1] if self.options.variant == "reverse" else graphs.path

    def prefix(self, graphs: Graphs) -> Array:
        """(n, P) the prompt: edges, centre and goal."""
        edges = graphs.edges
        n = len(edges)
        written = np.concatenate([edges, np.full((n, self.options.edges, 1), self.bar)], axis=2)
        written = written.reshape(n, 3 * self.options.edges)[:, :-1]
        path = graphs.path
        column = np.ones((n, 1), dtype=np.int64)
        return np.concatenate([written, column * self.slash, path[:, :1], path[:, -1:], column * self.equals], axis=1)

    def fed(self, graphs: Graphs) -> Array:
        """(n, P + l) what the model reads."""
        answers = self.answers(graphs)
        if self.options.variant == "teacherless":
            answers = np.full_like(answers, self.blank)
        return np.concatenate([self.prefix(graphs), answers], axis=1)

    def batch(self, graphs: Graphs) -> Batch:
        """Tokens and targets of some graphs."""
        tokens = self.fed(graphs)
        targets = np.full_like(tokens, IGNORE)
        targets[:, self.prompt_length - 1 : -1] = self.answers(graphs)
        targets[:, -1] = self.end_token
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

    def _split(self, split: str) -> Graphs:
        if split == "test":
            return self.test
        if split == "train":  # as many training graphs as there are test graphs, to measure memorisation
            if self.options.graphs == "fresh":
                rng = default_rng([self.options.seed, TRAIN])
                return draw_avoiding(self.options, self.options.test_size, rng, self.test_fingerprints)
            return self.train.take(slice(0, self.options.test_size))
        raise NextLatError(f"path_star has no split {split!r}; choose test or train")

    def evaluation(self, split: str = "test") -> Iterable[Batch]:
        """Held-out batches."""
        graphs = self._split(split)
        for start in range(0, len(graphs.centre), BATCH_OF_EVALUATION):
            yield self.batch(graphs.take(slice(start, start + BATCH_OF_EVALUATION)))

    def prompts(self, split: str = "test") -> Prompts:
        """Prompts and the paths that answer them."""
        graphs = self._split(split)
        return Prompts(
            tokens=torch.from_numpy(self.prefix(graphs)),
            answers=torch.from_numpy(np.ascontiguousarray(self.answers(graphs))),
            forced=torch.from_numpy(self.fed(graphs)),
            parallel=self.options.variant == "teacherless",
        )

    def score(self, outputs: Outputs) -> dict[str, Metric]:
        """Whole-path and per-token accuracy, generated and teacher-forced, branch margin and basin.

        ``token_1`` copies the centre (in reverse, the goal) and is nearly always right; ``token_2`` is the
        branch. Chance is 1/d for whole paths and for the branch. The branch margin, in nats, is the logit of
        the true first arm node minus the best among the other arms, at index P with the true path as input.
        """
        answers = outputs.prompts.answers
        chance = 1 / self.options.degree
        reverse = self.options.variant == "reverse"
        forced = outputs.forced_logits.argmax(-1)
        metrics: dict[str, Metric] = {}

        def rate(name: str, right: torch.Tensor, level: float | None = None) -> None:
            metrics[name] = Metric(*proportion(int(right.sum()), right.numel()), level)

        rate("whole_path_greedy", (outputs.greedy == answers).all(1), chance)
        rate("whole_path_sampled", (outputs.sampled == answers).all(1), chance)
        rate("forced_whole_path", (forced == answers).all(1), chance)
        for kind, tokens in (("token", outputs.greedy), ("forced_token", forced)):
            for place in range(answers.shape[1]):
                level = chance if place == 1 and not reverse else None
                rate(f"{kind}_{place + 1}", tokens[:, place] == answers[:, place], level)
        if not reverse:
            metrics["branch_margin"] = mean_interval(self._margins(outputs).double().numpy(), chance=0.0)
        metrics["basin"] = Metric(basin(float(metrics["whole_path_greedy"].value), chance))
        return metrics

    def _margins(self, outputs: Outputs) -> torch.Tensor:
        """(n,) logit of the right first arm node minus the best of the others, where the arm is chosen."""
        tokens, centre, first = outputs.prompts.tokens, outputs.prompts.answers[:, 0], outputs.prompts.answers[:, 1]
        parents, children = tokens[:, 0 : 3 * self.options.edges : 3], tokens[:, 1 : 3 * self.options.edges : 3]
        arms = children[parents == centre[:, None]].view(len(tokens), self.options.degree)
        logits = outputs.forced_logits[:, 1].gather(1, arms)  # the state at index P answers place 1
        right = arms == first[:, None]
        return logits[right] - logits.masked_fill(right, -torch.inf).amax(1)

    def description(self) -> dict[str, Any]:
        """Sizes, chance level, and a checksum of the held-out prompts and paths."""
        return {
            "graph": f"G({self.options.degree},{self.options.length})",
            "distinct_graphs": self.options.distinct_graphs,
            "chance": 1 / self.options.degree,
            "test_sha256": sha256(np.concatenate([self.prefix(self.test), self.test.path], 1).tobytes()).hexdigest(),
        }


def basin(accuracy: float, chance: float) -> str:
    """Where training ended: solved, shortcut (an arm at random), broken (worse) or partial (in between)."""
    if accuracy >= SOLVED_FROM:
        return "solved"
    if abs(accuracy - chance) <= SHORTCUT_WITHIN + 1e-9:  # 0.55 - 0.5 > 0.05 in floating point
        return "shortcut"
    return "broken" if accuracy < chance else "partial"
