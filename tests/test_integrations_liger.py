"""The drop-in against liger-kernel itself, on a CPU: loss, gradients, metrics, and the product that it saves."""

import inspect

import pytest
import torch
from flops import Flops

liger = pytest.importorskip("liger_kernel.chunked_loss")

from cosmo_fast.integrations import LigerFusedLinearGRPOLoss  # noqa: E402

B, T, D, V = 4, 6, 8, 33
TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def _case(dtype=torch.float32, lengths=(6, 4, 1, 5), seed=0):
    """The arguments of a call by name; a ratio near 1, on both sides of the clip; garbage under the mask."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    hidden, weight, bias = (normal(*shape).requires_grad_() for shape in ((B, T, D), (V, D), (V,)))
    ids = torch.randint(0, V, (B, T), generator=g)
    with torch.no_grad():
        logits = hidden.double() @ weight.double().t() + bias.double()
        logp = (logits / 0.9).log_softmax(-1).gather(2, ids[..., None])[..., 0]
    return {
        "_input": hidden,
        "lin_weight": weight,
        "selected_token_ids": ids,
        "attention_mask": (torch.arange(T) < torch.tensor(lengths)[:, None]).long(),
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.1]),
        "bias": bias,
        "ref_per_token_logps": (logp + normal(B, T, scale=0.4)).float(),
        "old_per_token_logps": (logp + normal(B, T, scale=0.4)).float(),
    }


def _run(module, case):
    leaves = [x for x in case.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    loss, metrics = module(**case)
    return loss, metrics, torch.autograd.grad(loss * 0.5, leaves)


def _assert_same(case, **options):
    options = {"temperature": 0.9, "max_completion_length": 7, "compiled": False, **options}
    loss, metrics, gradients = _run(liger.LigerFusedLinearGRPOLoss(**options), case)
    got_loss, got_metrics, got_gradients = _run(LigerFusedLinearGRPOLoss(**options), case)
    near = {"rtol": 2e-5, "atol": 2e-6, "check_dtype": False}  # Liger's logits are fp32 in every dtype
    torch.testing.assert_close(got_loss, loss, **near)
    torch.testing.assert_close(got_metrics, metrics, **near)
    torch.testing.assert_close(got_gradients, gradients, **near)
    assert any(g.abs().max() > 1e-3 for g in gradients)


def _full(loss_type, level="token", beta=0.0):
    """luspo counts the padding at the level of tokens, so it gets rows without any."""
    return {"lengths": (T,) * B} if loss_type == "luspo" and (level == "token" or beta) else {}


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_type", TYPES)
def test_loss_gradients_and_metrics_equal_those_of_liger(loss_type, dtype, level, beta):
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        with pytest.raises(ValueError, match="importance_sampling_level='sequence'"):
            LigerFusedLinearGRPOLoss(loss_type=loss_type, importance_sampling_level=level)
        return
    case = _case(dtype, **_full(loss_type, level, beta))
    high = {"epsilon_high": 1.1} if loss_type == "cispo" else {"epsilon_high": 0.28}
    _assert_same(case, loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_low=0.1, **high)


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("option", ["kl", "delta", "ratio", "sequence ratio", "ratio (B,)", "items", "temperatures"])
def test_every_option_has_the_result_of_liger(option, loss_type):
    case = _case(**_full(loss_type))
    options = {"beta": 0.1, "loss_type": loss_type}
    ratio = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) + 0.5
    if option == "kl":
        options["use_bias_correction_kl"] = True
    elif option == "delta":
        options["delta"] = 1.3
    elif "ratio" in option:
        case["vllm_is_ratio"] = {"ratio": ratio * case["attention_mask"] + 1 - case["attention_mask"]}.get(option)
        if case["vllm_is_ratio"] is None:
            case["vllm_is_ratio"] = ratio[:, :1] if option == "sequence ratio" else ratio[:, 0]
    elif option == "items":
        case["num_items_in_batch"] = torch.tensor(57)
    else:
        options |= {
            "sapo_temperature_pos": 0.7,
            "sapo_temperature_neg": 1.4,
            "vespo_k_pos": 1.0,
            "vespo_lambda_neg": 1.0,
        }
    _assert_same(case, **options)


def test_the_sequence_ratio_weighs_the_corrected_kl():
    _assert_same(_case(), loss_type="grpo", importance_sampling_level="sequence", beta=0.1, use_bias_correction_kl=True)


@pytest.mark.parametrize("without", ["old", "reference", "both"])
def test_a_missing_policy_is_the_one_at_hand(without):
    case = _case()
    if without != "reference":
        case["old_per_token_logps"] = None
    if without != "old":
        case["ref_per_token_logps"] = None
    _assert_same(case, beta=0.1, use_ref_model=without == "old")


def test_the_reference_may_come_as_hidden_states():
    case = _case()
    g = torch.Generator().manual_seed(5)
    shapes = {"ref_input": (B, T, D), "ref_weight": (V, D), "ref_bias": (V,)}
    case |= {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    case["ref_per_token_logps"] = None
    _assert_same(case, beta=0.1)
    case["ref_input"] = None
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        LigerFusedLinearGRPOLoss(beta=0.1)(**case)


def test_a_frozen_head_and_no_bias():
    case = _case()
    case["lin_weight"], case["bias"] = case["lin_weight"].detach(), None
    _assert_same(case, beta=0.1)


def test_three_products_where_liger_has_four():
    case, options = _case(lengths=(T,) * B), {"beta": 0.1, "compiled": False}
    counts = []
    for module in (LigerFusedLinearGRPOLoss(**options), liger.LigerFusedLinearGRPOLoss(**options)):
        with Flops(B * T, V, D) as count:
            _run(module, case)
        counts.append(count.total)
    assert counts == pytest.approx([3, 4])


def test_poison_under_the_mask_reaches_nothing():
    case = _case()
    expected = _run(LigerFusedLinearGRPOLoss(beta=0.1), case)
    hole = case["attention_mask"] == 0
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        case[name] = case[name].masked_fill(hole, torch.nan)
    torch.testing.assert_close(_run(LigerFusedLinearGRPOLoss(beta=0.1), case), expected, rtol=0, atol=0)
    assert _run(liger.LigerFusedLinearGRPOLoss(beta=0.1, compiled=False), case)[0].isnan()  # the fault that this avoids


def _hidden_case():
    """The reference as hidden states, near those of the policy; no bias."""
    case = _case()
    g = torch.Generator().manual_seed(5)
    near = {"ref_input": case["_input"], "ref_weight": case["lin_weight"]}
    case |= {name: x.detach() + 0.1 * torch.randn(x.shape, generator=g) for name, x in near.items()}
    case["ref_per_token_logps"] = case["bias"] = None  # Liger leaves a bias in fp32
    return case


def test_under_autocast_products_have_its_dtype_and_the_error_is_no_larger_than_that_of_liger():
    case, options = _hidden_case(), {"beta": 0.1, "compiled": False}
    truth = _run(LigerFusedLinearGRPOLoss(**options), case)[2]
    errors = []
    for module in (LigerFusedLinearGRPOLoss(**options), liger.LigerFusedLinearGRPOLoss(**options)):
        with torch.autocast("cpu", torch.bfloat16):
            gradients = _run(module, case)[2]
        assert all(g.dtype == torch.float32 for g in gradients)
        errors.append(sum((a - b).square().sum() for a, b in zip(gradients, truth, strict=True)).sqrt().item())
    assert 1e-3 < errors[0] <= 1.1 * errors[1]
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16"):
        LigerFusedLinearGRPOLoss(**options)(**case)


def test_the_arguments_are_those_of_liger():
    for name in ("__init__", "forward"):
        ours, theirs = (
            {k: p.default for k, p in inspect.signature(getattr(c, name)).parameters.items()}
            for c in (LigerFusedLinearGRPOLoss, liger.LigerFusedLinearGRPOLoss)
        )
        assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_type": "ppo"}, "ppo"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"delta": 1.1}, "delta"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be positive"),
        ({"sapo_temperature_neg": -1.0, "loss_type": "sapo"}, "sapo_temperature_neg must be positive"),
        ({"delta": -1.0, "loss_type": "cispo"}, "delta must be positive"),
        ({"importance_sampling_level": "word"}, "word"),
        ({"epsilon_low": 1.5}, "epsilon"),
    ],
)
def test_wrong_options_are_named_at_construction(options, match):
    with pytest.raises(ValueError, match=match):
        LigerFusedLinearGRPOLoss(**options)


def test_wrong_arguments_are_named_at_the_call():
    for change, match in (
        ({"vllm_is_ratio": torch.ones(B, T + 1)}, "vllm_is_ratio"),
        ({"attention_mask": torch.full((B, T), 0.5)}, "attention_mask"),
    ):
        with pytest.raises(ValueError, match=match):
            LigerFusedLinearGRPOLoss()(**{**_case(), **change})
    with pytest.raises(ValueError, match="luspo"):
        LigerFusedLinearGRPOLoss(loss_type="luspo")(**_case())
