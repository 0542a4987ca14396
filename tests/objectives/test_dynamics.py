"""The latent dynamics network against a hand-computed vector and an entry-by-entry formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nextlat.errors import NextLatError
from nextlat.objectives.dynamics import GatedDynamics, LatentDynamics, NormalisedDynamics, find_dynamics
from nextlat.objectives.nextlat import NextLat
from tests.objectives.cases import small_trunk
from tests.oracles.nextlat import dynamics_reference
from tests.tiny import run_whole, tiny, weights


def by_hand() -> LatentDynamics:
    dynamics = LatentDynamics(2, 2).double()
    with torch.no_grad():
        dynamics.layer_1.weight.copy_(torch.tensor([[1.0, 0, 0, 1], [0, 1, -1, 0]]))
        dynamics.layer_2.weight.copy_(torch.tensor([[1.0, 1], [0, -1]]))
        dynamics.layer_3.weight.copy_(torch.tensor([[1.0, 0], [2, 1]]))
    return dynamics


def test_vector_computed_by_hand() -> None:
    # state first in the concatenation would give 1.46333818, LayerNorm 0.92795839, tanh GELU 1.32687517
    out = by_hand()(torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(out, torch.tensor([1.32704219, -0.25001009], dtype=torch.float64), rtol=0, atol=1e-8)


def test_every_entry_equals_the_formula_with_uneven_gains() -> None:
    g = torch.Generator().manual_seed(0)
    dynamics = LatentDynamics(3, 5, generator=g).double()
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter.normal_(0.5, 1.0, generator=g)
    state = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    embedding = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    out = dynamics(state, embedding)
    weights = (dynamics.norm.weight, dynamics.layer_1.weight, dynamics.layer_2.weight, dynamics.layer_3.weight)
    for b in range(2):
        for t in range(4):
            expected = dynamics_reference(state[b, t], embedding[b, t], *weights)
            torch.testing.assert_close(out[b, t], expected, rtol=0, atol=1e-12)


def test_the_norm_runs_over_state_and_embedding_jointly() -> None:
    # norms of the halves apart would not see that the embedding grew
    state, small = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([2.0, 0.0], dtype=torch.float64)
    dynamics = by_hand()
    assert not torch.allclose(dynamics(state, small), dynamics(state, 10 * small), rtol=0, atol=1e-3)


def test_zero_input_stays_zero_and_has_finite_gradients() -> None:
    state = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    out = by_hand()(state, torch.zeros(2, dtype=torch.float64))
    assert out.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(out.sum(), state)
    assert gradient.isfinite().all()


def test_epsilon_of_the_norm_is_1e_5() -> None:
    state = torch.tensor([3e-3, 1e-3], dtype=torch.float64)
    embedding = torch.tensor([-2e-3, 2e-3], dtype=torch.float64)
    dynamics = by_hand()
    weights = (dynamics.norm.weight, dynamics.layer_1.weight, dynamics.layer_2.weight, dynamics.layer_3.weight)
    expected = dynamics_reference(state, embedding, *weights)
    torch.testing.assert_close(dynamics(state, embedding), expected, rtol=0, atol=1e-12)


def test_the_output_is_not_normalised_again() -> None:
    dynamics = LatentDynamics(4, 6, zero_init_output=True)
    state = torch.tensor([100.0, -3.0, 0.5, 0.0])
    assert torch.equal(dynamics(state, torch.ones(4)), state)


def test_zero_init_output_is_the_identity_with_a_live_gradient() -> None:
    dynamics = LatentDynamics(4, 6, zero_init_output=True, generator=torch.Generator().manual_seed(0))
    state, embedding = torch.randn(3, 4), torch.randn(3, 4)
    out = dynamics(state, embedding)
    assert torch.equal(out, state)
    out.square().sum().backward()
    assert dynamics.layer_3.weight.grad is not None
    assert dynamics.layer_3.weight.grad.abs().max() > 0


def test_three_matrices_one_gain_and_no_biases() -> None:
    shapes = {name: tuple(value.shape) for name, value in LatentDynamics(4, 6).state_dict().items()}
    assert shapes == {
        "norm.weight": (8,),
        "layer_1.weight": (6, 8),
        "layer_2.weight": (6, 6),
        "layer_3.weight": (4, 6),
    }


def test_initial_weights_have_std_0_02_and_come_from_the_given_generator() -> None:
    torch.manual_seed(0)
    one = LatentDynamics(64, 128, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    other = LatentDynamics(64, 128, generator=torch.Generator().manual_seed(5))
    for (name, value), (_, same) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(value, same), name
        if value.ndim > 1:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert (value == 1).all()


@pytest.mark.parametrize("hidden_dim", [0, -3])
def test_a_dynamics_without_width_is_refused(hidden_dim: int) -> None:
    # elsewhere a width derived from the model width rounds to 0 and silently trains no dynamics at all
    with pytest.raises(NextLatError, match=f"dynamics.hidden_dim is {hidden_dim}"):
        LatentDynamics(4, hidden_dim)


# Experiments


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_normalised_variant_is_the_method_with_a_norm_behind_it() -> None:
    plain = LatentDynamics(3, 5, generator=torch.Generator().manual_seed(1)).double()
    normalised = NormalisedDynamics(3, 5, generator=torch.Generator().manual_seed(1)).double()
    normalised.output_norm.weight.data = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    state, embedding = seeded(4, 3), seeded(4, 3, seed=1)
    raw = plain(state, embedding)
    expected = raw / (raw.square().mean(-1, keepdim=True) + 1e-5).sqrt() * torch.tensor([1.0, 2.0, -1.0])
    torch.testing.assert_close(normalised(state, embedding), expected)


def test_a_gated_cell_by_the_formula() -> None:
    cell = GatedDynamics(3, 5, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.normal_(0.3, 1.0, generator=torch.Generator().manual_seed(parameter.numel()))
    s, e = seeded(3), seeded(3, seed=1)

    def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return gain * x / (x.square().mean() + 1e-5).sqrt()

    u = normed(torch.cat([e, s]), cell.gate_norm.weight)
    z, r = (1 / (1 + torch.exp(-(m.weight @ u))) for m in (cell.update, cell.reset))
    v = normed(torch.cat([e, r * s]), cell.candidate_norm.weight)
    candidate = cell.layer_2.weight @ F.gelu(cell.layer_1.weight @ v)
    torch.testing.assert_close(cell(s, e), (1 - z) * s + z * candidate)


def test_the_update_gate_keeps_or_replaces_the_state() -> None:
    cell = GatedDynamics(2, 4, generator=torch.Generator().manual_seed(0)).double()
    s, e = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    cell.update.weight.data.fill_(-1e3)  # the normed input has a positive sum
    assert torch.equal(cell(s, e), s)
    cell.update.weight.data.fill_(1e3)
    cell.layer_2.weight.data.zero_()
    assert not cell(s, e).any()


@pytest.mark.parametrize("kind", ["mlp", "normalised", "gru"])
def test_every_kind_takes_rows_of_states_and_lets_gradients_through(kind: str) -> None:
    network = find_dynamics(kind)(4, 6, generator=torch.Generator().manual_seed(0)).double()
    state, embedding = seeded(2, 3, 4).requires_grad_(), seeded(2, 3, 4, seed=1).requires_grad_()
    out = network(state, embedding)
    assert out.shape == state.shape
    torch.testing.assert_close(out[1, 2], network(state[1, 2], embedding[1, 2]))
    # a sum of squares of normed rows is nearly constant, so weigh the entries
    loss = (out * seeded(2, 3, 4, seed=2)).sum()
    for gradient in torch.autograd.grad(loss, [state, embedding, *network.parameters()]):
        assert (gradient != 0).any()


@pytest.mark.parametrize("kind", ["normalised", "gru"])
def test_a_kind_is_chosen_by_the_configuration_trained_and_saved(kind: str, runs: Path) -> None:
    path = run_whole(tiny("nextlat", f"objective.dynamics.kind={kind}"), runs)
    names = {name.rsplit(".", 2)[-2] for name in weights(path) if name.startswith("objective.")}
    assert names >= ({"output_norm", "layer_3"} if kind == "normalised" else {"update", "reset"})


def test_options_that_a_kind_does_not_have_are_refused() -> None:
    with pytest.raises(NextLatError, match="kind gru is not one"):
        GatedDynamics(4, 4, zero_init_output=True)
    with pytest.raises(NextLatError, match="hidden_dim is 0"):
        GatedDynamics(4, 0)
    with pytest.raises(NextLatError, match=r"'gur'.*gru"):
        NextLat(small_trunk(), dynamics=4, kind="gur")
    start = NormalisedDynamics(3, 4, zero_init_output=True).double()
    unit = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(start(unit, unit), unit, rtol=1e-4, atol=0)
