"""Products by either of torch's libraries are those of float64, and so are their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nextlat import GPT, Batch, Transformer, total_loss
from nextlat.model import products
from nextlat.model.products import add_product, linear, product
from nextlat.objectives import token_losses
from nextlat.objectives.dynamics import LatentDynamics

WORKS = products.onednn_works()


@pytest.fixture
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Every product by one of them; shapes of what oneDNN multiplied."""
    used: list[tuple[int, ...]] = []
    multiply = products._by_onednn

    def watched(u: Tensor, weight: Tensor) -> Tensor:
        used.append((*u.shape, *weight.shape))
        return multiply(u, weight)

    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "onednn_pays", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "_by_onednn", watched)
    yield used
    assert bool(used) == (request.param == "onednn")


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None and expected is not None
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6 * scale)


EITHER = pytest.mark.parametrize(
    "library",
    ["mm", pytest.param("onednn", marks=pytest.mark.skipif(not WORKS, reason="this torch lacks oneDNN"))],
    indirect=True,
)


@EITHER
@pytest.mark.parametrize("shape", [(1, 3, 5), (70, 33, 18), (64, 256, 640)])
def test_products_are_those_of_float64(shape: tuple[int, int, int], library: list[Any]) -> None:
    n, inner, outer = shape
    g = torch.Generator().manual_seed(0)
    u, weight, total = (torch.randn(*size, generator=g) for size in ((n, inner), (outer, inner), (n, outer)))
    expected = u.double() @ weight.double().T
    close(product(u, weight), expected)
    # as backward passes multiply: by a transposed weight
    close(product(total, weight.T.contiguous()), total.double() @ weight.double())
    close(product(total, weight.T), total.double() @ weight.double())
    wanted = total.double() + expected
    assert add_product(total, u, weight) is total
    close(total, wanted)


@EITHER
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_float64(frozen: bool, library: list[Any]) -> None:
    g = torch.Generator().manual_seed(1)
    u, weight = torch.randn(3, 7, 12, generator=g), torch.randn(9, 12, generator=g)
    upstream = torch.randn(3, 9, 7, generator=g).transpose(1, 2)  # not contiguous
    leaves = [u.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
    made = linear(*leaves)
    made.backward(upstream)
    reference = [u.double().requires_grad_(), weight.double().requires_grad_()]
    expected = reference[0] @ reference[1].T
    expected.backward(upstream.double())
    close(made, expected)
    close(leaves[0].grad, reference[0].grad)
    if frozen:
        assert leaves[1].grad is None
    else:
        close(leaves[1].grad, reference[1].grad)


@EITHER
def test_a_step_is_that_of_float64(library: list[Any]) -> None:
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(2))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        model = Transformer(11, 2, 2, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
        for parameter in model.parameters():
            parameter.data.mul_(3 if parameter.ndim > 1 else 1)
        total_loss(GPT(model)(batch)).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients(torch.float64)
    assert not library  # oneDNN has no fp64
    for mine, reference in zip(gradients(torch.float32), expected, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=0, atol=1e-5 * float(reference.abs().max()))
    # all seven products of both blocks, forward and backward to the stream
    assert len(library) in (0, 2 * 7 * 2)


@EITHER
@pytest.mark.parametrize("strip", [7, 4096])
@pytest.mark.parametrize("students", [0, 2])
def test_token_losses_are_those_of_float64(
    strip: int, students: int, library: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_losses, "ONEDNN_STRIP", strip)
    g = torch.Generator().manual_seed(4)
    states = [torch.randn(19, 6, generator=g) for _ in range(1 + students)]
    head, targets = torch.randn(23, 6, generator=g), torch.randint(23, (19,), generator=g)
    reached = torch.rand(19, generator=g) < 0.7

    def made(dtype: torch.dtype, block: int | None) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (head, *states)]
        predicted = [(x, reached) for x in leaves[2:]]
        options = {"block": 8} if block else {}
        compute = token_losses.token_losses if block else token_losses.plain_token_losses
        sums = compute(leaves[1], leaves[0], targets, predicted, ("kl", "tv", "aux_ce"), **options)
        return [sums.detach(), *torch.autograd.grad((sums * torch.arange(1, len(sums) + 1)).sum(), leaves)]

    expected = made(torch.float64, None)
    assert not library
    for mine, reference in zip(made(torch.float32, 8), expected, strict=True):
        close(mine, reference)
    assert not library or {shape[2] for shape in library} == ({7, 2} if strip == 7 else {23, 6})


@pytest.mark.parametrize("name", ["layer_1", "layer_2", "layer_3"])
def test_layers_of_the_dynamics_are_called_where_something_hangs_on_them(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    dynamics = LatentDynamics(8, 12, generator=g).double()
    state, embedding = (torch.randn(3, 8, generator=g, dtype=torch.float64) for _ in range(2))
    unchanged = dynamics(state, embedding).detach()
    dynamics.get_submodule(name).register_forward_hook(lambda module, inputs, made: 3 * made + 1)
    with torch.no_grad():
        plain = dynamics(state, embedding)
    torch.testing.assert_close(dynamics(state, embedding).detach(), plain, rtol=0, atol=1e-12)
    assert not torch.allclose(plain, unchanged)


def test_which_library_multiplies_follows_from_the_machine_and_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_library(rows: int, dtype: torch.dtype = torch.float32) -> bool:
        return products.other_library(torch.empty(rows, 128, dtype=dtype), torch.empty(128, 128, dtype=dtype))

    monkeypatch.setattr(products, "onednn_works", lambda: True)
    for capability, pays in (("AVX512", True), ("AVX2", False), ("DEFAULT", False)):
        products.onednn_pays.cache_clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda said=capability: said)
        assert products.onednn_pays() == other_library(1024) == pays
        assert not other_library(1023)
        assert not other_library(1024, torch.float64)
    products.onednn_pays.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "onednn_works", lambda: False)
    assert not products.onednn_pays()
    products.onednn_pays.cache_clear()


def test_without_the_private_operator_nothing_is_multiplied_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(u: Tensor, weight: Tensor) -> Tensor:
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(products, "_by_onednn", gone)
    assert not products.onednn_works()
    monkeypatch.setattr(products, "_by_onednn", lambda u, weight: u @ weight.T + 1)
    assert not products.onednn_works()
    monkeypatch.setattr(products, "_by_onednn", lambda u, weight: u @ weight.T)
    assert products.onednn_works()
