"""The embedded world: drawn scenes of real pictograms with exact answers and response policies.

It goes through the same door as a user's data: JSONL rows, pictures on disk, an ordinary Hugging Face model folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from cosmo_fast.world.build import SIZES, VERSION, build
from cosmo_fast.world.draw import SIZE

__all__ = ["build", "ensure_world"]


def ensure_world(
    *, seed: int = 0, cache_dir: str | Path | None = None, picture: int = SIZE, family: str = "qwen2_5_vl",
    **sizes: float,
) -> Path:  # fmt: skip
    """The folder of the world of this seed and these sizes, with its model under ``model``; built on the first call.

    ``family``: of the model alone, one of :data:`cosmo_fast.world.model.FAMILIES`; rows and pictures are the same.

    It lies in ``cache_dir``, by default $XDG_CACHE_HOME/cosmo_fast (~/.cache/cosmo_fast).

    Raises:
        ValueError: an unknown size or family, or the folder cannot be written.
    """
    from cosmo_fast.world.model import FAMILIES, build_model, picture_statistics, training_material

    if family not in FAMILIES:
        raise ValueError(f"world.family={family!r} is none of {', '.join(FAMILIES)}")
    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosmo_fast")
    wanted = {name: float(size) for name, size in (SIZES | sizes).items()}  # a recipe's 18 is 18.0
    about = hashlib.sha256(json.dumps([seed, picture, family, wanted], sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):  # a changed world is another world, whatever VERSION says
        about.update(source.read_bytes())
    digest = about.hexdigest()[:12]
    folder = root / f"world-{VERSION}-{digest}"
    if (folder / "model" / "config.json").is_file():
        return folder
    draft = root / f".world-{VERSION}-{digest}-{os.getpid()}"
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        build(draft, seed=seed, picture=picture, **sizes)
        texts, pictures = training_material(draft)
        mean, std = picture_statistics(pictures if picture == SIZE else pictures[:: len(pictures) // 500 + 1])
        build_model(draft / "model", texts, seed=seed, image_mean=mean, image_std=std, picture=picture, family=family)
        try:
            draft.rename(folder)
        except OSError:
            # Another process was faster; its world has the same bytes and may be in use.
            if not (folder / "model" / "config.json").is_file():
                raise
    except OSError as error:
        raise ValueError(
            f"world.cache_dir={str(root)!r} cannot be written ({error}); set world.cache_dir or XDG_CACHE_HOME"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
