"""Commands in processes of their own, forked from a server that has torch loaded already."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["nextlat.commands", "nextlat.training.trained", "torch._dynamo"])


def _command(arguments: Sequence[str], log: Path, file_size: int | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    from nextlat.cli import main

    sys.argv = ["nextlat", *arguments]
    main()


def launch(arguments: Sequence[str], log: Path, file_size: int | None = None) -> BaseProcess:
    """Start ``nextlat ARGUMENTS``; output goes to a file.

    Args:
        arguments: of the command.
        log: receives stdout and stderr.
        file_size: no file may grow beyond so many bytes, as on a disk that is full.
    """
    process = _SERVER.Process(target=_command, args=(list(arguments), log, file_size))
    process.start()
    return process


def wait_until(true: Callable[[], bool], process: BaseProcess) -> None:
    """Wait for something that a process will do; fails if it ends without."""
    while not true():
        assert process.is_alive(), f"the process ended with {process.exitcode}"
        time.sleep(0.005)
