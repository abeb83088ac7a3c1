"""rms_norm and swiglu are transformers' own to rounding, alone and inside every model family."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, make_prompt, save_pictures, tiny_policy
from torch import nn
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from cosmo_fast import ops
from cosmo_fast.models import attention, fused
from cosmo_fast.models.adapter import add_adapter
from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Plan

EPS = 1e-6
# Whole steps of every type, parts of one, one element, and none; several blocks of the weight's gradient.
SHAPES = [(1, 1), (0, 5), (3, 15), (2, 5, 33), (1, 64), (130, 96), (7, 1000)]
CASES = {
    "rms_norm": (ops.rms_norm, ops.rms_norm_reference, lambda shape: shape[-1:], (EPS,)),
    "swiglu": (ops.swiglu, ops.swiglu_reference, lambda shape: shape, ()),
}


def draw(name, shape, dtype=torch.float64, seed=0):
    """Two arguments and an incoming gradient; values differ in size from row to row."""
    generator = torch.Generator().manual_seed(seed)
    second = CASES[name][2](shape)
    size = torch.randn(*shape[:-1], 1, generator=generator, dtype=torch.float64).exp()
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * size * 2
    other = torch.randn(second, generator=generator, dtype=torch.float64) + 0.5
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [v.to(dtype) for v in (x, other, grad)]


def outputs(f, arguments, extra, grad):
    leaves = [a.detach().clone().requires_grad_() for a in arguments]
    out = f(*leaves, *extra)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_value_and_every_gradient_are_the_references_in_fp64(name, shape):
    ours, reference, _, extra = CASES[name]
    *arguments, grad = draw(name, shape)
    for a, b in zip(outputs(ours, arguments, extra, grad), outputs(reference, arguments, extra, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    f, _, _, extra = CASES[name]
    x, other, _ = draw(name, (3, 5))
    assert torch.autograd.gradcheck(lambda a, b: f(a, b, *extra), (x.requires_grad_(), other.requires_grad_()))


@pytest.mark.parametrize("dtype, factor", [(torch.bfloat16, 1.05), (torch.float32, 1.1)])
@pytest.mark.parametrize("shape", [(130, 96), (40, 1000), (700, 256)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_error_is_at_most_that_of_transformers_operations(name, shape, dtype, factor):
    ours, reference, _, extra = CASES[name]
    *arguments, grad = draw(name, shape, dtype)
    truth = outputs(reference, [a.double() for a in arguments], extra, grad.double())
    theirs = outputs(reference, arguments, extra, grad)
    for a, b, t in zip(outputs(ours, arguments, extra, grad), theirs, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - t).norm() <= factor * (b.double() - t).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_one_thread_and_two_and_strided_arguments_give_the_same_bits(name, dtype):
    ours, _, _, extra = CASES[name]
    *arguments, grad = draw(name, (700, 257), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(outputs(ours, arguments, extra, grad))
    finally:
        torch.set_num_threads(before)
    wide = [torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0] for v in (*arguments, grad)]
    assert not any(v.is_contiguous() for v in wide)
    leaves = [v.requires_grad_() for v in wide[:2]]
    strided = ours(*leaves, *extra)
    results.append([strided.detach(), *torch.autograd.grad(strided, leaves, wide[2])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_and_missing_values_go_the_way_of_the_reference(dtype):
    big = 3e38 if dtype != torch.float64 else 1e308
    gate = torch.tensor([0.0, -0.0, 100, -100, 800, -800, big, -big, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    up = torch.ones_like(gate)
    out, wanted = ops.swiglu(gate, up), ops.swiglu_reference(gate, up)
    torch.testing.assert_close(out, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-30, equal_nan=True)
    x = torch.stack([torch.zeros(5), torch.tensor([1.0, torch.nan, 2, 3, 4]), torch.full((5,), 1e-12)]).to(dtype)
    out, weight = ops.rms_norm(x, torch.ones(5, dtype=dtype), EPS), torch.ones(5, dtype=dtype)
    torch.testing.assert_close(out, ops.rms_norm_reference(x, weight, EPS), equal_nan=True)


def test_a_frozen_weight_gets_no_gradient():
    x, weight, grad = draw("rms_norm", (130, 96), torch.float32)
    wanted = outputs(ops.rms_norm, (x, weight), (EPS,), grad)[1]
    ops.rms_norm(x.requires_grad_(), weight, EPS).backward(grad)
    assert torch.equal(x.grad, wanted) and weight.grad is None


def test_wrong_arguments_are_refused_with_their_shapes():
    x = torch.ones(2, 3)
    for bad in (torch.ones(4), torch.ones(3).bfloat16(), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"\(2, 3\) torch.float32"):
            ops.rms_norm(x, bad, EPS)
    for bad in (torch.ones(3), torch.ones(2, 3).double()):
        with pytest.raises(ValueError, match=r"\(2, 3\) torch.float32"):
            ops.swiglu(x, bad)
    with pytest.raises(ValueError, match="float16"):
        ops.swiglu(x.half(), x.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, weight, grad = draw("rms_norm", (3, 2, 33), dtype)
    _, up, _ = draw("swiglu", (3, 2, 33), dtype)
    x, weight, up = (v.requires_grad_() for v in (x, weight, up))
    torch.library.opcheck(torch.ops.cosmo_fast.rms_norm, (x, weight, EPS))
    torch.library.opcheck(torch.ops.cosmo_fast.swiglu, (x, up))
    x, weight, up = (v.detach() for v in (x, weight, up))
    scale = torch.ops.cosmo_fast.rms_norm(x, weight, EPS)[1]
    for wanted in (True, False):
        torch.library.opcheck(torch.ops.cosmo_fast.rms_norm_backward, (grad, x, weight, scale, wanted))
    torch.library.opcheck(torch.ops.cosmo_fast.swiglu_backward, (grad, x, up))


def count(model):
    return {kind: sum(type(m) is kind for m in model.modules()) for kind in FUSED}


FUSED = (fused.RMSNorm, fused.GatedMLP, fused.PatchProjection, attention.Attention, attention.VisionAttention)
# Of the models in tiny.py, text and tower; layer norms, GELU MLPs and InternVL's tower stay.
WANTED = {
    "qwen2_vl": (5, 2, 1, 2, 2), "qwen2_5_vl": (10, 4, 1, 2, 2), "qwen3_vl": (13, 3, 1, 3, 3),
    "internvl": (5, 2, 0, 2, 0), "qwen2": (5, 2, 0, 2, 0), "qwen3": (9, 2, 0, 2, 0), "llama": (5, 2, 0, 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_its_deepcopy_and_its_peft_form_compute_as_the_plain_one(family, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    policy, _ = tiny_policy(family=family)
    monkeypatch.setattr("cosmo_fast.models.policy.fuse", lambda model: None)
    plain, _ = tiny_policy(family=family)
    assert tuple(count(policy.model).values()) == WANTED[family] and not any(count(plain.model).values())
    assert [*policy.model.state_dict()] == [*plain.model.state_dict()]
    pictures = save_pictures(tmp_path)
    prompts = [make_prompt(policy, [7, pictures[0], 8, 9]), make_prompt(policy, [7, pictures[1], 15, 16])]
    rng = np.random.default_rng(0)
    plan = Plan(prompts, [[rng.integers(7, 97, n) for n in group] for group in ([3, 8, 1], [5, 4])])

    def run(policy):
        logps = policy.logprobs(plan, Vision(policy).features(plan.media))[0]
        learning = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(logps.sum(), list(learning.values()), allow_unused=True)
        return logps.detach(), dict(zip(learning, grads, strict=True))

    def compare(a, b):
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-5)
        assert a[1].keys() == b[1].keys()
        for name, grad in b[1].items():
            assert (a[1][name] is None) == (grad is None), name
            assert grad is None or (a[1][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name

    wanted = run(plain)
    compare(run(policy), wanted)
    original = policy.model
    policy.model = copy.deepcopy(original)
    for parameter in original.parameters():
        parameter.data.fill_(torch.nan)  # a copy that computed with the original's weights would show it
    compare(run(policy), wanted)
    assert count(policy.model) == count(original)
    for either in (policy, plain):
        add_adapter(either, r=3, seed=1)
        for parameter in either.adapter.parameters.values():
            parameter.data.fill_(0.02)
    assert [*policy.adapter.parameters] == [*plain.adapter.parameters]
    compare(run(policy), run(plain))


def test_patches_are_projected_as_the_convolution_does_and_other_sizes_are_refused():
    torch.manual_seed(0)
    for bias in (True, False):
        conv = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=bias).double()
        product = copy.deepcopy(conv)
        fused.fuse(nn.Sequential(product))
        assert type(product) is fused.PatchProjection
        x = torch.randn(5, 3, 2, 4, 4, dtype=torch.float64)
        a, b = (outputs(m, (x,), (), torch.ones(5, 8, 1, 1, 1).double()) for m in (product, conv))
        for ours, theirs in zip(a, b, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match=r"\(5, 3, 2, 8, 4\)"):
            product(torch.randn(5, 3, 2, 8, 4, dtype=torch.float64))
    overlapping = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 2, 2))
    fused.fuse(nn.Sequential(overlapping))
    assert type(overlapping) is nn.Conv3d


def test_only_modules_that_compute_the_same_are_replaced():
    sizes = SimpleNamespace(hidden_size=8, intermediate_size=12, hidden_act="silu")
    gelu = SimpleNamespace(**{**vars(sizes), "hidden_act": "gelu_pytorch_tanh"})

    class Gated(Qwen2MLP):
        def forward(self, x):
            return self.down_proj(functional.silu(self.up_proj(x)) * self.gate_proj(x))

    zero = Qwen2MLP(gelu)
    nn.init.zeros_(zero.down_proj.weight)  # any activation gives the same here
    norm = GemmaRMSNorm(8)
    norm.variance_epsilon = norm.eps
    kept = [norm, GemmaMLP(gelu), Gated(sizes), zero]
    fused.fuse(model := nn.ModuleList([*kept, Qwen2RMSNorm(8), Qwen2MLP(sizes)]))
    assert [type(m) in FUSED for m in model] == [False] * 4 + [True] * 2
