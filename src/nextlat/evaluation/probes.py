"""Linear probes: how much the state at t says of the tokens 1 to 20 places ahead, and of the facts of a text.

The model is frozen. For each offset k a matrix without bias maps the state at t to logits of the token at t + k; all
offsets are trained together on shared states, by AdamW with a rate that falls linearly to zero, from zero weights. The
problem is convex, so the weights' start decides nothing. States are whitened first: what a linear map can read does
not depend on how states are scaled and stretched, but how soon training finds it does, and objectives differ in that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.evaluation.cross_entropy import pooled
from nextlat.evaluation.decodability import decodability
from nextlat.evaluation.ngrams import Skipgrams
from nextlat.evaluation.subject import Subject
from nextlat.objectives.positions import counted, token_positions
from nextlat.objectives.token_losses import rows_per_block
from nextlat.statistics import Metric

WHITENED_BY = 64
"""Positions for each entry of a state from which the whitening is computed."""
FLOOR = 1e-6
"""Directions of less variance than this share of the mean are not stretched to one."""
PREFIX = {"document": "probe", "row": "probe_row"}
"""Names of the metrics of each kind of pairs."""


class Pairs(NamedTuple):
    """Which state is asked for which token."""

    source: Tensor
    """(n,) places of the states in (B * T)."""
    row: Tensor
    """(n,) their rows."""
    target: Tensor
    """(n,) tokens."""


def probes(subject: Subject) -> dict[str, Metric]:
    """Train probes on frozen states of training rows and measure them on held-out rows.

    ``probe_ce_k`` is the held-out cross-entropy at offset k over pairs within one document, the end of the document
    included as a target; ``probe_row_ce_k`` that of probes trained and measured on all pairs within a row. Beside
    them stand ``probe_bigram_k`` (``probe_row_bigram_k``), what a table of pairs of tokens k apart makes of the same
    held-out pairs, and ``probe_unigram``, what the frequencies of tokens make of the pairs at offset 1. Where
    texts have known facts, ``probe_fact_<fact>_<slot>`` is the accuracy with which a linear classifier reads the
    fact off the state at the end of the slot. Intervals take rows as independent.

    Raises:
        NextLatError: the task is not running text, rows are too short for an offset, or the model has no probe state.
    """
    task = subject.need_textual()
    options = subject.probes
    if options.offsets >= task.sequence_length:
        raise NextLatError(
            f"evaluation.probes.offsets is {options.offsets} and rows have {task.sequence_length} tokens; "
            "set it below the length of a row"
        )
    metrics: dict[str, Metric] = {}
    fitted, tables = fit(subject)
    for kind in options.pairs:
        metrics |= measure(subject, kind, fitted.whitening, fitted.weights[kind], tables[kind])
    if task.slots:
        metrics |= decodability(subject, task)
    return metrics


class Fitted(NamedTuple):
    """Trained probes."""

    whitening: Tensor
    """(D, D) what states are multiplied with."""
    weights: dict[str, Tensor]
    """For each kind of pairs (K, V, D)."""


def fit(subject: Subject) -> tuple[Fitted, dict[str, Skipgrams]]:
    """Train all offsets together, and count the tokens of the same rows for the baselines."""
    options, vocab = subject.probes, subject.task.vocab_size
    tables: dict[str, Skipgrams] = {kind: Skipgrams(vocab, options.offsets) for kind in options.pairs}
    whitening = whiten(subject)
    shape = (options.offsets, vocab, len(whitening))
    weights: dict[str, Tensor] = {kind: torch.zeros(shape, device=subject.device) for kind in options.pairs}
    optimizer = torch.optim.AdamW(weights.values(), options.learning_rate, weight_decay=0.0, fused=True)
    for step, batch in enumerate(training_batches(subject)):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * (1 - step / options.steps)
        flat = states_of(subject, batch).flatten(0, 1) @ whitening  # (B * T, D)
        for kind in options.pairs:
            found = [pairs(batch, offset, kind) for offset in range(1, options.offsets + 1)]
            tables[kind].add(batch, found)
            weights[kind].grad = torch.stack(
                [gradient(flat[p.source], weight, p.target) for weight, p in zip(weights[kind], found, strict=True)]
            )
        optimizer.step()
    return Fitted(whitening, weights), tables


def whiten(subject: Subject) -> Tensor:
    """(D, D) that makes of states some whose entries have a mean square of one and no correlation, about zero.

    Not about their mean, which a matrix without bias could not make up for. Computed from the first training rows.
    """
    moments, count = torch.zeros(()), 0
    for batch in training_batches(subject):
        states = states_of(subject, batch)[counted(batch)].double()
        moments, count = moments.to(states) + states.T @ states, count + len(states)
        if count >= WHITENED_BY * states.shape[-1]:
            break
    power, directions = torch.linalg.eigh(moments / max(count, 1))
    floor = (FLOOR * power.mean()).clamp(min=1e-24)
    whitening: Tensor = directions / power.clamp(min=floor).sqrt()
    return whitening.float()


def measure(subject: Subject, kind: str, whitening: Tensor, weights: Tensor, table: Skipgrams) -> dict[str, Metric]:
    """Held-out losses of probes and baselines."""
    prefix, offsets = PREFIX[kind], range(1, len(weights) + 1)
    losses: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for whole in subject.batches():
        for batch in chunks(whole, subject.probes.batch_size):
            flat = states_of(subject, batch).flatten(0, 1) @ whitening
            for offset in offsets:
                p = pairs(batch, offset, kind)
                before = batch.tokens.flatten()[p.source]
                found = {
                    f"{prefix}_ce_{offset}": negative_log_likelihood(flat[p.source], weights[offset - 1], p.target),
                    f"{prefix}_bigram_{offset}": table.bigram(offset, before, p.target),
                }
                if offset == 1 and kind == "document":
                    found["probe_unigram"] = table.unigram(p.target)
                for name, loss in found.items():
                    losses.setdefault(name, []).append(by_row(loss, p.row, len(batch.tokens)))
    metrics = {
        name: pooled(torch.cat([s for s, _ in parts]), torch.cat([n for _, n in parts]))
        for name, parts in losses.items()
    }
    order = [f"{prefix}_{what}_{offset}" for what in ("ce", "bigram") for offset in offsets] + ["probe_unigram"]
    return {name: metrics[name] for name in order if name in metrics and metrics[name].n}


def pairs(batch: Batch, offset: int, kind: str) -> Pairs:
    """The pairs of states and tokens ``offset`` places later.

    The token ``offset`` places after t is the target of position ``t + offset - 1``, so it is known at the end of a
    row too. ``document``: that position lies in the document of t; what is asked there may be the document's end.
    ``row``: any position of the row that something is asked at.
    """
    steps = offset - 1
    if kind == "document":
        allowed = token_positions(batch, steps)
    else:
        asked = counted(batch)
        real = torch.ones_like(asked) if batch.documents is None else batch.documents >= 0
        allowed = asked[:, steps:] & real[:, : asked.shape[1] - steps]
    row, place = allowed.nonzero(as_tuple=True)
    return Pairs(row * batch.tokens.shape[1] + place, row, batch.targets[row, place + steps])


def gradient(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(V, D) gradient of the mean cross-entropy of ``softmax(W h)`` in W, a block of positions at a time."""
    total = torch.zeros_like(weight)
    for h, y in blocks(states, weight, targets):
        p = (h @ weight.T).softmax(-1)
        p[torch.arange(len(y), device=y.device), y] -= 1
        total.addmm_(p.T, h)
    return total / max(len(targets), 1)


def negative_log_likelihood(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(n,) ``-log softmax(W h)[y]``."""
    parts = [F.cross_entropy(h @ weight.T, y, reduction="none") for h, y in blocks(states, weight, targets)]
    return torch.cat(parts).double() if parts else states.new_zeros(0, dtype=torch.float64)


def blocks(states: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """States and targets in pieces whose logits fit the caches."""
    size = rows_per_block(len(weight), 4, states.device.type)
    for start in range(0, len(targets), size):
        yield states[start : start + size], targets[start : start + size]


def by_row(loss: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(rows,) sums and counts."""
    row, loss = row.cpu(), loss.double().cpu()
    return (
        torch.zeros(rows, dtype=torch.float64).index_add_(0, row, loss),
        torch.bincount(row, minlength=rows).double(),
    )


def training_batches(subject: Subject) -> Iterator[Batch]:
    """The rows that probes are trained on: the first of each training step."""
    for step in range(subject.probes.steps):
        yield subject.task.rows(step, 0, subject.probes.batch_size).to(subject.device)


def chunks(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch in pieces."""
    for start in range(0, len(batch.tokens), rows):
        yield batch.rows(start, start + rows)


@torch.no_grad()
def states_of(subject: Subject, batch: Batch) -> Tensor:
    """(B, T, D) fp32 states that probes read; no gradient reaches the model.

    Raises:
        NextLatError: the model gives none.
    """
    states = subject.lm(batch.tokens, batch.documents).probe_state
    if states is None:
        raise NextLatError("this model gives no probe_state; return one in LMOutput, for most models the last state")
    return states.detach().float()


def exact(states: Tensor, targets: Tensor, vocab_size: int, steps: int = 200, ridge: float = 1e-6) -> Tensor:
    """(V, D) the best linear probe of few states, by L-BFGS: what training by steps must come near.

    Args:
        states: (n, D).
        targets: (n,).
        vocab_size: V.
        steps: iterations.
        ridge: weight of ``|W|^2``, which keeps separable problems finite.
    """
    h = states.double()
    weight = torch.zeros(vocab_size, h.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(h @ weight.T, targets) + ridge * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach()


__all__: Sequence[str] = ["Fitted", "Pairs", "exact", "fit", "measure", "pairs", "probes"]
