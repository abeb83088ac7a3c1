"""The kept vision rows against brute force in plain Python: ties, duplicates, few rows, many images, every dtype."""

import math

import numpy as np
import pytest
import torch
from devices import DEVICE, compiled_only

from cosmo_fast.ops import kept_counts, vision_prune

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
UNIT = 32000


def _unit(row):
    """The row at length UNIT in whole numbers, half away from zero."""
    row = [float(x) for x in row]
    length = math.sqrt(math.fsum(x * x for x in row))
    return [int(math.copysign(math.floor(abs(x) * UNIT / length + 0.5), x)) if length else 0 for x in row]


def _distance(x, y):
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def _max_min(rows, k, _text=None):
    units = [_unit(row) for row in rows]
    mean = _unit([sum(column) for column in zip(*units, strict=True)])
    chosen = []
    while len(chosen) < k:
        left = [i for i in range(len(rows)) if i not in chosen]
        near = {i: min(_distance(units[i], y) for y in [units[j] for j in chosen] or [mean]) for i in left}
        chosen.append(max(left, key=lambda i: (near[i], -i)))
    return sorted(chosen)


def _dpp(rows, k, text):
    """Each pick by the determinants of the matrices with one more row, in fp64."""
    units, text = np.array([_unit(row) for row in rows], float) / UNIT, np.array(_unit(text), float) / UNIT
    cosines = units @ text
    spread = cosines.max() - cosines.min()
    relevance = (cosines - cosines.min()) / spread if spread > 1e-12 else np.ones(len(rows))
    chosen = []
    while len(chosen) < k:
        left, gains = [i for i in range(len(rows)) if i not in chosen], {}
        for i in left:
            residual = units[i]
            if chosen:
                basis = units[chosen].T
                residual = residual - basis @ np.linalg.lstsq(basis, residual, rcond=None)[0]
            free = float(residual @ residual)
            gains[i] = relevance[i] ** 2 * (free if free > 1e-9 else 0.0)
        if max(gains.values()) == 0:
            return sorted(chosen + sorted(left, key=lambda i: (-relevance[i], i))[: k - len(chosen)])
        chosen.append(max(left, key=lambda i: (gains[i], -i)))
    return sorted(chosen)


GREEDY = {"max_min": _max_min, "dpp": _dpp}


def _images(dtype, counts, d=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), d, generator=generator)
    centres = torch.randn(4, d, generator=generator)
    x = 0.4 * x + centres[torch.randint(4, (len(x),), generator=generator)]
    return x.to(dtype).to(DEVICE), torch.randn(len(counts), d, generator=generator).to(dtype).to(DEVICE)


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selector", GREEDY)
def test_the_greedy_selectors_pick_what_brute_force_picks(selector, dtype):
    counts = [37, 1, 0, 20, 16, 33]
    x, text = _images(dtype, counts)
    x[5:9] = x[2]  # duplicates
    x[40] = 0
    x[60] = -3 * x[61]
    for keep in (0, 1, 3, 9, 0.5, 1.0):
        rows = vision_prune(x, counts, keep, selector, text=text)
        assert rows.dtype == torch.int64 and rows.device.type == "cpu"
        expected, start = [], 0
        for i, (count, k) in enumerate(zip(counts, kept_counts(counts, keep), strict=True)):
            own = x[start : start + count].double().tolist()
            expected += [start + j for j in (GREEDY[selector](own, k, text[i].double().tolist()) if k else [])]
            start += count
        assert rows.tolist() == expected, keep
