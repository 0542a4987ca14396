"""What large runs need: recomputed activations, compiled blocks behind a check, and utilisation."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nextlat.config import ModelConfig
from nextlat.errors import NextLatError
from nextlat.model import trunk as trunk_module
from nextlat.model.trunk import Block, Transformer
from nextlat.objectives import GPT, TorchModel, total_loss
from nextlat.training import compiled, loop, utilization
from nextlat.training.build import Built, build
from nextlat.training.compiled import compile_blocks
from nextlat.training.utilization import flops_per_token, peak_flops
from tests.tiny import ALL, assert_same_weights, metrics, run_whole, tiny


def kept_by_backward(built: Built) -> int:
    """Bytes that the forward pass stores for the backward pass, parameters aside."""
    stored = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal stored
        stored += 0 if isinstance(x, torch.nn.Parameter) else x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        total_loss(built.objective(built.task.rows(0, 0, 8)._replace(keys=torch.arange(8))))
    return stored


@pytest.mark.parametrize("objective", ALL)
def test_recomputed_activations_change_no_bit_and_take_less_memory(objective: str, runs: Path) -> None:
    deep = ("model.n_layers=3",)
    plain = run_whole(tiny(objective, *deep, name="plain"), runs)
    again = run_whole(tiny(objective, *deep, "training.checkpoint_activations=true", name="again"), runs)
    assert metrics(again) == metrics(plain)
    assert_same_weights(again, plain)
    kept = [
        kept_by_backward(build(tiny(objective, *deep, f"training.checkpoint_activations={on}"))) for on in (True, False)
    ]
    small, large = kept
    assert small < 0.75 * large


def rows(built: Built) -> loop.Batch:
    return built.task.rows(0, 0, 8)._replace(keys=torch.arange(8))


@pytest.mark.parametrize("objective", ALL)
def test_compiled_blocks_have_the_gradients_of_eager_ones(objective: str) -> None:
    built = build(tiny(objective))
    names = [name for name, _ in built.objective.named_parameters()]
    assert compile_blocks(built.objective, rows(built), nullcontext(), "fp32", backend="aot_eager") < 1e-5
    assert [name for name, _ in built.objective.named_parameters()] == names
    assert all("project" in vars(m) and "mix" in vars(m) for m in built.objective.modules() if isinstance(m, Block))
    assert not any(m.complex_turns for m in built.objective.modules() if isinstance(m, Transformer))


def test_a_compiler_that_changes_gradients_is_refused() -> None:
    built = build(tiny("gpt"))

    def wrong(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        return lambda *args: tuple(1.01 * x for x in graph(*args))

    with pytest.raises(NextLatError, match=r"differ by .* training\.compile=false"):
        compile_blocks(built.objective, rows(built), nullcontext(), "fp32", backend=wrong)  # type: ignore[arg-type]


def test_a_compiler_that_fails_says_how_to_go_on() -> None:
    built = build(tiny("gpt"))

    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        raise RuntimeError("no such target")

    with pytest.raises(NextLatError, match=r"torch\.compile failed .*training\.compile=false"):
        compile_blocks(built.objective, rows(built), nullcontext(), "fp32", backend=broken)  # type: ignore[arg-type]


def test_a_model_without_blocks_is_refused() -> None:
    trunk = build(tiny("gpt")).objective.model
    bare = torch.nn.Linear(2, 2)
    foreign = TorchModel(bare, trunk.hidden_states, lambda: trunk.embedding_weight, lambda: trunk.head_weight)
    with pytest.raises(NextLatError, match="has none"):
        compile_blocks(GPT(foreign), rows(build(tiny("gpt"))), nullcontext(), "fp32")


def test_a_run_asks_for_the_check_and_trains_as_before(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def through(*args: object) -> float:
        return compile_blocks(*args, backend="eager")  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "compile_blocks", through)
    monkeypatch.setattr(
        trunk_module, "own_gradients", lambda u: False
    )  # compiled blocks have none, and rounding would tell
    plain = run_whole(tiny("nextlat", name="plain"), runs)
    again = run_whole(tiny("nextlat", "training.compile=true", name="again"), runs)
    assert metrics(again) == metrics(plain)
    assert_same_weights(again, plain)
    assert compiled.TOLERANCE["fp32"] == 1e-3


def test_flops_of_a_known_size() -> None:
    # two layers of 4 * 64^2 + 3 * 64 * 128 weights, a head of 15 * 64, and 12 * 2 * 64 * 25 for attention
    model = ModelConfig(n_layers=2, n_heads=2, width=64)
    assert flops_per_token(model, 15, 25) == 6 * (2 * (4 * 64**2 + 3 * 64 * 128) + 15 * 64) + 12 * 2 * 64 * 25


def test_utilisation_is_given_where_the_peak_is_known_only(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40": None,  # neither an L4 nor an L40S
        "NVIDIA A10G": None,
        "NVIDIA RTX A1000": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, "bf16") == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(cuda, "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert "mfu" not in metrics(run_whole(tiny("gpt", name="cpu"), runs))[0]
    monkeypatch.setattr(utilization, "peak_flops", lambda *_: 1e9)
    row = metrics(run_whole(tiny("gpt", name="known"), runs), timings=True)[0]
    model = tiny("gpt").model
    expected = float(row["tokens_per_second"]) * flops_per_token(model, 15, 25) / 1e9
    assert float(row["mfu"]) == pytest.approx(expected, rel=1e-4)
