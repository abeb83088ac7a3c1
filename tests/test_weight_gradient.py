"""dW: where it is added, and how a CPU makes it from a product that is turned."""

import math

import pytest
import torch
from loss_case import assert_near as _assert_near
from loss_case import double as _double
from loss_case import grads as _grads
from loss_case import loss_case

from cosmo_fast import ops
from cosmo_fast.objectives import Objective, grpo, sft
from cosmo_fast.ops import linear_policy_loss
from cosmo_fast.ops.linear_policy_loss import linear_policy_loss_reference


@pytest.mark.parametrize("chunk_rows", [7, 4096])
@pytest.mark.parametrize("tied", [False, True])
def test_dw_may_be_added_to_the_weights_gradient_itself(tied, chunk_rows):
    hidden, weight, bias, batch = loss_case()
    results = []
    for accumulate in (False, True):
        w, b = weight.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
        h = w[batch.targets] * 1.5 if tied else hidden.detach().clone().requires_grad_()  # an embedding of the tokens
        for _ in range(2):
            options = {"bias": b, "chunk_rows": chunk_rows, "accumulate_weight_grad": accumulate}
            linear_policy_loss(h, w, batch, grpo(0.9), **options).loss.backward(retain_graph=tied and not accumulate)
            h = w[batch.targets] * 1.5 if tied else h
        results.append([w.grad, b.grad, *([] if tied else [h.grad])])
    _assert_near(*results)


def test_dw_in_the_weights_gradient_keeps_its_dtype_and_needs_no_second_matrix():
    hidden, weight, _, batch = loss_case(16, 32, 300, torch.bfloat16)
    for chunk_rows in (5, 4096):
        weight.grad = None
        expected = _grads(linear_policy_loss(hidden, weight, batch, sft(), chunk_rows=chunk_rows).loss, weight)[0]
        options = {"chunk_rows": chunk_rows, "accumulate_weight_grad": True}
        linear_policy_loss(hidden, weight, batch, sft(), **options).loss.backward()
        assert weight.grad.dtype == torch.bfloat16
        torch.testing.assert_close(weight.grad, expected, rtol=1e-2, atol=1e-4)


def test_dw_is_not_added_where_something_else_must_see_it():
    hidden, weight, _, batch = loss_case()

    def run(w, backward=lambda loss: loss.backward()):
        backward(linear_policy_loss(hidden, w, batch, sft(), accumulate_weight_grad=True).loss)

    with pytest.raises(ValueError, match="not a leaf"):
        run(weight * 1)
    hooked = weight.detach().clone().requires_grad_()
    hooked.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="hooks"):
        run(hooked)
    managed = weight.detach().clone().requires_grad_()
    managed.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed"):
        run(managed)
    with pytest.raises(RuntimeError, match="gradient of 1"):
        run(weight, lambda loss: (2 * loss).backward())
    with pytest.raises(RuntimeError, match="retain_graph"):
        run(weight, lambda loss: loss.backward(retain_graph=True))

    def after_zero_grad(loss):
        weight.grad = None
        loss.backward()

    with pytest.raises(RuntimeError, match="zero_grad before the forward"):
        run(weight, after_zero_grad)


@pytest.mark.parametrize("n", [127, 128, 700])
@pytest.mark.parametrize("columns", [100, 4097])
def test_a_turned_dw_is_the_same(n, columns):
    hidden, weight, _, batch = loss_case(n, 24, columns, torch.bfloat16, scale=0.3)
    wide = _double(batch)
    truth = _grads(linear_policy_loss_reference(hidden.double(), weight.double(), wide, sft()), weight)[0].double()
    eager = _grads(linear_policy_loss_reference(hidden, weight, batch, sft()), weight)[0].double()
    for chunk_rows in (4096, 600):
        ours = _grads(linear_policy_loss(hidden, weight, batch, sft(), chunk_rows=chunk_rows).loss, weight)[0].double()
        assert (ours - truth).norm() <= 1.1 * (eager - truth).norm()


@pytest.mark.parametrize(("m", "d"), [(1, 1), (37, 5), (64, 32), (100, 70)])
def test_a_product_is_turned_into_the_gradient_bit_by_bit(m, d):
    x = torch.randn(d, m + 9, generator=torch.Generator().manual_seed(0)).bfloat16()[:, :m]
    for out in (torch.full((m, d), math.nan, dtype=torch.bfloat16), torch.rand(m, d)):
        expected = x.t() if out.dtype == torch.bfloat16 else out + x.t().float()
        torch.library.opcheck(torch.ops.cosmo_fast.add_transposed_.default, (out.clone(), x))
        torch.ops.cosmo_fast.add_transposed_(out, x)
        assert torch.equal(out, expected)
    for args in ((torch.zeros(m, d + 1), x), (torch.zeros(m, d), x.float()), (torch.zeros(m, d).double(), x)):
        with pytest.raises(RuntimeError, match="must be"):
            torch.ops.cosmo_fast.add_transposed_(*args)


@pytest.mark.parametrize(("factor", "slack"), [(1 / 4, 1.1), (1 / 3, 1.5), (1 / 7, 1.5)])
def test_a_factor_of_the_loss_costs_one_rounding_of_a_bf16_gradient_and_a_power_of_two_none(factor, slack):
    hidden, weight, _, batch = loss_case(64, 24, 300, torch.bfloat16, scale=0.3)

    def errors(loss):
        found = _grads(factor * loss, hidden, weight)
        return [(g.double() - t).norm().item() for g, t in zip(found, truth, strict=True)]

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = _grads(factor * linear_policy_loss_reference(*wide, _double(batch), sft()), *wide)
    eager = errors(linear_policy_loss_reference(hidden, weight, batch, sft()))
    ours = errors(linear_policy_loss(hidden, weight, batch, sft()).loss)
    assert all(a <= slack * b for a, b in zip(ours, eager, strict=True)), (ours, eager)


def test_inference_mode_before_training_leaves_nothing_that_training_cannot_write_to():
    ops.empty_cache()
    hidden, weight, _, batch = loss_case()
    with torch.inference_mode():
        ops.linear_logprobs(hidden, weight, batch.targets)
    ops.linear_policy_loss(hidden, weight, batch, sft()).loss.backward()


def test_a_cpu_keeps_its_chunk_of_logits_for_the_next_call_and_no_more_than_a_bound(monkeypatch):
    import cosmo_fast.ops.linear_head as head

    ops.empty_cache()
    hidden, weight, _, batch = loss_case()
    first = ops.linear_policy_loss(hidden, weight, batch, sft()).logp
    (kept,) = head._kept
    assert torch.equal(ops.linear_policy_loss(hidden, weight, batch, sft()).logp, first)
    assert len(head._kept) == 1 and head._kept[0] is kept
    nested = []
    objective = Objective(
        "nested",
        lambda logp, entropy, b: nested.append(ops.linear_policy_loss(hidden, weight, batch, sft())) or (-logp, {}),
    )
    assert torch.equal(ops.linear_policy_loss(hidden, weight, batch, objective).logp, first), "two calls share nothing"
    monkeypatch.setattr(head, "KEPT_MIB", 0)
    ops.empty_cache()
    ops.linear_policy_loss(hidden, weight, batch, sft())
    assert head._kept == []
