"""Text that is on most machines already: real documents for tests and small studies, without a download."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from nextlat.errors import NextLatError, unknown

FORTUNES = Path("/usr/share/games/fortunes")
LICENCES = Path("/usr/share/common-licenses")
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


class Corpus(NamedTuple):
    """A named source of documents."""

    documents: Callable[[], Iterator[str]]
    version: str
    """What its documents depend on."""
    holds: str


def python_source(folder: Path | None = None) -> Iterator[str]:
    """The modules of Python's standard library, one document each, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    for path in sorted(root.rglob("*.py")):
        if NOT_SOURCE.isdisjoint(path.relative_to(root).parts):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a few modules show that other encodings work
                continue


def pydoc_topics() -> Iterator[str]:
    """The pages of Python's ``help()``: technical prose."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise NextLatError("this Python has no pydoc_data.topics; use the corpus python instead") from error
    for name in sorted(topics):
        yield topics[name]


def licences(folder: Path = LICENCES) -> Iterator[str]:
    """Common licences as Debian installs them."""
    paths = [path for path in sorted(_listed(folder, "base-files")) if path.is_file() and not path.is_symlink()]
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="replace")


def fortunes(folder: Path = FORTUNES) -> Iterator[str]:
    """Debian's fortunes: many short texts of mixed licence and taste, for local use."""
    for path in sorted(_listed(folder, "fortunes")):
        if path.is_file() and path.suffix not in (".dat", ".u8"):
            for text in path.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
                if text.strip("%\n "):
                    yield text.strip("\n")


def _listed(folder: Path, package: str) -> list[Path]:
    if not folder.is_dir():
        raise NextLatError(f"there is no {folder}; install it (Debian: apt install {package}) or choose another corpus")
    return list(folder.iterdir())


CORPORA = {
    "python": Corpus(python_source, platform.python_version(), "Python's standard library, source"),
    "pydoc": Corpus(pydoc_topics, platform.python_version(), "Python's help pages"),
    "licences": Corpus(licences, "", "common licences"),
    "fortunes": Corpus(fortunes, "", "Debian fortunes"),
}
"""Every corpus by name."""


def find_corpus(name: str) -> Corpus:
    """A corpus by its name."""
    if name not in CORPORA:
        raise unknown("corpus", name, CORPORA)
    return CORPORA[name]
