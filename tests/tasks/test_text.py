"""Tasks of text: tokenised once, rows by number, documents kept apart, stories laid out with what is known of them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextlat.batch import IGNORE
from nextlat.config import load_config, validate
from nextlat.data.synthstories import FACTS, SLOTS, stories
from nextlat.errors import NextLatError
from nextlat.evaluation import find_evaluation, headline, merit
from nextlat.evaluation.cross_entropy import cross_entropy, pooled
from nextlat.statistics import Metric
from nextlat.tasks import PathStar, Prompted, Task, Textual, find_task
from nextlat.tasks.path_star import PathStarOptions
from nextlat.tasks.text import FineWebEdu, TextOptions, TinyStories
from nextlat.training.build import build, check
from tests.evaluation.models import subject
from tests.evaluation.texts import States, constant

pytest.importorskip("tokenizers")

SMALL = {"source": "stories", "length": 96, "vocab_size": 600, "stories": 120, "validation_stories": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def task(folder: Path, seed: int = 0, **options: Any) -> TinyStories:
    return TinyStories(TextOptions(**(SMALL | {"folder": str(folder)} | options)), seed, 8)


def test_a_task_of_text_is_one_of_text_and_asks_for_no_answers(folder: Path) -> None:
    text, star = task(folder), PathStar(PathStarOptions(nodes=20, test_size=10, graphs="fresh"), 0, 4)
    assert isinstance(text, Task) and isinstance(text, Textual) and not isinstance(text, Prompted)
    assert isinstance(star, Task) and isinstance(star, Prompted) and not isinstance(star, Textual)
    assert find_task("tiny_stories") is TinyStories
    assert find_task("fineweb_edu") is FineWebEdu


def test_an_epoch_shows_every_chunk_of_the_training_stories_once(folder: Path) -> None:
    text = task(folder)
    count = text.shards.tokens("train") // 96
    batch = text.rows(0, 0, count)
    assert count > 100
    assert len({tuple(row) for row in batch.tokens.tolist()}) == count
    training = "\n".join(story.text for story in stories(0, 40, 160))
    for row in batch.tokens.tolist():
        assert all(part.strip() in training for part in text.tokenizer.decode(row).split("<|eos|>"))
    assert next(stories(0, 0, 1)).text not in training


def test_rows_are_a_function_of_seed_step_and_row(folder: Path) -> None:
    one, again, other = task(folder), task(folder), task(folder, seed=1)
    assert torch.equal(one.rows(3, 0, 8).tokens[2:5], again.rows(3, 2, 5).tokens)
    assert torch.equal(one.rows(3, 2, 5).documents, again.rows(3, 2, 5).documents)  # type: ignore[arg-type]
    assert not torch.equal(one.rows(3, 0, 8).tokens, other.rows(3, 0, 8).tokens)
    assert one.shards.folder == other.shards.folder


def test_targets_are_the_next_tokens_and_documents_open_with_the_end_token(folder: Path) -> None:
    batch = task(folder).rows(0, 0, 8)
    assert batch.documents is not None
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    opens = batch.tokens[:, 1:] == 1
    assert torch.equal(batch.documents[:, 1:] != batch.documents[:, :-1], opens)
    assert opens.any()


def test_evaluation_reads_the_held_out_stories_in_order(folder: Path) -> None:
    text = task(folder)
    rows = torch.cat([batch.tokens for batch in text.evaluation("validation")])
    told = text.tokenizer.decode(rows.flatten().tolist())
    first = next(stories(0, 0, 1)).text
    assert told.removeprefix("<|eos|>").strip().startswith(first)
    assert len(rows) == text.shards.tokens("validation") // 96
    few = task(folder, validation_rows=7)
    assert sum(len(batch.tokens) for batch in few.evaluation("validation")) == 7
    assert sum(len(batch.tokens) for batch in text.evaluation("train")) == len(rows)


def test_stories_are_laid_out_with_the_slot_of_each_token_their_facts_and_costs(folder: Path) -> None:
    text = task(folder, length=256)
    passages = text.passages("validation", 12)
    assert passages.facts.tolist() == [list(story.facts) for story in stories(0, 0, 12)]
    for row, story in enumerate(stories(0, 0, 12)):
        tokens = passages.batch.tokens[row]
        whole = text.tokenizer.encode(story.text)
        assert tokens[0] == 1
        assert tokens[1 : len(whole) + 1].tolist() == whole
        assert passages.batch.targets[row, len(whole)] == 1
        assert (passages.batch.targets[row, len(whole) + 1 :] == IGNORE).all()
        assert passages.batch.documents is not None
        assert (passages.batch.documents[row] == 0).sum() == len(whole) + 1
        for place, (begin, end) in enumerate(story.spans):
            here = passages.slots[row] == place
            assert text.tokenizer.decode(tokens[here].tolist()).strip() == story.text[begin:end]
            assert passages.ends[row, place] == here.nonzero().max()
        assert passages.nats[row].tolist() == list(story.nats)


def test_a_short_row_ends_a_story_where_it_ends(folder: Path) -> None:
    whole, cut = (task(folder, length=length).passages("train", 9) for length in (256, 96))
    assert torch.equal(cut.batch.tokens, whole.batch.tokens[:, :96])
    assert torch.equal(cut.batch.targets, whole.batch.targets[:, :96])
    assert torch.equal(cut.slots, whole.slots[:, :96])
    assert torch.equal(cut.ends, torch.where(whole.ends < 96, whole.ends, -1))
    assert (cut.ends[:, SLOTS.index("closing")] == -1).all()
    assert cut.facts.tolist() == [list(story.facts) for story in stories(0, 40, 49)]


def test_the_object_is_named_again_60_tokens_later(folder: Path) -> None:
    text = task(folder, length=256)
    passages = text.passages("validation", 40)
    begins = passages.ends[:, SLOTS.index("helper")] + 1
    assert (begins - passages.ends[:, SLOTS.index("object")] >= 50).all()
    for row, story in enumerate(stories(0, 0, 40)):
        thing = text.tokenizer.encode(FACTS["object"][story.facts[3]])
        tokens = passages.batch.tokens[row].tolist()
        places = [t for t in range(len(tokens)) if tokens[t : t + len(thing)] == thing]
        assert len(places) == 2
        assert places[1] - places[0] - len(thing) >= 60


def test_tokens_are_made_once_and_found_again(tmp_path: Path) -> None:
    first = task(tmp_path)
    assert not first.ready
    before = first.description()
    made = {path: path.stat().st_mtime_ns for path in sorted(first.place.iterdir())}
    again = task(tmp_path, seed=5, length=64)
    assert again.ready and again.place == first.place
    assert again.description() == before
    assert {path: path.stat().st_mtime_ns for path in sorted(first.place.iterdir())} == made
    assert task(tmp_path, vocab_size=500).place != first.place
    assert task(tmp_path, stories=121).place != first.place
    assert [path.name for path in tmp_path.iterdir()] == [first.place.name]


def _make(folder: str, gate: Any, found: Any) -> None:
    gate.wait()
    found.put(task(Path(folder)).description())


def test_two_processes_that_start_at_once_make_the_tokens_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, found = context.Barrier(2), context.Queue()
    both = [context.Process(target=_make, args=(str(tmp_path), gate, found)) for _ in range(2)]
    for process in both:
        process.start()
    results = [found.get(timeout=300) for _ in both]
    for process in both:
        process.join()
    assert results[0] == results[1]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_made_again(tmp_path: Path) -> None:
    text = task(tmp_path)
    left = text.place.with_name(f".{text.place.name}.1234")
    left.mkdir(parents=True)
    (left / "train-000000.bin").write_bytes(b"half")
    assert text.description()["train_tokens"] > 0
    assert [path.name for path in tmp_path.iterdir()] == [text.place.name]


def test_local_text_is_held_out_by_document_and_loses_no_byte(tmp_path: Path) -> None:
    options = TextOptions(source="pydoc", length=64, vocab_size=400, validation_share=0.2, folder=str(tmp_path))
    text = TinyStories(options, 0, 4)
    rows = torch.cat([batch.tokens for batch in text.evaluation("validation")])
    from pydoc_data.topics import topics

    told = text.tokenizer.decode(rows.flatten().tolist()).split("<|eos|>")[1:-1]
    assert len(told) > 1
    assert all(part.removeprefix(" ") in topics.values() for part in told)
    assert text.slots == () and text.facts == {}
    with pytest.raises(NextLatError, match=r"facts of pydoc; use data\.source=stories"):
        text.passages("train", 1)


def test_bytes_are_a_vocabulary_of_257(tmp_path: Path) -> None:
    text = task(tmp_path, vocab_size=257, length=200)
    assert text.end_token == 256
    row = text.passages("validation", 1).batch.tokens[0]
    assert row[0] == 256
    assert bytes(row[1:].tolist()).decode() == next(stories(0, 0, 1)).text[:199]


def test_a_missing_folder_names_the_command_and_one_with_other_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    options = {"source": str(tmp_path / "none"), "vocab_size": 1000, "end_token": 1}
    with pytest.raises(NextLatError, match=r"make them with `nextlat data tiny_stories --out .*none`"):
        TinyStories(TextOptions(**options), 0, 4).rows(0, 0, 1)
    with pytest.raises(NextLatError, match=r"`nextlat data fineweb_edu --out"):
        FineWebEdu(TextOptions(**options), 0, 4).rows(0, 0, 1)
    there = task(folder).shards.folder
    with pytest.raises(NextLatError, match=r"data\.vocab_size is 1000 and .* has 600; set data\.vocab_size=600"):
        TinyStories(TextOptions(**(options | {"source": str(there)})), 0, 4).rows(0, 0, 1)
    given = TinyStories(TextOptions(source=str(there), vocab_size=600, end_token=1, length=96), 0, 8)
    assert torch.equal(given.rows(2, 0, 8).tokens, task(folder).rows(2, 0, 8).tokens)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "storys"}, "is a folder of tokens; set data.end_token"),
        ({"source": "stories", "end_token": 1}, "is tokenised here, leave data.end_token out"),
        ({"source": "data/x", "end_token": 1000}, "it must be below data.vocab_size = 1000"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(NextLatError, match=said):
        validate(TextOptions, options, "data")


def test_cross_entropy_is_a_mean_over_tokens_whose_rows_are_independent() -> None:
    sums, counts = torch.tensor([2.0, 9.0, 0.0]), torch.tensor([2, 3, 0])
    found = pooled(sums, counts)
    assert found.value == pytest.approx(11 / 5)
    spread = np.sqrt(2 * ((2 - 2.2 * 2) ** 2 + (9 - 2.2 * 3) ** 2)) / 5
    assert found.high == pytest.approx(2.2 + 1.959964 * spread)
    assert found.n == 5
    assert pooled(sums[:1], counts[:1]) == Metric(1.0, n=2)


def test_a_uniform_model_is_worth_the_vocabulary_and_pays_more_than_the_floor(folder: Path) -> None:
    text = task(folder, length=160)
    looked = subject(text, States(constant, 600), split="validation", batch_size=7)
    metrics = cross_entropy(looked)
    assert metrics["ce"].value == pytest.approx(np.log(600), rel=1e-6)
    assert metrics["perplexity"].value == pytest.approx(600, rel=1e-5)
    count = sum(int((batch.targets != IGNORE).sum()) for batch in text.evaluation("validation"))
    assert metrics["ce"].n == count
    size = sum(text.bytes_of(batch.targets.flatten()) for batch in text.evaluation("validation"))
    assert metrics["bits_per_byte"].value == pytest.approx(np.log2(600) * count / size, rel=1e-3)
    passages = text.passages("validation", 40)
    for name, wordings in (("resolution", 5), ("moral", 4)):
        whole = passages.ends[:, SLOTS.index(name)] >= 0
        tokens = int((passages.slots[whole] == SLOTS.index(name)).sum())
        assert metrics[f"ce_{name}"].n == tokens > 0
        assert metrics[f"ce_{name}"].value == pytest.approx(np.log(600), rel=1e-6)
        assert metrics[f"floor_{name}"].value == pytest.approx(int(whole.sum()) * np.log(wordings) / tokens)
    assert headline(looked) == metrics
    assert merit("cross_entropy", metrics) == pytest.approx(-np.log(600))
    assert merit("accuracy", {"first": Metric(0.4), "second": Metric(0.9)}) == 0.4


def test_measurements_that_do_not_fit_a_task_say_which_do(folder: Path) -> None:
    looked = subject(task(folder), States(constant, 600), split="validation")
    with pytest.raises(NextLatError, match=r"no prompts to answer; measure cross_entropy"):
        find_evaluation("accuracy")(looked)
    star = subject(PathStar(PathStarOptions(nodes=20, test_size=10, graphs="fresh"), 0, 4), States(constant, 25))
    for name in ("cross_entropy", "probes"):
        with pytest.raises(NextLatError, match=r"not running text.*measure accuracy"):
            find_evaluation(name)(star)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "evaluation.after=[accuracy]",
            r"asks for accuracy, which is not for tiny_stories; set evaluation\.after=\[cross",
        ),
        ("evaluation.split=test", r"tiny_stories has no split 'test'; choose validation or train"),
    ],
)
def test_what_the_first_evaluation_would_stumble_over_is_refused_at_the_door(
    override: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny_stories/mini", [override])
    with pytest.raises(NextLatError, match=said):
        check(config, build(config))
    assert list(tmp_path.iterdir()) == []


def test_a_stand_in_has_the_shape_of_rows_and_needs_no_data(tmp_path: Path) -> None:
    text = task(tmp_path)
    batch = text.stand_in(3)
    assert batch.tokens.shape == batch.targets.shape == (3, 96)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert list(tmp_path.iterdir()) == []
