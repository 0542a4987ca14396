"""Prompts by domain, and what decoding them with drafts is said to gain."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nextlat.data.text import hold_out
from nextlat.data.tokenizer import byte_tokenizer
from nextlat.decoding import Sampling, Static
from nextlat.errors import NextLatError
from nextlat.evaluation.domains import LOCAL, domain_names, domain_prompts, fitting_prompts
from nextlat.evaluation.speculative import PLAIN, measure_domain, metrics, ratio
from nextlat.model.cache import Cache
from nextlat.model.interfaces import LMOutput
from nextlat.tasks.text import TextOptions
from tests.decoding.test_speculative import Oracle, prompts, trained
from tests.evaluation.texts import Stream

TASK: Any = Stream(torch.arange(400) % 7, 16, 257)
TOKENIZER = byte_tokenizer()


def test_every_local_domain_has_prompts_of_its_own_text() -> None:
    made = {
        name: domain_prompts(name, TASK, TOKENIZER, 3, 24, Path())
        for name in domain_names(TASK, TOKENIZER)
        if name not in ("held_out", "mixed")
    }
    assert list(made) == list(LOCAL)
    for texts in made.values():
        assert [len(text) for text in texts] == [24] * 3
    texts = [TOKENIZER.decode(text.tolist()) for text in made["arithmetic"]]
    assert all(set(text.strip()) <= set("0123456789+-*= \n") for text in texts)
    again = domain_prompts("arithmetic", TASK, TOKENIZER, 3, 24, Path())
    assert all(torch.equal(a, b) for a, b in zip(made["arithmetic"], again, strict=True))


def test_held_out_prompts_are_the_beginnings_of_held_out_rows() -> None:
    whole = TASK.whole().tokens
    found = domain_prompts("held_out", TASK, None, 5, 6, Path())
    assert torch.equal(torch.stack(found), whole[:5, :6])


def test_a_mix_takes_turns_among_all_kinds() -> None:
    kinds = ["held_out", *LOCAL]
    stream: Any = Stream(torch.arange(4000) % 7, 64, 257)
    found = domain_prompts("mixed", stream, TOKENIZER, 7, 24, Path())
    expected = [domain_prompts(kind, stream, TOKENIZER, 2, 24, Path()) for kind in kinds]
    assert len(found) == 7
    for place, prompt in enumerate(found):
        assert torch.equal(prompt, expected[place % 5][place // 5])


def test_decoding_is_timed_from_the_first_token_on(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, clock = trained(), [0.0]
    lm = objective.as_lm()

    class Clocked:
        """A prompt takes 100 seconds, any other call one, which packed weights halve."""

        def __init__(self, call: float) -> None:
            self.call = call

        def __call__(self, tokens: Tensor, cache: Cache | None = None, logits_at: Tensor | None = None) -> LMOutput:
            assert cache is not None
            clock[0] += self.call if cache.longest else 100
            return lm(tokens, cache=cache, logits_at=logits_at)

        def new_cache(self, rows: int, capacity: int) -> Cache:
            return lm.new_cache(rows, capacity)

    monkeypatch.setattr("nextlat.evaluation.speculative.now", lambda: clock[0])
    fast, plain = Clocked(0.5), Clocked(1.0)
    ways = {"0": partial(Static, 0), "2": partial(Static, 2)}
    arms = measure_domain(fast, objective.drafter(), list(prompts(3)), 12, Sampling(), ways, baseline=plain)  # type: ignore[arg-type]
    assert arms[PLAIN].seconds == [11.0] * 3
    assert arms["0"].seconds == [5.5] * 3
    assert sum(arms["2"].seconds) == arms["2"].statistics.rounds / 2 < 3 * 5.5
    assert all(arm.prompt_seconds == [100.0] * 3 for arm in arms.values())
    found = metrics({"x": arms}, Sampling())
    assert found["x.ratio_0"].value == 2
    assert found["x.seconds_0"].value == 16.5
    assert found["x.prompt_seconds_0"].value == 300


def test_prompts_of_a_file_come_from_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefghij" * 3, encoding="utf-8")
    found = domain_prompts(str(tmp_path), TASK, TOKENIZER, 6, 5, Path())
    text = [TOKENIZER.end_token, *b"abcdefghij" * 3]
    assert sorted(prompt.tolist() for prompt in found) == sorted(text[i : i + 5] for i in range(0, 30, 5))


def test_prompts_come_from_as_many_documents_as_there_are(tmp_path: Path) -> None:
    for number in range(32):  # every fourth is measured on
        (tmp_path / f"{number:02d}.txt").write_text(chr(97 + number) * (60 if number else 600), encoding="utf-8")
    measured = [chr(97 + number) for number in range(0, 32, 4)]

    def documents(count: int) -> list[str]:
        return [chr(prompt[-1]) for prompt in domain_prompts(str(tmp_path), TASK, TOKENIZER, count, 20, Path())]

    few, each, every = documents(5), documents(8), documents(30 + 7 * 3)
    assert len(set(few)) == 5
    assert set(few) != set(measured[:5])  # nor are they those that come first
    assert sorted(each) == measured
    assert sorted(every[:8]) == measured
    assert every.count("a") == 30


def test_what_is_fitted_to_a_domain_comes_from_other_documents_than_what_is_measured(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 24, encoding="utf-8")
    measured = domain_prompts(str(tmp_path), TASK, TOKENIZER, 6, 12, Path())
    fitted = fitting_prompts(str(tmp_path), TASK, TOKENIZER, 100, 12, Path())
    assert {chr(prompt[-1]) for prompt in measured} == set("048")
    assert {chr(prompt[-1]) for prompt in fitted} == set("123567")
    assert len(fitted) == 12  # all there are, two to a document
    assert len(fitting_prompts(str(tmp_path), TASK, TOKENIZER, 5, 12, Path())) == 5
    # the kinds are no longer in order
    assert [int(chr(prompt[-1])) for prompt in fitted] != sorted(int(chr(prompt[-1])) for prompt in fitted)
    with pytest.raises(NextLatError, match=r"has no prompt of 12 tokens beside the documents that are measured on"):
        fitting_prompts(str(tmp_path / "0.txt"), TASK, TOKENIZER, 5, 12, Path())
    for name in ("held_out", "mixed"):
        with pytest.raises(NextLatError, match=f"'{name}' is only measured on; fit to prose"):
            fitting_prompts(name, TASK, TOKENIZER, 5, 12, Path())
    with pytest.raises(NextLatError, match="no tokenizer"):
        fitting_prompts("code", TASK, None, 5, 12, Path())


def test_of_the_corpus_that_a_task_trains_on_the_held_out_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"{number:02d}" * 12 for number in range(40)]
    monkeypatch.setattr("nextlat.evaluation.domains.corpus_of", lambda domain: "python")
    monkeypatch.setattr(
        "nextlat.evaluation.domains.find_corpus", lambda name: SimpleNamespace(documents=lambda: documents)
    )
    options = TextOptions.model_construct(source="python", validation_share=0.3)
    task: Any = SimpleNamespace(options=options)
    held = {text for split, text in hold_out(documents, 0.3) if split == "validation"}
    assert 4 < len(held) < 20
    for expected, find in ((held, domain_prompts), (set(documents) - held, fitting_prompts)):
        found = find("code", task, TOKENIZER, len(expected), 25, Path())
        assert {TOKENIZER.decode(prompt.tolist()[1:]) for prompt in found} == expected


@pytest.mark.parametrize(
    ("name", "tokenizer", "count", "said"),
    [
        ("poetry", TOKENIZER, 1, "unknown domain 'poetry'; choose held_out, prose"),
        ("code", None, 1, "no tokenizer; use its own data alone"),
        ("mixed", None, 1, "no tokenizer; use its own data alone"),
        ("documentation", TOKENIZER, 10**6, "ask for no more than that"),
        ("held_out", None, 1000, "1000 prompts are asked for"),
    ],
)
def test_what_cannot_be_had_is_said(name: str, tokenizer: Any, count: int, said: str) -> None:
    with pytest.raises(NextLatError, match=said):
        domain_prompts(name, TASK, tokenizer, count, 24, Path())


def test_counts_are_those_of_all_prompts_and_texts_are_compared() -> None:
    objective = trained()
    ways = {"2": partial(Static, 2), "5": partial(Static, 5)}
    arms = measure_domain(objective.as_lm(), objective.drafter(), list(prompts(3)), 12, Sampling(), ways)
    assert list(arms) == [PLAIN, "2", "5"]
    for name, arm in arms.items():
        assert arm.statistics.tokens == 3 * 12
        assert len(arm.seconds) == len(arm.accepted) == 3
        assert arm.different == 0
        assert sum(arm.statistics.accepted) <= sum(arm.statistics.drafted)
        # 12 tokens: one from the prompt's own call, the others from rounds that keep drafts and yield one each
        assert sum(arm.statistics.accepted) + arm.statistics.rounds + 3 == 36
        assert arm.statistics.rounds == 33 or name != PLAIN
    found = metrics({"x": arms}, Sampling())
    assert found["x.different_2"].value == 0
    assert found["x.ratio_5"].value == ratio(arms, "5") == sum(arms[PLAIN].seconds) / sum(arms["5"].seconds)
    assert found["x.accepted_2"].value <= 2
    kept = [found[f"x.acceptance_2_{i}"] for i in (1, 2)]
    assert kept[0].n == arms["2"].statistics.reached[0]
    assert kept[1].n == arms["2"].statistics.accepted[0] - _cut(arms["2"])
    assert f"x.different_{PLAIN}" not in found


def _cut(arm: Any) -> int:
    """Rounds near the end in which only one token was drafted, and kept."""
    counted = arm.statistics
    return int(counted.accepted[0] - counted.reached[1])


def test_a_text_that_is_not_the_plain_one_is_counted() -> None:
    objective, other = trained(), trained(width=12)
    arms = measure_domain(
        other.as_lm(),
        other.drafter(),
        list(prompts(2)),
        12,
        Sampling(),
        {"2": partial(Static, 2)},
        (),
        objective.as_lm(),
    )
    assert arms["2"].different == 2


def test_a_perfect_drafter_is_kept_whole() -> None:
    from nextlat import generate

    objective, prompt = trained(), prompts(1)
    text = generate(objective.as_lm(), prompt, 40)

    class Again(Oracle):
        def observe(self, output: Any, accepted: Any) -> int:
            if output.hidden.shape[1] == prompt.shape[1]:
                self.seen = -1 - prompt.shape[1]
            return super().observe(output, accepted)

    drafter: Any = Again(torch.cat([prompt, text], 1), set())
    drafter.text = text[0].tolist() + [0] * 9
    arms = measure_domain(objective.as_lm(), drafter, [prompt[0]], 13, Sampling(), {"3": partial(Static, 3)})
    assert arms["3"].acceptance == [1.0, 1.0, 1.0]
    assert arms["3"].statistics.tokens_per_round == pytest.approx(12 / 3)


def test_a_model_is_not_asked_to_go_on_with_what_it_was_trained_on() -> None:
    from nextlat.data.corpora import find_corpus
    from nextlat.data.text import hold_out
    from nextlat.tasks.text import TextOptions

    task: Any = Stream(torch.arange(400) % 7, 16, 257)
    task.options = TextOptions.model_validate({"source": "pydoc", "validation_share": 0.3})
    homes = {text: split for split, text in hold_out(find_corpus("pydoc").documents(), 0.3)}

    def splits(asked: Any) -> list[set[str]]:
        found = domain_prompts("documentation", asked, TOKENIZER, 40, 64, Path())
        parts = [bytes(token for token in prompt.tolist() if token < 256).decode(errors="ignore") for prompt in found]
        return [{split for text, split in homes.items() if part in text} for part in parts]

    assert all("validation" in found for found in splits(task))
    assert not all("validation" in found for found in splits(TASK))
