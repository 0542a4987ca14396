"""A cache whose rows have lengths of their own gives what whole passes give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nextlat.errors import NextLatError
from nextlat.model import Transformer

VOCABULARY = 9


def model() -> Transformer:
    lm = Transformer(VOCABULARY, 2, 2, 16, generator=torch.Generator().manual_seed(0)).double().eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(15)
    return lm


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_rows_of_unequal_length_are_decoded_as_if_alone() -> None:
    lm, text = model(), tokens(3, 9)
    cache = lm.new_cache(3, 12)
    lm(text[:, :5], cache=cache)
    cache.lengths = [5, 2, 3]  # prompts padded at their end
    for length in (1, 2, 1):  # rows grow by different texts from different places
        new = tokens(3, length, seed=length)
        before = list(cache.lengths)
        logits = lm(new, cache=cache).logits
        for row, begin in enumerate(before):
            text[row, begin : begin + length] = new[row]
            alone = lm(text[row : row + 1, : begin + length]).logits[:, begin:]
            torch.testing.assert_close(logits[row : row + 1], alone, rtol=0, atol=1e-10)
        assert cache.lengths == [begin + length for begin in before]


@torch.no_grad()
def test_going_back_forgets_what_came_after_in_each_row() -> None:
    lm, text = model(), tokens(2, 6)
    cache = lm.new_cache(2, 10)
    lm(text[:, :4], cache=cache)
    lm(tokens(2, 3, seed=5), cache=cache)
    cache.lengths = [4, 3]
    logits = lm(text[:, 4:], cache=cache).logits
    torch.testing.assert_close(logits[:1], lm(text[:1]).logits[:, 4:], rtol=0, atol=1e-10)
    other = torch.cat([text[1:, :3], text[1:, 4:]], 1)
    torch.testing.assert_close(logits[1:], lm(other).logits[:, 3:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_path_through_a_tree_of_drafts_is_kept() -> None:
    # root 0, children 1 and 2, and 3 below 2; row 0 keeps 0-2-3, row 1 keeps 0-1
    lm, prompt = model(), tokens(2, 3)
    drafts, then = tokens(2, 4, seed=1), tokens(2, 2, seed=2)
    ancestors = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    cache = lm.new_cache(2, 12)
    lm(prompt, cache=cache)
    mask = torch.cat([torch.ones(4, 3, dtype=torch.bool), ancestors], 1)
    tree = lm(drafts, positions=torch.tensor([3, 4, 4, 5]), mask=mask, cache=cache).logits
    cache.keep([[0, 2, 3], [0, 1]], [3, 3])
    assert cache.lengths == [6, 5]
    after = lm(then, cache=cache).logits
    for row, path in enumerate(([0, 2, 3], [0, 1])):
        text = torch.cat([prompt[row], drafts[row, path], then[row]])[None]
        whole = lm(text).logits[0]
        torch.testing.assert_close(tree[row, path], whole[3 : 3 + len(path)], rtol=0, atol=1e-10)
        torch.testing.assert_close(after[row], whole[3 + len(path) :], rtol=0, atol=1e-10)


@torch.no_grad()
def test_chosen_rows_go_on_alone() -> None:
    lm, text = model(), tokens(3, 6)
    cache = lm.new_cache(3, 8)
    lm(text[:, :4], cache=cache)
    cache.lengths = [4, 3, 4]
    cache.select([2, 1])
    logits = lm(text[[2, 1], 4:5], cache=cache).logits
    torch.testing.assert_close(logits[:1], lm(text[2:, :5]).logits[:, 4:], rtol=0, atol=1e-10)
    other = torch.cat([text[1:2, :3], text[1:2, 4:5]], 1)
    torch.testing.assert_close(logits[1:], lm(other).logits[:, 3:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_no_mask_is_made_where_none_is_needed() -> None:
    cache = model().new_cache(2, 8)
    assert cache.mask(5) is None
    cache.advance(4)
    assert cache.mask(1) is None
    assert cache.mask(2).tolist() == [[True] * 5 + [False], [True] * 6]  # type: ignore[union-attr]
    cache.lengths = [4, 1]
    mask = cache.mask(1)
    assert mask is not None
    assert mask[:, 0, 0].tolist() == [[True] * 5, [True, True, False, False, False]]


def test_places_never_written_are_finite() -> None:
    # a short row looks past them with weight 0, and 0 times NaN is NaN
    cache = model().new_cache(2, 4000)
    assert not cache.keys.any()
    assert not cache.values.any()


def test_the_longest_row_must_fit() -> None:
    lm = model()
    cache = lm.new_cache(2, 4)
    lm(tokens(2, 3), cache=cache)
    cache.lengths = [3, 1]
    with pytest.raises(NextLatError, match="holds 4 positions and 5 are needed"):
        lm(tokens(2, 2), cache=cache)
