"""Generation with a key-value cache, token by token or with verified drafts."""

from nextlat.decoding.adaptive import CostAware
from nextlat.decoding.costs import Costs, measure_costs
from nextlat.decoding.generate import generate
from nextlat.decoding.policies import Confidence, Entropy, Heuristic, Policy, Static
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.speculative import Statistics, decode
from nextlat.decoding.tree import Tree

__all__ = [
    "Confidence",
    "CostAware",
    "Costs",
    "Entropy",
    "Heuristic",
    "Policy",
    "Sampling",
    "Static",
    "Statistics",
    "Tree",
    "decode",
    "generate",
    "measure_costs",
]
