"""From documents to batches: tokenizers, token shards, packing.

Public names are loaded when they are first used, so that the
processes that tokenise text do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextlat.data.packing import Documents as Documents
    from nextlat.data.packing import Plan as Plan
    from nextlat.data.packing import best_fit as best_fit
    from nextlat.data.packing import collect as collect
    from nextlat.data.packing import fixed_stride as fixed_stride
    from nextlat.data.packing import pack as pack
    from nextlat.data.packing import packed_rows as packed_rows
    from nextlat.data.rows import TokenRows as TokenRows
    from nextlat.data.shards import ShardedTokens as ShardedTokens
    from nextlat.data.shards import write_shards as write_shards
    from nextlat.data.tokenizer import Tokenizer as Tokenizer
    from nextlat.data.tokenizer import load_tokenizer as load_tokenizer
    from nextlat.data.tokenizer import train_bpe as train_bpe

_HOMES = {
    "Documents": "packing",
    "Plan": "packing",
    "ShardedTokens": "shards",
    "TokenRows": "rows",
    "Tokenizer": "tokenizer",
    "best_fit": "packing",
    "collect": "packing",
    "fixed_stride": "packing",
    "load_tokenizer": "tokenizer",
    "pack": "packing",
    "packed_rows": "packing",
    "train_bpe": "tokenizer",
    "write_shards": "shards",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nextlat.data' has no attribute {name!r}")
    return getattr(import_module(f"nextlat.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
