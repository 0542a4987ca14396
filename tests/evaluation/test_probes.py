"""Probes find what a state holds and nothing else, at every offset, on exactly the pairs they should."""

from __future__ import annotations

import sys
from collections import Counter
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.batch import IGNORE, Batch
from nextlat.config import ProbeOptions
from nextlat.errors import NextLatError
from nextlat.evaluation import ngrams
from nextlat.evaluation.decodability import decodability, ridge_classifier
from nextlat.evaluation.ngrams import Skipgrams
from nextlat.evaluation.probes import (
    exact,
    fit,
    gradient,
    negative_log_likelihood,
    pairs,
    probes,
    states_of,
    training_batches,
    whiten,
)
from nextlat.statistics import Metric
from nextlat.tasks.base import Passages
from tests.evaluation.models import subject
from tests.evaluation.texts import States, Stream, constant, last_token, window

END = 0


def measured(task: Stream, model: Any, **options: Any) -> dict[str, Metric]:
    chosen = {"offsets": 3, "steps": 150, "batch_size": 8, "learning_rate": 0.3, "pairs": ["document"]}
    return probes(subject(task, model, probes=ProbeOptions(**(chosen | options)), split="validation"))


def value(metrics: dict[str, Metric], name: str) -> float:
    return float(metrics[name].value)


def random_stream(n: int = 2000, vocab_size: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


def random_batch(seed: int) -> Batch:
    """Packed rows with prompts, padding and ids that come back."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (4, 9), generator=generator)

    documents = draw(3).sort(1).values
    documents[:, 6:] = torch.where(draw(2)[:, 6:] > 0, documents[:, 6:], 0)
    documents[0, 7:] = -1
    targets = torch.where(draw(5) > 0, draw(7), IGNORE)
    targets[documents < 0] = IGNORE
    return Batch(draw(7), targets, documents)


@pytest.mark.parametrize("kind", ["document", "row"])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_those_of_plain_loops(kind: str, seed: int) -> None:
    batch = random_batch(seed)
    assert batch.documents is not None
    rows, length = batch.tokens.shape
    for offset in range(1, length + 1):
        wanted = []
        for row in range(rows):
            ids, targets = batch.documents[row].tolist(), batch.targets[row].tolist()
            for t in range(length - offset + 1):
                at = t + offset - 1
                if targets[at] == IGNORE or ids[at] < 0 or ids[t] < 0:
                    continue
                if kind == "document" and len(set(ids[t : at + 1])) > 1:
                    continue  # the token lies behind a boundary
                wanted.append((row * length + t, row, targets[at]))
        found = pairs(batch, offset, kind)
        assert list(zip(found.source.tolist(), found.row.tolist(), found.target.tolist(), strict=True)) == wanted


def test_a_pair_may_ask_for_the_end_of_its_document_but_for_nothing_behind_it() -> None:
    task = Stream(torch.tensor([END, 1, 2, END, 3, 4, 1]), 6, 5)
    batch = task.whole()
    found = [pairs(batch, offset, "document") for offset in (1, 2, 3)]
    assert [p.source.tolist() for p in found] == [[0, 1, 2, 3, 4, 5], [0, 1, 3, 4], [0, 3]]
    assert [p.target.tolist() for p in found] == [[1, 2, END, 3, 4, 1], [2, END, 4, 1], [END, 1]]
    assert [len(pairs(batch, offset, "row").target) for offset in (1, 2, 3)] == [6, 5, 4]


def test_pairs_of_a_row_without_documents_are_the_same_for_both_kinds() -> None:
    batch = Batch(random_stream(40).view(4, 10), random_stream(40, seed=1).view(4, 10))
    for offset in (1, 5, 10):
        one, other = (pairs(batch, offset, kind) for kind in ("document", "row"))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert len(one.target) == 4 * (11 - offset)


def test_a_state_that_holds_the_present_token_foretells_a_cyclic_text_at_every_offset() -> None:
    task = Stream(torch.arange(1201) % 6, 20, 6, end_token=None)
    metrics = measured(task, States(last_token(6), 6), offsets=9)
    for offset in range(1, 10):
        assert value(metrics, f"probe_ce_{offset}") < 0.02
        assert metrics[f"probe_ce_{offset}"].n == 60 * (21 - offset)
        assert value(metrics, f"probe_bigram_{offset}") < 0.02
    assert value(metrics, "probe_unigram") == pytest.approx(log(6), abs=1e-3)


@pytest.mark.parametrize(("width", "known"), [(7, 7), (6, 0)])
def test_a_window_foretells_what_it_holds_and_nothing_older(width: int, known: int) -> None:
    """The second half of a row repeats the first, so from place 6 to 12 the next token is the one six places back."""
    draws = torch.randint(1, 5, (300, 1, 7), generator=torch.Generator().manual_seed(0)).expand(-1, 2, -1)
    task = Stream(torch.cat([draws.flatten(), torch.ones(1).long()]), 14, 5, end_token=None)
    inside = (torch.arange(14) >= 6) & (torch.arange(14) < 13)
    model = States(lambda tokens, documents=None: window(5, width)(tokens) * inside[None, :, None], 5)
    metrics = measured(task, model, offsets=1, steps=400)
    # a probe without bias can only answer a state of zeros by the uniform law
    expected = (7 * log(5) + (7 - known) * log(4)) / 14
    assert value(metrics, "probe_ce_1") == pytest.approx(expected, abs=0.06)


def test_a_constant_state_is_worth_the_unigram_and_no_more() -> None:
    stream = torch.where(random_stream() > 1, 1, 2)  # 3/5 and 2/5
    task = Stream(stream, 20, 5, end_token=None)
    metrics = measured(task, States(constant, 5), offsets=2)
    frequencies = torch.bincount(task.whole().targets.flatten()).double() / task.whole().targets.numel()
    entropy = -sum(float(p * p.log()) for p in frequencies if p > 0)
    for offset in (1, 2):
        assert value(metrics, f"probe_ce_{offset}") == pytest.approx(entropy, abs=0.01)
    assert value(metrics, "probe_unigram") == pytest.approx(entropy, abs=0.01)


def test_the_state_that_probes_read_is_the_probe_state() -> None:
    """``hidden`` of these models is NaN."""
    task = Stream(random_stream(500), 20, 5, end_token=None)
    assert value(measured(task, States(last_token(5), 5), steps=5), "probe_ce_1") < 3


def test_training_by_steps_comes_near_the_exact_optimum() -> None:
    task = Stream(random_stream(3000, 5), 20, 5)
    states = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    model = States(lambda tokens, documents=None: states[tokens] * 30, 5)
    metrics = measured(task, model, offsets=2, steps=400, learning_rate=0.1)
    whole = task.whole()
    for offset in (1, 2):
        p = pairs(whole, offset, "document")
        h = states[whole.tokens.flatten()[p.source]].double()
        best = negative_log_likelihood(h, exact(h, p.target, 5), p.target).mean()
        assert best < log(5)
        assert best - 1e-3 < value(metrics, f"probe_ce_{offset}") < best + 0.01


def test_the_scale_of_states_does_not_matter() -> None:
    task = Stream(random_stream(600), 20, 5)
    one, other = (
        measured(task, States(lambda tokens, documents=None, s=s: s * last_token(5)(tokens), 5), steps=20)
        for s in (1.0, 64.0)
    )
    assert one.keys() == other.keys()
    assert all(value(one, name) == pytest.approx(value(other, name), rel=1e-5) for name in one)


def test_how_states_are_stretched_does_not_matter() -> None:
    """The token lies in directions a hundred times shorter than one that says nothing, as training may leave them."""
    task = Stream(torch.arange(1201) % 8, 20, 8, end_token=None)
    plain, stretched = (
        measured(task, States(lambda tokens, documents=None, s=s: s * last_token(8)(tokens) + 1, 8), steps=30)
        for s in (1.0, 0.01)
    )
    for offset in (1, 2, 3):
        assert value(plain, f"probe_ce_{offset}") < 0.1
        assert value(stretched, f"probe_ce_{offset}") < 0.1


def test_whitened_states_are_white() -> None:
    task = Stream(random_stream(4000), 20, 5)
    stretch = torch.tensor([1.0, 30.0, 0.01, 2.0, 5.0])
    model = States(lambda tokens, documents=None: last_token(5)(tokens) * stretch + 3, 5)
    found = subject(task, model, probes=ProbeOptions(offsets=1, steps=30, batch_size=8))
    states = torch.cat([states_of(found, batch).flatten(0, 1) for batch in training_batches(found)])
    white = (states @ whiten(found)).double()
    assert torch.allclose(white.T @ white / len(white), torch.eye(5).double(), atol=0.2)


def test_both_kinds_of_pairs_are_trained_and_measured_apart() -> None:
    """Documents of 4: behind a boundary the token is a coin toss, before it the next number."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(1, 3, (500,), generator=generator)
    stream = torch.stack([torch.zeros(500).long(), first, first + 2, first + 4], 1).flatten()
    task = Stream(stream, 20, 7)
    metrics = measured(task, States(last_token(7), 7), pairs=["document", "row"], offsets=3, steps=300)
    whole = task.whole()
    rows = len(whole.tokens)
    assert metrics["probe_row_ce_3"].n == rows * 18
    # of a document's four places the first two have a token of it, or its end, three places later
    assert metrics["probe_ce_3"].n == len(pairs(whole, 3, "document").target) == rows * 10
    assert value(metrics, "probe_ce_3") == pytest.approx(log(2) / 2, abs=0.05)
    assert value(metrics, "probe_row_ce_3") > value(metrics, "probe_ce_3") + 0.1
    assert not any(name.startswith("probe_row") for name in measured(task, States(constant, 7), steps=2))


def test_the_gradient_is_that_of_autograd_for_any_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(300, 6, generator=generator)
    targets = torch.randint(9, (300,), generator=generator)
    weight = torch.randn(9, 6, generator=generator, requires_grad=True)
    (wanted,) = torch.autograd.grad(F.cross_entropy(states @ weight.T, targets), weight)
    for size in (300, 64, 7):
        monkeypatch.setattr(sys.modules["nextlat.evaluation.probes"], "rows_per_block", lambda *_, size=size: size)
        assert torch.allclose(gradient(states, weight.detach(), targets), wanted, atol=1e-6)
    assert torch.equal(gradient(states[:0], weight.detach(), targets[:0]), torch.zeros(9, 6))


def test_skipgrams_are_witten_and_bells() -> None:
    stream = torch.tensor([1, 2, 1, 3, 1, 2, 2, 1, 2, 3])
    batch = Batch(stream[None, :-1], stream[None, 1:])
    table = Skipgrams(4, 2)
    table.add(batch, [pairs(batch, offset, "document") for offset in (1, 2)])
    unigram = {y: (n + 1) / (9 + 4) for y, n in ({0: 0} | Counter(stream[1:].tolist())).items()}
    assert table.unigram(torch.arange(4)).exp().reciprocal().tolist() == pytest.approx(
        list(dict(sorted(unigram.items())).values())
    )
    for offset in (1, 2):
        seen = Counter(zip(stream[:-offset].tolist(), stream[offset:].tolist(), strict=True))
        for x in range(4):
            n = sum(count for (a, _), count in seen.items() if a == x)
            d = sum(1 for a, _ in seen if a == x)
            wanted = [(seen[x, y] + d * unigram[y]) / (n + d) if n else unigram[y] for y in range(4)]
            assert sum(wanted) == pytest.approx(1)
            found = table.bigram(offset, torch.full((4,), x), torch.arange(4)).neg().exp()
            assert found.tolist() == pytest.approx(wanted)


def test_skipgrams_count_the_same_however_often_they_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = random_stream(900)
    whole = Batch(stream[None, :-1], stream[None, 1:])
    parts = [Batch(whole.tokens[:, i : i + 90], whole.targets[:, i : i + 90]) for i in range(0, 890, 90)]

    def counted() -> Tensor:
        table = Skipgrams(5, 2)
        for part in parts:
            table.add(part, [pairs(part, offset, "document") for offset in (1, 2)])
        x, y = torch.cartesian_prod(torch.arange(5), torch.arange(5)).unbind(1)
        return torch.stack([table.bigram(offset, x, y) for offset in (1, 2)])

    at_once = counted()
    monkeypatch.setattr(ngrams, "WAITING", 100)
    assert torch.equal(counted(), at_once)
    monkeypatch.setattr(ngrams, "MOST_PAIRS", 3)  # full after the first hundred
    assert not torch.equal(counted(), at_once)


def test_facts_are_read_where_they_are_told_by_a_classifier_of_the_training_texts() -> None:
    class Told(Stream):
        """A fact of three values, told by the third token of every row; the split's rows are numbered apart."""

        def __init__(self) -> None:
            super().__init__(random_stream(600), 20, 5)
            self.slots, self.facts, self.asked_for = ("before", "after", "beyond"), {"colour": 3}, []

        def passages(self, split: str, count: int) -> Passages:
            self.asked_for.append((split, count))
            n = min(count, 300)
            g = torch.Generator().manual_seed(len(split))
            tokens = torch.randint(3, (n, 6), generator=g)
            batch = Batch(tokens, tokens, torch.zeros_like(tokens))
            ends = torch.tensor([1, 4, -1]).repeat(n, 1)
            return Passages(batch, torch.zeros_like(tokens), ends, tokens[:, 2:3].clone(), torch.zeros(n, 1))

    def remembers(tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        told = F.one_hot(tokens[:, 2], 3).float()[:, None].expand(-1, tokens.shape[1], -1).clone()
        told[:, :2] = 0.5
        return told

    task = Told()
    found = decodability(subject(task, States(remembers, 5), split="validation"), task)
    assert set(found) == {"probe_fact_colour_before", "probe_fact_colour_after"}
    assert value(found, "probe_fact_colour_after") == 1.0
    assert value(found, "probe_fact_colour_before") == pytest.approx(1 / 3, abs=0.1)
    assert found["probe_fact_colour_after"].chance == pytest.approx(1 / 3)
    assert task.asked_for == [("train", 4000), ("validation", 1000)]
    swapped = Told()
    half = torch.arange(300) % 2 == 0

    def shifted(split: str, count: int) -> Passages:
        made = Told.passages(task, split, count)
        facts = (made.facts + (1 if split == "train" else 0) * half[: len(made.facts), None]) % 3
        return made._replace(facts=facts)

    swapped.passages = shifted  # type: ignore[method-assign]
    found = decodability(subject(swapped, States(remembers, 5), split="validation"), swapped)
    assert value(found, "probe_fact_colour_after") != pytest.approx(1.0)  # what was learned is not what is asked


def test_probing_changes_no_weight_and_reaches_no_gradient() -> None:
    embedding = torch.nn.Embedding(5, 8)
    before = embedding.weight.detach().clone()
    model = States(lambda tokens, documents=None: embedding(tokens), 5)
    measured(Stream(random_stream(600), 20, 5), model, steps=5)
    assert torch.equal(embedding.weight, before)
    assert embedding.weight.grad is None


def test_the_same_subject_gives_the_same_figures() -> None:
    task = Stream(random_stream(600), 20, 5)
    model = States(window(5, 3), 5)
    assert measured(task, model, steps=10) == measured(task, model, steps=10)


def test_probes_see_the_first_rows_of_each_training_step() -> None:
    task = Stream(random_stream(600), 20, 5)
    options = ProbeOptions(offsets=1, steps=3, batch_size=4)
    fit(subject(task, States(constant, 5), probes=options))
    assert task.asked[-3:] == [(0, 0, 4), (1, 0, 4), (2, 0, 4)]
    assert set(task.asked) == set(task.asked[-3:])


def test_offsets_beyond_the_row_and_models_without_a_probe_state_are_refused() -> None:
    task = Stream(random_stream(600), 20, 5)
    with pytest.raises(NextLatError, match=r"offsets is 20 and rows have 20 tokens"):
        measured(task, States(constant, 5), offsets=20)
    model = States(constant, 5)
    blind = lambda tokens, documents=None: model(tokens)._replace(probe_state=None)  # noqa: E731
    with pytest.raises(NextLatError, match="gives no probe_state"):
        measured(task, blind)


def test_a_ridge_classifier_finds_a_linear_fact_and_only_guesses_a_hidden_one() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(4, (2000,), generator=generator)
    noise = torch.randn(2000, 12, generator=generator)
    mixing = torch.randn(4, 12, generator=generator)
    states = F.one_hot(values, 4).float() @ mixing * 3 + 0.1 * noise + 7
    told, guessed = (ridge_classifier(x[:1500], values[:1500], 4)(x[1500:]) for x in (states, noise))
    assert (told == values[1500:]).float().mean() == 1.0
    assert (guessed == values[1500:]).float().mean() == pytest.approx(0.25, abs=0.07)
    still = ridge_classifier(torch.ones(10, 3), torch.tensor([2] * 6 + [1] * 4), 3)
    assert still(torch.ones(2, 3)).tolist() == [2, 2]
