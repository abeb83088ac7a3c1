"""Liger 0.8.5's LigerFusedLinearGRPOLoss in three GEMMs: the same arguments, results and metrics."""

import torch
from torch import Tensor

from cosmo_fast.integrations.padded import (
    CLIPPED,
    correction,
    loss_scale,
    padded_objective,
    padded_tokens,
    product_dtype,
    scaled,
)
from cosmo_fast.ops import linear_logprobs, linear_policy_loss


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Drop-in for `liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss` of Liger 0.8.5.

    Every argument has Liger's meaning; `compiled` and `chunk_size` (sequences at a time) change no result there and do
    nothing here, where nothing is compiled and memory is bounded by `chunk_rows` tokens. The loss and the metrics have
    fp32 (fp64 for fp64 hidden states, which Liger rounds to fp32 logits). Under autocast the products have its dtype.
    What differs, on purpose: nothing under the mask is read; a log-ratio above 20 counts as 20; and a ValueError
    refuses fp16, what the losses here refuse (such as delta <= 1 + epsilon_high), cispo, sapo, vespo at the sequence
    level (as Liger does), and luspo with losses that differ by token over padded rows, where Liger 0.8.5 counts the
    padding.
    """

    chunk_rows = 4096

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if loss_type == "dr_grpo" and not max_completion_length:
            raise ValueError(f"loss_type 'dr_grpo' needs a positive max_completion_length, got {max_completion_length}")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):  # for every loss_type, as Liger
            if given[name] is not None and not given[name] > 0:
                raise ValueError(f"{name} must be positive, got {given[name]}")
        for name, value in given.items():
            setattr(self, name, value)
        self._objective()

    def _objective(self):
        own = {name: value for name, value in vars(self).items() if name.startswith(("sapo_", "vespo_"))}
        return padded_objective(
            self.loss_type,
            self.importance_sampling_level,
            epsilon=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            beta=self.beta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            **own,
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, metrics), metrics = (KL, share of clipped tokens), without the KL for beta 0.

        _input, ref_input: (B, T, d). lin_weight, ref_weight (V, d) and the biases (V,) are cast to the dtype of the
        hidden states or of autocast: fp32, bf16 or fp64. ids, mask (0 or 1) and log-probs: (B, T). advantages: (B,).
        vllm_is_ratio: (B, T), (B, 1) or (B,). The loss is differentiable by _input, lin_weight and bias. 3 GEMMs, and 1
        without gradient for ref_input where beta is not 0 and no ref_per_token_logps are given.
        """
        mask = attention_mask
        if mask.is_floating_point() and not ((mask == 0) | (mask == 1)).all():
            raise ValueError("attention_mask must be 0 or 1 everywhere, got fractions")
        ratio = self._ratio(vllm_is_ratio, mask)
        self._check_luspo(mask, ratio)
        step_tokens = _step_tokens(mask, num_items_in_batch) if self.loss_type in ("dapo", "cispo", "vespo") else None
        tokens = padded_tokens(
            selected_token_ids,
            mask,
            loss_scale(self.loss_type, mask, self.max_completion_length, step_tokens),
            advantage=advantages[:, None],
            old_logp=old_per_token_logps,
            ref_logp=self._ref_logps(selected_token_ids, ref_per_token_logps, ref_input, ref_weight, ref_bias),
            correction=correction(self.loss_type, ratio, mask),
        )
        dtype = product_dtype(_input)
        output = linear_policy_loss(
            _input.reshape(len(tokens), -1).to(dtype),
            lin_weight.to(dtype),
            tokens,
            scaled(self._objective()),
            bias=None if bias is None else bias.to(dtype),
            temperature=self.temperature,
            chunk_rows=self.chunk_rows,
        )
        loss, metrics = output.loss, output.metrics
        zero = loss.new_zeros(())
        names = ("clip_ratio/low", "clip_ratio/high") if self.loss_type in CLIPPED else ("cispo_clip_ratio",)
        clipped = sum((metrics.get(name, zero) for name in names), zero)
        return loss, (clipped,) if self.beta == 0 else (metrics.get("kl", zero), clipped)

    def _ref_logps(self, ids, logps, hidden, weight, bias) -> Tensor | None:
        """(B, T); None where the reference has no part in the loss."""
        if not self.use_ref_model:  # as in Liger, which then ignores what is given: its KL is 0
            return None
        if logps is not None or self.beta == 0:
            return logps
        if hidden is None or weight is None:
            raise ValueError(
                f"beta={self.beta} with use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight; "
                "without a reference set beta=0.0 or use_ref_model=False"
            )
        with torch.no_grad():
            dtype, flat = product_dtype(hidden), hidden.reshape(ids.numel(), -1)
            bias = None if bias is None else bias.to(dtype)
            options = {"bias": bias, "temperature": self.temperature, "chunk_rows": self.chunk_rows}
            return linear_logprobs(flat.to(dtype), weight.to(dtype), ids.reshape(-1), **options)[0].view_as(ids)

    def _ratio(self, ratio: Tensor | None, mask: Tensor) -> Tensor | None:
        if ratio is None:
            return None
        rows, length = mask.shape
        shape = tuple(ratio.shape)
        if shape not in ((rows, length), (rows, 1), (rows,)):
            raise ValueError(f"vllm_is_ratio must be {(rows, length)}, {(rows, 1)} or {(rows,)}, got {shape}")
        return ratio.view(rows, -1)

    def _check_luspo(self, mask: Tensor, ratio: Tensor | None) -> None:
        by_token = self.importance_sampling_level == "token" or self.beta != 0
        by_token = by_token or (ratio is not None and ratio.shape[1] > 1)
        if self.loss_type == "luspo" and by_token and not mask.all():
            raise ValueError(
                "loss_type 'luspo' over padded rows: Liger 0.8.5 counts the padding unless the whole sequence has one "
                "loss; set importance_sampling_level='sequence', beta=0.0 and a vllm_is_ratio by sequence, or use "
                "cosmo_fast.objectives.luspo"
            )


def _step_tokens(mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
    """The tokens that dapo, cispo and vespo divide by, per process: those of the step if given, else of this batch."""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_items_in_batch is None:
        tokens = mask.sum(dtype=torch.float32)
        if group:
            torch.distributed.all_reduce(tokens)
    else:
        tokens = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    return (tokens / (torch.distributed.get_world_size() if group else 1)).clamp(min=1.0)
