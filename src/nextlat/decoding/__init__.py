"""Generation with a key-value cache."""

from nextlat.decoding.generate import generate

__all__ = ["generate"]
