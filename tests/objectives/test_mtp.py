"""Parallel multi-token prediction: heads, what they see, what they are asked, and drafting with them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nextlat.batch import IGNORE, Batch
from nextlat.decoding.tree import TokenTree
from nextlat.errors import NextLatError
from nextlat.model import Transformer
from nextlat.model.interfaces import LMOutput
from nextlat.objectives import GPT, MTP, TorchModel, total_loss
from nextlat.objectives.base import Objective
from nextlat.objectives.mtp import MTPDrafter, MTPOptions
from tests.batches import as_rows, packed_batches
from tests.objectives.rivals import (
    VOCABULARY,
    assert_same_gradients,
    gradients,
    language_batch,
    roughen,
    seeded,
    small,
    sums,
)
from tests.oracles.mtp import head_as_stack, mtp_terms, row_states
from tests.oracles.nextlat import token_set

EXAMPLE = Batch(
    torch.tensor([[1, 2, 2, 0, 1]]), torch.tensor([[IGNORE, 2, 0, 1, IGNORE]]), torch.tensor([[0, 0, 0, 1, 1]])
)


@settings(max_examples=15)
@given(packed_batches(VOCABULARY), st.integers(1, 4), st.booleans())
def test_sums_counts_and_gradients_equal_brute_force(batch: Batch, horizon: int, tie: bool) -> None:
    objective = small("mtp", tie=tie, horizon=horizon)
    terms = objective(batch)
    expected = mtp_terms(objective, as_rows(batch), horizon)
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
    """The third state must not predict past the boundary, though the row goes on."""
    assert token_set(as_rows(EXAMPLE), 1) == [(0, 0), (0, 1)]
    assert token_set(as_rows(EXAMPLE), 2) == [(0, 0)]
    objective = small("mtp", horizon=2)
    logits = [objective.trunk.lm_head(row_states(head_as_stack(objective, i), as_rows(EXAMPLE))[0]) for i in range(3)]
    asked = {"ce": [(0, 1, 2), (0, 2, 0), (0, 3, 1)], "mtp_1": [(1, 0, 2), (1, 1, 0)], "mtp_2": [(2, 0, 0)]}
    for name, value in sums(objective(EXAMPLE)).items():
        expected = -sum(float(logits[i][t].log_softmax(-1)[y].detach()) for i, t, y in asked[name])
        assert value == pytest.approx(expected, rel=1e-6)


def test_parameter_count() -> None:
    objective = MTP(Transformer(106, 12, 6, 384), 3)
    assert sum(parameter.numel() for parameter in objective.parameters()) == 26_636_544
    assert sum(parameter.numel() for parameter in objective.model.parameters()) == 21_324_672


def test_horizon_0_is_plain_next_token_prediction_to_the_last_bit() -> None:
    batch = language_batch(3, 4, 8)
    mtp, gpt = small("mtp", horizon=0).float(), GPT(small("gpt").model).float()
    assert isinstance(mtp, MTP) and mtp.auxiliary() is None and mtp.drafter() is None
    gpt.model.load_state_dict(mtp.model.state_dict())
    terms, plain = mtp(batch), gpt(batch)
    assert list(terms) == ["ce"] and torch.equal(terms["ce"].sum, plain["ce"].sum)
    found, expected = gradients(mtp, total_loss(terms)), gradients(gpt, total_loss(plain))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_head_0_is_the_plain_model() -> None:
    """A head 0 beside the plain model would make the exported checkpoint an untrained one."""
    objective, batch = small("mtp", horizon=2), language_batch(3, 2, 6)
    plain = objective.model(batch.tokens, batch.documents)
    lm = objective.as_lm()(batch.tokens, batch.documents)
    assert isinstance(objective.model, Transformer) and len(objective.model.layers) == 2
    torch.testing.assert_close(lm.logits, plain.logits, rtol=0, atol=0)
    torch.testing.assert_close(lm.hidden, plain.hidden, rtol=0, atol=0)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_probes_read_the_shared_states_and_rank_reads_head_0(n_layers: int) -> None:
    """The released code reads the shared states for both."""
    objective, batch = small("mtp", horizon=2, n_layers=n_layers), language_batch(3, 2, 6)
    layers: list[torch.Tensor] = []
    hidden = objective.model.hidden_states(batch.tokens, batch.documents, layers=layers)
    lm = objective.as_lm()(batch.tokens, batch.documents)
    torch.testing.assert_close(lm.probe_state, layers[-2], rtol=0, atol=0)
    torch.testing.assert_close(lm.hidden, hidden, rtol=0, atol=0)


def test_heads_read_states_without_a_norm_of_their_own_on_the_shared_part() -> None:
    """Scaling the plain model's final norm moves ``ce`` and leaves the other heads, each with its own norm, alone."""
    objective, batch = small("mtp", horizon=2), language_batch(3, 4, 8)
    before = sums(objective(batch))
    with torch.no_grad():
        objective.model.norm.weight.mul_(2.0)
    after = sums(objective(batch))
    assert after["ce"] != pytest.approx(before["ce"], rel=1e-3)
    assert [after[key] for key in ("mtp_1", "mtp_2")] == [before[key] for key in ("mtp_1", "mtp_2")]


def test_head_i_sees_tokens_up_to_its_own_position_only() -> None:
    objective = small("mtp", horizon=3)
    tokens = torch.tensor([[1, 2, 3, 4, 1]])
    other = torch.tensor([[1, 2, 4, 0, 2]])
    context = objective.trunk.context(tokens)
    for step in range(4):
        states = [objective.head_states(step, objective.shared_states(x, context), context) for x in (tokens, other)]
        torch.testing.assert_close(states[0][:, :2], states[1][:, :2], rtol=0, atol=0)
        assert not torch.allclose(states[0][:, 2:], states[1][:, 2:])


def test_every_term_trains_the_output_head_its_own_head_and_the_first_block() -> None:
    objective, batch = small("mtp", horizon=2), language_batch(3, 4, 8)
    for step, name in enumerate(["ce", "mtp_1", "mtp_2"]):
        found = gradients(objective, objective(batch)[name].sum)
        assert found["model.lm_head.weight"].any() and found["model.layers.0.mlp.up_proj.weight"].any()
        assert found["model.embed_tokens.weight"].any()
        own = {"model.norm.weight": 0, "heads.0.norm.weight": 1, "heads.1.norm.weight": 2}
        assert {key: bool(found[key].any()) for key in own} == {key: step == value for key, value in own.items()}


def test_the_first_answer_token_is_a_target_of_every_head() -> None:
    """Off by one, the prompt mask would take the last prompt position away, or every second document's."""
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    targets = torch.tensor([[IGNORE, IGNORE, 4, IGNORE, IGNORE, IGNORE, 4, IGNORE]])
    counts = small("mtp", horizon=3).counts(Batch(tokens, targets, documents))
    assert {key: int(value) for key, value in counts.items()} == {"ce": 2, "mtp_1": 2, "mtp_2": 2, "mtp_3": 0}


def test_only_our_trunk_has_blocks_to_share() -> None:
    table = nn.Embedding(5, 4)
    model = TorchModel(table, lambda x, _: table(x), lambda: table.weight, lambda: table.weight)
    with pytest.raises(NextLatError, match="TorchModel"):
        MTP(model)


def test_options_build_what_they_say() -> None:
    trunk = Transformer(VOCABULARY, 2, 2, 8)
    options = MTPOptions(horizon=2, mtp_weight=0.5)
    objective = MTP.build(trunk, options, generator=seeded(0), end_token=None, next_token=False)
    assert (objective.horizon, objective.weight, len(objective.heads)) == (2, 0.5, 2)


def test_first_draft_law_is_the_models_own_and_the_others_are_the_heads() -> None:
    objective, tokens = small("mtp", horizon=2), torch.tensor([[1, 2, 3, 4], [4, 0, 2, 2]])
    drafter = objective.drafter()
    assert drafter is not None and drafter.max_length == 3
    output = objective.as_lm()(tokens)
    accepted = torch.tensor([3, 1])
    state = drafter.observe(output, accepted)
    for step in (1, 2):
        state, logits = drafter.step(state, torch.tensor([0, 1]))
        states = row_states(head_as_stack(objective, step), as_rows(Batch(tokens, tokens)))
        expected = torch.stack([objective.trunk.lm_head(states[b][t]) for b, t in enumerate(accepted)])
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(NextLatError, match="at most 3"):
        drafter.step(state, torch.tensor([0, 1]))


def test_drafts_do_not_depend_on_the_tokens_drafted_before() -> None:
    objective = small("mtp", horizon=2)
    drafter, output = objective.drafter(), objective.as_lm()(torch.tensor([[1, 2, 3, 4]]))
    state = drafter.observe(output, torch.tensor([3]))
    one, two = (drafter.step(state, torch.tensor([token]))[1] for token in (0, 3))
    assert torch.equal(one, two)


def test_heads_draft_from_a_cache_that_was_rolled_back() -> None:
    """Each head attends to every verified position, also to those of calls that were never drafted from, and to
    none of a rejected draft."""
    objective = small("mtp", horizon=2)
    lm = objective.as_lm()
    verified = torch.randint(VOCABULARY, (2, 6), generator=seeded(0))
    cache = lm.new_cache(2, 12)
    lm(verified[:, :2], cache=cache)
    lm(verified[:, 2:3], cache=cache)
    rejected = torch.randint(VOCABULARY, (2, 4), generator=seeded(1))
    lm(rejected, cache=cache)
    cache.lengths = [3, 3]
    output = lm(torch.cat([verified[:, 3:], rejected[:, :2]], 1), cache=cache)
    cache.lengths = [6, 6]
    found = drafted(objective, output, torch.tensor([2, 2]))
    torch.testing.assert_close(found, drafted(objective, lm(verified), torch.tensor([5, 5])), rtol=1e-9, atol=1e-11)


def test_drafts_in_packed_rows_stay_inside_their_document() -> None:
    objective = small("mtp", horizon=2)
    lm = objective.as_lm()
    tokens, documents = torch.tensor([[3, 3, 1, 2, 4]]), torch.tensor([[0, 0, 1, 1, 1]])
    packed = drafted(objective, lm(tokens, documents), torch.tensor([4]))
    alone = drafted(objective, lm(tokens[:, 2:]), torch.tensor([2]))
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-11)


def drafted(objective: Objective, output: LMOutput, accepted: Tensor) -> Tensor:
    """(B, d, V) logits of all further heads."""
    drafter = objective.drafter()
    assert isinstance(drafter, MTPDrafter)
    state, found = drafter.observe(output, accepted), []
    for _ in range(objective.horizon):
        state, logits = drafter.step(state, accepted)
        found.append(logits)
    return torch.stack(found, 1)


@settings(max_examples=25)
@given(st.data())
@torch.no_grad()
def test_heads_see_exactly_the_kept_text_whatever_was_called_kept_and_drafted_before(data: st.DataObject) -> None:
    """Prompts of several lengths, chains and trees, any heads a round, rows that leave: always brute force."""
    objective = small("mtp", horizon=2)
    lm, drafter = objective.as_lm(), objective.drafter()
    assert drafter is not None
    stacks = [head_as_stack(objective, step) for step in (1, 2)]
    count = data.draw(st.integers(1, 3))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    pick = partial(torch.randint, generator=rng)
    prompts, lengths = pick(VOCABULARY, (count, 4)), pick(1, 5, (count,)).tolist()
    cache = lm.new_cache(count, 40)
    output, accepted = lm(prompts, cache=cache), torch.tensor(lengths) - 1
    cache.lengths = list(lengths)
    texts = [prompt[:length] for prompt, length in zip(prompts.tolist(), lengths, strict=True)]
    state = drafter.observe(output, accepted)
    for _ in range(data.draw(st.integers(1, 5))):
        if len(texts) > 1 and data.draw(st.booleans()):
            going = sorted(torch.randperm(len(texts), generator=rng)[:-1].tolist())
            cache.select(going)
            state, texts = drafter.select(state, torch.tensor(going)), [texts[row] for row in going]
        fan = data.draw(st.sampled_from([1, 2]))  # as a tree's branches, each row several times
        leaves = torch.arange(len(texts)).repeat_interleave(fan)
        branches = drafter.select(state, leaves)
        for step in range(data.draw(st.integers(0, 2))):
            branches, logits = drafter.step(branches, pick(VOCABULARY, (len(leaves),)))
            expected = [row_states(stacks[step], as_rows(Batch(*2 * [torch.tensor([text])])))[0][-1] for text in texts]
            head = objective.trunk.lm_head(torch.stack(expected))
            torch.testing.assert_close(logits, head[leaves], rtol=1e-6, atol=1e-6)
        nodes = data.draw(st.integers(1, 4))
        tokens = pick(VOCABULARY, (len(texts), nodes))
        parents = [[-1, *(int(pick(place, (1,))) for place in range(1, nodes))] for _ in texts]
        if data.draw(st.booleans()):
            parents = [list(range(-1, nodes - 1)) for _ in texts]
        paths = [[[0]] for _ in texts]
        for way, above in zip(paths, parents, strict=True):
            for place in range(1, nodes):
                way.append([*way[above[place]], place])
        depths = torch.tensor([[len(path) - 1 for path in way] for way in paths])
        tree, begins = TokenTree(tokens, torch.tensor(parents), depths), list(cache.lengths)
        behind = torch.tensor(begins)
        output = lm(tokens, positions=behind[:, None] + depths, mask=tree.mask(behind), cache=cache)
        accepted = pick(nodes, (len(texts),))
        state = drafter.observe(output, accepted)
        if data.draw(st.booleans()):  # too early to mean anything, and harmless
            drafter.step(state, accepted)
        kept = [way[node] for way, node in zip(paths, accepted.tolist(), strict=True)]
        cache.keep(kept, begins)
        for text, row, path in zip(texts, tokens.tolist(), kept, strict=True):
            text += [row[place] for place in path]


@torch.no_grad()
def test_rounds_pay_for_the_heads_they_use_at_positions_they_have_not_seen() -> None:
    objective = small("mtp", horizon=3)
    lm, drafter = objective.as_lm(), objective.drafter()
    assert drafter is not None
    projected, blocks = [0] * 3, [0] * 3
    for number, head in enumerate(objective.heads):

        def count(counts: list[int], number: int, module: object, inputs: tuple[Tensor], output: Tensor) -> None:
            counts[number] += inputs[0].shape[1]

        head.block.self_attn.k_proj.register_forward_hook(partial(count, projected, number))
        head.block.mlp.register_forward_hook(partial(count, blocks, number))

    def round_(length: int, heads: int) -> None:
        output = lm(torch.zeros(1, length, dtype=torch.int64), cache=cache)
        state = drafter.observe(output, torch.tensor([length - 1]))
        for _ in range(heads):
            state, _ = drafter.step(state, torch.zeros(1, dtype=torch.int64))

    cache = lm.new_cache(1, 20)
    round_(5, 0)
    round_(1, 0)
    assert projected == blocks == [0, 0, 0]
    round_(1, 1)
    assert (projected, blocks) == ([7, 0, 0], [1, 0, 0])
    round_(2, 2)
    assert (projected, blocks) == ([9, 9, 0], [2, 1, 0])
    cache.lengths = [8]
    round_(2, 3)
    assert (projected, blocks) == ([11, 11, 10], [3, 2, 1])


def test_a_cache_of_another_model_is_refused() -> None:
    objective = small("mtp", horizon=1)
    with pytest.raises(NextLatError, match="new_cache"):
        objective.as_lm()(torch.tensor([[1, 2]]), cache=objective.trunk.new_cache(1, 4))


def test_select_gathers_rows_of_a_draft() -> None:
    objective = small("mtp", horizon=2)
    drafter, output = objective.drafter(), objective.as_lm()(torch.tensor([[1, 2], [3, 4], [0, 1]]))
    state = drafter.observe(output, torch.tensor([1, 1, 0]))
    rows = torch.tensor([2, 0, 0, 1])
    _, found = drafter.step(drafter.select(state, rows), torch.zeros(4, dtype=torch.int64))
    _, logits = drafter.step(state, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(found, logits[rows])


def test_gradients_do_not_depend_on_how_rows_are_grouped_by_length() -> None:
    """Rows packed differently share attention calls differently."""
    objective = small("mtp", horizon=2)
    batch = language_batch(8, 4, 8)
    whole = gradients(objective, torch.stack([term.sum for term in objective(batch).values()]).sum())
    parts = [
        gradients(objective, torch.stack([term.sum for term in objective(batch.rows(b, b + 1)).values()]).sum())
        for b in range(4)
    ]
    assert_same_gradients({key: sum(part[key] for part in parts) for key in whole}, whole)


def test_roughened_weights_really_differ_between_heads() -> None:
    objective = small("mtp", horizon=2)
    roughen(objective, 1)
    first, second = (torch.cat([p.flatten() for p in head.parameters()]) for head in objective.heads)
    assert not torch.allclose(first, second)
