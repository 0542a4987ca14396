"""What a folder of token shards holds, and whether its files are as they should be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nextlat.errors import NextLatError

FORMAT = 1
MANIFEST, UNFINISHED, TOKENIZER = "manifest.json", "unfinished.json", "tokenizer.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """What one file must be."""

    file: str
    split: str
    tokens: int
    documents: int
    empty: int
    """Documents that came between and had no tokens; they are left out."""
    bytes: int
    sha256: str


class Manifest(_Record):
    """What a folder of shards holds."""

    format: Literal[1] = 1
    vocab_size: int
    end_token: int
    dtype: Literal["<u2", "<u4"]
    shard_tokens: int
    tokenizer: str | None = None
    """File name of the tokenizer, and its hash."""
    tokenizer_sha256: str | None = None
    source: dict[str, Any] = {}
    """Where the documents came from and how they were cut."""
    command: str = ""
    """Makes the folder, and repairs it: good shards are kept."""
    splits: list[str]
    shards: list[Shard]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what the shards hold."""
        keys = ("vocab_size", "end_token", "dtype", "shard_tokens", "tokenizer_sha256")
        return {**self.source, **{key: getattr(self, key) for key in keys}}

    @property
    def repair(self) -> str:
        """What to do about a damaged file."""
        return f"run again: {self.command}" if self.command else "write the folder again; good shards are kept"


def read_manifest(path: Path) -> Manifest:
    """Read ``manifest.json`` or ``unfinished.json``.

    Raises:
        NextLatError: it is no manifest of this format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            raise NextLatError(f"{path} has format {content['format']}; this version reads {FORMAT}, update nextlat")
        return Manifest.model_validate(content)
    except (ValueError, ValidationError) as error:
        raise NextLatError(f"{path} is damaged ({str(error).splitlines()[0]}); write the folder again") from error


def complaints(
    folder: Path, shards: Iterable[Shard], verify: bool, looked_at: Callable[[Shard], None] | None = None
) -> list[str]:
    """What is wrong with the files of shards."""
    wrong = []
    for shard in shards:
        wrong.append(complaint(folder, shard, verify))
        if looked_at is not None:
            looked_at(shard)
    return [found for found in wrong if found is not None]


def complaint(folder: Path, shard: Shard, verify: bool) -> str | None:
    """What is wrong with a shard's file, or ``None``. ``verify`` reads it whole and compares sha256."""
    path = folder / shard.file
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        word = "truncated" if size < shard.bytes else "too long"
        return f"{path} is {word}: it has {size:,} bytes and should have {shard.bytes:,}"
    if verify:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            return f"{path} is damaged: its sha256 is {found}, it should be {shard.sha256}"
    return None
