"""What lm-eval is told about a model: each value against one that is computed token by token, each refusal by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nextlat import NextLatError
from nextlat.hf.harness import ACCURACIES, paper_average, read_table
from nextlat.statistics import Metric, proportion
from tests.hf.harness_parts import END, Successor, Summing, bpe, harness_lm, requests

pytestmark = pytest.mark.usefixtures("offline")


def one_by_one(model: Summing, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Each token from a row of its own."""
    value, greedy = 0.0, True
    for place, token in enumerate(continuation):
        logits = model(torch.tensor([context + continuation[:place]])).logits[0, -1].double()
        value += float(logits[token] - logits.logsumexp(0))
        greedy &= int(logits.argmax()) == token
    return value, greedy


def said(model: Summing, context: list[int], count: int) -> list[int]:
    """The greedy continuation."""
    row = list(context)
    for _ in range(count):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(context) :]


def test_values_and_greedy_flags_are_those_of_single_tokens() -> None:
    model = Summing(160)
    pairs = []
    for context in ([5], [9, 8, 7, 6, 5], list(range(20, 40))):
        right = said(model, context, 3)
        pairs += [(context, [*right[:i], (right[i] + 1) % 160, *right[i + 1 :]]) for i in range(3)]
        pairs += [(context, right), (context, right[:1]), (context, [3, 4])]
    lm = harness_lm(model, bpe(), batch_size=4)
    found = lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    for pair, (value, greedy) in zip(pairs, found, strict=True):
        expected = one_by_one(model, *pair)
        assert math.isclose(value, expected[0], rel_tol=1e-5)
        assert greedy is expected[1]
    assert [greedy for _, greedy in found] == [False, False, False, True, True, False] * 3


def test_texts_are_split_as_their_tokens_are() -> None:
    model, tokenizer = Summing(160), bpe()
    lm = harness_lm(model, tokenizer)
    texts = [("the cat", " sat on the mat."), ("the cat ", "sat there"), ("", "once upon"), ("there", ", zebra")]
    for (context, continuation), (value, greedy) in zip(
        texts, lm.loglikelihood(requests("loglikelihood", *texts)), strict=True
    ):
        before = tokenizer.encode(context.rstrip())
        behind = tokenizer.encode(context + continuation)[len(before) :]
        assert len(behind) > 1
        expected = one_by_one(model, before or [tokenizer.end_token], behind)
        assert math.isclose(value, expected[0], rel_tol=1e-5)
        assert greedy is expected[1]


@pytest.mark.parametrize("context", [" ", "\n"])
def test_a_context_of_spaces_loses_no_token_of_the_choice(context: str) -> None:
    model, tokenizer = Summing(160), bpe()
    lm = harness_lm(model, tokenizer)
    for choice in ("the", "dog zebra"):
        (found,) = lm.loglikelihood(requests("loglikelihood", (context, choice)))
        expected = one_by_one(model, [tokenizer.end_token], tokenizer.encode(context + choice))
        assert math.isclose(found[0], expected[0], rel_tol=1e-5)
    assert math.isclose(
        lm._loglikelihood_tokens([(("", ""), [], [7])])[0][0], one_by_one(model, [1], [7])[0], rel_tol=1e-5
    )


@pytest.mark.parametrize(
    ("context", "choice", "reason"),
    [
        ("the", "re", "'re' shares a token with the text 'the'"),
        ("once upon a ti", "me", "'me' shares a token with the text 'once upon a ti'"),
        ("once upon a ti", "me zebra", "'me zebra' shares a token with the text 'once upon a ti'"),
        ("the cat", "\u00e9", "'\u00e9' behind 'the cat' has 0 tokens"),
        ("the cat", "", "'' behind 'the cat' has 0 tokens"),
        ("", "", "'' behind '' has 0 tokens"),
        ("the cat", " zqzqzqzqzqzqzq", "has 15 tokens, and the run was trained on rows of 10"),
    ],
)
def test_a_choice_without_a_probability_of_its_own_is_refused(context: str, choice: str, reason: str) -> None:
    tokenizer = bpe()
    assert len(tokenizer.encode("there")) == len(tokenizer.encode("the time")) - 1 == 1  # whole words are tokens
    lm = harness_lm(Summing(160), tokenizer, longest=10)
    with pytest.raises(NextLatError, match=reason) as told:
        lm.loglikelihood(requests("loglikelihood", ("the cat", " sat"), (context, choice)))
    assert "target_delimiter" in str(told.value) or "shorten it" in str(told.value)


def test_the_longest_choice_that_fits_is_whole() -> None:
    model = Summing(160)
    lm = harness_lm(model, bpe(), longest=10)
    tokens = list(range(30, 40))
    (found,) = lm._loglikelihood_tokens([(("", ""), [5, 6], tokens)])
    assert math.isclose(found[0], one_by_one(model, [6], tokens)[0], rel_tol=1e-5)


def test_cut_contexts_and_lost_characters_are_counted_by_task() -> None:
    lm = harness_lm(Summing(160), bpe(), longest=4)
    fits = "the cat sat the"  # and one more: as many as are read and asked for
    lm.loglikelihood(requests("loglikelihood", (fits, " dog"), (fits + " mat", " dog"), task="choice"))
    lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", ("caf\u00e9 \u201cthe cat\u201d",), ("the",), task="prose")
    )
    assert lm.counted() == {
        "choice.cut_contexts": Metric(1.0, n=2),
        "prose.lost_characters": Metric(3.0, n=len("caf\u00e9 \u201cthe cat\u201d") + len("the")),
    }


class Hook:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
        self.told.append((kind, arguments, answer))


def test_windows_of_many_texts_share_batches_and_are_nobodys_answers() -> None:
    model = Successor()
    lm = harness_lm(model, longest=8, batch_size=4)
    lm.cache_hook = hook = Hook()
    texts = ["abcdefghijklmnop", "ab", "", "xyzxyz", "q"]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    assert model.rows == [(4, 8), (1, 1)]  # 2 + 1 + 0 + 1 + 1 windows
    right, wrong = 30 - math.log(math.exp(30) + 256), -math.log(math.exp(30) + 256)
    # nothing is expected of the end token but token 0, so each text begins with a miss
    misses = [1, 1, 0, 2, 1]
    for text, value, count in zip(texts, found, misses, strict=True):
        assert math.isclose(value, count * wrong + (len(text) - count) * right, rel_tol=1e-9, abs_tol=1e-9)
    assert hook.told == [("loglikelihood_rolling", (text,), value) for text, value in zip(texts, found, strict=True)]


def written(lm: Any, *prompts: str, **options: Any) -> list[str]:
    texts: list[str] = lm.generate_until(requests("generate_until", *((prompt, options) for prompt in prompts)))
    return texts


def test_prompts_stay_whole_and_answers_take_the_room_that_is_left() -> None:
    model = Successor()
    lm = harness_lm(model, longest=12)
    assert written(lm, "ABCDEF", "a", "KL") == ["GHIJKL", "bcdefghijkl", "MNOPQRSTUV"]  # 256 tokens are the default
    assert {rows[1] for rows in model.rows if rows[1] > 1} == {6, 2}
    assert lm.counted() == {"t.cut_answers": Metric(3.0, n=3)}
    lm.counts.clear()
    assert written(lm, "ABCDEF", "a", until=["I"]) == ["GH", "bcdefghijkl"]
    assert lm.counted() == {"t.cut_answers": Metric(1.0, n=2)}


def test_a_prompt_that_fills_the_row_loses_its_beginning_and_is_counted() -> None:
    model = Successor()
    lm = harness_lm(model, longest=12)
    assert written(lm, "0123456789AB", max_gen_toks=3) == ["CDE"]
    assert written(lm, "0123456789ABCDEFG", max_gen_toks=50) == ["HIJKLM"]
    assert [rows[1] for rows in model.rows if rows[1] > 1] == [9, 6]
    assert lm.counted() == {"t.cut_contexts": Metric(2.0, n=2), "t.cut_answers": Metric(1.0, n=2)}


def test_answers_do_not_depend_on_the_batch() -> None:
    prompts = ["ABCDEF", "a", "KL", "0123", "abc", "ghi"]
    alone = [written(harness_lm(Successor(), longest=12), prompt)[0] for prompt in prompts]
    assert written(harness_lm(Successor(), longest=12, batch_size=6), *prompts) == alone


def test_the_end_token_ends_an_answer_and_opens_an_empty_prompt() -> None:
    lm = harness_lm(Successor({ord("e"): END, END: ord("q")}))
    assert written(lm, "a", "c", "", max_gen_toks=6) == ["bcde", "de", "qrstuv"]
    assert lm.counted() == {}
    model = Successor({ord("e"): END})
    lm = harness_lm(model, longest=8)
    assert written(lm, "b", "K") == ["cde", "LMNOPQR"]
    assert lm.counted() == {"t.cut_answers": Metric(1.0, n=2)}  # that of K
    assert (1, 1) in model.rows  # the row that has ended is not computed further


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_all_names_of_the_most_tokens_are_understood(name: str) -> None:
    assert written(harness_lm(Successor()), "a", **{name: 3}) == ["bcd"]


def test_a_temperature_samples_and_top_k_and_top_p_are_kept_to() -> None:
    torch.manual_seed(0)
    warm = {"max_gen_toks": 8, "temperature": 50.0}
    lm = harness_lm(Successor())
    assert written(lm, "a", **warm) != ["bcdefghi"]
    assert written(lm, "a", **warm, top_k=1) == ["bcdefghi"]
    assert written(lm, "a", **warm, top_p=1e-6) == ["bcdefghi"]
    assert written(lm, "a", **warm, do_sample=False) == ["bcdefghi"]


def test_options_of_generation_that_are_not_known_are_refused() -> None:
    lm = harness_lm(Successor())
    with pytest.raises(NextLatError, match="generation_kwargs has num_beams, which is not known here"):
        written(lm, "a", num_beams=4)
    with pytest.raises(NextLatError, match="do_sample is true and temperature is 0"):
        written(lm, "a", do_sample=True)


def test_the_average_is_the_mean_of_eight_accuracies() -> None:
    rows: dict[str, dict[str, Any]] = {
        name: {"acc,none": 0.1 * i, "acc_stderr,none": 0.02} for i, name in enumerate(ACCURACIES)
    }
    rows["piqa"] |= {"acc_norm,none": 0.5, "acc_norm_stderr,none": 0.04}
    rows["sciq"]["acc,none"] = 0.99  # its interval ends at 1, its share in the error does not
    figures = read_table(rows, {name: {"effective": 100} for name in ACCURACIES})
    averages = paper_average(figures)
    average, norm = averages["nextlat_paper.average"], averages["nextlat_paper.average_norm"]
    assert math.isclose(float(average.value), (0.1 * 21 + 0.99) / 8)
    assert math.isclose(float(norm.value), (0.1 * 20 + 0.5 + 0.99) / 8)
    for found, error in ((average, math.sqrt(8 * 0.02**2) / 8), (norm, math.sqrt(7 * 0.02**2 + 0.04**2) / 8)):
        assert found.low is not None
        assert found.high is not None
        assert math.isclose(found.high - found.low, 2 * 1.959963984540054 * error)
    rows["sciq"]["acc_stderr,none"] = "N/A"
    assert paper_average(read_table(rows, {}))["nextlat_paper.average"].low is None
    del rows["sciq"]
    assert paper_average(read_table(rows, {})) == {}


def test_intervals_of_proportions_are_wilsons_and_others_normal() -> None:
    def metric(value: float, error: float, name: str = "acc", n: int = 100) -> Metric:
        row = {f"{name},none": value, f"{name}_stderr,none": error}
        return read_table({"t": row}, {"t": {"effective": n}})["t"].metrics[f"t.{name}"]

    assert metric(1.0, 0.0, n=4) == Metric(*proportion(4, 4))
    assert metric(0.0, 0.0, n=4) == Metric(*proportion(0, 4))
    assert metric(0.1, math.sqrt(0.1 * 0.9 / 99)) == Metric(*proportion(10, 100))
    z = 1.959963984540054
    assert metric(0.1, 0.02) == Metric(0.1, 0.1 - z * 0.02, 0.1 + z * 0.02, 100)
    assert metric(0.99, 0.02).high == 1.0
    assert metric(0.5, 0.5, "bits_per_byte") == Metric(0.5, 0.5 - z * 0.5, 0.5 + z * 0.5, 100)
