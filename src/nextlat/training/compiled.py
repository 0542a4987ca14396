"""Compiled blocks, after a check that compiling changed no gradient."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model.trunk import Block, Transformer
from nextlat.objectives import Objective, total_loss

TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
"""Relative error of the whole gradient; bf16 rounds at 0.004 and compiling rounds in other places."""


def compile_blocks(
    objective: Objective,
    batch: Batch,
    autocast: AbstractContextManager[object],
    precision: str,
    backend: str = "inductor",
) -> float:
    """Compile the tensor work of every block, and compare gradients with those from before.

    Only what lies around the attention is compiled, so that documents, masks and caches need no second graph.

    Args:
        objective: on its device.
        batch: rows to compare on.
        autocast: the context that training runs its forward pass in.
        precision: key of :data:`TOLERANCE`.
        backend: of ``torch.compile``.

    Returns:
        the relative error of the gradient.

    Raises:
        NextLatError: there is nothing to compile, the compiler fails, or gradients differ.
    """
    blocks = [module for module in objective.modules() if isinstance(module, Block)]
    if not blocks:
        raise NextLatError("training.compile compiles the blocks of nextlat's own trunk, and this model has none")
    eager = _gradient(objective, batch, autocast)
    for module in objective.modules():
        if isinstance(module, Transformer):
            module.complex_turns = False
    for block in blocks:
        for name in ("project", "mix"):
            setattr(block, name, torch.compile(getattr(block, name), backend=backend))
    try:
        made = _gradient(objective, batch, autocast)
    except Exception as error:  # a compiler fails in many ways
        first = str(error).splitlines()[0] if str(error) else "no message"
        raise NextLatError(
            f"torch.compile failed ({type(error).__name__}: {first}); train with training.compile=false"
        ) from error
    wrong = float((made - eager).norm() / eager.norm().clamp(min=1e-30))
    if not wrong <= TOLERANCE[precision]:
        raise NextLatError(
            f"gradients of the compiled model differ by {wrong:.2g} from eager ones, above {TOLERANCE[precision]}; "
            "train with training.compile=false"
        )
    return wrong


def _gradient(objective: Objective, batch: Batch, autocast: AbstractContextManager[object]) -> Tensor:
    parameters = [p for p in objective.parameters() if p.requires_grad]
    with autocast:
        loss = total_loss(objective(batch))
    return torch.cat([g.flatten().float() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])
