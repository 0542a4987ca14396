"""Next-Latent Prediction: train, measure and decode (arXiv 2511.05963).

Public names are loaded when they are first used, so that importing the package, and printing the command's
help, does not import torch.
"""

from typing import TYPE_CHECKING

from nextlat.lazy import lazy_names

if TYPE_CHECKING:
    from nextlat.batch import IGNORE as IGNORE
    from nextlat.batch import Batch as Batch
    from nextlat.decoding import generate as generate
    from nextlat.errors import NextLatError as NextLatError
    from nextlat.model import Transformer as Transformer
    from nextlat.objectives import GPT as GPT
    from nextlat.objectives import NextLat as NextLat
    from nextlat.objectives import Objective as Objective
    from nextlat.objectives import Term as Term
    from nextlat.objectives import TorchModel as TorchModel
    from nextlat.objectives import total_loss as total_loss
    from nextlat.objectives.dynamics import LatentDynamics as LatentDynamics
    from nextlat.objectives.nextlat import nextlat_sums as nextlat_sums

_HOMES = {
    "IGNORE": "nextlat.batch",
    "Batch": "nextlat.batch",
    "GPT": "nextlat.objectives",
    "LatentDynamics": "nextlat.objectives.dynamics",
    "NextLat": "nextlat.objectives",
    "NextLatError": "nextlat.errors",
    "Objective": "nextlat.objectives",
    "Term": "nextlat.objectives",
    "TorchModel": "nextlat.objectives",
    "Transformer": "nextlat.model",
    "generate": "nextlat.decoding",
    "nextlat_sums": "nextlat.objectives.nextlat",
    "total_loss": "nextlat.objectives",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
