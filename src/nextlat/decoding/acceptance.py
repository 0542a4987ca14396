"""How long drafts shall be, foreseen before the first drafted token by a head that is fitted to a drafter."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextlat.decoding.costs import Costs
from nextlat.decoding.policies import Known, Static
from nextlat.errors import NextLatError

HIDDEN, LAYERS = 128, 3
RETRY = 32
"""Rounds without drafts, where they do not pay, before one is tried again."""
HOPE = 8.0
"""Plain steps' worth of time for which drafts are believed to pay at first, or not to pay any more."""


class AcceptanceHead(nn.Module):
    """From what is known before a draft, the chances of each of its tokens to be kept if those before it are.

    Three hidden layers over the model's state and the embedding of the token behind it. That is all a latent drafter
    starts from, so that where it will go wrong can be foreseen before it has drafted anything; and it is there for
    every other drafter too. The layers are narrow, because the model's own weights push them out of the processor's
    caches: fetching them takes longer than multiplying by them.

    Args:
        embedding: (V, E) of the model's tokens; not trained, and not part of what is saved.
        state_width: D of the model's states.
        length: K tokens of a draft.
        hidden_dim: units of each hidden layer.
        generator: of the initial weights.
    """

    def __init__(
        self,
        embedding: Tensor,
        state_width: int,
        length: int,
        hidden_dim: int = HIDDEN,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.length = length
        self.embedding: Tensor
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        widths = [state_width + embedding.shape[1], *[hidden_dim] * LAYERS]
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.layers, self.out = nn.ModuleList(layers), nn.Linear(hidden_dim, length)
        for layer in layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def read(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(N, D + E) fp32 figures, of (N, D) states and (N,) tokens behind them."""
        return torch.cat([states.float(), F.embedding(tokens, self.embedding).float()], -1)

    def forward(self, figures: Tensor) -> Tensor:
        """(N, K) logits of being kept, from (N, D + E) figures."""
        for layer in self.layers:
            figures = F.silu(layer(figures))
        logits: Tensor = self.out(figures)
        return logits

    def folded(self) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of (N, D) states and (N,) tokens: (N, K) chances that the first 1, ..., K drafts are all kept.

        What the first layer makes of embeddings is made once for all tokens, and the rest is written with as few calls
        of torch as it takes: half the time of :meth:`forward` for one row. The weights must stay what they are now.
        """
        with torch.no_grad():
            first, *rest = (layer for layer in (*self.layers, self.out) if isinstance(layer, nn.Linear))
            of_states, of_embeddings = first.weight.tensor_split([first.in_features - self.embedding.shape[1]], 1)
            of_tokens = F.linear(self.embedding.float(), of_embeddings, first.bias)  # (V, H)
        behind = [(layer.bias.detach(), layer.weight.detach().T) for layer in rest]

        @torch.inference_mode()
        def survival(states: Tensor, tokens: Tensor) -> Tensor:
            u = torch.addmm(F.embedding(tokens, of_tokens), states.float(), of_states.T)
            for bias, weight in behind:
                u = torch.addmm(bias, F.silu(u, inplace=True), weight)
            return u.sigmoid_().cumprod(-1)

        return survival


class Planned(Static):
    """As many tokens as an :class:`AcceptanceHead` promises more for than they cost, decided once a round.

    Before anything is drafted the length n = 0, 1, ... is chosen that has the largest

        1 + S_1 + ... + S_n - rate (V(n + 1) + n c),

    with S_j the chance that the first j tokens are all kept and the rate of tokens per time that has been reached of
    late, which makes the rate itself as large as it can be (Dinkelbach 1967); 1, that of plain decoding, is the
    least. Where rounds with drafts have been slower than that, whatever the head says, one is tried now and then.
    Rows of a batch share a length: a call costs what its longest draft costs.

    A decision takes a few small operations, as long as a draft step of a small model; one a round is far cheaper than
    one a token. It depends on no drafted token, so the text stays lossless.

    Args:
        costs: of drafting and verifying, for as many rows as are decoded.
        head: fitted to the drafter, at the temperature that is used.
        max_length: no draft gets longer.
        memory: rounds after which what was gained has faded to 1/e.

    Raises:
        NextLatError: numbers out of range.
    """

    reads_states = True

    def __init__(self, costs: Costs, head: AcceptanceHead, max_length: int = 16, memory: float = 500.0) -> None:
        super().__init__(min(max_length, head.length))
        if not memory > 1:
            raise NextLatError(f"memory is {memory} rounds; it must be above 1")
        self._survival = head.folded()
        self._round = [costs.round(length) for length in range(self.max_length + 1)]
        self._fade = 1 - 1 / memory
        # as if drafts had paid for a while, so that some in a row must be lost before they are given up
        self._tokens = self._drafted_tokens = 1.5 * HOPE
        self._time = self._drafted_time = HOPE
        self._idle = 0

    @property
    def rate(self) -> float:
        """Tokens that a row has gained per cost of a plain step, of late."""
        return self._tokens / self._time

    @property
    def drafts_pay(self) -> bool:
        """Whether rounds with drafts have been faster than plain decoding, of late."""
        return self._drafted_tokens >= self._drafted_time

    def plan(self, known: Known) -> int:
        """The length for all rows; 0 where drafts do not pay."""
        tried = self._idle >= RETRY
        if not self.max_length or not (self.drafts_pay or tried):
            return 0
        assert known.states is not None
        rooms = known.room.tolist()
        curves = self._survival(known.states, known.tokens)
        if len(rooms) > 1:
            curves = curves[known.room > 0].mean(0, keepdim=True)
        curve, longest = curves[0].tolist(), min(self.max_length, max(rooms))
        rate, tokens, best, planned = max(self.rate, 1.0), 1.0, -float("inf"), 0
        if not tried:
            best = 1.0 - rate
        for length in range(1, longest + 1):
            tokens += curve[length - 1]
            worth = tokens - rate * self._round[length]
            if worth > best:
                best, planned = worth, length
        return planned

    def learn(self, drafted: list[int], accepted: list[int]) -> None:
        """Count what was gained, and what it cost."""
        length, rows = max(drafted, default=0), sum(n > 0 for n in drafted)
        self._idle = 0 if length else self._idle + 1
        gained, spent = 1 + sum(accepted) / max(rows, 1), self._round[length]
        self._tokens = self._fade * self._tokens + gained
        self._time = self._fade * self._time + spent
        if rows:
            self._drafted_tokens = self._fade * self._drafted_tokens + gained
            self._drafted_time = self._fade * self._drafted_time + spent
            if not self.drafts_pay:  # few that are kept later on shall tell that the text has become another
                rate, time = self._drafted_tokens / self._drafted_time, min(self._drafted_time, HOPE)
                self._drafted_tokens, self._drafted_time = rate * time, time
