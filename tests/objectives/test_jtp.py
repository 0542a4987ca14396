"""Joint multi-token prediction: the Fetch module, its windows, and drafting with it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError
from nextlat.model import Transformer
from nextlat.objectives import JTP, TorchModel, total_loss
from nextlat.objectives.fetch import Fetch, windows
from nextlat.objectives.jtp import JTPOptions
from tests.batches import as_rows, packed_batches
from tests.objectives.rivals import VOCABULARY, gradients, language_batch, roughen, seeded, small, sums
from tests.oracles.jtp import jtp_terms, slot_state

EXAMPLE = Batch(
    torch.tensor([[1, 2, 2, 0, 1]]), torch.tensor([[IGNORE, 2, 0, 1, IGNORE]]), torch.tensor([[0, 0, 0, 1, 1]])
)
VARIANTS = [{}, {"residual_next": True}, {"relative_bias": True}, {"rms_combine": True}]


@settings(max_examples=20)
@given(packed_batches(VOCABULARY), st.integers(1, 4), st.booleans(), st.sampled_from(VARIANTS))
def test_sums_counts_and_gradients_equal_brute_force(
    batch: Batch, horizon: int, tie: bool, variant: dict[str, bool]
) -> None:
    objective = small("jtp", tie=tie, horizon=horizon, **variant)
    terms = objective(batch)
    expected = jtp_terms(objective, as_rows(batch), horizon)
    assert sums(terms) == pytest.approx({key: float(part.sum.detach()) for key, part in expected.items()}, rel=1e-6)
    assert {key: int(term.count) for key, term in terms.items()} == {key: part.count for key, part in expected.items()}
    total = sum(terms[key].weight * part.sum / max(part.count, 1) for key, part in expected.items())
    found = gradients(objective, total_loss(terms))
    parameters = dict(objective.named_parameters())
    if total.requires_grad:
        reference = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for (key, parameter), gradient in zip(parameters.items(), reference, strict=True):
            other = torch.zeros_like(parameter) if gradient is None else gradient
            torch.testing.assert_close(found[key], other, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    else:
        assert not any(gradient.any() for gradient in found.values())


def test_worked_example_has_the_stated_positions() -> None:
    objective = small("jtp", horizon=2)
    rows, head = as_rows(EXAMPLE), objective.model.lm_head.weight
    hidden = objective.model.hidden_states(EXAMPLE.tokens, EXAMPLE.documents)[0]
    table = objective.model.embed_tokens.weight
    asked = {"ce": [(1, 0, 2), (2, 0, 0), (3, 0, 1)], "jtp_1": [(0, 1, 2), (1, 1, 0)], "jtp_2": [(0, 2, 0)]}
    for name, value in sums(objective(EXAMPLE)).items():
        expected = 0.0
        for t, slot, y in asked[name]:
            window = [table[x] for x in rows.tokens[0][t : t + slot + 1]]
            state = slot_state(objective.fetch, hidden[t], window, slot)
            expected -= float((head @ state).log_softmax(-1)[y].detach())
        assert value == pytest.approx(expected, rel=1e-9)


def test_parameter_count() -> None:
    trunk = Transformer(106, 12, 6, 384)
    objective = JTP.build(trunk, JTPOptions(horizon=3), generator=seeded(0), end_token=None, next_token=False)
    assert sum(parameter.numel() for parameter in objective.parameters()) == 21_915_713
    assert objective.fetch.heads == 4


def test_first_values_of_the_fetch_module() -> None:
    fetch = Fetch(8, 3)
    assert fetch.gamma.item() == pytest.approx(0.1) and fetch.gamma.ndim == 0
    assert not fetch.bias.any() and fetch.bias.shape == (4, 4, 4)
    assert (fetch.combine_norm.weight == 1).all() and not fetch.combine_norm.bias.any()
    assert Fetch(8, 3, gamma_init=0.5).gamma.item() == 0.5
    assert Fetch(8, 3, relative_bias=True).bias.shape == (4, 4, 1)


def test_the_combination_subtracts_the_mean_unless_asked_not_to() -> None:
    """Everywhere else the norm is RMSNorm, so LayerNorm is easily lost here."""
    e, h = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 10.0, 0.0, 0.0])
    found = Fetch(4, 1).combine(h, e)
    u = torch.tensor([3.0, 2.0, 0.0, 0.0])
    expected = (u - 1.25) / torch.sqrt(torch.tensor(27 / 16) + 1e-5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(Fetch(4, 1, rms_combine=True).combine(h, e), u / torch.sqrt(torch.tensor(13 / 4) + 1e-5))
    assert not Fetch(4, 1).combine(torch.zeros(4), torch.zeros(4)).any()


def test_a_slot_ignores_the_slots_after_it() -> None:
    fetch = Fetch(8, 3).double()
    roughen(fetch)
    hidden = torch.randn(2, 8, generator=seeded(0), dtype=torch.float64)
    window = torch.randn(2, 4, 8, generator=seeded(1), dtype=torch.float64)
    states = fetch(hidden, window)
    for slot in range(4):
        changed = window.clone()
        changed[:, slot, 0] += 1.0
        other = fetch(hidden, changed)
        torch.testing.assert_close(other[:, :slot], states[:, :slot], rtol=0, atol=0)
        assert all(not torch.allclose(other[:, i], states[:, i]) for i in range(slot, 4))


def test_slot_0_is_a_linear_map_of_the_combination() -> None:
    """And has no residual, unless ``residual_next`` asks for it."""
    hidden = torch.randn(2, 8, generator=seeded(0), dtype=torch.float64)
    window = torch.randn(2, 1, 8, generator=seeded(1), dtype=torch.float64)
    for residual_next in (False, True):
        fetch = Fetch(8, 3, residual_next=residual_next).double()
        roughen(fetch)
        out = fetch.o_proj(fetch.v_proj(fetch.combine(hidden, window[:, 0])))
        torch.testing.assert_close(fetch(hidden, window)[:, 0], fetch.norm(out + hidden * residual_next))


def test_the_table_is_indexed_by_slot_or_by_distance() -> None:
    absolute, relative = Fetch(8, 2, heads=1), Fetch(8, 2, heads=1, relative_bias=True)
    with torch.no_grad():
        absolute.bias.copy_(torch.arange(9.0).view(1, 3, 3))
        relative.bias.copy_(torch.tensor([[[5.0], [6.0], [7.0]]]))
    assert absolute.table()[0].tril().tolist() == [[0, 0, 0], [3, 4, 0], [6, 7, 8]]
    assert relative.table()[0].tril().tolist() == [[5, 0, 0], [6, 5, 0], [7, 6, 5]]


def test_windows_start_at_their_own_token_and_run_over_the_row_end_harmlessly() -> None:
    embeddings = torch.arange(1.0, 4.0).view(1, 3, 1)
    assert windows(embeddings, 5)[0, ..., 0].tolist() == [[1, 2, 3, 0, 0], [2, 3, 0, 0, 0], [3, 0, 0, 0, 0]]
    objective, batch = small("jtp", horizon=3), language_batch(4, 2, 6, packed=False)
    longer = Batch(F.pad(batch.tokens, (0, 3), value=2), F.pad(batch.targets, (0, 3), value=IGNORE))
    assert sums(objective(longer)) == pytest.approx(sums(objective(batch)), rel=1e-12)


def test_every_term_trains_head_trunk_embeddings_and_fetch() -> None:
    objective, batch = small("jtp", horizon=2), language_batch(3, 4, 8)
    for name in ("ce", "jtp_1", "jtp_2"):
        found = gradients(objective, objective(batch)[name].sum)
        watched = ["model.lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
        watched += ["fetch.gamma", "fetch.v_proj.weight", "fetch.o_proj.weight", "fetch.norm.weight"]
        assert all(found[key].any() for key in watched), name
        assert bool(found["fetch.q_proj.weight"].any()) == (name != "ce")


def test_the_tokens_in_between_are_teachers_with_live_embeddings() -> None:
    """Position 0 predicts three ahead: the rows of tokens 1 and 2 get a gradient, that of the target gets none."""
    objective = small("jtp", horizon=2)
    batch = Batch(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[IGNORE, IGNORE, 4, IGNORE]]))
    found = gradients(objective, objective(batch)["jtp_2"].sum)["model.embed_tokens.weight"]
    assert [bool(row.any()) for row in found] == [False, True, True, True, False]


def test_the_first_answer_token_is_a_target_of_every_slot() -> None:
    """The released code masks the prompt one position too far, in the first document of a row only."""
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    targets = torch.tensor([[IGNORE, IGNORE, 4, IGNORE, IGNORE, IGNORE, 4, IGNORE]])
    counts = small("jtp", horizon=3).counts(Batch(tokens, targets, documents))
    assert {key: int(value) for key, value in counts.items()} == {"ce": 2, "jtp_1": 2, "jtp_2": 2, "jtp_3": 0}


def test_rank_and_probes_read_the_trunk_state() -> None:
    objective, batch = small("jtp", horizon=2), language_batch(3, 2, 6)
    lm = objective.as_lm()(batch.tokens, batch.documents)
    hidden = objective.model.hidden_states(batch.tokens, batch.documents)
    assert torch.equal(lm.hidden, hidden) and torch.equal(lm.probe_state, hidden)
    assert not torch.allclose(lm.logits, objective.model.lm_head(hidden))


@pytest.mark.parametrize("variant", VARIANTS)
def test_draft_laws_are_the_slots_after_the_drafted_tokens(variant: dict[str, bool]) -> None:
    objective, tokens = small("jtp", horizon=3, **variant), torch.tensor([[1, 2, 3, 4], [4, 0, 2, 2]])
    drafter, output = objective.drafter(), objective.as_lm()(tokens)
    assert drafter.max_length == 4
    accepted = torch.tensor([3, 1])
    state = drafter.observe(output, accepted)
    drafts = torch.tensor([[0, 4, 1], [3, 3, 2]])
    table, head = objective.model.embed_tokens.weight, objective.model.lm_head.weight
    for step in range(3):
        state, logits = drafter.step(state, drafts[:, step])
        for b in range(2):
            window = [table[tokens[b, accepted[b]]], *(table[x] for x in drafts[b, : step + 1])]
            expected = head @ slot_state(objective.fetch, output.hidden[b, accepted[b]], window, step + 1)
            torch.testing.assert_close(logits[b], expected, rtol=1e-9, atol=1e-11)
    with pytest.raises(NextLatError, match="at most 4"):
        drafter.step(state, drafts[:, 0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_decoding_leaves_out_what_drafts_alone_need(variant: dict[str, bool]) -> None:
    """Slot 0 sees itself only, so its scores change nothing; observing a call prepares nothing that may not be used."""
    objective, tokens = small("jtp", horizon=2, **variant), torch.tensor([[1, 2, 3, 4], [4, 0, 2, 2]])
    fetch, drafter, used = objective.fetch, objective.drafter(), list[str]()
    for name in ("q_proj", "k_proj"):
        getattr(fetch, name).register_forward_hook(lambda *_, name=name: used.append(name))
    output = objective.as_lm()(tokens)
    state = drafter.observe(output, torch.tensor([3, 1]))
    assert not used
    embeddings = torch.nn.functional.embedding(tokens, objective.model.embed_tokens.weight)
    whole = fetch(output.hidden, embeddings[..., None, :])[..., 0, :]
    torch.testing.assert_close(output.logits, objective.model.lm_head(whole), rtol=1e-12, atol=1e-12)
    used.clear()
    drafter.step(state, torch.tensor([1, 2]))
    assert sorted(used) == ["k_proj", "q_proj"]


def test_drafts_depend_on_the_tokens_drafted_before() -> None:
    objective = small("jtp", horizon=2)
    drafter, output = objective.drafter(), objective.as_lm()(torch.tensor([[1, 2, 3, 4]]))
    state = drafter.observe(output, torch.tensor([3]))
    one, two = (drafter.step(state, torch.tensor([token]))[1] for token in (0, 3))
    assert not torch.allclose(one, two)


@pytest.mark.parametrize("drafted", [False, True])
def test_select_gathers_rows_of_a_draft(drafted: bool) -> None:
    objective = small("jtp", horizon=2)
    drafter, output = objective.drafter(), objective.as_lm()(torch.tensor([[1, 2], [3, 4], [0, 1]]))
    state = drafter.observe(output, torch.tensor([1, 1, 0]))
    if drafted:
        state, _ = drafter.step(state, torch.tensor([1, 2, 3]))
    rows = torch.tensor([2, 0, 0, 1])
    _, found = drafter.step(drafter.select(state, rows), torch.tensor([1, 4, 4, 0]))
    _, logits = drafter.step(state, torch.tensor([4, 0, 1]))
    torch.testing.assert_close(found, logits[rows], rtol=1e-12, atol=1e-12)


def test_any_model_with_states_embedding_and_head_can_be_trained() -> None:
    embedding, head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY, bias=False)
    net = nn.ModuleDict({"embedding": embedding, "head": head})
    model = TorchModel(net, lambda x, _: embedding(x), lambda: embedding.weight, lambda: head.weight)
    objective = JTP(model, horizon=2, generator=seeded(0))
    batch = language_batch(3, 2, 6)
    found = gradients(objective, total_loss(objective(batch)))
    assert found["model.model.embedding.weight"].any()
    assert objective.as_lm()(batch.tokens).logits.shape == (2, 6, VOCABULARY)


def test_heads_that_do_not_divide_the_width_are_an_error() -> None:
    with pytest.raises(NextLatError, match="width = 6"):
        Fetch(6, 1)
    with pytest.raises(NextLatError, match="horizon is 0"):
        JTP(Transformer(VOCABULARY, 1, 2, 8), horizon=0)
