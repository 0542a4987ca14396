"""Hand-made language models whose measurements are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nextlat.evaluation import Subject
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.tasks.path_star import PathStar, PathStarOptions

SURE = 20.0
"""Logit of the token that a hand-made model wants; all others have 0."""


class Remembered:
    """A cache that keeps the tokens themselves."""

    def __init__(self, rows: int) -> None:
        self.tokens = torch.empty(rows, 0, dtype=torch.int64)

    def keep(self, places: Sequence[Sequence[int]], begins: Sequence[int]) -> None:
        """Without drafts every token is kept."""


class Walker:
    """Walks the graph that it reads in the prompt; subclasses choose the arm.

    It answers every position after the prompt by the child of the token read there, and the centre's answer by
    the arm that :meth:`choose` names.
    """

    def __init__(self, task: PathStar) -> None:
        self.task = task

    def new_cache(self, rows: int, capacity: int) -> Any:
        return Remembered(rows)

    def __call__(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
        logits_at: Tensor | None = None,
    ) -> LMOutput:
        whole = tokens
        if cache is not None:
            whole = cache.tokens = torch.cat([cache.tokens, tokens], 1)
        logits = torch.zeros(*whole.shape, self.task.vocab_size)
        for row, text in enumerate(whole.tolist()):
            for place, wanted in self.answers(text):
                logits[row, place, wanted] = SURE
        logits = logits[:, -tokens.shape[1] :]
        return LMOutput(logits=states_at(logits, logits_at), hidden=logits, cache=cache)

    def answers(self, text: list[int]) -> list[tuple[int, int]]:
        """(position, token wanted there) from the last prompt token on."""
        edges = 3 * self.task.options.edges
        pairs = list(zip(text[0:edges:3], text[1:edges:3], strict=True))
        children = dict(pairs)
        centre, goal = text[edges : edges + 2]
        start = self.task.prompt_length - 1
        wanted = [(start, centre)]
        for place in range(start + 1, len(text)):
            node = text[place]
            wanted.append((place, self.choose(pairs, centre, goal) if node == centre else children.get(node, goal)))
        return wanted

    def choose(self, pairs: list[tuple[int, int]], centre: int, goal: int) -> int:
        """The first node of the arm to walk."""
        raise NotImplementedError


class Oracle(Walker):
    """Goes back from the goal to see which arm leads there."""

    def choose(self, pairs: list[tuple[int, int]], centre: int, goal: int) -> int:
        parents = {child: parent for parent, child in pairs}
        node = goal
        while parents[node] != centre:
            node = parents[node]
        return node


class Shortcut(Walker):
    """Takes the arm that is written first: right once in d."""

    def choose(self, pairs: list[tuple[int, int]], centre: int, goal: int) -> int:
        return next(child for parent, child in pairs if parent == centre)


class Teacherless(Oracle):
    """Writes the whole path in one pass over placeholders."""

    def answers(self, text: list[int]) -> list[tuple[int, int]]:
        start = self.task.prompt_length - 1
        assert all(token == self.task.blank for token in text[start + 1 :])
        path = text[: start + 1]
        for _ in range(self.task.options.length):
            path.append(super().answers(path)[-1][1])
        return [(start + place, token) for place, token in enumerate(path[start + 1 :])]


def path_star(**options: Any) -> PathStar:
    chosen = {"degree": 2, "length": 4, "nodes": 12, "graphs": "fresh", "test_size": 300}
    return PathStar(PathStarOptions(**(chosen | options)), 0, 8)


def subject(task: Any, lm: Any, **options: Any) -> Subject:
    nothing = torch.zeros(1, 1)
    given = {"embedding_weight": nothing, "head_weight": nothing, "dynamics": None, "device": torch.device("cpu")}
    return Subject(task=task, lm=lm, **(given | options))
