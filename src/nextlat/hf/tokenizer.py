"""The tokenizer of a task, if it has one, in files that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

from nextlat.data.tokenizer import Tokenizer
from nextlat.files import write_json
from nextlat.tasks import Task


def task_tokenizer(task: Task) -> Tokenizer | None:
    """The task's tokenizer; ``None`` where tokens are bare ids."""
    tokenizer: Tokenizer | None = getattr(task, "tokenizer", None)  # tasks of text have one, the protocol does not ask
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; the end token opens, ends and pads, as for GPT-2."""
    tokenizer.save_portable(folder / "tokenizer.json")
    added = json.loads(tokenizer.json)["added_tokens"]
    end = next((token["content"] for token in added if token["id"] == tokenizer.end_token), None)
    special = {} if end is None else dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
            **special,
        },
    )
