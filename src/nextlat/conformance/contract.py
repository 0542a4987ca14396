"""The contracts of loss functions: how they are called and what they must return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextlat.conformance.cases import Case, halfway
from nextlat.conformance.claims import ContractError, Function, expect_number

Dynamics = Callable[[Tensor, Tensor], Tensor]


class Sum(NamedTuple):
    """One term."""

    value: Tensor
    """Scalar, with its graph."""
    number: int
    """How many elements the sum runs over."""


Terms = dict[str, Sum]


def expect_term(name: str, found: Sum, value: float, number: int, tolerance: float = 1e-9, why: str = "") -> None:
    """Fail unless a term has this sum and count."""
    expect_number(f"the sum of {name}", found.value.item(), value, tolerance, why, number)
    expect_number(f"the count of {name}", found.number, number, why=why)


def called(function: Function, leaves: Mapping[str, Tensor], *arguments: Any) -> Any:
    """What the function returns.

    Raises:
        ContractError: it changed one of the leaves or filled its ``.grad``.
    """
    before = {name: part.detach().clone() for name, part in leaves.items()}
    returned = function(*arguments)
    for name, part in leaves.items():
        if not torch.allclose(part.detach(), before[name], rtol=0.0, atol=0.0, equal_nan=True):
            raise ContractError(f"the call changed {name} in place; work on a copy of it")
        if part.grad is not None:
            raise ContractError(f"the call filled {name}.grad; leave backward() to the caller of the loss")
    return returned


def step_names(horizon: int, *kinds: str, start: int = 1) -> list[str]:
    """``kind_1 ... kind_d`` of every kind, or from a later step on."""
    return [f"{kind}_{step}" for kind in kinds for step in range(start, horizon + 1)]


class Losses:
    """A NextLat loss behind its contract.

    Args:
        function: ``function(hidden, embedding_weight, head_weight, tokens, targets, documents, horizon,
            dynamics) -> {name: (sum, count)}``, called with positional arguments.
    """

    def __init__(self, function: Function) -> None:
        self.function = function

    def __call__(self, case: Case, horizon: int, dynamics: Dynamics = halfway) -> Terms:
        """The terms of a case; the function gets copies of the integer inputs, so that it cannot change them.

        Raises:
            ContractError: the function did or returned something else than the contract asks for.
        """
        tokens, targets = case.tokens.clone(), case.targets.clone()
        documents = None if case.documents is None else case.documents.clone()
        leaves = case.leaves()
        returned = called(self.function, leaves, *leaves.values(), tokens, targets, documents, horizon, dynamics)
        return read_terms(returned, ["ce", *step_names(horizon, "latent", "kl")])


class HeadTerms:
    """Losses of several tokens ahead behind their contract.

    Args:
        function: ``function(states, head_weight, targets, documents, horizon) -> {name: (sum, count)}`` with
            states (d + 1, B, T, D), called with positional arguments.
    """

    def __init__(self, function: Function) -> None:
        self.function = function

    def __call__(self, states: Tensor, head_weight: Tensor, targets: Tensor, documents: Tensor | None) -> Terms:
        """The terms of states, whose first dimension is one longer than the horizon.

        Raises:
            ContractError: the function did or returned something else than the contract asks for.
        """
        horizon = len(states) - 1
        copied = None if documents is None else documents.clone()
        leaves = {"states": states, "head_weight": head_weight}
        returned = called(self.function, leaves, *leaves.values(), targets.clone(), copied, horizon)
        return read_terms(returned, ["ce", *step_names(horizon, "mtp")])


def read_terms(returned: Any, names: list[str]) -> Terms:
    """The terms that a function returned.

    Raises:
        ContractError: no dictionary, other names, no pairs of a scalar tensor and a whole number.
    """
    if not isinstance(returned, Mapping):
        raise ContractError(f"returned {_kind(returned)}, expected a dict of name: (sum, count)")
    lacking = [name for name in names if name not in returned]
    foreign = [str(name) for name in returned if name not in names]
    if lacking or foreign:
        parts = [f"lacks {', '.join(lacking)}"] * bool(lacking) + [f"has unknown {', '.join(foreign)}"] * bool(foreign)
        raise ContractError(f"the returned dict {' and '.join(parts)}; expected the names {', '.join(names)}")
    return {name: _read_term(name, returned[name]) for name in names}


def _read_term(name: str, term: Any) -> Sum:
    if not isinstance(term, tuple | list) or len(term) != 2:
        raise ContractError(f"{name} is {_kind(term)}, expected a pair (sum, count)")
    value, number = term
    if not isinstance(value, Tensor):
        raise ContractError(f"the sum of {name} is {_kind(value)}, expected a scalar tensor")
    if value.shape != ():
        raise ContractError(f"the sum of {name} has shape {tuple(value.shape)}, expected a scalar tensor of shape ()")
    if not value.is_floating_point():
        raise ContractError(f"the sum of {name} is of {value.dtype}, expected a floating-point tensor")
    if isinstance(number, Tensor) and number.numel() == 1:
        number = number.item()
    if not isinstance(number, int | float):
        raise ContractError(f"the count of {name} is {_kind(number)}, expected an int or a tensor with one element")
    if number != number or number in (torch.inf, -torch.inf) or number != int(number):
        raise ContractError(f"the count of {name} is {number}, expected a whole number")
    return Sum(value, int(number))


def _kind(thing: Any) -> str:
    """What a wrong value is, in words."""
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)}"
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)}"
    return "None" if thing is None else f"of type {type(thing).__name__}"
