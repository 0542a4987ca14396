"""The page about the claims says what the code says, and its example is what the command prints."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nextlat.cli import app
from nextlat.conformance import KINDS

PAGE = (Path(__file__).parents[2] / "docs/conformance.md").read_text(encoding="utf-8")


def test_the_page_lists_every_claim_with_its_sentence() -> None:
    listed = re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \|$", PAGE[PAGE.index("## The claims") :], re.MULTILINE)
    claims = [(claim.name, claim.sentence.replace("|", "\\|")) for kind in KINDS.values() for claim in kind.claims]
    assert listed == claims


def test_the_adapter_passes_and_the_example_output_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, plain = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (example,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    (command,) = re.findall(r"`nextlat (conformance [^`]* --only tied-head)` prints", PAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def run(source: str, line: str) -> tuple[int, str]:
        Path("my_module.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "my_module", raising=False)
        result = CliRunner().invoke(app, shlex.split(line))
        sys.modules.pop("my_module", None)
        return result.exit_code, result.output

    for source in (adapter, plain):
        code, said = run(source, "conformance my_module:my_losses")
        assert code == 0, said
    means = plain.replace("*others) * count", "*others)")
    assert means != plain
    assert "this is a mean; return the sum and the count" in run(means, "conformance my_module:my_losses")[1]
    live = adapter.replace("dynamics, horizon)", "dynamics, horizon, stop_head=False)")
    assert live != adapter
    code, said = run(live, command)
    assert code == 1

    def shape(text: str) -> str:
        return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", text)

    assert shape(said) == shape(example)
