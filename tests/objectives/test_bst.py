"""The belief state transformer: suffixes, pairs, their targets and the next-token model made of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError
from nextlat.model import Transformer
from nextlat.objectives import BST, TorchModel, pairs, total_loss
from nextlat.objectives.bst import BSTModel, BSTOptions
from nextlat.objectives.pairs import check_next_token, keyed_uniform, sample_pairs, suffixes
from tests.batches import as_rows
from tests.objectives.rivals import END, VOCABULARY, gradients, language_batch, language_batches, seeded, small, sums
from tests.oracles.bst import backward_states, bst_terms, documents_of, pairs_of, text_head

EXAMPLE = Batch(
    torch.tensor([[1, 2, 2, 0, 1]]), torch.tensor([[IGNORE, 2, 0, 1, IGNORE]]), torch.tensor([[0, 0, 0, 1, 1]])
)


def bst(**options: object) -> BST:
    objective = small("bst", **options)
    assert isinstance(objective, BST)
    return objective


def listed(chosen: pairs.Pairs) -> list[tuple[int, int, int]]:
    """(b, t, s) of each pair."""
    return [(b, t, p + 1) for b, t, p in zip(*(part.tolist() for part in chosen), strict=True)]


gaps = st.one_of(st.just((1, None)), st.tuples(st.integers(1, 3), st.integers(0, 3)).map(lambda g: (g[0], g[0] + g[1])))


@settings(max_examples=40)
@given(language_batches(), gaps, st.sampled_from(["eos", "copy"]), st.booleans())
def test_sum_count_and_gradients_equal_brute_force(
    batch: Batch, gap: tuple[int, int | None], gap_one: str, tie: bool
) -> None:
    objective = bst(tie=tie, min_gap=gap[0], max_gap=gap[1], gap_one=gap_one)
    rows = as_rows(batch)
    expected_pairs = pairs_of(rows, END, *gap, gap_one)
    expected = bst_terms(objective, rows, END, expected_pairs)
    terms = objective(batch)
    assert listed(objective.pairs(batch)) == [(pair.b, pair.t, pair.s) for pair in expected_pairs]
    assert int(terms["pair"].count) == int(objective.counts(batch)["pair"]) == expected["pair"].count
    numbers = sums(terms) | sums(objective.logged)
    assert [int(part.count) for part in objective.logged.values()] == [len(expected_pairs)] * 2
    assert numbers == pytest.approx({key: float(part.sum.detach()) for key, part in expected.items()}, rel=1e-6)
    found = gradients(objective, total_loss(terms))
    parameters = dict(objective.named_parameters())
    if expected_pairs:
        total = expected["pair"].sum / expected["pair"].count
        reference = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for (key, parameter), gradient in zip(parameters.items(), reference, strict=True):
            other = torch.zeros_like(parameter) if gradient is None else gradient
            torch.testing.assert_close(found[key], other, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    else:
        assert not any(gradient.any() for gradient in found.values())


def test_worked_example_has_the_stated_pairs() -> None:
    """Suffix 3 of the closed document is the virtual end token, not the next document's; the last one is open."""
    objective = bst()
    assert listed(objective.pairs(EXAMPLE)) == [(0, 1, 2), (0, 1, 3), (0, 2, 3), (0, 3, 4)]
    asked = {(pair.t, pair.s): (pair.next, pair.prev) for pair in pairs_of(as_rows(EXAMPLE), END)}
    assert asked == {(1, 2): (0, 0), (1, 3): (2, 2), (2, 3): (0, 0), (3, 4): (0, 0)}
    assert int(objective.counts(EXAMPLE)["pair"]) == 8
    wide = bst(min_gap=2)
    assert listed(wide.pairs(EXAMPLE)) == [(0, 1, 3)] and int(wide.counts(EXAMPLE)["pair"]) == 2


def test_worked_example_sum_follows_from_the_listed_targets() -> None:
    objective = bst()
    forward = objective.model.hidden_states(EXAMPLE.tokens, EXAMPLE.documents)[0]
    behind: dict[int, Tensor] = {}
    for document in documents_of(as_rows(EXAMPLE)):
        behind |= backward_states(objective, document, END)
    expected = 0.0
    for (t, s), targets in {(1, 2): (0, 0), (1, 3): (2, 2), (2, 3): (0, 0), (3, 4): (0, 0)}.items():
        for state, y in zip(text_head(objective, forward[t], behind[s]), targets, strict=True):
            expected -= float(objective.model.lm_head(state).log_softmax(-1)[y].detach())
    assert sums(objective(EXAMPLE))["pair"] == pytest.approx(expected, rel=1e-6)


def test_copied_targets_of_gap_one_are_the_next_token_and_the_prefixs_last() -> None:
    asked = {(pair.t, pair.s): (pair.next, pair.prev) for pair in pairs_of(as_rows(EXAMPLE), END, gap_one="copy")}
    assert asked[(1, 2)] == (2, 2) and asked[(2, 3)] == (0, 2) and asked[(3, 4)] == (1, 0)
    assert sums(bst(gap_one="copy")(EXAMPLE)) != pytest.approx(sums(bst()(EXAMPLE)), rel=1e-3)


def test_the_greatest_gap_is_inclusive() -> None:
    """The released code's is exclusive."""
    batch = language_batch(0, 1, 6, packed=False)
    batch = Batch(batch.tokens, F.pad(batch.tokens[:, 1:], (0, 1), value=END))
    found = {s - t for _, t, s in listed(bst(min_gap=2, max_gap=4).pairs(batch))}
    assert found == {2, 3, 4}


def test_the_prompt_is_masked_in_every_document_of_a_row() -> None:
    """The released code drops prefixes inside the prompt of a row's first document only."""
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3]])
    targets = torch.tensor([[IGNORE, 3, END, IGNORE, 3, END]])
    found = listed(bst().pairs(Batch(tokens, targets, torch.tensor([[0, 0, 0, 1, 1, 1]]))))
    assert found == [(0, 1, 2), (0, 1, 3), (0, 2, 3), (0, 4, 5), (0, 4, 6), (0, 5, 6)]


def test_only_the_prefix_must_be_asked() -> None:
    """A suffix may start behind a position whose own target is masked."""
    batch = Batch(torch.tensor([[1, 2, 3]]), torch.tensor([[2, IGNORE, END]]))
    assert listed(bst().pairs(batch)) == [(0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 2, 3)]


def test_parameter_count() -> None:
    assert sum(p.numel() for p in BST(Transformer(106, 12, 6, 384), END).parameters()) == 47_287_296


def test_suffixes_are_the_shifted_row_with_an_end_token_behind_closed_documents() -> None:
    suffix = suffixes(EXAMPLE, END)
    assert suffix.tokens.tolist() == [[2, 2, END, 1, END]]
    assert suffix.used.tolist() == [[True, True, True, True, False]]
    single = suffixes(Batch(torch.tensor([[3, 4]]), torch.tensor([[4, END]])), END)
    assert single.tokens.tolist() == [[4, END]] and single.used.all()


def test_the_empty_suffix_is_that_of_every_closed_document() -> None:
    objective = bst()
    states = objective.suffix_states(EXAMPLE)
    torch.testing.assert_close(states[0, 2], objective.empty_suffix(), rtol=1e-12, atol=1e-12)


def test_a_truncated_document_gets_no_false_end() -> None:
    """Its last suffix is its last token, at position 0, as if the document had been closed there by nothing."""
    objective = bst()
    tokens = torch.tensor([[3, 4, 2]])
    opened = objective.suffix_states(Batch(tokens, torch.tensor([[4, 2, 1]])))[0, :2]
    closed = objective.suffix_states(Batch(tokens, torch.tensor([[4, 2, END]])))[0, :2]
    assert not torch.allclose(opened, closed)
    for s in (1, 2):
        alone = backward_states(objective, documents_of(as_rows(Batch(tokens, torch.tensor([[4, 2, 1]]))))[0], END)[s]
        torch.testing.assert_close(opened[s - 1], alone, rtol=1e-6, atol=1e-6)


def test_a_suffix_state_ignores_tokens_before_it_and_other_documents() -> None:
    objective = bst()
    states = objective.suffix_states(EXAMPLE)
    used = suffixes(EXAMPLE, END).used[0]
    for changed in range(5):
        tokens = EXAMPLE.tokens.clone()
        tokens[0, changed] = 4
        other = objective.suffix_states(EXAMPLE._replace(tokens=tokens))
        for p in range(5):
            seen = p + 1 <= changed and EXAMPLE.documents[0, p] == EXAMPLE.documents[0, changed]
            if used[p]:
                assert torch.allclose(states[0, p], other[0, p], rtol=1e-12, atol=1e-12) != seen, (changed, p)


def test_backward_positions_count_from_the_documents_end() -> None:
    """Suffixes that read alike have equal states, whatever lies before them."""
    objective = bst()
    one = objective.suffix_states(Batch(torch.tensor([[1, 3, 4]]), torch.tensor([[3, 4, END]])))
    two = objective.suffix_states(Batch(torch.tensor([[2, 1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 4, END]])))
    torch.testing.assert_close(one[0], two[0, 2:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_pairs", [1, 3, 1000])
def test_the_result_does_not_depend_on_the_chunk(chunk_pairs: int) -> None:
    batch = language_batch(5, 4, 8)
    objective = bst()
    expected = sums(objective(batch)), gradients(objective, total_loss(objective(batch)))
    objective.chunk_pairs = chunk_pairs
    terms = objective(batch)
    assert sums(terms) == pytest.approx(expected[0], rel=1e-12)
    for key, value in gradients(objective, total_loss(terms)).items():
        torch.testing.assert_close(value, expected[1][key], rtol=1e-9, atol=1e-12)


def test_the_text_head_gets_no_state_that_is_in_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = bst()
    got: list[tuple[Tensor, Tensor]] = []
    prepared = objective.networks.text_head.prepared

    def watched(prefixes: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
        got.append((prefixes.detach(), behind.detach()))
        return prepared(prefixes, behind)

    monkeypatch.setattr(objective.networks.text_head, "prepared", watched)
    objective(EXAMPLE)
    assert listed(objective.pairs(EXAMPLE)) == [(0, 1, 2), (0, 1, 3), (0, 2, 3), (0, 3, 4)]
    prefixes, behind = got[0]
    states = objective.trunk.hidden_states(EXAMPLE.tokens, EXAMPLE.documents)[0]
    assert torch.equal(prefixes, states[1:4])  # the first is prompt, and behind the last is nothing
    assert torch.equal(behind, objective.suffix_states(EXAMPLE)[0, 1:4])


@pytest.mark.parametrize("cells", [1, 64, 200])
def test_pairs_do_not_depend_on_how_many_rows_are_looked_at_together(
    cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keys in (None, torch.tensor([4, 9, 1, 7])):
        batch = language_batch(5, 4, 8)._replace(keys=keys)
        expected = listed(sample_pairs(batch, END, pair_fraction=0.5))
        with monkeypatch.context() as patch:
            patch.setattr(pairs, "CELLS_AT_ONCE", cells)
            assert listed(sample_pairs(batch, END, pair_fraction=0.5)) == expected


def plain_rows(rows: int, length: int, seed: int = 0, close: bool = True) -> Batch:
    """Unpacked rows without end tokens inside."""
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=seeded(seed))
    return Batch(tokens, F.pad(tokens[:, 1:], (0, 1), value=END if close else IGNORE))


def test_sampling_keeps_every_pair_that_touches_an_end_token() -> None:
    batch = plain_rows(50, 12)
    every, kept = listed(sample_pairs(batch, END)), set(listed(sample_pairs(batch, END, pair_fraction=0.01)))
    assert kept == {(b, t, s) for b, t, s in every if s == 12}
    opening = batch._replace(tokens=batch.tokens.clone())
    opening.tokens[:, 0] = END
    kept = set(listed(sample_pairs(opening, END, pair_fraction=0.01)))
    assert kept == {(b, t, s) for b, t, s in every if s == 12 or t == 0}


def test_sampling_keeps_the_asked_part_on_average_and_each_pair_equally_often() -> None:
    """78 pairs a row, 12 of them forced: the others have probability (0.4 * 78 - 12) / 66."""
    rows, length, fraction = 4000, 12, 0.4
    kept = sample_pairs(plain_rows(rows, length), END, pair_fraction=fraction)
    assert len(kept.row) / (rows * 78) == pytest.approx(fraction, abs=0.004)
    often = torch.zeros(length, length).index_put((kept.t, kept.p), torch.ones(len(kept.t)), accumulate=True) / rows
    free = often[:, :-1][torch.ones(length, length - 1).triu() > 0]
    assert free.sub((fraction * 78 - 12) / 66).abs().max() < 0.04  # five standard deviations
    both = torch.zeros(rows, length, length).index_put((kept.row, kept.t, kept.p), torch.tensor(1.0))
    together = (both[:, 0, 1] * both[:, 1, 2]).mean()
    assert together == pytest.approx(((fraction * 78 - 12) / 66) ** 2, abs=0.03)


def test_sampling_follows_the_key_of_a_row_and_nothing_else() -> None:
    """Not its place in the batch, its tokens, its padding, nor what was drawn before."""
    batch = plain_rows(2, 12, close=False)._replace(keys=torch.tensor([123456789, 2**40 + 5]))
    first = [(t, s) for b, t, s in listed(sample_pairs(batch, END, pair_fraction=0.5)) if b == 0]
    other = plain_rows(3, 14, seed=8, close=False)
    ids = torch.zeros(3, 14, dtype=torch.int64)
    ids[:, 12:] = -1
    other = other._replace(keys=torch.tensor([7, 8, 123456789]), documents=ids)
    torch.manual_seed(1)
    assert [(t, s) for b, t, s in listed(sample_pairs(other, END, pair_fraction=0.5)) if b == 2] == first
    second = [(t, s) for b, t, s in listed(sample_pairs(batch, END, pair_fraction=0.5)) if b == 1]
    assert first != second


def test_counts_know_the_sample_beforehand() -> None:
    objective, batch = bst(pair_fraction=0.3), plain_rows(6, 12)
    known = objective.counts(batch)["pair"]
    assert known == objective(batch)["pair"].count == objective.counts(batch)["pair"]
    assert 0 < int(known) < int(bst().counts(batch)["pair"])
    assert known != objective.counts(batch._replace(keys=torch.arange(6) + 50))["pair"]


def test_keyed_numbers_are_uniform_and_pinned() -> None:
    """The pinned values keep a resumed run on its pairs; neighbouring keys must not give neighbouring numbers."""
    n = torch.arange(100_000)
    u = keyed_uniform(n // 1000, n % 1000, n * 0)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert torch.histc(u, 20, 0, 1).div(5000).sub(1).abs().max() < 0.07  # five standard deviations
    pairs_of_neighbours = torch.stack([u[:-1], u[1:]])
    assert abs(float(torch.corrcoef(pairs_of_neighbours)[0, 1])) < 0.016
    pinned = keyed_uniform(torch.tensor([0, -1, 2**62]), torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    reference = [reference_uniform(0, 1, 4), reference_uniform(-1, 2, 5), reference_uniform(2**62, 3, 6)]
    assert pinned.tolist() == reference


def reference_uniform(*numbers: int) -> float:
    """The same generator on Python's unbounded integers."""
    state = 0
    for number in numbers:
        x = (state * 0x2545F4914F6CDD1D + number + 1 + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        state = x ^ (x >> 31)
    return (state >> 11) / 2**53


def test_tagging_batches_are_refused() -> None:
    batch = Batch(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 4, 1]]))
    for use in (bst(), bst().counts):
        with pytest.raises(NextLatError, match="row 0 has target 4 at position 1 before token 3"):
            use(batch)
    options = BSTOptions()
    with pytest.raises(NextLatError, match="next-token task"):
        BST.build(Transformer(5, 1, 1, 2), options, generator=seeded(0), end_token=0, next_token=False)
    check_next_token(batch._replace(documents=torch.tensor([[0, 0, 1]])))
    check_next_token(batch._replace(targets=torch.tensor([[2, IGNORE, 1]])))
    check_next_token(batch._replace(documents=torch.tensor([[0, 0, -1]])))


Wrong = Callable[[], object]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BST(Transformer(5, 1, 1, 2), None), "end token"),
        (lambda: BST(Transformer(5, 1, 1, 2), 0, min_gap=0), "min_gap is 0"),
        (lambda: BST(Transformer(5, 1, 1, 2), 0, min_gap=3, max_gap=2), "max_gap is 2"),
        (lambda: BST(Transformer(5, 1, 1, 2), 0, pair_fraction=0.0), "pair_fraction is 0"),
        (lambda: BST(Transformer(5, 1, 1, 2), 0, gap_one="both"), "gap_one is 'both'"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_errors(make: Wrong, message: str) -> None:
    with pytest.raises(NextLatError, match=message):
        make()


def test_only_our_trunk_can_be_an_encoder() -> None:
    table = nn.Embedding(5, 4)
    model = TorchModel(table, lambda x, _: table(x), lambda: table.weight, lambda: table.weight)
    with pytest.raises(NextLatError, match="TorchModel"):
        BST(model, END)


def test_plain_decoding_uses_the_empty_suffix_and_the_next_half() -> None:
    objective, batch = bst(), language_batch(3, 2, 6)
    lm = objective.as_lm()(batch.tokens, batch.documents)
    hidden = objective.model.hidden_states(batch.tokens, batch.documents)
    assert torch.equal(lm.hidden, hidden) and torch.equal(lm.probe_state, hidden)
    following, _ = text_head(objective, hidden[1, 3], objective.empty_suffix())
    torch.testing.assert_close(lm.logits[1, 3], objective.model.lm_head(following), rtol=1e-9, atol=1e-11)
    assert objective.drafter() is None


def test_plain_decoding_equals_the_pair_with_nothing_behind() -> None:
    """The law of the next token, given that the document ends after the row."""
    objective = bst()
    batch = Batch(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, END]]))
    logits = objective.as_lm()(batch.tokens).logits[0]
    f, b = objective.model.hidden_states(batch.tokens)[0], objective.suffix_states(batch)[0, 2]
    for t in range(3):
        following, _ = text_head(objective, f[t], b)
        torch.testing.assert_close(logits[t], objective.model.lm_head(following), rtol=1e-9, atol=1e-11)


def test_the_empty_suffix_follows_the_weights() -> None:
    objective = bst()
    lm, tokens = objective.as_lm(), torch.tensor([[1, 2, 3]])
    assert isinstance(lm, BSTModel)
    with torch.no_grad():
        before = lm(tokens).logits
        for parameter in objective.networks.backward_encoder.parameters():
            parameter.data = parameter.data * -1.5
        after = lm(tokens).logits
        cached = lm(tokens, cache=lm.new_cache(1, 3)).logits
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, objective.as_lm()(tokens).logits)
    torch.testing.assert_close(after, cached)


def test_the_pair_term_trains_both_encoders_the_table_and_both_heads() -> None:
    objective, batch = bst(), language_batch(5, 4, 8)
    for key, value in gradients(objective, objective(batch)["pair"].sum).items():
        assert value.any(), key
