"""Packed documents: attention document by document against a dense document mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.batch import Batch
from nextlat.bench.loops import TRAINING, Shape, ours_step, trunk
from nextlat.bench.results import Effort, Result, milliseconds
from nextlat.model.attention import Layout, attend, document_layout, run_index
from nextlat.timing import compare, interleave, seconds
from nextlat.training.optimizers import make_optimizer

RAGGED = (100, 300, 50, 574)
EQUAL = (256, 256, 256, 256)


class Plan(NamedTuple):
    """What to measure at an effort."""

    documents: tuple[tuple[int, ...], tuple[int, ...]]
    """Lengths of the documents of a row: ragged, then equal ones."""
    width: int
    n_heads: int
    n_layers: int
    vocab: int
    repetitions: int
    """Of attention alone."""
    steps: int
    """Repetitions of the train step."""


PLANS: dict[Effort, Plan] = {
    "full": Plan((RAGGED, EQUAL), 256, 4, 6, 1_000, 31, 9),
    "quick": Plan((RAGGED, EQUAL), 256, 4, 6, 1_000, 9, 3),
    "tiny": Plan(((3, 9, 1, 7), (5, 5, 5, 5)), 8, 2, 1, 11, 2, 2),
}


def document_ids(lengths: Sequence[int]) -> Tensor:
    """(1, T) ids of documents of the given lengths."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def dense_mask(documents: Tensor) -> Tensor:
    """(B, 1, T, T) bool: the same document, and not later."""
    run = run_index(documents)
    return (run[:, :, None] == run[:, None, :]).tril()[:, None]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One attention call over the whole row: (B, T, n_heads, head_width) -> (B, T, D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def products_limit(lengths: Sequence[int]) -> float:
    """Multiply-adds of attention over the full square, over those below the diagonal inside documents."""
    return sum(lengths) ** 2 / (sum(n * (n + 1) for n in lengths) / 2)


def forward_backward(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output and the gradients of q, k, v under a fixed upstream gradient, the last of the inputs."""
    q, k, v, upstream = inputs
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


def make_inputs(length: int, width: int, n_heads: int) -> list[Tensor]:
    """q, k, v (1, T, n_heads, head_width), and a gradient of the output (1, T, D)."""
    g = torch.Generator().manual_seed(0)
    shape = (1, length, n_heads, width // n_heads)
    leaves = [torch.randn(shape, generator=g).requires_grad_() for _ in range(3)]
    return [*leaves, torch.randn(1, length, width, generator=g)]


def kernel_alone(inputs: Sequence[Tensor], lengths: Sequence[int]) -> Callable[[], list[tuple[Tensor, ...]]]:
    """Torch's causal kernel on each document, forward and backward, with all that lies around it done beforehand."""
    parts = [x.detach().view(inputs[0].shape).transpose(1, 2) for x in inputs]
    split = [torch.split(x, list(lengths), 2) for x in parts]  # (1, n_heads, L, head_width)
    documents = [[x.clone() for x in document] for document in zip(*split, strict=True)]
    leaves = [[x.requires_grad_() for x in document[:3]] for document in documents]

    def passes() -> list[tuple[Tensor, ...]]:
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in leaves]
        ways = zip(outputs, leaves, documents, strict=True)
        return [torch.autograd.grad(out, qkv, document[3]) for out, qkv, document in ways]

    return passes


def run(effort: Effort) -> Iterator[Result]:
    """Attention alone with ragged and equal documents, then a whole train step."""
    plan = PLANS[effort]
    for kind, lengths in zip(("ragged", "equal"), plan.documents, strict=True):
        yield from attention_alone(kind, lengths, plan)
    yield from train_step(plan.documents[0], plan)


def attention_alone(kind: str, lengths: Sequence[int], plan: Plan) -> Iterator[Result]:
    """Forward and backward pass, with mask and layout made beforehand and made anew each time."""
    documents = document_ids(lengths)
    inputs = make_inputs(documents.shape[1], plan.width, plan.n_heads)
    mask, layout = dense_mask(documents), document_layout(documents)

    def with_mask(mask: Tensor) -> list[Tensor]:
        return forward_backward(lambda q, k, v: dense(q, k, v, mask), inputs)

    def with_layout(layout: Layout) -> list[Tensor]:
        return forward_backward(lambda q, k, v: attend(q, k, v, layout), inputs)

    setting = {
        "documents": "/".join(map(str, lengths)),
        "D": plan.width,
        "heads": plan.n_heads,
        "reps": plan.repetitions,
    }
    found = interleave(
        {
            "dense": lambda: with_mask(mask),
            "ours": lambda: with_layout(layout),
            "dense, mask made": lambda: with_mask(dense_mask(documents)),
            "ours, layout made": lambda: with_layout(document_layout(documents)),
            "kernel": kernel_alone(inputs, lengths),
        },
        plan.repetitions,
    )
    details = {f"{name}_seconds": seconds(timing) for name, timing in found.items()}
    details["products_limit"] = products_limit(lengths)
    for name, slow, fast in (
        (f"attention, {kind}: dense mask / ours", "dense", "ours"),
        (f"attention, {kind}: the same with mask and layout made", "dense, mask made", "ours, layout made"),
    ):
        ratio = compare(found[slow], found[fast])
        yield Result(
            name,
            ratio.value,
            3.0 if slow == "dense" else None,
            wall=ratio.wall,
            spread=(ratio.low, ratio.high),
            limit=compare(found[slow], found["kernel"]).value,
            note="limit of attention alone: measured, torch's causal kernel on every document and nothing around it",
            of=milliseconds(seconds(found[slow]), seconds(found[fast])),
            setting=setting,
            details=details,
        )
    (out, *gradients), (expected, *others) = with_layout(layout), with_mask(mask)
    for what, error in (
        ("outputs", float((out - expected).abs().max())),
        ("gradients", max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients, others, strict=True))),
    ):
        yield Result(f"attention, {kind}: largest difference of {what}", error, 1e-6, False, setting=setting)


def train_step(lengths: Sequence[int], plan: Plan) -> Iterator[Result]:
    """A gpt step on one packed row, mask and layout made in it."""
    documents = document_ids(lengths)
    shape = Shape(plan.n_layers, plan.width, plan.n_heads, plan.vocab, 1, documents.shape[1])
    g = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(plan.vocab, documents.shape, generator=g) for _ in range(2))
    model = trunk(shape)
    optimizer = make_optimizer(model, TRAINING)

    def masked() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        positions = document_layout(documents).positions
        hidden = model.hidden_states(tokens, positions=positions, mask=dense_mask(documents))
        loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    step = ours_step("gpt", shape, Batch(tokens, targets, documents))
    difference = abs(float(masked()) - float(step()))
    found = interleave({"dense": masked, "ours": step}, plan.steps)
    ratio = compare(found["dense"], found["ours"])
    setting = {**shape.described(), "documents": "/".join(map(str, lengths)), "reps": plan.steps}
    yield Result(
        "train step, ragged: dense mask / ours",
        ratio.value,
        1.3,
        wall=ratio.wall,
        spread=(ratio.low, ratio.high),
        limit=step_limit(shape, lengths),
        note="limit of the packed train step: multiply-adds with the whole square over those without, no optimiser",
        of=milliseconds(seconds(found["dense"]), seconds(found["ours"])),
        setting=setting,
        details={f"{name}_seconds": seconds(timing) for name, timing in found.items()},
    )
    yield Result("train step, ragged: difference of the losses", difference, 1e-5, False, setting=setting)


def step_limit(shape: Shape, lengths: Sequence[int]) -> float:
    """Multiply-adds of a forward pass with whole squares of attention, over those inside documents."""
    linear = shape.tokens * shape.linear_products
    inside = shape.n_layers * shape.width * sum(n * (n + 1) for n in lengths)
    return (linear + 2 * shape.n_layers * shape.width * sum(lengths) ** 2) / (linear + inside)
