"""Rollouts as graphs: the recording is played by a stand-in where there is no CUDA; its buffers are real."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nextlat import generate
from nextlat.decoding import Sampling, Static, Statistics, graphs
from nextlat.decoding.drafting import draft
from nextlat.decoding.graphs import Graphed, roll
from tests.decoding.test_speculative import prompts, trained

MADE: list[int] = []
"""Lengths that were recorded."""


def stand_in(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """As a graph does it: what is written lies where it lay at the first time."""
    written = work()
    MADE.append(written.shape[1])

    def replay() -> None:
        written.copy_(work())

    return written, replay


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(graphs, "record", stand_in)
    monkeypatch.setattr(graphs, "recordable", lambda state: True)
    MADE.clear()
    return MADE


def test_text_and_counts_are_those_without_graphs(recorded: list[int]) -> None:
    objective = trained("nextlat")
    lm, drafter = objective.as_lm(), objective.drafter()
    assert drafter is not None
    graphed, plain, counted = Graphed(drafter), Statistics(), Statistics()
    options = {"policy": Static(3), "max_new_tokens": 30}
    expected = generate(lm, prompts(5), drafter=drafter, statistics=plain, **options)
    for again in range(2):
        counted = Statistics()
        made = generate(lm, prompts(5), drafter=graphed, statistics=counted, **options)
        assert torch.equal(made, expected)
        assert counted == plain
        if not again:
            assert recorded[0] == 3
            first = len(recorded)
    assert len(recorded) == first  # nothing is recorded twice
    assert [len(one._token) for one in graphed._recorded.values()] == list(graphed._recorded)


def test_a_rollout_does_not_write_over_the_one_before(recorded: list[int]) -> None:
    drafter = trained("nextlat").drafter()
    assert drafter is not None
    graphed, g = Graphed(drafter), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        states, tokens = torch.randn(6, 2, 16, generator=g).double(), torch.arange(12).view(6, 2) % 9
        kept = [graphed.rollout(state, token, 4) for state, token in zip(states, tokens, strict=True)]
        for made, state, token in zip(kept, states, tokens, strict=True):
            assert torch.equal(made, roll(drafter, state, token, 4))
    assert len({tuple(made.flatten().tolist()) for made in kept}) > 1
    assert recorded == [4]


def test_draws_and_other_policies_take_single_steps(recorded: list[int]) -> None:
    objective = trained("nextlat")
    drafter = objective.drafter()
    assert drafter is not None
    lm, g = objective.as_lm(), torch.Generator().manual_seed(0)
    made = generate(lm, prompts(2), 12, 1.0, g, drafter=Graphed(drafter), policy=Static(3))
    g.manual_seed(0)
    assert torch.equal(made, generate(lm, prompts(2), 12, 1.0, g, drafter=drafter, policy=Static(3)))
    assert recorded == []


@pytest.mark.parametrize("kind", ["mtp", "jtp"])
def test_a_drafter_with_another_state_stays_without_graphs(kind: str, recorded: list[int]) -> None:
    objective = trained(kind)
    lm, drafter = objective.as_lm(), objective.drafter()
    assert drafter is not None
    output = lm(prompts())
    state, known = drafter.observe(output, torch.full((4,), 4)), torch.tensor([1, 2, 3, 4])
    made = draft(Graphed(drafter), state, known, Sampling(), Static(2), torch.full((4,), 2), 10, torch.rand)
    expected = draft(drafter, state, known, Sampling(), Static(2), torch.full((4,), 2), 10, torch.rand)
    assert made is not None
    assert expected is not None
    assert torch.equal(made.tokens, expected.tokens)
    assert torch.equal(made.lengths, expected.lengths)


def test_rows_with_less_room_have_shorter_drafts(recorded: list[int]) -> None:
    drafter = trained("nextlat").drafter()
    assert drafter is not None
    with torch.inference_mode():
        state = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).double()
        room = torch.tensor([3, 0, 2])
        made = draft(Graphed(drafter), state, torch.tensor([1, 2, 3]), Sampling(), Static(3), room, 10, torch.rand)
    assert made is not None
    assert made.lengths.tolist() == [3, 0, 2]
    assert made.tokens.shape == (3, 3)
    assert recorded == [3]
