"""A learned guess of whether a drafted token will be kept, from what the drafter said of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import groupby
from math import exp
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.decoding.adaptive import Estimator, Forecast, bin_of
from nextlat.decoding.drafting import Drafted
from nextlat.decoding.generate import generate
from nextlat.decoding.sampling import Sampling, draw
from nextlat.errors import NextLatError
from nextlat.model.interfaces import CausalLM, Drafter

FEATURES = 2
"""Figures of the law that a head reads."""
LEAST = 1e-6
"""Probabilities below count as this; the logarithm of nothing is no feature."""
HIDDEN = 64
LOOK = 50
"""Steps of a fit between two looks at what it is stopped by."""
ROWS = 32
"""Texts that are continued together, as far as memory allows."""
AT_ONCE = 2**25
"""Numbers that a batch of texts may hold: laws of the model, and states of the drafter."""
EXAMPLES = 200_000
"""Drafted tokens that are kept to fit to, of all that were looked at."""


def law_features(drafted: Drafted) -> Tensor:
    """(B, 4) fp32: logits of the most likely token and of the drafted one, and logarithms of their probabilities."""
    top, chosen = drafted.top[:, None], drafted.logits.gather(1, drafted.column[:, None])
    likely = torch.stack([drafted.law.amax(-1), drafted.probability], -1)
    return torch.cat([top.float(), chosen.float(), likely.float().clamp(min=LEAST).log()], -1)


def state_of(drafted: Drafted) -> Tensor | None:
    """(B, D) fp32 the drafter's state; ``None`` where it is not one vector a row."""
    state = drafted.state
    return state.float() if isinstance(state, Tensor) and state.ndim == 2 else None


class AcceptanceHead(nn.Module):
    """Chance that a drafted token is kept: one hidden layer over the drafter's state and two logits.

    The state knows far more than the law: that a drafter is about to go wrong does not show in how sure it is. With
    the state the logits need not be normalised. A drafter without one, or whose state is not a vector, is read by the
    probabilities of the two tokens.

    Args:
        state_width: D of the drafter's state; 0 does without it.
        hidden_dim: units of the hidden layer.
        generator: of the initial weights.
    """

    def __init__(
        self, state_width: int = 0, hidden_dim: int = HIDDEN, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.reads_state = state_width > 0
        self.layer_1 = nn.Linear(FEATURES + state_width, hidden_dim)
        self.layer_2 = nn.Linear(hidden_dim, 1)
        nn.init.normal_(self.layer_1.weight, std=self.layer_1.in_features**-0.5, generator=generator)
        for start in (self.layer_1.bias, self.layer_2.weight, self.layer_2.bias):
            nn.init.zeros_(start)

    def forward(self, read: Tensor) -> Tensor:
        """(N,) logits of being kept, from (N, 2 + D) features and states."""
        logits: Tensor = self.layer_2(F.silu(self.layer_1(read)))[:, 0]
        return logits

    def estimator(self) -> Estimator:
        """What :class:`nextlat.decoding.CostAware` takes, with the weights of now.

        A decision is made for every drafted token, and a few small operations take as long as the layers of a small
        model, so there are as few as can be.
        """
        (weight, bias), (last, offset) = ((x.weight.detach(), x.bias.detach()) for x in (self.layer_1, self.layer_2))

        def chances(drafted: Drafted) -> list[float]:
            if self.reads_state:
                top = drafted.top[:, None]
                chosen = top if drafted.drawn_from is None else drafted.logits.gather(1, drafted.column[:, None])
                read = torch.cat((top, chosen, drafted.state), -1)
            else:
                read = law_features(drafted)[:, FEATURES:]
            made = F.linear(F.silu(F.linear(read.to(weight.dtype), weight, bias)), last, offset)
            return [1 / (1 + exp(min(-row[0], 100.0))) for row in made.tolist()]

        return chances


class Examples(NamedTuple):
    """Drafted tokens whose turn came, N in all."""

    features: Tensor
    """(N, 4), see :func:`law_features`."""
    states: Tensor | None
    """(N, D); ``None`` where the drafter's state is not one vector a row."""
    guesses: Tensor
    """(N,) root of the token's probability, what the online bins go by."""
    labels: Tensor
    """(N,) chance to be kept: ``min(1, p / q)``; at temperature 0 whether it is the model's most likely token."""
    prompts: Tensor
    """(N,) int64 number of the prompt."""

    def take(self, chosen: Tensor) -> Examples:
        """Some of them."""
        return Examples(*(None if part is None else part[chosen] for part in self))  # type: ignore[arg-type]

    def read(self, use_state: bool) -> Tensor:
        """(N, 2 + D) logits and states, or (N, 2) logarithms of probabilities: what a head reads."""
        if not use_state or self.states is None:
            return self.features[:, FEATURES:]
        return torch.cat([self.features[:, :FEATURES], self.states], -1)


class _Guess(NamedTuple):
    """What one drafted token of each row came from, before the model's laws are known."""

    features: Tensor
    states: Tensor | None
    guesses: Tensor
    tokens: Tensor
    """(B,) int64."""
    q: Tensor
    """(B,) the drafter's probability of it, under which it was drawn; 1 at temperature 0."""
    q_text: Tensor
    """(B,) that of the token which the text has there."""


@torch.inference_mode()
def collect(
    lm: CausalLM,
    drafter: Drafter,
    prompts: Sequence[tuple[Tensor, int]],
    sampling: Sampling,
    length: int,
    generator: torch.Generator | None = None,
    most: int = EXAMPLES,
) -> Examples:
    """Draft from every place of the model's own continuations and note, of each token, the chance that it is kept.

    Only tokens whose turn comes are noted: those behind tokens that were all kept. Behind a wrong token the drafter
    continues a text that the model does not write, and no decision depends on what it would have been worth. Drafts
    follow the text, so a place in the text is in a kept draft with probability ``p min(1, q / p) = min(p, q)`` if the
    text is drawn from p and kept with ``min(1, q / p)``: the law of drafts that are verified token by token. The
    label is a chance and not the outcome of a coin, which would only add noise.

    Args:
        lm: the model.
        drafter: of the model.
        prompts: (P,) int64 tokens, and how many to add to them.
        sampling: how tokens are drawn.
        length: of every draft.
        generator: of the draws.
        most: examples to keep; of more a random part.

    Raises:
        NextLatError: there was no room for any draft.
    """
    found: list[Examples] = []
    for numbers, texts, new in _batches(prompts, lm, length):
        if new > 1:
            made = _drafts_everywhere(lm, drafter, texts, new, sampling, length, generator)
            share = most * len(numbers) / len(prompts) / max(len(made.labels), 1)
            if share < 1:
                made = made.take(torch.rand(len(made.labels), generator=generator).to(made.labels.device) < share)
            found.append(made._replace(prompts=torch.tensor(numbers, device=made.prompts.device)[made.prompts]))
    if not found:
        raise NextLatError("no prompt leaves room for a draft; continue prompts by at least 2 tokens")
    columns = zip(*found, strict=True)
    return Examples(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _batches(
    prompts: Sequence[tuple[Tensor, int]], lm: CausalLM, length: int
) -> Iterator[tuple[list[int], list[Tensor], int]]:
    """Numbers and texts of prompts to be continued by as many tokens, and how many."""
    with torch.inference_mode():
        output = lm(prompts[0][0][None, :1])
    sizes = {"vocab": output.logits.shape[-1], "state": length * output.hidden.shape[-1]}
    for new, group in groupby(enumerate(prompts), key=lambda item: item[1][1]):
        items = list(group)
        rows = max(1, min(ROWS, AT_ONCE // (new * max(sizes.values()))))
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
    guesses: list[list[_Guess]] = []  # [i] of the tokens behind token i
    for place in range(new - 1):
        state = drafter.observe(output, read)
        behind = text[:, place : place + 1 + length]
        guesses.append(_follow(drafter, state, behind, sampling, output.logits.shape[-1], generator))
        output = lm(text[:, place : place + 1], cache=cache)
        read = torch.zeros_like(read)
        laws.append(sampling.law(output.logits[:, 0]))
    row = torch.arange(rows, device=device)
    parts: list[Examples] = []
    for place, drafted in enumerate(guesses):
        turn = torch.ones(rows, dtype=torch.bool, device=device)
        for i, guess in enumerate(drafted):
            p = laws[place + i]
            label = (p[row, guess.tokens] / guess.q.to(p)).clamp(max=1).float()
            part = Examples(guess.features, guess.states, guess.guesses, label, row)
            parts.append(part.take(turn))
            kept = (guess.q_text.to(p) / p[row, text[:, place + 1 + i]]).clamp(max=1)
            turn &= torch.rand(rows, generator=generator, dtype=torch.float64).to(device) < kept
    columns = zip(*parts, strict=True)
    return Examples(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _follow(
    drafter: Drafter,
    state: Any,
    text: Tensor,
    sampling: Sampling,
    vocab_size: int,
    generator: torch.Generator | None,
) -> list[_Guess]:
    """What would be drafted for each of (B, K) tokens but the first, if those before it had been drafted and kept."""
    made = []
    row = torch.arange(len(text), device=text.device)
    for position in range(1, text.shape[1]):
        state, logits = drafter.step(state, text[:, position - 1])
        if sampling.greedy:
            law, column = None, logits.argmax(-1)
        else:
            law = sampling.law(logits)
            column = draw(law, torch.rand(len(law), generator=generator, dtype=torch.float64))
        token = column if drafter.vocabulary is None else drafter.vocabulary[column]
        drafted, wanted = Drafted(position, column, logits, state, law), text[:, position]
        if law is None:
            q, q_text = torch.ones(len(token), device=token.device), (token == wanted).float()
        else:
            if drafter.vocabulary is not None:
                law = law.new_zeros(len(law), vocab_size).index_copy_(1, drafter.vocabulary, law)
            q, q_text = law[row, token], law[row, wanted]
        guess = drafted.probability.sqrt().float()
        made.append(_Guess(law_features(drafted), state_of(drafted), guess, token, q, q_text))
    return made


class Calibration(NamedTuple):
    """How good chances are on held-out drafts: mean negative log likelihood in nats, and mean squared error."""

    log_loss: float
    brier: float


class Fit(NamedTuple):
    """A head and what it is worth."""

    head: AcceptanceHead
    head_score: Calibration
    constant: Calibration
    """Of the mean acceptance of the drafts that were fitted to."""
    bins: Calibration
    """Of the bins that ``CostAware`` learns online without a head, having seen those drafts."""
    examples: int
    """Tokens fitted to."""
    held_out: int
    """Tokens measured on, of other prompts."""


@torch.enable_grad()
def fit(
    examples: Examples,
    steps: int = 1500,
    use_state: bool = True,
    held_out: float = 0.2,
    seed: int = 0,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.1,
) -> Fit:
    """Fit a head to the first prompts and measure it on the last ones.

    An eighth of the prompts that are fitted to is only looked at: the weights of the step that foresees it best are
    kept, be it those of the constant that the fit begins with.

    Args:
        examples: from :func:`collect`.
        steps: of AdamW, on batches of up to 1024 tokens.
        use_state: whether the head reads the drafter's state.
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
    edges = numbers[first], numbers[last]
    seen = examples.take(examples.prompts < edges[0])
    watched = examples.take((examples.prompts >= edges[0]) & (examples.prompts < edges[1]))
    new = examples.take(examples.prompts >= edges[1])
    g = torch.Generator().manual_seed(seed)
    read = seen.read(use_state)
    mean, scale = read.mean(0), read.std(0, correction=0).clamp(min=1e-3)
    head = AcceptanceHead(read.shape[1] - FEATURES, generator=g).to(read.device)
    read, compared = (read - mean) / scale, (watched.read(use_state) - mean) / scale
    with torch.no_grad():  # it begins as the constant
        head.layer_2.bias.fill_(float(seen.labels.double().mean().clamp(LEAST, 1 - LEAST).logit()))
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    best, kept = float("inf"), copy.deepcopy(head.state_dict())
    for step in range(steps + 1):
        if step % LOOK == 0 or step.bit_count() == 1 or step == steps:  # few examples are known by heart soon
            with torch.no_grad():
                loss = float(F.binary_cross_entropy_with_logits(head(compared), watched.labels))
            if loss < best:
                best, kept = loss, copy.deepcopy(head.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        rows = torch.randint(len(read), (min(1024, len(read)),), generator=g).to(read.device)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(head(read[rows]), seen.labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    head.load_state_dict(kept)
    with torch.no_grad():  # the head reads what decoding sees, as it is
        head.layer_1.weight.div_(scale)
        head.layer_1.bias.sub_(head.layer_1.weight @ mean)
    head.eval().requires_grad_(False)
    forecast = Forecast(1, trust=10.0, memory=1e12)
    for guess, label in zip(seen.guesses.tolist(), seen.labels.tolist(), strict=True):
        forecast.count(bin_of(guess), label)
    forecast.refresh()
    bins = torch.tensor([forecast.chance[bin_of(guess)] for guess in new.guesses.tolist()]).to(new.labels)
    return Fit(
        head,
        calibration(head(new.read(use_state)).sigmoid(), new.labels),
        calibration(seen.labels.mean().expand(len(new.labels)), new.labels),
        calibration(bins, new.labels),
        len(seen.labels) + len(watched.labels),
        len(new.labels),
    )


def calibration(chances: Tensor, labels: Tensor) -> Calibration:
    """How far (N,) chances are from (N,) labels, themselves chances or 0 and 1."""
    chances = chances.double().clamp(LEAST, 1 - LEAST)
    labels = labels.double()
    return Calibration(float(F.binary_cross_entropy(chances, labels)), float(((chances - labels) ** 2).mean()))
