"""Plain next-token prediction against brute force."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nextlat.batch import IGNORE, Batch
from nextlat.objectives.base import total_loss
from nextlat.objectives.gpt import GPT
from nextlat.objectives.nextlat import NextLat
from nextlat.objectives.positions import at
from tests.batches import as_rows, packed_batches, random_batch
from tests.objectives.cases import VOCABULARY, assert_same_gradients, gradients, small_trunk
from tests.oracles.nextlat import log_probabilities, scores, token_set


@given(packed_batches(vocabulary=VOCABULARY), st.integers(0, 3))
def test_cross_entropy_equals_brute_force(batch: Batch, seed: int) -> None:
    objective = GPT(small_trunk(seed))
    term = objective(batch)["ce"]
    hidden = objective.model.hidden_states(batch.tokens, batch.documents)
    places = token_set(as_rows(batch), 0)
    expected = torch.zeros((), dtype=torch.float64)
    for b, t in places:
        expected = expected - log_probabilities(scores(hidden[b, t], objective.model.head_weight))[batch.targets[b, t]]
    torch.testing.assert_close(term.sum, expected, rtol=1e-12, atol=1e-12)
    assert int(term.count) == int(objective.counts(batch)["ce"]) == len(places)
    assert term.weight == 1.0


def test_targets_are_never_made_from_tokens() -> None:
    # a tagging task asks for something else than the next token
    batch = random_batch(0, 3, 6, VOCABULARY, packed=False)
    objective = GPT(small_trunk())
    shifted = batch.tokens.roll(-1, 1)
    other = batch._replace(targets=torch.where(batch.targets == IGNORE, IGNORE, shifted))
    assert not torch.equal(batch.targets, other.targets)
    assert objective(batch)["ce"].sum != objective(other)["ce"].sum


def test_the_last_position_counts_when_its_target_is_known() -> None:
    tokens, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[IGNORE, IGNORE, 4]])
    objective = GPT(small_trunk())
    logits = objective.model(tokens).logits[0, -1]
    torch.testing.assert_close(objective(Batch(tokens, targets))["ce"].sum, -logits.log_softmax(-1)[4])


def test_targets_on_padding_are_ignored() -> None:
    tokens, documents = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 0, -1, -1]])
    asked = Batch(tokens, torch.tensor([[2, 3, 1, 1]]), documents)
    silent = Batch(tokens, torch.tensor([[2, 3, IGNORE, IGNORE]]), documents)
    objective = GPT(small_trunk())
    assert torch.equal(objective(asked)["ce"].sum, objective(silent)["ce"].sum)
    assert int(objective.counts(asked)["ce"]) == 2


def test_cross_entropy_is_the_same_term_in_nextlat() -> None:
    batch = random_batch(1, 3, 8, VOCABULARY)
    plain, latent = GPT(small_trunk()), NextLat(small_trunk(), horizon=2).double()
    assert torch.equal(plain(batch)["ce"].sum, latent(batch)["ce"].sum)
    assert_same_gradients(
        gradients(plain(batch)["ce"].sum, plain.model), gradients(latent(batch)["ce"].sum, latent.model), atol=0
    )


def test_gpt_trains_on_tags_that_are_not_next_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (16, 6))
    batch = Batch(tokens, (tokens.cumsum(1)) % VOCABULARY)
    objective = GPT(small_trunk().float())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = total_loss(objective(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_plain_model_is_what_decodes_and_nothing_drafts() -> None:
    model = small_trunk()
    objective = GPT(model)
    assert objective.as_lm() is model
    assert objective.drafter() is None
    assert objective.auxiliary() is None


def test_values_at_positions_keep_their_order_and_are_not_copied_where_all_are_named() -> None:
    values = torch.arange(24.0).view(2, 4, 3)
    everywhere = torch.ones(2, 4, dtype=torch.bool)
    assert at(everywhere, values).data_ptr() == values.data_ptr()
    assert torch.equal(at(everywhere, values), values[everywhere])
    some = everywhere.clone()
    some[0, 1] = some[1, 3] = False
    assert at(some, values).tolist() == [values[b, t].tolist() for b in range(2) for t in range(4) if some[b, t]]
    assert at(everywhere[:, :0], values[:, :0]).shape == (0, 3)
