"""Writing files so that a crash leaves either the old content or the new."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextlat.errors import NextLatError


@contextmanager
def explained(doing: str, place: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into an error that names the place and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NextLatError(f"the disk is full while {doing} {place}; free some space and resume") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise NextLatError(
                f"{doing} {place} is not permitted ({error.strerror}); choose another folder, e.g. with --runs-dir"
            ) from error
        raise NextLatError(f"{doing} {place} failed: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Make a folder if it is not there, and hold its lock; ``wait`` for another process that does, or refuse."""
    with explained("making", folder):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with explained("locking", folder):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise NextLatError(
                    f"another process is writing to {folder}; wait until it is done, or choose another folder"
                ) from None
        yield
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's content at once."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained("writing", path):
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a file by JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=True) + "\n")
