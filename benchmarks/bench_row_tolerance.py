"""What leaving rows out of the gradient products costs and saves, on the tokens of a policy that the demo trained.

    python benchmarks/bench_row_tolerance.py runs/demo [--groups 128] [--quick]

Samples groups for questions and requests of the demo's world, rewards them, and takes the gradient of CPGD's loss by
the head and by the hidden states with and without a `row_tolerance`. Writes benchmarks/results/row_tolerance.csv
(--quick: row_tolerance_quick.csv):
rows_kept, the share of the rows with a gradient that reach the two gradient products; bound and error, the reported
bound on ‖ΔdW‖ and the true one, over ‖dW‖ (root mean square over the draws where rows are kept by chance, with `bias`
the norm of their mean error); products, the predicted share (1 + 2·rows_kept)/3 of the three products; ms, the time of
the call, on the policy's own head (V 978) with the tokens repeated to 16,384 rows.
"""

import argparse
from pathlib import Path

import measure
import torch

from cosmo_fast.data import load_rows
from cosmo_fast.data.encode import Encoder
from cosmo_fast.models import load_policy
from cosmo_fast.models.vision import Vision
from cosmo_fast.objectives import TokenBatch, advantages, objective, token_weights
from cosmo_fast.ops import RowTolerance, linear_policy_loss
from cosmo_fast.rewards import RewardMix
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.stages.base import Group, plan_of
from cosmo_fast.world import ensure_world

SHARES = (0.0, 0.001, 0.01, 0.03, 0.1)
GENERATIONS, DRAWS, ROWS = 8, 32, 16384
COLUMNS = "op mode tolerance n d v rows_kept bound error bias products ms_p20 ms_p50 ms_p80 device torch commit".split()


@torch.no_grad()
def problem(folder: Path, groups: int):
    """hidden (N, d), head weight (V, d) and the batch of one rollout, in fp32."""
    policy, world = load_policy(folder), ensure_world()
    rows = [row for name in ("rl_safety", "rl") for row in load_rows(world / f"{name}.jsonl", limit=groups // 2)]
    encoder, vision = Encoder(policy), Vision(policy)
    prompts = [encoder.prompt(row) for row in rows]
    sampled = Sampler(policy, vision).generate(prompts, SamplingParams(56), num_generations=GENERATIONS, seed=0)
    flat = [completion for group in sampled for completion in group]
    texts = policy.tokenizer.batch_decode([c.ids for c in flat], skip_special_tokens=True)
    owner = [prompt for prompt in prompts for _ in range(GENERATIONS)]
    rewards = RewardMix()([p.text for p in owner], texts, [p.columns for p in owner]).total
    index = torch.arange(len(prompts)).repeat_interleave(GENERATIONS)
    lengths = torch.tensor([len(c.ids) for c in flat])
    plan = plan_of([Group(p, [c.ids for c in g], []) for p, g in zip(prompts, sampled, strict=True)])
    hidden = policy.hidden(plan, vision.features(plan.media))[plan.tensor("label_rows", policy.device)]
    batch = TokenBatch(
        plan.tensor("targets", policy.device),
        token_weights("prompt-mean-token-mean", lengths, index),
        plan.tensor("sequence", policy.device),
        advantages(rewards, index).repeat_interleave(lengths),
        torch.cat([torch.as_tensor(c.logps) for c in flat]),
    )
    return hidden, policy.head_weight.detach(), batch


def _run(hidden, weight, batch, tolerance, dtype=torch.float64):
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in vars(batch).items() if x is not None}
    output = linear_policy_loss(hidden, weight, TokenBatch(**given), objective("cpgd"), row_tolerance=tolerance)
    return output, torch.autograd.grad(output.loss, (hidden, weight))


def rows(folder: Path, groups: int, repeats: int):
    """One row a mode and tolerance; without one first."""
    hidden, weight, batch = problem(folder, groups)
    _, (dx, dw) = _run(hidden, weight, batch, None)
    (n, d), v = hidden.shape, weight.shape[0]
    active = int((dx != 0).any(1).sum())
    about = {"op": "row_tolerance", "n": n, "d": d, "v": v, **measure.origin("cpu")}
    many = torch.arange(ROWS) % n
    large, index = (
        (hidden[many], weight),
        TokenBatch(
            **{k: x[many] for k, x in vars(batch).items() if x is not None and k != "sequence"},
            sequence=torch.arange(ROWS) // 64,
        ),
    )
    settings = {("none", 0.0): None}
    settings |= {("drop", share): RowTolerance(share) for share in SHARES if share}
    settings |= {("chance", share): RowTolerance(share, unbiased=True) for share in SHARES if share}

    def call(tolerance):
        return lambda: _run(*large, index, tolerance, torch.float32)

    runs = {key: call(tolerance) for key, tolerance in settings.items()}
    for run in runs.values():
        run()
    times = measure.interleaved(runs, repeats, "cpu")
    for (mode, share), tolerance in settings.items():
        draws = DRAWS if mode == "chance" else 1
        seeds = [tolerance if draws == 1 else RowTolerance(share, True, seed) for seed in range(draws)]
        found = [_run(hidden, weight, batch, seed) for seed in seeds]
        errors = torch.stack([gradients[1] - dw for _, gradients in found])
        dropped = [output.dropped or {"rows": 0, "dw": 0.0} for output, _ in found]
        idle = n - active  # rows that never had a gradient count among the dropped ones
        kept = 1 - max(sum(int(x["rows"]) for x in dropped) / draws - idle, 0) / active
        yield (
            about
            | times[mode, share]
            | {
                "mode": mode,
                "tolerance": share,
                "rows_kept": kept,
                "bound": float(dropped[0]["dw"] / dw.norm()),
                "error": float((errors.flatten(1).square().sum(1).mean().sqrt()) / dw.norm()),
                "bias": float(errors.mean(0).norm() / dw.norm()),
                "products": (1 + 2 * kept * active / n) / 3,
            }
        )


def main() -> None:
    """Measures, prints, writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", type=Path, help="a model folder that the demo wrote")
    parser.add_argument("--groups", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="16 groups, three repeats")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.groups, options.repeats = 16, 3
    torch.manual_seed(0)

    def told():
        for row in rows(options.policy, options.groups, options.repeats):
            figures = "  ".join(
                f"{k} {row[k]:.4g}" for k in ("rows_kept", "bound", "error", "bias", "products", "ms_p50")
            )
            print(f"{row['mode']:<8}{row['tolerance']:<8}{figures}", flush=True)
            yield row

    measure.write(options.output or measure.result_file("row_tolerance", options.quick), COLUMNS, told())


if __name__ == "__main__":
    main()
