"""``cosmo-fast data check | jailbreak | build-perception``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cosmo_fast.data.jailbreak import FAMILIES, write_attacks
from cosmo_fast.data.perception import build_perception
from cosmo_fast.data.rows import load_rows


def add(commands) -> None:
    """The sub-commands' arguments."""
    data = commands.add_parser("data", help="check rows before training, or make rows").add_subparsers(
        dest="action", required=True
    )
    check = data.add_parser(
        "check",
        help="what is wrong with the rows of a file; exit status 1 where anything is",
        usage="cosmo-fast data check FILE [--recipe RECIPE [--stage NAME] [--key.sub value ...]] [...]",
        description="Check every row by the trainer's own rules: messages, pictures, and labels, judges and answers "
        "by the default rewards; with --recipe by that recipe's rewards, and lengths in tokens too. Problems are "
        "printed with file and line. No weights are loaded, no picture is decoded, no reward of your own is called.",
    )
    check.add_argument("file", help="a JSONL file of rows")
    check.add_argument("--recipe", help="check as this recipe will read it; settings follow as --key.sub value")
    check.add_argument("--stage", help="the recipe's stage that the file is meant for, where none names it")
    check.add_argument("--max-problems", type=int, default=20, help="problems printed, at most")
    attack = data.add_parser("jailbreak", help="rows under multimodal jailbreaks, with their pictures")
    attack.add_argument("file", help="a JSONL file of rows")
    attack.add_argument("out_dir", help="folder for the rows and pictures")
    attack.add_argument("--families", default=",".join(FAMILIES), help=f"out of {','.join(FAMILIES)}")
    attack.add_argument("--compositions", type=int, default=0, help="that many different attacks a row, at most 64")
    attack.add_argument("--seed", type=int, default=0)
    attack.add_argument("--font", help="a TrueType file for scripts that Pillow's own font cannot write")
    for sub in (check, attack):
        sub.add_argument("--image-root", help="folder of the pictures; default: the folder of FILE")
    build = data.add_parser("build-perception", help="rows for VTPerception's first stage from captions")
    build.add_argument("file", help="a JSONL file of captions")
    build.add_argument("out", help="the JSONL file to write")
    build.add_argument("--threshold", type=float, default=0.6, help="lowest quality that is kept, in [0, 1]")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Runs one; returns the exit status. ``overrides``: settings of check's recipe."""
    if (overrides or getattr(options, "stage", None)) and not getattr(options, "recipe", None):
        raise ValueError(f"only data check with a --recipe takes {' '.join(overrides) or '--stage'}")
    file = Path(options.file)
    if options.action == "check":
        return _check(options, overrides)
    if options.action == "jailbreak":
        rows, families = load_rows(file, image_root=options.image_root), options.families.split(",")
        settings = {name: getattr(options, name) for name in ("seed", "compositions", "font")}
        print(f"{write_attacks(rows, Path(options.out_dir), file.name, families, **settings)} rows")
    else:
        print(json.dumps(build_perception(file, Path(options.out), threshold=options.threshold), indent=1))
    return 0


def _check(options: argparse.Namespace, overrides: list[str]) -> int:
    from cosmo_fast.config import load_config
    from cosmo_fast.data.check import check_file

    root = ["--image_root", options.image_root] if options.image_root else []
    config = load_config(options.recipe, [*overrides, *root]) if options.recipe else None
    result = check_file(options.file, config=config, stage=options.stage, image_root=options.image_root)
    problems = result.pop("problems")
    more = len(problems) - options.max_problems
    for line in [*problems[: options.max_problems], *([f"... and {more} more"] if more > 0 else [])]:
        print(line)
    print(json.dumps(result | {"problems": len(problems)}, ensure_ascii=False))
    return 1 if problems else 0
