"""The base of every typed section of a configuration, and lists of names on a command line."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Typed, frozen and strict: an unknown key or a wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def split_names(text: str | None) -> list[str]:
    """``a, b`` as ``["a", "b"]``; nothing at all as ``[]``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
