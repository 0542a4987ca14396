"""Decoding with drafts gives what decoding without gives; rows, stops and counts are exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat import NextLat, Transformer, generate
from nextlat.decoding import Confidence, Entropy, Policy, Sampling, Static, Statistics, decode
from nextlat.errors import NextLatError
from nextlat.objectives import JTP, MTP, Objective

VOCABULARY = 11


def trained(kind: str = "nextlat", width: int = 16) -> Objective:
    """A random model far from uniform, whose drafter is sometimes right."""
    g = torch.Generator().manual_seed(0)
    trunk = Transformer(VOCABULARY, 2, 2, width, generator=g)
    made: Objective
    if kind == "nextlat":
        made = NextLat(trunk, dynamics=8, generator=g)
    else:
        made = (MTP if kind == "mtp" else JTP)(trunk, horizon=3, generator=g)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(12)
    return made.double().eval()


def prompts(rows: int = 4, length: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["nextlat", "mtp", "jtp"])
@pytest.mark.parametrize("policy", [Static(1), Static(3), Confidence(3, 0.5), Entropy(3, 0.5)])
def test_greedy_text_is_that_of_plain_decoding(kind: str, policy: Policy) -> None:
    objective, counted = trained(kind), Statistics()
    plain = generate(objective.as_lm(), prompts(), 30)
    fast = generate(objective.as_lm(), prompts(), 30, drafter=objective.drafter(), policy=policy, statistics=counted)
    assert torch.equal(fast, plain)
    assert counted.tokens == 4 * 30
    assert 0 < sum(counted.accepted) < sum(counted.reached)  # some drafts were right and some were not


def test_rows_of_unequal_prompts_are_decoded_as_if_alone() -> None:
    objective, texts = trained(), prompts(5, 7)
    lengths = [7, 2, 5, 1, 6]
    for drafter, policy in ((None, None), (objective.drafter(), Static(3))):
        together = generate(objective.as_lm(), texts, 20, lengths=lengths, drafter=drafter, policy=policy)
        for row, length in enumerate(lengths):
            alone = generate(objective.as_lm(), texts[row : row + 1, :length], 20)
            assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("drafted", [0, 1, 4])
def test_a_stop_token_ends_a_row_also_inside_a_draft(drafted: int) -> None:
    objective = trained()
    free = generate(objective.as_lm(), prompts(6), 25)
    stop = int(free[0, 9])
    ended = generate(
        objective.as_lm(), prompts(6), 25, stop_tokens=[stop], drafter=objective.drafter(), policy=Static(drafted)
    )
    for row, whole in zip(ended.tolist(), free.tolist(), strict=True):
        length = whole.index(stop) + 1 if stop in whole else 25
        assert row == whole[:length] + [stop] * (25 - length)
    pieces: dict[int, list[int]] = {row: [] for row in range(6)}
    for step in decode(objective.as_lm(), prompts(6), 25, Sampling(), stop_tokens=[stop]):
        for row, tokens in step:
            pieces[row] += tokens
    assert all(text.count(stop) <= 1 and len(text) <= 25 for text in pieces.values())


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_exactly_the_tokens_asked_for_are_made_and_streamed_as_they_come(new: int) -> None:
    objective = trained()
    steps = list(decode(objective.as_lm(), prompts(2), new, Sampling(), drafter=objective.drafter(), policy=Static(4)))
    for row in (0, 1):
        assert sum(len(tokens) for step in steps for number, tokens in step if number == row) == new
    assert [len(tokens) for _, tokens in steps[0]] == [1, 1]


def chi_square(counts: Tensor, law: Tensor) -> tuple[float, int]:
    expected = counts.sum() * law
    used = expected > 0
    assert not counts[~used].any()
    return float(((counts - expected)[used] ** 2 / expected[used]).sum()), int(used.sum()) - 1


def three_token_law(lm: Any, prompt: Tensor, sampling: Sampling) -> Tensor:
    """(V, V, V) law of three new tokens, by whole passes."""
    first = sampling.law(lm(prompt[None]).logits[0, -1])
    texts = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    rows = torch.cat([prompt.expand(len(texts), -1), texts], 1)
    logits = lm(rows).logits
    second = sampling.law(logits[:, -2]).view(VOCABULARY, VOCABULARY, -1)[:, 0]
    third = sampling.law(logits[:, -1]).view(VOCABULARY, VOCABULARY, -1)
    return first[:, None, None] * second[:, :, None] * third


@pytest.mark.parametrize("verification", ["token", "block"])
def test_sampled_text_follows_the_models_law_and_another_law_is_told_apart(verification: str) -> None:
    objective, sampling, draws = trained(), Sampling(0.8, top_k=6), 20_000
    prompt = prompts(1)[0]
    found = generate(
        objective.as_lm(),
        prompt.expand(draws, -1),
        3,
        0.8,
        torch.Generator().manual_seed(0),
        top_k=6,
        drafter=objective.drafter(),
        policy=Static(2),
        verification=verification,
    )
    index = (found * torch.tensor([VOCABULARY**2, VOCABULARY, 1])).sum(1)
    counts = index.bincount(minlength=VOCABULARY**3).double()
    with torch.no_grad():
        law = three_token_law(objective.as_lm(), prompt, sampling).flatten()
        other = three_token_law(objective.as_lm(), prompt, Sampling(0.9, top_k=6)).flatten()
    common = law * draws >= 5  # cells with enough counts; the rest together are one more
    pool = torch.cat([counts[common], counts[~common].sum()[None]])
    right, freedom = chi_square(pool, torch.cat([law[common], law[~common].sum()[None]]))
    wrong, _ = chi_square(pool, torch.cat([other[common], other[~common].sum()[None]]))
    bound = freedom + 6 * math.sqrt(2 * freedom) + 12  # beyond the 1e-9 quantile of a chi-square
    assert right < bound < wrong


def test_the_same_seed_gives_the_same_text() -> None:
    objective = trained()
    made = [
        generate(
            objective.as_lm(),
            prompts(),
            12,
            1.0,
            torch.Generator().manual_seed(seed),
            drafter=objective.drafter(),
            policy=Static(3),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


class Oracle:
    """Drafts a known text for one row, wrong at chosen places; its state is the place of the last token seen."""

    max_length = None
    vocabulary = None

    def __init__(self, text: Tensor, wrong: set[int]) -> None:
        self.text, self.wrong, self.seen = text[0].tolist(), wrong, -1

    def observe(self, output: Any, accepted: Tensor) -> int:
        self.seen += int(accepted) + 1
        return self.seen

    def step(self, state: int, token: Tensor) -> tuple[int, Tensor]:
        drafted = state + 2  # the token fed stands at state + 1
        guess = (self.text[drafted] + (drafted in self.wrong)) % VOCABULARY
        return state + 1, F.one_hot(torch.tensor([guess]), VOCABULARY).double() * 50


def test_counts_of_calls_rounds_and_acceptance_by_position() -> None:
    # prompt of 5; tokens 5 ... 16 follow. Drafts of 3: token 5 is known after the prompt, drafts 6 7 8 kept with
    # bonus 9; 10 kept, 11 wrong; 12 and on kept
    objective = trained()
    text = torch.cat([prompts(1), generate(objective.as_lm(), prompts(1), 12)], 1)
    counted = Statistics()
    made = generate(objective.as_lm(), prompts(1), 12, drafter=Oracle(text, {11}), policy=Static(3), statistics=counted)
    assert torch.equal(made, text[:, 5:])
    # rounds: 5 | 6 7 8 9 | 10 11 | 12 13 14 15 | 16
    assert (counted.calls, counted.rounds, counted.tokens) == (5, 4, 12)
    assert counted.drafted == [3, 3, 3]
    assert counted.reached == [3, 3, 2]
    assert counted.accepted == [3, 2, 2]
    assert counted.acceptance == [1.0, 2 / 3, 1.0]
    assert counted.opening == 1
    assert counted.tokens_per_round == 11 / 4


def test_without_drafts_a_round_is_a_token_and_positions_never_reached_have_no_acceptance() -> None:
    counted = Statistics()
    generate(trained().as_lm(), prompts(2), 5, statistics=counted)
    assert (counted.tokens, counted.opening, counted.tokens_per_round) == (10, 2, 1.0)
    counted.count(3, 0)
    assert counted.acceptance == [0.0]
    assert Statistics().tokens_per_round == 1.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": torch.empty(0, 3, dtype=torch.int64)}, "no prompts"),
        ({"prompts": torch.tensor([[1, VOCABULARY]])}, "holds token 11; ids lie between 0 and 11 - 1"),
        ({"prompts": torch.tensor([[-1, 2]])}, "holds token -1"),
        ({"lengths": [5, 5, 0, 5]}, "a prompt is empty"),
        ({"lengths": [5, 5]}, r"lengths are \[5, 5\] for 4 prompts"),
        ({"context_length": 8}, "do not fit a context of 8; shorten the prompt, or ask for at most 3"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"verification": "blok"}, "block"),
    ],
)
def test_what_cannot_be_decoded_is_refused(changes: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"prompts": prompts(), "max_new_tokens": 4} | changes
    with pytest.raises(NextLatError, match=says):
        generate(trained().as_lm(), **given)


def test_drafts_out_of_range_are_refused() -> None:
    with pytest.raises(NextLatError, match="draft length is -1"):
        Static(-1)
    with pytest.raises(NextLatError, match="between 0 and 1"):
        Confidence(3, 1.5)
    objective = trained("mtp")  # horizon 3: four tokens with the one that is known
    with pytest.raises(NextLatError, match="makes at most 3"):
        generate(objective.as_lm(), prompts(), 5, drafter=objective.drafter(), policy=Static(4))


def test_top_k_and_top_p_keep_what_they_say() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    law = logits.softmax(-1)
    torch.testing.assert_close(Sampling(1.0, top_k=2).law(logits), torch.tensor([*(law[:2] / law[:2].sum()), 0, 0]))
    # 0.64, 0.24, 0.09, 0.03: two reach 0.7, and one reaches 0.6
    assert (Sampling(1.0, top_p=0.7).law(logits) > 0).tolist() == [True, True, False, False]
    assert (Sampling(1.0, top_p=0.6).law(logits) > 0).tolist() == [True, False, False, False]
    assert torch.equal(Sampling(1.0, top_p=1.0).law(logits), law)
    both = Sampling(1.0, top_k=3, top_p=0.9).law(logits)  # of the first three, two hold 0.91
    torch.testing.assert_close(both, torch.tensor([*(law[:2] / law[:2].sum()), 0, 0]))
    assert Sampling(0.0).law(logits).tolist() == [1, 0, 0, 0]
