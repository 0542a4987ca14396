"""What a train step cannot do without: multiply-adds counted from the shapes, and the time they take here."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.bench.loops import TRAINING, Shape, Step, trunk
from nextlat.model.trunk import feed_forward_width
from nextlat.training.optimizers import make_optimizer


def gpt_products(shape: Shape) -> int:
    """Multiply-adds of a batch, forward and backward: a matrix costs as much again for each of its two gradients."""
    return 3 * (shape.tokens * shape.linear_products + shape.attention_products)


def nextlat_extra_products(shape: Shape, horizon: int, hidden_dim: int) -> int:
    """What nextlat adds to :func:`gpt_products`.

    A rollout step costs the dynamics three times (forward, and two gradients) and the head twice: student logits
    and the gradient of the state, since the head is frozen there and the teacher's logits are those of the
    cross-entropy.
    """
    dynamics = 2 * shape.width * hidden_dim + hidden_dim**2 + hidden_dim * shape.width
    positions = sum(shape.rows * (shape.length - step) for step in range(1, horizon + 1))
    return positions * (3 * dynamics + 2 * shape.width * shape.vocab)


def nextlat_floor(shape: Shape, horizon: int, hidden_dim: int) -> float:
    """Multiply-adds of a nextlat step over those of a gpt step, before the optimiser."""
    return 1 + nextlat_extra_products(shape, horizon, hidden_dim) / gpt_products(shape)


def least_step(shape: Shape) -> Step:
    """What a gpt step cannot do without in torch's ready kernels: products, attention, AdamW and single passes.

    The passes write into memory that is there beforehand, over the same few tensors, which stay in the caches; no
    graph is recorded but that of attention. What results is no training, only its time.
    """
    model = trunk(shape)
    optimizer = make_optimizer(model, TRAINING)
    matrices = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {n: torch.randn(shape.tokens, n) for n in {size for matrix in matrices for size in matrix.shape}}
    heads = (shape.rows, shape.n_heads, shape.length, shape.width // shape.n_heads)
    q, k, v = (torch.randn(heads, requires_grad=True) for _ in range(3))
    upstream = torch.randn(heads)
    between = passes(shape)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> Tensor:
        for matrix in matrices:
            rows, columns = matrix.shape
            x, y = inputs[columns], inputs[rows]
            x @ matrix.T, y @ matrix, y.T @ x
        for _ in range(shape.n_layers):
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), upstream)
        between()
        optimizer.step()
        return q

    return step


def passes(shape: Shape) -> Callable[[], None]:
    """What lies between the products of a gpt step, forward and backward, each in as few passes as torch can.

    For each block two norms, the turn of queries and keys, the gate, and the sums of the residual stream and of the
    gradients that meet there; then the last norm, the embedding, and the softmax with the cross-entropy's gradient.
    """
    tokens, width, half = shape.tokens, shape.width, shape.width // shape.n_heads // 2
    u, g, into, other = (torch.randn(tokens, width) for _ in range(4))
    gain, rate = torch.ones(width), torch.empty(tokens, 1)
    gate, up, act, d_act, d_gate = (torch.randn(tokens, feed_forward_width(width)) for _ in range(5))
    pairs = torch.randn(shape.rows, shape.length, shape.n_heads, half, dtype=torch.complex64)
    turns, turned = torch.randn_like(pairs[0]), torch.empty_like(pairs)
    logits, probabilities = torch.randn(tokens, shape.vocab), torch.empty(tokens, shape.vocab)
    targets = torch.randint(shape.vocab, (tokens, 1))
    table, d_table = torch.randn(shape.vocab, width), torch.zeros(shape.vocab, width)

    def norm() -> None:
        torch.linalg.vector_norm(u, dim=-1, keepdim=True, out=rate)
        torch.mul(u, rate, out=into).mul_(gain)

    def norm_backward() -> None:
        torch.mul(g, u, out=into)
        pull = into @ gain
        rate[:, 0] @ into
        torch.mul(g, gain, out=other).addcmul_(u, pull[:, None]).mul_(rate)

    def step() -> None:
        torch.index_select(table, 0, targets[:, 0], out=into)
        for _ in range(shape.n_layers):
            norm()
            for _ in range(4):  # queries and keys, there and back
                torch.mul(pairs, turns, out=turned)
            norm()
            torch.ops.aten.silu.out(gate, out=act)
            torch.mul(act, up, out=d_act)
            torch.mul(d_act, act, out=d_gate)
            torch.mul(d_act, up, out=d_gate)
            torch.ops.aten.silu_backward.grad_input(d_act, gate, grad_input=d_gate)
            for _ in range(7):  # two residual sums, and where gradients of 2, 3, 2 and 2 paths meet
                torch.add(u, g, out=into)
            norm_backward()
            norm_backward()
        norm()
        torch.softmax(logits, -1, out=probabilities)
        probabilities.scatter_(1, targets, 0.0)
        norm_backward()
        d_table.zero_().index_add_(0, targets[:, 0], g)

    return step
