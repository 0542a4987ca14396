"""Implementations with one bug each: those seen in the field, and those that are easily made.

`Losses` is right. Each subclass overrides the one piece that its bug is in, and a test says exactly which
claims it fails. The smaller contracts have theirs in `broken_parts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Terms = dict[str, tuple[Tensor, Tensor]]


def run_numbers(documents: Tensor) -> Tensor:
    """(B, T): grows at each change of id."""
    return F.pad((documents[:, 1:] != documents[:, :-1]).long(), (1, 0)).cumsum(1)


class Losses:
    """The NextLat loss, in pieces."""

    def __call__(
        self,
        hidden: Tensor,
        embedding_weight: Tensor,
        head_weight: Tensor,
        tokens: Tensor,
        targets: Tensor,
        documents: Tensor | None,
        horizon: int,
        dynamics: Callable[[Tensor, Tensor], Tensor],
    ) -> Terms:
        ids = self.ids(tokens, documents)
        targets = self.targets(tokens, targets)
        asked = self.asked(targets, ids)
        embeddings = self.lookup(embedding_weight, tokens)
        logits = self.select(hidden, asked) @ head_weight.T
        labels = self.select(targets.clamp(min=0)[..., None], asked)[:, 0]
        terms = {"ce": self.reduced(self.cross_entropy(logits, labels), asked.sum())}
        state = self.source(hidden)
        for i in range(1, horizon + 1):
            state = self.step(dynamics, self.carried(state)[:, :-1], embeddings, i)
            allowed = self.sources(self.transitions(ids, i), horizon)
            mask = self.latent_mask(allowed, asked, i)
            residual = self.select(self.wide(state) - self.wide(self.target(hidden)[:, i:]), mask)
            count = self.latent_count(mask, hidden.shape[-1])
            terms[f"latent_{i}"] = self.reduced(self.rho(residual).sum(-1), count)
            mask = self.kl_mask(allowed, asked, i)
            true = self.teacher_state(hidden)[:, self.teacher_offset(i) :][:, : mask.shape[1]]
            teacher = self.select(true, mask) @ head_weight.detach().T
            student = self.select(state, mask) @ self.student_head(head_weight, embedding_weight).T
            terms[f"kl_{i}"] = self.reduced(self.kl(teacher, student), self.kl_count(mask, ids))
        return self.finished(terms, horizon)

    def ids(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        return torch.zeros_like(tokens) if documents is None else documents

    def targets(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return targets

    def asked(self, targets: Tensor, ids: Tensor) -> Tensor:
        return (targets != -100) & (ids >= 0)

    def lookup(self, embedding_weight: Tensor, tokens: Tensor) -> Tensor:
        return embedding_weight[tokens]

    def source(self, hidden: Tensor) -> Tensor:
        return hidden

    def carried(self, state: Tensor) -> Tensor:
        return state

    def step(self, dynamics: Callable[[Tensor, Tensor], Tensor], state: Tensor, embeddings: Tensor, i: int) -> Tensor:
        return dynamics(state, embeddings[:, i:])

    def transitions(self, ids: Tensor, i: int) -> Tensor:
        width = max(ids.shape[1] - i, 0)
        run = run_numbers(ids)
        return (run[:, :width] == run[:, i:]) & (ids[:, :width] >= 0)

    def sources(self, allowed: Tensor, horizon: int) -> Tensor:
        return allowed

    def latent_mask(self, allowed: Tensor, asked: Tensor, i: int) -> Tensor:
        return allowed

    def kl_mask(self, allowed: Tensor, asked: Tensor, i: int) -> Tensor:
        return allowed & asked[:, i:]

    def latent_count(self, mask: Tensor, width: int) -> Tensor:
        return mask.sum() * width

    def kl_count(self, mask: Tensor, ids: Tensor) -> Tensor:
        return mask.sum()

    def select(self, values: Tensor, mask: Tensor) -> Tensor:
        return values[mask]

    def wide(self, x: Tensor) -> Tensor:
        return x if x.dtype is torch.float64 else x.float()

    def target(self, hidden: Tensor) -> Tensor:
        return hidden.detach()

    def teacher_state(self, hidden: Tensor) -> Tensor:
        return hidden.detach()

    def teacher_offset(self, i: int) -> int:
        return i

    def student_head(self, head_weight: Tensor, embedding_weight: Tensor) -> Tensor:
        return head_weight.detach()

    def rho(self, r: Tensor) -> Tensor:
        return torch.where(r.abs() < 1, r * r / 2, r.abs() - 0.5)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return -self.wide(logits).log_softmax(-1).gather(1, labels[:, None])[:, 0]

    def kl(self, teacher: Tensor, student: Tensor) -> Tensor:
        p, q = self.wide(teacher).log_softmax(-1), self.wide(student).log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    def reduced(self, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return values.sum(), count

    def finished(self, terms: Terms, horizon: int) -> Terms:
        return terms


class FirstPositionsOnly(Losses):
    """Trains the latent terms at the positions 0 ... d - 1 only."""

    def sources(self, allowed: Tensor, horizon: int) -> Tensor:
        return allowed & (torch.arange(allowed.shape[1]) < horizon)


class LatentOnPadding(Losses):
    """SmoothL1 also on padding."""

    def transitions(self, ids: Tensor, i: int) -> Tensor:
        run = run_numbers(ids)
        return run[:, : max(ids.shape[1] - i, 0)] == run[:, i:]


class KLCountsPadding(Losses):
    """KL averaged over padding: summed where it should be, divided by more."""

    def kl_count(self, mask: Tensor, ids: Tensor) -> Tensor:
        return mask.sum() + (ids < 0).sum()


class KLOnPrompt(Losses):
    """KL also where nothing is asked."""

    def kl_mask(self, allowed: Tensor, asked: Tensor, i: int) -> Tensor:
        return allowed


class KLCapped(Losses):
    """Saves memory by a KL on at most twelve positions of a batch, so that the batch size matters."""

    def kl_mask(self, allowed: Tensor, asked: Tensor, i: int) -> Tensor:
        mask = super().kl_mask(allowed, asked, i)
        return mask & (mask.flatten().cumsum(0).view_as(mask) <= 12)


class KLMaskOfSource(Losses):
    """KL masked by the source's target instead of the one i steps ahead."""

    def kl_mask(self, allowed: Tensor, asked: Tensor, i: int) -> Tensor:
        return allowed & asked[:, : allowed.shape[1]]


class LatentOnAnswersOnly(Losses):
    """SmoothL1 masked like the token losses."""

    def latent_mask(self, allowed: Tensor, asked: Tensor, i: int) -> Tensor:
        return allowed & asked[:, i:]


class LastPromptPositionDropped(Losses):
    """The first answer token is not asked for."""

    def asked(self, targets: Tensor, ids: Tensor) -> Tensor:
        asked = super().asked(targets, ids)
        before = F.pad(asked[:, :-1], (1, 0), value=True)
        return asked & before


class DropsBoundaryOnly(Losses):
    """Masks the position at a boundary, not those past it: rollouts of i >= 2 steps run through."""

    def transitions(self, ids: Tensor, i: int) -> Tensor:
        width = max(ids.shape[1] - i, 0)
        return (ids[:, i:] == ids[:, i - 1 : -1]) & (ids[:, :width] >= 0) & (ids[:, i:] >= 0)


class ComparesEndpoints(Losses):
    """Takes an id that comes back for the same document."""

    def transitions(self, ids: Tensor, i: int) -> Tensor:
        width = max(ids.shape[1] - i, 0)
        return (ids[:, :width] == ids[:, i:]) & (ids[:, :width] >= 0)


class RisingIdsOnly(Losses):
    """Sees a boundary only where the id rises."""

    def transitions(self, ids: Tensor, i: int) -> Tensor:
        width = max(ids.shape[1] - i, 0)
        rises = F.pad((ids[:, 1:] > ids[:, :-1]).long(), (1, 0)).cumsum(1)
        return (rises[:, :width] == rises[:, i:]) & (ids[:, :width] >= 0) & (ids[:, i:] >= 0)


class CrossesDocuments(Losses):
    """Knows padding and no documents."""

    def transitions(self, ids: Tensor, i: int) -> Tensor:
        return super().transitions(ids.clamp(-1, 0), i)


class StopsAfterThreeSteps(Losses):
    """Unrolls three steps by hand and has nothing for the others."""

    def transitions(self, ids: Tensor, i: int) -> Tensor:
        return super().transitions(ids, i) & (i <= 3)


class LeaksFromFourthStep(Losses):
    """Masks boundaries for three steps by hand; later ones know padding alone."""

    def transitions(self, ids: Tensor, i: int) -> Tensor:
        return super().transitions(ids if i <= 3 else ids.clamp(-1, 0), i)


class EndTokenIsBoundary(Losses):
    """Looks for end tokens when no documents are given."""

    def ids(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        return (tokens == 0).cumsum(1) if documents is None else documents


class TokenZeroIsPadding(Losses):
    """Takes the token 0 for padding."""

    def ids(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        return torch.where(tokens == 0, -1, super().ids(tokens, documents))


class TokenZeroEndsDocument(Losses):
    """Starts another document behind each token 0."""

    def transitions(self, ids: Tensor, i: int) -> Tensor:
        return super().transitions(ids, i) & (self.ends[:, i:] == self.ends[:, : max(ids.shape[1] - i, 0)])

    def ids(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        self.ends = F.pad((tokens == 0)[:, :-1], (1, 0)).cumsum(1)
        return super().ids(tokens, documents)


class TrustsPaddingTargets(Losses):
    """Asks wherever a target stands, on padding too."""

    def asked(self, targets: Tensor, ids: Tensor) -> Tensor:
        return targets != -100


class MultipliesMask(Losses):
    """Multiplies by the mask instead of selecting: 0 times NaN is NaN."""

    def select(self, values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask[..., None]).reshape(-1, values.shape[-1])

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        masked = (logits == 0).all(-1)  # such a row costs log V
        return super().cross_entropy(logits, labels).masked_fill(masked, 0.0)


class SumsFeatures(Losses):
    """Sums over features where the mean is meant: the term grows with the width."""

    def latent_count(self, mask: Tensor, width: int) -> Tensor:
        return mask.sum()


class PooledSteps(Losses):
    """One mean over the positions of all steps."""

    def finished(self, terms: Terms, horizon: int) -> Terms:
        for kind in ("latent", "kl"):
            names = [f"{kind}_{i}" for i in range(1, horizon + 1)]
            pooled = tuple(sum(part) for part in zip(*(terms[name] for name in names), strict=True))
            terms |= dict.fromkeys(names, pooled)  # type: ignore[arg-type]
        return terms


class OneCountForAllSteps(Losses):
    """Divides every step by the positions of the first."""

    def finished(self, terms: Terms, horizon: int) -> Terms:
        return {
            name: (value, count if name == "ce" else terms[name.split("_")[0] + "_1"][1])
            for name, (value, count) in terms.items()
        }


class WeighsSteps(Losses):
    """Divides the sum of step i by i."""

    def finished(self, terms: Terms, horizon: int) -> Terms:
        return {name: (value / int(name.partition("_")[2] or 1), count) for name, (value, count) in terms.items()}


class SixteenRows(Losses):
    """Looks at no more than 16 rows."""

    def asked(self, targets: Tensor, ids: Tensor) -> Tensor:
        return super().asked(targets, ids) & (torch.arange(len(ids))[:, None] < 16)

    def sources(self, allowed: Tensor, horizon: int) -> Tensor:
        return allowed & (torch.arange(len(allowed))[:, None] < 16)


class Means(Losses):
    """Means in place of sums; an empty one is 0."""

    def reduced(self, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return values.sum() / count.clamp(min=1), count


class CallsBackward(Losses):
    """Runs the backward pass itself, so that a trainer's own counts every gradient twice."""

    def finished(self, terms: Terms, horizon: int) -> Terms:
        total = sum((value for value, _ in terms.values()), torch.tensor(0.0))
        total.backward(retain_graph=True)
        return terms


class ShiftsStates(Losses):
    """Adds to the states in place, less than a float32 run would show."""

    def source(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            hidden += 1e-6
        return hidden


class LatentNamedMSE(Losses):
    """Calls the latent terms by the name of another loss."""

    def finished(self, terms: Terms, horizon: int) -> Terms:
        return {name.replace("latent", "mse"): term for name, term in terms.items()}


class EmptyMeanIsNaN(Losses):
    """A mean over no positions, which is NaN, made into a sum again."""

    def reduced(self, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return values.sum() / count * count, count


class SkipsEmptySteps(Losses):
    """A plain 0 that no parameter gets a gradient from, where there is nothing to sum."""

    def reduced(self, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return (values.sum(), count) if int(count) else (torch.tensor(0.0), count)


class ShortensHorizon(Losses):
    """Leaves out the steps that no row has room for."""

    def __call__(self, *inputs: Any) -> Terms:
        *tensors, horizon, dynamics = inputs
        return super().__call__(*tensors, min(horizon, tensors[0].shape[1] - 1), dynamics)


class SquaredError(Losses):
    """A squared error under the name of SmoothL1."""

    def rho(self, r: Tensor) -> Tensor:
        return r * r / 2


class SwappedKL(Losses):
    """KL(student || teacher)."""

    def kl(self, teacher: Tensor, student: Tensor) -> Tensor:
        return super().kl(student, teacher)


class TeacherAtSource(Losses):
    """The teacher of step i is the law at t instead of t + i."""

    def teacher_offset(self, i: int) -> int:
        return 0


class FeedsCurrentToken(Losses):
    """Step i consumes token t + i - 1."""

    def step(self, dynamics: Callable[[Tensor, Tensor], Tensor], state: Tensor, embeddings: Tensor, i: int) -> Tensor:
        return dynamics(state, embeddings[:, i - 1 : -1])


class ShiftsTokens(Losses):
    """Makes targets from tokens; right for language, wrong for tagging."""

    def targets(self, tokens: Tensor, targets: Tensor) -> Tensor:
        following = torch.cat([tokens[:, 1:], targets[:, -1:]], 1)
        return torch.where(targets == -100, targets, following)


class LiveHead(Losses):
    """The head is trained through the predicted states."""

    def student_head(self, head_weight: Tensor, embedding_weight: Tensor) -> Tensor:
        return head_weight


class LiveTiedHead(Losses):
    """Cuts the head by not training it, which a tied table undoes."""

    def student_head(self, head_weight: Tensor, embedding_weight: Tensor) -> Tensor:
        return head_weight if head_weight is embedding_weight else head_weight.detach()


class LiveTarget(Losses):
    """The target state follows the prediction."""

    def target(self, hidden: Tensor) -> Tensor:
        return hidden


class LiveTeacher(Losses):
    """The teacher follows the student."""

    def teacher_state(self, hidden: Tensor) -> Tensor:
        return hidden


class DetachedSource(Losses):
    """Does not train the trunk."""

    def source(self, hidden: Tensor) -> Tensor:
        return hidden.detach()


class DetachedEmbeddings(Losses):
    """Does not train the embeddings that the dynamics read."""

    def lookup(self, embedding_weight: Tensor, tokens: Tensor) -> Tensor:
        return embedding_weight.detach()[tokens]


class DetachedRolledStates(Losses):
    """Cuts the rollout after each step."""

    def carried(self, state: Tensor) -> Tensor:
        return state if state.is_leaf else state.detach()


class FrozenDynamics(Losses):
    """Differentiates the rollout by its inputs only."""

    def step(self, dynamics: Callable[[Tensor, Tensor], Tensor], state: Tensor, embeddings: Tensor, i: int) -> Tensor:
        fed = embeddings[:, i:]
        moved = [x.detach().requires_grad_() for x in (state, fed)]
        if moved[0].numel() == 0:
            return dynamics(state, fed)
        out = dynamics(*moved)
        return _InputsOnly.apply(out.detach(), out, moved[0], moved[1], state, fed)


class _InputsOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, graph: Tensor, state: Tensor, fed: Tensor, *live: Tensor) -> Tensor:
        ctx.inner = graph, state, fed
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        graph, state, fed = ctx.inner
        with torch.enable_grad():
            made = torch.autograd.grad(graph, [state, fed], upstream, retain_graph=True)
        return None, None, None, None, *made


class OwnEmbedding(Losses):
    """The dynamics have a token table of their own."""

    def lookup(self, embedding_weight: Tensor, tokens: Tensor) -> Tensor:
        own = torch.linspace(-1, 1, embedding_weight.numel(), dtype=embedding_weight.dtype)
        return (own.view_as(embedding_weight) + 0 * embedding_weight)[tokens]


class StaleHead(Losses):
    """The student reads a copy of the head made at the first call."""

    def __init__(self) -> None:
        self.copies: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def student_head(self, head_weight: Tensor, embedding_weight: Tensor) -> Tensor:
        return self.copies.setdefault((head_weight.shape, head_weight.dtype), head_weight.detach().clone())


class StaleEmbedding(Losses):
    """The dynamics read a copy of the embedding table made at the first call."""

    def __init__(self) -> None:
        self.copies: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def lookup(self, embedding_weight: Tensor, tokens: Tensor) -> Tensor:
        key = embedding_weight.shape, embedding_weight.dtype
        copy = self.copies.setdefault(key, embedding_weight.detach().clone())
        return (copy + embedding_weight - embedding_weight.detach())[tokens]


class DocumentsOfFirstRow(Losses):
    """Takes the boundaries of the first row for those of all."""

    def transitions(self, ids: Tensor, i: int) -> Tensor:
        real = (ids[:, : max(ids.shape[1] - i, 0)] >= 0) & (ids[:, i:] >= 0)
        return super().transitions(ids[:1].clamp(min=0).expand_as(ids), i) & real


class SumsInLowPrecision(Losses):
    """Losses in the precision of the states."""

    def wide(self, x: Tensor) -> Tensor:
        return x


class SmoothedLabels(Losses):
    """Label smoothing, which the method does not have."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.wide(logits), labels, reduction="none", label_smoothing=0.1)


class NaiveSoftmax(Losses):
    """The logarithm of a softmax that has underflowed."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return -self.wide(logits).softmax(-1).log().gather(1, labels[:, None])[:, 0]


class NaiveKL(Losses):
    """KL by the logarithm of a softmax that has underflowed."""

    def kl(self, teacher: Tensor, student: Tensor) -> Tensor:
        p, q = self.wide(teacher).softmax(-1), self.wide(student).softmax(-1)
        return (p * (p.log() - q.log())).sum(-1)


class AlwaysFloat32(Losses):
    """Casts to float32, whatever it is given."""

    def wide(self, x: Tensor) -> Tensor:
        return x.float()
