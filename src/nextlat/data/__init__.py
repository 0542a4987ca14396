"""From documents to batches: tokenizers, token shards, packing.

Public names are loaded when they are first used, so that the
processes that tokenise text do not import torch.
"""

from typing import TYPE_CHECKING

from nextlat.lazy import lazy_names

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
    "Documents": "nextlat.data.packing",
    "Plan": "nextlat.data.packing",
    "ShardedTokens": "nextlat.data.shards",
    "TokenRows": "nextlat.data.rows",
    "Tokenizer": "nextlat.data.tokenizer",
    "best_fit": "nextlat.data.packing",
    "collect": "nextlat.data.packing",
    "fixed_stride": "nextlat.data.packing",
    "load_tokenizer": "nextlat.data.tokenizer",
    "pack": "nextlat.data.packing",
    "packed_rows": "nextlat.data.packing",
    "train_bpe": "nextlat.data.tokenizer",
    "write_shards": "nextlat.data.shards",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
