"""A torch model behind three callables: what it is tried for, and what cannot be done with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nextlat import GPT, NextLatError, TorchModel, generate, total_loss
from nextlat.batch import Batch
from nextlat.model import Transformer

V = 13


def rows(length: int = 7) -> Batch:
    tokens = torch.randint(V, (3, length), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, tokens, (torch.arange(length) >= 3).long().expand(3, -1))


class Recurrent(nn.Module):
    """A GRU; ``careful`` begins anew at every document."""

    def __init__(self, careful: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.careful = careful
        self.embedding, self.head = nn.Embedding(V, 8), nn.Linear(8, V, bias=False)
        self.cell = nn.GRUCell(8, 8)

    def states(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        state, found = torch.zeros(len(tokens), 8), []
        for place in range(tokens.shape[1]):
            if self.careful and documents is not None and place > 0:
                state = state * (documents[:, place] == documents[:, place - 1])[:, None]
            state = self.cell(self.embedding(tokens[:, place]), state)
            found.append(state)
        return torch.stack(found, 1)


def wrapped(model: Recurrent) -> TorchModel:
    return TorchModel(model, model.states, lambda: model.embedding.weight, lambda: model.head.weight)


def test_a_model_that_ignores_documents_is_refused_on_packed_rows_only() -> None:
    objective = GPT(wrapped(Recurrent(careful=False)))
    batch = rows()
    objective(batch._replace(documents=None))
    for _ in range(2):
        with pytest.raises(NextLatError, match="a document packed behind another gets other states in Recurrent"):
            objective(batch)


@pytest.mark.parametrize("length", [4, 7, 2 * V])
def test_a_model_that_begins_anew_at_every_document_trains(length: int) -> None:
    model = Recurrent(careful=True)
    total_loss(GPT(wrapped(model))(rows(length))).backward()
    assert model.embedding.weight.grad is not None


def test_our_trunk_passes() -> None:
    trunk = Transformer(V, 2, 2, 16)
    model = TorchModel(trunk, trunk.hidden_states, lambda: trunk.embedding_weight, lambda: trunk.head_weight)
    batch = rows()
    assert torch.equal(model.hidden_states(batch.tokens, batch.documents), trunk.hidden_states(*batch[::2]))


def test_a_model_that_takes_no_documents_says_what_to_do() -> None:
    model = Recurrent(careful=True)

    def states(tokens: Tensor, documents: Tensor | None) -> Tensor:
        if documents is not None:
            raise ValueError("no documents here")
        return model.states(tokens, None)

    objective = GPT(TorchModel(model, states, lambda: model.embedding.weight, lambda: model.head.weight))
    with pytest.raises(NextLatError, match=r"ValueError: no documents here.*documents=None"):
        objective(rows())


def test_decoding_is_refused_with_the_reason() -> None:
    with pytest.raises(NextLatError, match="Recurrent is known by its states only"):
        generate(GPT(wrapped(Recurrent(careful=True))).as_lm(), torch.ones(1, 2, dtype=torch.int64), 3)
