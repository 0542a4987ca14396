"""What acceptance heads are fitted to, drafts from every place of a model's own text, and the fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.decoding.acceptance import AcceptanceHead
from nextlat.decoding.drafting import over_all
from nextlat.decoding.generate import generate
from nextlat.decoding.sampling import Sampling, draw
from nextlat.errors import NextLatError
from nextlat.model.interfaces import CausalLM, Drafter, states_at

LEAST = 1e-6
"""Probabilities below count as this in a log loss."""
LOOK = 50
"""Steps of a fit between two looks at what it is stopped by."""
BATCH = 1024
"""Drafts to a step of a fit."""
EPOCHS = 16
"""Times that a fit sees every draft."""
ROWS = 128
"""Texts that are continued together, as far as memory allows."""
AT_ONCE = 2**25
"""Numbers that a batch of texts may hold: laws of the model, and states of the drafter."""
KEPT = 2**26
"""Numbers that the states of all examples may hold; of more examples a random part is kept."""


class Examples(NamedTuple):
    """Drafts of K tokens from places of the model's own text, N in all."""

    states: Tensor
    """(N, D) of the model."""
    tokens: Tensor
    """(N,) int64 known tokens behind them, from which drafts go on."""
    labels: Tensor
    """(N, K) chance of each token to be kept, ``min(1, p / q)``, at temperature 0 whether it is the model's most
    likely one; NaN where its turn did not come."""
    prompts: Tensor
    """(N,) int64 number of the prompt."""

    def take(self, chosen: Tensor) -> Examples:
        """Some of them."""
        return Examples(*(part[chosen] for part in self))


class _Followed(NamedTuple):
    """What one place's draft came to, position by position, before the model's laws are known."""

    states: Tensor
    """(B, D) of the model before the known token."""
    known: Tensor
    """(B,) int64."""
    tokens: list[Tensor]
    """(B,) int64 each, drafted behind it."""
    q: list[Tensor]
    """(B,) the drafter's probability of it, under which it was drawn; 1 at temperature 0."""
    q_text: list[Tensor]
    """(B,) that of the token which the text has there."""


@torch.inference_mode()
def collect(
    lm: CausalLM,
    drafter: Drafter,
    prompts: Sequence[tuple[Tensor, int]],
    sampling: Sampling,
    length: int,
    generator: torch.Generator | None = None,
    most: int | None = None,
) -> Examples:
    """Draft from every place of the model's own continuations and note, of each token, the chance that it is kept.

    A token has its turn if all before it are kept. Drafts follow the text, so a place in the text is in a kept draft
    with probability ``p min(1, q / p) = min(p, q)`` if the text is drawn from p and kept with ``min(1, q / p)``: the
    law of drafts that are verified token by token. The label is a chance and not the outcome of a coin, which would
    only add noise.

    Args:
        lm: the model.
        drafter: of the model.
        prompts: (P,) int64 tokens, and how many to add to them.
        sampling: how tokens are drawn.
        length: K of every draft.
        generator: of the draws.
        most: examples to keep; of more a random part. Default: as many as fit into :data:`KEPT`.

    Raises:
        NextLatError: there was no room for any draft.
    """
    found: list[Examples] = []
    for numbers, texts, new in _batches(prompts, lm, length):
        if new > 1:
            made = _drafts_everywhere(lm, drafter, texts, new, sampling, length, generator)
            limit = KEPT // made.states.shape[1] if most is None else most
            share = limit * len(numbers) / len(prompts) / len(made.labels)
            if share < 1:
                made = made.take(torch.rand(len(made.labels), generator=generator).to(made.labels.device) < share)
            found.append(made._replace(prompts=torch.tensor(numbers, device=made.prompts.device)[made.prompts]))
    if not found:
        raise NextLatError("no prompt leaves room for a draft; continue prompts by at least 2 tokens")
    return _joined(found)


def _joined(parts: Sequence[Examples]) -> Examples:
    return Examples(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _batches(
    prompts: Sequence[tuple[Tensor, int]], lm: CausalLM, length: int
) -> Iterator[tuple[list[int], list[Tensor], int]]:
    """Numbers and texts of prompts to be continued by as many tokens, and how many."""
    with torch.inference_mode():
        output = lm(prompts[0][0][None, :1])
    largest = max(output.logits.shape[-1], output.hidden.shape[-1] + 3 * length)
    for new, group in groupby(enumerate(prompts), key=lambda item: item[1][1]):
        items = list(group)
        rows = max(1, min(ROWS, AT_ONCE // (new * largest)))
        for start in range(0, len(items), rows):
            part = items[start : start + rows]
            yield [number for number, _ in part], [prompt for _, (prompt, _) in part], new


def _drafts_everywhere(
    lm: CausalLM,
    drafter: Drafter,
    texts: Sequence[Tensor],
    new: int,
    sampling: Sampling,
    length: int,
    generator: torch.Generator | None,
) -> Examples:
    """The examples of some texts, whose numbers count from 0."""
    rows, lengths = len(texts), [len(text) for text in texts]
    prompts = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    device = prompts.device
    text = generate(
        lm, prompts, new, sampling.temperature, generator, top_k=sampling.top_k, top_p=sampling.top_p, lengths=lengths
    )  # (B, new)
    cache = lm.new_cache(rows, prompts.shape[1] + new)
    read = torch.tensor(lengths, device=device) - 1
    output = lm(prompts, cache=cache, logits_at=read)
    cache.lengths = list(lengths)
    laws: list[Tensor] = []  # [i] (B, V) of token i + 1 of the continuation
    drafts: list[_Followed] = []  # [i] of the tokens behind token i
    for place in range(new - 1):
        state = drafter.observe(output, read)
        behind = text[:, place : place + 1 + length]
        seen = states_at(output.hidden, read)[:, 0]
        drafts.append(_follow(drafter, state, seen, behind, sampling, output.logits.shape[-1], generator))
        output = lm(text[:, place : place + 1], cache=cache)
        read = torch.zeros_like(read)
        laws.append(sampling.law(output.logits[:, 0]))
    row = torch.arange(rows, device=device)
    parts: list[Examples] = []
    for place, draft in enumerate(drafts):
        turn = torch.ones(rows, dtype=torch.bool, device=device)
        labels = torch.full((rows, length), torch.nan, device=device)
        for i, (token, q, q_text) in enumerate(zip(draft.tokens, draft.q, draft.q_text, strict=True)):
            p = laws[place + i]
            labels[turn, i] = (p[row, token] / q.to(p)).clamp(max=1).float()[turn]
            kept = (q_text.to(p) / p[row, text[:, place + 1 + i]]).clamp(max=1)
            turn &= torch.rand(rows, generator=generator, dtype=torch.float64).to(device) < kept
        parts.append(Examples(draft.states, draft.known, labels, row))
    return _joined(parts)


def _follow(
    drafter: Drafter,
    state: Any,
    seen: Tensor,
    text: Tensor,
    sampling: Sampling,
    vocab_size: int,
    generator: torch.Generator | None,
) -> _Followed:
    """What would be drafted for each of (B, K) tokens but the first, if those before it had been drafted and kept.

    At temperature 0 it is known at once which drafts go on; a state that is one tensor then follows these alone.
    """
    known, row = text[:, 0], torch.arange(len(text), device=text.device)
    tokens, drawn, of_text = [], [], []
    going = row
    for position in range(1, text.shape[1]):
        state, logits = drafter.step(state, text[going, position - 1])
        if sampling.greedy:
            law, column = None, logits.argmax(-1)
        else:
            law = sampling.law(logits)
            column = draw(law, torch.rand(len(law), generator=generator, dtype=torch.float64))
        token, wanted = column if drafter.vocabulary is None else drafter.vocabulary[column], text[:, position]
        if law is None:
            right = token == wanted[going]
            token = wanted.index_copy(0, going, token)
            q, q_text = torch.ones(len(row), device=row.device), (token == wanted).float()
            if isinstance(state, Tensor) and not bool(right.all()):
                going, state = going[right], drafter.select(state, right.nonzero()[:, 0])
        else:
            law = over_all(law, drafter.vocabulary, vocab_size)
            q, q_text = law[row, token], law[row, wanted]
        tokens.append(token)
        drawn.append(q)
        of_text.append(q_text)
        if not len(going):
            break
    return _Followed(seen.float(), known, tokens, drawn, of_text)


class Calibration(NamedTuple):
    """How good chances are on held-out drafts: mean negative log likelihood in nats, and mean squared error."""

    log_loss: float
    brier: float


class Fit(NamedTuple):
    """A head and what it is worth."""

    head: AcceptanceHead
    head_score: Calibration
    constant: Calibration
    """Of the mean acceptance at each position, in the drafts that were fitted to."""
    examples: int
    """Drafts fitted to."""
    held_out: int
    """Drafts measured on, of other prompts."""


@torch.enable_grad()
def fit(
    examples: Examples,
    embedding: Tensor,
    steps: int | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
) -> Fit:
    """Fit a head to the first prompts and measure it on the last ones.

    An eighth of the prompts that are fitted to is only looked at: the weights of the step that foresees it best are
    kept, be it those of the constants that the fit begins with.

    Args:
        examples: from :func:`collect`.
        embedding: (V, E) of the model's tokens.
        steps: of AdamW, on batches of up to :data:`BATCH` drafts; default :data:`EPOCHS` times all of them.
        held_out: share of the prompts, the last ones, that is only measured on.
        seed: of weights and batches.
        learning_rate: falls linearly to 0.
        weight_decay: of all weights.

    Raises:
        NextLatError: fewer than three prompts.
    """
    numbers = torch.unique(examples.prompts)
    if len(numbers) < 3:
        raise NextLatError(
            f"drafts of {len(numbers)} prompts are there; three are needed: to fit to, to stop by and to measure on"
        )
    last = min(max(round((1 - held_out) * len(numbers)), 2), len(numbers) - 1)
    first = min(max(round(last * 7 / 8), 1), last - 1)
    seen = examples.take(examples.prompts < numbers[first])
    watched = examples.take((examples.prompts >= numbers[first]) & (examples.prompts < numbers[last]))
    new = examples.take(examples.prompts >= numbers[last])
    g = torch.Generator().manual_seed(seed)
    head = AcceptanceHead(embedding, examples.states.shape[1], examples.labels.shape[1], generator=g)
    head.to(examples.states.device)
    read = head.read(seen.states, seen.tokens)
    mean, scale = read.mean(0), read.std(0, correction=0).clamp(min=1e-3)
    read, compared = (read - mean) / scale, (head.read(watched.states, watched.tokens) - mean) / scale
    steps = steps or EPOCHS * -(-len(read) // BATCH)
    # positions that were never reached are expected to be like a coin
    shares = seen.labels.double().nanmean(0).nan_to_num(0.5).clamp(1e-3, 1 - 1e-3)
    with torch.no_grad():  # it begins as the constants
        head.out.bias.copy_(shares.logit())
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    best, kept = float("inf"), copy.deepcopy(head.state_dict())
    for step in range(steps + 1):
        if step % LOOK == 0 or step.bit_count() == 1 or step == steps:  # few examples are known by heart soon
            with torch.no_grad():
                loss = float(_loss(head(compared), watched.labels))
            if loss < best:
                best, kept = loss, copy.deepcopy(head.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        rows = torch.randint(len(read), (min(BATCH, len(read)),), generator=g).to(read.device)
        optimizer.zero_grad()
        _loss(head(read[rows]), seen.labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    head.load_state_dict(kept)
    with torch.no_grad():  # the head reads what decoding sees, as it is
        reads = head.layers[0]
        assert isinstance(reads, nn.Linear)
        reads.weight.div_(scale)
        reads.bias.sub_(reads.weight @ mean)
    head.eval().requires_grad_(False)
    return Fit(
        head,
        calibration(head(head.read(new.states, new.tokens)).sigmoid(), new.labels),
        calibration(shares.expand(new.labels.shape), new.labels),
        len(seen.labels) + len(watched.labels),
        len(new.labels),
    )


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the drafts of the log losses of their tokens; of those whose turn came."""
    came = ~labels.isnan()
    return F.binary_cross_entropy_with_logits(logits[came], labels[came], reduction="sum") / len(labels)


def calibration(chances: Tensor, labels: Tensor) -> Calibration:
    """How far chances are from labels of one shape, themselves chances or 0 and 1; labels of NaN do not count."""
    came = ~labels.isnan()
    chances, labels = chances[came].double().clamp(LEAST, 1 - LEAST), labels[came].double()
    return Calibration(float(F.binary_cross_entropy(chances, labels)), float(((chances - labels) ** 2).mean()))
