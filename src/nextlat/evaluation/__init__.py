"""The measurements, by name. A new one is a file and a line here."""

from collections.abc import Callable, Mapping

from nextlat.errors import unknown
from nextlat.evaluation.accuracy import accuracy
from nextlat.evaluation.cross_entropy import cross_entropy
from nextlat.evaluation.health import health
from nextlat.evaluation.probes import probes
from nextlat.evaluation.rank import rank
from nextlat.evaluation.rollout import rollout
from nextlat.evaluation.subject import Subject
from nextlat.statistics import Metric

EVALUATIONS: dict[str, Callable[[Subject], dict[str, Metric]]] = {
    "accuracy": accuracy,
    "cross_entropy": cross_entropy,
    "health": health,
    "probes": probes,
    "rank": rank,
    "rollout": rollout,
}
LOWER_IS_BETTER = ("cross_entropy",)


def find_evaluation(name: str) -> Callable[[Subject], dict[str, Metric]]:
    """The measurement of a name."""
    if name not in EVALUATIONS:
        raise unknown("evaluation", name, EVALUATIONS)
    return EVALUATIONS[name]


def headline(subject: Subject) -> dict[str, Metric]:
    """The evaluation that the task is followed by while training."""
    return find_evaluation(subject.task.headline)(subject)


def merit(evaluation: str, metrics: Mapping[str, Metric]) -> float:
    """A headline evaluation as one number of which more is better: its first metric, or minus it."""
    value = float(next(iter(metrics.values())).value)
    return -value if evaluation in LOWER_IS_BETTER else value


__all__ = ["EVALUATIONS", "Metric", "Subject", "find_evaluation", "headline", "merit"]
