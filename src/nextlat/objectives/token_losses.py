"""All losses that read the output head, in one pass over blocks of positions.

The logits of the true states give the cross-entropy and, as they are, the teacher of every rollout step.
Gradients are made on the way, so that no (positions, V) tensor outlives its block and memory does not grow with
the horizon. A position costs three products with the head for the cross-entropy (logits, gradient of the state,
gradient of the head) and two for each step (logits, gradient of the state), since the head is frozen there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.model.products import other_library, product
from nextlat.objectives.losses import cross_entropy_sum, kl_sum, total_variation_sum, wide

Kind = Literal["kl", "aux_ce", "tv"]

BLOCK_BYTES = {"cpu": 2**25, "cuda": 2**28}
"""Size of one block of logits: small enough for the caches of a CPU, large enough to fill a GPU."""
LEAST_ROWS = 64
"""Products with fewer rows are slow, and so is adding up a head gradient after every few rows."""
CPU_ROWS = 1024
"""Blocks with more rows gain nothing on a CPU and leave its caches."""
PLAIN_LOGITS = 2**18
"""Up to so many logits ordinary differentiation is faster, and what it holds is small."""


STRIP, ONEDNN_STRIP = 1024, 4096
"""Logits of a CPU are made for so many tokens at a time: a third faster than one wide product; and by oneDNN, which
makes them elsewhere, so that what is copied lies in the caches."""
UNDERFLOW = 1e-30
"""Probabilities below it have lost digits, or are 0."""


def rows_per_block(vocab_size: int, element_bytes: int, device: str) -> int:
    """Positions whose logits fill a block."""
    fitting = BLOCK_BYTES.get(device, 2**27) // (vocab_size * element_bytes)
    most = CPU_ROWS if device == "cpu" else fitting
    return max(LEAST_ROWS, min(fitting, most) // 32 * 32)


def token_losses(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    students: Sequence[tuple[Tensor, Tensor]] = (),
    kinds: Sequence[Kind] = ("kl",),
    block: int | None = None,
) -> Tensor:
    """Sums of the cross-entropy of the states and of the losses of predicted states.

    With logits ``a = W h`` and ``b = sg[W] s`` of a state and a prediction of it, ``p = sg[softmax(a)]`` and
    ``q = softmax(b)``: ``kl`` is ``KL(p || q)``, ``aux_ce`` is ``-log q[target]`` and ``tv`` the total variation
    ``sum |p - q| / 2``, one minus the probability that a draft from q is accepted.

    Args:
        hidden: (N, D) states at the positions that count; live in the cross-entropy only.
        head_weight: (V, D); live in the cross-entropy only.
        targets: (N,) int64.
        students: for each step the (N, D) predictions of the states and (N,) bool, where there is one. What the
            predictions hold elsewhere does not matter and gets no gradient.
        kinds: which losses of the predictions to make.
        block: positions a block. By default chosen from V, or none at all if the logits are few. The result does
            not depend on it.

    Returns:
        (1 + steps * kinds,) sums in nats, fp32 or wider: the cross-entropy, then the kinds of step 1, of step 2 ...
        In fp32 a KL is right to about 1e-6 nats a token, however small it is, because it is a difference of two
        logsumexps; so far below that it says nothing. Its gradient, a difference of two softmaxes, loses the digits
        that it loses by ordinary differentiation.
    """
    if block is None and len(hidden) * len(head_weight) <= PLAIN_LOGITS:
        return plain_token_losses(hidden, head_weight, targets, students, kinds)
    sums: Tensor = _TokenLosses.apply(  # type: ignore[no-untyped-call]
        torch.is_grad_enabled(),
        targets,
        [reached for _, reached in students],
        kinds,
        block,
        hidden,
        head_weight,
        *(predicted for predicted, _ in students),
    )
    return sums


def plain_token_losses(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    students: Sequence[tuple[Tensor, Tensor]] = (),
    kinds: Sequence[Kind] = ("kl",),
    live_head: bool = False,
) -> Tensor:
    """The sums of :func:`token_losses` by ordinary differentiation, with all logits held at once.

    With ``live_head`` the losses of the predictions train the head too, which is an ablation.
    """
    logits = F.linear(hidden, head_weight)  # (N, V)
    sums = [cross_entropy_sum(logits, targets)]
    teacher = F.log_softmax(wide(logits.detach()), -1)
    head = head_weight if live_head else head_weight.detach()
    for predicted, reached in students:
        student, known = F.linear(predicted[reached], head), teacher[reached]
        for kind in kinds:
            if kind == "aux_ce":
                sums.append(cross_entropy_sum(student, targets[reached]))
            else:
                sums.append({"kl": kl_sum, "tv": total_variation_sum}[kind](known, student))
    return torch.stack(sums)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recording: bool,
        targets: Tensor,
        reached: Sequence[Tensor],
        kinds: Sequence[Kind],
        block: int | None,
        hidden: Tensor,
        head_weight: Tensor,
        *predicted: Tensor,
    ) -> Tensor:
        device = hidden.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        weight = head_weight if low is None else head_weight.to(low)
        full = torch.promote_types(hidden.dtype, torch.float32)
        n, vocab = len(hidden), len(weight)
        rows = min(block or rows_per_block(vocab, full.itemsize, device), max(n, 1))
        # Gradients of the sums: of the state, of the head, and of every prediction for each kind.
        live = [recording and needed for needed in ctx.needs_input_grad[5:]]
        d_hidden = torch.empty_like(hidden) if live[0] else None
        d_weight = torch.zeros_like(head_weight, dtype=full) if live[1] else None
        d_predicted = [
            torch.empty_like(s) if needed else None
            for s, needed in zip(predicted, live[2:], strict=True)
            for _ in kinds
        ]
        logits = hidden.new_empty(rows, vocab, dtype=full)
        teacher = torch.empty_like(logits) if predicted else logits  # without a student nobody asks for logits again
        sums = hidden.new_zeros(1 + len(d_predicted), dtype=full)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            y, h = targets[part], hidden[part]
            a, p = _logits(h, weight, logits), teacher[: len(h)]
            log_total, a_y = _softmax(a, p, y, h, weight)
            sums[0] += (log_total - a_y).sum()
            expected = _times(p, weight) if any(live) else None  # (n, D) the head's row, on average over p
            if d_hidden is not None and expected is not None:
                torch.sub(expected, F.embedding(y, head_weight), out=d_hidden[part])
            if d_weight is not None:
                d_weight.addmm_(p.T, h.to(full)).index_add_(0, y, h.to(full), alpha=-1)
            if not predicted:
                continue
            negative_entropy = _mean_logit(p, a, expected, h) - log_total
            for step, (s, here) in enumerate(zip(predicted, reached, strict=True)):
                b = _logits(s[part], weight, logits)
                overlap = _mean_logit(p, b, expected, s[part])
                q = b if b.device.type == "cpu" else torch.empty_like(b)  # a third block costs a CPU memory and time
                log_sum, b_y = _softmax(b, q, y, s[part], weight)
                outside = ~here[part]
                for number, kind in enumerate(kinds, start=step * len(kinds)):
                    if kind == "kl":
                        value = negative_entropy - overlap + log_sum
                    elif kind == "aux_ce":
                        value = log_sum - b_y
                    else:
                        more = torch.sub(q, p)
                        value = torch.linalg.vector_norm(more, 1, -1) / 2
                    sums[1 + number] += value.masked_fill(outside, 0).sum()
                    d_state = d_predicted[number]
                    if d_state is None or expected is None:
                        continue
                    made = d_state[part]
                    if kind == "kl":
                        _times(q, weight, made).sub_(expected)
                    elif kind == "aux_ce":
                        _times(q, weight, made).sub_(F.embedding(y, weight))
                    else:
                        side = more.sign_()
                        _times(side.sub_(torch.linalg.vecdot(q, side)[:, None]).mul_(q).div_(2), weight, made)
                    made.masked_fill_(outside[:, None], 0)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(head_weight.dtype), *d_predicted)
        ctx.kinds = len(kinds)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, *d_predicted = ctx.saved_tensors

        def scaled(gradients: Sequence[Tensor | None], factors: Tensor) -> Tensor | None:
            made = [g * f.to(g.dtype) for g, f in zip(gradients, factors, strict=True) if g is not None]
            return sum(made[1:], start=made[0]) if made else None

        steps = [slice(i, i + ctx.kinds) for i in range(0, len(d_predicted), max(ctx.kinds, 1))]
        ce = upstream[:1]
        return (
            *(None,) * 5,
            scaled([d_hidden], ce),
            scaled([d_weight], ce),
            *(scaled(d_predicted[step], upstream[1:][step]) for step in steps),
        )


def _logits(states: Tensor, weight: Tensor, room: Tensor) -> Tensor:
    """(n, V) logits of (n, D) states; in the first rows of (N, V), unless they are made elsewhere faster."""
    logits = room[: len(states)]
    if logits.device.type == "cpu" and logits.dtype == weight.dtype == states.dtype:
        onednn = other_library(states, weight)
        size = ONEDNN_STRIP if onednn else STRIP
        if onednn and len(weight) <= size:
            return product(states, weight)
        for start in range(0, len(weight), size):
            tokens = slice(start, start + size)
            if onednn:
                logits[:, tokens] = product(states, weight[tokens])
            else:
                torch.mm(states, weight[tokens].T, out=logits[:, tokens])
    else:
        logits.copy_(states.to(weight.dtype) @ weight.T)
    return logits


def _softmax(
    logits: Tensor, probabilities: Tensor, targets: Tensor, states: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill probabilities (n, V), maybe over the logits themselves; return ``logsumexp`` and targets' logits, (n,) each.

    The former is read off one entry whose probability is known, instead of one more pass over all of them.
    """
    at_target = logits.gather(1, targets[:, None])[:, 0]
    torch.softmax(logits, -1, out=probabilities)
    probability = probabilities.gather(1, targets[:, None])[:, 0]
    log_total = at_target - probability.log()
    unlikely = probability < UNDERFLOW
    if unlikely.any():
        again = (states[unlikely].to(weight.dtype) @ weight.T).to(logits.dtype)
        log_total[unlikely] = torch.logsumexp(again, -1)
    return log_total, at_target


def _mean_logit(probabilities: Tensor, logits: Tensor, mean_row: Tensor | None, states: Tensor) -> Tensor:
    """(n,) logits of states on average over the probabilities.

    ``p . (W s) = (p W) . s``: where ``mean_row = p W`` has full precision, no pass over the vocabulary is needed.
    """
    if mean_row is not None and logits.device.type == "cpu" and mean_row.dtype == logits.dtype == states.dtype:
        probabilities, logits = mean_row, states
    return (probabilities * logits).sum(-1)


def _times(rows: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """(n, V) gradients of logits -> (n, D) gradients of states, made in ``out`` if there is one."""
    if len(weight) <= ONEDNN_STRIP and other_library(rows, weight):  # it makes a copy of a transposed weight
        made = product(rows, weight.T)
    elif out is not None and rows.dtype == weight.dtype == out.dtype:
        return torch.mm(rows, weight, out=out)
    else:
        made = rows.to(weight.dtype) @ weight
    return made if out is None else out.copy_(made)
