"""Generation: greedy is the argmax, sampling is the softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nextlat import generate
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.sampling import draw as draw_from
from nextlat.errors import NextLatError
from nextlat.model import Transformer

LOGITS = torch.tensor([1.0, 0.2, -0.5, 0.7, -2.0])
DRAWS = 200_000


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token a row, with the random numbers that generation takes."""
    coins = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    return draw_from(Sampling(temperature).law(logits), coins)


def model(vocabulary: int = 11) -> Transformer:
    lm = Transformer(vocabulary, 2, 2, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # far from uniform, so that every token depends on what came before
        for parameter in lm.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(15)
    return lm.eval()


def prompts(rows: int = 6, length: int = 5) -> Tensor:
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(1))


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Chi-square tail for an even number of degrees of freedom, in closed form."""
    expected = counts.sum() * probabilities
    half = float(((counts - expected) ** 2 / expected).sum()) / 2
    freedom = len(counts) - 1
    assert freedom % 2 == 0
    return math.exp(-half) * sum(half**k / math.factorial(k) for k in range(freedom // 2))


def test_greedy_is_the_argmax_of_whole_passes_without_a_cache() -> None:
    lm, tokens = model(), prompts()
    new = generate(lm, tokens, 9)
    for _ in range(9):
        tokens = torch.cat([tokens, lm(tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(new, tokens[:, 5:])
    assert len({tuple(row) for row in new.tolist()}) > 3


def test_the_head_reads_one_state_a_row_after_the_prompts_and_at_every_step() -> None:
    lm, seen = model(), []
    lm.lm_head.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    generate(lm, prompts(), 3)
    assert seen == [(6, 1, 16)] * 3


def test_one_token_is_one_token() -> None:
    assert generate(model(), prompts(), 1).shape == (6, 1)
    assert generate(model(), prompts(length=1), 3).shape == (6, 3)


def test_sampled_tokens_are_drawn_from_the_models_own_law_at_every_step() -> None:
    """With the same random numbers, cached generation equals drawing from whole passes."""
    lm, tokens = model(), prompts()
    new = generate(lm, tokens, 9, 0.7, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    for _ in range(9):
        tokens = torch.cat([tokens, draw(lm(tokens).logits[:, -1], 0.7, g)[:, None]], 1)
    assert torch.equal(new, tokens[:, 5:])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    counts = draw(LOGITS.expand(DRAWS, -1), temperature, g).bincount(minlength=5).double()
    assert p_value(counts, (LOGITS.double() / temperature).softmax(-1)) > 1e-9
    assert p_value(counts, (LOGITS.double() / (1.05 * temperature)).softmax(-1)) < 1e-9  # the test can see 5 %


def test_rows_are_drawn_independently() -> None:
    counts = torch.zeros(3, 3, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    pairs = draw(torch.zeros(DRAWS, 3), 1.0, g).view(-1, 2)
    for one, other in pairs.unique(dim=0).tolist():
        counts[one, other] = float((pairs == torch.tensor([one, other])).all(1).sum())
    assert p_value(counts.flatten(), torch.full((9,), 1 / 9, dtype=torch.float64)) > 1e-9


def test_the_same_seed_gives_the_same_tokens_and_another_others() -> None:
    lm, tokens = model(), prompts()
    one, again, other = (generate(lm, tokens, 9, 1.0, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_without_a_generator_torchs_global_one_is_used() -> None:
    torch.manual_seed(5)
    one = generate(model(), prompts(), 9, 1.0)
    torch.manual_seed(5)
    assert torch.equal(one, generate(model(), prompts(), 9, 1.0))


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 0.75, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the random number hits a step of the cumulative sum, or its very ends."""
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, 0.0, -math.inf, 0.0, -math.inf]])
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, u, dtype=torch.float64))
    assert int(draw(logits, 1.0, None)) in (1, 3, 4, 6)


def test_rounding_of_the_sum_never_leaves_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0)) * 5
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 1 - 2**-53, dtype=torch.float64))
    assert int(draw(logits, 1.0, None).max()) <= 999


def test_a_cold_draw_is_greedy_and_temperature_zero_is_exactly_so() -> None:
    logits = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, 0.0, None), logits.argmax(-1))
    assert torch.equal(draw(logits, 1e-6, torch.Generator().manual_seed(0)), logits.argmax(-1))


def test_the_draw_does_not_change_with_the_precision_of_the_logits() -> None:
    logits = LOGITS.expand(1000, -1).bfloat16()
    one, other = (draw(x, 1.0, torch.Generator().manual_seed(0)) for x in (logits, logits.double()))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("tokens", "new", "temperature", "said"),
    [
        (torch.empty(2, 0, dtype=torch.int64), 3, 0.0, "a prompt is empty; give at least one token"),
        (prompts(), 0, 0.0, "max_new_tokens is 0; ask for at least 1"),
        (prompts(), 3, -0.5, r"temperature is -0\.5; it must be 0 \(greedy\) or above"),
    ],
)
def test_what_cannot_be_generated_is_refused(tokens: Tensor, new: int, temperature: float, said: str) -> None:
    with pytest.raises(NextLatError, match=said):
        generate(model(), tokens, new, temperature)


def test_generation_leaves_no_gradient_behind() -> None:
    assert not generate(model(), prompts(), 2).requires_grad
