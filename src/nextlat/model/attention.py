"""Causal attention that never looks across a document boundary and never builds a T x T mask.

Packed rows take one of three ways, chosen by :func:`implementation`: on CUDA in half precision the
variable-length kernel, on CUDA otherwise FlexAttention where it proves right, and everywhere else documents
grouped by length. All compute the same function; a :class:`Layout` holds what they need.
"""

from __future__ import annotations

import inspect
import warnings
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_GROWTH = 1.25
"""Documents whose lengths differ by less than this factor share one attention call."""
_SHORT = 128
"""Rows up to this length are attended by plain products where gradients are made on a CPU."""
_QUERIES = 64
"""Queries to a product there: few enough to leave out half of what is not seen."""
_BLOCK = 128
"""Queries, and keys, to a block of FlexAttention's mask."""
_FLEX_SHAPES = 3
"""Shapes that FlexAttention is compiled for, with and without gradient: at eight torch stops compiling."""
_FLEX_LIMIT = 0.02
"""Relative error, of output or gradients, beyond which FlexAttention is wrong; bf16 rounds at 0.004."""

Implementation = Literal["varlen", "flex", "grouped"]


def run_index(documents: Tensor) -> Tensor:
    """Number of boundaries at or before each position.

    Args:
        documents: (B, T) document ids. Each change of id starts a new run, so an id that returns later
            in the row names a new document.

    Returns:
        (B, T) int64, constant inside a document, growing at each boundary.
    """
    change = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)
    return change.cumsum(1)


class Groups(NamedTuple):
    """Documents stacked with others of similar length; a short one repeats its last position."""

    shapes: tuple[tuple[int, int], ...]
    """(documents, length) of each group; P is the sum of their products."""
    source: Tensor
    """(P,) flat position, in the (B * T) row-major order, of every entry of all groups."""
    place: Tensor
    """(B * T,) where each flat position stands among the P entries."""


class Layout:
    """Where the documents of a batch lie: made once per batch, used by every layer.

    Each way of attending has its own description, made when it is first asked for.

    Args:
        documents: (B, T) document ids; every change of id, and every row, starts a new document.
    """

    def __init__(self, documents: Tensor) -> None:
        rows, length = documents.shape
        self.documents = documents
        first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
        self.starts = first.nonzero().squeeze(1)
        """(documents,) int64 flat position of each document's first token."""
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([rows * length])])
        self.lengths = ends - self.starts
        """(documents,) int64."""
        flat = torch.arange(rows * length, device=documents.device)
        self.positions = (flat - self.starts.repeat_interleave(self.lengths)).view(rows, length)
        """(B, T) int64 position inside the document."""

    @cached_property
    def cumulative_lengths(self) -> Tensor:
        """(documents + 1,) int32: where each document begins and the last one ends, for variable-length kernels."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).int()

    @cached_property
    def longest(self) -> int:
        """Length of the longest document."""
        return int(self.lengths.max())

    @cached_property
    def groups(self) -> Groups:
        """All documents, by length.

        Causal attention inside a document needs no mask: padding a document at its end changes nothing
        before it. So documents of similar length are stacked and attended with ``is_causal``; work is
        proportional to the sum of squared document lengths instead of T squared.
        """
        by_length = self.lengths.argsort(descending=True, stable=True)
        shapes = _similar(self.lengths[by_length].tolist())
        padded = torch.tensor([size for count, size in shapes for _ in range(count)], device=self.lengths.device)
        begins = padded.cumsum(0) - padded  # (documents,) in the order of by_length
        offset = torch.arange(sum(n * size for n, size in shapes), device=padded.device)
        offset -= begins.repeat_interleave(padded)
        last = (self.lengths[by_length] - 1).repeat_interleave(padded)
        source = self.starts[by_length].repeat_interleave(padded) + torch.minimum(offset, last)
        stacked = torch.empty_like(begins).index_copy_(0, by_length, begins)
        place = stacked.repeat_interleave(self.lengths) + self.positions.flatten()
        return Groups(shapes, source, place)

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's mask: which of the (T / 128) squared blocks hold visible pairs, and which only such.

        It is read off the runs at both ends of each block. ``create_block_mask`` would evaluate all T x T pairs.
        """
        from torch.nn.attention.flex_attention import BlockMask

        run = run_index(self.documents)
        length = run.shape[1]
        blocks = -(-length // _BLOCK)
        ends = torch.arange(1, blocks + 1, device=run.device) * _BLOCK - 1
        first, last = run[:, ::_BLOCK], run[:, ends.clamp(max=length - 1)]  # (B, blocks), growing along a row
        order = ends[:, None] - ends  # > 0 where the query block lies behind the key block
        seen = (order >= 0) & (first[:, :, None] <= last[:, None, :])  # (B, query blocks, key blocks)
        whole = (order > 0) & (last[:, :, None] == first[:, None, :]) & (ends < length)[:, None]

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (run[b, q] == run[b, k]) & (q >= k)

        return BlockMask.from_kv_blocks(
            *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(length, length)
        )


def document_layout(documents: Tensor) -> Layout:
    """Where the documents of (B, T) ids lie."""
    return Layout(documents)


def _similar(sizes: list[int]) -> tuple[tuple[int, int], ...]:
    """(documents, length of the longest) of each group of similar sizes; ``sizes`` falls."""
    shapes = []
    begin = 0
    while begin < len(sizes):
        stop = begin
        while stop < len(sizes) and sizes[stop] * _GROWTH >= sizes[begin]:
            stop += 1
        shapes.append((stop - begin, sizes[begin]))
        begin = stop
    return tuple(shapes)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, n) how many and (B, 1, n, n) which key blocks each query block reads, the chosen ones first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts[:, None], blocks.int().argsort(dim=-1, descending=True, stable=True).int()[:, None]


def implementation(device: str, dtype: torch.dtype, head_width: int, varlen: bool) -> Implementation:
    """How documents are attended, if it works: see :func:`flex_is_right`.

    Args:
        device: type of the device, such as ``"cuda"``.
        dtype: of queries, keys and values.
        head_width: width of a head; the variable-length kernel takes multiples of 8 up to 256.
        varlen: whether torch and the device have the variable-length kernel.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device != "cuda" or not (half or dtype is torch.float32):
        return "grouped"
    return "varlen" if varlen and half and head_width % 8 == 0 and head_width <= 256 else "flex"


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: (B, T, n_heads, head_width) rotated queries.
        k: (B, S, n_heads, head_width) rotated keys, S = T unless a cache or a mask is used.
        v: (B, S, n_heads, head_width) values.
        layout: documents of the batch; ``None`` means one document a row.
        mask: (T, S) or (B, 1, T, S) bool, True where a query may look; replaces the causal rule. A single query
            needs none.

    Returns:
        (B, T, n_heads * head_width).
    """
    if layout is None:
        if mask is None and q.shape[1] == k.shape[1]:
            return attend_causal(q, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # one query behind a cache sees it all
        return mixed.transpose(1, 2).flatten(2)
    kind = implementation(q.device.type, q.dtype, q.shape[-1], has_varlen(q.device))
    if kind == "varlen":
        return attend_varlen(q, k, v, layout)
    if kind == "flex" and flex_is_right(q, layout):
        return attend_flex(q, k, v, layout)
    return attend_grouped(q, k, v, layout)


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every position to those up to itself; see :func:`attend` for shapes."""
    trained = torch.is_grad_enabled() and q.requires_grad and q.is_cpu and q.dtype.itemsize > 2
    if trained and q.shape[1] <= _SHORT and q.numel() and not torch.compiler.is_compiling():
        short: Tensor = _ShortRows.apply(q, k, v)  # type: ignore[no-untyped-call]
        return short.flatten(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class _ShortRows(torch.autograd.Function):
    """Causal attention by plain products, some queries at a time with the keys that they may see.

    Forward and backward together take three quarters of the time of torch's CPU kernel. The probabilities are kept in
    between and grow with the square of the length: 96 numbers for each token and head at 128 tokens.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        q, k, v = (_heads_first(x) for x in (q, k, v))
        length, seen = q.shape[1], []
        later = torch.full((length, length), -torch.inf, dtype=q.dtype).triu_(1)
        for start in range(0, length, _QUERIES):
            stop = min(start + _QUERIES, length)
            p = torch.baddbmm(
                later[start:stop, :stop], q[:, start:stop], k[:, :stop].mT, alpha=q.shape[2] ** -0.5
            )  # (B n_heads, queries, keys)
            seen.append(torch.softmax(p, -1, out=p))
            out[:, start:stop] = _heads_behind(p @ v[:, :stop], len(out))
        ctx.save_for_backward(q, k, v, *seen)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *seen = ctx.saved_tensors
        rows, rate = len(upstream), q.shape[2] ** -0.5
        d_out, d_q = _heads_first(upstream), torch.empty_like(upstream)
        d_k, d_v = torch.empty(0), torch.empty(0)
        for index, p in reversed(list(enumerate(seen))):  # the last queries see all keys
            queries, keys = slice(index * _QUERIES, (index + 1) * _QUERIES), p.shape[2]
            d_p = d_out[:, queries] @ v[:, :keys].mT
            torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_p).mul_(rate)
            d_q[:, queries] = _heads_behind(d_p @ k[:, :keys], rows)
            of_keys, of_values = d_p.mT @ q[:, queries], p.mT @ d_out[:, queries]
            if index == len(seen) - 1:
                d_k, d_v = of_keys, of_values
            else:
                d_k[:, :keys] += of_keys
                d_v[:, :keys] += of_values
        return d_q, _heads_behind(d_k, rows), _heads_behind(d_v, rows)


def _heads_first(x: Tensor) -> Tensor:
    """(B, T, n_heads, head_width) as (B n_heads, T, head_width), contiguous."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _heads_behind(x: Tensor, rows: int) -> Tensor:
    """(B n_heads, T, head_width) as (B, T, n_heads, head_width)."""
    return x.view(rows, -1, *x.shape[1:]).transpose(1, 2)


def attend_grouped(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """One call for each group of documents of similar length; see :func:`attend` for shapes."""
    rows, length = q.shape[:2]
    shapes, source, place = layout.groups
    sizes = [count * size for count, size in shapes]
    # index_select: on a CPU the gradient of x[source] takes twice as long
    stacked = (torch.split(x.flatten(0, 1).index_select(0, source), sizes) for x in (q, k, v))
    pieces = []
    for shape, *parts in zip(shapes, *stacked, strict=True):
        a, b, c = (x.unflatten(0, shape) for x in parts)  # (n, L, n_heads, head_width)
        pieces.append(attend_causal(a, b, c).flatten(0, 1))
    return torch.cat(pieces).index_select(0, place).view(rows, length, -1)


@lru_cache
def _varlen() -> Any:
    """The variable-length attention of torch, causal; ``None`` before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    windowed = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if windowed else {"is_causal": True}
    return lambda *inputs: varlen_attn(*inputs, **causal)


@lru_cache
def has_varlen(device: torch.device) -> bool:
    """Whether this torch has the variable-length kernel and this device is a GPU that runs it."""
    return device.type == "cuda" and _varlen() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """One kernel over all documents of the batch, on CUDA in half precision; see :func:`attend` for shapes."""
    bounds, longest = layout.cumulative_lengths, layout.longest
    flat = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, n_heads, head_width)
    mixed: Tensor = _varlen()(*flat, bounds, bounds, longest, longest)
    return mixed.reshape(*q.shape[:2], -1)


@lru_cache
def _flex() -> Any:
    """FlexAttention, to be compiled at its first call."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Compiled attention over the blocks that hold visible pairs; see :func:`attend` for shapes."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    mixed: Tensor = _flex()(*heads_first, block_mask=layout.block_mask)
    return mixed.transpose(1, 2).flatten(2)


_flex_checked: dict[tuple[object, ...], bool] = {}


def flex_is_right(q: Tensor, layout: Layout) -> bool:
    """Whether compiled FlexAttention runs on this shape, and outputs and gradients agree with the grouped way.

    Compilers fail, and have given wrong gradients, on some devices; so each shape is tried once, on random
    numbers, with this batch's documents. Beyond a few shapes the answer is no without a trial.
    """
    key = (*q.shape, q.dtype, q.device)
    if key not in _flex_checked and len(_flex_checked) < _FLEX_SHAPES:
        trouble = _disagreement(q, layout)
        _flex_checked[key] = trouble is None
        if trouble is not None:
            warnings.warn(f"FlexAttention is not used for packed rows here: {trouble}", stacklevel=2)
    return _flex_checked.get(key, False)


def _disagreement(q: Tensor, layout: Layout) -> str | None:
    """What is wrong with compiled FlexAttention on this shape; ``None`` if nothing is."""
    g = torch.Generator(q.device).manual_seed(0)
    *inputs, upstream = (torch.randn(q.shape, generator=g, device=q.device, dtype=q.dtype) for _ in range(4))
    made = []
    try:
        for way in (attend_flex, attend_grouped):
            with torch.enable_grad():
                leaves = [x.clone().requires_grad_() for x in inputs]
                out = way(leaves[0], leaves[1], leaves[2], layout)
            made.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.flatten(2))])
    except Exception as error:  # whatever a compiler raises, the grouped way still works
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    # measured against the upstream gradient too: documents of one token have no gradient in queries and keys
    far = [float((a - b).norm() / (b.norm() + upstream.norm())) for a, b in zip(*made, strict=True)]
    return None if all(x < _FLEX_LIMIT for x in far) else f"its relative errors are {far}"
