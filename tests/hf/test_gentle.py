"""Warm-up, ramp and cap: exact weights at given steps, and gradients that are there or are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextlat import NextLat, NextLatError, total_loss
from nextlat.hf import GentleNextLat
from nextlat.objectives.base import Objective
from tests.hf.models import gpt2, gradients, llama, rows, trunk


def gentle(model: Any = None, **options: Any) -> GentleNextLat:
    return GentleNextLat(
        trunk() if model is None else model, horizon=2, generator=torch.Generator().manual_seed(3), **options
    )


def backward(objective: Objective, *names: str) -> dict[str, torch.Tensor]:
    """Gradients of the named terms, or of all."""
    objective.zero_grad(set_to_none=True)
    terms = objective(rows())
    total_loss({name: terms[name] for name in names} if names else terms).backward()
    return gradients(objective)


def test_with_everything_off_it_is_nextlat() -> None:
    plain = NextLat(trunk(), horizon=2, generator=torch.Generator().manual_seed(3))
    objective = gentle()
    for _ in range(2):
        expected, found = backward(plain), backward(objective)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        objective.advance()


@pytest.mark.parametrize("make", [trunk, llama, gpt2])
def test_the_warm_up_trains_the_dynamics_and_nothing_else(make: Any) -> None:
    objective = gentle(make(), warmup_steps=2)
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2, weight_decay=0.5)
    for step in range(3):
        assert objective.warming_up == (step < 2)
        found = backward(objective)
        moved = {name for name, p in objective.named_parameters() if name in found}
        assert all(name.startswith("dynamics.") for name in moved) == (step < 2)
        optimizer.step()
        objective.advance()
        changed = {name for name, p in objective.named_parameters() if not torch.equal(p, before[name])}
        if step < 2:
            assert changed == {name for name in before if name.startswith("dynamics.")}
    assert {name for name in before if not name.startswith("dynamics.")} <= changed


def test_the_warm_up_reports_the_same_numbers_as_the_joint_phase() -> None:
    warm, joint = gentle(warmup_steps=1)(rows()), gentle()(rows())
    for name, term in joint.items():
        torch.testing.assert_close(warm[name].sum, term.sum)
    assert warm["ce"].weight == 0
    assert not warm["ce"].sum.requires_grad or all(
        not name.startswith("model.") for name in backward(gentle(warmup_steps=1), "ce")
    )


def test_weights_at_given_steps() -> None:
    objective = gentle(warmup_steps=2, ramp_steps=4, latent_weight=2.0, kl_weight=1.0)
    seen = []
    for _ in range(8):
        seen.append(tuple(objective.term_weight(name) for name in ("ce", "latent_1", "kl_2")))
        assert objective(rows())["latent_1"].weight == seen[-1][1]
        objective.advance()
    joint = [(1.0, share, share / 2) for share in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)]
    assert seen == [(0.0, 1.0, 0.5)] * 2 + joint


def test_the_warm_up_ends_after_the_first_step_whose_kl_is_low_enough() -> None:
    objective = gentle(warmup_steps=10, warmup_kl=0.5)
    for kl in (3.0, 0.6, 0.5, 0.4):
        assert objective.warming_up
        objective.advance(kl)
    assert not objective.warming_up
    assert objective.joint_from == 4


def test_without_a_figure_the_mean_kl_of_the_batches_seen_decides() -> None:
    objective = gentle(warmup_steps=10, warmup_kl=1e-9)
    term = objective(rows())["kl_1"]
    objective(rows())
    mean = float(term.sum.detach() / term.count)
    objective.advance()
    assert objective.warming_up
    objective.warmup_kl = mean * 1.001
    objective(rows())
    objective(rows())
    objective.advance()
    assert not objective.warming_up


def test_evaluation_does_not_end_the_warm_up() -> None:
    objective = gentle(warmup_steps=10, warmup_kl=1e9)
    objective.eval()
    objective(rows())
    objective.advance()
    assert objective.warming_up


def at_states(objective: GentleNextLat, *names: str) -> torch.Tensor:
    """The gradient that reaches the trunk's states."""
    caught: list[torch.Tensor] = []
    plain = objective.model.hidden_states

    def watched(*inputs: Any) -> torch.Tensor:
        states = plain(*inputs)
        states.register_hook(caught.append)
        return states

    objective.model.hidden_states = watched  # type: ignore[method-assign, assignment]
    backward(objective, *names)
    del objective.model.hidden_states
    (found,) = caught
    return found


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_the_cap_holds_the_auxiliary_gradient_to_a_share_of_the_main_one(share: float) -> None:
    free = gentle(latent_weight=30.0, kl_weight=30.0)
    ce = at_states(free, "ce")
    auxiliary = at_states(free, "latent_1", "latent_2", "kl_1", "kl_2")
    assert auxiliary.norm() > ce.norm()
    capped = at_states(gentle(latent_weight=30.0, kl_weight=30.0, gradient_cap=share))
    expected = ce + auxiliary * (share * ce.norm() / auxiliary.norm())
    torch.testing.assert_close(capped, expected, rtol=1e-4, atol=1e-6)
    assert torch.isclose((capped - ce).norm(), share * ce.norm(), rtol=1e-3)


def test_a_gradient_below_the_cap_is_not_changed() -> None:
    weights = {"latent_weight": 1e-3, "kl_weight": 1e-3}
    torch.testing.assert_close(at_states(gentle(gradient_cap=1.0, **weights)), at_states(gentle(**weights)))


def test_the_cap_leaves_the_dynamics_and_the_embeddings_of_consumed_tokens_alone() -> None:
    free, capped = backward(gentle(kl_weight=50.0)), backward(gentle(kl_weight=50.0, gradient_cap=0.01))
    for name in free:
        if name.startswith("dynamics."):
            torch.testing.assert_close(capped[name], free[name])


def test_the_schedule_is_part_of_the_state() -> None:
    objective = gentle(warmup_steps=2, ramp_steps=4)
    for _ in range(3):
        objective.advance()
    again = gentle(warmup_steps=2, ramp_steps=4)
    again.load_state_dict(objective.state_dict())
    assert (again.warming_up, again.share) == (False, 0.5)
    assert not any("extra" in name for name in objective.model.state_dict())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"ramp_steps": -2}, "ramp_steps is -2"),
        ({"gradient_cap": 0.0}, "gradient_cap is 0"),
        ({"warmup_kl": 1.0}, "give warmup_steps"),
        ({"warmup_kl": 1.0, "warmup_steps": 3, "kl_weight": 0.0}, "kl_weight above 0"),
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(NextLatError, match=part):
        gentle(**options)


@pytest.mark.parametrize("ablation", ["stop_target", "stop_head"])
def test_a_cap_is_refused_where_auxiliary_gradients_reach_the_model_beside_the_rollout(ablation: str) -> None:
    with pytest.raises(NextLatError, match=f"gradient_cap is 0.5 and {ablation} is false"):
        gentle(gradient_cap=0.5, **{ablation: False})
    gentle(**{ablation: False})


def test_the_states_of_the_warm_up_are_without_dropout_and_those_behind_it_are_not() -> None:
    model = gpt2(resid_pdrop=0.5)
    objective = gentle(model, warmup_steps=1)
    objective.train()
    one, other = (objective(rows())["ce"].sum for _ in range(2))
    assert torch.equal(one, other)
    assert model.transformer.h[0].attn.resid_dropout.training
    objective.advance()
    one, other = (objective(rows())["ce"].sum for _ in range(2))
    assert one != other
