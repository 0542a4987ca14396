"""What README and docs say can be typed, works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from examples import own_model
from typer.testing import CliRunner

from nextlat.cli import app
from nextlat.config import packaged

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*PAGES, *sorted((ROOT / "src/nextlat/configs").rglob("*.yaml"))]


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:nextlat|make) [^`]+)`", page.read_text(encoding="utf-8"))
    return [line for line in [*lines, *inline] if line.startswith(("nextlat ", "make "))]


COMMANDS = sorted({line for page in PAGES for line in shell_lines(page)})


def test_the_readme_names_commands_to_check() -> None:
    assert "make demo" in COMMANDS
    assert any(line.startswith("nextlat sweep path_star/mini objective=gpt,nextlat seed=0..9") for line in COMMANDS)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_that_are_named_exist(line: str) -> None:
    target = shlex.split(line)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(("nextlat train p", "nextlat sweep"))])
def test_training_commands_that_are_named_resolve(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    result = CliRunner().invoke(app, [*words, *([] if "--dry-run" in words else ["--dry-run"])])
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("nextlat ")])
def test_named_commands_and_their_options_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    groups = {group.typer_instance.info.name for group in app.registered_groups if group.typer_instance is not None}
    result = CliRunner().invoke(app, [*words[: 2 if words[0] in groups else 1], "--help"])
    assert result.exit_code == 0, f"{line}: {result.output}"
    for option in (word for word in words if word.startswith("--")):
        assert option in result.output, f"{line}: {option}"


def test_pages_link_only_to_files_that_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_configuration_says_command_hardware_and_expected_number() -> None:
    for label, file in packaged().items():
        head = file.read_text(encoding="utf-8").split("task:")[0]
        for word in ("Command:", "Hardware:", "Time:", "Expected:"):
            assert word in head, f"{label} lacks {word}"


def test_the_example_learns_and_leaves_a_plain_model() -> None:
    assert own_model.main(steps=150) > 0.95
