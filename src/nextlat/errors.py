"""Errors that a user can act on."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(value: str, names: Iterable[str]) -> str | None:
    """The name a user most likely meant: swapped letters first, then the most similar."""
    names = list(names)
    swapped = [name for name in names if sorted(name) == sorted(value)]
    return next(iter(swapped or get_close_matches(value, names, n=1, cutoff=0.5)), None)


class NextLatError(Exception):
    """What was wrong, the value, the limit and the fix. The command line prints it without a traceback."""


def unknown(what: str, value: str, known: Iterable[str]) -> NextLatError:
    """The error for a name that does not exist, with the nearest that does."""
    names = sorted(known)
    near = nearest(value, names)
    hint = f"; did you mean {near!r}?" if near else ""
    return NextLatError(f"unknown {what} {value!r}{hint} (known: {', '.join(names)})")
