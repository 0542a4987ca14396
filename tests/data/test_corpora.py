"""Corpora that are on the machine: what they hold, and what is said where they are not."""

from __future__ import annotations

import ast
from itertools import islice
from pathlib import Path

import pytest

from nextlat.data import corpora
from nextlat.data.corpora import find_corpus, fortunes, licences, pydoc_topics, python_source
from nextlat.errors import NextLatError


def test_the_standard_library_is_python_and_without_tests() -> None:
    documents = list(islice(python_source(), 60))
    assert len(documents) == 60
    for document in documents:
        ast.parse(document)


def test_tests_and_installed_packages_are_left_out(tmp_path: Path) -> None:
    for place in (
        "b.py",
        "a.py",
        "json/tests/x.py",
        "test/y.py",
        "site-packages/z.py",
        "lib/__pycache__/w.py",
        "n.txt",
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(place)
    (tmp_path / "c.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9")
    assert list(python_source(tmp_path)) == ["a.py", "b.py"]


def test_help_pages_are_prose() -> None:
    pages = list(pydoc_topics())
    assert len(pages) > 50 and sum(map(len, pages)) > 300_000
    assert pages == list(pydoc_topics())


def test_fortunes_are_divided_by_percent_signs(tmp_path: Path) -> None:
    (tmp_path / "wise").write_text("one\n\t-- A\n%\ntwo\n%\n%\n")
    (tmp_path / "wise.dat").write_bytes(b"\0\1")
    (tmp_path / "wise.u8").write_text("again")
    assert list(fortunes(tmp_path)) == ["one\n\t-- A", "two"]


def test_a_licence_under_two_names_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "GPL-3").write_text("text")
    (tmp_path / "GPL").symlink_to("GPL-3")
    assert list(licences(tmp_path)) == ["text"]


def test_a_corpus_that_is_not_there_is_named_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match="apt install fortunes"):
        list(fortunes(tmp_path / "none"))
    with pytest.raises(NextLatError, match="did you mean 'pydoc'"):
        find_corpus("pydocs")
    assert set(corpora.CORPORA) == {"python", "pydoc", "licences", "fortunes"}
