"""The measurements, by name. A new one is a file and a line here."""

from collections.abc import Callable

from nextlat.errors import unknown
from nextlat.evaluation.accuracy import accuracy
from nextlat.evaluation.health import health
from nextlat.evaluation.rank import rank
from nextlat.evaluation.rollout import rollout
from nextlat.evaluation.subject import Subject
from nextlat.statistics import Metric

EVALUATIONS: dict[str, Callable[[Subject], dict[str, Metric]]] = {
    "accuracy": accuracy,
    "health": health,
    "rank": rank,
    "rollout": rollout,
}


def find_evaluation(name: str) -> Callable[[Subject], dict[str, Metric]]:
    """The measurement of a name."""
    if name not in EVALUATIONS:
        raise unknown("evaluation", name, EVALUATIONS)
    return EVALUATIONS[name]


__all__ = ["EVALUATIONS", "Metric", "Subject", "find_evaluation"]
