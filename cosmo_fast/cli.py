"""The console script ``cosmo-fast``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cosmo_fast import train
from cosmo_fast.analysis import commands as analysis_commands
from cosmo_fast.data import commands as data_commands
from cosmo_fast.pruning import VisionPrune


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Runs a sub-command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="cosmo-fast", description="RL post-training of multimodal reasoning models.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser(
        "train",
        help="train a recipe: cosmo-fast train demo [--key.sub value ...] [--dry-run]",
        usage="cosmo-fast train RECIPE [--dry-run] [--key.sub value ...]",
        description=train.ABOUT,
    )
    training.add_argument("recipe", help="a YAML file or a shipped recipe")
    judging = commands.add_parser(
        "evaluate", help="accuracy, safe rate and over-refusal rate of a checkpoint on rows, as JSON"
    )
    judging.add_argument("checkpoint", help="a Hugging Face model folder")
    judging.add_argument("data", help="a JSONL file of rows")
    judging.add_argument("--image-root", help="folder of the pictures; default: the folder of DATA")
    judging.add_argument("--limit", type=positive, help="first rows only")
    judging.add_argument("--plain", help="the file that DATA's attacked rows were made of: does each attack count?")
    judging.add_argument("--search", help="a JSONL corpus that answers <search> and <read>, as a recipe's tools")
    judging.add_argument("--trained-on", nargs="+", help="files of the model's training: is any token of DATA in none?")
    data_commands.add(commands)
    analysing = analysis_commands.add(commands, positive)
    asking = commands.add_parser("generate", help="a completion for one prompt")
    asking.add_argument("checkpoint", help="a Hugging Face model folder")
    asking.add_argument("--prompt", required=True, help="the user's text")
    asking.add_argument(
        "--image", action="append", default=[], help="a picture file, put before the text; may be repeated"
    )
    asking.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    asking.add_argument("--num-generations", type=positive, default=1)
    asking.add_argument("--seed", type=int, default=0)
    asking.add_argument("--stop-strings", nargs="+", default=[], help="texts that end a completion")
    commands.add_parser("doctor", help="what is installed and what each part runs on")
    for sub in (judging, asking, *analysing):
        sub.add_argument("--max-completion-length", type=positive, default=256, help="tokens")
        sub.add_argument("--batch-size", type=positive, default=256, help="responses decoded at once")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
        sub.add_argument("--vision-prune", help="as a recipe's: selector=max_min,keep=0.5 and the like")
        sub.add_argument("--kv-cache-mib", type=positive, default=4096, help="bound of the keys and values")
    for sub in (judging, *analysing):
        about = "a model folder that judges rows without a judge; repeatable"
        sub.add_argument("--verifier", action="append", default=[], metavar="KIND=FOLDER", help=about)
    known, rest = parser.parse_known_args(arguments)
    if known.command == "train":
        return train.main(["--config", known.recipe, *rest])
    if rest and known.command != "data":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    train.quiet()
    try:
        if known.command == "data":
            return data_commands.run(known, rest)
        actions = {"evaluate": evaluate, "generate": generate, "doctor": doctor, "analyse": analysis_commands.run}
        actions[known.command](known)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Prints :func:`cosmo_fast.evaluate.score` of greedy completions as one JSON object."""
    from cosmo_fast.data import load_rows
    from cosmo_fast.evaluate.run import evaluate as run
    from cosmo_fast.models import load_policy
    from cosmo_fast.search import Search
    from cosmo_fast.verifiers.engine import Verifiers, flagged

    rows = load_rows(options.data, image_root=options.image_root, limit=options.limit)
    own = flagged(options, rows)
    policy = load_policy(Path(options.checkpoint).absolute(), device=options.device)
    bounds = {"batch_size": options.batch_size, "kv_cache_mib": options.kv_cache_mib}
    asked = {"max_completion_length": options.max_completion_length}
    asked["vision_prune"] = VisionPrune.parse(options.vision_prune)
    for name, files in (("plain", [options.plain]), ("trained_on", options.trained_on or [])):
        asked[name] = [row for file in files if file for row in load_rows(file)] or None
    asked["search"] = Search.load(options.search) if options.search else None
    asked["verifiers"] = Verifiers(own, device=policy.device) if own.verifiers else None
    result = run(policy, rows, **asked, **bounds)
    print(json.dumps(result, indent=1))


def generate(options: argparse.Namespace) -> None:
    """Prints completions, separated by blank lines."""
    from cosmo_fast.data.encode import Encoder
    from cosmo_fast.data.rows import single_row
    from cosmo_fast.models import load_policy
    from cosmo_fast.models.vision import Vision
    from cosmo_fast.rollout import Sampler, SamplingParams

    row = single_row(options.prompt, [Path(p) for p in options.image])
    policy = load_policy(Path(options.checkpoint).absolute(), device=options.device)
    params = SamplingParams(options.max_completion_length, options.temperature, stop_strings=options.stop_strings)
    bounds = {"batch_size": max(options.batch_size, options.num_generations), "kv_cache_mib": options.kv_cache_mib}
    sampler = Sampler(policy, Vision(policy), **bounds)
    prompt = Encoder(policy, vision_prune=VisionPrune.parse(options.vision_prune)).prompt(row)
    [group] = sampler.generate([prompt], params, num_generations=options.num_generations, seed=options.seed)
    print("\n\n".join(policy.tokenizer.batch_decode([c.ids for c in group], skip_special_tokens=True)))


def doctor(options: argparse.Namespace) -> None:
    """Prints what :mod:`cosmo_fast.doctor` finds."""
    from cosmo_fast.doctor import main as run

    run()


if __name__ == "__main__":
    sys.exit(main())
