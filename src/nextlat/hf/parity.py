"""Whether an exported folder, loaded by transformers alone, computes what the run computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nextlat.batch import Batch
from nextlat.decoding import generate
from nextlat.errors import NextLatError
from nextlat.hf.adapter import HFModel
from nextlat.hf.llama import llama_weights
from nextlat.model import Transformer
from nextlat.model.rotary import rotary_angles
from nextlat.training.trained import Trained

TOLERANCE = 1e-5
"""Largest difference of logits."""
_ROWS, _NEW = 4, 16
_SHORT = 256
"""Positions up to which the rounding of rotary angles does not show."""


class Parity(NamedTuple):
    """What was found."""

    single: float
    """Largest difference of logits in fp32."""
    double: float | None
    """The same in float64, where fp32 rounds large logits by more than the limit."""


def verify(folder: Path, trunk: Transformer, trained: Trained) -> Parity:
    """Compare the folder, loaded by transformers alone, with our own model.

    Logits at all positions of random, real and packed rows differ by at most 1e-5 in fp32. Where the largest logit is
    above 1, fp32 may round by more: they may then differ by 1e-5 of that logit (and by more in rows longer than 256
    tokens, in proportion), but must agree within 1e-5 when both models compute in float64. The greedy continuation of
    prompts is the same.

    Raises:
        NextLatError: it is not so.
    """
    from transformers import LlamaForCausalLM

    stock: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    stock.eval()
    ours = llama_weights(trunk)
    theirs = stock.state_dict()
    wrong = [name for name, value in ours.items() if name not in theirs or not torch.equal(value, theirs[name])]
    if wrong:
        raise NextLatError(f"transformers loads {wrong[0]} with other values than were written; this is a bug")
    rows = _rows(trained, trunk.vocab_size)
    single = _largest_difference(stock, trunk, rows, relative=True)
    if trained.built.task.next_token:
        _compare_greedy(stock, trunk, rows["real"].tokens)
    if single <= TOLERANCE:
        return Parity(single, None)
    _compare_rotary(stock, trunk, rows["real"].tokens.shape[1])
    wide = _in_double(stock)
    return Parity(single, _largest_difference(wide, copy.deepcopy(trunk).double(), rows, relative=False))


def _largest_difference(stock: Any, trunk: Transformer, rows: dict[str, Batch], relative: bool) -> float:
    """Of the logits at all positions; ``relative`` allows for what fp32 rounds where they are large."""
    adapter, worst = HFModel(stock), 0.0
    for kind, batch in rows.items():
        for tokens, documents in _single(batch):
            with torch.no_grad():
                expected = trunk(tokens, documents).logits
                found = adapter(tokens, documents).logits
            if documents is not None:
                expected, found = expected[documents >= 0], found[documents >= 0]
            difference = float((expected - found).abs().max())
            largest = float(expected.abs().max())
            limit = TOLERANCE * _rounding(largest, tokens.shape[1]) if relative else TOLERANCE
            if not difference <= limit:
                raise NextLatError(
                    f"logits of {kind} rows differ by {difference:.3g} between the run and its export, more than "
                    f"{limit:.3g} ({str(expected.dtype).removeprefix('torch.')}); nothing was exported"
                )
            worst = max(worst, difference)
    return worst


def _rounding(largest: float, length: int) -> float:
    """By what fp32 may exceed the limit: logits are rounded by their size, and rotary angles by their position."""
    return largest * max(1.0, length / _SHORT) if largest > 1 else 1.0


def _single(batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
    """One row at a time, because logits of long rows over a large vocabulary take much memory."""
    for row in range(len(batch.tokens)):
        here = slice(row, row + 1)
        yield batch.tokens[here], None if batch.documents is None else batch.documents[here]


def _rows(trained: Trained, vocab_size: int) -> dict[str, Batch]:
    """Whole rows to compare on: random, packed, and the first held-out ones."""
    task = trained.built.task
    length = task.sequence_length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (_ROWS, length), generator=generator)
    bounds = torch.rand(_ROWS, length, generator=generator) < 3 / length
    return {
        "random": Batch(tokens, tokens),
        "packed": Batch(tokens, tokens, bounds.cumsum(1)),
        "real": next(iter(task.evaluation(trained.config.evaluation.split))).rows(0, _ROWS),
    }


class _Rotary(nn.Module):
    """The trunk's table of cosines and sines, laid out as a stock model reads it."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (part[..., 0, :].to(states.dtype) for part in rotary_angles(position_ids, 1, self.head_width))
        half = sin[..., self.head_width // 2 :]  # the trunk negates the first half
        return cos, torch.cat([half, half], -1)


def _compare_rotary(stock: Any, trunk: Transformer, length: int) -> None:
    """Cosines and sines agree but for the rounding of their angles, which both libraries make in fp32 always."""
    positions = torch.arange(length)[None]
    own = _Rotary(trunk.width // trunk.n_heads)(torch.zeros(1), positions)
    theirs = stock.model.rotary_emb(torch.zeros(1), positions)
    difference = max(float((one - other).abs().max()) for one, other in zip(own, theirs, strict=True))
    limit = 4 * torch.finfo(torch.float32).eps * length
    if not difference <= limit:
        raise NextLatError(
            f"rotary positions differ by {difference:.3g} between the run and its export, more than {limit:.3g}; "
            "nothing was exported"
        )


def _in_double(stock: Any) -> Any:
    """The stock model made to compute in float64, in place.

    Its norms go through fp32 whatever the dtype is, and its rotary table is rounded in another way than ours; the
    norms are replaced by torch's, with the stock gain and epsilon, and the table by ours.
    """
    stock.double()
    kind = type(stock.model.norm)
    for module in list(stock.modules()):
        for name, norm in list(module.named_children()):
            if type(norm) is kind:
                exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(module, name, exact)
    stock.model.rotary_emb = _Rotary(stock.config.head_dim)
    return stock


def _compare_greedy(stock: Any, trunk: Transformer, tokens: Tensor) -> None:
    """Greedy continuations are equal, up to the first place where two tokens are tied within rounding."""
    prompts = tokens[:, : max(1, tokens.shape[1] // 2)]
    new = min(_NEW, max(1, tokens.shape[1] - prompts.shape[1]))
    ours = generate(trunk, prompts, new)
    with torch.no_grad():
        theirs = stock.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, prompts.shape[1] :]
    for row in (ours != theirs).any(1).nonzero()[:, 0].tolist():
        place = int((ours[row] != theirs[row]).nonzero()[0])
        with torch.no_grad():
            logits = trunk(torch.cat([prompts[row], ours[row, :place]])[None]).logits[0, -1]
        lead = float((logits[ours[row, place]] - logits[theirs[row, place]]).abs())
        if not lead <= 2 * TOLERANCE * max(1.0, float(logits.abs().max())):
            raise NextLatError(
                f"the greedy continuation of prompt {row} differs at token {place + 1} between the run and its export; "
                "nothing was exported"
            )
