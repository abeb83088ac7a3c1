"""The mixin against TRL's own GRPOTrainer: whole training runs from one seed, and single losses with made-up inputs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import tiny  # noqa: E402
from flops import Flops  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from cosmo_fast.integrations import CosmoFastGRPOMixin, CosmoFastGRPOTrainer  # noqa: E402

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(57))]
V = len(WORDS)
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3, "tie_word_embeddings": False, "eos_token_id": 1,
    "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "tied": lambda: transformers.Qwen2Config(**{**SIZES, "tie_word_embeddings": True}),
    "bias": lambda: transformers.PhiConfig(**{**SIZES, "num_key_value_heads": 2}),
    "softcap": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        router_aux_loss_coef=0.1,
    ),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(trainer class, model or its name, **GRPOConfig) -> trainer."""
    return _builder(tmp_path_factory.mktemp("trl"))


def _builder(root):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    data = datasets.Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{2 * i}"[: 5 + i % 4] for i in range(12)]})

    def reward(completions, **_):
        return [float(sum(len(word) > 2 for word in c.split())) for c in completions]

    def make(trainer, model="qwen2", peft_config=None, **options):
        if isinstance(model, str):
            folder = root / model
            if not folder.exists():
                torch.manual_seed(0)
                transformers.AutoModelForCausalLM.from_config(MODELS[model]()).save_pretrained(folder)
            model = str(folder)
        defaults = {
            "output_dir": str(root / "out"), "max_steps": 3, "per_device_train_batch_size": 4, "num_generations": 4,
            "gradient_accumulation_steps": 2, "max_completion_length": 6, "learning_rate": 0.5, "optim": "sgd",
            "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
            "disable_tqdm": True, "generation_kwargs": {"bad_words_ids": [[0]]},
        }  # fmt: skip
        args = trl.GRPOConfig(**{**defaults, **options})
        return trainer(model, reward, args, data, processing_class=tokenizer, peft_config=peft_config)

    return make


def _train(trainer):
    """The log of every step, and the parameters after it."""
    steps = []

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append([p.detach().clone() for p in trainer.model.parameters()])

    trainer.add_callback(Keep())
    trainer.train()
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    logs = [{k: v for k, v in row.items() if k not in timed} for row in trainer.state.log_history]
    return logs, steps


# Two updates of every rollout and a narrow clip: ratios leave 1, and some are clipped.
OFF = {"num_iterations": 2, "epsilon": 0.01, "beta": 0.1}
RUNS = {
    "grpo": {"loss_type": "grpo"},
    "dapo off": OFF,
    "gspo": {**OFF, "loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo off": {**OFF, "loss_type": "cispo", "epsilon_high": 1.05},
    "vespo off": {**OFF, "loss_type": "vespo"},
    "truncated": {"mask_truncated_completions": True, "max_completion_length": 12, "loss_type": "bnpo"},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 9.0},
    "entropy mask": {**OFF, "top_entropy_quantile": 0.4, "entropy_coef": 0.05},
    "steps per generation": {"steps_per_generation": 4, "loss_type": "dapo"},
    "tied": {"model": "tied"},
}


@pytest.mark.parametrize("name", RUNS)
def test_three_steps_equal_those_of_trl(build, name):
    options = RUNS[name]
    logs, steps = _train(build(trl.GRPOTrainer, **options))
    got_logs, got_steps = _train(build(CosmoFastGRPOTrainer, **options))
    _assert_same_runs(logs, steps, got_logs, got_steps)


def _assert_same_runs(logs, steps, got_logs, got_steps):
    assert [list(row) for row in got_logs] == [list(row) for row in logs]
    for got, expected in zip(got_logs, logs, strict=True):
        assert got == pytest.approx(expected, rel=2e-4, abs=2e-5, nan_ok=True)
    for got, expected in zip(got_steps, steps, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert max((a - b).abs().max() for a, b in zip(steps[0], steps[-1], strict=True)) > 1e-3


def run_two_ranks(folder):
    """What each process of the next test does: both trainers under DDP, which comes with every trap of its own."""
    build = _builder(Path(folder) / os.environ["RANK"])
    for options in ({**OFF, "loss_type": "dapo"}, {"loss_type": "bnpo", "activation_checkpointing": False}):
        runs = [_train(build(c, ddp_backend="gloo", **options)) for c in (trl.GRPOTrainer, CosmoFastGRPOTrainer)]
        assert torch.distributed.get_world_size() == 2
        _assert_same_runs(*runs[0], *runs[1])
    with pytest.raises(ValueError, match="top_entropy_quantile=0.4 with 2 processes"):
        build(CosmoFastGRPOTrainer, ddp_backend="gloo", top_entropy_quantile=0.4)


def test_two_processes_train_like_those_of_trl(tmp_path):
    code = f"import test_integrations_trl as t; t.run_two_ranks({str(tmp_path)!r})"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-4000:]


def _inputs(trainer, seed=0):
    """4 completions of up to 6 tokens, with log-probs of old policy, reference and sampler near the policy's."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (4, 9), generator=g)
    inputs = {
        "prompt_ids": ids[:, :3],
        "prompt_mask": (torch.arange(3) >= torch.tensor([[0], [1], [2], [0]])).long(),
        "completion_ids": ids[:, 3:],
        "completion_mask": (torch.arange(6) < torch.tensor([[6], [4], [1], [5]])).long(),
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.1]),
        "num_items_in_batch": torch.tensor(37),
    }
    masks = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logp = trainer._get_per_token_logps_and_entropies(trainer.model, ids, masks, 6)[0]
    for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
        inputs[name] = logp + 0.3 * torch.randn(logp.shape, generator=g) * inputs["completion_mask"]
    return inputs


def _one_loss(trainer, inputs, compute_loss):
    """(loss, gradients, metrics) of one micro-batch."""
    trainer._metrics["train"].clear()
    trainer._metrics["eval"].clear()
    trainer._last_world_entropy, trainer.entropy_coef = 1.0, trainer.args.entropy_coef
    trainer.current_gradient_accumulation_steps = 2
    loss = compute_loss(trainer.model, inputs)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters) if loss.requires_grad else ()
    metrics = {f"{mode} {name}": list(v) for mode in ("train", "eval") for name, v in trainer._metrics[mode].items()}
    return loss.detach(), gradients, metrics


def _assert_same(trainer, inputs):
    theirs = trl.GRPOTrainer._compute_loss.__get__(trainer)
    loss, gradients, metrics = _one_loss(trainer, inputs, theirs)
    got_loss, got_gradients, got_metrics = _one_loss(trainer, inputs, trainer._compute_loss)
    torch.testing.assert_close(got_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_gradients, gradients, rtol=1e-5, atol=2e-6)
    assert list(got_metrics) == list(metrics) and metrics
    for name, values in metrics.items():
        assert got_metrics[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    return gradients, metrics


TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
OPTIONS = {
    "on policy": {},
    "off policy": {"beta": 0.1, "epsilon": 0.15, "temperature": 0.7},
    "plain kl": {"beta": 0.1, "use_bias_correction_kl": False},
    "sequence": {"importance_sampling_level": "sequence", "beta": 0.1},
    "two-sided": {"epsilon": 0.05, "delta": 1.1},
    "own temperatures": {"sapo_temperature_neg": 1.7, "vespo_k_pos": 1.0, "vespo_lambda_neg": 1.5},
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy bonus off": {"entropy_coef": 0.05, "use_adaptive_entropy": True, "entropy_target": 0.5},
    "entropy mask": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05, "beta": 0.1},
    "off-policy mask": {"off_policy_mask_threshold": 0.02, "beta": 0.1},
    "sampler": {"beta": 0.1, "off_policy_mask_threshold": 0.02},
    "sampler by sequence": {"beta": 0.1},
    "tools": {"beta": 0.1, "entropy_coef": 0.05},
    "advantage by token": {},
    "evaluation": {"beta": 0.1},
}
# The rest with fewer types.
EVERY = ("on policy", "off policy", "sequence", "off-policy mask", "sampler", "sampler by sequence", "evaluation")


@pytest.mark.parametrize(
    ("name", "loss_type"), [(n, t) for n in OPTIONS for t in (TYPES if n in EVERY else ("dapo", "sapo", "vespo"))]
)
def test_a_loss_its_gradient_and_metrics_equal_those_of_trl(build, name, loss_type):
    options = {"loss_type": loss_type, **({"epsilon_high": 1.1} if loss_type == "cispo" else {}), **OPTIONS[name]}
    if name == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        with pytest.raises(ValueError, match="importance_sampling_level='sequence'"):
            build(CosmoFastGRPOTrainer, **options)
        return
    trainer = build(CosmoFastGRPOTrainer, **options)
    trainer.chunk_rows = 5  # fewer than a sequence
    inputs = _inputs(trainer)
    if name == "on policy":
        del inputs["old_per_token_logps"], inputs["ref_per_token_logps"]
    if "sampler" not in name:
        del inputs["sampling_per_token_logps"]
    else:
        trainer.use_vllm = True  # as if vLLM had sampled: TRL hands over a ratio by token, 1 under the mask ...
        gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * inputs["completion_mask"]
        inputs["importance_sampling_ratio"] = gap.exp().clamp(0.8, 1.3)
        if name == "sampler by sequence":  # ... or by default "sequence_mask", 0 for a sequence that is too far off
            ratio = gap.sum(1, keepdim=True).exp()
            inputs["importance_sampling_ratio"] = ratio.where(ratio < ratio.max(), 0.0)
    if name == "tools":
        inputs["tool_mask"] = (torch.arange(6) != 2).long().expand(4, 6)
    if name == "advantage by token":
        inputs["advantages"] = inputs["advantages"][:, None] * torch.arange(-1.0, 2.0, 0.5)
    trainer.model.train(name != "evaluation")
    gradients, _ = _assert_same(trainer, inputs)
    assert max(g.abs().max() for g in gradients) > 1e-3


@pytest.mark.parametrize("model", ["tied", "bias", "softcap"])
def test_every_kind_of_head_has_the_loss_of_trl(build, model):
    trainer = build(CosmoFastGRPOTrainer, model, beta=0.1)
    if model == "bias":
        torch.nn.init.normal_(trainer.model.lm_head.bias)
    _assert_same(trainer, _inputs(trainer))


def test_pictures_reach_the_loss_as_in_trl(build):
    torch.manual_seed(0)
    _, model = tiny.tiny_policy()
    trainer = build(CosmoFastGRPOTrainer, model, loss_type="grpo")
    g = torch.Generator().manual_seed(0)
    prompt = torch.tensor([[3, *[tiny.IMAGE] * 4, 4, 9]]).expand(2, 7)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": torch.randint(7, V, (2, 5), generator=g),
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "advantages": torch.tensor([1.0, -0.5]),
        "num_items_in_batch": torch.tensor(8),
        "pixel_values": torch.randn(32, 3 * 2 * 14 * 14, generator=g),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "num_images": [1, 1],
        "mm_token_type_ids": torch.nn.functional.pad((prompt == tiny.IMAGE).long(), (0, 5)),
    }
    gradients, _ = _assert_same(trainer, inputs)
    names = [name for name, _ in trainer.model.named_parameters()]
    assert all(g.abs().max() > 0 for n, g in zip(names, gradients, strict=True) if "visual.patch_embed" in n)


def test_a_frozen_head_gets_no_gradient(build):
    trainer = build(CosmoFastGRPOTrainer)
    trainer.model.lm_head.weight.requires_grad_(False)
    _assert_same(trainer, _inputs(trainer))


def test_under_bf16_autocast_the_error_is_no_larger_than_that_of_trl(build):
    exact, half = (build(CosmoFastGRPOTrainer, bf16=bf16, beta=0.1) for bf16 in (False, True))
    inputs = _inputs(exact)
    truth = _one_loss(exact, inputs, exact._compute_loss)[1]

    def error(compute_loss):
        with half.accelerator.autocast():
            gradients = _one_loss(half, inputs, compute_loss)[1]
        return sum((a - b).square().sum() for a, b in zip(gradients, truth, strict=True)).sqrt()

    theirs = error(trl.GRPOTrainer._compute_loss.__get__(half))
    assert 0 < error(half._compute_loss) <= 1.1 * theirs


def test_lora_trains_as_in_trl_and_prompt_tuning_is_refused(build):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    runs = [_train(build(c, peft_config=lora, **OFF)) for c in (trl.GRPOTrainer, CosmoFastGRPOTrainer)]
    _assert_same_runs(*runs[0], *runs[1])
    with pytest.raises(ValueError, match="prompt learning"):
        prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        build(CosmoFastGRPOTrainer, peft_config=prompt)


class HeadFlops(Flops):
    """Those of the products that have a vocabulary in them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Counts and passes on."""
        if any(isinstance(x, torch.Tensor) and V in x.shape for x in args):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def test_three_products_of_the_head_where_trl_has_four(build):
    trainer = build(CosmoFastGRPOTrainer, beta=0.1)
    inputs = _inputs(trainer)
    inputs["completion_mask"] = torch.ones(4, 6, dtype=torch.long)
    counts = []
    for compute_loss in (trainer._compute_loss, trl.GRPOTrainer._compute_loss.__get__(trainer)):
        with HeadFlops(4 * 6, V, SIZES["hidden_size"]) as count:
            _one_loss(trainer, inputs, compute_loss)
        counts.append(count.total)
    assert counts[0] == pytest.approx(3) and counts[1] >= 4


@pytest.mark.parametrize("factor", [2.0, torch.nan])
def test_a_loss_that_trl_would_not_have_is_an_error(build, factor):
    class Wrong(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            self._policy_loss = factor * self._policy_loss
            return loss

    class Mixed(CosmoFastGRPOMixin, Wrong):
        pass

    trainer = build(Mixed)
    with pytest.raises(RuntimeError, match="TRL computes"):
        _one_loss(trainer, _inputs(trainer), trainer._compute_loss)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"torch_compile": True}, "torch_compile=True"),
        ({"model": "moe"}, "router_aux_loss_coef=0.1"),
        ({"model": "granite"}, "logits_scaling=8.0"),
        ({"delta": 1.1}, "delta"),
        ({"loss_type": "ppo"}, "ppo"),
        ({"epsilon": 1.5}, "epsilon"),
    ],
)
def test_what_is_not_supported_is_refused_at_construction(build, options, match):
    with pytest.raises(ValueError, match=match):
        build(CosmoFastGRPOTrainer, **options)


@pytest.mark.parametrize(
    ("owner", "name"),
    [("args", "fp16"), ("args", "use_liger_kernel"), ("self", "is_fsdp_enabled"), ("self", "is_deepspeed_enabled")],
)
def test_what_cannot_be_built_here_is_refused_too(build, owner, name, monkeypatch):
    trainer = build(CosmoFastGRPOTrainer)
    trainer._refuse()
    monkeypatch.setattr(trainer if owner == "self" else trainer.args, name, True)
    with pytest.raises(ValueError, match="does not support"):
        trainer._refuse()


def test_the_drop_ins_import_no_rival_before_it_is_needed():
    code = (
        "import sys, cosmo_fast.integrations as i; i.LigerFusedLinearGRPOLoss; "
        "assert not {'trl', 'liger_kernel'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
