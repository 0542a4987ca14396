"""Arms that are compared compute the same thing, and floors are what a hand calculation gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nextlat.batch import Batch
from nextlat.bench import attention, belief, by_hand, floors, loops, loss
from nextlat.model.attention import attend, document_layout
from nextlat.model.trunk import feed_forward_width
from nextlat.objectives import total_loss
from tests.objectives.cases import assert_same_gradients, gradients

SHAPE = loops.Shape(n_layers=2, width=16, n_heads=2, vocab=13, rows=3, length=7)
SIZES = loss.Sizes(vocab=31, width=8, rows=3, length=9)


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("name", ["recomputed", "ours"])
def test_the_losses_of_all_arms_and_their_gradients_are_equal(name: str, horizon: int) -> None:
    expected = loss.gradients(loss.materialised, loss.make_inputs(SIZES, horizon, dtype=torch.float64))
    found = loss.gradients(loss.ARMS[name], loss.make_inputs(SIZES, horizon, dtype=torch.float64))
    assert len(found) == 1 + 2 + horizon
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_kl_of_the_reference_is_from_the_true_to_the_predicted_law() -> None:
    inputs = loss.make_inputs(SIZES, 2, dtype=torch.float64)
    p, q = (torch.softmax(s @ inputs.weight.T, -1) for s in (inputs.hidden[:, 2:], inputs.states[1][:, 2:]))
    found = loss.materialised(inputs)[2]
    assert float(found.detach()) == pytest.approx(float((p * (p / q).log()).sum().detach()), rel=1e-12)


def test_no_gradient_of_the_kl_reaches_the_head_or_the_teacher() -> None:
    for losses in (loss.materialised, loss.recomputed):
        inputs = loss.make_inputs(SIZES, 1)
        made = torch.autograd.grad(losses(inputs)[1], inputs.live())
        assert [bool(gradient.any()) for gradient in made] == [False, False, True]


def test_a_frozen_head_gets_no_gradient() -> None:
    for losses in loss.ARMS.values():
        assert len(loss.gradients(losses, loss.make_inputs(SIZES, 1, head_live=False))) == 3


def test_head_products_equal_the_hand_calculation() -> None:
    # 27 positions x 3; one step reaches 24 positions, two reach 24 + 21; 8 * 31 multiply-adds each
    assert loss.head_products(SIZES, 1) == 248 * (81 + 2 * 24)
    assert loss.head_products(SIZES, 2) == 248 * (81 + 2 * 45)
    assert loss.head_products(SIZES, 2, recompute=True) == 248 * (81 + 3 * 45)


def test_the_least_work_has_the_products_of_the_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loss.least_work(loss.make_inputs(SIZES, 2))()
    in_place = 27 * 248  # the head's gradient is added up in place, which the counter does not see
    assert counter.get_total_flops() == 2 * (loss.head_products(SIZES, 2) - in_place)


def test_dense_and_packed_attention_are_equal() -> None:
    lengths = (3, 9, 1, 7)
    documents = attention.document_ids(lengths)
    assert documents.tolist() == [[0] * 3 + [1] * 9 + [2] + [3] * 7]
    inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in attention.make_inputs(20, 8, 2)]
    mask, layout = attention.dense_mask(documents), document_layout(documents)
    expected = attention.forward_backward(lambda q, k, v: attention.dense(q, k, v, mask), inputs)
    found = attention.forward_backward(lambda q, k, v: attend(q, k, v, layout), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    alone = [
        torch.cat(parts, 2).transpose(1, 2) for parts in zip(*attention.kernel_alone(inputs, lengths)(), strict=True)
    ]
    torch.testing.assert_close(alone, expected[1:], rtol=1e-10, atol=1e-12)


def test_the_dense_mask_is_causal_inside_documents() -> None:
    mask = attention.dense_mask(torch.tensor([[4, 4, 9, 4]]))
    assert mask.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]]


def test_attention_limits_equal_the_hand_calculation() -> None:
    assert attention.products_limit((2, 1)) == 9 / 4  # 3 + 1 pairs of 9
    # one layer of width 16: 4 * 256 + 3 * 16 * 128 in the block, 16 * 13 in the head, for 3 tokens
    shape = loops.Shape(1, 16, 2, 13, 1, 3)
    linear = 3 * (1024 + 6144 + 208)
    assert attention.step_limit(shape, (2, 1)) == (linear + 2 * 16 * 9) / (linear + 2 * 16 * 4)


def found_gradients(step: loops.Step, model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    value = float(step())
    return value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_bare_loop_is_our_model() -> None:
    batch = loops.random_batch(SHAPE)
    objective, bare = loops.ours_objective("gpt", SHAPE), loops.bare_llama(SHAPE)
    ours = found_gradients(loops.objective_step(objective, batch), objective.model)
    other = found_gradients(loops.plain_step(bare, bare, batch), bare)
    assert ours[0] == pytest.approx(other[0], abs=1e-6)
    assert_same_gradients(ours[1], other[1], atol=1e-6)
    for name, parameter in objective.model.named_parameters():  # the update too
        torch.testing.assert_close(parameter, bare.get_parameter(name), rtol=0, atol=1e-6)


def test_the_hugging_face_loop_is_our_model() -> None:
    pytest.importorskip("transformers")
    batch = loops.random_batch(SHAPE)
    objective, stock = loops.ours_objective("gpt", SHAPE), loops.hf_llama(SHAPE)
    ours = found_gradients(loops.objective_step(objective, batch), objective.model)
    step = loops.plain_step(stock, lambda tokens: stock(input_ids=tokens, use_cache=False).logits, batch)
    other = found_gradients(step, stock)
    assert ours[0] == pytest.approx(other[0], abs=1e-6)
    assert_same_gradients(loops.hf_names(ours[1]), other[1], atol=1e-6)


def test_the_gpt2_shaped_loop_is_causal_and_has_its_own_parameter_count() -> None:
    model = loops.GPT2Shaped(SHAPE)
    assert sum(p.numel() for p in model.parameters()) == 2 * (12 * 256 + 2 * 16) + (13 + 7) * 16 + 16
    tokens = loops.random_batch(SHAPE).tokens
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 13
    one, other = model(tokens), model(changed)
    torch.testing.assert_close(one[:, :4], other[:, :4])
    assert not torch.allclose(one[:, 4:], other[:, 4:])


def test_every_loop_starts_from_a_random_batch_whose_targets_follow() -> None:
    batch = loops.random_batch(SHAPE)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])


def test_train_floors_equal_the_hand_calculation() -> None:
    assert feed_forward_width(16) == 128
    block = 4 * 16 * 16 + 3 * 16 * 128
    assert SHAPE.linear_products == 2 * block + 16 * 13
    # scores and mixture: 2 * width for each of 1 + ... + 7 pairs, 2 layers, 3 rows
    assert SHAPE.attention_products == 2 * 3 * 2 * 16 * 28
    gpt = 3 * (21 * SHAPE.linear_products + SHAPE.attention_products)
    assert floors.gpt_products(SHAPE) == gpt
    dynamics = 32 * 5 + 5 * 5 + 5 * 16
    extra = 3 * (6 + 5) * (3 * dynamics + 2 * 16 * 13)  # steps reach 6 and 5 positions of 7
    assert floors.nextlat_extra_products(SHAPE, 2, 5) == extra
    assert floors.nextlat_floor(SHAPE, 2, 5) == 1 + extra / gpt


def test_the_floors_of_the_stated_setting_are_the_published_ones() -> None:
    shape = loops.Shape(6, 256, 4, 1_000, 8, 128)
    assert floors.nextlat_floor(shape, 1, 256) == pytest.approx(1.09, abs=0.005)
    assert floors.nextlat_floor(shape, 4, 256) == pytest.approx(1.34, abs=0.005)


@pytest.mark.parametrize(("length", "queries"), [(6, 2), (7, 2), (7, 64)])
def test_the_gradients_made_by_hand_are_those_of_autograd(length: int, queries: int) -> None:
    shape = SHAPE._replace(length=length)
    batch, model, other = loops.random_batch(shape), loops.trunk(shape), loops.trunk(shape)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():  # gains other than 1, and scores and gates that are far from linear
        for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
            same.copy_(parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.2))
    logits = other(batch.tokens).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    wanted = gradients(expected, other)
    step = by_hand.ByHand(model, shape, batch, queries)
    for _ in range(2):  # nothing is left over from the call before
        loss, found = found_gradients(step, model)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            assert float((gradient - wanted[name]).norm()) < 1e-5 * float(wanted[name].norm()), name


def test_the_loop_by_hand_trains_our_model() -> None:
    batch = loops.random_batch(SHAPE)
    ours, other = loops.ours_step("gpt", SHAPE, batch), by_hand.by_hand_step(SHAPE, batch)
    losses = [(float(ours()), float(other())) for _ in range(3)]
    assert losses[2][0] < losses[0][0]
    for one, same in losses:
        assert one == pytest.approx(same, abs=1e-6)


def test_the_loop_over_sequences_is_the_loss_of_bst() -> None:
    batch = belief.closed_batch(SHAPE)
    assert (batch.targets[:, -1] == 0).all()
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    ours, looped = (belief.make_bst(SHAPE).double() for _ in range(2))
    made = total_loss(ours(batch))
    expected = gradients(made, ours)
    value = belief.looped_loss(looped, batch)
    assert float(value) == pytest.approx(float(made.detach()), rel=1e-6)  # the loop adds up in fp32
    found = {name: p.grad for name, p in looped.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected, atol=1e-10)
    # 28 pairs of a closed row of 7, two predictions each
    assert int(ours.counts(batch)["pair"]) == 3 * 28 * 2


def test_a_packed_step_with_a_dense_mask_has_the_loss_of_ours() -> None:
    results = {r.name: r for r in attention.train_step((3, 9, 1, 7), attention.PLANS["tiny"])}
    assert results["train step, ragged: difference of the losses"].met


def test_documents_change_the_loss_of_a_step() -> None:
    batch = loops.random_batch(SHAPE)
    packed = Batch(batch.tokens, batch.targets, (torch.arange(7) >= 3).long().expand(3, 7))
    one, other = (float(loops.ours_step("gpt", SHAPE, b)()) for b in (batch, packed))
    assert one != other
