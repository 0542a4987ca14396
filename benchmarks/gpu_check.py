"""What to run first on a CUDA machine: every way of packed attention is right, and objectives train as on a CPU.

Usage: ``PYTHONPATH=src python3 benchmarks/gpu_check.py``. Exits 0 with tables, 1 on a disagreement, 2 without a GPU.
FlexAttention is compiled for each shape, so the first table takes a few minutes.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.batch import Batch
from nextlat.config import load_config
from nextlat.decoding import Static, generate
from nextlat.decoding.graphs import Graphed, roll
from nextlat.model.attention import (
    Layout,
    attend,
    attend_flex,
    attend_grouped,
    attend_varlen,
    document_layout,
    has_varlen,
    implementation,
    run_index,
)
from nextlat.model.trunk import Transformer
from nextlat.objectives import OBJECTIVES, total_loss
from nextlat.objectives.nextlat import NextLat
from nextlat.training.build import build
from nextlat.training.loop import train
from nextlat.training.optimizers import make_optimizer
from nextlat.training.run import RunDirectory

TOLERANCE = 2e-4
ATTENTION_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative errors against a float64 oracle; bf16 rounds at 4e-3."""
HEADS, HEAD_WIDTH = 8, 64

Way = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]


def attend_dense(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The oracle: a T x T mask."""
    run = run_index(layout.documents)
    mask = (run[:, :, None] == run[:, None, :]).tril()[:, None]
    mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


def ways(dtype: torch.dtype) -> dict[str, Way]:
    half = dtype is not torch.float32
    varlen: dict[str, Way] = {"varlen": attend_varlen} if half and has_varlen(torch.device("cuda", 0)) else {}
    return {**varlen, "flex": attend_flex, "grouped": attend_grouped, "attend": attend}


def ragged(rows: int, length: int, seed: int, often: float = 0.02) -> Tensor:
    """Ids of documents of random lengths, some of one token; padding behind every second row."""
    g = torch.Generator().manual_seed(seed)
    documents = (torch.rand(rows, length, generator=g) < often).cumsum(1)
    documents[:, 3:5] += torch.tensor([1000, 2000])  # two documents of one token
    documents[::2, length - length // 5 :] = -1
    return documents.cuda()


def inputs(rows: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the gradient that comes from above."""
    g = torch.Generator("cuda").manual_seed(0)
    shape = (rows, length, HEADS, HEAD_WIDTH)
    made = [torch.randn(shape, generator=g, device="cuda").to(dtype) for _ in range(4)]
    return [*(x.requires_grad_() for x in made[:3]), made[3].flatten(2)]


def attention_is_right() -> bool:
    """Every way against the oracle in float64: output and three gradients."""
    right = True
    cases = {
        "ragged": ragged(2, 640, 0),
        "length 300": ragged(2, 300, 1),  # not a multiple of a block
        "single tokens": torch.arange(256).repeat(2, 1).cuda(),
        "one document": torch.zeros(2, 256, dtype=torch.int64).cuda(),
    }
    for dtype, limit in ATTENTION_TOLERANCE.items():
        for case, documents in cases.items():
            *leaves, upstream = inputs(*documents.shape, dtype)
            wide = [x.detach().double().requires_grad_() for x in leaves]
            out = attend_dense(*wide, document_layout(documents))
            expected = [out, *torch.autograd.grad(out, wide, upstream.double())]
            errors = {}
            for name, way in ways(dtype).items():
                torch._dynamo.reset()  # each shape is one more compilation, and their number is limited
                out = way(*leaves, document_layout(documents))
                found = [out, *torch.autograd.grad(out, leaves, upstream)]
                # relative to the upstream gradient as well: single tokens have no gradient in queries and keys
                errors[name] = max(
                    float(((a.double() - b).norm() / (b.norm() + upstream.double().norm())).detach())
                    for a, b in zip(found, expected, strict=True)
                )
            print(f"{str(dtype)[6:]:9} {case:14}", "  ".join(f"{name} {error:.1e}" for name, error in errors.items()))
            right &= all(error <= limit for error in errors.values())
    return right


def cost(way: Way, leaves: list[Tensor], upstream: Tensor, layout: Layout) -> str:
    """Median milliseconds of forward and backward, and peak MiB beyond what was there."""

    def step() -> None:
        torch.autograd.grad(way(*leaves, layout), leaves, upstream)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(15):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return f"{statistics.median(times):.2f} / {peak:.0f}"


def attention_times(length: int = 4096, rows: int = 4) -> None:
    """One layer's attention on ragged documents."""
    print(
        f"attention, {rows} x {length}, {HEADS} heads of {HEAD_WIDTH}: ms forward + backward / peak MiB beyond inputs"
    )
    documents = ragged(rows, length, 0, often=1 / 400)
    for dtype in ATTENTION_TOLERANCE:
        *leaves, upstream = inputs(rows, length, dtype)
        cells = []
        for name, way in {**ways(dtype), "dense": attend_dense}.items():
            torch._dynamo.reset()
            cells.append(f"{name} {cost(way, leaves, upstream, document_layout(documents))}")
        chosen = implementation("cuda", dtype, HEAD_WIDTH, has_varlen(torch.device("cuda", 0)))
        print(f"{str(dtype)[6:]:9}", "  ".join(cells), f" (attend chooses {chosen})")


def loss_and_gradient(objective: torch.nn.Module, batch: Batch) -> tuple[float, torch.Tensor]:
    objective.zero_grad()
    loss = total_loss(objective(batch))
    loss.backward()
    flat = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(flat).double().cpu()


def objectives_agree_and_train() -> bool:
    """Loss and gradient on the CPU and the GPU, packed and not; then a few steps of training."""
    worst = 0.0
    for name in OBJECTIVES:
        config = load_config("path_star/mini", [f"objective={name}"])
        task, objective = build(config)
        batch = task.rows(0, 0, config.training.batch_size)._replace(keys=torch.arange(config.training.batch_size))
        documents = torch.zeros_like(batch.tokens)
        documents[:, batch.tokens.shape[1] // 2 :] = 1
        for packed in (False, True):
            rows = batch._replace(documents=documents) if packed else batch
            loss_cpu, gradient_cpu = loss_and_gradient(objective.cpu(), rows)
            loss_gpu, gradient_gpu = loss_and_gradient(objective.cuda(), rows.to("cuda"))
            error = float((gradient_gpu - gradient_cpu).norm() / gradient_cpu.norm())
            worst = max(worst, error)
            print(f"{name:8} packed={packed!s:5} loss {loss_cpu:.6f} / {loss_gpu:.6f}  gradient error {error:.1e}")
        optimizer = make_optimizer(objective, config.training)
        losses = []
        for step in range(20):
            rows = task.rows(step, 0, config.training.batch_size).to("cuda")
            rows = rows._replace(keys=torch.arange(config.training.batch_size, device="cuda"))
            optimizer.zero_grad()
            loss = total_loss(objective(rows))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        print(f"{name:8} 20 steps: {losses[0]:.3f} -> {losses[-1]:.3f}")
        if not losses[-1] < losses[0]:
            return False
    print(f"worst gradient error {worst:.1e} (limit {TOLERANCE:.0e})")
    return worst <= TOLERANCE


SCALE = {
    "fp32": (),
    "bf16": ("precision=bf16",),
    "bf16, compiled": ("precision=bf16", "compile=true"),
    "bf16, recomputed": ("precision=bf16", "checkpoint_activations=true"),
    "bf16, Muon": ("precision=bf16", "optimizer=muon"),
}
"""Ways to train that only a GPU is made for, as options of ``training:``."""


def scale_trains(steps: int = 30) -> bool:
    """Whole runs of a model of some size: each learns, and the first loss of all is that of fp32 within 2 %."""
    shape = ["model.n_layers=6", "model.width=384", "model.n_heads=6", "objective=nextlat", "data.train_size=20000"]
    first: dict[str, float] = {}
    right = True
    for name, options in SCALE.items():
        fixed = [f"training.steps={steps}", "training.warmup_steps=5", "training.decay_steps=0", "evaluation.after=[]"]
        overrides = [*shape, *fixed, "training.evaluate_every=null", *(f"training.{option}" for option in options)]
        config = load_config("path_star/mini", overrides)
        with TemporaryDirectory() as folder:
            run = RunDirectory.create(config, Path(folder), {})
            train(run, build(config), bar=False)
            run.close()
            with (run.path / "metrics.csv").open(encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        first[name], last = float(rows[0]["ce"]), float(rows[-1]["ce"])
        about = ", ".join(
            f"{key} {float(rows[-1][key]):,.3g}" for key in ("tokens_per_second", "mfu") if rows[-1].get(key)
        )
        print(f"{name:17} ce {first[name]:.4f} -> {last:.4f}, {about}")
        right &= last < first[name] and abs(first[name] / first["fp32"] - 1) < 0.02
    return right


@torch.inference_mode()
def drafts_are_right(length: int = 5, rows: int = 1) -> bool:
    """Rollouts as graphs against single steps, and decoding with either against plain cached decoding."""
    trunk = Transformer(50_257, 12, 12, 768, generator=torch.Generator().manual_seed(0))
    objective = NextLat(trunk, dynamics=768).cuda().eval()
    lm, drafter = objective.as_lm(), objective.drafter()
    graphed, g = Graphed(drafter), torch.Generator("cuda").manual_seed(0)
    right = True
    for _ in range(3):
        state = torch.randn(rows, 768, device="cuda", generator=g)
        token = torch.randint(50_257, (rows,), device="cuda", generator=g)
        right &= torch.equal(graphed.rollout(state, token, length), roll(drafter, state, token, length))
    arms = {"steps": partial(roll, drafter), "graph": graphed.rollout}
    spent = {}
    for _ in range(2):  # the first time warms up
        for name, arm in arms.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(50):
                arm(state, token, length)
            torch.cuda.synchronize()
            spent[name] = (time.perf_counter() - began) / 50 * 1e3
    print(f"a rollout of {length}:", ", ".join(f"{name} {ms:.2f} ms" for name, ms in spent.items()), f"same: {right}")
    prompts = torch.zeros(rows, 64, dtype=torch.int64, device="cuda")
    ways = {"plain": None, "steps": drafter, "graph": graphed}
    for _ in range(2):
        for name, way in ways.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            text = generate(lm, prompts, 128, drafter=way, policy=Static(length) if way else None)
            torch.cuda.synchronize()
            spent[name] = 128 / (time.perf_counter() - began)
            unlike = int((text != generate(lm, prompts, 128)).sum())
            print(f"{name:6} {spent[name]:.0f} tokens/s (random weights), {unlike} tokens unlike plain decoding")
    return right


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA GPU is visible to torch")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.simplefilter("always")  # attend() says so when it does without FlexAttention
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    right = attention_is_right()
    attention_times()
    right &= drafts_are_right()
    right &= scale_trains()
    return int(not (objectives_agree_and_train() and right))


if __name__ == "__main__":
    sys.exit(main())
