"""A dialled drafter proposes what it is told to, with the probabilities that it shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nextlat import generate
from nextlat.bench.replay import Replay, spans, steady
from nextlat.decoding import Static, Statistics
from nextlat.decoding.cheap import cheaper
from tests.decoding.test_speculative import VOCABULARY, prompts, trained


def replayed(
    chances: Any, rows: int, new: int, length: int, seed: int = 0, **options: Any
) -> tuple[Tensor, Statistics]:
    objective, counted = trained(), Statistics()
    text = generate(objective.as_lm(), prompts(rows), new)
    drafter = cheaper(objective.drafter(), **options) if options else objective.drafter()
    drafts = Replay(drafter, text, chances, seed)
    made = generate(objective.as_lm(), prompts(rows), new, drafter=drafts, policy=Static(length), statistics=counted)
    assert torch.equal(made, text)
    return text, counted


@pytest.mark.parametrize("rows", [1, 5])
def test_sure_proposals_are_all_kept_and_impossible_ones_never(rows: int) -> None:
    _, counted = replayed(steady(1.0), rows, 31, 4)
    assert counted.acceptance == [1.0] * 4
    assert counted.rounds == rows * 6  # 1 token, then 6 rounds of 5
    _, counted = replayed(steady(0.0), rows, 31, 4)
    assert counted.accepted == [0] * 4
    assert counted.rounds == rows * 30


def test_rows_that_advance_apart_stay_on_their_own_text() -> None:
    # rows of different luck end at different times, so that rows are dropped in between
    _, counted = replayed(steady(0.6), 7, 60, 3, seed=3)
    assert 0.4 < sum(counted.accepted) / sum(counted.reached) < 0.8
    assert counted.tokens == 7 * 60


def test_the_dialled_share_is_kept() -> None:
    kept = reached = 0
    for seed in range(4):
        _, counted = replayed(steady(0.8), 8, 80, 5, seed)
        kept, reached = kept + sum(counted.accepted), reached + sum(counted.reached)
    assert abs(kept / reached - 0.8) < 0.04  # five standard deviations of some 2,300 coins


def test_spans_are_easy_and_hard_in_turn() -> None:
    assert spans(0.9, 0.2, 3)(torch.arange(8)).tolist() == pytest.approx([0.9] * 3 + [0.2] * 3 + [0.9] * 2)


def test_logits_show_the_probability_of_the_proposal_and_name_tokens_of_the_draft_vocabulary() -> None:
    objective = trained()
    text = torch.tensor([[3, 5, 7, 9]])
    full: Any = objective.drafter()
    for drafter in (full, cheaper(full, vocabulary=torch.tensor([3, 5, 7, 8, 9]))):
        drafts = Replay(drafter, text, spans(0.9, 0.4, 2))
        drafts.right = torch.ones_like(drafts.right)
        output = objective.as_lm()(prompts(1))
        state = drafts.observe(output, torch.tensor([4]))
        for place, chance in ((1, 0.9), (2, 0.4), (3, 0.4)):
            state, logits = drafts.step(state, text[:, place - 1])
            column = int(logits.argmax())
            assert (column if drafts.vocabulary is None else int(drafts.vocabulary[column])) == text[0, place]
            assert float(logits.softmax(-1)[0, column]) == pytest.approx(chance)
        assert logits.shape[-1] == (VOCABULARY if drafts.vocabulary is None else 5)
