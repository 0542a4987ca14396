"""The command line, called in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from nextlat.cli import app


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in arguments])


def run(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output
