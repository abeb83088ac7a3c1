"""The kept vision rows against brute force in plain Python: ties, duplicates, few rows, many images, every dtype."""

import hashlib
import math

import numpy as np
import pytest
import torch
from devices import DEVICE, INTERPRETED, compiled_only, interpret

from cosmo_fast.ops import kept_counts, vision_prune
from cosmo_fast.ops.vision_prune import VERSION

interpret("vision_prune", "vision_attention", "vision_squares")
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


def _case(dtype, counts, seed=0):
    """Everything that the selectors read, for `counts`; the keys have ties."""
    generator = torch.Generator().manual_seed(seed)
    x, text = _images(dtype, counts, seed=seed)
    queries = [3 + i for i in range(len(counts))]
    query = torch.randn(sum(queries), 6, 8, generator=generator).to(dtype).to(DEVICE)
    key = torch.randn(sum(counts), 2, 8, generator=generator).to(dtype).to(DEVICE)
    key[3], key[4] = key[1], key[1]
    lse = (torch.randn(sum(queries), 6, generator=generator) + 4).to(DEVICE)
    given = {"text": text, "seeds": [7 * i - 3 for i in range(len(counts))], "query": query, "key": key, "lse": lse}
    return x, given | {"query_counts": queries, "grids": [(1, 1, c) if c % 4 else (c // 4, 2, 2) for c in counts]}


def _weights(given, counts, image):
    """The attention that each key of an image gets, one query row and head after the other."""
    first, queries = sum(given["query_counts"][:image]), given["query_counts"][image]
    start = sum(counts[:image])
    query, key, lse = (given[name].double().tolist() for name in ("query", "key", "lse"))
    return [
        math.fsum(
            math.exp(sum(a * b for a, b in zip(query[i][h], key[j][h // 3], strict=True)) / math.sqrt(8) - lse[i][h])
            for i in range(first, first + queries)
            for h in range(6)
        )
        for j in range(start, start + counts[image])
    ]


def _mixed(x):
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ x >> shift) * factor % 2**64
    return x


def _order(selector, given, x, counts, image, k):
    """Rows of an image, the ones to keep first."""
    n, start = counts[image], sum(counts[:image])
    if selector == "attention":
        scores = _weights(given, counts, image)
    elif selector == "key_norm":
        scores = [-sum(v * v for v in row.flatten().double().tolist()) for row in given["key"][start : start + n]]
    elif selector == "random":
        scores = [
            -_mixed((_mixed(given["seeds"][image] % 2**64) + (j + 1) * 0x9E3779B97F4A7C15) % 2**64) for j in range(n)
        ]
    elif selector == "uniform":
        chosen = {(2 * j + 1) * n // (2 * k) for j in range(k)}
        scores = [j in chosen for j in range(n)]
    else:
        _, h, w = given["grids"][image]
        rows, frame = x[start : start + n].double().tolist(), h * w
        some = min(-(-k // 2), frame)
        even = {(2 * j + 1) * frame // (2 * some) for j in range(some)}
        scores = [2 * (j in even) - 1 for j in range(min(n, frame))]
        scores += [_distance(rows[j], rows[j - frame]) / 1e9 - 1 for j in range(frame, n)]  # below 1
    return sorted(range(n), key=lambda j: (-scores[j], j))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selector", ["uniform", "random", "attention", "key_norm", "frame_difference"])
def test_the_scored_selectors_keep_the_best_rows_and_of_equal_ones_the_first(selector, dtype):
    if INTERPRETED and (selector, dtype) == ("attention", torch.bfloat16):
        pytest.skip("the interpreter's tl.dot multiplies the bits of bf16")
    counts = [33, 1, 0, 20, 40]
    x, given = _case(dtype, counts)
    x[45] = x[41]  # a place that does not change
    for keep in (0, 1, 2, 9, 0.3, 1.0):
        rows = vision_prune(x, counts, keep, selector, **given)
        expected = []
        for i, k in enumerate(kept_counts(counts, keep)):
            expected += sorted(sum(counts[:i]) + j for j in _order(selector, given, x, counts, i, int(k))[:k])
        assert rows.tolist() == expected, keep


@pytest.mark.parametrize("selector", ["max_min", "dpp", "attention", "key_norm", "frame_difference", "random"])
def test_an_image_keeps_the_same_rows_whatever_is_beside_it(selector):
    counts = [24, 36, 16]
    x, given = _case(torch.float32, counts)
    rows = vision_prune(x, counts, 0.4, selector, **given)
    parts = [x.split(counts), given["key"].split(counts)]
    parts += [given[name].split(given["query_counts"]) for name in ("query", "lse")]
    for order in ([1], [2, 0], [2, 1, 0]):
        mixed = {name: [given[name][i] for i in order] for name in ("seeds", "query_counts", "grids")}
        there = [torch.cat([part[i] for i in order]) for part in parts]
        mixed |= {"text": given["text"][order], "key": there[1], "query": there[2], "lse": there[3]}
        own = [counts[i] for i in order]
        found = vision_prune(there[0], own, 0.4, selector, **mixed)
        starts, expected = np.cumsum(own) - own, []
        for start, i in zip(starts, order, strict=True):
            first = sum(counts[:i])
            expected += [int(start) + r - first for r in rows.tolist() if first <= r < first + counts[i]]
        assert found.tolist() == expected


@compiled_only
@pytest.mark.parametrize("selector", GREEDY)
def test_scaling_and_the_dtype_of_whole_numbers_change_no_pick(selector):
    x = torch.randint(-9, 10, (90, 70), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    text = x[:1] - 1
    rows = [vision_prune(x.to(t), [90], 30, selector, text=text.to(t)).tolist() for t in DTYPES]
    rows += [vision_prune(x * 2.0**e, [90], 30, selector, text=text).tolist() for e in (-60, 60)]
    rows.append(vision_prune(x.double() * 2.0**900, [90], 30, selector, text=text.double()).tolist())
    assert all(r == rows[0] for r in rows)


@compiled_only
def test_texts_are_those_of_the_prompts_where_prompts_are_given():
    counts, prompts = [30, 20, 25], [1, 0, 1]
    x, text = _images(torch.float32, counts)
    by_prompt = vision_prune(x, counts, 0.3, "dpp", text=text[:2], prompts=prompts)
    assert by_prompt.equal(vision_prune(x, counts, 0.3, "dpp", text=text[prompts]))


def test_kept_counts_are_exact_and_a_budget_is_divided_by_largest_remainder():
    assert kept_counts([1000, 7, 0, 1], 0.1).tolist() == [100, 1, 0, 1]
    assert kept_counts([300], 1 / 3).tolist() == [100] and kept_counts([49], 0.07).tolist() == [4]
    assert kept_counts([5, 9], 2**70).tolist() == [5, 9] and kept_counts([], 2**70).tolist() == []
    assert kept_counts([5, 0, 9], 7).tolist() == [5, 0, 7] and kept_counts([5, 9], 0).tolist() == [0, 0]
    assert kept_counts([10, 10, 10, 6], 10, [0, 0, 0, 5]).tolist() == [4, 3, 3, 6]
    assert kept_counts([30, 10, 20], 7, [3, 9, 3]).tolist() == [4, 7, 3]
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts, prompts = generator.integers(0, 40, 6), generator.integers(0, 3, 6)
        budget = int(generator.integers(0, 60))
        kept = kept_counts(counts, budget, prompts)
        for prompt in set(prompts.tolist()):
            mine = prompts == prompt
            total = int(counts[mine].sum())
            assert kept[mine].sum() == min(budget, total)
            exact = counts[mine] * min(1.0, budget / max(total, 1))
            assert (abs(kept[mine] - exact) < 1).all() and (kept[mine] <= counts[mine]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("selector", "name"),
    [("max_min", "features"), ("dpp", "features"), ("dpp", "text"), ("frame_difference", "features")]
    + [("key_norm", "key"), ("attention", "key"), ("attention", "query"), ("attention", "lse")],
)
def test_nan_and_infinity_are_refused_by_the_name_of_the_image(selector, name, value):
    counts = [8, 4, 8]
    x, given = _case(torch.bfloat16, counts)
    given["features"] = x
    rows = {"text": 1, "query": 4, "lse": 4}.get(name, 9)
    given[name].view(len(given[name]), -1)[rows, 0] = value
    with pytest.raises(ValueError, match=f"{selector}: .*{name}.* of image 1"):
        vision_prune(given.pop("features"), counts, 0.5, selector, **given)


@compiled_only
def test_the_scores_are_ops_of_torch():
    _, given = _case(torch.float32, [8, 4])
    places = (torch.tensor([8, 4]), torch.tensor(given["query_counts"]), 0.3)
    torch.library.opcheck(torch.ops.cosmo_fast.vision_attention, (given["query"], given["key"], given["lse"], *places))
    torch.library.opcheck(torch.ops.cosmo_fast.vision_squares, (given["lse"], torch.zeros(7, dtype=torch.int64)))


def test_wrong_arguments_are_named():
    x, given = _case(torch.float32, [8, 4])
    for change, words in {
        ("selector", "best"): "selector must be one of uniform, random, .* got 'best'",
        ("keep", 0.0): "keep must be .* got 0.0",
        ("keep", True): "keep must be .* got True",
        ("keep", -1): "keep must be .* got -1",
        ("counts", (8, 5)): r"features must have the 13 rows that counts give, got \(12, 24\)",
        ("counts", (8, -5)): "counts must not be negative, got -5",
        ("text", None): "'dpp' needs text",
        ("text", x): r"text must be \(2, 24\)",
        ("prompts", (0, 2)): r"text has 2 rows, .* got \[0, 2\]",
        ("prompts", (0,)): "prompts must be 2 integers, one an image",
    }.items():
        call = {"counts": [8, 4], "keep": 2, "selector": "dpp", "text": given["text"]} | dict([change])
        with pytest.raises(ValueError, match=words):
            vision_prune(x, **call)
    with pytest.raises(ValueError, match="grids must be"):
        vision_prune(x, [8, 4], 2, "frame_difference", grids=[(2, 2, 2), (1, 2, 3)])
    for name, value in {"lse": given["lse"][:3], "query": given["query"][:, :5], "query_counts": [7, 0]}.items():
        with pytest.raises(ValueError, match="query_counts" if name == "query_counts" else "multiple of Hk"):
            vision_prune(None, [8, 4], 2, "attention", **{**given, name: value})


@compiled_only
@pytest.mark.parametrize(("selector", "digest"), [("max_min", "d0713a4e6377f997"), ("dpp", "a0f99604525f5761")])
def test_the_rows_of_this_version_are_the_same_with_every_instruction_set_and_on_every_device(selector, digest):
    numbers = np.arange(700 * 333, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    x = torch.from_numpy(numbers.astype(np.float64) - 2.0**23).view(700, 333).float().to(DEVICE)
    rows = vision_prune(x, [400, 300], 0.6, selector, text=x[:2] + x[2:4])
    assert VERSION == 1 and hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16] == digest


def test_a_clip_shows_what_changes_however_little_is_kept():
    x = torch.ones(4 * 49, 8).to(DEVICE)
    x[2 * 49 + 11] = 3  # one place changes in the third frame, and back in the fourth
    assert {2 * 49 + 11, 3 * 49 + 11} <= {*vision_prune(x, [196], 0.11, "frame_difference", grids=[(4, 7, 7)]).tolist()}
