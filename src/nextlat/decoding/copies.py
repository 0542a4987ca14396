"""Copies of models that share every weight with the original and differ in some layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def modules_in(owner: object) -> Iterator[nn.Module]:
    """All modules of a module, or of the modules that an object holds as attributes."""
    held = [owner] if isinstance(owner, nn.Module) else [x for x in vars(owner).values() if isinstance(x, nn.Module)]
    for module in held:
        yield from module.modules()


def with_layers(owner: T, layers: Mapping[nn.Module, nn.Module]) -> T:
    """A copy with some modules replaced wherever they stand.

    Parameters and buffers are those of the original, not copies, and the original is not touched.

    Args:
        owner: a module, or an object that holds modules as attributes.
        layers: module of the original -> what takes its place.
    """
    known: dict[int, object] = {}
    for module in modules_in(owner):
        known |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    known |= {id(old): new for old, new in layers.items()}
    return copy.deepcopy(owner, known)
