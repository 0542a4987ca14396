"""Cross-entropy and KL: one chunked pass against materialised logits and ordinary autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.bench.measure import Peak, peak_memory
from nextlat.bench.results import Effort, Result, milliseconds
from nextlat.model.products import other_library, product
from nextlat.objectives.token_losses import ONEDNN_STRIP, token_losses
from nextlat.timing import Arm, Timing, compare, interleave, seconds

PAGES = 2**20
"""Growth of a process below it is chance: loaded code, the allocator's own book-keeping."""


class Sizes(NamedTuple):
    """Shape of a loss."""

    vocab: int
    width: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Positions whose next token is asked for."""
        return self.rows * self.length


class Inputs(NamedTuple):
    """What the loss gets from the model: all leaves."""

    hidden: Tensor
    """(B, T, D) states; every position counts."""
    weight: Tensor
    """(V, D) output head."""
    targets: Tensor
    """(B, T) int64."""
    states: tuple[Tensor, ...]
    """(B, T, D) for i = 1 ... d: guesses of the states, made i positions before; of the first i there is none."""

    def live(self) -> list[Tensor]:
        """The tensors that get a gradient."""
        return [x for x in (self.hidden, self.weight, *self.states) if x.requires_grad]


Losses = Callable[[Inputs], Tensor]
"""(1 + d,) sums: cross-entropy, then the KL of each step."""


def make_inputs(sizes: Sizes, horizon: int, head_live: bool = True, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random leaves with logits of unit scale."""
    g = torch.Generator().manual_seed(0)
    rows, length, width = sizes.rows, sizes.length, sizes.width

    def leaf(*shape: int, scale: float = 1.0, live: bool = True) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(dtype).requires_grad_(live)

    return Inputs(
        leaf(rows, length, width),
        leaf(sizes.vocab, width, scale=width**-0.5, live=head_live),
        torch.randint(sizes.vocab, (rows, length), generator=g),
        tuple(leaf(rows, length, width) for _ in range(horizon)),
    )


def ours(inputs: Inputs) -> Tensor:
    """The library's chunked pass."""
    rows, length, _ = inputs.hidden.shape
    students = []
    for step, state in enumerate(inputs.states, start=1):
        reached = (torch.arange(length) >= step).repeat(rows)
        students.append((state.flatten(0, 1), reached))
    return token_losses(inputs.hidden.flatten(0, 1), inputs.weight, inputs.targets.flatten(), students)


def materialised(inputs: Inputs) -> Tensor:
    """Ordinary autograd over full logits, with those of the cross-entropy reused as teacher of every step."""
    logits = F.linear(inputs.hidden, inputs.weight)  # (B, T, V)
    sums = [F.cross_entropy(logits.flatten(0, 1), inputs.targets.flatten(), reduction="sum")]
    teacher = F.log_softmax(logits.detach(), -1)
    for step, state in enumerate(inputs.states, start=1):
        student = F.log_softmax(F.linear(state[:, step:], inputs.weight.detach()), -1)
        sums.append(F.kl_div(student, teacher[:, step:], reduction="sum", log_target=True))
    return torch.stack(sums)


def recomputed(inputs: Inputs) -> Tensor:
    """As :func:`materialised`, but each step computes its teacher's logits again."""
    logits = F.linear(inputs.hidden, inputs.weight)
    sums = [F.cross_entropy(logits.flatten(0, 1), inputs.targets.flatten(), reduction="sum")]
    for step, state in enumerate(inputs.states, start=1):
        with torch.no_grad():
            teacher = F.log_softmax(F.linear(inputs.hidden[:, step:], inputs.weight), -1)
        student = F.log_softmax(F.linear(state[:, step:], inputs.weight.detach()), -1)
        sums.append(F.kl_div(student, teacher, reduction="sum", log_target=True))
    return torch.stack(sums)


ARMS: dict[str, Losses] = {"materialised": materialised, "recomputed": recomputed, "ours": ours}


def gradients(losses: Losses, inputs: Inputs) -> tuple[Tensor, ...]:
    """The sums, and the gradients of cross-entropy per token plus mean KL per token over the steps."""
    sums = losses(inputs)
    rows, length = inputs.targets.shape
    steps = range(1, len(inputs.states) + 1)
    counts = [rows * length, *(rows * (length - step) * len(steps) for step in steps)]
    total = (sums / sums.new_tensor(counts)).sum()
    return (sums.detach(), *torch.autograd.grad(total, inputs.live()))


def head_products(sizes: Sizes, horizon: int, recompute: bool = False) -> int:
    """Multiply-adds with the head, forward and backward, for a batch.

    Three products a position for the cross-entropy (logits, gradients of state and head), and for each step two
    (student logits, gradient of the state) or, when the teacher's logits are made again, three.
    """
    steps = sum(sizes.rows * (sizes.length - step) for step in range(1, horizon + 1))
    return sizes.width * sizes.vocab * (3 * sizes.tokens + (3 if recompute else 2) * steps)


def least_work(inputs: Inputs) -> Arm:
    """The products of :func:`ours` and one softmax for each state, on the whole batch at once.

    No time can fall far below it: every gradient needs its probabilities. The logits are made in memory that is
    there beforehand, and larger products are the faster ones.
    """
    weight = inputs.weight.detach()
    states = [s.detach()[:, step:].flatten(0, 1) for step, s in enumerate((inputs.hidden, *inputs.states))]
    logits, d_weight = torch.zeros(len(states[0]), len(weight)), torch.zeros_like(weight)

    def work() -> None:
        for index, s in enumerate(states):
            a = product(s, weight) if other_library(s, weight) else torch.mm(s, weight.T, out=logits[: len(s)])
            torch.softmax(a, -1, out=a)
            product(a, weight.T) if len(weight) <= ONEDNN_STRIP else a @ weight
            if index == 0:
                d_weight.addmm_(a.T, s)

    return work


def worst_error(sizes: Sizes, horizon: int) -> float:
    """Largest relative error of our gradients in the norm, against materialised float64."""
    single = gradients(ours, make_inputs(sizes, horizon))
    double = gradients(materialised, make_inputs(sizes, horizon, dtype=torch.float64))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(single, double, strict=True))


class Plan(NamedTuple):
    """What to measure at an effort."""

    memory: Sizes
    timings: tuple[tuple[Sizes, int, int, float], ...]
    """Sizes, horizon, repetitions and target."""
    exact: tuple[Sizes, ...]


PLANS: dict[Effort, Plan] = {
    "full": Plan(
        Sizes(50_257, 256, 8, 128),
        (
            (Sizes(50_257, 256, 8, 128), 1, 7, 2.0),
            (Sizes(50_257, 256, 8, 128), 4, 7, 2.6),
            (Sizes(1_000, 256, 16, 128), 1, 21, 1.0),
            (Sizes(1_000, 256, 16, 128), 4, 21, 1.4),
        ),
        (Sizes(50_257, 256, 1, 128), Sizes(1_000, 256, 16, 128)),
    ),
    "quick": Plan(
        Sizes(50_257, 256, 8, 128),
        (
            (Sizes(50_257, 256, 4, 128), 1, 3, 2.0),
            (Sizes(50_257, 256, 4, 128), 4, 3, 2.6),
            (Sizes(1_000, 256, 16, 128), 1, 7, 1.0),
            (Sizes(1_000, 256, 16, 128), 4, 7, 1.4),
        ),
        (Sizes(1_000, 256, 16, 128),),
    ),
    "tiny": Plan(Sizes(300, 8, 2, 12), ((Sizes(40, 8, 2, 12), 1, 2, 2.0),), (Sizes(40, 8, 2, 12),)),
}


def run(effort: Effort) -> Iterator[Result]:
    """Memory, time and exactness of the losses."""
    plan = PLANS[effort]
    yield from memory(plan.memory)
    for sizes, horizon, repetitions, target in plan.timings:
        yield from times(sizes, horizon, repetitions, target)
    for sizes in plan.exact:
        yield Result(
            "gradient error of ours, relative to float64",
            worst_error(sizes, 4),
            1e-5,
            at_least=False,
            setting={"V": sizes.vocab, "D": sizes.width, "tokens": sizes.tokens, "horizon": 4},
        )


def memory(sizes: Sizes) -> Iterator[Result]:
    """Peak memory of forward and backward pass beyond the inputs."""
    kept: dict[int, Peak] = {}
    peak("materialised", Sizes(16, 2, 1, 4), 1)  # loads what a first call loads
    for horizon, target in ((1, 10.0), (8, 25.0)):
        setting = {"V": sizes.vocab, "D": sizes.width, "tokens": sizes.tokens, "horizon": horizon}
        peaks = {name: peak(name, sizes, horizon) for name in ("materialised", "ours")}
        kept[horizon] = peaks["ours"]
        yield from _memory("materialised / ours", peaks["materialised"], peaks["ours"], setting, target)
        if horizon > 1:
            continue
        yield from _memory("recomputed / ours", peak("recomputed", sizes, horizon), peaks["ours"], setting)
        more, less = (peak(name, sizes, horizon, head_live=False) for name in ("materialised", "ours"))
        yield from _memory("materialised / ours", more, less, setting, frozen=", head frozen")
    yield from _memory("ours at horizon 8 / at horizon 1", kept[8], kept[1], setting, 1.1, at_least=False)


def peak(name: str, sizes: Sizes, horizon: int, head_live: bool = True) -> Peak:
    """Peak memory of an arm's forward and backward pass."""
    inputs = make_inputs(sizes, horizon, head_live)
    return peak_memory(lambda: gradients(ARMS[name], inputs), calls=3 if name == "ours" else 1)


def _memory(
    name: str,
    more: Peak,
    less: Peak,
    setting: dict[str, int],
    target: float | None = None,
    at_least: bool = True,
    frozen: str = "",
) -> Iterator[Result]:
    """The ratio in tensors, and in resident memory where the system tells."""
    for kind, one, other in (("tensor", more.tensors, less.tensors), ("process", more.resident, less.resident)):
        if one is None or other is None or (kind == "process" and min(one, other) < PAGES):
            continue
        yield Result(
            f"{kind} memory{frozen}: {name}",
            one / other,
            target,
            at_least,
            of=f"{one / 1e6:,.0f}/{other / 1e6:,.0f} MB",
            setting=setting,
            details={"bytes_1": one, "bytes_2": other},
        )


def times(sizes: Sizes, horizon: int, repetitions: int, target: float) -> Iterator[Result]:
    """Forward and backward pass, with the bare products beside it."""
    inputs = make_inputs(sizes, horizon)
    # the third arm stands beside the first one only, and costs most at a long horizon
    chosen = {name: arm for name, arm in ARMS.items() if name != "recomputed" or horizon == 1}
    arms = {name: (lambda arm=arm: gradients(arm, inputs)) for name, arm in chosen.items()}
    found: dict[str, Timing] = interleave({**arms, "least": least_work(inputs)}, repetitions)
    setting = {
        "V": sizes.vocab,
        "D": sizes.width,
        "tokens": sizes.tokens,
        "horizon": horizon,
        "reps": repetitions,
    }
    for name in ("materialised", "recomputed"):
        if name not in found:
            continue
        ratio = compare(found[name], found["ours"])
        yield Result(
            f"loss time: {name} / ours",
            ratio.value,
            target if name == "materialised" else None,
            wall=ratio.wall,
            spread=(ratio.low, ratio.high),
            limit=compare(found[name], found["least"]).value,
            note="limit of a loss time: measured, the products with the head that ours makes, and softmaxes",
            setting=dict(setting),
            of=milliseconds(seconds(found[name]), seconds(found["ours"])),
            details={
                **{f"{arm}_seconds": seconds(timing) for arm, timing in found.items()},
                "multiply_adds": head_products(sizes, horizon, name == "recomputed"),
                "ours_multiply_adds": head_products(sizes, horizon),
            },
        )
