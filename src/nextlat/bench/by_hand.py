"""A gpt step differentiated by hand: how fast a loop around our model can be with torch's kernels.

It trains like any other loop, but records no graph and allocates next to nothing. What the backward pass reads has
memory of its own in every layer; all else goes through a few buffers that the layers share, so that it stays in the
caches. Attention is made of plain products, which for short rows take less time than torch's fused CPU kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextlat.batch import Batch
from nextlat.bench.loops import TRAINING, Shape, Step, trunk
from nextlat.model import Transformer
from nextlat.model.norm import EPS, RMSNorm
from nextlat.model.products import add_product, other_library, product
from nextlat.model.rotary import rotary_turns
from nextlat.model.trunk import Block, feed_forward_width
from nextlat.training.optimizers import make_optimizer

QUERIES = 64
"""Queries scored in one product, which leaves out the keys behind the last of them."""


def by_hand_step(shape: Shape, batch: Batch) -> Step:
    """A step of the model of :func:`trunk`."""
    model = trunk(shape)
    gradients, optimizer = ByHand(model, shape, batch), make_optimizer(model, TRAINING)

    def step() -> Tensor:
        loss = gradients()
        optimizer.step()
        return loss

    return step


class ByHand:
    """Mean cross-entropy over all positions of one batch, and its gradients.

    Args:
        model: on a CPU, in fp32; its gradients are overwritten by each call.
        shape: of the model and the batch.
        batch: (B, T) token ids and targets.
        queries: see :data:`QUERIES`; all are scored at once where it does not divide T.
    """

    def __init__(self, model: Transformer, shape: Shape, batch: Batch, queries: int = QUERIES) -> None:
        self.model, self.tokens, self.targets = model, batch.tokens.flatten(), batch.targets.reshape(-1, 1)
        self.shared = Shared(shape, queries)
        self.layers = [Layer(block, self.shared) for block in model.layers if isinstance(block, Block)]
        self.norm = Norm(model.norm, self.shared)
        self.logits, self.minus = torch.empty(shape.tokens, shape.vocab), torch.full((shape.tokens, 1), -1.0)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The loss in nats; infinite where the probability of a target underflows."""
        u, du, x, dx = self.shared.stream
        table, head, share = self.model.embed_tokens.weight, self.model.lm_head.weight, 1 / len(self.tokens)
        torch.index_select(table, 0, self.tokens, out=u)
        for layer in self.layers:
            layer.forward()
        self.norm.forward()
        p = torch.softmax(torch.mm(x, head.T, out=self.logits), -1, out=self.logits)
        loss = p.gather(1, self.targets).log_().mean().neg_()
        d_logits = p.scatter_add_(1, self.targets, self.minus)  # times the share of a position, which products add
        torch.addmm(gradient(head), d_logits.T, x, beta=0, alpha=share, out=gradient(head))
        torch.addmm(dx, d_logits, head, beta=0, alpha=share, out=dx)
        du.zero_()
        self.norm.backward()
        for layer in reversed(self.layers):
            layer.backward()
        gradient(table).zero_().index_add_(0, self.tokens, du)
        return loss


def multiply(u: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``u @ weight.T``, in ``out`` or, where another library is faster, in memory that it brings."""
    return product(u, weight) if other_library(u, weight) else torch.mm(u, weight.T, out=out)


def gradient(parameter: Tensor) -> Tensor:
    """Its memory, made when first asked for."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class Shared:
    """Buffers; only the stream u (forward) and its gradient du (backward) carry anything from layer to layer."""

    def __init__(self, shape: Shape, queries: int) -> None:
        n, width, inner, length = shape.tokens, shape.width, feed_forward_width(shape.width), shape.length
        self.shape, self.head = shape, (shape.n_heads, width // shape.n_heads)
        self.stream = tuple(torch.empty(n, width) for _ in range(4))  # u, du, input of a product, its gradient
        self.qkv, self.d_rows = torch.empty(n, 3 * width), torch.empty(3 * width, width)
        self.z, self.d_act, self.d_gate_up = torch.empty(n, inner), torch.empty(n, inner), torch.empty(2, n, inner)
        self.d_mixed, self.dk, self.dv = (self.heads(length) for _ in range(3))
        size = queries if length % queries == 0 else length
        self.blocks = [slice(end - size, end) for end in range(size, length + 1, size)]
        self.block, self.parts, self.d_scores = (
            self.heads(size),
            [self.heads(b.stop) for b in self.blocks],
            self.scores(),
        )
        self.mask = torch.full((length, length), -torch.inf).triu(1)
        (turns,) = rotary_turns(torch.arange(length), *self.head)
        self.turns = turns * self.head[1] ** -0.5, turns  # of queries, with the scale of the scores, and of keys
        self.back = [turn.conj().resolve_conj() for turn in self.turns]

    def heads(self, length: int) -> Tensor:
        """(B * n_heads, length, head_width)."""
        return torch.empty(self.shape.rows * self.head[0], length, self.head[1])

    def scores(self) -> list[Tensor]:
        """(B * n_heads, queries, keys up to the last query) for each block of queries."""
        n, size = self.shape.rows * self.head[0], self.blocks[0].stop
        return [torch.empty(n, size, block.stop) for block in self.blocks]

    def by_token(self, u: Tensor) -> Tensor:
        """(B, T, n_heads, head_width) view of (B * n_heads, T, head_width)."""
        return u.view(-1, self.head[0], *u.shape[1:]).transpose(1, 2)

    def in_heads(self, u: Tensor) -> Tensor:
        """(B, T, ..., n_heads, head_width) view of (B * T, ... D)."""
        return u.view(self.shape.rows, self.shape.length, -1, *self.head)


def paired(u: Tensor) -> Tensor:
    """Neighbours as complex numbers, without a copy."""
    return torch.view_as_complex(u.view(*u.shape[:-1], -1, 2))


class Norm:
    """``x = gain * n`` with ``n = u * rate``; the stream itself need not be kept."""

    def __init__(self, norm: RMSNorm, shared: Shared) -> None:
        self.gain, self.stream = norm.weight, shared.stream
        self.rate, self.normed = torch.empty(shared.shape.tokens, 1), torch.empty_like(shared.stream[0])
        self.ones = torch.ones(shared.shape.tokens)

    def forward(self) -> None:
        """Fill x."""
        u = self.stream[0]
        torch.linalg.vector_norm(u, dim=-1, keepdim=True, out=self.rate)
        torch.mul(u, self.rate.square_().div_(u.shape[-1]).add_(EPS).rsqrt_(), out=self.normed)
        self.again()

    def again(self) -> Tensor:
        """Fill x from n, which is faster than to fetch it from main memory."""
        return torch.mul(self.normed, self.gain, out=self.stream[2])

    def backward(self) -> None:
        """Add ``rate * (gain * dx - n * mean(gain * dx * n))`` to du; uses up x and dx."""
        _, du, product, dx = self.stream
        torch.mul(dx, self.normed, out=product)
        torch.mv(product.T, self.ones, out=gradient(self.gain))
        pull = torch.mv(product, self.gain)[:, None].mul_(self.rate)
        du.addcmul_(dx.mul_(self.gain), self.rate).addcmul_(self.normed, pull, value=-1 / du.shape[-1])


class Layer:
    """One block, and what it keeps until its backward pass."""

    def __init__(self, block: Block, shared: Shared) -> None:
        n, width, length, inner = shared.shape.tokens, shared.shape.width, shared.shape.length, shared.z.shape[1]
        a, f, self.shared = block.self_attn, block.mlp, shared
        self.projections, self.out = [p.weight for p in (a.q_proj, a.k_proj, a.v_proj)], a.o_proj.weight
        self.inner, self.down = [f.gate_proj.weight, f.up_proj.weight], f.down_proj.weight
        self.norms = Norm(block.input_layernorm, shared), Norm(block.post_attention_layernorm, shared)
        self.rows = torch.empty(3 * width, width)  # of the projections, in the order that rotation wants
        self.qkv, self.scores, self.mixed = (
            [shared.heads(length) for _ in range(3)],
            shared.scores(),
            torch.empty(n, width),
        )
        self.gate, self.rest, self.sigmoid, self.act = (torch.empty(n, inner) for _ in range(4))

    def reordered(self, rows: Tensor, weights: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Views of the same shape: parts of the (3 D, D) rows, and of the weights they belong to."""
        n_heads, width = self.shared.head
        q, k, v = rows.chunk(3)
        pairs = [part.view(n_heads, width // 2, 2, -1) for part in (q, k)]
        halves = [weight.view(n_heads, 2, width // 2, -1).transpose(1, 2) for weight in weights[:2]]
        return [*zip(pairs, halves, strict=True), (v, weights[2])]

    def forward(self) -> None:
        """The stream behind the block, in place."""
        u, _, x, _ = self.shared.stream
        for row, weight in self.reordered(self.rows, self.projections):
            row.copy_(weight)
        self.norms[0].forward()
        self.shared.qkv = multiply(x, self.rows, self.shared.qkv)
        self.attend()
        add_product(u, self.mixed, self.out)
        self.norms[1].forward()
        self.gate, self.rest = (
            multiply(x, weight, made) for weight, made in zip(self.inner, (self.gate, self.rest), strict=True)
        )
        # act = z sigmoid(gate) with z = gate up: so d up = d act sigmoid gate, d gate = d act sigmoid (up + z - act)
        torch.sigmoid(self.gate, out=self.sigmoid)
        torch.mul(self.gate, self.rest, out=self.shared.z)
        torch.mul(self.shared.z, self.sigmoid, out=self.act)
        self.rest.add_(self.shared.z.sub_(self.act))
        add_product(u, self.act, self.down)

    def backward(self) -> None:
        """The gradient of the stream before the block, in place, and those of the weights."""
        _, du, _, dx = self.shared.stream
        torch.mm(du.T, self.act, out=gradient(self.down))
        d_z = multiply(du, self.down.T, self.shared.d_act).mul_(self.sigmoid)
        x = self.norms[1].again()
        dx.zero_()  # two gradients meet
        for weight, factor, d_made in zip(self.inner, (self.rest, self.gate), self.shared.d_gate_up, strict=True):
            torch.mm(torch.mul(d_z, factor, out=d_made).T, x, out=gradient(weight))
            add_product(dx, d_made, weight.T)
        self.norms[1].backward()
        torch.mm(du.T, self.mixed, out=gradient(self.out))
        dx.copy_(multiply(du, self.out.T, dx))
        self.attend_backward()
        torch.mm(self.shared.qkv.T, self.norms[0].again(), out=self.shared.d_rows)
        for row, d_weight in self.reordered(self.shared.d_rows, [gradient(weight) for weight in self.projections]):
            d_weight.copy_(row)
        dx.copy_(multiply(self.shared.qkv, self.rows.T, dx))
        self.norms[0].backward()

    def attend(self) -> None:
        """From products to what the heads attended to, a block of queries after another."""
        s, (q, k, v) = self.shared, self.qkv
        *turning, values = s.in_heads(s.qkv).unbind(2)
        for made, turn, turned in zip(turning, s.turns, (q, k), strict=True):
            torch.mul(paired(made), turn, out=paired(s.by_token(turned)))
        s.by_token(v).copy_(values)
        mixed = s.in_heads(self.mixed)[:, :, 0]
        for block, p in zip(s.blocks, self.scores, strict=True):
            seen = slice(block.stop)
            torch.baddbmm(s.mask[block, seen], q[:, block], k[:, seen].mT, out=p)
            torch.bmm(torch.softmax(p, -1, out=p), v[:, seen], out=s.block)  # out: a slice would be filled row by row
            mixed[:, block].copy_(s.by_token(s.block))

    def attend_backward(self) -> None:
        """From the gradient of what the heads attended to, in dx, to that of the products."""
        s, (q, k, v) = self.shared, self.qkv
        dq, dk, dv = s.in_heads(s.qkv).unbind(2)
        s.by_token(s.d_mixed).copy_(s.in_heads(s.stream[3])[:, :, 0])
        for block, p, d_p, part in reversed([*zip(s.blocks, self.scores, s.d_scores, s.parts, strict=True)]):
            seen, g = slice(block.stop), s.d_mixed[:, block]
            torch.bmm(g, v[:, seen].mT, out=d_p)
            torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_p)
            torch.bmm(d_p, k[:, seen], out=s.block)
            torch.mul(paired(s.by_token(s.block)), s.back[0][block], out=paired(dq[:, block]))
            for left, right, total in ((p, g, s.dv), (d_p, q[:, block], s.dk)):
                if block is s.blocks[-1]:  # which sees all keys
                    torch.bmm(left.mT, right, out=total)
                else:
                    total[:, seen].add_(torch.bmm(left.mT, right, out=part))
        torch.mul(paired(s.by_token(s.dk)), s.back[1], out=paired(dk))
        dv.copy_(s.by_token(s.dv))
