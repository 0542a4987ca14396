"""A learned guess of whether a drafted token will be kept, from what the drafter said of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.decoding.adaptive import Forecast, bin_of, by_probability
from nextlat.decoding.drafting import Drafted
from nextlat.decoding.policies import Static
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.speculative import decode
from nextlat.errors import NextLatError
from nextlat.model.cache import Cache
from nextlat.model.interfaces import CausalLM, Drafter, LMOutput

FEATURES = 4
LEAST = 1e-6
"""Probabilities below count as this; the logarithm of nothing is no feature."""


def law_features(drafted: Drafted) -> Tensor:
    """(B, 4): log probability of the most likely token and of the drafted one, entropy in nats, log position."""
    top = drafted.law.amax(-1).clamp(min=LEAST).log()
    entropy = torch.special.entr(drafted.law).sum(-1)
    position = torch.full_like(top, float(drafted.position)).log()
    return torch.stack([top, drafted.probability.clamp(min=LEAST).log(), entropy, position], -1).float()


class AcceptanceHead(nn.Module):
    """Chance that a drafted token is kept: a small network on features of its law, and a linear reading of the state.

    Args:
        state_width: D of the drafter's state; 0 does without it.
        hidden_dim: units of the one hidden layer.
        generator: of the initial weights.
    """

    def __init__(self, state_width: int = 0, hidden_dim: int = 16, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(FEATURES))
        self.scale = nn.Buffer(torch.ones(FEATURES))
        self.layer_1 = nn.Linear(FEATURES, hidden_dim)
        self.layer_2 = nn.Linear(hidden_dim, 1)
        self.reading = nn.Linear(state_width, 1, bias=False) if state_width else None
        for layer in (self.layer_1, self.layer_2):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        if self.reading is not None:
            nn.init.zeros_(self.reading.weight)

    def forward(self, features: Tensor, states: Tensor | None = None) -> Tensor:
        """(N,) logits of being kept, from (N, 4) features and (N, D) states."""
        hidden = F.silu(self.layer_1((features - self.mean) / self.scale))
        logits: Tensor = self.layer_2(hidden)[:, 0]
        if self.reading is not None:
            assert states is not None
            logits = logits + self.reading(F.rms_norm(states.float(), states.shape[-1:]))[:, 0]
        return logits

    @torch.no_grad()
    def estimate(self, drafted: Drafted) -> Tensor:
        """(B,) chances; what :class:`nextlat.decoding.CostAware` takes as ``estimator``."""
        logits: Tensor = self(law_features(drafted), drafted.state if self.reading is not None else None)
        return logits.sigmoid()


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


class _Recorder(Static):
    """Drafts a fixed length for one row, listens to the model, and notes what was seen and what became of it."""

    def __init__(self, lm: CausalLM, drafter: Drafter, length: int, sampling: Sampling) -> None:
        super().__init__(length)
        self.lm, self.vocabulary, self.sampling = lm, drafter.vocabulary, sampling
        self.number = 0
        self.parts: list[Examples] = []
        self._logits = torch.empty(0)
        self._round: list[Drafted] = []

    def __call__(self, *args: Any, **options: Any) -> LMOutput:
        output = self.lm(*args, **options)
        self._logits = output.logits
        return output

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return self.lm.new_cache(rows, capacity)

    def starts(self) -> bool:
        self._round = []
        return True

    def goes_on(self, drafted: Drafted) -> bool:
        self._round.append(drafted)
        return True

    def learn(self, drafted: list[int], accepted: list[int]) -> None:
        for i, seen in enumerate(self._round[: min(drafted[0], accepted[0] + 1)]):
            token = seen.column if self.vocabulary is None else self.vocabulary[seen.column]
            p = self.sampling.law(self._logits[:, i]).gather(-1, token[:, None])[:, 0]
            q = torch.ones_like(p) if self.sampling.greedy else seen.probability.to(p)
            vector = isinstance(seen.state, Tensor) and seen.state.ndim == 2
            self.parts.append(
                Examples(
                    law_features(seen),
                    seen.state.float() if vector else None,
                    by_probability(seen).float(),
                    (p / q).clamp(max=1).float(),
                    torch.full_like(token, self.number),
                )
            )


def collect(
    lm: CausalLM,
    drafter: Drafter,
    prompts: Iterable[tuple[Tensor, int]],
    sampling: Sampling,
    length: int,
    generator: torch.Generator | None = None,
) -> Examples:
    """Continue prompts with drafts of a fixed length and note, of each token, what was seen and whether it was kept.

    Only tokens whose turn came are noted, those up to the first that is not kept: behind a wrong token the drafter
    continues a text that the model does not write, and no decision depends on what it would have been worth. The
    label is the chance to be kept and not the outcome of a coin, which would only add noise. Tokens are judged one by
    one, because the block rule has no chance of a single token.

    Args:
        lm: the model.
        drafter: of the model.
        prompts: (P,) int64 tokens, and how many to add to them; one is continued at a time.
        sampling: how tokens are drawn.
        length: of every draft.
        generator: of the draws.

    Raises:
        NextLatError: there was no room for any draft.
    """
    recorder = _Recorder(lm, drafter, length, sampling)
    for recorder.number, (prompt, new) in enumerate(prompts):
        for _ in decode(
            recorder,
            prompt[None],
            new,
            sampling,
            drafter=drafter,
            policy=recorder,
            verification="token",
            generator=generator,
        ):
            pass
    if not recorder.parts:
        raise NextLatError("no prompt leaves room for a draft; continue prompts by at least 3 tokens")
    columns = zip(*recorder.parts, strict=True)
    return Examples(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


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
    steps: int = 300,
    use_state: bool = True,
    held_out: float = 0.2,
    seed: int = 0,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-2,
) -> Fit:
    """Fit a head to the first prompts and measure it on the last ones.

    Args:
        examples: from :func:`collect`.
        steps: of AdamW, on batches of up to 1024 tokens.
        use_state: whether the head reads the drafter's state.
        held_out: share of the prompts, the last ones, that is only measured on.
        seed: of weights and batches.
        learning_rate: falls linearly to 0.
        weight_decay: keeps the reading of a wide state from learning single tokens by heart.

    Raises:
        NextLatError: fewer than two prompts.
    """
    numbers = torch.unique(examples.prompts)
    if len(numbers) < 2:
        raise NextLatError(f"drafts of {len(numbers)} prompt are there; two are needed, one of them to measure on")
    edge = numbers[min(round((1 - held_out) * len(numbers)), len(numbers) - 1)]
    seen, new = examples.take(examples.prompts < edge), examples.take(examples.prompts >= edge)
    g = torch.Generator().manual_seed(seed)
    width = seen.states.shape[1] if use_state and seen.states is not None else 0
    head = AcceptanceHead(width, generator=g).to(seen.features.device)
    head.mean.copy_(seen.features.mean(0))
    head.scale.copy_(seen.features.std(0, correction=0).clamp(min=1e-3))
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        rows = torch.randint(len(seen.labels), (min(1024, len(seen.labels)),), generator=g)
        part = seen.take(rows.to(seen.labels.device))
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(head(part.features, part.states), part.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    head.eval().requires_grad_(False)
    forecast = Forecast(1, trust=10.0, memory=1e12)
    for guess, label in zip(seen.guesses.tolist(), seen.labels.tolist(), strict=True):
        forecast.count(bin_of(guess), label)
    forecast.refresh()
    bins = torch.tensor([forecast.chance[bin_of(guess)] for guess in new.guesses.tolist()]).to(new.labels)
    return Fit(
        head,
        calibration(head(new.features, new.states).sigmoid(), new.labels),
        calibration(seen.labels.mean().expand(len(new.labels)), new.labels),
        calibration(bins, new.labels),
        len(seen.labels),
        len(new.labels),
    )


def calibration(chances: Tensor, labels: Tensor) -> Calibration:
    """How far (N,) chances are from (N,) labels, themselves chances or 0 and 1."""
    chances = chances.double().clamp(LEAST, 1 - LEAST)
    labels = labels.double()
    return Calibration(float(F.binary_cross_entropy(chances, labels)), float(((chances - labels) ** 2).mean()))
