"""Which vision rows of each image stay: exact, deterministic, each image on its own.

Selectors and their sources: `max_min` is DivPrune (Alvar et al., 2025), whose first pick is another one; `dpp` CDPruner
(Zhang et al., 2025) with the greedy MAP of Chen et al. (2018); `attention` the score of FastV (Chen et al., 2024) over
all text rows; `key_norm` keeps small norms, which draw the most attention (Devoto et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from cosmo_fast.ops.vocab_stats import statistics_dtype, unit_stride

SELECTORS = ("uniform", "random", "max_min", "dpp", "attention", "key_norm", "frame_difference")
VERSION = 1  # of what the selectors choose: counts up whenever the same input would give other rows
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_NEEDS = {
    "random": ("seeds",),
    "max_min": ("features",),
    "dpp": ("features", "text"),
    "attention": ("query", "key", "lse", "query_counts"),
    "key_norm": ("key",),
    "frame_difference": ("features", "grids"),
}


def kept_counts(
    counts: Sequence[int] | np.ndarray, keep: float | int, prompts: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """How many rows of each image stay: int64 (images,), from its rows `counts` (images,).

    keep, a float in (0, 1]: ⌈keep · rows⌉, with keep read as the decimal that Python prints (0.1 of 1000 rows is 100).
    An int >= 0: that many rows of an image at most; with `prompts` (images,), the prompt of each image, of a prompt at
    most, divided over its images in proportion to their rows by largest remainder, ties to the first image.
    Raises ValueError for any other `keep`, negative counts, or prompts of another length.
    """
    counts = _integers("counts", counts)
    if (counts < 0).any():
        raise ValueError(f"counts must not be negative, got {counts.min()}")
    if isinstance(keep, Integral) and not isinstance(keep, bool) and keep >= 0:
        if prompts is None:
            return np.minimum(counts, min(int(keep), counts.max(initial=0)))
        prompts, kept = _integers("prompts", prompts, len(counts)), counts.copy()
        for prompt in np.unique(prompts):
            images = np.flatnonzero(prompts == prompt)
            rows = [int(x) for x in counts[images]]
            if sum(rows) > keep:
                shares = [divmod(int(keep) * x, sum(rows)) for x in rows]
                left = int(keep) - sum(share for share, _ in shares)
                first = sorted(range(len(rows)), key=lambda i: -shares[i][1])[:left]
                kept[images] = [share + (i in first) for i, (share, _) in enumerate(shares)]
        return kept
    if isinstance(keep, Real) and not isinstance(keep, Integral) and 0 < keep <= 1:
        share = Fraction(repr(float(keep)))
        return np.array([-(-share.numerator * int(x) // share.denominator) for x in counts], np.int64)
    raise ValueError(f"keep must be a float in (0, 1] or an int >= 0, got {keep!r}")


def vision_prune(
    features: Tensor | None,
    counts: Sequence[int] | np.ndarray,
    keep: float | int,
    selector: str,
    *,
    prompts: Sequence[int] | np.ndarray | None = None,
    text: Tensor | None = None,
    seeds: Sequence[int] | np.ndarray | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    lse: Tensor | None = None,
    query_counts: Sequence[int] | np.ndarray | None = None,
    scale: float | None = None,
    grids: Sequence | np.ndarray | None = None,
) -> Tensor:
    """The rows that stay, int64 (m,) on the host, ascending, of images that lie one after the other.

    Args:
        features: (n, d) fp32, bf16 or fp64; read by max_min, dpp and frame_difference.
        counts: (images,) rows of each image, n in all.
        keep, prompts: see :func:`kept_counts`, which says how many of each image, k.
        selector: by which score they are chosen; equal scores go to the lower row.
            uniform: rows ⌊(2j + 1) rows / 2k⌋.
            random: the k rows with the smallest hash of (seed, row); `seeds` (images,) ints.
            max_min: k times the row with the largest distance to the nearest one chosen; first, the row farthest from
            the direction of the mean of the unit rows (ours; the paper takes the one farthest from its neighbour).
            dpp: greedily the largest determinant of diag(r) S diag(r), S the rows' cosines, r their cosines to `text`
            (images, d), or (prompts, d) where `prompts` is given, spread over [0, 1] within the image. When the rows
            that are left depend linearly on those chosen, the most relevant ones.
            attention: most of Σ over heads and query rows of exp(scale q·k - lse); `query` (Tq, H, D), `query_counts`
            (images,) rows of it for each image, `key` (n, Hk, D), `lse` (Tq, H) the natural logarithm of the whole
            softmax's denominator, scale D ** -0.5 by default. No matrix of weights is stored.
            key_norm: smallest sum of squares of `key` over all heads.
            frame_difference: `grids` (images, 3) of t, h, w: the first frame, or where that is more than half of k,
            ⌈k / 2⌉ of its rows, spread as by `uniform`; then the largest squared difference to the same place one
            frame before (ours).

    max_min and dpp compare rows of length 32000 rounded to whole numbers (a row of zeros stays one), by their squared
    distances and products: the same rows on every device. The others sort sums: of attention in fp32 (fp64 for fp64),
    which devices may order differently where two differ by a rounding; key_norm and frame_difference in fp64.
    No gradient. CPU: C++. CUDA: C++ where the extension was built with it, or else the greedy selectors on the host;
    Triton for the scores.

    Raises:
        ValueError: an unknown selector, a missing or misshapen argument, or NaN or infinity in what the selector reads.
    """
    if selector not in SELECTORS:
        raise ValueError(f"selector must be one of {', '.join(SELECTORS)}, got {selector!r}")
    given = {"features": features, "text": text, "seeds": seeds, "grids": grids}
    given |= {"query": query, "key": key, "lse": lse, "query_counts": query_counts}
    for name in _NEEDS.get(selector, ()):
        if given[name] is None:
            raise ValueError(f"selector {selector!r} needs {name}")
    kept = kept_counts(counts, keep, prompts)
    counts = _integers("counts", counts)
    starts, n = np.cumsum(counts) - counts, int(counts.sum())
    for name in ("features", "key"):
        x = given[name]
        if name in _NEEDS.get(selector, ()) and (x.dim() != 2 + (name == "key") or len(x) != n):
            raise ValueError(f"{name} must have the {n} rows that counts give, got {tuple(x.shape)}")
    if selector in ("max_min", "dpp"):
        text = _text(text, features, counts, prompts) if selector == "dpp" else None
        return _greedy(features, text, counts, kept, selector)
    first = np.zeros(n)  # ascending order of this, then of the rows
    if selector == "attention":
        first = -_attention(query, key, lse, counts, _integers("query_counts", query_counts, len(counts)), scale)
    elif selector == "key_norm":
        first = _squares(key.flatten(1), np.zeros(n, np.int64), counts, selector)
    elif selector == "random":
        first = _hashes(_integers("seeds", seeds, len(counts)), counts)
    elif selector == "frame_difference":
        first = _changes(features, counts, kept, np.asarray(grids))
    else:
        for start, count, k in zip(starts, counts, kept, strict=True):
            first[start + _even(count, k)] = -1
    images = zip(starts, counts, kept, strict=True)
    rows = [start + np.sort(np.argsort(first[start : start + count], kind="stable")[:k]) for start, count, k in images]
    return torch.from_numpy(np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64))


def _even(count: int, k: int) -> np.ndarray:
    return (2 * np.arange(k) + 1) * count // max(2 * k, 1)


def _integers(name: str, values: Sequence[int] | np.ndarray, length: int | None = None) -> np.ndarray:
    found = np.asarray(values)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu") or length not in (None, len(found)):
        wanted = "integers" if length is None else f"{length} integers, one an image,"
        raise ValueError(f"{name} must be {wanted} in one row, got {found.dtype} {found.shape}")
    return found.astype(np.int64)


def _rows(x: Tensor, name: str) -> Tensor:
    """x, detached, with contiguous elements in the last axis."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be fp32, bf16 or fp64, got {x.dtype}")
    return unit_stride(x.detach())


def _refuse(bad: np.ndarray, counts: np.ndarray, selector: str, name: str) -> None:
    """ValueError if any of the rows of all images is `bad`."""
    if bad.any():
        image = int(np.searchsorted(np.cumsum(counts), np.flatnonzero(bad)[0], side="right"))
        raise ValueError(f"{selector}: {name} of image {image} has NaN or infinity (or squares that overflow)")


def _plain(x: Tensor, name: str) -> Tensor:
    """fp32 as the greedy kernels read it; an fp64 row is divided by its largest element first, so that it fits."""
    x = _rows(x, name)
    if x.dtype == torch.float64 and x.shape[1]:
        largest = x.abs().amax(1, keepdim=True)
        x = x / torch.where(largest > 0, largest, 1.0)
    return x.float().contiguous()


def _text(text: Tensor, features: Tensor, counts: np.ndarray, prompts) -> Tensor:
    """A row an image."""
    if prompts is not None:
        prompts = _integers("prompts", prompts, len(counts))
        if len(prompts) and not 0 <= prompts.min() <= prompts.max() < len(text):
            raise ValueError(f"text has {len(text)} rows, which prompts name from 0 on, got {prompts.tolist()}")
        text = text[torch.from_numpy(prompts).to(text.device)]
    if text.shape != (len(counts), features.shape[1]) or text.dtype != features.dtype:
        wanted = f"({len(counts)}, {features.shape[1]}) {features.dtype}"
        raise ValueError(f"text must be {wanted}, a row an image or prompt, got {tuple(text.shape)} {text.dtype}")
    return text


def _greedy(features, text, counts, kept, selector):
    features = _plain(features, "features")
    text = None if text is None else _plain(text, "text")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("cosmo_fast::vision_greedy", "CUDA"):
        features, text = (x if x is None else x.cpu() for x in (features, text))
    places = (torch.from_numpy(counts), torch.from_numpy(kept))
    rows = torch.ops.cosmo_fast.vision_greedy(features, *places, text).cpu()
    _refuse(rows.numpy() < 0, kept, selector, "features" if text is None else "features or text")
    return rows.sort().values  # images lie one after the other


def _squares(x: Tensor, back: np.ndarray, counts: np.ndarray, selector: str, name: str = "key") -> np.ndarray:
    """Σ (row - the row `back` before it)², or of the row itself where that is 0: fp64 (n,)."""
    x = _rows(x, name)
    found = torch.ops.cosmo_fast.vision_squares(x, torch.from_numpy(back).to(x.device)).cpu().numpy()
    _refuse(~np.isfinite(found), counts, selector, name)
    return found


def _attention(query, key, lse, counts, query_counts, scale):
    heads = query.shape[1:]
    if query.dim() != 3 or heads[1:] != key.shape[2:] or heads[0] % key.shape[1] or lse.shape != query.shape[:2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, lse))
        raise ValueError(f"query (Tq, H, D), key (n, Hk, D) and lse (Tq, H), H a multiple of Hk, got {shapes}")
    if query.dtype != key.dtype:
        raise ValueError(f"query and key must be of one dtype, got {query.dtype} and {key.dtype}")
    if query_counts.sum() != len(query) or ((query_counts < 1) & (counts > 0)).any() or (query_counts < 0).any():
        raise ValueError(f"query_counts must give each image rows of query, {len(query)} in all, got {query_counts}")
    for x, owners, name in ((key, counts, "key"), (query, query_counts, "query"), (lse, query_counts, "lse")):
        _squares(x.flatten(1), np.zeros(len(x), np.int64), owners, "attention", name)
    scale = heads[1] ** -0.5 if scale is None else scale
    lse = lse.detach().to(statistics_dtype(query.dtype)).contiguous()
    places = (torch.from_numpy(counts), torch.from_numpy(query_counts))
    scores = torch.ops.cosmo_fast.vision_attention(_rows(query, "query"), _rows(key, "key"), lse, *places, scale)
    return scores.cpu().numpy()


def _changes(features, counts, kept, grids):
    if grids.shape != (len(counts), 3) or grids.dtype.kind not in "iu" or (grids.prod(1) != counts).any():
        raise ValueError(
            f"grids must be (images, 3) integers whose products are {counts.tolist()}, got {grids.tolist()}"
        )
    frames = grids[:, 1] * grids[:, 2]
    rows = np.concatenate([np.zeros(0, np.int64), *map(np.arange, counts)])
    back = np.where(rows >= np.repeat(frames, counts), np.repeat(frames, counts), 0).astype(np.int64)
    first = -_squares(features, back, counts, "frame_difference", "features")
    first[back == 0] = 0
    for start, frame, k in zip(np.cumsum(counts) - counts, frames, kept, strict=True):
        first[start + _even(frame, min((k + 1) // 2, frame))] = -np.inf
    return first


def _hashes(seeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """uint64 (n,): the finaliser of SplitMix64 over a mixed seed plus the row."""

    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    rows = np.concatenate([np.zeros(0, np.uint64), *(np.arange(1, x + 1, dtype=np.uint64) for x in counts)])
    return mix(np.repeat(mix(seeds.astype(np.uint64)), counts) + rows * np.uint64(0x9E3779B97F4A7C15))


@torch.library.register_fake("cosmo_fast::vision_attention")
def _(query, key, lse, counts, query_counts, scale):
    return key.new_empty(key.shape[0], dtype=torch.float64)


@torch.library.register_fake("cosmo_fast::vision_squares")
def _(x, back):
    return x.new_empty(x.shape[0], dtype=torch.float64)


@torch.library.register_kernel("cosmo_fast::vision_attention", "cuda")
def _(query, key, lse, counts, query_counts, scale):
    from cosmo_fast.kernels.vision_prune import vision_attention as launch  # imports Triton

    return launch(query, key, lse, counts, query_counts, scale)


@torch.library.register_kernel("cosmo_fast::vision_squares", "cuda")
def _(x, back):
    from cosmo_fast.kernels.vision_prune import vision_squares as launch  # imports Triton

    return launch(x, back)
