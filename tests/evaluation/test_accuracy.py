"""Accuracy of models whose answers are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nextlat.evaluation.accuracy import accuracy
from nextlat.model.interfaces import LMOutput
from tests.evaluation.models import SURE, Oracle, Shortcut, Teacherless, Walker, path_star, subject


def first_listed(task: object, n: int) -> int:
    """How many test prompts list the right arm first."""
    prompts = task.prompts("test")  # type: ignore[attr-defined]
    edges = 3 * task.options.edges  # type: ignore[attr-defined]
    hits = 0
    for text, answer in zip(prompts.tokens.tolist()[:n], prompts.answers.tolist(), strict=False):
        firsts = [child for parent, child in zip(text[0:edges:3], text[1:edges:3], strict=True) if parent == answer[0]]
        hits += firsts[0] == answer[1]
    return hits


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (2, 6)])
def test_an_oracle_gets_everything_right(shape: tuple[int, int]) -> None:
    task = path_star(degree=shape[0], length=shape[1], nodes=14)
    metrics = accuracy(subject(task, Oracle(task)))
    for name, metric in metrics.items():
        if name not in ("basin", "branch_margin"):
            assert (metric.value, metric.n) == (1.0, 300), name
    assert metrics["basin"].value == "solved"
    assert metrics["branch_margin"].value == pytest.approx(SURE)
    assert metrics["whole_path_greedy"].chance == 1 / shape[0]


@pytest.mark.parametrize("degree", [2, 3])
def test_a_shortcut_is_right_once_in_d_and_perfect_after_the_branch(degree: int) -> None:
    """The signature of the Clever Hans failure: forced tokens look solved, the path is a guess."""
    task = path_star(degree=degree, length=3, nodes=16, test_size=1000)
    metrics = accuracy(subject(task, Shortcut(task)))
    hits = first_listed(task, 1000)
    assert metrics["whole_path_greedy"].value == hits / 1000
    low, high = metrics["whole_path_greedy"].low, metrics["whole_path_greedy"].high
    assert low is not None
    assert high is not None
    assert low < 1 / degree < high
    assert metrics["basin"].value == "shortcut"
    assert metrics["token_1"].value == metrics["forced_token_1"].value == 1.0
    assert metrics["token_2"].value == metrics["forced_token_2"].value == hits / 1000
    assert metrics["token_3"].value == hits / 1000
    assert metrics["forced_token_3"].value == 1.0
    assert metrics["forced_whole_path"].value == hits / 1000
    assert metrics["branch_margin"].value == pytest.approx(SURE * (2 * hits - 1000) / 1000)


class Undecided(Oracle):
    """Knows the way and puts a share of its belief at the branch on the other arm."""

    def __init__(self, task: object, share: float) -> None:
        super().__init__(task)  # type: ignore[arg-type]
        self.share = share

    def __call__(self, tokens: Tensor, *args: object, **options: object) -> LMOutput:
        cache = options.get("cache")
        output = super().__call__(tokens, *args, **options)  # type: ignore[arg-type]
        whole = tokens if cache is None else cache.tokens  # type: ignore[attr-defined]
        at = self.task.prompt_length - (whole.shape[1] - tokens.shape[1])
        if not 0 <= at < tokens.shape[1]:
            return output
        logits = output.logits.clone()
        for row, text in enumerate(whole.tolist()):
            edges = 3 * self.task.options.edges
            pairs = list(zip(text[0:edges:3], text[1:edges:3], strict=True))
            right = int(logits[row, at].argmax())
            other = next(child for parent, child in pairs if parent == text[edges] and child != right)
            logits[row, at] = -100.0
            logits[row, at, right] = torch.tensor(1 - self.share).log()
            logits[row, at, other] = torch.tensor(self.share).log()
        return output._replace(logits=logits)


def test_sampling_follows_the_models_belief_where_greedy_takes_the_best() -> None:
    task = path_star(test_size=2000)
    metrics = accuracy(subject(task, Undecided(task, 0.3)))
    assert metrics["whole_path_greedy"].value == 1.0
    sampled = float(metrics["whole_path_sampled"].value)
    assert abs(sampled - 0.7) < 6 * (0.21 / 2000) ** 0.5
    assert metrics["branch_margin"].value == pytest.approx(0.8473, abs=1e-3)


def test_sampling_is_repeatable_and_other_seeds_draw_otherwise() -> None:
    task = path_star(test_size=300)
    values = [accuracy(subject(task, Undecided(task, 0.3), seed=s))["whole_path_sampled"].value for s in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_the_batch_size_of_evaluation_changes_nothing() -> None:
    task = path_star(test_size=50)
    whole, parts = (accuracy(subject(task, Shortcut(task), batch_size=size)) for size in (500, 7))
    assert whole == parts


def test_examples_limits_how_many_are_looked_at() -> None:
    task = path_star()
    metrics = accuracy(subject(task, Shortcut(task), examples=30))
    assert metrics["whole_path_greedy"].n == 30
    assert metrics["whole_path_greedy"].value == first_listed(task, 30) / 30


def test_teacherless_answers_are_read_off_one_pass() -> None:
    task = path_star(variant="teacherless", test_size=50)
    model = Teacherless(task)
    model.new_cache = None  # type: ignore[assignment, method-assign]
    metrics = accuracy(subject(task, model))
    assert metrics["whole_path_greedy"].value == metrics["whole_path_sampled"].value == 1.0
    assert metrics["forced_whole_path"].value == 1.0


def test_the_split_is_passed_on() -> None:
    task = path_star(graphs="fixed", train_size=100, test_size=40)
    asked: list[str] = []
    prompts = task.prompts
    task.prompts = lambda split: (asked.append(split), prompts(split))[1]  # type: ignore[func-returns-value, method-assign]
    accuracy(subject(task, Oracle(task), split="train"))
    assert asked == ["train"]


def test_the_hand_made_models_answer_the_same_with_and_without_a_cache() -> None:
    task = path_star(test_size=5)
    model: Walker = Oracle(task)
    forced, begin = task.prompts("test").forced, task.prompt_length
    cache = model.new_cache(5, 100)
    steps = [model(forced[:, :begin], cache=cache).logits]
    steps += [model(forced[:, place : place + 1], cache=cache).logits for place in range(begin, task.sequence_length)]
    assert torch.equal(torch.cat(steps, 1), model(forced).logits)
