"""What mtp, jtp and bst promise alike: isolation of documents, exact gradients at any cut, nothing at zero counts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError
from nextlat.model import Transformer
from nextlat.objectives import Objective, find_objective, token_losses, total_loss
from nextlat.objectives.immediate import Piece, immediate_sums
from tests.objectives.rivals import (
    END,
    VOCABULARY,
    announced,
    assert_same_gradients,
    gradients,
    language_batch,
    language_targets,
    loss_and_gradients,
    seeded,
    small,
    sums,
)

OPTIONS: dict[str, dict[str, object]] = {"mtp": {"horizon": 3}, "jtp": {"horizon": 3}, "bst": {}}
rivals = pytest.mark.parametrize("name", list(OPTIONS))


def make(name: str, **options: object) -> Objective:
    return small(name, **(OPTIONS[name] | options))


def summed(
    objective: Objective, batches: Sequence[Batch]
) -> tuple[dict[str, float], dict[str, int], dict[str, Tensor]]:
    """Sums, counts and the gradient of the sum of all terms, batch after batch."""
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    gradient: dict[str, Tensor] = {}
    for batch in batches:
        terms = objective(batch)
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + float(term.sum.detach())
            counts[name] = counts.get(name, 0) + int(term.count)
        for key, value in gradients(objective, torch.stack([term.sum for term in terms.values()]).sum()).items():
            gradient[key] = gradient.get(key, 0.0) + value
    return totals, counts, gradient


def assert_same_summed(objective: Objective, batches: Sequence[Batch], others: Sequence[Batch]) -> None:
    found, expected = summed(objective, batches), summed(objective, others)
    assert found[0] == pytest.approx(expected[0], rel=1e-10, abs=1e-12)
    assert found[1] == expected[1]
    assert_same_gradients(found[2], expected[2])


def documents(lengths: Sequence[int], seed: int = 0) -> list[Batch]:
    """One row a document, closed or open, with or without a prompt."""
    g = seeded(seed)
    made = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(VOCABULARY, (1, length), generator=g)
        last = torch.full((1, length), END if index % 2 == 0 else 3)
        prompts = torch.full((1, length), index % 3)
        made.append(language_targets(tokens, torch.zeros_like(tokens), last, prompts))
    return made


def pack(parts: Sequence[Batch], ids: Sequence[int]) -> Batch:
    """The documents behind each other in one row."""
    tokens = torch.cat([part.tokens for part in parts], 1)
    names = torch.cat([torch.full_like(part.tokens, name) for part, name in zip(parts, ids, strict=True)], 1)
    return Batch(tokens, torch.cat([part.targets for part in parts], 1), names)


@rivals
def test_packed_row_equals_its_documents_alone(name: str) -> None:
    parts = documents([4, 1, 5, 2])
    assert_same_summed(make(name), [pack(parts, [0, 1, 2, 3])], parts)


@rivals
def test_ids_that_come_back_name_new_documents_and_order_does_not_matter(name: str) -> None:
    a, b, c = documents([3, 4, 2])
    objective = make(name)
    assert_same_summed(objective, [pack([a, b, c], [0, 1, 0])], [a, b, c])
    assert_same_summed(objective, [pack([a, b, c], [0, 1, 0])], [pack([c, a, b], [7, 3, 7])])


@rivals
def test_no_token_of_a_document_reaches_the_terms_of_another(name: str) -> None:
    """Horizon 3 and documents of three tokens: most windows run over a boundary, and some over two."""
    objective = make(name)
    parts = documents([3, 3, 3], seed=5)
    parts[1] = parts[1]._replace(targets=torch.full_like(parts[1].targets, IGNORE))
    before, gradient = loss_and_gradients(objective, pack(parts, [0, 1, 2]))
    for position in range(3):
        changed = parts[1].tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCABULARY
        other = pack([parts[0], parts[1]._replace(tokens=changed), parts[2]], [0, 1, 2])
        after, other_gradient = loss_and_gradients(objective, other)
        assert sums(after) == pytest.approx(sums(before), rel=1e-12)
        assert_same_gradients(other_gradient, gradient)


@rivals
def test_padding_changes_nothing_wherever_it_lies(name: str) -> None:
    objective = make(name)
    parts = documents([4, 3])
    padding = Batch(torch.tensor([[2, 0, 1]]), torch.tensor([[0, 1, 0]]))  # targets on padding must be ignored too
    assert_same_summed(objective, [pack([*parts, padding], [0, 1, -1])], [pack(parts, [0, 1])])
    assert_same_summed(objective, [pack([padding, parts[0], padding, parts[1]], [-1, 0, -2, 1])], [pack(parts, [0, 1])])


@rivals
def test_no_documents_mean_one_document_a_row(name: str) -> None:
    batch = language_batch(1, 3, 7, packed=False)
    assert_same_summed(make(name), [batch], [batch._replace(documents=torch.zeros_like(batch.tokens))])


@rivals
def test_counts_are_known_beforehand(name: str) -> None:
    objective = make(name)
    for seed in range(5):
        batch = language_batch(seed, 3, 7)
        terms = objective(batch)
        assert {key: int(value) for key, value in objective.counts(batch).items()} == {
            key: int(term.count) for key, term in terms.items()
        }


def empty_batches() -> dict[str, Batch]:
    batch = language_batch(0, 2, 6, packed=False)
    nothing = torch.full_like(batch.targets, IGNORE)
    return {
        "all prompt": batch._replace(targets=nothing),
        "all padding": batch._replace(documents=torch.full_like(batch.tokens, -1)),
        "one open token": Batch(batch.tokens[:, :1], nothing[:, :1]),
        "documents of one token": Batch(batch.tokens, nothing, torch.arange(6).expand(2, 6)),
    }


@rivals
@pytest.mark.parametrize("case", list(empty_batches()))
@pytest.mark.parametrize("known", [False, True])
def test_nothing_to_predict_gives_zero_and_zero_gradients(name: str, case: str, known: bool) -> None:
    objective, batch = make(name), empty_batches()[case]
    terms = objective(batch, announced(objective, batch, objective.counts(batch)) if known else None)
    assert set(sums(terms).values()) == {0.0}
    assert all(int(term.count) == 0 for term in terms.values())
    for key, gradient in gradients(objective, total_loss(terms)).items():
        assert not gradient.any(), key


@pytest.mark.parametrize("name", ["mtp", "jtp"])
def test_rows_no_longer_than_the_horizon_keep_their_term_names(name: str) -> None:
    objective = make(name)
    terms = objective(language_batch(0, 2, 2, packed=False))
    assert list(terms) == ["ce", f"{name}_1", f"{name}_2", f"{name}_3"]
    assert sums(terms)[f"{name}_2"] == sums(terms)[f"{name}_3"] == 0.0
    gradients(objective, total_loss(terms))


@rivals
@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize("known", [False, True])
def test_micro_batches_with_uneven_counts_add_up_to_the_whole(name: str, pieces: int, known: bool) -> None:
    """Also two ranks, which differ from micro-batches in nothing but where the sum is taken."""
    objective = make(name)
    batch = language_batch(3, 8, 7)._replace(keys=torch.arange(8) + 100)
    if name == "bst":
        objective = make(name, pair_fraction=0.5)
    counts = objective.counts(batch)
    whole = gradients(objective, total_loss(objective(batch), counts))
    parts = [batch.rows(start, start + 8 // pieces) for start in range(0, 8, 8 // pieces)]
    assert len({int(objective.counts(part)[key]) for part in parts for key in counts}) > 1
    scale = announced(objective, batch, counts) if known else None
    objective.zero_grad(set_to_none=True)
    for part in parts:
        total_loss(objective(part, scale), counts).backward()
    found = {key: parameter.grad for key, parameter in objective.named_parameters()}
    assert_same_gradients(found, whole, rtol=1e-11, atol=1e-13)


@rivals
def test_row_order_does_not_matter(name: str) -> None:
    objective = make(name, **({"pair_fraction": 0.5} if name == "bst" else {}))
    batch = language_batch(2, 4, 7)._replace(keys=torch.tensor([5, 2**62, -3, 8]))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Batch(batch.tokens[order], batch.targets[order], batch.documents[order], batch.keys[order])
    assert_same_summed(objective, [batch], [shuffled])


def plain_sums(
    pieces: Sequence[Piece],
    n_terms: int,
    states: Sequence[Tensor],
    parameters: Sequence[Tensor],
    scale: Sequence[float] | None = None,
) -> Tensor:
    """What :func:`immediate_sums` promises, by ordinary differentiation."""
    totals = [states[0].sum() * 0.0 for _ in range(n_terms)]
    for piece in pieces:
        totals[piece.term] = totals[piece.term] + piece.value(*states)
    return torch.stack(totals)


@rivals
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 5, None])
def test_gradients_made_in_the_forward_pass_are_the_ordinary_ones(
    name: str, tie: bool, rows_at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any block size, announced factors or not, and a loss scaled on top."""
    module = f"nextlat.objectives.{name}"
    batch = language_batch(4, 3, 7)
    monkeypatch.setattr(f"{module}.immediate_sums", plain_sums)
    objective = make(name, tie=tie)
    terms = objective(batch)
    expected = gradients(objective, 7.0 * total_loss(terms))
    monkeypatch.setattr(f"{module}.immediate_sums", immediate_sums)
    again = make(name, tie=tie)
    if rows_at_once is not None:
        monkeypatch.setattr(token_losses, "PLAIN_LOGITS", 0)
        monkeypatch.setattr(token_losses, "rows_per_block", lambda *_: rows_at_once)
        again.chunk_pairs = 3 * rows_at_once  # of bst
    counts = again.counts(batch)
    for scale in (None, announced(again, batch, counts)):
        found = again(batch, scale)
        assert sums(found) == pytest.approx(sums(terms), rel=1e-12)
        assert_same_gradients(gradients(again, 7.0 * total_loss(found, counts)), expected)


@pytest.mark.parametrize("name", ["mtp", "jtp"])
def test_terms_weighed_otherwise_than_announced_are_refused(name: str) -> None:
    objective, batch = make(name), language_batch(4, 3, 7)
    terms = objective(batch, announced(objective, batch, objective.counts(batch)))
    with pytest.raises(NextLatError, match="announced"):
        terms[f"{name}_1"].sum.backward()


@rivals
def test_each_sum_can_be_differentiated_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = language_batch(4, 3, 7)
    objective = make(name)
    terms = objective(batch)
    with monkeypatch.context() as patch:
        patch.setattr(f"nextlat.objectives.{name}.immediate_sums", plain_sums)
        plain = objective(batch)
    for key in terms:
        weights = list(objective.model.parameters())
        found = torch.autograd.grad(terms[key].sum, weights, retain_graph=True)
        expected = torch.autograd.grad(plain[key].sum, weights, retain_graph=True, allow_unused=True)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if two is None else two, rtol=1e-9, atol=1e-11)


@rivals
def test_without_gradient_only_the_sums_are_made(name: str) -> None:
    objective, batch = make(name), language_batch(4, 3, 7)
    with torch.no_grad():
        terms = objective(batch)
    assert not any(term.sum.requires_grad for term in terms.values())
    assert sums(terms) == pytest.approx(sums(objective(batch)), rel=1e-12)


@rivals
def test_autocast_keeps_losses_in_fp32(name: str) -> None:
    objective, batch = make(name).float(), language_batch(6, 4, 8)
    exact, exact_gradient = loss_and_gradients(objective, batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective(batch)
    assert all(term.sum.dtype is torch.float32 for term in terms.values())
    assert sums(terms) == pytest.approx(sums(exact), rel=0.02)
    found = gradients(objective, total_loss(terms))
    both = [torch.cat([g.flatten() for g in gradient.values()]) for gradient in (found, exact_gradient)]
    assert F.cosine_similarity(both[0], both[1], dim=0) > 0.99


@rivals
def test_huge_logits_stay_finite(name: str) -> None:
    objective = make(name)
    with torch.no_grad():
        objective.model.lm_head.weight.mul_(1e4)
    terms, gradient = loss_and_gradients(objective, language_batch(6, 4, 8))
    assert all(torch.isfinite(term.sum) for term in terms.values())
    assert all(torch.isfinite(value).all() for value in gradient.values())


@rivals
def test_a_vocabulary_of_one_costs_nothing(name: str) -> None:
    kind = find_objective(name)
    trunk = Transformer(1, 2, 2, 8, generator=seeded(0))
    objective = kind.build(trunk, kind.Options(), generator=seeded(1), end_token=0, next_token=True)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    assert set(sums(objective(Batch(tokens, tokens))).values()) == {0.0}


@rivals
def test_the_trunk_is_drawn_before_and_apart_from_everything_else(name: str) -> None:
    kind = find_objective(name)
    for options in OPTIONS[name], {}:
        trunk = Transformer(VOCABULARY, 2, 2, 8, generator=seeded(3))
        objective = kind.build(trunk, kind.Options(**options), generator=seeded(9), end_token=END, next_token=True)
        assert objective.model is trunk
        fresh = Transformer(VOCABULARY, 2, 2, 8, generator=seeded(3)).state_dict()
        assert all(torch.equal(value, fresh[key]) for key, value in objective.model.state_dict().items())
        beside = objective.auxiliary()
        again = kind.build(trunk, kind.Options(**options), generator=seeded(9), end_token=END, next_token=True)
        assert all(torch.equal(a, b) for a, b in zip(beside.parameters(), again.auxiliary().parameters(), strict=True))
        inside = {id(parameter) for parameter in trunk.parameters()}
        assert not inside & {id(parameter) for parameter in beside.parameters()}
        assert len(inside) + len(list(beside.parameters())) == len(list(objective.parameters()))


@rivals
def test_first_weights_follow_the_stated_law(name: str) -> None:
    kind = find_objective(name)
    trunk = Transformer(VOCABULARY, 1, 2, 128, generator=seeded(3))
    objective = kind.build(trunk, kind.Options(), generator=seeded(9), end_token=END, next_token=True)
    for key, parameter in objective.auxiliary().named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), key
            assert abs(parameter.mean().item()) < 0.001, key
        elif parameter.ndim == 1 and key != "combine_norm.bias":
            assert (parameter == 1).all(), key


@rivals
def test_plain_decoding_with_a_cache_equals_the_full_pass(name: str) -> None:
    lm = make(name).as_lm()
    tokens = torch.randint(VOCABULARY, (2, 7), generator=seeded(1))
    full = lm(tokens)
    cache = lm.new_cache(2, 7)
    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        parts.append(lm(tokens[:, start:stop], cache=cache))
        assert parts[-1].cache is cache and cache.lengths == [stop, stop]
    for field in ("logits", "hidden", "probe_state"):
        found = torch.cat([getattr(part, field) for part in parts], 1)
        torch.testing.assert_close(found, getattr(full, field), rtol=1e-10, atol=1e-12)


@rivals
def test_logits_can_be_had_at_one_position_of_each_row(name: str) -> None:
    lm = make(name).as_lm()
    tokens = torch.randint(VOCABULARY, (2, 7), generator=seeded(1))
    full, found = lm(tokens), lm(tokens, logits_at=torch.tensor([6, 3]))
    torch.testing.assert_close(found.logits, full.logits[[0, 1], [6, 3]][:, None], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.hidden, full.hidden, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mtp", "jtp"])
def test_plain_decoding_has_the_logits_behind_the_cross_entropy(name: str) -> None:
    objective, batch = make(name), language_batch(4, 3, 7)
    logits = objective.as_lm()(batch.tokens, batch.documents).logits
    targets = batch.targets.masked_fill(batch.documents < 0, IGNORE)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert sums(objective(batch))["ce"] == pytest.approx(float(expected.detach()), rel=1e-12)


@rivals
def test_plain_decoding_is_blind_to_other_documents_and_to_the_offset(name: str) -> None:
    lm = make(name).as_lm()
    alone = torch.randint(VOCABULARY, (1, 4), generator=seeded(1))
    for before in (1, 3):
        tokens = torch.cat([torch.randint(VOCABULARY, (1, before), generator=seeded(2)), alone], 1)
        ids = torch.tensor([[0] * before + [1] * 4])
        torch.testing.assert_close(lm(tokens, ids).logits[:, before:], lm(alone).logits, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["mtp", "jtp"])
def test_a_weight_of_zero_leaves_the_term_out(name: str) -> None:
    """Broken weights that only the further tokens read must not reach the total."""
    objective, batch = make(name, mtp_weight=0.0), language_batch(4, 3, 7)
    with torch.no_grad():
        if name == "mtp":
            for parameter in objective.heads.parameters():
                parameter.fill_(torch.nan)
        else:
            objective.fetch.bias[:, 1:] = torch.nan
    terms = objective(batch)
    assert list(terms) == ["ce"] == list(objective.counts(batch))
    total_loss(terms).backward()
    for key, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", ["mtp", "jtp"])
def test_each_step_has_its_own_count_and_an_equal_share_of_the_weight(name: str) -> None:
    """A mean over pooled positions, or a weight that forgets empty steps, gives another number."""
    objective = make(name, mtp_weight=0.6)
    tokens = torch.tensor([[1, 2, 3, 4]])
    terms = objective(Batch(tokens, torch.tensor([[IGNORE, 3, 4, 2]])))
    assert {key: (int(term.count), term.weight) for key, term in terms.items()} == {
        "ce": (3, 1.0),
        f"{name}_1": (3, pytest.approx(0.2)),
        f"{name}_2": (2, pytest.approx(0.2)),
        f"{name}_3": (1, pytest.approx(0.2)),
    }


@pytest.mark.parametrize("name", ["mtp", "jtp"])
def test_tagging_targets_are_used_as_given(name: str) -> None:
    objective, batch = make(name), language_batch(4, 3, 7)
    other = batch._replace(targets=torch.where(batch.targets == IGNORE, IGNORE, (batch.targets + 1) % VOCABULARY))
    assert sums(objective(other)) != pytest.approx(sums(objective(batch)), rel=1e-3)


@pytest.mark.parametrize("name", ["mtp", "jtp"])
def test_bad_settings_are_errors(name: str) -> None:
    kind = find_objective(name)
    for bad in ({"horizon": -1}, {"mtp_weight": -0.5}, {"mtp_weight": float("nan")}):
        with pytest.raises(NextLatError, match=next(iter(bad))):
            kind(Transformer(VOCABULARY, 2, 2, 8), **bad)
