"""The latent drafter: rolls the dynamics on drafted tokens, without the trunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nextlat import LatentDynamics, NextLat, Transformer
from nextlat.objectives import GPT


def objective() -> NextLat:
    torch.manual_seed(3)
    model = Transformer(11, 2, 2, 8)
    dynamics = LatentDynamics(8, 6)
    for parameter in (*model.parameters(), *dynamics.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    return NextLat(model, horizon=1, dynamics=dynamics)


def test_the_state_starts_at_each_rows_last_accepted_position() -> None:
    nextlat = objective()
    output = nextlat.as_lm()(torch.randint(11, (3, 5)))
    drafter = nextlat.drafter()
    state = drafter.observe(output, torch.tensor([4, 0, 2]))
    torch.testing.assert_close(state, torch.stack([output.hidden[0, 4], output.hidden[1, 0], output.hidden[2, 2]]))


def test_drafts_past_the_training_horizon_are_the_rolled_dynamics_under_the_head() -> None:
    nextlat = objective()
    drafter = nextlat.drafter()
    assert drafter.max_length is None
    output = nextlat.as_lm()(torch.randint(11, (2, 4)))
    state = drafter.observe(output, torch.tensor([3, 3]))
    expected = output.hidden[:, 3]
    for tokens in (torch.tensor([1, 9]), torch.tensor([4, 4]), torch.tensor([0, 10])):
        state, logits = drafter.step(state, tokens)
        expected = nextlat.dynamics(expected, F.embedding(tokens, nextlat.model.embedding_weight))
        torch.testing.assert_close(logits, expected @ nextlat.model.head_weight.T)


def test_the_law_depends_on_the_drafted_token() -> None:
    drafter = objective().drafter()
    state = torch.randn(1, 8)
    one, other = (drafter.step(state, torch.tensor([token]))[1] for token in (1, 2))
    assert (one - other).abs().max() > 1e-3


def test_select_gathers_rows_for_beams() -> None:
    drafter = objective().drafter()
    state = torch.arange(6.0).view(3, 2)
    torch.testing.assert_close(drafter.select(state, torch.tensor([2, 2, 0])), state[[2, 2, 0]])


def test_gpt_has_no_drafter() -> None:
    assert GPT(Transformer(5, 1, 1, 4)).drafter() is None
