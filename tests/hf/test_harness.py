"""lm-eval on our models: known answers score 1, and the numbers are those of lm-eval's own Hugging Face adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nextlat import NextLatError, tasks
from nextlat.cli import app
from nextlat.data.tokenizer import byte_tokenizer
from nextlat.hf import export_run, run_harness
from nextlat.hf.adapter import TokenCache
from nextlat.hf.harness import ACCURACIES, PAPER_TASKS, find_tasks, paper_average, split_tasks, to_metrics
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.statistics import Metric
from tests.hf.models import TextTask, text_config
from tests.tiny import run_whole

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


class Successor:
    """After every byte expects the next one in ASCII, with probability close to 1; anything else alike."""

    def __call__(self, tokens: torch.Tensor, *rest: Any, cache: Any = None, **options: Any) -> LMOutput:
        logits = torch.nn.functional.one_hot((tokens + 1) % 257, 257).float() * 30
        return LMOutput(states_at(logits, options.get("logits_at")), logits)

    def new_cache(self, rows: int, capacity: int) -> TokenCache:
        return TokenCache(torch.zeros(rows, capacity, dtype=torch.int64))


def write(folder: Path, name: str, template: str, lines: list[dict[str, Any]]) -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(template.format(name=name, file=file), encoding="utf-8")
    return folder / f"{name}.yaml"


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached in the test's folder, and nothing is fetched."""
    pytest.importorskip("lm_eval", reason='needs pip install "nextlat[harness]"')
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def successor_lm() -> Any:
    from nextlat.hf.lm_adapter import HarnessLM

    return HarnessLM(Successor(), byte_tokenizer(), 24, 3, torch.device("cpu"))  # type: ignore[arg-type]


QUESTIONS = [
    {"question": "a", "choices": ["bcd", "cb"], "label": 0},
    {"question": "xyz01", "choices": ["4", "234", "9999"], "label": 1},
    {"question": "m" * 40 + "n", "choices": ["p", "o"], "label": 1},
    {"question": "C", "choices": ["B", "DEFG"], "label": 1},
]


def test_a_model_that_prefers_the_right_answer_scores_one(tmp_path: Path) -> None:
    file = write(tmp_path, "letters", CHOICE, QUESTIONS)
    found = run_harness(successor_lm(), [str(file)])
    assert found["letters.acc"].value == found["letters.acc_norm"].value == 1.0
    assert found["letters.acc"].n == 4
    wrong = [{**line, "label": (line["label"] + 1) % 2} for line in QUESTIONS]  # type: ignore[operator]
    file = write(tmp_path, "wrong", CHOICE, wrong)
    half = write(tmp_path, "half", CHOICE, [*QUESTIONS, *wrong])
    found = run_harness(successor_lm(), [str(file), str(half)])
    assert found["wrong.acc"].value == 0.0
    middle = found["half.acc"]
    assert middle.value == 0.5
    error = 0.5 / math.sqrt(7)  # standard deviation of 8 halves with n - 1, over sqrt(8)
    assert middle.low is not None
    assert math.isclose(middle.low, 0.5 - 1.959964 * error, rel_tol=1e-5)


def test_texts_are_scored_in_windows_that_cover_every_token_once(tmp_path: Path) -> None:
    alphabet = "".join(chr(code) for code in range(40, 110))  # three windows of 24 tokens
    file = write(tmp_path, "prose", PROSE, [{"text": alphabet}])
    found = run_harness(successor_lm(), [str(file)])
    right = 30 - math.log(math.exp(30) + 256)
    # the end token (256) stands first, and what it expects is token 0: one miss
    nats = 69 * right + (0 - math.log(math.exp(30) + 256))
    assert math.isclose(float(found["prose.bits_per_byte"].value), -nats / math.log(2) / 70, rel_tol=1e-6)


def test_generation_stops_before_the_stop_text(tmp_path: Path) -> None:
    lines = [
        {"question": "a", "answer": "bcdefghi"},
        {"question": "c", "answer": "defghijk"},
        {"question": "\x1d", "answer": "\x1e\x1f "},
        {"question": "seven", "answer": "opqrstuv"},
        {"question": "m" * 40 + "w", "answer": "xyz{|}~\x7f"},
        {"question": "\x1b\x1c", "answer": "\x1d\x1e\x1f "},
    ]  # two batches of three, of prompts of different lengths
    file = write(tmp_path, "written", WRITTEN, lines)
    assert run_harness(successor_lm(), [str(file)])["written.exact_match"].value == 1.0


@pytest.fixture
def text_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(tasks.TASKS, "text", TextTask)

    def made(objective: str, *overrides: str) -> Path:
        return run_whole(text_config(f"objective={objective}", "training.steps=20", *overrides), tmp_path / objective)

    return made


def test_our_numbers_are_those_of_the_harness_own_adapter_on_the_export(tmp_path: Path, text_run: Any) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's own adapter needs pip install accelerate")
    from lm_eval.models.huggingface import HFLM

    run = text_run("gpt", "training.learning_rate=0.01")
    lines = [{"question": "the cat", "choices": [" sat", " mat", "ö"], "label": 0}, *QUESTIONS]
    files = [
        write(tmp_path, "letters", CHOICE, lines),
        write(tmp_path, "prose", PROSE, [{"text": "the cat sat on the mat. " * 3}, {"text": "so"}]),
        write(tmp_path, "written", WRITTEN, [{"question": "the c", "answer": "at sat o"}]),
    ]
    names = [str(file) for file in files]
    result = CliRunner().invoke(app, ["evaluate", str(run), "harness", "--tasks", ",".join(names)])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    content = json.loads((run / "evaluations/harness.json").read_text(encoding="utf-8"))
    assert content["step"] == 20
    assert content["harness"]["limit"] is None
    ours = content["metrics"]
    assert "letters.acc_norm" in result.output
    export_run(run, tmp_path / "out")
    theirs = run_harness(HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=2), names)
    assert ours.keys() == theirs.keys()
    for name, metric in theirs.items():
        assert math.isclose(ours[name]["value"], float(metric.value), rel_tol=1e-4, abs_tol=1e-6), name


@pytest.mark.parametrize(
    ("objective", "options"),
    [("jtp", ["objective.horizon=2"]), ("bst", ["objective.pair_fraction=0.5"])],
)
def test_objectives_that_no_stock_llama_computes_run_too(
    objective: str, options: list[str], tmp_path: Path, text_run: Any
) -> None:
    file = write(tmp_path, "letters", CHOICE, QUESTIONS)
    run = text_run(objective, *options)
    result = CliRunner().invoke(app, ["evaluate", str(run), "harness", "--tasks", str(file), "--limit", "2"])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    content = json.loads((run / "evaluations/harness.json").read_text(encoding="utf-8"))
    assert content["metrics"]["letters.acc"]["n"] == 2


def test_a_folder_of_tasks_is_all_of_them(tmp_path: Path) -> None:
    write(tmp_path, "one", CHOICE, QUESTIONS)
    write(tmp_path, "two", CHOICE, QUESTIONS)
    assert find_tasks([str(tmp_path)]) == (["one", "two"], [tmp_path])


@pytest.fixture(scope="module")
def everything() -> Any:
    """The index of all tasks that lm-eval brings, which takes seconds to make."""
    return pytest.importorskip("lm_eval.tasks").TaskManager()


def test_the_papers_group_is_its_nine_tasks_and_lm_eval_knows_them(everything: Any) -> None:
    assert split_tasks("sciq, nextlat_paper") == ["sciq", *(name for name in PAPER_TASKS if name != "sciq")]
    assert len(PAPER_TASKS) == 9
    assert set(PAPER_TASKS) <= set(everything.all_tasks)
    with pytest.raises(NextLatError, match="harness needs --tasks"):
        split_tasks(None)


def test_tasks_and_data_that_are_not_there_are_errors_that_say_what_to_do(
    everything: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: everything)
    with pytest.raises(NextLatError, match="Hugging Face hub, online or in its cache"):
        run_harness(successor_lm(), ["sciq"])
    with pytest.raises(NextLatError, match="no task 'sciqq'"):
        run_harness(successor_lm(), ["sciqq"])
    with pytest.raises(NextLatError, match=r"no task file .*absent\.yaml"):
        run_harness(successor_lm(), [str(tmp_path / "absent.yaml")])


def test_the_average_is_the_mean_of_eight_accuracies() -> None:
    rows = {
        name: {"acc,none": 0.1 * i, "acc_stderr,none": 0.02, "acc_norm,none": 0.1 * i + 0.05} for i, name in
        enumerate(ACCURACIES)
    }  # fmt: skip
    for row in rows.values():
        row["acc_norm_stderr,none"] = 0.02
    metrics = paper_average(to_metrics(rows, {name: {"effective": 100} for name in ACCURACIES}))
    average = metrics["nextlat_paper.average"]
    assert math.isclose(float(average.value), 0.35)
    assert average.low is not None
    del rows["sciq"]
    assert "nextlat_paper.average" not in paper_average(to_metrics(rows, {}))
    assert metrics["piqa.acc"] == Metric(0.1, 0.1 - 1.959963984540054 * 0.02, 0.1 + 1.959963984540054 * 0.02, 100)


def test_tasks_without_text_are_refused(tmp_path: Path) -> None:
    from tests.tiny import tiny

    run = run_whole(tiny("gpt"), tmp_path)
    result = CliRunner().invoke(app, ["evaluate", str(run), "harness", "--tasks", "sciq"])
    assert "which is not text" in str(result.exception)
    result = CliRunner().invoke(app, ["evaluate", str(run), "--tasks", "sciq"])
    assert "--tasks belongs to harness" in str(result.exception)
