"""Tasks of lm-eval written into a test's folder, and models that answer them in a known way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nextlat.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from nextlat.hf.adapter import TokenCache
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.options import Options
from tests.hf.models import TextTask

CHOICE = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
PROSE = """task: prose
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
WRITTEN = """task: written
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["!"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""


LAST = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{last}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
  - metric: acc
"""
END = 256
QUESTIONS: list[dict[str, Any]] = [
    {"question": "a", "choices": ["bcd", "cb"], "label": 0},
    {"question": "xyz01", "choices": ["4", "234", "9999"], "label": 1},
    {"question": "m" * 40 + "n", "choices": ["p", "o"], "label": 1},
    {"question": "C", "choices": ["B", "DEFG"], "label": 1},
]


def bpe() -> Tokenizer:
    """Merges whole words, drops what is not ASCII."""
    return train_bpe(["the cat sat on the mat. there the dog sat there once upon a time. "] * 4, 160)


class BpeTask(TextTask):
    """Sentences in the tokens of :func:`bpe`."""

    vocab_size, end_token = 160, 1

    def __init__(self, options: Options | None = None, seed: int = 0, batch_size: int = 8) -> None:
        super().__init__(options, seed, batch_size)
        self.tokenizer = bpe()
        told = [1, *self.tokenizer.encode("the cat sat on the mat. there the dog sat. " * 3)]
        self.stream = torch.tensor((told * (1000 // len(told) + 1))[:1000])


class Successor:
    """After every byte expects the next one in ASCII, with probability close to 1; anything else alike.

    Args:
        instead: tokens that are followed by others than the next.
    """

    def __init__(self, instead: Mapping[int, int] | None = None) -> None:
        self.next = torch.arange(1, 258) % 257
        for token, other in (instead or {}).items():
            self.next[token] = other
        self.rows: list[tuple[int, int]] = []

    def __call__(self, tokens: torch.Tensor, *rest: Any, cache: Any = None, **options: Any) -> LMOutput:
        self.rows.append((tokens.shape[0], tokens.shape[1]))
        logits = torch.nn.functional.one_hot(self.next[tokens], 257).float() * 30
        return LMOutput(states_at(logits, options.get("logits_at")), logits)

    def new_cache(self, rows: int, capacity: int) -> TokenCache:
        return TokenCache(torch.zeros(rows, capacity, dtype=torch.int64))


class Summing:
    """Expects what depends on all tokens so far."""

    def __init__(self, vocab_size: int) -> None:
        g = torch.Generator().manual_seed(3)
        self.embedding = torch.randn(vocab_size, 16, generator=g)
        self.head = torch.randn(16, vocab_size, generator=g)

    def __call__(self, tokens: torch.Tensor, *rest: Any, **options: Any) -> LMOutput:
        states = self.embedding[tokens].cumsum(1).sin()
        return LMOutput(states @ self.head, states)


def harness_lm(model: Any, tokenizer: Tokenizer | None = None, longest: int = 24, batch_size: int = 3) -> Any:
    from nextlat.hf.lm_adapter import HarnessLM

    return HarnessLM(model, tokenizer or byte_tokenizer(), longest, batch_size, torch.device("cpu"))


def requests(kind: Any, *arguments: tuple[Any, ...], task: str = "t") -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, place, (task, place, 1)) for place, one in enumerate(arguments)]


def write(folder: Path, name: str, template: str, lines: list[dict[str, Any]]) -> Path:
    """A task file and its data."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(template.format(name=name, file=file), encoding="utf-8")
    return folder / f"{name}.yaml"
