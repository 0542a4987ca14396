"""The model card of an exported run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from nextlat.hf.parity import TOLERANCE, Parity
from nextlat.hf.tokenizer import task_tokenizer
from nextlat.training.trained import Trained


def model_card(trained: Trained, facts: Mapping[str, Any], parity: Parity) -> str:
    """Markdown: what the model is, how to load it, its numbers, where they come from, and what is not claimed.

    Args:
        trained: the run.
        facts: the export's record of it.
        parity: differences of logits between the run and the folder.
    """
    tokenizer = task_tokenizer(trained.built.task) is not None
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            *(["pipeline_tag: text-generation"] if trained.built.task.next_token else []),
            f"tags: [nextlat, {trained.config.objective}, {trained.config.task}]",
            "---",
            "",
            f"# {trained.config.name}",
            "",
            *_what(trained, tokenizer),
            "",
            "## Load",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if tokenizer else ""),
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH")',
            *(_SPEAK if tokenizer else []),
            "```",
            "",
            _checked(trained, facts["dtype"], parity),
            "",
            *_dynamics(trained),
            "## Measured",
            "",
            *(["Measured in float32, before the weights were rounded.", ""] if facts["dtype"] != "float32" else []),
            *_numbers(facts["evaluations"]),
            "",
            "## Trained",
            "",
            *_origin(trained, facts["environment"]),
            "",
            "```yaml",
            yaml.safe_dump(_shown(facts["config"]), sort_keys=False).rstrip(),
            "```",
            "",
            "## Not claimed",
            "",
            *_limits(trained),
            "",
        ]
    )


_SPEAK = [
    'tokenizer = AutoTokenizer.from_pretrained("PATH")',
    'inputs = tokenizer(tokenizer.bos_token + "Once", return_tensors="pt")  # a text begins with the end token',
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
]


def _what(trained: Trained, tokenizer: bool) -> list[str]:
    task, name = trained.built.task, trained.config.objective
    text = (
        f"A decoder of the Llama architecture, trained on `{trained.config.task}` with the objective `{name}` by "
        "the [nextlat](https://arxiv.org/abs/2511.05963) library. It is a stock `LlamaForCausalLM`: no code of "
        "the library is needed to run it."
    )
    lines = [
        text,
        "",
        f"* `max_position_embeddings` is {task.sequence_length}: the longest row it was trained on. Positions are "
        "rotary, so longer inputs run, but nothing was learned about them.",
    ]
    if name == "mtp":
        lines.append("* This is the plain model; the heads for further tokens are not in this folder.")
    if not task.next_token:
        lines.append("* The output at each position is a label for that position, not the next token: it cannot write.")
    if tokenizer:
        lines.append("* Texts begin with the end token, which also ends them; `generate` stops at it.")
    else:
        lines.append(
            f"* There is no tokenizer: the task's tokens are bare ids, 0 to {task.vocab_size - 1}"
            + ("." if task.end_token is None else f"; {task.end_token} ends an answer.")
        )
    return lines


def _checked(trained: Trained, dtype: str, parity: Parity) -> str:
    run = "the run" if dtype == "float32" else f"the run with weights rounded to {dtype}"
    text = (
        f"Weights are {dtype}. Before this folder was put in its place, its logits, computed by transformers in fp32, "
        f"were compared with those of {run}: they differ by at most {parity.single:.2g}"
    )
    if parity.double is not None:
        text += (
            f". That is how fp32 rounds logits of this size; with both models in float64, they differ by at most "
            f"{parity.double:.2g}, within the limit of {TOLERANCE:g}"
        )
    greedy = ". Greedy continuations are the same." if trained.built.task.next_token else "."
    return text + greedy


def _dynamics(trained: Trained) -> list[str]:
    objective = trained.built.objective
    if objective.latent_dynamics() is None:
        return []
    return [
        "The latent dynamics that was trained beside the model lies in `nextlat_dynamics.safetensors`, described by "
        "`nextlat_dynamics.json`. It is used for drafting and for measurements only, and `nextlat.hf.load_dynamics` "
        "reads it; the model does not need it.",
        "",
    ]


def _numbers(evaluations: dict[str, Any]) -> list[str]:
    rows = [
        f"| {file} | {name} | {_number(found['value'])} | {_interval(found)} | {_number(found.get('chance'))} | "
        f"{found.get('n') or ''} |"
        for file, content in evaluations.items()
        if content.get("harness", {}).get("limit") is None  # a trial on some examples is no measurement of the model
        for name, found in content["metrics"].items()
    ]
    if not rows:
        return ["Nothing was measured at this step."]
    return ["| evaluation | metric | value | 95 % interval | chance | n |", "|---|---|---|---|---|---|", *rows]


def _number(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _interval(metric: dict[str, Any]) -> str:
    return "" if metric.get("low") is None else f"{metric['low']:.4g} to {metric['high']:.4g}"


def _origin(trained: Trained, environment: dict[str, Any]) -> list[str]:
    which = "best" if trained.best else "newest"
    facts = {
        "seed": trained.config.seed,
        "optimiser steps": f"{trained.step:,} ({which} checkpoint; {trained.config.training.steps:,} configured)",
        "configuration hash": trained.config.hash(),
        "library": environment.get("nextlat"),
        "commit": environment.get("commit"),
        "torch": environment.get("torch"),
        "hardware": environment.get("hardware"),
        "started": environment.get("started"),
    }
    return [f"* {name}: {value}" for name, value in facts.items() if value is not None]


def _shown(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the options of objectives that were not used."""
    used = {config["objective"]: config["objectives"][config["objective"]]}
    return {key: used if key == "objectives" else value for key, value in config.items() if key != "sweep"}


def _limits(trained: Trained) -> list[str]:
    lines = [
        "* The numbers are of one seed and one task; runs with other seeds may differ by far more than the intervals, "
        "which cover the held-out examples only.",
        "* It was trained to study an objective. It is not fit for use on people's questions.",
    ]
    if trained.config.objective == "nextlat":
        lines += [
            "* Next-latent prediction is not claimed to give a better perplexity; in its paper the perplexity is "
            "slightly worse than that of plain next-token training.",
            "* Drafting with the latent dynamics is not claimed to be faster on your hardware: that depends on the "
            "batch, the device and how large the dynamics is beside the model.",
        ]
    return lines
