"""How far the latent dynamics can replace the transformer: roll it on true tokens and compare."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nextlat.evaluation.subject import Subject
from nextlat.objectives.nextlat import roll
from nextlat.objectives.positions import token_positions, transitions
from nextlat.statistics import Metric, mean_interval, proportion

STEPS = 4


@torch.no_grad()
def rollout(subject: Subject) -> dict[str, Metric]:
    """Error of states rolled k steps on the true tokens, without another call of the transformer.

    k goes up to 4, or to the horizon of the objective if that is longer; steps that no document is long enough for
    are left out, and so are errors where all states are the same.

    ``transition_error_k`` is the squared error over the variance of the true states (1 is a guess of the mean);
    ``kl_k`` the divergence in nats from the transformer's next-token distribution to the rolled state's, where a
    token is asked for; ``agreement_k`` how often both find the same token most likely. Both are left out for
    models whose next-token law is not a matrix times the state (jtp, bst). The intervals of means treat
    positions as independent.
    """
    dynamics = subject.need_dynamics()
    length = subject.task.sequence_length
    steps = range(1, min(max(STEPS, subject.horizon), length - 1) + 1)
    errors: dict[int, list[torch.Tensor]] = {step: [] for step in steps}
    divergence: dict[int, list[torch.Tensor]] = {step: [] for step in steps}
    agree: dict[int, list[torch.Tensor]] = {step: [] for step in steps}
    states = []
    for batch in subject.batches():
        output = subject.lm(batch.tokens, batch.documents)
        hidden, teacher = output.hidden.float(), output.logits.float().log_softmax(-1)
        real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.documents is None else batch.documents >= 0
        states.append(hidden[real])
        embeddings = F.embedding(batch.tokens, subject.embedding_weight)
        for step, rolled in enumerate(roll(dynamics, hidden, embeddings, len(steps)), start=1):
            rows, width = batch.tokens.shape
            allowed = transitions(batch.documents, step, rows, width, hidden.device)
            errors[step].append((rolled - hidden[:, step:])[allowed].square().sum(-1))
            if subject.head_weight is None:
                continue
            asked = token_positions(batch, step)
            student = F.linear(rolled[asked], subject.head_weight).float().log_softmax(-1)
            truth = teacher[:, step:][asked]
            divergence[step].append((truth.exp() * (truth - student)).sum(-1))
            agree[step].append(truth.argmax(-1) == student.argmax(-1))
    variance = torch.cat(states).double().var(0, unbiased=False).sum()
    metrics: dict[str, Metric] = {}
    for step in steps:
        error = torch.cat(errors[step]).double()
        if len(error) and variance > 0:
            metrics[f"transition_error_{step}"] = mean_interval((error / variance).cpu().numpy())
        if not any(len(part) for part in agree[step]):
            continue
        same = torch.cat(agree[step])
        metrics[f"kl_{step}"] = mean_interval(torch.cat(divergence[step]).double().cpu().numpy())
        metrics[f"agreement_{step}"] = Metric(*proportion(int(same.sum()), same.numel()))
    return metrics
