"""The key-value cache of the trunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from nextlat.errors import NextLatError


class Cache:
    """Keys and values of every layer, preallocated; every row has a length of its own.

    What lies behind a row's length is junk that the next call overwrites, so that going back costs nothing:
    set :attr:`lengths` to what shall be remembered.

    Args:
        shape: (n_layers, rows, capacity, n_heads, head_width).
        like: a tensor whose dtype and device the cache takes.
    """

    stores: ClassVar[tuple[str, ...]] = ("keys", "values")
    """Names of what is kept of every position, (layers, rows, n, capacity, w) each."""

    def __init__(self, shape: tuple[int, int, int, int, int], like: Tensor) -> None:
        layers, rows, capacity, n_heads, head_width = shape
        # One head's keys lie together, as its product with a query wants them. Places not yet written are masked, but
        # must be finite: no weight times NaN is not nothing.
        self.keys = torch.zeros(layers, rows, n_heads, capacity, head_width, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * rows
        """Positions that each row remembers."""

    @property
    def capacity(self) -> int:
        """How many positions fit."""
        return int(self.keys.shape[3])

    @property
    def longest(self) -> int:
        """Length of the longest row."""
        return max(self.lengths, default=0)

    @property
    def even(self) -> bool:
        """Whether all rows have the same length."""
        return len(set(self.lengths)) <= 1

    def positions(self, length: int) -> Tensor:
        """(T,), or (B, T) when lengths differ: where the next T tokens of each row stand."""
        steps = torch.arange(length, device=self.keys.device)
        return steps + (self.longest if self.even else torch.tensor(self.lengths, device=steps.device)[:, None])

    def mask(self, length: int) -> Tensor | None:
        """Which keys the next T tokens may look at: (T, S) or (B, 1, T, S) bool.

        ``None`` where no mask is needed: one token looks at everything, and at the beginning the causal rule does.
        """
        if self.even and (length == 1 or self.longest == 0):
            return None
        keys = torch.arange(self.longest + length, device=self.keys.device)
        visible = keys <= self.positions(length)[..., None]
        return visible if self.even else visible[:, None]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, T, n_heads, head_width) new keys and values of a layer behind each row's length.

        Returns:
            (B, S, n_heads, head_width) keys and values, with S up to the end of the longest row.
        """
        stop = self.longest + keys.shape[1]
        if stop > self.capacity:
            raise NextLatError(f"the cache holds {self.capacity} positions and {stop} are needed; make it larger")
        self.put(self.keys[layer], keys)
        self.put(self.values[layer], values)
        return self.keys[layer, :, :, :stop].transpose(1, 2), self.values[layer, :, :, :stop].transpose(1, 2)

    def put(self, store: Tensor, new: Tensor) -> None:
        """Write (B, T, n, w) behind each row's length into one layer, (B, n, capacity, w), of a store."""
        if self.even:
            store[:, :, self.longest : self.longest + new.shape[1]] = new.transpose(1, 2)
        else:
            rows = torch.arange(len(new), device=new.device)[:, None]
            store[rows, :, self.positions(new.shape[1])] = new

    def advance(self, length: int) -> None:
        """Remember T more positions of every row, after all layers have stored them."""
        self.lengths = [one + length for one in self.lengths]

    def keep(self, places: Sequence[Sequence[int]], begins: Sequence[int]) -> None:
        """Of what was stored behind ``begins``, remember chosen places of each row, moved together in order.

        Args:
            places: for each row, increasing offsets behind its beginning, such as a path in a tree of drafts.
            begins: for each row, the length that it had before.
        """
        for row, (chosen, begin) in enumerate(zip(places, begins, strict=True)):
            if list(chosen) != list(range(len(chosen))):
                source = torch.tensor(chosen, device=self.keys.device) + begin
                for name in self.stores:
                    store = getattr(self, name)
                    store[:, row, :, begin : begin + len(chosen)] = store[:, row, :, source]
        self.lengths = [begin + len(chosen) for chosen, begin in zip(places, begins, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with chosen rows only, in the order given."""
        index = torch.tensor(rows, device=self.keys.device)
        for name in self.stores:
            setattr(self, name, getattr(self, name).index_select(1, index))
        self.lengths = [self.lengths[row] for row in rows]
