"""Which facts of a text can be read off the state by a linear map, and from when on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nextlat.evaluation.subject import Subject
from nextlat.statistics import Metric, proportion
from nextlat.tasks.base import Passages, Textual

TRAINING_TEXTS, HELD_OUT_TEXTS = 4000, 1000
LEAST_TEXTS = 50
"""A slot that fewer held-out rows reach to its end is left out."""
RIDGE = 1e-5
"""Penalty of the classifier, as a share of the mean variance of a state's entry; small, because objectives differ in
how unequal the variances are, and a fact may lie in a small one."""


def decodability(subject: Subject, task: Textual) -> dict[str, Metric]:
    """Accuracy of a linear classifier for each fact at the end of each slot.

    Fitted in closed form (ridge regression onto one-hot values, with a bias) on texts of the training split, scored
    on held-out ones. Chance is a guess among the values of the fact; before a fact is told it is the ceiling too,
    but for the helper, which follows from problem and place.
    """
    train = task.passages("train", TRAINING_TEXTS)
    held_out = task.passages(subject.split, min(HELD_OUT_TEXTS, subject.examples or HELD_OUT_TEXTS))
    train_states, states = states_at_ends(subject, train), states_at_ends(subject, held_out)
    metrics: dict[str, Metric] = {}
    for column, (fact, values) in enumerate(task.facts.items()):
        for place, slot in enumerate(task.slots):
            known, asked = train.ends[:, place] >= 0, held_out.ends[:, place] >= 0
            if int(asked.sum()) < LEAST_TEXTS or int(known.sum()) < LEAST_TEXTS:
                continue
            classify = ridge_classifier(train_states[known, place], train.facts[known, column], values)
            right = classify(states[asked, place]) == held_out.facts[asked, column]
            found = proportion(int(right.sum()), len(right))
            metrics[f"probe_fact_{fact}_{slot}"] = Metric(*found, chance=1 / values)
    return metrics


@torch.no_grad()
def states_at_ends(subject: Subject, passages: Passages) -> Tensor:
    """(n, S, D) the state at the last token of each slot; any state where the row does not hold it."""
    found = []
    for start in range(0, len(passages.ends), subject.batch_size):
        batch = passages.batch.rows(start, start + subject.batch_size).to(subject.device)
        states = subject.lm(batch.tokens, batch.documents).probe_state
        assert states is not None
        ends = passages.ends[start : start + subject.batch_size].clamp(min=0).to(subject.device)
        found.append(states.float().gather(1, ends[:, :, None].expand(-1, -1, states.shape[-1])).cpu())
    return torch.cat(found)


def ridge_classifier(states: Tensor, values: Tensor, count: int, ridge: float = RIDGE) -> Callable[[Tensor], Tensor]:
    """The linear classifier that is best in squares at telling one-hot values, with a penalty and a bias.

    Args:
        states: (n, D).
        values: (n,) int64 below ``count``.
        count: how many values there are.
        ridge: penalty, as a share of the mean variance of a state's entry.

    Returns:
        a function from (m, D) states to (m,) values.
    """
    x, y = states.double(), F.one_hot(values, count).double()
    middle, share = x.mean(0), y.mean(0)
    x = x - middle
    gram = x.T @ x  # (D, D)
    penalty = ridge * gram.diagonal().mean().clamp(min=1e-12)
    weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), x.T @ (y - share))

    def classify(asked: Tensor) -> Tensor:
        closest: Tensor = ((asked.double() - middle) @ weight + share).argmax(-1)
        return closest

    return classify
