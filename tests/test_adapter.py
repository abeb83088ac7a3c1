"""LoRA on the packed path is PEFT's on the padded one; the reference is the adapter switched off, or as it began."""

import json

import numpy as np
import pytest
import torch
from short_run import trainer, whole_and_resumed
from tiny import make_prompt, padded_logps, save_pictures, tiny_policy

peft = pytest.importorskip("peft")

from cosmo_fast.config import load_config  # noqa: E402
from cosmo_fast.models import load_policy  # noqa: E402
from cosmo_fast.models.adapter import add_adapter, load_adapter  # noqa: E402
from cosmo_fast.models.vision import Vision  # noqa: E402
from cosmo_fast.plan import Plan  # noqa: E402
from cosmo_fast.stages.rl import RLStage  # noqa: E402
from cosmo_fast.trainer import Trainer  # noqa: E402

NAMES = ("old_logps", "ref_logps")


def randomise(policy, seed=1):
    """An adapter that does something: B is drawn too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.adapter.parameters.values():
            parameter.normal_(0, 0.1, generator=generator)


@pytest.fixture
def case(tmp_path):
    policy, plain = tiny_policy()
    square, portrait, wide = save_pictures(tmp_path)
    prompts = [make_prompt(policy, [7, square, 8, 9]), make_prompt(policy, [7, portrait, 15, wide, 16])]
    rng = np.random.default_rng(0)
    responses = [[rng.integers(7, 97, n) for n in group] for group in ([3, 8, 1], [5, 4])]
    return policy, plain, prompts, responses


def packed(policy, prompts, responses, vision=None):
    plan = Plan(prompts, responses)
    return policy.logprobs(plan, (vision or Vision(policy)).features(plan.media))[0]


def test_lora_packed_equals_peft_on_the_padded_model_in_logprobs_and_gradients(case):
    policy, plain, prompts, responses = case
    add_adapter(policy, r=3, alpha=5)
    randomise(policy)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=policy.adapter.model.peft_config["default"].target_modules
    )
    theirs = peft.get_peft_model(plain, config)
    peft.set_peft_model_state_dict(theirs, policy.adapter.state())
    ours = packed(policy, prompts, responses)
    wanted = torch.cat(
        [padded_logps(plain, policy, p, r) for p, group in zip(prompts, responses, strict=True) for r in group]
    )
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    weights = torch.randn_like(ours.detach())
    (ours * weights).sum().backward()
    (wanted * weights).sum().backward()
    learning = {n: p.grad for n, p in policy.model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 2 * 7 and all(".lora_" in n and "language_model" in n for n in learning)
    for (name, ours), (_, b) in zip(
        learning.items(), [(n, p.grad) for n, p in plain.named_parameters() if p.requires_grad], strict=True
    ):
        assert (ours - b).norm() < 1e-5 * b.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_and_one_switched_off_are_the_base_model_bitwise(case, dtype):
    policy, _, prompts, responses = case
    policy.model.to(dtype)
    with torch.no_grad():
        base = packed(policy, prompts, responses)
        add_adapter(policy, r=3)
        assert {p.dtype for p in policy.adapter.parameters.values()} == {torch.float32}
        assert torch.equal(packed(policy, prompts, responses), base)
        policy.adapter.keep_reference(policy.adapter.state())
        randomise(policy)
        assert not torch.equal(changed := packed(policy, prompts, responses), base)
        with policy.adapter.reference():
            assert torch.equal(packed(policy, prompts, responses), base)
        policy.adapter.keep_reference(policy.adapter.state())
        randomise(policy, 2)
        later = packed(policy, prompts, responses)
        with policy.adapter.reference():
            assert torch.equal(packed(policy, prompts, responses), changed)
        assert torch.equal(packed(policy, prompts, responses), later)


def test_a_frozen_tower_stays_frozen_after_the_reference_and_its_adapter_learns_only_when_asked(case):
    policy, *_ = case
    add_adapter(policy, r=2, target_modules="all-linear")
    assert not policy.vision_frozen and len(policy.adapter.parameters) > 2 * 2 * 7
    policy.freeze_vision_tower(True)
    learning = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    policy.adapter.keep_reference(policy.adapter.state())
    with policy.adapter.reference():
        pass
    assert policy.vision_frozen and learning == [n for n, p in policy.model.named_parameters() if p.requires_grad]
    policy.freeze_vision_tower(False)
    visual = [n for n, p in policy.model.named_parameters() if p.requires_grad and ".visual." in n]
    assert visual and all(".lora_" in n for n in visual), "the tower's own weights never learn under an adapter"


def test_the_start_of_an_adapter_depends_on_its_seed_alone():
    starts = []
    for seed in (0, 0, 1):
        policy, _ = tiny_policy()
        torch.manual_seed(len(starts))
        before = torch.random.get_rng_state()
        add_adapter(policy, r=2, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        starts.append(torch.cat([p.detach().flatten() for p in policy.adapter.parameters.values()]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_on_the_head_or_the_embeddings_is_refused(case, name):
    policy, _, prompts, responses = case
    before = packed(policy, prompts, responses)
    with pytest.raises(ValueError, match=rf"lora_target_modules=.*{name}.* names the (head|embeddings)"):
        add_adapter(policy, r=2, target_modules=[name, "q_proj"])
    assert policy.adapter is None and torch.equal(packed(policy, prompts, responses), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_adapter_loads_with_peft_and_with_us_and_the_merged_model_without_either(small_world, tmp_path, dtype):
    from transformers import Qwen2_5_VLForConditionalGeneration

    policy = load_policy(small_world / "model", dtype=dtype)
    add_adapter(policy, r=4)
    randomise(policy)
    rng = np.random.default_rng(0)
    prompts, responses = [make_prompt(policy, [40, 41, 42])], [[rng.integers(7, 97, 9)]]
    with torch.no_grad():
        wanted = packed(policy, prompts, responses)
        policy.save(tmp_path / "adapter")
        policy.save(tmp_path / "merged", merged=True)
        assert torch.equal(packed(policy, prompts, responses), wanted), "saving changes nothing"
        assert torch.equal(packed(load_policy(tmp_path / "adapter"), prompts, responses), wanted)
        again = load_policy(tmp_path / "merged")
        assert again.adapter is None and again.head_weight.dtype == getattr(torch, dtype)
        if dtype == "float32":
            torch.testing.assert_close(packed(again, prompts, responses), wanted, rtol=3e-6, atol=1e-5)
    layer = policy.model.get_decoder().layers[1].mlp.up_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (32 / 4)
    exact = layer.base_layer.weight.double() + delta.double()
    error = (again.model.get_decoder().layers[1].mlp.up_proj.weight - exact).abs()
    assert (error <= torch.finfo(getattr(torch, dtype)).eps / 1.99 * exact.abs() + 1e-7).all(), "rounded once"
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(small_world / "model", dtype=getattr(torch, dtype))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for name, value in peft.get_peft_model_state_dict(theirs, save_embedding_layers=False).items():
        assert torch.equal(value.float(), policy.adapter.state()[name]), name


def test_another_adapter_is_refused(case, tmp_path):
    policy, *_ = case
    add_adapter(policy, r=2)
    policy.adapter.save(tmp_path)
    other, _ = tiny_policy()
    add_adapter(other, r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="holds another adapter"):
        other.adapter.load(tmp_path)
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(other, tmp_path)


def test_a_lora_run_in_bf16_with_checkpointing_resumes_bitwise_and_leaves_a_complete_model(
    recipe, tmp_path, monkeypatch
):
    flags = ["--lora_r=4", "--lora_alpha=8", "--dtype=bfloat16", "--gradient_checkpointing=true"]
    flags += ["--stages.rl.beta=0.05", "--stages.cold.learning_rate=2e-2"]
    whole, again, rows = whole_and_resumed(recipe, flags, tmp_path, monkeypatch)
    for name, value in whole.policy.adapter.state().items():
        assert torch.equal(value, again.policy.adapter.state()[name]), name
    kl = [row["kl"] for row in rows if "kl" in row]
    assert len(kl) == 3 and abs(kl[0]) < 1e-6 < kl[2], "the stage's reference is the policy it began with"
    last = tmp_path / "whole" / "checkpoint-5"
    assert (last / "adapter_model.safetensors").is_file() and not (last / "model.safetensors").exists()
    assert load_policy(last).adapter is not None and load_policy(tmp_path / "whole").adapter is None
    resumed = ["--resume_from_checkpoint=true", f"--output_dir={tmp_path}/cut", *flags]
    with pytest.raises(ValueError, match="model_name_or_path was"):
        trainer(recipe, [*resumed, "--model_name_or_path=/elsewhere"])


def test_the_reference_of_a_full_model_is_the_policy_at_step_0_and_shares_a_frozen_tower(recipe, monkeypatch):
    towers, encode = [], Vision._run
    monkeypatch.setattr(Vision, "_run", lambda self, media, **o: towers.append(self.policy) or encode(self, media, **o))
    references, score = [], RLStage._score_groups

    def compared(self, vision):
        score(self, vision)
        references.append(self)
        if len(references) == 1:
            old, ref = (np.concatenate([np.concatenate(getattr(g, n)) for g in self.groups]) for n in NAMES)
            np.testing.assert_allclose(ref, old, atol=1e-5)

    monkeypatch.setattr(RLStage, "_score_groups", compared)
    run = trainer(recipe, ["--stages.rl.beta=0.05"])
    run.train()
    reference = references[0].reference
    assert len(references) == 3 and reference is not run.policy and reference not in towers
    shared = [a is b for a, b in zip(run.policy.vision_parameters, reference.vision_parameters, strict=True)]
    assert all(shared) and reference.head_weight is not run.policy.head_weight


def test_settings_of_an_adapter_that_cannot_work_are_refused(recipe, tmp_path):
    for flags, message in (
        (["--lora_dropout=0.1", "--lora_r=4"], "lora_dropout=0.1 must be 0"),
        (["--lora_alpha=8"], "lora_alpha=8.0 has no effect without lora_r above 0"),
        (["--use_peft=true"], "unknown setting 'use_peft'; did you mean 'lora_r'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(str(recipe), flags)
    with pytest.raises(ValueError, match="Target modules"):
        Trainer(load_config(str(recipe), ["--lora_r=4", "--lora_target_modules=[nowhere]"]))
    assert not (tmp_path / "run").exists()
