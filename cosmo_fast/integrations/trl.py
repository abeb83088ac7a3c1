"""TRL 1.16's GRPOTrainer with the loss, its gradient and the log-probs made in three GEMMs instead of four.

TRL has no hook for the loss, so the mixin overrides `_compute_loss`. The policy's forward then ends in
`linear_policy_loss`, inside the model's own forward, where the wrappers of distributed training expect it. TRL's
`_compute_loss` runs on the log-probs and entropies that come out, without a graph: its metrics and its entropy control
are its own code, and its value of the loss must be ours.
"""

import dataclasses
import functools
import types

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from cosmo_fast.integrations.padded import (
    PaddedTokens,
    correction,
    loss_scale,
    padded_objective,
    padded_tokens,
    product_dtype,
    scaled,
)
from cosmo_fast.objectives import Objective, sequence_mean
from cosmo_fast.ops import linear_policy_loss

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")  # as TRL's fused head reads them
_OWN = [f.name for f in dataclasses.fields(trl.GRPOConfig) if f.name.startswith(("sapo_", "vespo_"))]


class CosmoFastGRPOMixin:
    """Put before `trl.GRPOTrainer` or a subclass of it: `class Mine(CosmoFastGRPOMixin, GRPOTrainer)`.

    Same arguments, metrics and loss as TRL 1.16, for every loss type and for all that changes the loss there, except
    what the constructor refuses with a ValueError; a log-ratio above 20 counts as 20. The log-probs of the old policy
    and of the reference stay TRL's. `chunk_rows`: how many tokens' logits exist at a time. With `top_entropy_quantile`
    < 1 a token's loss depends on the whole micro-batch; one of more tokens than that costs a fourth GEMM.
    """

    chunk_rows = 4096

    def __init__(self, *args, **kwargs):
        if not trl.__version__.startswith("1.16."):
            raise ImportError(f"CosmoFastGRPOMixin follows the internals of trl 1.16, got {trl.__version__}")
        super().__init__(*args, **kwargs)
        self._refuse()
        self._objective()
        self._scored_inputs = self._policy_loss = None
        model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        _lend_head(self, model)

    def _refuse(self) -> None:
        """ValueError for what this loss does not support: the option, its value, and what to change."""
        args, config = self.args, self.model.config.get_text_config()
        head = self.model.get_output_embeddings()
        peft = self.model.active_peft_config if is_peft_model(self.model) else None
        reasons = {
            f"fp16={args.fp16}": (args.fp16, "the row kernels take bf16 and fp32: set bf16=True"),
            f"use_liger_kernel={args.use_liger_kernel}": (args.use_liger_kernel, "set it to False"),
            f"torch_compile={args.torch_compile}": (args.torch_compile, "set it to False"),
            f"fsdp={args.fsdp!r}": (self.is_fsdp_enabled, "it shards the head: train with DDP"),
            f"deepspeed={args.deepspeed!r}": (self.is_deepspeed_enabled, "untested with this loss: train with DDP"),
            f"router_aux_loss_coef={self.router_aux_loss_coef}": (self.aux_loss_enabled, "set it to 0.0"),
            f"top_entropy_quantile={self.top_entropy_quantile} with {self.accelerator.num_processes} processes": (
                self.top_entropy_quantile < 1 < self.accelerator.num_processes,
                "its threshold is gathered from all of them, and a wholly masked micro-batch would not join in: set it "
                "to 1.0",
            ),
            f"peft_config={peft}": (
                peft is not None and peft.is_prompt_learning,
                "prompt learning adds tokens of its own: use LoRA",
            ),
            f"lm_head {type(head).__name__} of {head.weight.dtype}": (
                head.weight.dtype not in (torch.float32, torch.bfloat16, torch.float64),
                "load the model with an unquantised head in bfloat16 or float32",
            ),
        }
        for name in _SCALES:
            value = getattr(config, name, None)
            reasons[f"model config {name}={value}"] = (value not in (None, 1), "scaled logits: use GRPOTrainer itself")
        for what, (refused, advice) in reasons.items():
            if refused:
                raise ValueError(f"CosmoFastGRPOMixin does not support {what}: {advice}")

    def _objective(self) -> Objective:
        args = self.args
        return padded_objective(
            self.loss_type,
            self.importance_sampling_level,
            epsilon=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=args.delta,
            beta=self.beta,
            use_bias_correction_kl=args.use_bias_correction_kl,
            **{name: getattr(args, name) for name in _OWN},
        )

    def _compute_loss(self, model, inputs) -> Tensor:
        self._scored_inputs = inputs
        try:
            theirs = super()._compute_loss(model, inputs)
            loss = self._policy_loss
        finally:
            self._scored_inputs = self._policy_loss = None
        ours, theirs = loss.item(), theirs.item()
        # Log-ratios above 20 count as 20 here and may make a loss differ, but only a huge one. NaN is an error.
        if abs(theirs) < 1e3 and not abs(ours - theirs) <= 1e-3 * max(1.0, abs(theirs)):
            raise RuntimeError(f"the loss is {ours}, TRL computes {theirs}: please report this with your GRPOConfig")
        return loss

    def _policy_head(self, last_hidden: Tensor, head: torch.nn.Module) -> FusedCausalLMOutput:
        """What the model returns for `last_hidden` (B, L, d) while the loss is computed: log-probs and entropies
        (B, T) of the completions, without a graph, and the loss with its gradient.
        """
        inputs = self._scored_inputs
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        tokens, loss = self._tokens_and_loss(ids, mask, inputs)
        dtype = torch.float32 if self.args.cast_lm_head_to_fp32 else product_dtype(last_hidden)
        output = linear_policy_loss(
            last_hidden[:, -ids.shape[1] - 1 : -1].reshape(len(tokens), -1).to(dtype),
            head.weight.to(dtype),
            tokens,
            loss,
            bias=None if head.bias is None else head.bias.to(dtype),
            temperature=self.temperature,
            logit_softcap=getattr(self.model.config.get_text_config(), "final_logit_softcapping", None),
            chunk_rows=self.chunk_rows,
        )
        self._policy_loss = output.loss
        # Under the mask TRL computes too, and multiplies by 0: a ratio of 1 there is sure to be finite.
        old = inputs.get("old_per_token_logps")
        logp = output.logp.view_as(ids)
        logp = logp if old is None else torch.where(mask.bool(), logp, old)
        return FusedCausalLMOutput(loss=output.loss, log_probs=logp, entropy=output.entropy.view_as(ids))

    def _tokens_and_loss(self, ids: Tensor, mask: Tensor, inputs: dict) -> tuple[PaddedTokens, Objective]:
        """The micro-batch as tokens with TRL's normaliser, and the loss of them."""
        args, train = self.args, self.model.training
        accumulation = self.current_gradient_accumulation_steps if train else 1
        step_tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if train:  # num_items_in_batch spans the generation batch: cut to one accumulation window
            step_tokens = step_tokens * accumulation / args.steps_per_generation
        scale = loss_scale(self.loss_type, mask, self.max_completion_length, step_tokens)
        if self.loss_type not in ("dapo", "cispo", "vespo"):
            scale = scale / accumulation
        advantages, old = inputs["advantages"], inputs.get("old_per_token_logps")
        threshold = self.off_policy_mask_threshold
        tokens = padded_tokens(
            ids,
            mask,
            scale,
            advantage=advantages if advantages.dim() == 2 else advantages[:, None],
            old_logp=old,
            ref_logp=inputs.get("ref_per_token_logps"),
            correction=correction(self.loss_type, inputs.get("importance_sampling_ratio"), mask),
            sampling_logp=None if threshold is None else inputs.get("sampling_per_token_logps", old),
        )
        inner = scaled(self._objective())
        whole, quantile = self.top_entropy_quantile < 1.0, 1 - self.top_entropy_quantile
        if whole:  # which tokens count depends on all entropies: the micro-batch is one piece
            tokens.row, tokens.sequence = tokens.sequence, torch.zeros_like(tokens.sequence)
        bonus = self.entropy_coef / accumulation
        if self.use_adaptive_entropy and self._last_world_entropy > args.entropy_target:
            bonus = 0.0
        token_count = mask.sum().clamp(min=1.0)

        def loss(logp: Tensor, entropy: Tensor, batch: PaddedTokens):
            (advantage,) = batch.need("advantage")
            old = logp.detach() if batch.old_logp is None else batch.old_logp
            batch = dataclasses.replace(batch, old_logp=old, sequence=batch.row if whole else batch.sequence)
            chosen, count = torch.ones_like(entropy), token_count
            if whole:
                flat = entropy.detach()[None]
                chosen = self.get_high_entropy_mask(flat, torch.ones_like(flat), quantile)[0].to(entropy.dtype)
                count = chosen.sum().clamp(min=1.0)
                advantage = advantage * chosen  # a policy term is linear in the advantage; the KL stays
            if threshold is not None:
                sampled = old if batch.sampling_logp is None else batch.sampling_logp
                drift = sequence_mean((sampled - logp.detach()).nan_to_num(nan=0.0), batch.sequence)
                advantage = advantage * ((batch.advantage >= 0) | (drift <= threshold))
            token_loss, metrics = inner(logp, entropy, dataclasses.replace(batch, advantage=advantage))
            return (token_loss if bonus == 0 else token_loss - bonus * chosen / count * entropy), metrics

        return tokens, Objective(inner.name, loss, whole or inner.sequence_level or threshold is not None)


def _lend_head(trainer: CosmoFastGRPOMixin, model: torch.nn.Module) -> None:
    """While `trainer` computes a loss, `model` called with TRL's `fused_lm_head=True` ends in the trainer's head."""
    before = model.forward

    @functools.wraps(before)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not (fused_lm_head and trainer._scored_inputs is not None):
            return before(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        return trainer._policy_head(hidden, self.get_output_embeddings())

    model.forward = types.MethodType(forward, model)


class CosmoFastGRPOTrainer(CosmoFastGRPOMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` with the mixin: nothing else to change."""
