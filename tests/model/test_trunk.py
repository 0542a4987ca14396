"""The Llama-shaped trunk against hand formulas and a position-by-position forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model import Transformer
from nextlat.model.norm import RMSNorm, normed_products
from nextlat.model.rotary import rotary_angles, rotary_turns, rotate, rotated
from nextlat.model.trunk import feed_forward_width, init_normal
from nextlat.objectives.gpt import GPT
from nextlat.objectives.nextlat import NextLat
from tests.batches import document_ids
from tests.oracles.trunk import rms_norm, rotate_half, trunk_states


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trunk(seed: int = 0, vocab_size: int = 11, n_layers: int = 2, scale: float = 8.0) -> Transformer:
    """A small float64 trunk with weights large enough that attention is far from uniform, and uneven gains."""
    model = Transformer(vocab_size, n_layers, 2, 8, generator=seeded(seed)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=seeded(seed + 1))
            else:
                parameter.mul_(scale)
    return model


def random_tokens(rows: int, length: int, seed: int = 0, vocab_size: int = 11) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=seeded(seed))


# Norm


def test_rms_norm_does_not_subtract_the_mean() -> None:
    # LayerNorm would return zeros here
    out = RMSNorm(4).double()(torch.full((4,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(out, torch.full((4,), 3.0 / math.sqrt(9 + 1e-5), dtype=torch.float64))


def test_rms_norm_epsilon_is_1e_5_and_inside_the_root() -> None:
    norm = RMSNorm(2).double()
    assert norm(torch.zeros(2, dtype=torch.float64)).tolist() == [0.0, 0.0]
    # mean square 1e-6: with eps 1e-6 the first entry would be 1, with eps outside the root 0.99
    out = norm(torch.tensor([math.sqrt(2e-6), 0.0], dtype=torch.float64))
    assert out[0].item() == pytest.approx(math.sqrt(2e-6 / 1.1e-5), rel=1e-9)


def test_rms_norm_multiplies_by_its_gain_and_works_over_the_last_dimension() -> None:
    norm = RMSNorm(3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    u = torch.randn(2, 4, 3, generator=seeded(0), dtype=torch.float64)
    expected = torch.stack([torch.stack([rms_norm(x, norm.weight) for x in row]) for row in u])
    torch.testing.assert_close(norm(u), expected)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5)])
def test_rms_norm_has_the_gradients_of_its_definition(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(5).double()
    norm.weight.data = torch.linspace(-1, 2, 5, dtype=torch.float64)
    u = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = norm.weight * u * (u.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = torch.autograd.grad(plain, (u, norm.weight), upstream)
    for found, wanted in zip(torch.autograd.grad(norm(u), (u, norm.weight), upstream), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norm(u), plain, rtol=1e-12, atol=1e-14)


def stream_and_weights(shape: tuple[int, ...]) -> list[Tensor]:
    """A stream, a gain and two matrices that read its norm."""
    shapes = [shape, (5,), (3, 5), (5, 5)]
    return [
        torch.randn(s, generator=seeded(n), dtype=torch.float64).requires_grad_() for n, s in enumerate(shapes, start=7)
    ]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 0, 5)])
def test_products_of_the_normed_stream_have_the_gradients_of_their_definition(shape: tuple[int, ...]) -> None:
    inputs = stream_and_weights(shape)
    u, gain, *weights = inputs
    norm = gain * u * (u.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = (u * 1, *(norm @ weight.T for weight in weights))
    found = normed_products(u, gain, weights)
    upstream = [torch.randn(x.shape, generator=seeded(n), dtype=torch.float64) for n, x in enumerate(expected)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    ours, theirs = (torch.autograd.grad(made, inputs, upstream) for made in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_products_of_the_normed_stream_make_no_gradients_of_frozen_weights() -> None:
    inputs = stream_and_weights((4, 5))
    wanted = torch.autograd.grad(sum(x.sum() for x in normed_products(inputs[0], inputs[1], inputs[2:])), inputs)
    for frozen in range(1, 4):
        for number, x in enumerate(inputs):
            x.requires_grad_(number != frozen).grad = None
        sum(x.sum() for x in normed_products(inputs[0], inputs[1], inputs[2:])).backward()  # type: ignore[union-attr]
        for number, x in enumerate(inputs):
            assert (x.grad is None) == (number == frozen)
            assert x.grad is None or torch.equal(x.grad, wanted[number])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_of_half_precision_squares_in_fp32(dtype: torch.dtype) -> None:
    # 300^2 overflows fp16
    out = RMSNorm(4)(torch.tensor([300.0, -300.0, 300.0, -300.0], dtype=dtype))
    assert out.dtype is dtype
    assert out.tolist() == [1.0, -1.0, 1.0, -1.0]


# Rotary positions


def test_rotary_positions_pair_entry_j_with_entry_j_plus_half() -> None:
    # pairing neighbours (2j, 2j + 1) instead would need permuted weights in a stock Llama
    u = torch.randn(1, 5, 3, 8, generator=seeded(0), dtype=torch.float64)
    positions = [0, 1, 2, 7, 300]
    cos, sin = rotary_angles(torch.tensor(positions), 3, 8)
    out = rotate(u, cos, sin)
    assert out.dtype is torch.float64
    for t, position in enumerate(positions):
        for head in range(3):
            torch.testing.assert_close(out[0, t, head], rotate_half(u[0, t, head], position), rtol=0, atol=1e-4)
    torch.testing.assert_close(out[:, 0], u[:, 0], rtol=0, atol=0)


def test_rotary_angle_of_each_pair_by_hand() -> None:
    # head width 4: pair 0 turns by the position itself, pair 1 by position / 100
    cos, sin = rotary_angles(torch.tensor([3]), 1, 4)
    unit = torch.eye(4).view(4, 1, 1, 4)
    out = rotate(unit, cos, sin)[:, 0, 0]
    torch.testing.assert_close(out[0], torch.tensor([math.cos(3), 0.0, math.sin(3), 0.0]))
    torch.testing.assert_close(out[1], torch.tensor([0.0, math.cos(0.03), 0.0, math.sin(0.03)]))
    torch.testing.assert_close(out[2], torch.tensor([-math.sin(3), 0.0, math.cos(3), 0.0]))


def turned_heads(projection: nn.Module, u: Tensor, positions: Tensor) -> Tensor:
    """What the complex turns make, in the order of the entries of a stock Llama."""
    pairs = rotated(projection, u, 3, rotary_turns(positions, 3, 8))
    return pairs.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("wrapped", [False, True])
def test_complex_turns_are_the_same_rotation_in_another_order(wrapped: bool) -> None:
    # a module that is no plain Linear, such as one with an adapter, must be called, not read
    projection = nn.Linear(10, 24, bias=False).double()
    module = nn.Sequential(projection) if wrapped else projection
    u = torch.randn(2, 5, 10, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 3, 8, generator=seeded(1), dtype=torch.float64)
    for positions in (torch.tensor([0, 1, 2, 7, 300]), torch.randint(50, (2, 5), generator=seeded(2))):
        expected = rotated(module, u, 3, rotary_angles(positions, 3, 8))
        found = turned_heads(module, u, positions)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        live = [u, projection.weight]
        ours, theirs = (torch.autograd.grad((x * weights).sum(), live) for x in (found, expected))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def biased(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    layer.bias = nn.Parameter(torch.linspace(-3, 3, layer.out_features, dtype=torch.float64))


def hooked(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, inputs, made: 3 * made + 1)


def prepared(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].cumsum(-1) - 1,))


def replaced(layer: nn.Module) -> None:
    made = layer.forward
    layer.forward = lambda u: made(u).flip(-1)


READ_BY_PRODUCTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "post_attention_layernorm",
    "mlp",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.o_proj",
    "mlp.down_proj",
)
"""Modules of a block that are read, not called, where gradients are made on a CPU."""


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (None, "mlp"),
        *((biased, name) for name in READ_BY_PRODUCTS if name.endswith("proj")),
        *((change, name) for change in (hooked, prepared, replaced) for name in READ_BY_PRODUCTS),
    ],
)
def test_passes_with_and_without_gradients_agree(change: Callable[[nn.Module], None] | None, name: str) -> None:
    # only the former turn by complex numbers, and make all products of a norm together
    model, tokens = trunk(), random_tokens(2, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 8 + [-1]])
    unchanged = model.hidden_states(tokens, documents).detach()
    if change is not None:
        change(model.layers[1].get_submodule(name))  # type: ignore[union-attr]
    recorded = model.hidden_states(tokens, documents)
    assert torch.is_complex(model.context(tokens).angles[0])
    with torch.no_grad():
        assert not torch.is_complex(model.context(tokens).angles[0])
        plain = model.hidden_states(tokens, documents)
    torch.testing.assert_close(recorded.detach(), plain, rtol=0, atol=1e-12)
    assert (change is None) == torch.allclose(plain, unchanged, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_nothing_comes_of_nothing(shape: tuple[int, int]) -> None:
    model, tokens = trunk(), torch.zeros(shape, dtype=torch.int64)
    assert model.hidden_states(tokens).shape == (*shape, 8)
    with torch.no_grad():
        assert model.hidden_states(tokens).shape == (*shape, 8)


def test_a_cache_and_half_precision_turn_by_real_numbers() -> None:
    model, tokens = trunk(), random_tokens(1, 4)
    assert len(model.context(tokens, cache=model.new_cache(1, 8)).angles) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.context(tokens).angles) == 2
    assert len(model.bfloat16().context(tokens).angles) == 2


def test_only_differences_of_positions_matter() -> None:
    model, tokens = trunk(), random_tokens(2, 6)
    shifted = model(tokens, positions=torch.arange(6) + 5).logits
    torch.testing.assert_close(model(tokens).logits, shifted, rtol=0, atol=1e-4)
    stretched = model(tokens, positions=torch.arange(6) * 2).logits
    assert (model(tokens).logits - stretched).abs().max() > 1e-2


# The whole forward pass


@settings(max_examples=15)
@given(document_ids(7), st.integers(0, 50))
def test_states_equal_a_position_by_position_forward_pass(documents: list[int], seed: int) -> None:
    model, tokens = trunk(seed % 3), random_tokens(1, 7, seed)
    with torch.no_grad():
        found = model.hidden_states(tokens, torch.tensor([documents]))[0]
        expected = trunk_states(model, tokens[0].tolist(), documents)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # angles are fp32


def test_states_without_documents_equal_a_position_by_position_forward_pass() -> None:
    model, tokens = trunk(), random_tokens(2, 9)
    for row in range(2):
        torch.testing.assert_close(
            model.hidden_states(tokens)[row], trunk_states(model, tokens[row].tolist(), None), rtol=0, atol=1e-5
        )


def test_logits_are_the_head_of_the_normed_state_without_scale_or_bias() -> None:
    model, tokens = trunk(), random_tokens(1, 4)
    output = model(tokens)
    torch.testing.assert_close(output.logits, output.hidden @ model.head_weight.T)
    assert output.probe_state is output.hidden


def test_the_future_does_not_change_the_past() -> None:
    model, tokens = trunk(), random_tokens(1, 8)
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 11
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_no_documents_equal_one_document_a_row() -> None:
    model, tokens = trunk(), random_tokens(3, 7)
    plain = model(tokens).logits
    torch.testing.assert_close(plain, model(tokens, torch.zeros_like(tokens)).logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(plain, model(tokens, torch.full_like(tokens, 5)).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("offset", [0, 1, 4, 6])
def test_logits_of_a_document_do_not_depend_on_its_place_in_the_row(offset: int) -> None:
    model, document = trunk(), random_tokens(1, 5, seed=1)
    alone = model(document).logits
    row, ids = random_tokens(1, 12, seed=2), torch.zeros(1, 12, dtype=torch.long)
    row[:, offset : offset + 5] = document
    ids[:, offset : offset + 5], ids[:, offset + 5 :] = 1, 2
    packed = model(row, ids).logits[:, offset : offset + 5]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


def test_a_row_that_returns_to_an_id_does_not_remember_the_first_document() -> None:
    model, tokens = trunk(), random_tokens(1, 6)
    documents = torch.tensor([[0, 0, 1, 1, 0, 0]])
    torch.testing.assert_close(model(tokens, documents).logits[:, 4:], model(tokens[:, 4:]).logits, rtol=0, atol=1e-12)


def test_padding_changes_nothing_and_its_states_are_finite() -> None:
    model, tokens = trunk(), random_tokens(2, 9)
    documents = torch.zeros_like(tokens)
    documents[0, 4:], documents[1] = -1, -1
    h = model.hidden_states(tokens, documents)
    assert h.isfinite().all()
    torch.testing.assert_close(h[:1, :4], model.hidden_states(tokens[:1, :4]), rtol=0, atol=1e-12)


def test_positions_given_by_the_caller_replace_those_of_the_documents() -> None:
    model, tokens = trunk(), random_tokens(1, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    stretched = torch.tensor([[0, 1, 2, 0, 2, 4]])
    found = model(tokens, documents, positions=stretched).logits
    expected = model(tokens[:, 3:], positions=torch.tensor([0, 2, 4])).logits
    torch.testing.assert_close(found[:, 3:], expected, rtol=0, atol=1e-12)


def test_the_residual_stream_is_returned_on_request() -> None:
    model, tokens = trunk(n_layers=3), random_tokens(1, 4)
    layers: list[torch.Tensor] = []
    h = model.hidden_states(tokens, layers=layers)
    assert len(layers) == 4
    torch.testing.assert_close(layers[0], model.embed_tokens(tokens))
    torch.testing.assert_close(model.norm(layers[-1]), h)


# Cache


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 1, 3], [9], [2, 7]])
def test_cached_decoding_equals_the_full_forward(chunks: list[int]) -> None:
    model, tokens = trunk(), random_tokens(3, 9)
    cache = model.new_cache(3, 12)
    pieces = [model(piece, cache=cache) for piece in tokens.split(chunks, dim=1)]
    assert cache.lengths == [9, 9, 9]
    assert pieces[-1].cache is cache
    cached = torch.cat([piece.logits for piece in pieces], 1)
    torch.testing.assert_close(cached, model(tokens).logits, rtol=0, atol=1e-12)


def test_a_cache_rolled_back_by_its_length_forgets_what_came_after() -> None:
    model, tokens = trunk(), random_tokens(1, 8)
    cache = model.new_cache(1, 8)
    model(tokens[:, :4], cache=cache)
    model(random_tokens(1, 3, seed=5), cache=cache)
    cache.lengths = [4]
    found = model(tokens[:, 4:], cache=cache).logits
    torch.testing.assert_close(found, model(tokens).logits[:, 4:], rtol=0, atol=1e-12)


def test_mask_and_positions_verify_two_branches_in_one_call() -> None:
    model, prefix = trunk(), random_tokens(1, 4)
    first, second = torch.tensor([[3]]), torch.tensor([[7]])
    cache = model.new_cache(1, 6)
    model(prefix, cache=cache)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]], dtype=torch.bool)  # siblings do not see each other
    found = model(torch.cat([first, second], 1), positions=torch.tensor([4, 4]), mask=mask, cache=cache).logits[0]
    for index, token in enumerate((first, second)):
        expected = model(torch.cat([prefix, token], 1)).logits[0, -1]
        torch.testing.assert_close(found[index], expected, rtol=0, atol=1e-12)


def test_a_full_cache_says_how_large_it_must_be() -> None:
    model = trunk()
    cache = model.new_cache(1, 4)
    model(random_tokens(1, 3), cache=cache)
    with pytest.raises(NextLatError, match="holds 4 positions and 5 are needed"):
        model(random_tokens(1, 2), cache=cache)


def test_documents_exclude_a_cache_and_a_mask() -> None:
    model, tokens = trunk(), random_tokens(1, 3)
    documents = torch.zeros_like(tokens)
    with pytest.raises(NextLatError, match="documents cannot be combined"):
        model(tokens, documents, cache=model.new_cache(1, 3))
    with pytest.raises(NextLatError, match="documents cannot be combined"):
        model(tokens, documents, mask=torch.ones(3, 3, dtype=torch.bool))


# Sizes and weights


@pytest.mark.parametrize(
    ("width", "inner"), [(256, 640), (384, 1024), (512, 1408), (768, 2048), (2048, 5504), (8, 128), (120, 256)]
)
def test_feed_forward_width(width: int, inner: int) -> None:
    # 120 is half way between 2 and 3 steps of 128 and rounds to the even one
    assert feed_forward_width(width) == inner


def test_parameter_count_of_the_published_path_star_model() -> None:
    model = Transformer(106, 12, 6, 384, generator=seeded(0))
    assert sum(p.numel() for p in GPT(model).parameters()) == 21_324_672
    assert sum(p.numel() for p in NextLat(model, dynamics=384).parameters()) == 21_915_264


def test_weight_names_and_shapes_are_those_of_a_stock_llama() -> None:
    model = Transformer(11, 1, 2, 8)
    block = {
        "input_layernorm": (8,),
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (8, 8),
        "self_attn.v_proj": (8, 8),
        "self_attn.o_proj": (8, 8),
        "post_attention_layernorm": (8,),
        "mlp.gate_proj": (128, 8),
        "mlp.up_proj": (128, 8),
        "mlp.down_proj": (8, 128),
    }
    expected = {f"layers.0.{name}.weight": shape for name, shape in block.items()}
    expected |= {"embed_tokens.weight": (11, 8), "norm.weight": (8,), "lm_head.weight": (11, 8)}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


def test_every_matrix_starts_at_std_0_02_whatever_its_depth_and_every_gain_at_1() -> None:
    model = Transformer(200, 6, 4, 64, generator=seeded(0))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.06), name
            assert abs(parameter.mean().item()) < 0.02 * 5 / math.sqrt(parameter.numel()), name


def test_a_tied_head_is_the_embedding_table() -> None:
    tied = Transformer(11, 1, 2, 8, tie_embeddings=True, generator=seeded(0))
    assert tied.head_weight is tied.embedding_weight
    untied = Transformer(11, 1, 2, 8, generator=seeded(0))
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 11 * 8
    assert not torch.equal(untied.head_weight, untied.embedding_weight)
    for name, parameter in tied.named_parameters():
        assert torch.equal(parameter, dict(untied.named_parameters())[name]), name


def test_one_seed_gives_one_trunk_whatever_objective_is_put_around_it() -> None:
    torch.manual_seed(1)
    plain = GPT(Transformer(11, 2, 2, 8, generator=seeded(7)))
    torch.manual_seed(2)  # the global generator must not matter
    auxiliary = seeded(8)
    latent = NextLat(Transformer(11, 2, 2, 8, generator=seeded(7)), dynamics=16, generator=auxiliary)
    for (name, one), (_, other) in zip(plain.model.named_parameters(), latent.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    other_seed = Transformer(11, 2, 2, 8, generator=seeded(9))
    assert not torch.equal(other_seed.embedding_weight, plain.model.embedding_weight)


def test_without_a_generator_the_global_seed_decides() -> None:
    torch.manual_seed(3)
    one = Transformer(11, 1, 2, 8)
    torch.manual_seed(3)
    other = Transformer(11, 1, 2, 8)
    assert torch.equal(one.head_weight, other.head_weight)


def test_init_normal_leaves_gains_and_draws_in_order() -> None:
    layer = torch.nn.Linear(3, 2)
    bias = layer.bias.detach().clone()
    init_normal(layer, seeded(5))
    assert torch.equal(layer.bias, bias)
    torch.testing.assert_close(layer.weight.detach(), torch.empty(2, 3).normal_(0.0, 0.02, generator=seeded(5)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"width": -4}, "width is -4"),
        ({"n_heads": 3}, "n_heads = 3 does not split width = 8 into even head widths; .* multiple of 6"),
        ({"n_heads": 8}, "multiple of 16"),  # head width 1 cannot be rotated
        ({"width": 6}, "multiple of 4"),  # head width 3
    ],
)
def test_bad_sizes_name_the_value_and_the_fix(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(NextLatError, match=message):
        Transformer(**{"vocab_size": 11, "n_layers": 1, "n_heads": 2, "width": 8} | sizes)


def test_a_vocabulary_of_one_token_has_logits_and_no_loss() -> None:
    model = Transformer(1, 1, 1, 2, generator=seeded(0))
    tokens = torch.zeros(1, 3, dtype=torch.long)
    terms = NextLat(model, horizon=1)(Batch(tokens, tokens))
    assert terms["ce"].sum.item() == 0.0
    assert terms["kl_1"].sum.item() == 0.0


@pytest.mark.parametrize("packed", [False, True])
def test_bf16_autocast_keeps_the_residual_stream_in_fp32(packed: bool) -> None:
    model, tokens = Transformer(11, 2, 2, 8, generator=seeded(0)), random_tokens(2, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]] * 2) if packed else None
    with torch.autocast("cpu", torch.bfloat16):
        h = model.hidden_states(tokens, documents)
    assert h.dtype is torch.float32
    torch.testing.assert_close(h, model.hidden_states(tokens, documents), rtol=0.1, atol=0.05)
