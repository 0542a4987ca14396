"""Generation with a key-value cache, token by token or with verified drafts."""

from nextlat.decoding.generate import generate
from nextlat.decoding.policies import Confidence, Entropy, Policy, Static
from nextlat.decoding.sampling import Sampling
from nextlat.decoding.speculative import Statistics, decode

__all__ = ["Confidence", "Entropy", "Policy", "Sampling", "Static", "Statistics", "decode", "generate"]
