"""Packing against a slow oracle: nothing lost, nothing twice, targets of the document and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextlat.batch import IGNORE, Batch
from nextlat.data import Documents, Plan, best_fit, collect, fixed_stride, pack, packed_rows
from nextlat.errors import NextLatError
from nextlat.objectives import OBJECTIVES, Objective
from tests.objectives.rivals import END, seeded, small

LENGTH_MAX = 9
OPTIONS: dict[str, dict[str, object]] = {
    "gpt": {},
    "mtp": {"horizon": 3},
    "jtp": {"horizon": 3},
    "bst": {},
    "nextlat": {"horizon": 3, "dynamics": {"hidden_dim": 6}},
}
Piece = tuple[int, list[int], list[int]]
"""Document, tokens, targets."""


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[list[int]], int | None, list[int] | None]:
    """Documents without end tokens, an end token or none, and prompts or none."""
    sequences = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=12))
    prompts = [draw(st.integers(0, len(sequence))) for sequence in sequences] if draw(st.booleans()) else None
    return sequences, draw(st.sampled_from([None, 0])), prompts


def whole(
    sequences: list[list[int]], end_token: int | None, prompts: list[int] | None
) -> list[tuple[list[int], list[int]]]:
    """Tokens and targets of every document alone, position by position."""
    documents = []
    for index, sequence in enumerate(sequences):
        tokens = sequence if end_token is None else [end_token, *sequence]
        prompt = prompts[index] if prompts is not None else 0
        answer_at = len(tokens) - len(sequence) + prompt  # first position whose token is asked for
        targets = []
        for t in range(len(tokens)):
            if t + 1 == len(tokens):
                targets.append(IGNORE if end_token is None else end_token)
            elif prompt and t + 1 < answer_at:
                targets.append(IGNORE)
            else:
                targets.append(tokens[t + 1])
        documents.append((tokens, targets))
    return documents


def pieces_of(batch: Batch) -> list[list[Piece]]:
    """Each row cut at its changes of id, padding left out."""
    rows = []
    for tokens, targets, ids in zip(*(part.tolist() for part in batch[:3]), strict=True):
        row: list[Piece] = []
        start = 0
        for stop in range(1, len(ids) + 1):
            if stop == len(ids) or ids[stop] != ids[start]:
                if ids[start] >= 0:
                    row.append((ids[start], tokens[start:stop], targets[start:stop]))
                else:
                    assert stop == len(ids) and set(targets[start:]) == {IGNORE}
                start = stop
        rows.append(row)
    return rows


def assert_every_token_once_with_its_target(batch: Batch, documents: list[tuple[list[int], list[int]]]) -> None:
    """``batch`` holds the pieces of each document in order."""
    seen = [0] * len(documents)
    for row in pieces_of(batch):
        for index, tokens, targets in row:
            place, seen[index] = seen[index], seen[index] + len(tokens)
            assert tokens == documents[index][0][place : seen[index]]
            assert targets == documents[index][1][place : seen[index]]
    assert seen == [len(tokens) for tokens, _ in documents]


def all_rows(documents: Documents, plan: Plan) -> Batch:
    return packed_rows(documents, plan, range(plan.rows))


@given(corpora(), st.integers(2, LENGTH_MAX), st.sampled_from([None, 1, 3]))
def test_best_fit_places_every_token_once_and_cuts_only_what_is_longer_than_a_row(
    corpus: tuple[list[list[int]], int | None, list[int] | None], row_length: int, buffer: int | None
) -> None:
    documents, expected = collect(*corpus), whole(*corpus)
    plan = best_fit(documents, row_length, buffer=buffer)
    # the rest of a long document may lie in an earlier row than its full rows: read rows by where their pieces begin
    long = documents.lengths[plan.document] > row_length
    pieces = sorted(
        zip(plan.begin.tolist(), plan.row.tolist(), plan.column.tolist(), plan.length.tolist(), strict=True)
    )
    assert len(pieces) == sum(-(-len(tokens) // row_length) for tokens, _ in expected)
    assert (plan.length[~long] == documents.lengths[plan.document[~long]]).all()
    batch = all_rows(documents, plan)
    everything: list[tuple[int, int]] = []
    for _, row, column, length in pieces:
        cells = (part[row, column : column + length].tolist() for part in batch[:2])  # type: ignore[index]
        everything += zip(*cells, strict=True)
    assert everything == [pair for document in expected for pair in zip(*document, strict=True)]
    for row, found in enumerate(pieces_of(batch)):
        assert [d for d, *_ in found] == plan.document[plan.row == row].tolist() == sorted({d for d, *_ in found})
    assert plan.utilisation == pytest.approx(len(everything) / batch.tokens.numel())
    assert batch.keys is not None and batch.keys.tolist() == list(range(plan.rows))


@given(corpora(), st.integers(2, LENGTH_MAX))
def test_fixed_stride_is_the_stream_of_documents_cut_every_row(
    corpus: tuple[list[list[int]], int | None, list[int] | None], row_length: int
) -> None:
    documents, expected = collect(*corpus), whole(*corpus)
    plan = fixed_stride(documents, row_length)
    batch = all_rows(documents, plan)
    assert_every_token_once_with_its_target(batch, expected)
    stream = [token for tokens, _ in expected for token in tokens]
    assert batch.tokens.flatten().tolist()[: len(stream)] == stream
    assert batch.documents is not None and int((batch.documents < 0).sum()) == -len(stream) % row_length
    if len(stream) >= row_length:
        full = all_rows(documents, fixed_stride(documents, row_length, drop_last=True))
        for one, other in zip(full[:3], batch[:3], strict=True):
            assert torch.equal(one, other[: len(stream) // row_length])  # type: ignore[index, arg-type]


def test_the_end_token_opens_documents_and_is_the_last_target_of_the_one_before() -> None:
    batch = pack([[5, 6], [7, 8, 9]], 4, "fixed_stride", end_token=0)
    assert batch.tokens.tolist() == [[0, 5, 6, 0], [7, 8, 9, 0]]
    # row 0 stops inside document 1, whose next token is known; the last place of row 1 is padding
    assert batch.targets.tolist() == [[5, 6, 0, 7], [8, 9, 0, IGNORE]]
    assert batch.documents is not None and batch.documents.tolist() == [[0, 0, 0, 1], [1, 1, 1, -1]]
    assert pack([[5, 6], [7, 8, 9]], 4, "fixed_stride").targets.tolist() == [[6, IGNORE, 8, 9], [IGNORE] * 4]


def test_the_last_prompt_token_counts_in_every_document_of_a_row() -> None:
    batch = pack([[5, 6, 7], [7, 8, 9]], 8, end_token=0, prompts=[2, 3])
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 7, 0, IGNORE, IGNORE, IGNORE, 0]]
    assert pack([[5, 6, 7]], 4, prompts=[1]).targets.tolist() == [[6, 7, IGNORE, IGNORE]]


def test_a_prompt_is_masked_on_both_sides_of_a_cut() -> None:
    batch = pack([[1, 2, 3, 4, 5, 6]], 3, prompts=[5])
    assert batch.targets.tolist() == [[IGNORE] * 3, [IGNORE, 6, IGNORE]]


def test_best_fit_takes_the_fullest_row_that_fits() -> None:
    lengths = [5, 4, 1, 3, 2]  # rows of 8: 5 + 3, then 4 + 2 + 1; first-fit-in-order would need 5 + 1 + 2 and 4 + 3
    plan = best_fit(collect([[1] * n for n in lengths]), 8)
    assert plan.rows == 2
    assert [sorted(plan.document[plan.row == row]) for row in range(2)] == [[0, 3], [1, 2, 4]]


def first_fit_in_order(lengths: list[int], row_length: int) -> int:
    free: list[int] = []
    for size in lengths:
        row = next((r for r, places in enumerate(free) if places >= size), None)
        if row is None:
            free.append(row_length - size)
        else:
            free[row] -= size
    return len(free)


@pytest.mark.parametrize("shape", ["uniform", "short", "long", "heavy_tailed"])
@pytest.mark.parametrize("seed", range(3))
def test_best_fit_wastes_no_more_than_first_fit_in_order(shape: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = {
        "uniform": rng.integers(1, 65, 300),
        "short": rng.integers(1, 12, 300),
        "long": rng.integers(25, 65, 300),
        "heavy_tailed": np.clip(rng.lognormal(2.5, 1, 300).astype(int), 1, 64),
    }[shape]
    documents = collect([[1] * int(n) for n in lengths])
    plan = best_fit(documents, 64)
    other = first_fit_in_order(lengths.tolist(), 64)
    assert plan.rows <= other
    assert plan.utilisation >= lengths.sum() / (other * 64) - 1e-12


def test_a_buffer_mixes_only_neighbours() -> None:
    lengths = np.random.default_rng(0).integers(1, 16, 60)
    plan = best_fit(collect([[1] * int(n) for n in lengths]), 16, buffer=10)
    for row in range(plan.rows):
        assert len({d // 10 for d in plan.document[plan.row == row].tolist()}) == 1


def test_rows_are_functions_of_their_number() -> None:
    documents = collect([[n % 9 + 1] * (n % 7 + 1) for n in range(30)], end_token=0)
    for plan in (best_fit(documents, 10), fixed_stride(documents, 10)):
        everything = all_rows(documents, plan)
        chosen = [plan.rows - 1, 0, 3, 0]
        some = packed_rows(documents, plan, chosen)
        for part, of_all in zip(some, everything, strict=True):
            assert torch.equal(part, of_all[chosen])  # type: ignore[index, arg-type]
        assert all(part.dtype is torch.int64 for part in some)  # type: ignore[union-attr]


def test_documents_may_lie_in_a_memory_mapped_file(tmp_path: Path) -> None:
    np.array([0, 1, 2, 0, 3], np.uint16).tofile(tmp_path / "tokens.bin")
    documents = Documents(np.memmap(tmp_path / "tokens.bin", np.uint16, "r"), [0, 3, 5], end_token=0)
    batch = packed_rows(documents, best_fit(documents, 5), [0], pad_token=9)
    assert batch.tokens.tolist() == [[0, 1, 2, 0, 3]] and batch.targets.tolist() == [[1, 2, 0, 3, 0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: collect([]), "no documents"),
        (lambda: collect([[1], []]), "document 1 has shape"),
        (lambda: collect([[1], [2, -3]]), "document 1 holds token -3"),
        (lambda: collect([[1.5]]), "document 0 holds float64"),  # type: ignore[list-item]
        (lambda: collect([[1, 0]], end_token=0), "document 0 holds the end token 0"),
        (lambda: collect([[1]], end_token=-1), "end_token is -1"),
        (lambda: collect([[1]], end_token=2.5), "end_token is 2.5; a token id is an integer"),  # type: ignore[arg-type]
        (lambda: pack([[1]], 4, pad_token=-3), "pad_token is -3; a token id is an integer of at least 0"),
        (lambda: collect([[1, 2]], prompts=[3]), "prompt of 3"),
        (lambda: collect([[1, 2]], prompts=[1, 1]), "2 prompt lengths for 1"),
        (lambda: Documents(np.array([1, 2]), [0, 1]), "from 0 to 1"),
        (lambda: Documents(np.array([1, 2]), [0, 1, 1, 2]), "document 1 has no tokens"),
        (lambda: Documents(np.array([1.0]), [0, 1]), "float64"),
        (lambda: best_fit(collect([[1]]), 1), "row_length is 1"),
        (lambda: fixed_stride(collect([[1]]), 1), "row_length is 1"),
        (lambda: fixed_stride(collect([[1]]), 2, drop_last=True), "fewer than a row of 2"),
        (lambda: best_fit(collect([[1], [1] * 5]), 4, cut=False), "document 1 has 5 tokens and a row 4"),
        (lambda: best_fit(collect([[1]]), 4, buffer=0), "buffer is 0"),
        (lambda: packed_rows(collect([[1]]), best_fit(collect([[1]]), 4), [1]), "row 1 was asked for"),
        (lambda: pack([[1]], 4, "worst_fit"), "worst_fit"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(NextLatError, match=message):
        make()


def sums_counts_gradients(
    objective: Objective, batch: Batch
) -> tuple[dict[str, float], dict[str, int], dict[str, Tensor]]:
    terms = objective(batch)
    objective.zero_grad(set_to_none=True)
    sum((1 + index) * term.sum for index, term in enumerate(terms.values())).backward()  # type: ignore[union-attr]
    return (
        {name: float(term.sum.detach()) for name, term in terms.items()},
        {name: int(term.count) for name, term in terms.items()},
        {name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None},
    )


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("strategy", ["best_fit", "fixed_stride"])
def test_packed_rows_are_worth_their_documents_run_alone(name: str, strategy: str) -> None:
    g = seeded(3)
    lengths = (4, 1, 7, 2, 5, 3)
    sequences = [torch.randint(1, 5, (n,), generator=g).tolist() for n in lengths]
    batch = pack(sequences, 8, strategy, end_token=END, prompts=[0, 1, 3, 0, 2, 0])  # type: ignore[arg-type]
    objective = small(name, n_layers=1, **OPTIONS[name])
    sums, counts, gradients = sums_counts_gradients(objective, batch)
    total: dict[str, Tensor] = {key: torch.zeros_like(value) for key, value in gradients.items()}
    for row in pieces_of(batch):
        for _, tokens, targets in row:
            alone = sums_counts_gradients(objective, Batch(torch.tensor([tokens]), torch.tensor([targets])))
            for key in sums:
                sums[key] -= alone[0][key]
                counts[key] -= alone[1][key]
            for key, value in alone[2].items():
                total[key] += value
    assert set(counts.values()) == {0}
    assert sums == pytest.approx(dict.fromkeys(sums, 0.0), abs=1e-9)
    for key, value in gradients.items():
        torch.testing.assert_close(value, total[key], rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


def test_the_picture_of_the_page_is_what_packing_does() -> None:
    page = (Path(__file__).parents[2] / "docs/packing.md").read_text(encoding="utf-8")
    batch = pack([[5, 6], [7, 8, 9]], row_length=8, end_token=0)
    for name in ("tokens", "targets", "documents"):
        line = next(line for line in page.splitlines() if line.startswith(name))
        drawn = [int(word) for word in line.split()[1:9]]
        assert drawn == getattr(batch, name)[0].tolist(), name
