"""The one pass over the vocabulary against ordinary differentiation and against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nextlat.objectives import token_losses as module
from nextlat.objectives.token_losses import Kind, plain_token_losses, rows_per_block, token_losses

Case = tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]


def case(n: int, vocab: int, width: int, steps: int, dtype: torch.dtype = torch.float64, noise: float = 0.5) -> Case:
    generator = torch.Generator().manual_seed(n + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, head = normal(n, width), normal(vocab, width) / 2
    students = [
        ((hidden + noise * normal(n, width)).to(dtype).requires_grad_(), torch.rand(n, generator=generator) > 0.3)
        for _ in range(steps)
    ]
    targets = torch.randint(vocab, (n,), generator=generator)
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets, students


def wider(given: Case) -> Case:
    hidden, head, targets, students = given
    return (
        hidden.detach().double().requires_grad_(),
        head.detach().double().requires_grad_(),
        targets,
        [(s.detach().double().requires_grad_(), reached) for s, reached in students],
    )


def leaves(given: Case) -> list[Tensor]:
    return [given[0], given[1], *(s for s, _ in given[3])]


def weighted(sums: Tensor) -> Tensor:
    """Every sum with a weight of its own, some of them negative."""
    return (sums * torch.linspace(-1, 2, len(sums), dtype=sums.dtype)).sum()


def gradients(sums: Tensor, given: Case) -> list[Tensor]:
    return list(torch.autograd.grad(weighted(sums), leaves(given), materialize_grads=True))


ALL: list[Sequence[Kind]] = [("kl",), ("aux_ce",), ("tv",), ("kl", "aux_ce", "tv"), ("tv", "kl")]


@pytest.mark.parametrize("kinds", ALL)
@pytest.mark.parametrize("block", [1, 5, 16, 37, 100])
def test_values_and_gradients_are_those_of_ordinary_differentiation(kinds: Sequence[Kind], block: int) -> None:
    given = case(37, 23, 6, 3)
    expected, found = plain_token_losses(*given, kinds=kinds), token_losses(*given, kinds=kinds, block=block)
    assert found.shape == (1 + 3 * len(kinds),)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, two in zip(gradients(found, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


def test_the_sums_are_what_they_are_called() -> None:
    hidden, head, targets, students = given = case(4, 3, 2, 1)
    ce = kl = tv = aux = 0.0
    for n in range(4):
        p, q = ((x @ head.T).softmax(-1).tolist() for x in (hidden[n], students[0][0][n]))
        ce -= math.log(p[targets[n]])
        if students[0][1][n]:
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            tv += 1 - sum(min(a, b) for a, b in zip(p, q, strict=True))
            aux -= math.log(q[targets[n]])
    for sums in (plain_token_losses(*given, kinds=ALL[3]), token_losses(*given, kinds=ALL[3], block=3)):
        assert sums.tolist() == pytest.approx([ce, kl, aux, tv], rel=1e-12)


@pytest.mark.parametrize("noise", [1.0, 0.05])
@pytest.mark.parametrize("vocab", [300, 2500])
def test_fp32_gradients_agree_with_float64(noise: float, vocab: int) -> None:
    # several blocks, and more tokens than one strip; a total variation has kinks, which rounding may cross
    given = case(1000, vocab, 16, 2, torch.float32, noise)
    exact = wider(given)
    kinds: Sequence[Kind] = ("kl", "aux_ce")
    expected, found = plain_token_losses(*exact, kinds=kinds), token_losses(*given, kinds=kinds, block=256)
    # a KL is made of numbers near 10, which are rounded at 5e-7, differently by every processor: 700 rows add up
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=5e-5)
    for one, two in zip(gradients(found, given), gradients(expected, exact), strict=True):
        assert float((one.double() - two).norm() / two.norm()) < 1e-5


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
def test_a_small_kl_beside_large_logits_is_right_to_a_few_millionths(noise: float) -> None:
    hidden, head, targets, students = case(200, 3000, 32, 1, torch.float32, noise)
    given = (hidden, (6 * head.detach()).requires_grad_(), targets, students)  # logits deviate by 17
    exact = wider(given)
    expected, found = plain_token_losses(*exact), token_losses(*given, block=64)
    reached = int(students[0][1].sum())
    assert abs(float(found[1].detach().double() - expected[1].detach())) / reached < 3e-6
    plain = gradients(plain_token_losses(*given), given)
    for one, ordinary, two in zip(gradients(found, given), plain, gradients(expected, exact), strict=True):
        error, usual = ((x.double() - two).norm() / two.norm() for x in (one, ordinary))
        assert error < 1.5 * usual + 1e-6


def test_the_default_takes_the_pass_when_logits_are_many_and_the_plain_path_when_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = case(40, 30, 4, 1)
    monkeypatch.setattr(module, "PLAIN_LOGITS", 1200)
    assert "TokenLosses" not in token_losses(*given).grad_fn.name()
    monkeypatch.setattr(module, "PLAIN_LOGITS", 1199)
    assert "TokenLosses" in token_losses(*given).grad_fn.name()
    torch.testing.assert_close(token_losses(*given), plain_token_losses(*given), rtol=1e-12, atol=0)


def test_only_the_cross_entropy_trains_the_head() -> None:
    given = case(20, 11, 4, 2)
    sums = token_losses(*given, kinds=ALL[3], block=8)
    head = given[1]
    (alone,) = torch.autograd.grad(token_losses(*given[:3], block=8)[0], head)
    for number, value in enumerate(sums):
        (gradient,) = torch.autograd.grad(value, head, retain_graph=True)
        torch.testing.assert_close(gradient, alone if number == 0 else torch.zeros_like(alone), rtol=1e-12, atol=0)


def test_only_the_cross_entropy_trains_the_true_state_and_only_its_own_losses_a_prediction() -> None:
    given = case(20, 11, 4, 2)
    sums = token_losses(*given, kinds=("kl", "tv"), block=8)
    for number, value in enumerate(sums):
        hidden, _, *predicted = torch.autograd.grad(value, leaves(given), retain_graph=True)
        assert bool(hidden.any()) == (number == 0)
        assert [bool(p.any()) for p in predicted] == [number in (1, 2), number in (3, 4)]


def test_a_live_head_gets_the_students_gradient_too() -> None:
    given = case(9, 7, 4, 1)
    (live,) = torch.autograd.grad(plain_token_losses(*given, live_head=True)[1], given[1])
    assert live.any()
    (cut,) = torch.autograd.grad(plain_token_losses(*given)[1], given[1], materialize_grads=True)
    assert not cut.any()


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_what_predictions_hold_where_nothing_is_predicted_does_not_matter(junk: float) -> None:
    hidden, head, targets, students = given = case(12, 9, 4, 2)
    spoilt = [(s.detach().masked_fill(~r[:, None], junk).requires_grad_(), r) for s, r in students]
    again = (hidden, head, targets, spoilt)
    expected, found = token_losses(*given, kinds=ALL[3], block=5), token_losses(*again, kinds=ALL[3], block=5)
    assert torch.equal(found, expected)
    for one, two in zip(gradients(found, again), gradients(expected, given), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_reached_and_nothing_at_all_are_exactly_zero(n: int) -> None:
    hidden, head, targets, students = case(n, 9, 4, 2)
    given = (hidden, head, targets, [(s, torch.zeros(n, dtype=torch.bool)) for s, _ in students])
    for sums in (token_losses(*given, block=2), plain_token_losses(*given)):
        assert (sums[1:] == 0).all()
        assert n > 0 or sums[0] == 0
        for gradient in gradients(sums, given)[2 if n else 0 :]:
            assert not gradient.any()
            assert gradient.isfinite().all()


def test_logits_far_apart_stay_finite_and_exact() -> None:
    # softmax underflows to 0 at the target, and the loss is the gap
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    head = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([1, 0])
    predicted = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    sums = token_losses(hidden, head, targets, [(predicted, torch.tensor([True, True]))], ALL[3], block=2)
    log_3 = math.log(3)
    assert sums.tolist() == pytest.approx([2e4, log_3, log_3, 2 / 3], rel=1e-6)
    for gradient in torch.autograd.grad(sums.sum(), (hidden, head, predicted)):
        assert gradient.isfinite().all()


def test_nothing_of_the_size_of_the_logits_is_kept_for_the_backward_pass() -> None:
    given = case(64, 50, 4, 3)
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_losses(*given, block=16)
    assert max(kept) == max(64, 50) * 4
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        plain_token_losses(*given)
    assert max(kept) == 64 * 50


def test_without_gradients_only_the_sums_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(20, 11, 4, 2)
    expected = token_losses(*given, block=8)
    products = []
    times = module._times
    monkeypatch.setattr(module, "_times", lambda *x: products.append(1) or times(*x))
    with torch.no_grad():
        sums = token_losses(*given, block=8)
    assert not sums.requires_grad
    assert products == []
    # with gradients the mean logits come from products that are made anyway, and so in another order of addition
    torch.testing.assert_close(sums, expected.detach(), rtol=1e-13, atol=0)


def test_a_frozen_head_and_frozen_states_cost_no_gradient() -> None:
    hidden, head, targets, students = case(20, 11, 4, 1)
    given = (hidden.detach(), head.detach(), targets, students)
    (found,) = torch.autograd.grad(token_losses(*given, block=8)[1], students[0][0])
    (expected,) = torch.autograd.grad(plain_token_losses(*given)[1], students[0][0])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_under_autocast_products_are_short_and_sums_are_not() -> None:
    given = case(200, 50, 16, 2, torch.float32)
    exact = wider(given)
    kinds: Sequence[Kind] = ("kl", "aux_ce")
    with torch.autocast("cpu", torch.bfloat16):
        found = token_losses(*given, kinds=kinds, block=64)
    assert found.dtype is torch.float32
    expected = plain_token_losses(*exact, kinds=kinds)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0)
    for one, two in zip(gradients(found, given), gradients(expected, exact), strict=True):
        assert one.dtype is torch.float32
        assert float((one.double() - two).norm() / two.norm()) < 0.03


@pytest.mark.parametrize(("rows", "vocab"), [(3, 5), (7, 1001), (2, 50_257)])
def test_softmax_over_its_own_input_is_bit_identical(rows: int, vocab: int) -> None:
    # the pass relies on it
    logits = 5 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    expected = logits.softmax(-1)
    torch.softmax(logits, -1, out=logits)
    assert torch.equal(logits, expected)


def test_blocks_fit_their_budget_and_are_never_skinny() -> None:
    assert rows_per_block(50_257, 4, "cpu") == 160
    assert rows_per_block(1_000, 4, "cpu") == 1_024
    assert rows_per_block(1_000, 4, "cuda") == 67_104
    assert rows_per_block(10**6, 4, "cpu") == 64
    assert rows_per_block(50_257, 4, "cuda") == 1_312
