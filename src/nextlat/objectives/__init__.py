"""The training objectives, by name. A new one is a file and a line here."""

from nextlat.errors import unknown
from nextlat.objectives.base import Objective, Term, TorchModel, total_loss
from nextlat.objectives.bst import BST
from nextlat.objectives.gpt import GPT
from nextlat.objectives.jtp import JTP
from nextlat.objectives.mtp import MTP
from nextlat.objectives.nextlat import NextLat

OBJECTIVES: dict[str, type[Objective]] = {
    "gpt": GPT,
    "mtp": MTP,
    "jtp": JTP,
    "bst": BST,
    "nextlat": NextLat,
}


def find_objective(name: str) -> type[Objective]:
    """The objective class of a name."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


__all__ = [
    "BST",
    "GPT",
    "JTP",
    "MTP",
    "OBJECTIVES",
    "NextLat",
    "Objective",
    "Term",
    "TorchModel",
    "find_objective",
    "total_loss",
]
