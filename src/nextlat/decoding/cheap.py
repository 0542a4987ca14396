"""Cheaper drafts: fewer tokens to draft from, and weights of 8 bits.

Neither changes the text. Verification is told the law that tokens were really drafted from, so a poorer law is kept
less often and nothing else. A reduced draft vocabulary is that of FR-Spec (Zhao et al., arXiv 2502.14856).
"""

from __future__ import annotations

import copy
import warnings
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.batch import IGNORE
from nextlat.decoding.copies import with_layers
from nextlat.errors import NextLatError
from nextlat.model.head import OutputHead, Readout
from nextlat.model.interfaces import Drafter

if TYPE_CHECKING:
    from nextlat.tasks.base import Task

INT8_LEAST = 2**19
"""Weights of a layer below which 8 bits cost more than they save: scaling and rounding the input takes as long as
reading some hundred thousand weights."""
INPUT_LEVELS = 63
"""Inputs are rounded to -63 ... 63. Processors without VNNI add two products of 8-bit numbers in 16 bits, and with
all 8 bits of the input these sums overflow: the largest error of a logit then is five times as large."""


class Reducible(Drafter, Protocol):
    """A drafter whose costly parts can be replaced."""

    @property
    def head(self) -> Readout:
        """From states to logits."""
        ...

    @property
    def network(self) -> nn.Module | None:
        """What else every draft step runs."""
        ...


def count_targets(task: Task, batch_size: int, steps: int) -> Tensor:
    """How often each token is a target in the first steps of training.

    Args:
        task: made with the run's configuration and seed, so that its rows are those of the run.
        batch_size: global rows of a step.
        steps: how many steps to go through; some hundred thousand tokens are enough to find the frequent ones.

    Returns:
        (V,) int64.

    Raises:
        NextLatError: no steps, or a task whose targets are labels and not the next tokens.
    """
    if steps < 1 or batch_size < 1:
        raise NextLatError(f"steps is {steps} and batch_size {batch_size}; both must be at least 1 to count tokens")
    if not task.next_token:
        raise NextLatError("the targets of this task are labels and not the next tokens; nothing is drafted for it")
    counts = torch.zeros(task.vocab_size, dtype=torch.int64)
    for step in range(steps):
        targets = task.rows(step, 0, batch_size).targets
        counts += targets[targets != IGNORE].bincount(minlength=task.vocab_size)
    return counts


def frequent_tokens(counts: Tensor, size: int) -> Tensor:
    """The most frequent tokens, as a draft vocabulary.

    Args:
        counts: (V,) how often each token occurs.
        size: how many to keep; of equally frequent ones, those with the lowest ids.

    Returns:
        (size,) int64 token ids, increasing.

    Raises:
        NextLatError: a size below 1 or above V.
    """
    if not 1 <= size <= len(counts):
        raise NextLatError(f"a draft vocabulary of {size} tokens is asked for; it must have 1 to {len(counts)}")
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def cheaper(drafter: Drafter, vocabulary: Tensor | None = None, int8: bool = False) -> Drafter:
    """A drafter like another that costs less; that one and its model stay as they are.

    It holds copies of the weights it changes, made now: make it anew after training on.

    Args:
        drafter: of an objective.
        vocabulary: (V',) int64 the only tokens to draft, increasing; ``None`` is all. See :func:`frequent_tokens`.
        int8: hold the output head, and the latent dynamics if there are any, in 8 bits; on a CPU only, and only
            layers that are large enough to gain by it. A warning says where this is not available, and drafts are
            then made in full precision.

    Raises:
        NextLatError: a drafter without a replaceable head or one that is cheaper already, or a vocabulary that is
            empty, unordered or out of range.
    """
    head = getattr(drafter, "head", None)
    if not isinstance(head, OutputHead):
        raise NextLatError(
            f"{type(drafter).__name__} has no full output head to replace; give the objective's own drafter, and ask "
            "for a draft vocabulary and int8 together"
        )
    weight = head.weight.detach()
    if vocabulary is not None:
        vocabulary = _checked(vocabulary, len(weight)).to(weight.device)
    int8 = int8 and _usable(weight)
    return _replaced(drafter, head, weight, vocabulary, int8)  # type: ignore[arg-type]


def _replaced(drafter: Reducible, head: Readout, weight: Tensor, vocabulary: Tensor | None, int8: bool) -> Drafter:
    rows = weight if vocabulary is None else weight[vocabulary]
    network = drafter.network
    if int8 and rows.numel() >= INT8_LEAST:
        head = Int8Linear(rows)
    elif vocabulary is not None:
        head = partial(F.linear, weight=rows)
    if int8 and network is not None:
        network = with_layers(network, {layer: Int8Linear(layer.weight, layer.bias) for layer in _large(network)})
    made = copy.copy(drafter)
    vars(made).update(head=head, vocabulary=vocabulary, network=network)
    return made


class Int8Linear(nn.Module):
    """``W u`` with W rounded to 8 bits, one scale for each output, and u to 7, one scale for each row.

    A row's scale is its own, so that what a row drafts does not depend on the rows beside it. With ``r`` the largest
    entry of a row of u and ``R_n`` that of row n of W, output n is off by at most
    ``r / 126 |W_n|_1 + R_n / 254 (|u|_1 + K r / 126)``, and typically by far less.

    Args:
        weight: (N, K), on the CPU.
        bias: (N,), added in full precision.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        with warnings.catch_warnings():
            # torch announces the end of quantised tensors; without them drafts are made in full precision
            warnings.simplefilter("ignore")
            zero = torch.zeros(len(weight), dtype=torch.int64)
            quantised = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantised, None)
        self.bias = None if bias is None else bias.detach()

    def forward(self, u: Tensor) -> Tensor:
        """(..., N) from (..., K), in its dtype."""
        largest = torch.linalg.vector_norm(u, torch.inf, -1, keepdim=True).clamp_(min=torch.finfo(u.dtype).tiny)
        scaled = (u / largest).float()
        out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            scaled, 1 / INPUT_LEVELS, INPUT_LEVELS + 1, self.packed
        )
        out = out.to(u.dtype).mul_(largest)
        return out if self.bias is None else out.add_(self.bias)


@lru_cache(maxsize=1)
def int8_works() -> bool:
    """Whether this build of torch multiplies 8-bit weights; its operators for that may go."""
    weight = torch.tensor([[1.0, -0.5], [0.25, 0.125]])
    try:
        found = Int8Linear(weight)(torch.eye(2))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(torch.allclose(found, weight.T, atol=0.02))


def _usable(weight: Tensor) -> bool:
    """Whether int8 drafts can be made of this weight; a warning if not."""
    if weight.device.type != "cpu":
        reason = f"the model is on {weight.device}, and 8-bit products are for a CPU"
    elif not int8_works():
        reason = f"torch {torch.__version__} on this machine lacks 8-bit products"
    else:
        return True
    warnings.warn(f"drafts are made in full precision: {reason}; a smaller draft vocabulary also helps", stacklevel=3)
    return False


def _large(network: nn.Module) -> list[nn.Linear]:
    """Plain linear layers that gain by 8 bits."""
    return [m for m in network.modules() if type(m) is nn.Linear and m.weight.numel() >= INT8_LEAST]


def _checked(vocabulary: Tensor, size: int) -> Tensor:
    """A draft vocabulary, if it is one."""
    if vocabulary.ndim != 1 or vocabulary.dtype is not torch.int64 or not len(vocabulary):
        raise NextLatError(
            f"the draft vocabulary is {vocabulary.dtype} of shape {tuple(vocabulary.shape)}; give int64 token ids in "
            "one dimension, at least one"
        )
    if not bool((vocabulary.diff() > 0).all()):
        raise NextLatError("the draft vocabulary is not increasing; give every token once, in order of the ids")
    if int(vocabulary[0]) < 0 or int(vocabulary[-1]) >= size:
        raise NextLatError(
            f"the draft vocabulary holds tokens {int(vocabulary[0])} to {int(vocabulary[-1])}; "
            f"ids of this model lie between 0 and {size - 1}"
        )
    return vocabulary.clone()
