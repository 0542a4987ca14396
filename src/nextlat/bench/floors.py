"""What a train step cannot do without: multiply-adds, counted from the shapes."""

from __future__ import annotations

from nextlat.bench.loops import Shape


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
