"""Packing: documents of any length into rows of one length.

A :class:`Plan` says which piece of which document lies where and is made from the lengths alone;
:func:`packed_rows` then fills any rows of it, in any order, from tokens that may stay in a memory-mapped file. So a
row is a function of its number, and memory is that of the rows asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError

Ints = NDArray[np.int64]

PADDING = -1
"""Document id of positions that hold no document."""


class Documents:
    """Documents one behind the other in one array of tokens.

    Args:
        tokens: (N,) token ids; a memory-mapped array is read only where rows are asked for, and once here.
        offsets: (n + 1,) where each document begins, and N.
        end_token: the target of a document's last token. By the convention of this library it also opens each
            document, see :func:`collect`. ``None``: nothing is asked there.
        prompts: (n,) how many first tokens of each document are prompt; ``None`` for none.

    Raises:
        NextLatError: no document, an empty one, a token that is not an id, a prompt longer than its document.
    """

    def __init__(
        self, tokens: NDArray[Any], offsets: ArrayLike, end_token: int | None = None, prompts: ArrayLike | None = None
    ) -> None:
        self.tokens, self.offsets, self.end_token = tokens, _integers(offsets, "offsets"), end_token
        self.lengths: Ints = np.diff(self.offsets)
        if not len(self.lengths):
            raise NextLatError("there are no documents to pack; give at least one")
        if self.offsets[0] != 0 or self.offsets[-1] != len(tokens):
            raise NextLatError(
                f"offsets run from {self.offsets[0]} to {self.offsets[-1]}; they must run from 0 to the number of "
                f"tokens, {len(tokens)}"
            )
        if (self.lengths < 1).any():
            raise NextLatError(f"document {np.argmax(self.lengths < 1)} has no tokens; leave empty documents out")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise NextLatError(f"tokens are {tokens.ndim}-dimensional {tokens.dtype}; they must be a list of integers")
        if tokens.dtype.kind == "i" and tokens.min() < 0:
            where = np.argmin(tokens)
            document = np.searchsorted(self.offsets, where, "right") - 1
            raise NextLatError(f"document {document} holds token {tokens[where]}; token ids must be at least 0")
        _check_token("end_token", end_token)
        self.prompts: Ints = np.zeros_like(self.lengths) if prompts is None else _integers(prompts, "prompts")
        _check_prompts(self.prompts, self.lengths)


def collect(
    sequences: Iterable[Sequence[int] | NDArray[Any]], end_token: int | None = None, prompts: ArrayLike | None = None
) -> Documents:
    """Documents from sequences of token ids.

    Args:
        sequences: one a document, without end tokens.
        end_token: put before every document, and asked for after its last token: a model learns to stop, and no
            state has to cross a boundary. ``None``: documents stay as they are, and nothing is asked after the last.
        prompts: (n,) how many first tokens of each sequence are prompt. Targets inside a prompt are ignored; its
            last token counts, it predicts the first token of the answer.
    """
    _check_token("end_token", end_token)
    arrays = [np.asarray(sequence) for sequence in sequences]
    for index, array in enumerate(arrays):
        if array.ndim != 1 or not len(array):
            raise NextLatError(f"document {index} has shape {array.shape}; it must be a list of at least one token")
        if array.dtype.kind not in "iu":
            raise NextLatError(f"document {index} holds {array.dtype}; token ids must be integers")
    lengths = _integers([len(array) for array in arrays], "lengths")
    asked = None if prompts is None else _integers(prompts, "prompts")
    if asked is not None:
        _check_prompts(asked, lengths)
    if end_token is not None:
        for index, array in enumerate(arrays):
            if (array == end_token).any():
                raise NextLatError(
                    f"document {index} holds the end token {end_token} already; leave end tokens out, collect() adds "
                    "them, or pass end_token=None"
                )
        opening = np.array([end_token])
        arrays = [part for array in arrays for part in (opening, array)]
        lengths = lengths + 1
        asked = None if asked is None else np.where(asked > 0, asked + 1, asked)
    tokens = np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, np.int64)
    return Documents(tokens, np.concatenate([[0], lengths.cumsum()]), end_token, asked)


class Plan(NamedTuple):
    """Where every piece of every document lies; pieces stand in the order of rows, then columns."""

    row_length: int
    """T."""
    rows: int
    """How many rows there are."""
    row: Ints
    """(pieces,) the row of each piece."""
    column: Ints
    """(pieces,) where in its row the piece begins."""
    document: Ints
    """(pieces,) the document it is of."""
    begin: Ints
    """(pieces,) where in the array of all tokens it begins."""
    length: Ints
    """(pieces,) its tokens."""

    @property
    def utilisation(self) -> float:
        """Part of all positions that holds a token."""
        return float(self.length.sum() / (self.rows * self.row_length))


def best_fit(documents: Documents, row_length: int, cut: bool = True, buffer: int | None = None) -> Plan:
    """Whole documents in rows, padding at the end of a row.

    Longest first, each document goes to the fullest row it fits in (best-fit decreasing). Within a row documents
    keep their order, and rows stand in the order of their first documents.

    Args:
        documents: what to pack.
        row_length: T.
        cut: cut documents longer than a row into rows and a rest; without it they are errors.
        buffer: pack this many documents at a time. Rows then mix only neighbours, as a shuffled corpus should be
            read, for a little more padding. ``None``: all at once.

    Raises:
        NextLatError: rows shorter than 2, a buffer below 1, or a document longer than a row without ``cut``.
    """
    _check_row_length(row_length)
    if buffer is not None and buffer < 1:
        raise NextLatError(f"buffer is {buffer}; pack at least 1 document at a time")
    if not cut and documents.lengths.max() > row_length:
        bad = np.argmax(documents.lengths > row_length)
        raise NextLatError(
            f"document {bad} has {documents.lengths[bad]} tokens and a row {row_length}; "
            "allow cut=True, or make rows longer"
        )
    pieces = -(-documents.lengths // row_length)  # of each document
    document = np.repeat(np.arange(len(pieces)), pieces)
    nth = np.arange(len(document)) - np.repeat(pieces.cumsum() - pieces, pieces)
    begin = documents.offsets[document] + nth * row_length
    length = np.minimum(documents.offsets[document + 1] - begin, row_length)
    row = np.empty_like(document)
    rows = 0
    at_once = len(pieces) if buffer is None else buffer
    bounds = np.searchsorted(document, np.arange(0, len(pieces) + at_once, at_once))
    for start, stop in pairwise(bounds.tolist()):
        fitted = _fit(length[start:stop], row_length)
        row[start:stop] = rows + fitted
        rows += int(fitted.max()) + 1
    order = np.argsort(row, kind="stable")
    row, document, begin, length = (x[order] for x in (row, document, begin, length))
    behind = length.cumsum() - length  # tokens in all pieces before
    column = behind - behind[np.searchsorted(row, row)]
    return Plan(row_length, rows, row, column, document, begin, length)


def _fit(lengths: Ints, row_length: int) -> Ints:
    """(pieces,) the row of each piece, rows numbered by their first pieces."""
    row = np.empty_like(lengths)
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by free places
    free = 0  # bit k is set if a row has k free places: the fullest row that fits is one shift away
    rows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[piece])
        fits = free >> size
        if fits:
            place = size + (fits & -fits).bit_length() - 1
            chosen = open_rows[place].pop()
            if not open_rows[place]:
                free ^= 1 << place
        else:
            place, chosen = row_length, rows
            rows += 1
        row[piece] = chosen
        if place > size:
            open_rows[place - size].append(chosen)
            free |= 1 << (place - size)
    _, first = np.unique(row, return_index=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    numbered: Ints = rank[row]
    return numbered


def fixed_stride(documents: Documents, row_length: int, drop_last: bool = False) -> Plan:
    """All documents one behind the other, cut every T tokens; rows may begin and stop inside a document.

    Only the last row may hold padding.

    Args:
        documents: what to pack.
        row_length: T.
        drop_last: leave out a last row that is not full.

    Raises:
        NextLatError: rows shorter than 2, or no row left.
    """
    _check_row_length(row_length)
    total = int(documents.offsets[-1])
    rows = total // row_length if drop_last else -(-total // row_length)
    if not rows:
        raise NextLatError(f"all documents together have {total} tokens, fewer than a row of {row_length}")
    bounds = np.union1d(documents.offsets, np.arange(0, total, row_length))
    begin, length = bounds[:-1], np.diff(bounds)
    kept = begin < rows * row_length
    begin, length = begin[kept], length[kept]
    document = np.searchsorted(documents.offsets, begin, "right") - 1
    return Plan(row_length, rows, begin // row_length, begin % row_length, document, begin, length)


def packed_rows(documents: Documents, plan: Plan, rows: ArrayLike, pad_token: int = 0) -> Batch:
    """Some rows of a plan.

    The target of a token is the next one of its document, also where a row ends inside the document; after the
    document's last token it is the end token, or nothing if there is none.

    Args:
        documents: what the plan was made for.
        plan: of :func:`best_fit` or :func:`fixed_stride`.
        rows: (B,) numbers of the rows, in any order.
        pad_token: what padding reads; any id of the vocabulary.

    Returns:
        (B, T) rows; ``documents`` holds each document's number, -1 on padding, and ``keys`` the rows' numbers.

    Raises:
        NextLatError: a row that the plan does not have, or a pad token that is no id.
    """
    _check_token("pad_token", pad_token)
    chosen = np.atleast_1d(_integers(rows, "rows"))
    if ((chosen < 0) | (chosen >= plan.rows)).any():
        bad = chosen[(chosen < 0) | (chosen >= plan.rows)][0]
        raise NextLatError(f"row {bad} was asked for; this plan has rows 0 to {plan.rows - 1}")
    first, stop = (np.searchsorted(plan.row, chosen, side) for side in ("left", "right"))
    piece = _ranges(first, stop - first)
    begin, length = plan.begin[piece], plan.length[piece]
    target_row = np.repeat(np.arange(len(chosen)), stop - first)
    place = _ranges(target_row * plan.row_length + plan.column[piece], length)
    source = _ranges(begin, length)
    document = np.repeat(plan.document[piece], length)

    last = source + 1 == documents.offsets[document + 1]
    following = documents.tokens[np.where(last, source, source + 1)].astype(np.int64)
    following[last] = IGNORE if documents.end_token is None else documents.end_token
    following[source + 1 < documents.offsets[document] + documents.prompts[document]] = IGNORE

    def table(fill: int, values: NDArray[Any]) -> torch.Tensor:
        cells = np.full(len(chosen) * plan.row_length, fill, np.int64)
        cells[place] = values
        return torch.from_numpy(cells.reshape(len(chosen), plan.row_length))

    return Batch(
        table(pad_token, documents.tokens[source]),
        table(IGNORE, following),
        table(PADDING, document),
        torch.from_numpy(chosen.copy()),
    )


def pack(
    sequences: Iterable[Sequence[int] | NDArray[Any]],
    row_length: int,
    strategy: Literal["best_fit", "fixed_stride"] = "best_fit",
    end_token: int | None = None,
    prompts: ArrayLike | None = None,
    pad_token: int = 0,
) -> Batch:
    """All rows of a few documents at once; see :func:`collect`, :func:`best_fit` and :func:`fixed_stride`."""
    if strategy not in ("best_fit", "fixed_stride"):
        raise NextLatError(f"strategy is {strategy!r}; choose best_fit or fixed_stride")
    documents = collect(sequences, end_token, prompts)
    plan = best_fit(documents, row_length) if strategy == "best_fit" else fixed_stride(documents, row_length)
    return packed_rows(documents, plan, np.arange(plan.rows), pad_token)


def _ranges(starts: Ints, sizes: Ints) -> Ints:
    """``start, start + 1, ...`` of each size, one behind the other."""
    ends = sizes.cumsum()
    return np.arange(int(sizes.sum()), dtype=np.int64) + np.repeat(starts - (ends - sizes), sizes)


def _integers(values: ArrayLike, name: str) -> Ints:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise NextLatError(f"{name} hold {array.dtype}; they must be integers")
    return array.astype(np.int64)


def _check_token(name: str, token: int | None) -> None:
    if token is not None and (not isinstance(token, int | np.integer) or token < 0):
        raise NextLatError(f"{name} is {token}; a token id is an integer of at least 0")


def _check_prompts(prompts: Ints, lengths: Ints) -> None:
    if prompts.shape != lengths.shape:
        raise NextLatError(f"there are {len(prompts)} prompt lengths for {len(lengths)} documents")
    wrong = (prompts < 0) | (prompts > lengths)
    if wrong.any():
        bad = np.argmax(wrong)
        raise NextLatError(
            f"document {bad} has {lengths[bad]} tokens and a prompt of {prompts[bad]}; "
            "a prompt has between 0 tokens and all of them"
        )


def _check_row_length(row_length: int) -> None:
    if row_length < 2:
        raise NextLatError(f"row_length is {row_length}; a row needs at least 2 tokens")
