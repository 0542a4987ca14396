"""Path-Star as text, read and written by hand."""

from __future__ import annotations

from typing import NamedTuple


class Story(NamedTuple):
    """What a text says."""

    edges: list[tuple[int, int]]
    centre: int
    goal: int
    answer: list[int]


def decode(tokens: list[int], nodes: int) -> str:
    """Token ids to text: node k, then ``|``, ``=``, ``/``, ``$``, end; a comma between two nodes."""
    signs = {nodes: "|", nodes + 1: "=", nodes + 2: "/", nodes + 3: "$", nodes + 4: "."}
    text = ""
    for token in tokens:
        sign = signs.get(token)
        word = sign if sign is not None else str(token)
        after_node = text and text[-1].isdigit()
        text += f",{word}" if after_node and sign is None else word
    return text


def parse(text: str) -> Story:
    """``u,v|u,v/centre,goal=p0,p1,...`` (an end sign at the close is optional)."""
    graph, rest = text.rstrip(".").split("/")
    question, answer = rest.split("=")
    edges = [(int(u), int(v)) for u, v in (pair.split(",") for pair in graph.split("|"))]
    centre, goal = (int(x) for x in question.split(","))
    return Story(edges, centre, goal, [int(x) for x in answer.split(",") if x])


def true_path(story: Story) -> list[int]:
    """Centre to goal, found by following parents from the goal: no search is needed that way."""
    parent = {child: above for above, child in story.edges}
    path = [story.goal]
    while path[-1] != story.centre:
        path.append(parent[path[-1]])
    return path[::-1]


def arm_from(story: Story, first: int) -> list[int]:
    """The nodes reached from the centre through ``first``, centre included."""
    child = {above: below for above, below in story.edges if above != story.centre}
    arm = [story.centre, first]
    while arm[-1] in child:
        arm.append(child[arm[-1]])
    return arm


def identity(story: Story) -> tuple[frozenset[tuple[int, int]], int, int]:
    """What makes two graphs the same: edge set, centre, goal."""
    return frozenset(story.edges), story.centre, story.goal
