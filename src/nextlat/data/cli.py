"""``nextlat data``: its arguments. What the commands do is imported when they run, so that help is instant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from nextlat.errors import NextLatError

data_app = typer.Typer(
    name="data", help="Make and check folders of tokens to train on.", no_args_is_help=True, rich_markup_mode=None
)

Out = Annotated[Optional[Path], typer.Option(help="Folder to write; default data/<name>.")]  # noqa: UP045
TokenizerOption = Annotated[
    str, typer.Option("--tokenizer", help="A tokenizer.json, train:N, gpt2:PATH (encoder.json, vocab.bpe) or bytes.")
]
Workers = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Processes that tokenise; default as many as processors, 8 at most."),
]
MaxTokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Stop with the document that makes this many tokens."),
]
ShardTokens = Annotated[int, typer.Option(min=1, help="A shard ends with the document that fills it.")]
Validation = Annotated[float, typer.Option(min=0, max=0.99, help="Part of the documents held out, by their hash.")]
EndToken = Annotated[Optional[str], typer.Option(help="Name of the end token of a tokenizer.json.")]  # noqa: UP045
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of the data set; a commit pins it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be fetched, from where and how much.")]


def _workers(asked: int | None) -> int:
    return asked or min(8, os.cpu_count() or 1)


@data_app.command()
def text(
    sources: Annotated[list[Path], typer.Argument(help="Text, .jsonl, .parquet (text also .gz) files, or folders.")],
    out: Out = None,
    tokenizer: TokenizerOption = "train:1000",
    per_line: Annotated[bool, typer.Option("--per-line", help="A document a line, instead of a file.")] = False,
    separator: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help=r"Regular expression between the documents of a file, e.g. '\n%\n'."),
    ] = None,
    column: Annotated[str, typer.Option(help="Where .jsonl and .parquet hold the text.")] = "text",
    encoding: Annotated[str, typer.Option(help="Of text and .jsonl files.")] = "utf-8",
    validation_fraction: Validation = 0.05,
    validation_shard: Annotated[
        bool, typer.Option("--validation-shard", help="Hold out the first shard instead.")
    ] = False,
    max_tokens: MaxTokens = None,
    shard_tokens: ShardTokens = 100_000_000,
    workers: Workers = None,
    end_token: EndToken = None,
) -> None:
    """Tokenise your own text. Run again to go on after an interruption, or to repair damaged files."""
    from nextlat.data.command import Making, text_command
    from nextlat.data.text import Reading

    making = Making(
        out or Path("data/text"), tokenizer, _workers(workers), shard_tokens, max_tokens, end_token=end_token
    )
    reading = Reading(per_line, separator, column, encoding)
    text_command(sources, making, reading, None if validation_shard else validation_fraction)


@data_app.command()
def corpus(
    name: Annotated[str, typer.Argument(help="python, pydoc, licences or fortunes: text this machine has already.")],
    out: Out = None,
    tokenizer: TokenizerOption = "train:1000",
    validation_fraction: Validation = 0.05,
    max_tokens: MaxTokens = None,
    shard_tokens: ShardTokens = 100_000_000,
    workers: Workers = None,
    end_token: EndToken = None,
) -> None:
    """Tokenise text that is on this machine; nothing is fetched."""
    from nextlat.data.command import Making, corpus_command

    folder = out or Path("data") / name
    making = Making(folder, tokenizer, _workers(workers), shard_tokens, max_tokens, end_token=end_token)
    corpus_command(name, making, validation_fraction)


@data_app.command("tiny_stories")
def tiny_stories(
    out: Out = None,
    tokenizer: TokenizerOption = "train:1000",
    max_tokens: MaxTokens = None,
    shard_tokens: ShardTokens = 100_000_000,
    workers: Workers = None,
    end_token: EndToken = None,
    revision: Revision = "main",
    dry_run: DryRun = False,
) -> None:
    """Fetch and tokenise TinyStories (GPT-4 stories in ASCII) in its own splits."""
    from nextlat.data.command import Making, tiny_stories_command

    folder = out or Path("data/tiny_stories")
    making = Making(
        folder, tokenizer, _workers(workers), shard_tokens, max_tokens, end_token=end_token, alphabet="ascii"
    )
    tiny_stories_command(making, revision, dry_run)


@data_app.command("fineweb_edu")
def fineweb_edu(
    tokenizer: Annotated[
        str, typer.Option(help="gpt2:PATH (encoder.json, vocab.bpe), a tokenizer.json, train:N, bytes.")
    ],
    out: Out = None,
    subset: Annotated[str, typer.Option(help="sample-10BT or sample-100BT.")] = "sample-10BT",
    max_tokens: MaxTokens = None,
    shard_tokens: ShardTokens = 100_000_000,
    workers: Workers = None,
    end_token: EndToken = None,
    revision: Revision = "main",
    dry_run: DryRun = False,
) -> None:
    """Fetch and tokenise FineWeb-Edu, file by file; the first shard is held out."""
    from nextlat.data.command import Making, fineweb_command

    if subset not in ("sample-10BT", "sample-100BT"):
        raise NextLatError(f"--subset is {subset!r}; choose sample-10BT or sample-100BT")
    folder = out or Path("data/fineweb_edu")
    making = Making(folder, tokenizer, _workers(workers), shard_tokens, max_tokens, end_token=end_token)
    fineweb_command(making, subset, revision, dry_run)


@data_app.command()
def check(folder: Annotated[Path, typer.Argument(help="A folder that nextlat data made.")]) -> None:
    """Read every file and compare its sha256; damaged ones are named, with the command that repairs them."""
    from nextlat.data.command import check_command

    raise SystemExit(check_command(folder))
