"""Generated stories: a function of (seed, number), told as promised, with facts that are known."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product
from math import log

import pytest

from nextlat.data.synthstories import (
    FACTS,
    FILLERS,
    PROBLEMS,
    SLOTS,
    VERBS,
    WORDINGS,
    Story,
    _words,
    helper_of,
    stories,
    verb_of,
)

MANY = list(stories(0, 0, 1500))


def pieces(text: str) -> int:
    """Words and marks: no tokenizer that cuts words at spaces makes fewer tokens of a text."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def fact(story: Story, name: str) -> str:
    return FACTS[name][story.facts[list(FACTS).index(name)]]


def slot(story: Story, name: str) -> str:
    begin, end = story.spans[SLOTS.index(name)]
    return story.text[begin:end]


def test_a_story_is_a_function_of_seed_and_number() -> None:
    assert list(stories(0, 0, 1500)) == MANY
    assert list(stories(0, 1100, 1103)) == MANY[1100:1103]
    assert [next(stories(0, number, number + 1)) for number in (0, 1023, 1024)] == [MANY[0], MANY[1023], MANY[1024]]
    assert list(stories(1, 0, 3)) != MANY[:3]
    assert len({story.text for story in MANY}) == len(MANY)
    assert list(stories(0, 5, 5)) == []


def test_the_first_story_of_seed_0_stays_what_it_is() -> None:
    assert MANY[0].facts == (3, 8, 5, 14, 4, 3, 0, 0)
    assert MANY[0].text.startswith(
        "Long ago a happy girl called Dora played by the lake every day. The morning was sunny."
    )


def test_slots_follow_each_other_with_one_space_between() -> None:
    for story in MANY[:200]:
        assert " ".join(story.text[begin:end] for begin, end in story.spans) == story.text
        assert len(story.spans) == len(SLOTS) == 12
        for name in SLOTS:
            text = slot(story, name)
            assert text[0] in '"' or text[0].isupper()
            assert text[-1] == "."
            assert "{" not in text and "  " not in text


def test_every_slot_has_at_least_four_wordings_and_tells_its_facts() -> None:
    assert set(WORDINGS) | set(FILLERS) == set(SLOTS)
    assert all(len(set(wordings)) == len(wordings) >= 4 for wordings in (*WORDINGS.values(), *FILLERS.values()))
    told = {"introduction": ("hero", "place", "mood"), "closing": ("hero", "friend"), "resolution": ("object",)}
    told |= {name: (name,) for name in ("weather", "object", "friend", "problem", "helper")}
    for story in MANY[:300]:
        for name, facts in told.items():
            for each in facts:
                assert fact(story, each) in slot(story, name)
        problem = PROBLEMS[story.facts[list(FACTS).index("problem")]]
        assert problem.moral in slot(story, "moral")
        assert problem.outcome in slot(story, "resolution")
        assert problem.attempt in slot(story, "attempt")


def test_helper_and_verb_follow_from_fixed_tables_in_which_no_single_fact_decides() -> None:
    for story in MANY[:300]:
        facts = dict(zip(FACTS, story.facts, strict=True))
        assert facts["helper"] == helper_of(facts["problem"], facts["place"])
        assert f" {VERBS[verb_of(facts['problem'], facts['object'])]} the " in slot(story, "resolution")
    for problem in range(12):
        assert {helper_of(problem, place) for place in range(16)} == set(range(8))
        assert {verb_of(problem, thing) for thing in range(24)} == set(range(12))
    for place in range(16):
        assert len({helper_of(problem, place) for problem in range(12)}) == 8
    for thing in range(24):
        assert len({verb_of(problem, thing) for problem in range(12)}) == 12


def test_values_are_told_apart_by_their_words_and_drawn_evenly() -> None:
    sizes = {name: len(values) for name, values in FACTS.items()}
    assert sizes == {
        "hero": 24,
        "friend": 16,
        "place": 16,
        "object": 24,
        "problem": 12,
        "helper": 8,
        "weather": 6,
        "mood": 6,
    }
    assert all(len(set(values)) == len(values) for values in FACTS.values())
    assert len({problem.moral for problem in PROBLEMS}) == len({problem.outcome for problem in PROBLEMS}) == 12
    for column, size in enumerate(sizes.values()):
        counts = Counter(story.facts[column] for story in MANY)
        assert len(counts) == size
        expected = len(MANY) / size
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < size + 4 * (2 * size) ** 0.5


def test_stories_have_the_promised_length() -> None:
    words = [len(story.text.split()) for story in MANY]
    assert min(words) >= 90
    assert max(words) <= 160


def test_the_object_is_named_again_at_least_60_tokens_after_it_was_found_whatever_is_drawn() -> None:
    words = _words(dict.fromkeys(FACTS, 0))
    thing = words["object"]
    least = min(pieces(wording.format_map(words).split(thing)[1]) for wording in WORDINGS["object"])
    least += min(pieces(wording.format_map(words).split(thing)[0]) for wording in WORDINGS["resolution"])
    for name in ("friend", "helper"):
        least += min(pieces(wording.format_map(words)) for wording in WORDINGS[name])
    least += min(
        pieces(f"{problem.format_map(each)} {attempt.format_map(each)}")
        for problem, attempt in product(WORDINGS["problem"], WORDINGS["attempt"])
        for each in (words | kind._asdict() for kind in PROBLEMS)
    )
    least += sum(min(map(pieces, FILLERS[name])) for name in FILLERS)
    assert least >= 60
    for story in MANY[:300]:
        assert story.text.count(fact(story, "object")) == 2


@pytest.mark.parametrize("name", SLOTS)
def test_the_nats_of_a_slot_are_those_of_its_text_given_the_slots_before(name: str) -> None:
    """Texts differ wherever draws differ, so a text is as improbable as its draws."""
    place = SLOTS.index(name)
    if name in FILLERS:
        n = len(FILLERS[name])
        costs = {1: log(2 * n), 2: log(2 * n * (n - 1))}
        for story in MANY[:300]:
            assert story.nats[place] == pytest.approx(costs[slot(story, name).count(".")])
        return
    new = {"introduction": ("hero", "place", "mood")}.get(name, (name,) if name in FACTS and name != "helper" else ())
    choices = 1
    for each in new:
        choices *= len(FACTS[each])
    assert MANY[0].nats[place] == pytest.approx(log(choices * len(WORDINGS[name])))
    facts = dict(zip(FACTS, MANY[0].facts, strict=True))
    texts = set()
    for values in product(*(range(len(FACTS[each])) for each in new)):
        words = _words(facts | dict(zip(new, values, strict=True)))
        texts |= {wording.format_map(words) for wording in WORDINGS[name]}
    assert len(texts) == choices * len(WORDINGS[name])


def test_fillers_say_nothing_of_the_facts_and_are_two_to_four() -> None:
    telling = ("hero", "friend", "object", "helper", "weather", "mood")
    values = {value for name in telling for value in FACTS[name]}
    counts: Counter[int] = Counter()
    for story in MANY[:600]:
        fillers = f"{slot(story, 'before')} {slot(story, 'after')}"
        counts[fillers.count(".")] += 1
        assert not values & set(re.findall(r"\w+", fillers))
    assert set(counts) == {2, 3, 4}
    for name in FILLERS:
        told = {slot(story, name) for story in MANY if slot(story, name).count(".") == 2}
        assert all(text.split(". ")[0] + "." != text.split(". ")[1] for text in told)
