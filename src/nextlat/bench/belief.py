"""The belief state transformer's loss, one sequence at a time, as a reference for the batched one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.batch import Batch
from nextlat.bench.loops import TRAINING, Shape, Step, trunk
from nextlat.objectives import BST
from nextlat.training.optimizers import make_optimizer


def make_bst(shape: Shape) -> BST:
    """All pairs of every row, with id 0 as end token."""
    return BST(trunk(shape), end_token=0, generator=torch.Generator().manual_seed(2))


def closed_batch(shape: Shape) -> Batch:
    """Rows of one document each that end with the end token."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, shape.vocab, (shape.rows, shape.length), generator=g)
    targets = F.pad(tokens[:, 1:], (0, 1), value=0)
    return Batch(tokens, targets, keys=torch.arange(shape.rows))


def sequence_loss(objective: BST, tokens: Tensor, targets: Tensor, f: Tensor, b: Tensor) -> Tensor:
    """Sum over the pairs of one closed document.

    Args:
        objective: its text head and output head are used.
        tokens: (T,).
        targets: (T,).
        f: (T, D) forward states.
        b: (T, D) backward states; entry p is that of the suffix from p + 1.
    """
    t, p = torch.triu_indices(len(tokens), len(tokens))  # the suffix starts behind t
    following, previous = targets[t], tokens[p]
    following, previous = (x.masked_fill(t == p, objective.end_token) for x in (following, previous))
    states = objective.networks.text_head(f[t], b[p])
    head = objective.trunk.head_weight
    parts = [
        F.cross_entropy(F.linear(s, head), y, reduction="sum")
        for s, y in zip(states, (following, previous), strict=True)
    ]
    return parts[0] + parts[1]


def looped_loss(objective: BST, batch: Batch) -> Tensor:
    """Mean over all predictions, with gradients made row by row.

    Both encoders run once on the whole batch. Each row's pairs are differentiated up to detached copies of its
    states, and the sum of these gradients then goes through the encoders: the scheme whose memory is that of one row.
    """
    rows, length = batch.tokens.shape
    states = objective.trunk.hidden_states(batch.tokens), objective.suffix_states(batch)
    leaves = [s.detach().requires_grad_() for s in states]
    count = rows * length * (length + 1)
    total = torch.zeros(())
    for row in range(rows):
        part = sequence_loss(objective, batch.tokens[row], batch.targets[row], leaves[0][row], leaves[1][row]) / count
        part.backward()  # type: ignore[no-untyped-call]
        total += part.detach()
    torch.autograd.backward(states, [leaf.grad for leaf in leaves])
    return total


def looped_step(objective: BST, batch: Batch) -> Step:
    """An update with :func:`looped_loss`."""
    optimizer = make_optimizer(objective, TRAINING)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = looped_loss(objective, batch)
        optimizer.step()
        return loss

    return step
