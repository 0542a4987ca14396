"""Cross-entropy on held-out text, in nats a token and bits a byte, and on the ends of texts whose facts are known."""

from __future__ import annotations

from math import exp, log, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.batch import IGNORE, Batch
from nextlat.evaluation.subject import Subject
from nextlat.model.interfaces import CausalLM
from nextlat.objectives.positions import counted
from nextlat.statistics import Z95, Metric
from nextlat.tasks.base import Textual

LONG_RANGE = ("resolution", "moral")
"""Slots whose content follows from facts that were told long before."""
PASSAGES = 1000
"""Texts with known facts that are looked at."""


@torch.no_grad()
def cross_entropy(subject: Subject) -> dict[str, Metric]:
    """Cross-entropy of the next token on the held-out rows.

    ``ce`` is in nats a token, ``perplexity`` its exponential, ``bits_per_byte`` the same loss in bits over the UTF-8
    bytes of the predicted text, which compares tokenizers. Where texts have known facts, ``ce_resolution`` and
    ``ce_moral`` are the losses of those slots in texts read from their first token, as far as a row reaches, and
    ``floor_resolution`` and ``floor_moral`` what a reader pays who has kept every fact in mind. Intervals take rows
    as independent, not tokens.

    Raises:
        NextLatError: the task is not running text.
    """
    task = subject.need_textual()
    sums, counts, size = [], [], 0
    for batch in subject.batches():
        part = batch.tokens.shape[0]
        for start in range(0, part, subject.batch_size):
            rows = batch.rows(start, start + subject.batch_size)
            loss = token_losses_of(subject.lm, rows)
            sums.append(loss.sum(1).cpu())
            asked = counted(rows)
            counts.append(asked.sum(1).cpu())
            size += task.bytes_of(rows.targets[asked].cpu())
    ce = pooled(torch.cat(sums), torch.cat(counts))
    bits = float(torch.cat(sums).sum()) / log(2) / max(size, 1)
    metrics = {
        "ce": ce,
        "perplexity": Metric(exp(float(ce.value)), _exp(ce.low), _exp(ce.high), ce.n),
        "bits_per_byte": Metric(bits, n=size),
    }
    if task.slots:
        metrics |= long_range(subject, task)
    return metrics


def _exp(end: float | None) -> float | None:
    return None if end is None else exp(end)


def token_losses_of(lm: CausalLM, batch: Batch) -> Tensor:
    """(B, T) float64 ``-log p(target)`` in nats, 0 where nothing is asked."""
    logits = lm(batch.tokens, batch.documents).logits.float()
    targets = batch.targets.masked_fill(~counted(batch), IGNORE)
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none").double()


def pooled(sums: Tensor, counts: Tensor) -> Metric:
    """Sum over count of all rows, with the interval of a ratio whose rows are independent.

    Args:
        sums: (n,) total loss of each row.
        counts: (n,) its number of tokens.

    Returns:
        The mean a token; ``n`` is the number of tokens.
    """
    sums, counts = sums.double(), counts.double()
    total = float(counts.sum())
    mean = float(sums.sum()) / max(total, 1.0)
    rows = int((counts > 0).sum())
    if rows < 2:
        return Metric(mean, n=int(total))
    spread = float((sums - mean * counts).square().sum()) * rows / (rows - 1)
    half = Z95 * sqrt(spread) / total
    return Metric(mean, mean - half, mean + half, int(total))


def long_range(subject: Subject, task: Textual) -> dict[str, Metric]:
    """Losses of the slots that need facts told long before, and the least they can be.

    Only slots that lie in their row from first to last token count, so that the floor is exact.
    """
    passages = task.passages(subject.split, min(subject.examples or PASSAGES, PASSAGES))
    losses = torch.cat(
        [
            token_losses_of(subject.lm, passages.batch.rows(start, start + subject.batch_size).to(subject.device)).cpu()
            for start in range(0, len(passages.slots), subject.batch_size)
        ]
    )
    metrics = {}
    for name in LONG_RANGE:
        slot = task.slots.index(name)
        whole = passages.ends[:, slot] >= 0
        if not whole.any():
            continue
        # the loss of a token stands at the position before it
        of_slot = (passages.slots[:, 1:] == slot) & whole[:, None]
        sums, counts = (losses[:, :-1] * of_slot).sum(1), of_slot.sum(1)
        metrics[f"ce_{name}"] = pooled(sums, counts)
        floor = float(passages.nats[whole, slot].sum()) / float(counts.sum())
        metrics[f"floor_{name}"] = Metric(floor, n=int(counts.sum()))
    return metrics
