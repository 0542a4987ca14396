"""Generated stories with a known latent state: text whose exact entropy, and whose hidden facts, are known.

A story has eight facts: hero, friend, place, object, problem, helper, weather and mood. Seven are drawn at random; the
helper follows from problem and place. Twelve slots tell it in a fixed order, each in one of several wordings. The
resolution names the object again, long after it was found, with a verb that follows from problem and object, and
the moral follows from the problem. So a reader who keeps the facts in mind can foretell the end of a story up to its
wording, and one who does not cannot.

A story is a function of (seed, number).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log
from typing import NamedTuple

import numpy as np
from numpy.random import Philox

GIRLS = ("Anna", "Bella", "Clara", "Dora", "Emma", "Freya", "Greta", "Holly", "Ida", "Julia", "Kira", "Lena")
BOYS = ("Adam", "Ben", "Carl", "David", "Eric", "Felix", "George", "Hugo", "Ivan", "Jack", "Karl", "Leo")
FRIENDS = (
    *("Max", "Nina", "Oscar", "Paula", "Quinn", "Rosa", "Sam", "Tess"),
    *("Uma", "Victor", "Wendy", "Xenia", "Yusuf", "Zoe", "Mila", "Noah"),
)
PLACES = (
    *("by the river", "near the mill", "in the forest", "on the hill", "at the harbor", "by the lake"),
    *("on the farm", "in the valley", "near the castle", "in the village", "at the market", "on the island"),
    *("behind the school", "under the cliffs", "by the railway", "in the orchard"),
)
OBJECTS = (
    *("kite", "lantern", "rope", "drum", "whistle", "mirror", "basket", "shovel"),
    *("spoon", "blanket", "umbrella", "bell", "ladder", "bucket", "compass", "map"),
    *("broom", "scarf", "hammer", "magnet", "telescope", "candle", "wagon", "flute"),
)
HELPERS = ("owl", "fox", "baker", "sailor", "beaver", "teacher", "wizard", "shepherd")
WEATHERS = ("sunny", "rainy", "windy", "foggy", "snowy", "cloudy")
MOODS = ("happy", "sleepy", "curious", "lonely", "brave", "shy")
VERBS = (
    *("lifted", "shook", "turned", "tapped", "pushed", "pulled"),
    *("polished", "offered", "spun", "dropped", "hid", "borrowed"),
)


class Problem(NamedTuple):
    """One of the twelve problems, with what is tried, how it ends and what is learned from it."""

    trouble: str
    attempt: str
    outcome: str
    moral: str


PROBLEMS = (
    Problem(
        "the bridge had fallen down", "pile up stones", "the bridge stood again", "small hands can mend big things"
    ),
    Problem(
        "the well had run dry", "dig in the mud", "clear water filled the well", "patience is worth more than gold"
    ),
    Problem("a puppy was lost", "call its name", "the puppy came running home", "nobody should be left alone"),
    Problem("the clock had stopped", "wind it up", "the clock began to tick", "good things take time"),
    Problem("the gate was locked", "climb over it", "the gate swung open", "a gentle way is often the best way"),
    Problem("all the bread was gone", "bake with sand", "there was bread for everyone", "sharing makes us rich"),
    Problem("a goat was stuck in a tree", "shake the trunk", "the goat stepped safely down", "we all need a hand"),
    Problem("the boat was sinking", "scoop out the water", "the boat floated like a duck", "it is wise to stay calm"),
    Problem("the lamp had gone out", "light it with a match", "the lamp shone bright", "hope is brighter than fear"),
    Problem("the song was forgotten", "hum it from memory", "everyone could sing again", "listening is a gift"),
    Problem("the roof was leaking", "cover it with leaves", "the roof stayed dry", "it is better to plan ahead"),
    Problem(
        "a baby would not stop crying", "pull funny faces", "the baby laughed and slept", "kindness needs no words"
    ),
)

FACTS: dict[str, tuple[str, ...]] = {
    "hero": GIRLS + BOYS,
    "friend": FRIENDS,
    "place": PLACES,
    "object": OBJECTS,
    "problem": tuple(problem.trouble for problem in PROBLEMS),
    "helper": HELPERS,
    "weather": WEATHERS,
    "mood": MOODS,
}
"""The latent state: each fact with its values."""

SLOTS = (
    *("introduction", "weather", "object", "friend", "problem", "before"),
    *("attempt", "after", "helper", "resolution", "moral", "closing"),
)
"""In the order of telling; ``before`` and ``after`` hold one or two sentences that say nothing of the facts."""

WORDINGS: dict[str, tuple[str, ...]] = {
    "introduction": (
        "Once there was a {mood} {child} named {hero} who lived {place}.",
        "{hero} was a {mood} {child} who lived {place}.",
        "Long ago a {mood} {child} called {hero} played {place} every day.",
        "This is a story about {hero}, a {mood} {child} who had a home {place}.",
        "There was a {child} {place} whose name was {hero}, and {she} was very {mood}.",
    ),
    "weather": (
        "It was a {weather} day.",
        "The morning was {weather}.",
        "Outside it was {weather} and quiet.",
        "The sky looked {weather}.",
        "One {weather} morning came.",
    ),
    "object": (
        "On the ground {she} found {an_object}.",
        "Under a bench lay {an_object}, and {she} took it along.",
        "{hero} carried {an_object} in both arms.",
        "Grandmother had given {her} {an_object}.",
        "That day {she} had {an_object} to play with.",
    ),
    "friend": (
        "Soon {friend} came along and said hello to {her}.",
        "{friend} waved from far away and ran right over.",
        "Then {friend} knocked and kindly asked {her} to play.",
        "At noon {she} met {friend} and shared an apple.",
        "{friend} was waiting at the corner with two cookies.",
    ),
    "problem": (
        "But then somebody cried out that {trouble}.",
        "Suddenly the two friends saw that {trouble}.",
        "There was bad news that day: {trouble}.",
        "Just then they both heard that {trouble}.",
        "That was when they noticed that {trouble}.",
    ),
    "attempt": (
        "First {hero} tried to {attempt}, but it did not help.",
        '"Let us {attempt}," said {hero}, but it did not work.',
        "{hero} thought it was enough to {attempt}, but it got worse.",
        "They began to {attempt}, but it was of no use.",
        "So {hero} went to {attempt}, and still nothing changed.",
    ),
    "helper": (
        "At last the old {helper} came down the road to help them.",
        "Then, to their surprise, the {helper} stopped and listened.",
        "In the end it was the {helper} who heard them calling.",
        "After a while the clever {helper} arrived with an idea.",
        "Luckily the {helper} had seen such a thing once before.",
    ),
    "resolution": (
        "{hero} {verb} the {object}, and {outcome}.",
        "Then {she} {verb} the {object} three times, and at once {outcome}.",
        "So {hero} {verb} the {object} just as they were told, and {outcome}.",
        "With a deep breath {she} {verb} the {object}, and soon {outcome}.",
        "Everyone watched as {hero} {verb} the {object}, and {outcome}.",
    ),
    "moral": (
        "{hero} learned that {moral}.",
        "From then on they all knew that {moral}.",
        "The lesson is that {moral}.",
        "Now you can see that {moral}.",
    ),
    "closing": (
        "{hero} and {friend} went home happy.",
        "That night {hero} and {friend} slept well.",
        "And {hero} and {friend} stayed friends forever.",
        "{hero} hugged {friend}, and that was the end.",
    ),
}
FILLERS: dict[str, tuple[str, ...]] = {
    "before": (
        "A small bird hopped past.",
        "A door closed very softly.",
        "The wind smelled of grass.",
        "Two butterflies danced over the fence.",
        "An ant carried a crumb.",
        "A cat yawned on the wall.",
        "Somebody was chopping wood.",
        "The leaves made a soft sound.",
    ),
    "after": (
        "They sat down to think.",
        "A frog seemed to laugh at them.",
        "The shadows were growing longer.",
        "Someone brought them warm tea.",
        "A snail crept over a stone.",
        "They counted slowly to ten.",
        "A gray goose flew past.",
        "It was silent for a moment.",
    ),
}
"""Sentences without facts; a story tells one or two of each kind."""

DRAWN = ("hero", "friend", "place", "object", "problem", "weather", "mood")
"""The facts that are drawn; the helper follows."""
DRAWS = 20
"""Random numbers of a story, one a fact and one a slot; a multiple of four, as many as Philox makes at a time."""
TOLD = {"introduction": ("hero", "place", "mood")} | {
    slot: (slot,) for slot in ("weather", "object", "friend", "problem")
}
NEWS = {slot: sum(log(len(FACTS[name])) for name in TOLD.get(slot, ())) for slot in SLOTS}
"""Nats of the facts that a slot tells first."""


def helper_of(problem: int, place: int) -> int:
    """Who comes to help: every helper comes at two of the places of a problem."""
    return (5 * problem + 3 * place) % len(HELPERS)


def verb_of(problem: int, obj: int) -> int:
    """What is done with the object: every verb is done with two of the objects of a problem."""
    return (7 * problem + 5 * obj) % len(VERBS)


class Story(NamedTuple):
    """A text and what lies behind it."""

    text: str
    facts: tuple[int, ...]
    """The latent state: the place of each value in :data:`FACTS`, in that order."""
    spans: tuple[tuple[int, int], ...]
    """First character, and one past the last, of each slot of :data:`SLOTS`; a space stands between slots."""
    nats: tuple[float, ...]
    """``-log p`` of each slot's text given the slots before it, for a reader who knows how stories are made."""


def stories(seed: int, first: int, last: int) -> Iterator[Story]:
    """Stories ``first`` to ``last`` (exclusive) of a seed."""
    source = Philox(key=seed)
    source.advance(first * DRAWS // 4)
    for start in range(first, last, 1024):  # so many at a time: few calls, little memory
        count = min(1024, last - start)
        raw = source.random_raw(count * DRAWS).reshape(count, DRAWS) >> np.uint64(11)
        for draws in raw.tolist():
            yield _tell(draws)


def _tell(draws: list[int]) -> Story:
    drawn = {name: number % len(FACTS[name]) for name, number in zip(DRAWN, draws, strict=False)}
    drawn["helper"] = helper_of(drawn["problem"], drawn["place"])
    words = _words(drawn)
    told: list[str] = []
    spans: list[tuple[int, int]] = []
    nats: list[float] = []
    begin = 0
    for number, slot in enumerate(SLOTS):
        draw = draws[len(DRAWN) + number]
        if slot in FILLERS:
            text, cost = _filler(FILLERS[slot], draw)
        else:
            choices = WORDINGS[slot]
            text, cost = choices[draw % len(choices)].format_map(words), NEWS[slot] + log(len(choices))
        told.append(text)
        spans.append((begin, begin + len(text)))
        nats.append(cost)
        begin += len(text) + 1
    return Story(" ".join(told), tuple(drawn[name] for name in FACTS), tuple(spans), tuple(nats))


def _words(drawn: dict[str, int]) -> dict[str, str]:
    """What the wordings are filled with."""
    facts = {name: values[drawn[name]] for name, values in FACTS.items()}
    girl = drawn["hero"] < len(GIRLS)
    thing = facts["object"]
    return {
        **facts,
        **PROBLEMS[drawn["problem"]]._asdict(),
        "an_object": f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}",
        "verb": VERBS[verb_of(drawn["problem"], drawn["object"])],
        "child": "girl" if girl else "boy",
        "she": "she" if girl else "he",
        "her": "her" if girl else "him",
        "hers": "her" if girl else "his",
    }


def _filler(sentences: tuple[str, ...], draw: int) -> tuple[str, float]:
    """One sentence or two different ones, and what they cost."""
    n = len(sentences)
    two, draw = draw % 2, draw // 2
    first, draw = draw % n, draw // n
    if not two:
        return sentences[first], log(2 * n)
    second = (first + 1 + draw % (n - 1)) % n
    return f"{sentences[first]} {sentences[second]}", log(2 * n * (n - 1))
