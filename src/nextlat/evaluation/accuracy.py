"""Answers to the task's prompts: greedy, sampled and teacher-forced, scored by the task."""

from __future__ import annotations

import torch

from nextlat.decoding import generate
from nextlat.decoding.sampling import Sampling, draw
from nextlat.evaluation.subject import Subject
from nextlat.statistics import Metric
from nextlat.tasks.base import Outputs


@torch.no_grad()
def accuracy(subject: Subject) -> dict[str, Metric]:
    """Generate greedily and by sampling at temperature 1, run the true answers through, and let the task score.

    Raises:
        NextLatError: the task has no prompts.
    """
    task = subject.need_prompted()
    prompts = subject.prompts()
    length = prompts.answers.shape[1]
    draws = torch.Generator().manual_seed(subject.seed)
    greedy, sampled, forced = [], [], []
    for start in range(0, len(prompts.tokens), subject.batch_size):
        rows = slice(start, start + subject.batch_size)
        logits = subject.lm(prompts.forced[rows].to(subject.device)).logits[:, -length - 1 : -1].float()
        forced.append(logits.cpu())
        if prompts.parallel:  # the forced input holds no answer, so one pass is the generation
            greedy.append(logits.argmax(-1).cpu())
            law = Sampling(1.0).law(logits.flatten(0, 1))
            coins = torch.rand(len(law), generator=draws, dtype=torch.float64)
            sampled.append(draw(law, coins).view(-1, length).cpu())
        else:
            tokens = prompts.tokens[rows].to(subject.device)
            greedy.append(generate(subject.lm, tokens, length).cpu())
            sampled.append(generate(subject.lm, tokens, length, 1.0, draws).cpu())
    return task.score(Outputs(torch.cat(greedy), torch.cat(sampled), torch.cat(forced), prompts))
