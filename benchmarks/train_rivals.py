"""One GRPO step on one problem, by cosmo_fast and by a plain Hugging Face model on padded rows.

A provider has the phases as methods: `sample`, `score`, `update`, `step`. All hold the same weights and learn the same
parameters with the same optimiser, and a response always has `r` tokens: no special token is ever sampled.
"""

from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cosmo_fast.config import Config
from cosmo_fast.data import Row
from cosmo_fast.data.encode import Encoder
from cosmo_fast.models import load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.objectives import TokenBatch, advantages, grpo
from cosmo_fast.ops import linear_policy_loss
from cosmo_fast.optimizer import AdamW
from cosmo_fast.plan import Plan, Prompt
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.stages.base import Context, Group, accumulate
from cosmo_fast.world.model import SPECIAL, build_model

LEARNING_RATE, MAX_GRAD_NORM, EPSILON = 1e-6, 1.0, 0.2
TEXT = 30  # text tokens beside each picture
_SYLLABLES = [a + b for a, b in product("bdfglmnprst", "aeiou")]
WORDS = [a + b for a, b in product(_SYLLABLES[:25], _SYLLABLES)][:600]  # about as many tokens as the demo has


def make_model(folder: Path, hidden_size: int = 256, layers: int = 4) -> Path:
    """A random Qwen2.5-VL as an ordinary Hugging Face folder."""
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    return build_model(folder, [" ".join(WORDS)], hidden_size=hidden_size, num_hidden_layers=layers, **pixels)


class Problem:
    """`groups` prompts of `pictures` random pictures each, and given responses and advantages to learn from.

    Attributes:
        rows, prompts: as a user gives them, and encoded. p: tokens of a prompt. special: ids that are never sampled.
        responses (groups·g, r) int64, advantage (groups·g,) fp32: what `score` and `update` work on.
    """

    def __init__(
        self, model: Path, pictures: int, g: int, r: int, groups: int, vision_trained: bool, side: int = 392,
        dtype: str = "float32",
    ):  # fmt: skip
        self.model, self.g, self.r, self.groups, self.vision_trained = model, g, r, groups, vision_trained
        self.dtype = dtype
        rng = np.random.default_rng(0)
        policy = load_policy(model)
        self.tokenizer, self.image_processor = policy.tokenizer, policy.image_processor
        self.special = self.tokenizer.convert_tokens_to_ids(SPECIAL)
        encoder = Encoder(policy)
        self.rows, self.prompts = [], []
        for i in range(groups):
            paths = tuple(_picture(model.parent / f"{side}-{i}-{j}.png", side, rng) for j in range(pictures))
            frame = encoder.prompt(_row(paths, ""))
            rows = sum(m.rows for m in frame.media)
            missing = rows + TEXT * pictures - len(frame.ids)
            text = " " + " ".join(rng.choice(WORDS, missing))
            self.rows.append(_row(paths, text))
            self.prompts.append(encoder.prompt(self.rows[-1]))
        self.p = len(self.prompts[0].ids)
        assert {len(prompt.ids) for prompt in self.prompts} == {TEXT * pictures + rows}
        plain = np.setdiff1d(np.arange(policy.model.config.text_config.vocab_size), self.special)
        self.responses = torch.from_numpy(rng.choice(plain, (groups * g, r)))
        self.advantage = torch.from_numpy(rng.normal(size=groups * g)).float()

    @property
    def tokens(self) -> int:
        """Of a step, as the trainer counts them: every prompt once, every response."""
        return self.groups * (self.p + self.g * self.r)

    def judge(self, responses: Tensor) -> Tensor:
        """Advantages (groups·g,) of sampled responses (groups·g, r): decoded, rewarded, compared with their group."""
        rewards = torch.tensor(reward(self.tokenizer.batch_decode(responses.tolist(), skip_special_tokens=True)))
        return advantages(rewards, torch.arange(self.groups).repeat_interleave(self.g))


def reward(completions: list[str], **_) -> list[float]:
    """Different words of each completion: trivial, and rarely the same for a whole group."""
    return [float(len(set(text.split()))) for text in completions]


def _row(paths: tuple[Path, ...], text: str) -> Row:
    content = [*({"type": "image"} for _ in paths), {"type": "text", "text": text}]
    return Row("problem", [{"role": "user", "content": content}], paths, {})


def _picture(path: Path, side: int, rng: np.random.Generator) -> Path:
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return path


class Provider:
    """What the providers share: the trained set, the optimiser, and the order of a step.

    A provider gives `sample() -> (groups·g, r)`, `score() -> (groups·g, r)` log-probs of the problem's responses, and
    `backward(responses, advantage) -> loss`, which adds to the gradients.
    """

    def __init__(self, problem: Problem, model: torch.nn.Module):
        self.problem, self.model, self.seed = problem, model, 0
        model.model.visual.requires_grad_(problem.vision_trained)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, fused=True)

    def update(self) -> None:
        self._update(self.problem.responses, self.problem.advantage)

    def step(self) -> None:
        """A whole step as a trainer makes it: the ratio of policy and sampler is 1, nothing is scored again."""
        responses = self.sample()
        self._update(responses, self.problem.judge(responses))

    def _update(self, responses: Tensor, advantage: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(responses, advantage)
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()

    def gradients(self) -> tuple[float, Tensor]:
        """Loss and all gradients (n,) on the problem's responses; the gradients stay."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        loss = self.backward(self.problem.responses, self.problem.advantage)
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.trained]
        return loss, torch.cat([grad.float().flatten() for grad in found])

    def accumulate(self) -> None:
        """Forward and backward into gradients that exist: what they take beyond is activations."""
        self.backward(self.problem.responses, self.problem.advantage)


class Ours(Provider):
    """cosmo_fast as its trainer runs it. shared=False: every response stands behind a prompt of its own.

    A frozen tower's features are kept from sampling to the update; a step begins without any.
    """

    shared = True

    def __init__(self, problem: Problem):
        self.policy = load_policy(problem.model, dtype=problem.dtype)
        self.policy.eos_ids = [-1]  # all responses are as long
        super().__init__(problem, self.policy.model)
        if problem.dtype != "float32":  # as its trainer does: the others' AdamW learns in bf16
            self.optimizer = AdamW(self.model.named_parameters(), weight_decay=0.01, lr=LEARNING_RATE)
            self.trained = list(self.optimizer.names)
        self.vision = Vision(self.policy)
        config = _config(problem)
        self.context = Context(config, config.stages[0], self.policy, self.vision, 0)
        self.sampler = Sampler(self.policy, self.vision, config.sampling_batch_size, config.max_tokens_per_batch)
        self.params = SamplingParams(problem.r)
        self.objective = grpo(EPSILON)
        self.each = problem.g if self.shared else 1  # responses a prompt
        self.prompts: list[Prompt] = [p for p in problem.prompts for _ in range(problem.g // self.each)]
        self.old_logps = self.score().numpy()

    def sample(self) -> Tensor:
        self.vision.forget()
        self.seed += 1
        found = self.sampler.generate(self.prompts, self.params, num_generations=self.each, seed=self.seed)
        completions = [c for group in found for c in group]
        self.sampled_logps = np.stack([c.logps for c in completions])
        return torch.from_numpy(np.stack([c.ids for c in completions]))

    @torch.no_grad()
    def score(self) -> Tensor:
        plan = self._plan()
        logps, _ = self.policy.logprobs(plan, self.vision.features(plan.media))
        return logps.view(self.problem.responses.shape)

    def _plan(self) -> Plan:
        return Plan(self.prompts, [list(part.numpy()) for part in self.problem.responses.split(self.each)])

    def backward(self, responses: Tensor, advantage: Tensor) -> float:
        old_logps = self.old_logps if responses is self.problem.responses else self.sampled_logps
        weight = np.full(self.problem.r, 1 / responses.numel(), dtype=np.float32)
        groups = []
        for i, prompt in enumerate(self.prompts):
            part = slice(i * self.each, (i + 1) * self.each)
            told = {"advantages": advantage[part].tolist(), "old_logps": list(old_logps[part])}
            groups.append(Group(prompt, list(responses[part].numpy()), weights=[weight] * self.each, **told))
        return accumulate(self.context, groups, self.objective)[0]

    def parts(self) -> dict:
        """Forward and backward of vision tower, language model and head apart."""
        plan, problem = self._plan(), self.problem
        targets, sequence = (plan.tensor(name, self.policy.device) for name in ("targets", "sequence"))
        told = {"advantage": problem.advantage[sequence], "old_logp": torch.from_numpy(self.old_logps).flatten()}
        batch = TokenBatch(targets, torch.full(targets.shape, 1 / len(targets)), sequence, **told)
        with torch.no_grad():
            features = self.vision.features(plan.media)
            hidden = self.policy.hidden(plan, features)
        rows = hidden[plan.tensor("label_rows", self.policy.device)]

        def head():
            linear_policy_loss(_leaf(rows), self.policy.head_weight, batch, self.objective).loss.backward()

        return {
            "vision": lambda: self.vision.features(plan.media).backward(features),
            "language": lambda: self.policy.hidden(plan, _leaf(features)).backward(hidden),
            "head": head,
        }


class Unshared(Ours):
    """The same packed forward in which every response has a prompt of its own; a picture is still encoded once."""

    shared = False


def _config(problem: Problem) -> Config:
    """A recipe whose budget holds any problem, so that nobody is cut into micro-batches."""
    rows = problem.groups * problem.g
    stage = {"name": "rl", "kind": "rl", "train_dataset": "none", "max_steps": 1, "loss_type": "grpo"}
    stage |= {"per_device_train_batch_size": rows, "num_generations": problem.g, "learning_rate": LEARNING_RATE}
    model = {"model_name_or_path": str(problem.model), "output_dir": "none", "max_completion_length": problem.r}
    return Config(**model, max_tokens_per_batch=1 << 20, sampling_batch_size=rows, stages=[stage])


class Padded(Provider):
    """transformers with PyTorch's SDPA, one row of prompt and response each, its pictures encoded for every row."""

    once = False  # or every picture once, its features handed to all rows

    def __init__(self, problem: Problem):
        super().__init__(problem, load_plain(problem))
        self.model.generation_config.eos_token_id = None
        copies = 1 if self.once else problem.g
        pixels = [_pixels(problem, row) for row in problem.rows for _ in range(copies)]
        self.pixels, self.grid = (torch.cat(parts) for parts in zip(*pixels, strict=True))
        self.ids = torch.stack([torch.from_numpy(prompt.ids) for prompt in problem.prompts])
        image = problem.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        rows = self.ids.repeat_interleave(problem.g, 0)
        self.slots = torch.nn.functional.pad((rows == image).long(), (0, problem.r))
        self.row_grid = self.grid.unflatten(0, (-1, len(problem.rows[0].images)))
        self.row_grid = self.row_grid.repeat_interleave(problem.g // copies, 0).flatten(0, 1)

    def sample(self) -> Tensor:
        copies = 1 if self.once else self.problem.g
        ids = self.ids.repeat_interleave(copies, 0)
        settings = {"max_new_tokens": self.problem.r, "suppress_tokens": self.problem.special, "do_sample": True}
        with torch.no_grad():
            found = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=self.pixels,
                image_grid_thw=self.grid,
                mm_token_type_ids=self.slots[:: self.problem.g // copies, : self.problem.p],
                num_return_sequences=self.problem.g // copies,
                **settings | {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
            )
        return found[:, self.problem.p :]

    @torch.no_grad()
    def score(self) -> Tensor:
        return self._logps(self.problem.responses)

    def backward(self, responses: Tensor, advantage: Tensor) -> float:
        loss = self._loss(self._logps(responses), advantage)
        loss.backward()
        return loss.item()

    def _loss(self, logps: Tensor, advantage: Tensor) -> Tensor:
        ratio, a = (logps - logps.detach()).exp(), advantage[:, None]
        return -torch.min(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a).mean()

    def _features(self) -> list[Tensor]:
        """Of every row's pictures, one after the other."""
        found = self.model.model.get_image_features(self.pixels, self.grid, return_dict=True).pooler_output
        return self._for_rows(found)

    def _for_rows(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        if not self.once:
            return list(features)
        each = len(features) // self.problem.groups
        return [f for i in range(0, len(features), each) for _ in range(self.problem.g) for f in features[i : i + each]]

    def _inputs(self, responses: Tensor, features: list[Tensor]) -> dict:
        ids = torch.cat([self.ids.repeat_interleave(self.problem.g, 0), responses], 1)
        pictures = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": self.slots}
        return inputs | {"image_grid_thw": self.row_grid, "mm_encoder_outputs": pictures, "use_cache": False}

    def _logps(self, responses: Tensor) -> Tensor:
        inputs = self._inputs(responses, self._features())
        logits = self.model(**inputs, logits_to_keep=self.problem.r + 1).logits[:, :-1]
        return _logps_of(logits, responses)

    def parts(self) -> dict:
        """Forward and backward of vision tower, language model and head apart."""
        problem, tower = self.problem, self.model.model
        with torch.no_grad():
            features = tower.get_image_features(self.pixels, self.grid, return_dict=True).pooler_output
            inputs = self._inputs(problem.responses, self._for_rows(features))
            hidden = tower(**inputs).last_hidden_state
        rows = hidden[:, -problem.r - 1 : -1]

        def vision():
            found = tower.get_image_features(self.pixels, self.grid, return_dict=True).pooler_output
            torch.cat(found).backward(torch.cat(features))

        def language():
            given = self._for_rows([_leaf(f) for f in features])
            tower(**self._inputs(problem.responses, given)).last_hidden_state.backward(hidden)

        def head():
            logits = self.model.lm_head(_leaf(rows))
            self._loss(_logps_of(logits, problem.responses), problem.advantage).backward()

        return {"vision": vision, "language": language, "head": head}


class PaddedVisionOnce(Padded):
    """The same, but every picture is encoded once a pass."""

    once = True


def load_plain(problem: Problem) -> torch.nn.Module:
    """The model with transformers' own attention."""
    settings = {"dtype": getattr(torch, problem.dtype), "attn_implementation": "sdpa"}
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(problem.model, **settings).eval()


def _pixels(problem: Problem, row: Row) -> tuple[Tensor, Tensor]:
    images = [Image.open(path).convert("RGB") for path in row.images]
    found = problem.image_processor(images=images, return_tensors="np")
    return torch.from_numpy(found["pixel_values"]), torch.from_numpy(found["image_grid_thw"])


def _logps_of(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(2, targets[..., None])[..., 0]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
