"""The rows of rejection-sampling SFT: right responses of a cold start to the prompts that RL draws from.

    python benchmarks/reproduce/cosmo_rft.py RUN_FOLDER OUTPUT_DIR --seed N

8 responses a row, as RL samples; the different ones with the full reward are kept, in a file for each of RL's files,
pictures copied beside them. The summary.json has one split, `rows`, whose n is what was kept.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from opened import opened

from cosmo_fast.checkpoint import replace_text
from cosmo_fast.data.encode import Encoder
from cosmo_fast.data.rows import load_rows
from cosmo_fast.doctor import environment
from cosmo_fast.models.vision import Vision
from cosmo_fast.rewards import RewardMix
from cosmo_fast.rollout import Sampler, SamplingParams

EACH, FULL = 8, 2.0  # of format, and of accuracy, safety or helpful


def main() -> None:
    """Sampling takes a minute: one that was stopped begins anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--limit", type=int, help="first rows of each file")
    options = parser.parse_args()
    began, out = time.perf_counter(), options.output_dir
    config, policy, find = opened(options.run)
    encoder, sampler = Encoder(policy), Sampler(policy, Vision(policy))
    params, mix, tried, kept = SamplingParams(config.max_completion_length), RewardMix(), 0, 0
    (out / "images").mkdir(parents=True, exist_ok=True)
    for file in ("rl.jsonl", "rl_safety.jsonl", "rl_attacks.jsonl"):
        path = Path(find(f"world:{file}"))
        prompts = [encoder.prompt(row) for row in load_rows(path)][: options.limit]
        groups = sampler.generate(prompts, params, num_generations=EACH, seed=options.seed)
        said = policy.tokenizer.batch_decode([c.ids for group in groups for c in group], skip_special_tokens=True)
        owner = [prompt for prompt in prompts for _ in range(EACH)]
        rewards = mix([p.text for p in owner], said, [p.columns for p in owner], [p.source for p in owner]).total
        lines = []
        for i, line in enumerate(path.read_text().splitlines()[: options.limit]):
            row, of = json.loads(line), range(i * EACH, (i + 1) * EACH)
            for text in dict.fromkeys(said[j] for j in of if rewards[j] >= FULL):
                answer = {"role": "assistant", "content": text}
                lines.append(json.dumps(row | {"messages": [*row["messages"], answer]}) + "\n")
            for picture in row["images"]:
                shutil.copyfile(path.parent / picture, out / picture)
        (out / file).write_text("".join(lines))
        tried, kept = tried + len(said), kept + len(lines)
        print(f"{file}: {len(lines)} of {len(said)} responses kept", flush=True)
    stage = {"name": "sampled", "seconds": time.perf_counter() - began, "splits": {"rows": {"n": kept}}}
    stage["measured"] = {"sampled": tried}
    summary = {"seed": options.seed, "stages": [stage], "environment": environment()}
    replace_text(out / "summary.json", json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
