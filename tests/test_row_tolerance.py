"""Rows with next to no gradient leave the products: what that costs is bounded, reported, or right in expectation."""

import pytest
import torch
from devices import DEVICE

from cosmo_fast.objectives import TokenBatch, grpo
from cosmo_fast.ops import RowTolerance, linear_policy_loss

N, D, V = 60, 6, 40


def _case(confident=6.0):
    """A policy that is sure of most of its tokens, as a trained one is."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N, D), (V, D)))
    targets = torch.randint(0, V, (N,), generator=g)
    hidden = hidden + confident * torch.rand(N, 1, generator=g) * torch.nn.functional.normalize(weight, dim=1)[targets]
    batch = TokenBatch(
        targets,
        torch.full((N,), 1 / N),
        torch.arange(N) // 10,
        torch.randn(6, generator=g, dtype=torch.float64).repeat_interleave(10),
        torch.zeros(N, dtype=torch.float64),
    )
    hidden, weight = hidden.to(DEVICE), weight.to(DEVICE)
    batch = TokenBatch(**{name: x.to(DEVICE) for name, x in vars(batch).items() if x is not None})
    batch.old_logp = linear_policy_loss(hidden, weight, batch, grpo()).logp
    return hidden.requires_grad_(), weight.requires_grad_(), batch


def _run(row_tolerance, entropy_coef=0.0, temperature=1.0, chunk_rows=4096, case=None):
    hidden, weight, batch = case or _case()
    objective = grpo(entropy_coef=entropy_coef)
    options = {"temperature": temperature, "chunk_rows": chunk_rows, "row_tolerance": row_tolerance}
    output = linear_policy_loss(hidden, weight, batch, objective, **options)
    return output, torch.autograd.grad(output.loss, (hidden, weight))


@pytest.mark.parametrize("chunk_rows", [17, 4096])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_error_of_dropped_rows_is_within_the_reported_bounds(share, temperature, entropy_coef, chunk_rows):
    options = {"entropy_coef": entropy_coef, "temperature": temperature, "chunk_rows": chunk_rows}
    exact, (dx, dw) = _run(None, **options)
    output, (dx_less, dw_less) = _run(share, **options)
    assert output.dropped["rows"] > 0 and exact.dropped is None
    largest = torch.linalg.vector_norm(_case()[1].detach(), dim=1).max()
    assert 0 < (dw - dw_less).norm() <= output.dropped["dw"]
    assert 0 < (dx - dx_less).norm() <= output.dropped["dx"] * largest
    for name in ("loss", "logp", "entropy"):
        assert torch.equal(getattr(exact, name), getattr(output, name))
    assert all(torch.equal(exact.metrics[k], output.metrics[k]) for k in exact.metrics)


def test_the_share_is_of_the_gradients_mass():
    hidden, weight, batch = case = _case()
    _, (dx, _) = _run(0.2, case=case)
    logp = batch.old_logp
    size = batch.advantage.abs() * -torch.expm1(logp)  # the ratio is 1
    gone = dx.abs().sum(1) == 0
    assert size[gone].sum() <= 0.2 * size.sum() < size[gone].sum() + size[~gone].min()
    assert size[gone].max() <= size[~gone].min()


def test_kept_by_chance_the_gradient_is_right_in_expectation_and_seeded():
    case = _case()
    _, exact = _run(None, case=case)
    draws = [_run(RowTolerance(0.5, unbiased=True, seed=s), case=case) for s in range(400)]
    for i in range(2):
        values = torch.stack([gradients[i] for _, gradients in draws])
        error = (values.mean(0) - exact[i]).norm()
        spread = (values - exact[i]).square().flatten(1).sum(1).mean().sqrt()  # root mean square of one draw
        assert 0 < error < 2.5 * spread / len(draws) ** 0.5
        if i == 1:
            assert spread <= draws[0][0].dropped["dw"]
    assert draws[0][0].dropped["rows"] > 0
    again = _run(RowTolerance(0.5, unbiased=True, seed=3), case=case)[1]
    assert all(torch.equal(a, b) for a, b in zip(again, draws[3][1], strict=True))
    assert not torch.equal(draws[3][1][0], draws[4][1][0])


@pytest.mark.parametrize("unbiased", [False, True])
def test_a_share_of_zero_and_a_gradient_of_zero_change_nothing(unbiased):
    case = _case()
    for a, b in zip(_run(None, case=case)[1], _run(RowTolerance(0.0, unbiased), case=case)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    case[2].advantage.zero_()
    output, gradients = _run(RowTolerance(0.3, unbiased), case=case)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    assert output.dropped["dw"] == 0 and output.dropped["dx"] == 0


def test_costs_count_rows_that_had_a_gradient_and_stay_finite():
    size = torch.tensor([0.0, 0.0, 1e-42, 1.0, 1.0, 1.0], device=DEVICE)
    for unbiased in (False, True):
        tolerance = RowTolerance(0.1, unbiased)
        factor, costs = tolerance.thin(size, torch.ones_like(size), tolerance.generator(size.device))
        assert costs["rows"] == 1 and factor[3:].eq(1).all() and factor.isfinite().all()
        assert all(0 <= cost < 1e-20 or name == "rows" for name, cost in costs.items())


def test_a_gradient_that_is_nan_is_not_left_out():
    size = torch.tensor([0.1, float("nan"), 1.0], device=DEVICE)
    assert RowTolerance(0.5).thin(size, torch.ones_like(size), None)[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_costs_of_many_chunks_add_up_to_those_of_one(unbiased):
    tolerance, size = RowTolerance(0.01, unbiased), torch.tensor([0.01, 1.0], device=DEVICE, dtype=torch.float64)
    one = tolerance.thin(size.repeat(64), torch.ones(128, device=DEVICE), tolerance.generator(size.device))[1]
    total = tolerance.nothing(size.device)
    for _ in range(64):
        costs = tolerance.thin(size, torch.ones(2, device=DEVICE), tolerance.generator(size.device))[1]
        total = {name: tolerance.add(name, total[name], cost) for name, cost in costs.items()}
    for name in ("dw", "dx"):
        torch.testing.assert_close(total[name], one[name])


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_outside_of_zero_to_one_is_refused(share):
    with pytest.raises(ValueError, match="row_tolerance"):
        _run(share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_dtype_goes_through(dtype):
    hidden, weight, batch = _case()
    given = {k: x.float() if x.is_floating_point() else x for k, x in vars(batch).items() if x is not None}
    case = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    output, gradients = _run(RowTolerance(0.1, unbiased=True), case=(*case, TokenBatch(**given)), entropy_coef=0.01)
    assert output.dropped["rows"] > 0 and all(g.dtype == dtype and g.isfinite().all() for g in gradients)
