"""Parts of the world that a recipe asks for by name (``world:cosmo/train.jsonl``), each written on first use.

A part is a folder in the world's, with pictures, rows and a model of its own, whose tokenizer knows all words of both.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from cosmo_fast.world import cosmo, draw, perception, verdicts
from cosmo_fast.world.build import README, VERSION, _check_disjoint, _digest
from cosmo_fast.world.model import build_model, picture_statistics, training_material

PARTS = {"cosmo": cosmo, "perception": perception, "verdicts": verdicts}
TAGS = [
    f"<{end}{tag}>" for tag in ("description", "answer", "search", "read", "confidence", "result") for end in ("", "/")
]


def ensure_part(world: Path, part: str) -> Path:
    """The folder of a part of the world in ``world`` (of its seed and sizes), built on the first call.

    Raises:
        ValueError: the folder cannot be written.
    """
    folder, draft = world / part, world / f".{part}-{os.getpid()}"
    if (folder / "model" / "config.json").is_file():
        return folder
    try:
        shutil.rmtree(draft, ignore_errors=True)
        _write(world, part, draft)
        try:
            draft.rename(folder)
        except OSError:
            if not (folder / "model" / "config.json").is_file():  # else another process was faster, with the same bytes
                raise
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error}); set world.cache_dir") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write(world: Path, part: str, draft: Path) -> None:
    about = json.loads((world / "world.json").read_text())
    (draft / "images").mkdir(parents=True)
    splits = PARTS[part].fill(draft, about["seed"] + int(_digest(part), 16), about["sizes"])
    draw.blank().save(draft / "images" / "blank.png")
    blank = splits["blank"].rows
    blank += [row | {"id": f"blank-{row['id']}", "images": ["images/blank.png"]} for row in splits["scenes"].rows]
    _check_disjoint(splits)
    for writer in splits.values():
        writer.write()
    notice = README.format(seed=about["seed"], version=VERSION, **about["sizes"]).partition("The supervised rows")[0]
    (draft / "README.md").write_text(notice + PARTS[part].ABOUT.format(**about["sizes"]))
    texts, pictures = training_material(draft)
    mean, std = picture_statistics(pictures)
    texts += training_material(world)[0]
    family = json.loads((world / "model" / "config.json").read_text())["model_type"]
    build_model(draft / "model", texts, seed=about["seed"], image_mean=mean, image_std=std, tags=TAGS, family=family)
