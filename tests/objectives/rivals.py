"""Small random models and batches for the tests of mtp, jtp and bst."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from nextlat.batch import IGNORE, Batch
from nextlat.model import Transformer
from nextlat.objectives import Objective, Term, find_objective, total_loss
from tests.batches import document_ids

VOCABULARY = 5
END = 0


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def roughen(module: nn.Module, seed: int = 0) -> None:
    """Weights so large and uneven that a wrong index, norm or mask shows: fresh ones make all logits alike."""
    g = seeded(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.7)
            elif name.endswith("norm.weight") or "layernorm" in name:
                parameter.uniform_(0.5, 1.5, generator=g)
            else:
                parameter.normal_(0.0, 0.4, generator=g)


def small(name: str, seed: int = 0, tie: bool = False, n_layers: int = 2, **options: Any) -> Objective:
    """An objective around a float64 trunk of width 8 with two heads."""
    trunk = Transformer(VOCABULARY, n_layers, 2, 8, tie_embeddings=tie, generator=seeded(seed))
    kind = find_objective(name)
    objective = kind.build(
        trunk, kind.Options(**options), generator=seeded(seed + 1), end_token=END, next_token=True
    ).double()
    roughen(objective, seed)
    return objective


def language_batch(seed: int, rows: int, length: int, packed: bool = True) -> Batch:
    """Next-token rows of short documents, some closed by an end token, with prompts, and padding when packed."""
    g = seeded(seed)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=g)
    documents = torch.zeros_like(tokens)
    if packed:
        documents = (torch.rand(rows, length, generator=g) < 0.3).cumsum(1)
        documents[::2, length - 1 - seed % 2 :] = -1
    prompts = torch.randint(0, 3, (rows, length + 1), generator=g)
    last = torch.where(torch.rand(rows, length, generator=g) < 0.5, END, IGNORE)
    batch = language_targets(tokens, documents, last, prompts)
    return batch if packed else batch._replace(documents=None)


def language_targets(tokens: Tensor, documents: Tensor, last: Tensor, prompts: Tensor) -> Batch:
    """Next tokens as targets; ``last`` at document ends; the first ``prompts`` targets of documents not asked."""
    targets = last.clone()
    for b, ids in enumerate(documents.tolist()):
        start = 0
        for t in range(len(ids)):
            if t and ids[t] != ids[t - 1]:
                start = t
            if t + 1 < len(ids) and ids[t] == ids[t + 1]:
                targets[b, t] = tokens[b, t + 1]
            if t - start < prompts[b, start]:
                targets[b, t] = IGNORE
    return Batch(tokens, targets, documents)


@st.composite
def language_batches(draw: st.DrawFn, max_rows: int = 2, max_length: int = 8) -> Batch:
    """Next-token batches with documents, prompts and padding; whatever lies behind a document may be its target."""
    rows, length = draw(st.integers(1, max_rows)), draw(st.integers(1, max_length))

    def table(cell: st.SearchStrategy[int]) -> Tensor:
        row = st.lists(cell, min_size=length, max_size=length)
        return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))

    packed = draw(st.booleans())
    ids = [draw(document_ids(length)) if packed else [0] * length for _ in range(rows)]
    last = table(st.sampled_from([END, END, IGNORE, 1, 2]))
    batch = language_targets(table(st.integers(0, VOCABULARY - 1)), torch.tensor(ids), last, table(st.integers(0, 3)))
    return batch if packed else batch._replace(documents=None)


def announced(objective: Objective, batch: Batch, counts: dict[str, Tensor]) -> dict[str, float]:
    """The factors a trainer on one device announces: weight over global count."""
    with torch.no_grad():
        return {name: term.weight / max(int(counts[name]), 1) for name, term in objective(batch).items()}


def gradients(objective: Objective, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter; fails if one is missing."""
    objective.zero_grad(set_to_none=True)
    loss.backward()
    found = {}
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        found[name] = parameter.grad.clone()
    return found


def sums(terms: dict[str, Term]) -> dict[str, float]:
    """The plain numbers of terms."""
    return {name: float(term.sum.detach()) for name, term in terms.items()}


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    """Equal to rounding, parameter by parameter."""
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def loss_and_gradients(objective: Objective, batch: Batch) -> tuple[dict[str, Term], dict[str, Tensor]]:
    """Terms of a batch and the gradient of their total."""
    terms = objective(batch)
    return terms, gradients(objective, total_loss(terms))
