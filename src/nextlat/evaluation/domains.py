"""Prompts of different kinds of text, to see where drafts are accepted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nextlat.data.corpora import FORTUNES, find_corpus
from nextlat.data.text import Reading, find_files, hold_out, read_documents
from nextlat.data.tokenizer import Tokenizer
from nextlat.errors import NextLatError
from nextlat.tasks.base import Prompted, Task
from nextlat.tasks.text import TextOptions

DOCUMENTS = 2000
"""At most so many documents of a domain are read."""
MEASURED = 4
"""The first of every so many documents is measured on; what is fitted to a domain sees the others."""


def arithmetic() -> Iterator[str]:
    """Pages of sums, written out; the same in every run."""
    g = random.Random(0)
    signs: dict[str, Callable[[int, int], int]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
    }
    while True:
        lines = []
        for _ in range(60):
            a, b, sign = g.randrange(100), g.randrange(100), g.choice("+-*")
            lines.append(f"{a} {sign} {b} = {signs[sign](a, b)}")
        yield "\n".join(lines)


def corpus_of(domain: str) -> str | None:
    """The corpus that a local domain reads; ``None`` for sums, which are made."""
    prose = "fortunes" if FORTUNES.is_dir() else "licences"
    return {"prose": prose, "code": "python", "documentation": "pydoc"}.get(domain)


LOCAL = ("prose", "code", "documentation", "arithmetic")
"""Text that is on this machine."""
MIXED = "mixed"
"""The held-out part and :data:`LOCAL` in turn: what serves several kinds of text meets them in any order."""


class Remote(NamedTuple):
    """A dataset on the hub, of which the first file is read."""

    repository: str
    folder: str = ""
    column: str = "text"


HUB = {
    "wikipedia": Remote("wikimedia/wikipedia", "20231101.simple"),
    "books": Remote("lucadiliello/bookcorpusopen"),
    "hub_code": Remote("codeparrot/codeparrot-clean-valid", column="content"),
    "mathematics": Remote("open-web-math/open-web-math"),
}
"""Text that is fetched when it is asked for."""


def domain_names(task: Task, tokenizer: Tokenizer | None) -> list[str]:
    """The domains that a task can be measured on without a connection."""
    return ["held_out", *LOCAL, MIXED] if tokenizer is not None else ["held_out"]


def domain_prompts(
    name: str, task: Task, tokenizer: Tokenizer | None, count: int, length: int, folder: Path
) -> list[Tensor]:
    """Prompts of one domain.

    Args:
        name: ``held_out``: the task's own held-out part; one of :data:`LOCAL`, less what the model was trained on;
            ``mixed``: these in turn; one of :data:`HUB`; or a path of text.
        task: the benchmark that the model was trained on.
        tokenizer: its tokenizer, if it has one.
        count: how many prompts.
        length: their tokens; a task that asks for answers keeps its own.
        folder: where fetched files lie.

    Returns:
        (P,) int64 each, different ones.

    Raises:
        NextLatError: no such domain, too little text, or a task without text.
    """
    if name == "held_out":
        return _held_out(task, count, length)
    tokenizer = need_tokenizer(name, tokenizer)
    if name == MIXED:
        kinds = ("held_out", *LOCAL)
        each = -(-count // len(kinds))
        made = [domain_prompts(kind, task, tokenizer, each, length, folder) for kind in kinds]
        return [prompt for together in zip(*made, strict=True) for prompt in together][:count]
    found = _chosen(_texts(name, task, folder, measured=True), tokenizer, count, length)
    if len(found) < count:
        raise NextLatError(
            f"domain {name!r} has {len(found)} prompts of {length} tokens in the documents that are kept for "
            "measuring; ask for no more than that"
        )
    return found


def fitting_prompts(
    name: str, task: Task, tokenizer: Tokenizer | None, count: int, length: int, folder: Path
) -> list[Tensor]:
    """Prompts of a domain, or as many as it has, from documents of which :func:`domain_prompts` gives none.

    Raises:
        NextLatError: no such domain, one of which nothing is left, or a task without text.
    """
    if name in ("held_out", MIXED):
        raise NextLatError(f"domain {name!r} is only measured on; fit to {', '.join(LOCAL)}, or to a path of text")
    found = _chosen(_texts(name, task, folder, measured=False), need_tokenizer(name, tokenizer), count, length)
    if not found:
        raise NextLatError(
            f"domain {name!r} has no prompt of {length} tokens beside the documents that are measured on, the first of "
            f"every {MEASURED}; give text of more documents"
        )
    return found


def need_tokenizer(name: str, tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer, or an error that says why the domain cannot be had."""
    if tokenizer is None:
        raise NextLatError(f"domain {name!r} is text, and this task has no tokenizer; use its own data alone")
    return tokenizer


def _chosen(texts: Iterator[str], tokenizer: Tokenizer, count: int, length: int) -> list[Tensor]:
    """Up to ``count`` stretches of ``length`` tokens: each of another document while there are any, then of all.

    Documents are encoded as they are needed, for a corpus takes seconds and a prompt of it does not.
    """
    g, end = random.Random(0), [] if tokenizer.end_token is None else [tokenizer.end_token]
    documents = list(islice(texts, DOCUMENTS))
    g.shuffle(documents)
    chosen: list[list[int]] = []
    left: list[list[int]] = []
    for text in documents:
        if len(chosen) == count:
            break
        tokens = [*end, *tokenizer.encode(text)]
        stretches = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        if stretches:
            chosen.append(stretches.pop(g.randrange(len(stretches))))
            left += stretches
    chosen += g.sample(left, min(count - len(chosen), len(left)))
    return [torch.tensor(stretch) for stretch in chosen]


def _held_out(task: Task, count: int, length: int) -> list[Tensor]:
    if isinstance(task, Prompted):
        return list(task.prompts(task.splits[0]).tokens[:count])
    found: list[Tensor] = []
    for batch in task.evaluation(task.splits[0]):
        found += [row[:length] for row in batch.tokens[: count - len(found)]]
        if len(found) == count:
            return found
    raise NextLatError(f"the held-out part has {len(found)} rows and {count} prompts are asked for; ask for fewer")


def _texts(name: str, task: Task, folder: Path, measured: bool) -> Iterator[str]:
    """Documents to measure on, or others; of the corpus that a task trains on, its held-out part or the rest."""
    options, corpus = getattr(task, "options", None), corpus_of(name)
    if corpus is not None and isinstance(options, TextOptions) and options.source == corpus:
        parts = hold_out(find_corpus(corpus).documents(), options.validation_share)
        return (text for split, text in parts if (split == "validation") == measured)
    every = enumerate(_documents(name, folder))
    return (text for number, text in every if (number % MEASURED == 0) == measured)


def _documents(name: str, folder: Path) -> Iterator[str]:
    if name in LOCAL:
        corpus = corpus_of(name)
        return arithmetic() if corpus is None else find_corpus(corpus).documents()
    if name in HUB:
        from nextlat.data.download import download, hub_files

        remote = HUB[name]
        file = hub_files(remote.repository, folder=remote.folder)[0]
        path = download(file, folder / name / Path(file.name).name)
        return read_documents([path], Reading(column=remote.column))
    if Path(name).exists():
        return read_documents(find_files([Path(name)]))
    known = ", ".join(["held_out", *LOCAL, MIXED, *HUB])
    raise NextLatError(f"unknown domain {name!r}; choose {known}, or a file or folder of text")
