"""Claims on the latent dynamics network ``p(s, e) = s + L3 gelu(L2 gelu(L1 RMSNorm([e ; s])))``.

Each claim but the first picks inputs on which only the mistake it is about can show.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nextlat.conformance import reference
from nextlat.conformance.cases import draw
from nextlat.conformance.claims import ContractError, Function, claim, expect, expect_same


class Inputs(NamedTuple):
    """What a dynamics function is called with."""

    state: Tensor
    """(..., D)."""
    embedding: Tensor
    """(..., D)."""
    gain: Tensor
    """(2D,)."""
    layer_1: Tensor
    """(m, 2D), as ``torch.nn.Linear`` stores it."""
    layer_2: Tensor
    """(m, m)."""
    layer_3: Tensor
    """(D, m)."""


class Network:
    """A dynamics function behind its contract.

    Args:
        function: ``function(state, embedding, gain, layer_1, layer_2, layer_3) -> state``, called with
            positional arguments.
    """

    def __init__(self, function: Function) -> None:
        self.function = function

    def __call__(self, inputs: Inputs) -> Tensor:
        """The next state.

        Raises:
            ContractError: something else than a floating-point tensor like the state came back.
        """
        found = self.function(*(part.clone() for part in inputs))
        if not isinstance(found, Tensor):
            raise ContractError(f"returned {type(found).__name__}, expected a tensor")
        if found.shape != inputs.state.shape:
            shape = tuple(inputs.state.shape)
            raise ContractError(f"returned shape {tuple(found.shape)} for a state of shape {shape}, expected {shape}")
        return found


BALANCED = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
"""Entries of mean 0 and mean square 1: RMSNorm and LayerNorm agree on it, and a norm hardly changes it."""


def network(state: Tensor, embedding: Tensor, hidden_dim: int = 5, symmetric: bool = False) -> Inputs:
    """Inputs with gain 1 and random layers; symmetric ones do not see which half of the input is which."""
    width = state.shape[-1]
    layer_1 = draw(hidden_dim, 2 * width, seed=1)
    if symmetric:
        layer_1 = layer_1[:, :width].repeat(1, 2)
    layers = layer_1, draw(hidden_dim, hidden_dim, seed=2), draw(width, hidden_dim, seed=3)
    return Inputs(state, embedding, torch.ones(2 * width, dtype=torch.float64), *layers)


def expect_reference(found: Tensor, inputs: Inputs, tolerance: float, why: str) -> None:
    """Fail unless the output is that of the formula."""
    expect_same("the next state", found, reference.dynamics(*inputs), tolerance, why)


@claim("worked-vector")
def worked_vector(dynamics: Network) -> None:
    """The two-dimensional example with gain 1 gives (1.32704219, -0.25001009)."""

    def table(*rows: list[float]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    inputs = Inputs(
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        torch.tensor([2.0, 0.0], dtype=torch.float64),
        torch.ones(4, dtype=torch.float64),
        table([1, 0, 0, 1], [0, 1, -1, 0]),
        table([1, 1], [0, -1]),
        table([1, 0], [2, 1]),
    )
    expected = torch.tensor([1.32704219, -0.25001009], dtype=torch.float64)
    expect_same("the next state", dynamics(inputs), expected, 1e-7)


@claim("concatenation-order")
def concatenation_order(dynamics: Network) -> None:
    """The embedding comes first: [e ; s], not [s ; e]."""
    inputs = network(BALANCED, torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64))
    expect_reference(dynamics(inputs), inputs, 0.01, "the order is [embedding ; state]")


@claim("rms-norm")
def rms_norm(dynamics: Network) -> None:
    """The norm divides by the root mean square and subtracts no mean."""
    shifted = torch.tensor([1.8, 0.8, 0.3, 0.1], dtype=torch.float64)
    shifted = shifted / shifted.square().mean().sqrt()
    inputs = network(shifted, shifted)
    expect_reference(dynamics(inputs), inputs, 0.01, "RMSNorm, not LayerNorm")


@claim("joint-norm")
def joint_norm(dynamics: Network) -> None:
    """One norm runs over all 2D entries together, not over embedding and state apart."""
    inputs = network(BALANCED, 4 * BALANCED, symmetric=True)
    expect_reference(dynamics(inputs), inputs, 0.01, "one norm over [embedding ; state]")


@claim("gain")
def gain(dynamics: Network) -> None:
    """The norm's learned gain has 2D entries and is applied."""
    inputs = network(BALANCED, BALANCED, symmetric=True)
    half = torch.tensor([0.2, 1.7, 3.0, -1.0], dtype=torch.float64)
    inputs = inputs._replace(gain=half.repeat(2))
    expect_reference(dynamics(inputs), inputs, 0.01, "is the gain applied?")


@claim("exact-gelu")
def exact_gelu(dynamics: Network) -> None:
    """GELU is the exact one, by the error function, after the first and after the second layer."""
    inputs = network(BALANCED, BALANCED)
    inputs = inputs._replace(layer_3=100 * inputs.layer_3)
    expect_reference(dynamics(inputs), inputs, 5e-4, "GELU by erf, not by tanh")


@claim("raw-residual")
def raw_residual(dynamics: Network) -> None:
    """The un-normalised state is added, and the sum is not normalised again."""
    state = torch.tensor([3.0, -0.5, 0.25, 7.0], dtype=torch.float64)
    inputs = network(state, BALANCED)
    inputs = inputs._replace(layer_3=torch.zeros_like(inputs.layer_3))
    expect_same("the next state when L3 is 0", dynamics(inputs), state, 1e-9, "the state itself must come back")


@claim("epsilon")
def epsilon(dynamics: Network) -> None:
    """The norm adds 1e-5 to the mean square under the root; a zero input gives a zero output."""
    zero = torch.zeros(4, dtype=torch.float64)
    found = dynamics(network(zero, zero))
    expect(bool((found == 0).all()), f"a zero state and embedding give {found.tolist()}, expected zeros")
    inputs = network(0.003 * BALANCED, 0.003 * BALANCED)
    why = "1e-5 is added to the mean square, here 9e-6"
    expect_reference(dynamics(inputs), inputs, 0.01, why)


@claim("leading-dimensions")
def leading_dimensions(dynamics: Network) -> None:
    """(..., D) states are mapped one by one, whatever stands before them."""
    rows = network(draw(2, 3, 4, seed=4), draw(2, 3, 4, seed=5))
    found = dynamics(rows)
    for b in range(2):
        for t in range(3):
            single = rows._replace(state=rows.state[b, t], embedding=rows.embedding[b, t])
            expect_same(f"the next state of (row, t) ({b}, {t})", found[b, t], dynamics(single), why="as alone")


CLAIMS = [
    worked_vector,
    concatenation_order,
    rms_norm,
    joint_norm,
    gain,
    exact_gelu,
    raw_residual,
    epsilon,
    leading_dimensions,
]
