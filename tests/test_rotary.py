"""rotary is transformers' apply_rotary_pos_emb to rounding, for any strides and head size."""

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from cosmo_fast import ops


def draw(tokens, heads, size, dtype=torch.float64, seed=0):
    """q, k, cos and sin, and incoming gradients; q and k lie in one tensor of heads, as a tower projects them."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(tokens, 2, 3, heads, size, generator=generator, dtype=torch.float64).to(dtype)
    angles = torch.rand(tokens, size // 2, generator=generator, dtype=torch.float64) * 7
    angles = torch.cat((angles, angles), -1)
    q, k, grads = both[:, 0, 0], both[:, 0, 1, :1], (both[:, 1, 0], both[:, 1, 1, :1])
    return q, k, angles.cos(), angles.sin(), grads


def theirs(q, k, cos, sin):
    return apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))


def outputs(f, q, k, cos, sin, grads):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    out = f(*leaves, cos, sin)
    return [x.detach() for x in out] + [*torch.autograd.grad(out, leaves, grads)]


@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 2), (5, 3, 24), (300, 4, 64), (7, 2, 66), (40, 2, 128)], ids=str)
@pytest.mark.parametrize("f", [ops.rotary, ops.rotary_reference])
def test_values_and_gradients_are_transformers_in_fp64_and_no_further_from_it_elsewhere(f, shape):
    *arguments, grads = draw(*shape)
    truth = outputs(lambda q, k, c, s: apply_rotary_pos_emb(q, k, c, s), *arguments, grads)
    for a, b in zip(outputs(f, *arguments, grads), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    for dtype, factor in ((torch.float32, 1.1), (torch.bfloat16, 1.0)) if shape[0] >= 40 else ():
        q, k, cos, sin, grads = draw(*shape, dtype)
        wide = [x.double() for x in grads]
        truth = outputs(theirs, q.double(), k.double(), cos, sin, wide)
        ours, other = outputs(f, q, k, cos, sin, grads), outputs(theirs, q, k, cos, sin, grads)
        for a, b, t in zip(ours, other, truth, strict=True):
            assert a.dtype == dtype and a.is_contiguous()
            assert (a.double() - t).norm() <= factor * (b.double() - t).norm() + 1e-12


def test_the_bits_of_a_row_depend_on_that_row_alone_and_not_on_the_number_of_threads():
    q, k, cos, sin, _ = draw(700, 4, 40, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.rotary(q, k, cos, sin))
    finally:
        torch.set_num_threads(before)
    single = [ops.rotary(*(x[i : i + 1] for x in (q, k, cos, sin))) for i in range(700)]
    alone = [torch.cat(x) for x in zip(*single, strict=True)]
    for a, b, c in zip(*results, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    q, k, cos, sin, _ = draw(5, 3, 24, dtype)
    for inverse in (False, True):
        arguments = (q.clone().requires_grad_(), k.clone().requires_grad_(), cos.float(), sin.float(), inverse)
        torch.library.opcheck(torch.ops.cosmo_fast.rotary, arguments)


def test_wrong_arguments_are_refused_with_their_shapes():
    q, k, cos, sin, _ = draw(5, 3, 24)
    for bad in ((q, k[:4], cos, sin), (q, k, cos[:, :12], sin[:, :12]), (q, k.float(), cos, sin), (q[0], k, cos, sin)):
        with pytest.raises(ValueError, match=r"are wanted, not \("):
            ops.rotary(*bad)
    with pytest.raises(ValueError, match="D even"):
        ops.rotary(*(x[..., :23] for x in (q, k, cos, sin)))
