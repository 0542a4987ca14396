"""lm-eval on our models: known answers score 1, and the numbers are those of lm-eval's own Hugging Face adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nextlat import NextLatError
from nextlat.cli import app
from nextlat.hf import export_run, run_harness
from nextlat.hf.harness import ACCURACIES, PAPER_TASKS, find_tasks, split_tasks
from nextlat.statistics import Metric, proportion
from nextlat.training.trained import load_run
from tests.hf.harness_parts import (
    CHOICE,
    LAST,
    PROSE,
    QUESTIONS,
    WRITTEN,
    BpeTask,
    Successor,
    Summing,
    bpe,
    harness_lm,
    requests,
    write,
)
from tests.hf.models import TextTask
from tests.tiny import run_whole

pytestmark = pytest.mark.usefixtures("offline")


def test_a_model_that_prefers_the_right_answer_scores_one(tmp_path: Path) -> None:
    file = write(tmp_path, "letters", CHOICE, QUESTIONS)
    lm = harness_lm(Successor())
    found = run_harness(lm, [str(file)])
    assert found["letters.acc"].value == found["letters.acc_norm"].value == 1.0
    assert found["letters.cut_contexts"] == Metric(2.0, n=9)
    assert run_harness(lm, [str(file)]) == found  # counts are of one call
    assert found["letters.acc"].n == 4
    assert found["letters.acc"].low == proportion(4, 4)[1] < 0.6  # 4 of 4 is not certain to be all
    wrong = [{**line, "label": (line["label"] + 1) % 2} for line in QUESTIONS]
    file = write(tmp_path, "wrong", CHOICE, wrong)
    half = write(tmp_path, "half", CHOICE, [*QUESTIONS, *wrong])
    found = run_harness(harness_lm(Successor()), [str(file), str(half)])
    assert found["wrong.acc"].value == 0.0
    middle = found["half.acc"]
    assert middle.value == 0.5
    assert middle.low is not None
    assert math.isclose(middle.low, proportion(4, 8)[1], rel_tol=1e-9)


def test_texts_are_scored_in_windows_that_cover_every_token_once(tmp_path: Path) -> None:
    alphabet = "".join(chr(code) for code in range(40, 110))  # three windows of 24 tokens
    file = write(tmp_path, "prose", PROSE, [{"text": alphabet}])
    found = run_harness(harness_lm(Successor()), [str(file)])
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
        {"question": "m" * 15 + "w", "answer": "xyz{|}~\x7f"},
        {"question": "\x1b\x1c", "answer": "\x1d\x1e\x1f "},
    ]  # two batches of three, of prompts of different lengths
    file = write(tmp_path, "written", WRITTEN, lines)
    assert run_harness(harness_lm(Successor()), [str(file)])["written.exact_match"].value == 1.0


@pytest.mark.parametrize("task", [TextTask, BpeTask])
def test_our_numbers_are_those_of_the_harness_own_adapter_on_the_export(
    task: Any, tmp_path: Path, text_run: Any
) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's own adapter needs pip install accelerate")
    from lm_eval.models.huggingface import HFLM

    run = text_run("gpt", "training.learning_rate=0.01", task=task)
    lines = [{"question": "the cat", "choices": [" sat", " mat on the", " dog, sat"], "label": 0}, *QUESTIONS]
    files = [
        write(tmp_path, "letters", CHOICE, lines),
        write(tmp_path, "prose", PROSE, [{"text": "the cat sat on the mat. " * 3}, {"text": "so"}]),
        write(tmp_path, "written", WRITTEN, [{"question": "the c", "answer": "at sat o"}]),
        write(
            tmp_path, "last", LAST, [{"text": "the cat sat", "last": last} for last in (" on the", " on", " dog on")]
        ),
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
    stock = HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=2)
    theirs = run_harness(stock, names)
    assert ours.keys() - {"letters.cut_contexts"} == theirs.keys()
    assert ours["last.acc"]["value"] < 1.0  # some choices are not greedy, and some of their tokens are
    for name, metric in theirs.items():
        assert math.isclose(ours[name]["value"], float(metric.value), rel_tol=1e-4, abs_tol=1e-6), name
    trained = load_run(run)
    lm = harness_lm(trained.built.objective.as_lm(), trained.built.task.tokenizer)  # type: ignore[attr-defined]
    context = lm.tok_encode("the cat sat")
    greedy = lm.tok_encode(lm.generate_until(requests("generate_until", ("the cat sat", {"max_gen_toks": 4})))[0])
    pairs: list[Any] = [(("", ""), context, greedy), (("", ""), context, [greedy[0], 99, *greedy[2:]])]
    expected = stock._loglikelihood_tokens(pairs, disable_tqdm=True)
    for (value, flag), (other, other_flag) in zip(lm._loglikelihood_tokens(pairs), expected, strict=True):
        assert math.isclose(value, other, rel_tol=1e-4)
        assert flag is bool(other_flag)


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
    content = json.loads((run / "evaluations/harness-limit-2.json").read_text(encoding="utf-8"))
    assert content["metrics"]["letters.acc"]["n"] == 2
    assert content["harness"]["limit"] == 2


def test_tasks_are_added_to_the_file_and_trials_lie_apart(tmp_path: Path, text_run: Any) -> None:
    run = text_run("gpt", task=BpeTask)
    spoken = [{"question": "the cat", "choices": [" sat", " caf\u00e9"], "label": 0}] * 3
    one, two = write(tmp_path, "one", CHOICE, spoken), write(tmp_path, "two", CHOICE, spoken)

    def evaluated(tasks: str, *options: str) -> str:
        result = CliRunner().invoke(app, ["evaluate", str(run), "harness", "--tasks", tasks, *options])
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        return result.output

    def content(name: str) -> Any:
        return json.loads((run / "evaluations" / name).read_text(encoding="utf-8"))

    output = evaluated(str(one))
    assert "one.lost_characters 3 of 69 characters" in output
    first = content("harness.json")
    assert first["metrics"]["one.lost_characters"]["value"] == 3
    evaluated(str(two), "--limit", "2")
    assert content("harness.json") == first
    assert {name.partition(".")[0] for name in content("harness-limit-2.json")["metrics"]} == {"two"}
    export_run(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "one.acc |" in card
    assert "two.acc" not in card  # two examples measure nothing
    write(tmp_path, "one", CHOICE, spoken[:2])
    evaluated(f"{one},{two}")
    both = content("harness.json")
    assert both["metrics"]["one.acc"]["n"] == 2
    assert both["metrics"]["two.acc"]["n"] == 3
    assert both["harness"]["tasks"].keys() == {"one", "two"}
    write(tmp_path, "two", CHOICE, spoken[:1])
    assert "one." not in evaluated(str(two))
    merged = content("harness.json")["metrics"]
    assert merged["one.acc"] == both["metrics"]["one.acc"]
    assert merged["two.acc"]["n"] == 1
    file = run / "evaluations" / "harness.json"
    file.write_text(json.dumps({**both, "step": 19}), encoding="utf-8")  # of an earlier checkpoint
    evaluated(str(two))
    assert content("harness.json")["harness"]["tasks"].keys() == {"two"}
    file.write_text(json.dumps({**both, "harness": {"tasks": ["one"]}}), encoding="utf-8")
    result = CliRunner().invoke(app, ["evaluate", str(run), "harness", "--tasks", str(two)])
    assert "so no task can be added to it; move it away" in str(result.exception)


def test_averages_are_of_all_tasks_in_the_file(tmp_path: Path, text_run: Any) -> None:
    run = text_run("gpt")
    files = [str(write(tmp_path, name, CHOICE, QUESTIONS)) for name in ACCURACIES]
    for some in (files[:5], files[5:]):
        result = CliRunner().invoke(app, ["evaluate", str(run), "harness", "--tasks", ",".join(some)])
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    metrics = json.loads((run / "evaluations/harness.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["nextlat_paper.average"]["value"] == metrics["sciq.acc"]["value"]
    p = metrics["sciq.acc"]["value"]
    half = 1.959963984540054 * math.sqrt(p * (1 - p) / 3 / 8)  # of four questions, eight times
    assert math.isclose(metrics["nextlat_paper.average"]["high"], min(1.0, p + half), rel_tol=1e-6)


def test_only_newest_and_best_are_checkpoints(tmp_path: Path) -> None:
    for arguments in (["harness", "--tasks", "sciq"], []):
        result = CliRunner().invoke(app, ["evaluate", str(tmp_path), *arguments, "--checkpoint", "bset"])
        assert str(result.exception) == "--checkpoint is 'bset'; choose newest or best"
    with pytest.raises(NextLatError, match="'bset'; choose newest or best"):
        load_run(tmp_path, which="bset")


def test_a_folder_of_tasks_is_all_of_them(tmp_path: Path) -> None:
    write(tmp_path, "one", CHOICE, QUESTIONS)
    write(tmp_path, "two", CHOICE, QUESTIONS)
    (tmp_path / "group.yaml").write_text("group: both\ntask:\n  - one\n  - two\n", encoding="utf-8")
    (tmp_path / "single.yaml").write_text("group: single\ntask: one\n", encoding="utf-8")
    (tmp_path / "common.yaml").write_text("test_split: test\n", encoding="utf-8")
    (tmp_path / "three.yml").write_text("task: 'my task'\n", encoding="utf-8")
    found = {"one": "one.yaml", "two": "two.yaml", "my task": "three.yml"}
    assert find_tasks([str(tmp_path), str(tmp_path / "one.yaml"), "sciq"]) == {
        "sciq": "sciq",
        **{name: str(tmp_path / file) for name, file in found.items()},
    }
    for file in ("group.yaml", "common.yaml"):
        with pytest.raises(NextLatError, match=f"{file} holds no lm-eval task.*of a group, name the files"):
            find_tasks([str(tmp_path / file)])
    (tmp_path / "broken.yaml").write_text("task: [\n", encoding="utf-8")
    with pytest.raises(NextLatError, match=r"broken\.yaml cannot be read as an lm-eval task"):
        find_tasks([str(tmp_path)])


def test_the_file_that_is_named_is_the_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "backup", "mine", CHOICE, QUESTIONS)
    file = write(tmp_path, "mine", CHOICE, QUESTIONS[:3])
    other = write(tmp_path, "sciq", CHOICE, QUESTIONS[:2])  # as one of lm-eval's own
    assert find_tasks([str(file)]) == {"mine": str(file)}
    found = run_harness(harness_lm(Successor()), [str(file), str(other)])
    assert (found["mine.acc"].n, found["sciq.acc"].n) == (3, 2)
    for twice in ([str(file), str(tmp_path / "backup")], [str(other), "sciq"]):
        with pytest.raises(NextLatError, match="is asked for twice"):
            find_tasks(twice)
    short = other.rename(tmp_path / "other.yml")
    assert run_harness(harness_lm(Successor()), [str(short)])["sciq.acc"].n == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "piqa").mkdir()
    assert find_tasks(["piqa", "other.yml"]) == {"piqa": "piqa", "sciq": str(short)}


def test_errors_in_a_task_of_ones_own_name_the_task(tmp_path: Path) -> None:
    file = write(tmp_path, "broken", CHOICE, QUESTIONS)
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "choices"\n', encoding="utf-8")
    with pytest.raises(NextLatError, match=r"tasks broken could not be run .*JSON"):
        run_harness(harness_lm(Successor()), [str(file)])
    field = write(tmp_path, "field", CHOICE.replace("{{{{question}}}}", "{{{{quest.ion}}}}"), QUESTIONS)
    with pytest.raises(NextLatError, match=r"tasks field could not be run .*'quest' is undefined"):
        run_harness(harness_lm(Successor()), [str(field)])


def test_a_refusal_of_the_adapter_is_told_as_it_is(tmp_path: Path) -> None:
    file = write(tmp_path, "merged", CHOICE, [{"question": "the", "choices": ["re", " dog"], "label": 0}])
    with pytest.raises(NextLatError, match=r"^the choice 're' shares a token with the text 'the' before it"):
        run_harness(harness_lm(Summing(160), bpe()), [str(file)])


def test_a_batch_too_large_for_the_device_says_so(tmp_path: Path) -> None:
    def full(tokens: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    file = write(tmp_path, "letters", CHOICE, QUESTIONS)
    with pytest.raises(NextLatError, match=r"no room for a batch \(2 GiB\); lower --batch-size"):
        run_harness(harness_lm(full), [str(file)])


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
        run_harness(harness_lm(Successor()), ["sciq"])
    with pytest.raises(NextLatError, match="no task 'sciqq'"):
        run_harness(harness_lm(Successor()), ["sciqq"])
    with pytest.raises(NextLatError, match=r"no task file .*absent\.yaml"):
        run_harness(harness_lm(Successor()), [str(tmp_path / "absent.yaml")])


def test_tasks_without_text_are_refused(tmp_path: Path) -> None:
    from tests.tiny import tiny

    run = run_whole(tiny("gpt"), tmp_path)
    result = CliRunner().invoke(app, ["evaluate", str(run), "harness", "--tasks", "sciq"])
    assert "which is not text" in str(result.exception)
    result = CliRunner().invoke(app, ["evaluate", str(run), "--tasks", "sciq"])
    assert "--tasks belongs to harness" in str(result.exception)
