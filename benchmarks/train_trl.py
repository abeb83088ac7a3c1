"""The same step by TRL's own GRPOTrainer: its methods are called in the order of its training loop, nothing is changed.

As in TRL, every row's pictures are encoded once a row. Set away from TRL's defaults are only what makes the work the
same (no autocast over the weights' dtype, completions of equal length, no KL) and what would slow TRL down (gradient
checkpointing).
"""

import os
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from train_rivals import EPSILON, LEARNING_RATE, MAX_GRAD_NORM, Problem, Provider, load_plain, reward  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    PrinterCallback,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class Trl(Provider):
    """GRPOTrainer with transformers' `generate`, beta 0 and one iteration."""

    def __init__(self, problem: Problem):
        super().__init__(problem, load_plain(problem))
        self.trainer = _trainer(problem, self.model)
        start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.trainer.train()  # one step, which makes the optimiser; the weights go back to where all begin
        self.model.load_state_dict(start)
        self.optimizer = self.trainer.optimizer
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.asked: list = []
        generate = self.trainer._generate
        self.trainer._generate = lambda prompts: self.asked.append(prompts) or generate(prompts)
        self.inputs = self.trainer._generate_and_score_completions(self.batch)
        del self.trainer._generate
        expected = torch.stack([torch.from_numpy(prompt.ids) for prompt in problem.prompts])
        assert torch.equal(self.inputs["prompt_ids"], expected.repeat_interleave(problem.g, 0)), "not our prompts"
        assert self.inputs["completion_mask"].shape == problem.responses.shape and self.inputs["completion_mask"].all()

    def sample(self) -> Tensor:
        found = self.trainer._generate(self.asked[0])
        return torch.tensor(found[1])

    @torch.no_grad()
    def score(self) -> Tensor:
        inputs = {name: value for name, value in self.inputs.items() if name in _FORWARD}
        ids = torch.cat([self.inputs["prompt_ids"], self.problem.responses], 1)
        found = self.trainer._get_per_token_logps_and_entropies(
            self.model, ids, torch.ones_like(ids), self.problem.r, **inputs
        )
        return found[0]

    def backward(self, responses: Tensor, advantage: Tensor) -> float:
        loss = self.trainer.compute_loss(
            self.model, self.inputs | {"completion_ids": responses, "advantages": advantage}
        )
        self.trainer.accelerator.backward(loss)
        return loss.item()

    def step(self) -> None:
        """TRL's own training step: tokenise, generate, reward, loss, backward; then the optimiser."""
        self.trainer.training_step(self.model, self.batch, None)
        self._finish()

    def _update(self, responses: Tensor, advantage: Tensor) -> None:
        self.backward(responses, advantage)
        self._finish()

    def _finish(self) -> None:
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.model.zero_grad()


_FORWARD = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")


def _trainer(problem: Problem, model: torch.nn.Module) -> GRPOTrainer:
    rows = problem.groups * problem.g
    config = GRPOConfig(
        output_dir=str(problem.model.parent / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=rows, num_generations=problem.g, max_completion_length=problem.r, max_steps=1,
        generation_kwargs={"suppress_tokens": problem.special}, loss_type="grpo", beta=0.0, epsilon=EPSILON,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=MAX_GRAD_NORM, shuffle_dataset=False,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    questions = [row.messages[0]["content"][-1]["text"] for row in problem.rows]
    pictures = [[Image.open(path).convert("RGB") for path in row.images] for row in problem.rows]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    data = Dataset.from_dict({"prompt": prompts, "images": pictures})
    trainer = GRPOTrainer(model, _reward, config, train_dataset=data, processing_class=_processor(problem.model))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _reward(completions: list, **_) -> list[float]:
    return reward([messages[0]["content"] for messages in completions])


def _processor(folder: Path) -> Qwen2_5_VLProcessor:
    """What AutoProcessor would make: it wants a file that says which video processor, which our folder has not."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    images = Qwen2VLImageProcessor.from_pretrained(folder)
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template)
