"""What a train step cannot do without: multiply-adds counted from the shapes, and the time they take here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.bench.loops import TRAINING, Shape, Step, trunk
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


def bare_step(shape: Shape) -> Step:
    """Only the matrix products, attention and AdamW of a gpt step: no norm, rotation, gate, residual or loss."""
    model = trunk(shape)
    optimizer = make_optimizer(model, TRAINING)
    matrices = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {n: torch.randn(shape.tokens, n) for n in {size for matrix in matrices for size in matrix.shape}}
    heads = (shape.rows, shape.n_heads, shape.length, shape.width // shape.n_heads)
    q, k, v = (torch.randn(heads, requires_grad=True) for _ in range(3))
    upstream = torch.randn(heads)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> Tensor:
        for matrix in matrices:
            rows, columns = matrix.shape
            x, y = inputs[columns], inputs[rows]
            x @ matrix.T, y @ matrix, y.T @ x
        for _ in range(shape.n_layers):
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), upstream)
        optimizer.step()
        return q

    return step
