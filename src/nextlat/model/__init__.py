"""The trunk, its attention and cache, and the interfaces the rest of the house sees."""

from nextlat.model.cache import Cache
from nextlat.model.interfaces import CausalLM, Drafter, LMOutput
from nextlat.model.trunk import Transformer

__all__ = ["Cache", "CausalLM", "Drafter", "LMOutput", "Transformer"]
