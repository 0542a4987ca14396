"""Packed weights are used where they win, give the same logits, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat import Transformer, generate
from nextlat.decoding import Static, Statistics
from nextlat.decoding import packed as module
from nextlat.decoding.packed import ROWS, PackedLinear, choose, packed, packing_works
from nextlat.errors import NextLatError
from tests.decoding.test_speculative import VOCABULARY, prompts, trained

pytestmark = pytest.mark.skipif(not packing_works(), reason="this torch has no packed weights on this machine")
EVERY = frozenset(ROWS)


def model(tie_embeddings: bool = False, width: int = 32) -> Transformer:
    return Transformer(50, 2, 2, width, tie_embeddings, torch.Generator().manual_seed(0)).eval()


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every layer is packed for every number of rows; (rows, outputs) of each packed product."""
    used: list[tuple[int, int]] = []
    multiply = module.multiply

    def spy(u: Tensor, copy: Tensor, bias: Tensor | None = None) -> Tensor:
        out = multiply(u, copy, bias)
        used.append((u.numel() // u.shape[-1], out.shape[-1]))
        return out

    monkeypatch.setattr(module, "multiply", spy)
    monkeypatch.setattr(module, "choose", lambda weights, budget: {(w.shape[0], w.shape[1]): EVERY for w in weights})
    return used


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_logits_are_those_of_plain_weights(everywhere: list[tuple[int, int]], tie_embeddings: bool) -> None:
    lm = model(tie_embeddings)
    g = torch.Generator().manual_seed(1)
    sides: list[Any] = [packed(lm), lm]
    fast = sides[0]
    with fast, torch.inference_mode():
        for rows, length in ((1, 1), (1, 2), (1, 5), (4, 8), (1, 33), (5, 7)):
            tokens = torch.randint(50, (rows, length), generator=g)
            everywhere.clear()
            torch.testing.assert_close(fast(tokens).logits, lm(tokens).logits, rtol=0, atol=1e-5)
            # seven layers in each of two blocks, and the head
            assert len(everywhere) == (15 if rows * length <= ROWS[-1] else 0)
        caches = [one.new_cache(2, 12) for one in sides]
        for length in (6, 1, 4):
            tokens = torch.randint(50, (2, length), generator=g)
            one, other = (side(tokens, cache=cache).logits for side, cache in zip(sides, caches, strict=True))
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_model_itself_is_not_touched(everywhere: list[tuple[int, int]]) -> None:
    lm = model(tie_embeddings=True)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    modules, parameters = list(lm.modules()), list(lm.parameters())
    tokens = torch.randint(50, (1, 4))
    fast = packed(lm)
    copied: Any = fast._lm
    assert isinstance(copied.lm_head, PackedLinear)
    # every parameter is shared, none is copied
    assert [id(parameter) for parameter in copied.parameters()] == [id(parameter) for parameter in parameters]
    assert fast.extra_bytes == sum(layer.weight.nbytes for layer in modules if type(layer) is nn.Linear)
    with torch.inference_mode():
        fast(tokens)
        assert everywhere
        fast.close()
        everywhere.clear()
        assert torch.equal(fast(tokens).logits, lm(tokens).logits)
    assert not everywhere and fast.extra_bytes == 0
    assert list(lm.modules()) == modules
    assert not any("forward" in vars(layer) for layer in modules)
    assert lm.state_dict().keys() == before.keys()
    for name, value in lm.state_dict().items():
        assert torch.equal(value, before[name])


def test_with_gradients_nothing_is_packed(everywhere: list[tuple[int, int]]) -> None:
    lm = model()
    tokens = torch.randint(50, (1, 4))
    with packed(lm) as fast:
        loss: Any = fast(tokens).logits.square().sum()
        loss.backward()
    assert not everywhere
    assert all(parameter.grad is not None for parameter in lm.parameters())


def test_a_model_that_was_changed_is_refused(everywhere: list[tuple[int, int]]) -> None:
    lm = model()
    with packed(lm) as fast, torch.no_grad():
        fast(torch.tensor([[1]]))
        lm.layers[1].mlp.up_proj.weight.mul_(2)  # type: ignore[union-attr,operator]
        with pytest.raises(NextLatError, match="changed after it was packed"):
            fast(torch.tensor([[1]]))


@pytest.mark.parametrize("kind", ["nextlat", "mtp", "jtp"])
def test_greedy_text_is_that_of_plain_weights(everywhere: list[tuple[int, int]], kind: str) -> None:
    objective, counted = trained(kind).float(), Statistics()
    lm, drafter = objective.as_lm(), objective.drafter()
    plain = generate(lm, prompts(), 30)
    with packed(lm) as fast:
        assert torch.equal(generate(fast, prompts(), 30), plain)
        everywhere.clear()
        text = generate(fast, prompts(), 30, drafter=drafter, policy=Static(3), statistics=counted)
    assert torch.equal(text, plain)
    assert sum(counted.accepted) > 0
    assert (4 * 4, VOCABULARY) in everywhere  # the head too, over four rows of one known and three drafted tokens


def timed(monkeypatch: pytest.MonkeyPatch, ratio: Any) -> None:
    """Packed products take ``ratio(outputs, rows)`` of a second, and plain ones a second."""

    def seconds(product: Any, u: Tensor, weights: Any) -> float:
        outputs = F.linear(u, weights[0]).shape[-1] if product is F.linear else len(product(u, weights[0]).T)
        return 1.0 if product is F.linear else float(ratio(outputs, len(u)))

    monkeypatch.setattr(module, "seconds", seconds)


def test_packed_weights_are_used_where_both_timed_neighbours_win(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {8: {2, 4, 8, 16}, 12: {16, 32}}
    timed(monkeypatch, lambda outputs, rows: 0.9 if rows in fast.get(outputs, ()) else 0.97)  # 3 % are not enough
    weights = [torch.randn(8, 6), torch.randn(12, 6), torch.randn(4, 6)]
    assert choose(weights, 5.0) == {(8, 6): {2, 4, 8, 16}, (12, 6): {16, 32}, (4, 6): frozenset()}
    layers = nn.Sequential(*(nn.Linear(6, outputs) for outputs in (8, 12, 4, 8)))
    lm: Any = layers
    made = packed(lm, 5.0)
    rows = {choice.shape: (choice.layers, choice.rows) for choice in made.choices}
    assert rows == {(8, 6): (2, (2, *range(4, 17))), (12, 6): (1, tuple(range(16, 33))), (4, 6): (1, ())}
    assert made.report().startswith("packed weights: 2 of 8x6 for 2, 4-16 rows; 1 of 12x6 for 16-32 rows; ")
    copied: Any = made._lm
    assert [type(layer) for layer in copied] == [PackedLinear, PackedLinear, nn.Linear, PackedLinear]
    assert [n for n, used in enumerate(copied[0].use) if used] == [2, *range(4, 17)]
    u = torch.randn(5, 6)
    with torch.no_grad():
        for one, other in zip(copied, layers, strict=True):  # with their biases
            torch.testing.assert_close(one(u), other(u), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ratio", "budget"), [(1.1, 5.0), (0.5, 0.0)])
def test_where_nothing_pays_or_nothing_was_timed_the_model_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, ratio: float, budget: float
) -> None:
    timed(monkeypatch, lambda outputs, rows: ratio)
    lm = model()
    made = packed(lm, budget)
    assert made._lm is lm and made.extra_bytes == 0
    assert made.report() == "packed weights: none, plain products are as fast here"


def test_timing_keeps_to_its_budget_in_rounds_that_read_a_limited_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(module, "_clock", lambda: float(next(ticks)))
    monkeypatch.setattr(module, "SAMPLE", 64)
    read: list[int] = []

    def seconds(product: Any, u: Tensor, weights: Any) -> float:
        if product is F.linear:
            read.append(sum(weight.numel() for weight in weights))
        return 1.0

    monkeypatch.setattr(module, "seconds", seconds)
    choose([torch.randn(2, 16) for _ in range(5)] + [torch.randn(100, 16)], 20.0)
    assert len(read) == 20  # every look at the clock takes a second
    assert set(read) == {64}  # two of the small weights, four outputs of the large one


def test_without_the_private_operators_the_model_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(module, "pack", missing)
    packing_works.cache_clear()
    try:
        lm = model()
        made = packed(lm)
        assert made._lm is lm
        assert made.report() == f"packed weights: none, torch {torch.__version__} on this machine lacks them"
    finally:
        packing_works.cache_clear()


def test_other_precisions_stay_plain() -> None:
    lm = model().double()
    made = packed(lm)
    assert made._lm is lm and not made.choices
    assert "no float32 linear layers" in made.report()
    assert made.vocab_size == 50


def test_the_timing_itself_runs() -> None:
    made = packed(model(), 0.2)
    assert {choice.shape for choice in made.choices} == {(32, 32), (128, 32), (32, 128), (50, 32)}
    assert made.report().startswith("packed weights: ")
