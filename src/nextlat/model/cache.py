"""The key-value cache of the trunk."""

from __future__ import annotations

import torch
from torch import Tensor

from nextlat.errors import NextLatError


class Cache:
    """Keys and values of every layer, preallocated, for rows that advance together.

    Args:
        shape: (n_layers, rows, capacity, n_heads, head_width).
        like: a tensor whose dtype and device the cache takes.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], like: Tensor) -> None:
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        """How many positions fit."""
        return int(self.keys.shape[2])

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, T, n_heads, head_width) new keys and values of a layer; return all seen so far."""
        stop = self.length + keys.shape[1]
        if stop > self.capacity:
            raise NextLatError(f"the cache holds {self.capacity} positions and {stop} are needed; make it larger")
        self.keys[layer, :, self.length : stop] = keys
        self.values[layer, :, self.length : stop] = values
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]
