"""Finding the function that a user names as ``module:function``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from nextlat.conformance.claims import Function, described, one_line
from nextlat.errors import NextLatError, nearest


@contextmanager
def current_directory_first() -> Iterator[None]:
    """Modules of the current directory can be imported, also later from inside the function."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def load_function(target: str) -> Function:
    """The function of ``module:function``, from the current directory or an installed package.

    Raises:
        NextLatError: not of that form, no such module, a module that does not import, no such function.
    """
    name, colon, attribute = target.partition(":")
    if name.endswith(".py"):
        module = name.removesuffix(".py").replace("/", ".").strip(".")
        raise NextLatError(f"{target!r} names a file; name the module: {module}:{attribute or 'FUNCTION'}")
    if not colon or not name or not attribute:
        raise NextLatError(f"{target!r} is not of the form MODULE:FUNCTION; for example my_module:my_losses")
    found: object = _load_module(name, target)
    home = getattr(found, "__file__", None)
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = nearest(part, [known for known in dir(found) if not known.startswith("_")])
            hint = f"; did you mean {near!r}?" if near else ""
            raise NextLatError(f"module {name}{f' ({home})' if home else ''} has no {attribute!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise NextLatError(f"{target} is of type {type(found).__name__}; name a function")
    return found


def _load_module(name: str, target: str) -> ModuleType:
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:  # importing runs foreign code, which may raise anything
        parents = [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 2)]
        if isinstance(error, ModuleNotFoundError) and error.name in parents:
            raise NextLatError(
                f"no module {error.name!r} for {target}: neither in {Path.cwd()} nor among the installed packages"
            ) from None
        raise NextLatError(one_line(f"importing {name} raised {described(error)}")) from error
