"""Vision features of a plan's pictures: the tower runs once a picture, a frozen tower once for good."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch

from cosmo_fast.data.rows import MAX_IMAGE_PIXELS, open_image
from cosmo_fast.models.policy import Policy
from cosmo_fast.plan import Media


class _ByteLRU(OrderedDict):
    """Least recently used tensors are dropped once the total is over ``limit`` bytes."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.held = limit, 0

    def take(self, keys: list[str], fresh: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The values of ``keys``, those that the cache lacks from ``fresh``, which it then holds too."""
        values = [fresh[key] if key in fresh else self[key] for key in keys]
        for key, value in zip(keys, values, strict=True):
            if key in self:
                self.move_to_end(key)
            else:
                self._put(key, value)
        return values

    def _put(self, key: str, value: torch.Tensor) -> None:
        self[key] = value
        self.held += value.nbytes
        while self.held > self.limit and len(self) > 1:
            self.held -= self.popitem(last=False)[1].nbytes


class Vision:
    """Patches and features of pictures, cached.

    Args:
        policy: whose image processor and tower are used. cache_mib: bound of each of the two caches, in MiB.
        max_image_pixels: larger pictures are refused before they are decoded.

    Features are kept only while the tower is frozen, until :meth:`forget`: when its weights may have changed, and
    before every rollout, because the last bits of a feature depend on the pictures encoded with it: what a resumed run
    sees may not depend on what an earlier step had in its cache.
    """

    def __init__(self, policy: Policy, cache_mib: int = 1024, max_image_pixels: int = MAX_IMAGE_PIXELS):
        self.policy, self.max_image_pixels = policy, max_image_pixels
        self._patches = _ByteLRU(cache_mib << 20)
        self._grids: dict[str, torch.Tensor] = {}
        self._features, self._together = _ByteLRU(cache_mib << 20), False

    def forget(self) -> None:
        self._features, self._together = _ByteLRU(self._features.limit), False

    def features(self, media: list[Media], *, alone: bool = False) -> torch.Tensor | None:
        """Features (m, ...) of distinct ``media``, in order; None without any. Differentiable unless frozen.

        alone: every picture by itself, so that no bit of it depends on the others, nor what is chosen of it.
        """
        if not media:
            return None
        if not self.policy.vision_frozen:
            return torch.cat([self._run([m]) for m in media]) if alone else self._run(media)
        if alone and self._together:
            self.forget()
        missing = [m for m in media if m.key not in self._features]
        self._together |= not alone and len(missing) > 1
        fresh = {}
        if missing:
            with torch.no_grad():
                made = torch.cat([self._run([m]) for m in missing]) if alone else self._run(missing)
            parts = made.split([m.rows for m in missing])
            fresh = {m.key: part.clone() for m, part in zip(missing, parts, strict=True)}
        return torch.cat(self._features.take([m.key for m in media], fresh))

    def blank(self, media: list[Media]) -> torch.Tensor:
        """Features (m, d) of pictures of the same sizes in which every pixel is the mean."""
        return self._run(media, blank=True)

    def _run(self, media: list[Media], blank: bool = False) -> torch.Tensor:
        keys = [m.key for m in media]
        missing = [key for key in keys if key not in self._patches]
        fresh: dict[str, torch.Tensor] = {}
        if missing:
            images = [open_image(Path(key), max_image_pixels=self.max_image_pixels) for key in missing]
            policy = self.policy
            patches, grids = policy.family.pixels(policy.model.config, policy.image_processor, images)
            for key, part, grid in zip(missing, patches, grids, strict=True):
                fresh[key], self._grids[key] = part.clone(), grid
        patches = torch.cat(self._patches.take(keys, fresh))
        grids = torch.stack([self._grids[key] for key in keys])
        planned = torch.tensor([m.thw for m in media])
        if not torch.equal(grids, planned):
            wrong = keys[int((grids != planned).any(1).nonzero()[0])]
            raise ValueError(f"{wrong} was encoded for another size than it has now; was the file replaced?")
        patches = torch.zeros_like(patches) if blank else patches
        device = self.policy.device
        return self.policy.family.vision_features(self.policy.model, patches.to(device), grids.to(device))
