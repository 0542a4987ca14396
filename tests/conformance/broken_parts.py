"""Latent dynamics and terms of several tokens ahead with one bug each.

`Network` and `Heads` are right; each subclass overrides the one piece that its bug is in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conformance.broken import Terms, run_numbers


class Network:
    """The latent dynamics, in pieces."""

    def __call__(
        self, state: Tensor, embedding: Tensor, gain: Tensor, layer_1: Tensor, layer_2: Tensor, layer_3: Tensor
    ) -> Tensor:
        u = self.norm(self.joined(state, embedding), gain)
        u = self.activation(self.activation(u @ layer_1.T) @ layer_2.T)
        return self.out(self.residual(state) + u @ layer_3.T)

    def joined(self, state: Tensor, embedding: Tensor) -> Tensor:
        return torch.cat([embedding, state], -1)

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return gain * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def residual(self, state: Tensor) -> Tensor:
        return state

    def out(self, state: Tensor) -> Tensor:
        return state


class HiddenFirst(Network):
    """[hidden ; embedding], as the text has it."""

    def joined(self, state: Tensor, embedding: Tensor) -> Tensor:
        return torch.cat([state, embedding], -1)


class LayerNormed(Network):
    """LayerNorm."""

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return F.layer_norm(x, gain.shape, gain, eps=1e-5)


class NormedApart(Network):
    """A norm for each half."""

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        halves = [h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() for h in (first, second)]
        return gain * torch.cat(halves, -1)


class NoGain(Network):
    """A norm without a gain."""

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return super().norm(x, torch.ones_like(gain))


class TanhGELU(Network):
    """The approximate GELU."""

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class NormedResidual(Network):
    """Adds the normalised state."""

    def residual(self, state: Tensor) -> Tensor:
        return F.rms_norm(state, state.shape[-1:], eps=1e-5)


class NoResidual(Network):
    """Predicts the state, not its change."""

    def residual(self, state: Tensor) -> Tensor:
        return torch.zeros_like(state)


class NormedOutput(Network):
    """Normalises what it returns."""

    def out(self, state: Tensor) -> Tensor:
        return F.rms_norm(state, state.shape[-1:], eps=1e-5)


class SmallEpsilon(Network):
    """Another epsilon."""

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, gain.shape, gain, eps=1e-6)


class NoEpsilon(Network):
    """Zero input: 0 / 0."""

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return gain * x / x.square().mean(-1, keepdim=True).sqrt()


class NormsWholeBatch(Network):
    """The mean square of everything at once."""

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return gain * x / (x.square().mean() + 1e-5).sqrt()


class Heads:
    """The terms of mtp and jtp, in pieces."""

    def __call__(
        self, states: Tensor, head_weight: Tensor, targets: Tensor, documents: Tensor | None, horizon: int
    ) -> Terms:
        ids = self.ids(targets, documents)
        terms = {}
        for i in range(horizon + 1):
            mask = self.mask(targets, ids, i)
            logits = self.select(states[i, :, : mask.shape[1]], mask) @ self.head(head_weight, i).T
            labels = self.select(self.ahead(targets, i).clamp(min=0)[..., None], mask)[:, 0]
            nats = -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0].masked_fill((logits == 0).all(-1), 0.0)
            terms[f"mtp_{i}" if i else "ce"] = self.reduced(nats, mask.sum())
        return terms

    def ids(self, targets: Tensor, documents: Tensor | None) -> Tensor:
        return torch.zeros_like(targets) if documents is None else documents

    def ahead(self, targets: Tensor, i: int) -> Tensor:
        return targets[:, i:]

    def mask(self, targets: Tensor, ids: Tensor, i: int) -> Tensor:
        return self.together(ids, i) & (targets[:, i:] != -100)

    def together(self, ids: Tensor, i: int) -> Tensor:
        width = max(ids.shape[1] - i, 0)
        run = run_numbers(ids)
        return (run[:, :width] == run[:, i:]) & (ids[:, :width] >= 0)

    def select(self, values: Tensor, mask: Tensor) -> Tensor:
        return values[mask]

    def head(self, head_weight: Tensor, i: int) -> Tensor:
        return head_weight

    def reduced(self, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return values.sum(), count


class FirstAnswerTokenDropped(Heads):
    """The mask of slots beyond the first is off by one: the source must be asked about as well."""

    def mask(self, targets: Tensor, ids: Tensor, i: int) -> Tensor:
        mask = super().mask(targets, ids, i)
        return mask & (targets[:, i - 1 : -1] != -100) if i else mask


class NoDocuments(Heads):
    """Built without what tells documents apart."""

    def together(self, ids: Tensor, i: int) -> Tensor:
        return super().together(ids.clamp(-1, 0), i)


class HeadsDropBoundaryOnly(Heads):
    """Masks targets at a boundary, not those past it."""

    def together(self, ids: Tensor, i: int) -> Tensor:
        width = max(ids.shape[1] - i, 0)
        before = ids[:, i - 1 : -1] if i else ids
        return (ids[:, i:] == before) & (ids[:, :width] >= 0) & (ids[:, i:] >= 0)


class HeadsCompareEndpoints(Heads):
    """Takes an id that comes back for the same document."""

    def together(self, ids: Tensor, i: int) -> Tensor:
        width = max(ids.shape[1] - i, 0)
        return (ids[:, :width] == ids[:, i:]) & (ids[:, :width] >= 0)


class AsksPadding(Heads):
    """Trusts the targets on padding."""

    def together(self, ids: Tensor, i: int) -> Tensor:
        run = run_numbers(ids)
        return run[:, : max(ids.shape[1] - i, 0)] == run[:, i:]


class HeadsMultiplyMask(Heads):
    """Multiplies by the mask instead of selecting."""

    def select(self, values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask[..., None]).reshape(-1, values.shape[-1])


class HeadsStopAfterThree(Heads):
    """Asks the first three slots beyond the next token and no other."""

    def together(self, ids: Tensor, i: int) -> Tensor:
        return super().together(ids, i) & (i <= 3)


class HeadsLeakFromFourth(Heads):
    """Masks boundaries for three slots by hand; later ones know padding alone."""

    def together(self, ids: Tensor, i: int) -> Tensor:
        return super().together(ids if i <= 3 else ids.clamp(-1, 0), i)


class EndTargetIsBoundary(Heads):
    """Looks for end tokens when no documents are given."""

    def ids(self, targets: Tensor, documents: Tensor | None) -> Tensor:
        return F.pad((targets == 0)[:, :-1], (1, 0)).cumsum(1) if documents is None else documents


class HeadsCallBackward(Heads):
    """Runs the backward pass itself."""

    def reduced(self, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        values.sum().backward(retain_graph=True)
        return super().reduced(values, count)


class FirstPositionsAsked(Heads):
    """Asks the further slots at the first six positions only."""

    def together(self, ids: Tensor, i: int) -> Tensor:
        allowed = super().together(ids, i)
        return allowed & (torch.arange(allowed.shape[1]) < 6) if i else allowed


class TargetsOfNext(Heads):
    """Every slot predicts the next token."""

    def ahead(self, targets: Tensor, i: int) -> Tensor:
        return targets[:, : max(targets.shape[1] - i, 0)]


class HeadsEmptyMeanIsNaN(Heads):
    """A mean over no positions, made into a sum again."""

    def reduced(self, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return values.sum() / count * count, count


class FrozenHead(Heads):
    """Slots beyond the first do not train the head."""

    def head(self, head_weight: Tensor, i: int) -> Tensor:
        return head_weight.detach() if i else head_weight


class HeadsMeans(Heads):
    """Means in place of sums."""

    def reduced(self, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return values.sum() / count.clamp(min=1), count


class SharedSlot(Heads):
    """All slots read the state of slot 0."""

    def __call__(
        self, states: Tensor, head_weight: Tensor, targets: Tensor, documents: Tensor | None, horizon: int
    ) -> Terms:
        return super().__call__(states[:1].expand_as(states), head_weight, targets, documents, horizon)


class AddsFirstSlot(Heads):
    """Adds the state of slot 0 to that of every other slot."""

    def __call__(
        self, states: Tensor, head_weight: Tensor, targets: Tensor, documents: Tensor | None, horizon: int
    ) -> Terms:
        added = torch.cat([states[:1], states[1:] + states[:1]])
        return super().__call__(added, head_weight, targets, documents, horizon)
