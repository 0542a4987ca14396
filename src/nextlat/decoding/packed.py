"""Packed weights for verification on a CPU, where a short measurement shows that they pay.

A call over a few positions multiplies matrices of a few rows, for which the usual product is slow: over four positions
it can take twice as long as over one. oneDNN's product with weights laid out beforehand has no such cliff, but loses
for small matrices. Which one is faster depends on shape, rows and machine, so both are timed when a model is packed.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.decoding.copies import modules_in, with_layers
from nextlat.errors import NextLatError
from nextlat.model.cache import Cache
from nextlat.model.interfaces import CausalLM, LMOutput

ROWS = (1, 2, 3, 4, 8, 16, 32)
"""Numbers of rows that are timed; between two of them, packed weights are used where they win at both."""
MARGIN = 0.95
"""Packed products must take less than this share of the time of plain ones."""
ROUNDS = 15
"""Most timed rounds; their ratios decide."""
SAMPLE = 2**22
"""Weights of one shape that a round reads. Shapes take turns, so that a model larger than the processor's cache is
timed from memory, as it is read when decoding."""

Shape = tuple[int, int]
Faster = dict[Shape, frozenset[int]]
"""(outputs, inputs) of a layer -> numbers of rows at which packed weights are faster, out of :data:`ROWS`."""


class Choice(NamedTuple):
    """What was decided for the layers of one shape."""

    shape: Shape
    """(outputs, inputs)."""
    layers: int
    """How many there are."""
    rows: tuple[int, ...]
    """Numbers of rows, up to the last of :data:`ROWS`, for which packed weights are used; empty for none."""


def packed(lm: CausalLM, budget: float = 1.0) -> Packed:
    """A model that decodes faster where packed weights pay, and the same model otherwise.

    ::

        with packed(objective.as_lm()) as fast:
            tokens = generate(fast, prompts, 200, drafter=drafter, policy=policy)

    Args:
        lm: stays as it is, and is used for everything else: training, saving, its drafter.
        budget: seconds that timing may take.
    """
    return Packed(lm, budget)


class Packed:
    """A causal language model that multiplies with packed weights where that was measured to be faster.

    It shares all parameters with the original and holds a second copy of the weights that are packed, as much memory
    again as these take, until it is closed. The decision holds for this machine and number of threads. Logits are
    those of the original up to rounding, so a tie between two tokens may be broken otherwise. With gradients enabled
    nothing is packed.

    Args:
        lm: the model; its weights must stay what they are now.
        budget: seconds that timing may take; what was not timed stays plain.
    """

    def __init__(self, lm: CausalLM, budget: float = 1.0) -> None:
        self.original = lm
        self.vocab_size: int | None = getattr(lm, "vocab_size", None)
        layers = _packable(lm)
        began = _clock()
        faster = choose([layer.weight for layer in layers], budget) if layers and packing_works() else {}
        self.seconds = _clock() - began
        """What timing took, of processor time on one thread and of wall time on several."""
        self.choices = tuple(
            Choice(shape, sum(_shape(layer.weight) == shape for layer in layers), _used(won))
            for shape, won in faster.items()
        )
        chosen = {choice.shape: choice.rows for choice in self.choices if choice.rows}
        copies: dict[int, Tensor] = {}
        for layer in layers:
            if _shape(layer.weight) in chosen and id(layer.weight) not in copies:
                copies[id(layer.weight)] = pack(layer.weight)
        new: dict[nn.Module, nn.Module] = {
            layer: PackedLinear(layer, copies[id(layer.weight)], chosen[_shape(layer.weight)])
            for layer in layers
            if id(layer.weight) in copies
        }
        self._lm = with_layers(lm, new) if new else lm
        self._watched = [layer.weight for layer in new if isinstance(layer.weight, Tensor)]
        self._watched = [weight for weight in self._watched if not weight.is_inference()]  # those have no version
        self._versions = [weight._version for weight in self._watched]
        self.extra_bytes = sum({id(w.weight): w.weight.nbytes for w in layers if id(w.weight) in copies}.values())
        """Memory of the packed copies."""

    def __call__(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_at: Tensor | None = None,
    ) -> LMOutput:
        """What the original returns.

        Raises:
            NextLatError: the model was changed, by training or loading, after it was packed.
        """
        if [weight._version for weight in self._watched] != self._versions:
            raise NextLatError("the weights of this model were changed after it was packed; pack it anew")
        return self._lm(tokens, documents, positions, mask, cache, logits_at)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for ``rows`` rows of up to ``capacity`` positions."""
        return self.original.new_cache(rows, capacity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the packed copies; from now on this is the original."""
        self._lm, self._watched, self._versions, self.extra_bytes = self.original, [], [], 0

    def report(self) -> str:
        """Which layers are packed for how many rows, and what that costs in memory, in a sentence."""
        parts = [
            f"{choice.layers} of {choice.shape[0]}x{choice.shape[1]} for {_ranges(choice.rows)} rows"
            for choice in self.choices
            if choice.rows
        ]
        if parts:
            return f"packed weights: {'; '.join(parts)}; {self.extra_bytes / 2**20:.0f} MiB more memory"
        if not packing_works():
            return f"packed weights: none, torch {torch.__version__} on this machine lacks them"
        if not self.choices:
            return "packed weights: none, the model has no float32 linear layers on the CPU"
        return "packed weights: none, plain products are as fast here"


class PackedLinear(nn.Module):
    """A linear layer with a second, packed copy of its weights for some numbers of rows.

    Args:
        layer: gives weight and bias, which are shared.
        copy: its packed weight.
        rows: numbers of rows for which the copy is used.
    """

    def __init__(self, layer: nn.Linear, copy: Tensor, rows: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.copy = copy
        self.use = [n in rows for n in range(max(rows) + 1)]

    def forward(self, u: Tensor) -> Tensor:
        """(..., N) from (..., K)."""
        rows = u.numel() // u.shape[-1]
        if rows < len(self.use) and self.use[rows] and not torch.is_grad_enabled():
            return multiply(u, self.copy, self.bias)
        return F.linear(u, self.weight, self.bias)


def pack(weight: Tensor) -> Tensor:
    """An (N, K) weight in oneDNN's own layout; a tensor that only :func:`multiply` can read."""
    with torch.no_grad():
        copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return copy


def multiply(u: Tensor, copy: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., N) from (..., K) and a packed weight."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(u, copy, bias, "none", [], "")
    return out


@lru_cache(maxsize=1)
def packing_works() -> bool:
    """Whether this build of torch has packed weights; the operators are private and may go."""
    weight = torch.linspace(-1, 1, 12).view(3, 4)
    u = torch.linspace(0, 1, 8).view(2, 4)
    try:
        with torch.no_grad():
            found = multiply(u, pack(weight))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(torch.allclose(found, u @ weight.T, atol=1e-5))


@torch.no_grad()
def choose(weights: Sequence[Tensor], budget: float) -> Faster:
    """Time plain against packed products of every shape at every number of rows.

    Shapes, numbers of rows and both products take turns, so that a busy neighbour slows all alike; the first round
    warms up and is not counted.

    Args:
        weights: (N, K) each.
        budget: seconds; rounds are made while some are left.
    """
    began = _clock()
    samples = {shape: _sample(weights, shape) for shape in dict.fromkeys(_shape(weight) for weight in weights)}
    copies = {shape: [pack(weight) for weight in sample] for shape, sample in samples.items()}
    inputs = {(shape, n): torch.randn(n, shape[1]) for shape in samples for n in ROWS}
    ratios: dict[tuple[Shape, int], list[float]] = {key: [] for key in inputs}
    for number in range(ROUNDS + 1):
        for n in ROWS:
            for shape, sample in samples.items():
                if _clock() - began > budget:
                    continue
                u = inputs[shape, n]
                plain, fast = seconds(F.linear, u, sample), seconds(multiply, u, copies[shape])
                if number:
                    ratios[shape, n].append(fast / plain)
    won = {key for key, found in ratios.items() if found and _clearly_below_one(found)}
    return {shape: frozenset(n for n in ROWS if (shape, n) in won) for shape in samples}


def _clearly_below_one(ratios: Sequence[float]) -> bool:
    """By the margin in half of the rounds and by anything in three quarters: not by a neighbour's luck."""
    return median(ratios) < MARGIN and sorted(ratios)[3 * len(ratios) // 4] < 1


def seconds(product: Callable[..., Any], u: Tensor, weights: Sequence[Tensor]) -> float:
    """What the products of an input with all weights take."""
    began = _clock()
    for weight in weights:
        product(u, weight)
    return _clock() - began


def _clock() -> float:
    """Seconds, of this thread's processor time where it does all the work and the system counts it finely."""
    alone = torch.get_num_threads() == 1 and sys.platform == "linux"
    return time.thread_time() if alone else time.perf_counter()


def _sample(weights: Sequence[Tensor], shape: Shape) -> list[Tensor]:
    """Weights of a shape up to about :data:`SAMPLE` entries together; of a larger one, its first outputs."""
    count = max(1, SAMPLE // (shape[0] * shape[1]))
    outputs = max(1, SAMPLE // shape[1])
    return [weight.detach()[:outputs] for weight in weights if _shape(weight) == shape][:count]


def _packable(lm: CausalLM) -> list[nn.Linear]:
    """The plain linear layers whose weights can be packed."""
    layers = [module for module in modules_in(lm) if type(module) is nn.Linear]
    return [
        layer
        for layer in dict.fromkeys(layers)
        if layer.weight.device.type == "cpu" and layer.weight.dtype is torch.float32 and layer.weight.is_contiguous()
    ]


def _shape(weight: Tensor) -> Shape:
    return weight.shape[0], weight.shape[1]


def _used(won: frozenset[int]) -> tuple[int, ...]:
    """Numbers of rows at which both timed neighbours won."""
    return tuple(
        n for n in range(1, ROWS[-1] + 1) if {ROWS[bisect_right(ROWS, n) - 1], ROWS[bisect_left(ROWS, n)]} <= won
    )


def _ranges(rows: Sequence[int]) -> str:
    """``2, 4-8`` of 2, 4, 5, 6, 7, 8."""
    starts = [n for n in rows if n - 1 not in rows]
    ends = [n for n in rows if n + 1 not in rows]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
