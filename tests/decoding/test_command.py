"""``generate --speculative``, ``evaluate RUN speculative`` and ``bench decode RUN`` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from nextlat import generate, tasks
from nextlat.cli import app
from nextlat.decoding.command import CheapDrafts, spared
from nextlat.decoding.foresight import collect
from nextlat.hf.tokenizer import task_tokenizer
from nextlat.training import acceptance
from nextlat.training.trained import load_run
from tests.hf.models import TextTask, text_config
from tests.tiny import run_whole, tiny


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in arguments])


def said(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return str(result.stdout)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained runs on Path-Star."""
    folder = tmp_path_factory.mktemp("kept")
    return {name: run_whole(tiny(name, name=name), folder) for name in ("gpt", "nextlat", "mtp", "jtp")}


@pytest.mark.parametrize("objective", ["nextlat", "mtp", "jtp"])
@pytest.mark.parametrize("speculative", ["auto", "tree", "1", "2"])
def test_drafts_do_not_change_what_is_printed(objective: str, speculative: str, kept: dict[str, Path]) -> None:
    options = (kept[objective], "--tokens", "1,2,3", "--max-new-tokens", "9")
    assert said("generate", *options, "--speculative", speculative) == said("generate", *options)


def test_auto_says_what_drafts_cost_and_what_was_kept(kept: dict[str, Path]) -> None:
    heard = call("generate", kept["nextlat"], "--tokens", "1,2", "--speculative", "auto").stderr
    assert "a draft step costs" in heard
    assert "kept by position" in heard
    assert "23 tokens in" in heard


def test_cheap_drafts_do_not_change_what_is_printed_either(kept: dict[str, Path]) -> None:
    options = ("generate", kept["nextlat"], "--tokens", "1,2,3", "--max-new-tokens", "9")
    greedy = said(*options)
    assert said(*options, "--speculative", "3", "--draft-tokens", "4", "--draft-int8") == greedy
    assert said(*options, "--speculative", "auto", "--draft-tokens", "4") == greedy
    trained = load_run(kept["nextlat"])
    drafter = trained.built.objective.drafter()
    assert drafter is not None
    assert spared(trained, drafter, CheapDrafts()) is drafter
    few = spared(trained, drafter, CheapDrafts(4))
    task, training = trained.built.task, trained.config.training
    targets = torch.cat([task.rows(step, 0, 8).targets.flatten() for step in range(6)])
    counts = targets[targets >= 0].bincount(minlength=15)
    assert (training.batch_size, training.steps, task.vocab_size) == (8, 6, 15)
    assert few.vocabulary is not None
    assert few.vocabulary.tolist() == sorted(counts.sort(descending=True, stable=True).indices[:4].tolist())


def test_the_seed_decides_what_is_drawn(kept: dict[str, Path]) -> None:
    options = ("generate", kept["nextlat"], "--tokens", "1,2", "--temperature", "5")
    texts = [said(*options, "--seed", str(seed)) for seed in (3, 3, 4, 0)]
    assert texts[0] == texts[1] != texts[2]
    assert said(*options) == texts[3]
    assert said("generate", kept["nextlat"], "--tokens", "1,2", "--seed", "3") == said(
        "generate", kept["nextlat"], "--tokens", "1,2"
    )


def test_a_text_ends_before_its_end_token_and_is_printed_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.TASKS, "text", TextTask)
    run = run_whole(text_config("training.steps=3"), tmp_path / "runs")
    trained = load_run(run)
    tokenizer = task_tokenizer(trained.built.task)
    assert tokenizer is not None
    ids = torch.tensor([[tokenizer.end_token, *tokenizer.encode("ab")]])
    new = generate(trained.built.objective.as_lm(), ids, 20, 3.0, torch.Generator().manual_seed(7))[0].tolist()
    monkeypatch.setattr(TextTask, "end_token", new[5])
    end = new.index(new[5])
    assert end > 0
    options = ("generate", run, "--prompt", "ab", "--temperature", "3", "--max-new-tokens", "20", "--seed", "7")
    assert said(*options) == tokenizer.decode(new[:end]) + "\n"
    assert said(*options, "--speculative", "0") == tokenizer.decode(new[:end]) + "\n"
    assert "--prompt is empty" in str(call("generate", run, "--prompt", "").exception)


def test_truncated_sampling_is_what_it_says(kept: dict[str, Path]) -> None:
    options = ("generate", kept["nextlat"], "--tokens", "1,2", "--max-new-tokens", "12")
    greedy = said(*options)
    assert said(*options, "--temperature", "1", "--top-k", "1") == greedy
    assert said(*options, "--temperature", "1", "--top-p", "1e-9") == greedy
    assert said(*options, "--temperature", "1", "--top-k", "1", "--speculative", "2") == greedy
    assert said(*options, "--temperature", "5") != greedy
    heard = call(*options, "--top-p", "0.5")
    assert heard.stdout == greedy
    assert "--top-k and --top-p change nothing" in heard.stderr


@pytest.mark.parametrize(
    ("objective", "arguments", "part"),
    [
        ("gpt", ("--speculative", "2"), "which drafts nothing; decode it without --speculative"),
        ("nextlat", ("--speculative", "fast"), "choose off, auto, tree, or how many tokens"),
        ("nextlat", ("--speculative", "-1"), "draft length is -1"),
        ("mtp", ("--speculative", "3"), "this drafter makes at most 2; ask for less"),
        ("nextlat", ("--top-p", "0"), "top_p is 0"),
        ("nextlat", ("--max-new-tokens", "24"), "2 tokens and 24 new ones do not fit a context of 25"),
        ("nextlat", ("--checkpoint", "last"), "choose newest or best"),
        ("nextlat", ("--draft-int8",), "say how to draft; add --speculative auto"),
        ("nextlat", ("--speculative", "2", "--draft-tokens", "99"), "a draft vocabulary of 99 tokens is asked for"),
    ],
)
def test_what_cannot_be_drafted_is_refused(
    objective: str, arguments: tuple[str, ...], part: str, kept: dict[str, Path]
) -> None:
    assert part in str(call("generate", kept[objective], "--tokens", "1,2", *arguments).exception)


def test_a_survey_of_a_task_without_text(kept: dict[str, Path]) -> None:
    out = said("evaluate", kept["nextlat"], "speculative", "--prompts", "3")
    assert "held_out, 21 prompt tokens" in out
    assert "4 new tokens" in out
    assert "0 of 30 texts differ from plain decoding" in out  # 8 lengths, a tree and the adaptive one, 3 prompts each
    written = json.loads((kept["nextlat"] / "evaluations" / "speculative.json").read_text(encoding="utf-8"))
    found = written["metrics"]
    assert found["held_out.different_adaptive"]["value"] == 0
    for way in ("2", "10", "tree", "adaptive"):
        drafted = found[f"held_out.drafted_{way}"]["value"]
        assert 0 <= found[f"held_out.accepted_{way}"]["value"] <= drafted
        assert 1 <= found[f"held_out.tokens_per_round_{way}"]["value"] <= 1 + drafted
    setting = written["setting"]
    assert [setting[key] for key in ("temperature", "prompt_tokens", "new_tokens", "prompts")] == [0.0, 21, 4, 3]
    assert setting["draft_cost"] > 0
    said("evaluate", kept["nextlat"], "speculative", "--prompts", "1", "--temperature", "0.5", "--draft-tokens", "3")
    folder = kept["nextlat"] / "evaluations"
    warm = json.loads((folder / "speculative-temperature-0.5.json").read_text(encoding="utf-8"))
    assert warm["setting"]["draft_tokens"] == 3
    assert json.loads((folder / "speculative.json").read_text(encoding="utf-8")) == written
    assert found["held_out.drafted_0"]["value"] == 0
    assert found["held_out.tokens_per_round_0"]["value"] == 1
    long = ("evaluate", kept["nextlat"], "speculative", "--max-new-tokens")
    assert "prompts of 21 tokens and 5 new ones do not fit the 25" in str(call(*long, "5").exception)
    assert "prompts of 12 tokens and 14 new ones do not fit" in str(call(*long, "14").exception)
    assert "no drafter" not in out
    assert "which drafts nothing" in str(call("evaluate", kept["gpt"], "speculative").exception)
    assert "--domains belongs to speculative" in str(call("evaluate", kept["gpt"], "--domains", "code").exception)
    assert "--draft-int8 belongs to speculative" in str(call("evaluate", kept["gpt"], "--draft-int8").exception)
    unheard = call("evaluate", kept["nextlat"], "speculative", "--split", "train")
    assert "--split says nothing to speculative; leave it out" in str(unheard.exception)


def test_a_survey_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "text", TextTask)
    options = ("objective.horizon=1", "objective.dynamics.hidden_dim=16")
    run = run_whole(text_config(*options, "training.steps=3"), tmp_path / "runs")
    options = ("--prompts", "2", "--prompt-tokens", "6", "--max-new-tokens", "5")
    out = said("evaluate", run, "speculative", "--domains", "arithmetic,code", *options, "--temperature", "1")
    assert "arithmetic, 6 prompt tokens" in out
    assert "code, 6 prompt tokens" in out
    assert "differ" not in out


def test_a_head_is_fitted_to_the_training_data_and_to_other_kinds_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[torch.Tensor, int]]] = []

    def watched(lm: Any, drafter: Any, prompts: Any, *rest: Any) -> Any:
        seen.append(prompts)
        return collect(lm, drafter, prompts, *rest)

    monkeypatch.setitem(tasks.TASKS, "text", TextTask)
    monkeypatch.setattr(acceptance, "collect", watched)
    run = run_whole(text_config("training.steps=3"), tmp_path / "runs")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text(f"{number}" * 60, encoding="utf-8")
    out = said("fit-acceptance", run, "--domains", f"{corpus}, arithmetic", "--prompts", "12", "--steps", "2")
    assert "measured on" in out
    kinds = [chr(prompt[-1]) if prompt[-1] < 256 else "end" for prompt, _ in seen[0]]
    mine = [place for place, kind in enumerate(kinds) if kind in "123567" and len(set(seen[0][place][0].tolist())) < 3]
    assert len(kinds) == 12
    assert len(mine) == 4
    assert min(mine) < 4 < max(mine)  # in no order, so that all kinds are fitted to and measured on
    assert {(len(prompt), new) for prompt, new in seen[0]} == {(12, 12)}
    assert acceptance.acceptance_head(load_run(run), 0.0).length == 16
    assert "'held_out' is only measured on" in str(call("fit-acceptance", run, "--domains", "held_out").exception)


def test_runs_are_set_against_each_other(kept: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    out = said("bench", "decode", kept["nextlat"], kept["mtp"], kept["jtp"], "--tiny", "--json", file)
    for figure in (
        "tokens/s: nextlat / mtp",
        "tokens/s: nextlat / jtp",
        "adaptive / best fixed length: geometric mean",
        "temperature 1, text held_out",
        "plain / adaptive",
        "share of the bound reached",
        "acceptance from which drafts pay",
        "7 of 15 tokens / all tokens",
        "int8 / all tokens",
    ):
        assert figure in out
    figures = json.loads(file.read_text(encoding="utf-8"))["results"]["decode"]
    assert {figure["setting"]["temperature"] for figure in figures} == {"0", "1"}
    assert "runs are measured by decode alone" in str(call("bench", "loss", kept["mtp"]).exception)
