"""100,000 tokens decoded greedily with drafts are those decoded without, in single precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nextlat import generate
from nextlat.decoding import Policy, Static, Statistics, Tree
from nextlat.objectives import Objective
from tests.decoding.test_speculative import prompts, trained

ROWS, LENGTH, TIE = 100, 1000, 1e-4


@pytest.fixture(scope="module")
def plain() -> tuple[Objective, Tensor]:
    objective = trained().float()
    return objective, generate(objective.as_lm(), prompts(ROWS, 5, seed=7), LENGTH)


@pytest.mark.parametrize("policy", [Static(3), Tree(8, 3, 2)], ids=["chain", "tree"])
def test_long_greedy_text_differs_at_ties_only(policy: Policy | Tree, plain: tuple[Objective, Tensor]) -> None:
    objective, text = plain
    counted = Statistics()
    drafted = generate(
        objective.as_lm(),
        prompts(ROWS, 5, seed=7),
        LENGTH,
        drafter=objective.drafter(),
        policy=policy,
        statistics=counted,
    )
    assert drafted.numel() == 100_000
    assert 0 < sum(counted.accepted) < sum(counted.reached)
    for row in (drafted != text).any(1).nonzero()[:, 0].tolist():
        place = int((drafted[row] != text[row]).int().argmax())  # what follows the first difference is another text
        before = torch.cat([prompts(ROWS, 5, seed=7)[row], text[row, :place]])
        best = objective.as_lm()(before[None]).logits[0, -1].topk(2).values
        assert float(best[0] - best[1]) < TIE
