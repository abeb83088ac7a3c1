"""Host-side planning: bins and multimodal positions."""

import numpy as np
import pytest
import torch

from cosmo_fast import _host


def test_bins_hold_every_item_once_and_stay_within_the_budget():
    costs = np.random.default_rng(0).integers(0, 60, 300)
    bins = _host.best_fit_decreasing(costs, 100)
    assert sorted(i for b in bins for i in b) == list(range(300))
    assert all(costs[b].sum() <= 100 for b in bins)
    assert len(bins) <= 1.23 * np.ceil(costs.sum() / 100)
    assert bins == _host.best_fit_decreasing(costs, 100)


def test_bins_take_the_tightest_place_and_break_ties_by_index():
    assert _host.best_fit_decreasing([3, 7, 3, 6, 4], 10) == [[1, 0], [3, 4], [2]]
    assert _host.best_fit_decreasing([6, 7, 3], 10) == [[1, 2], [0]]
    assert _host.best_fit_decreasing([], 10) == []


def test_an_item_above_the_budget_has_a_bin_of_its_own():
    assert _host.best_fit_decreasing([5, 40, 5], 10) == [[1], [0, 2]]


@pytest.mark.parametrize(
    ("costs", "budget", "message"), [([1, -2], 5, r"costs\[1\] = -2"), ([1], 0, "budget"), ([[1]], 5, "dimension")]
)
def test_bad_costs_are_refused(costs, budget, message):
    with pytest.raises(ValueError, match=message):
        _host.best_fit_decreasing(np.array(costs, dtype=np.int64), budget)


def _qwen_positions(length, media, merge=2):
    """(3, length) positions by transformers' own rule; media: (offset, (t, h, w) after the merge)."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(text_config={"hidden_size": 8, "num_hidden_layers": 0}, vision_config={"depth": 0})
    config.vision_config.spatial_merge_size = merge
    ids = torch.ones(1, length, dtype=torch.int64)
    kinds = torch.zeros(1, length, dtype=torch.int32)
    for offset, grid in media:
        ids[0, offset - 1] = config.vision_start_token_id
        ids[0, offset : offset + int(np.prod(grid))] = config.image_token_id
        kinds[0, offset : offset + int(np.prod(grid))] = 1
    grids = torch.tensor([[t, h * merge, w * merge] for _, (t, h, w) in media]) if media else None
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    positions, delta = Qwen2_5_VLModel.get_rope_index(model, ids, mm_token_type_ids=kinds, image_grid_thw=grids)
    return positions[:, 0], int(delta[0]) + length


CASES = {
    "text only": [(7, [])],
    "landscape": [(20, [(3, (1, 2, 5))])],
    "portrait": [(40, [(2, (1, 9, 2))])],
    "several images": [(60, [(1, (1, 3, 4)), (16, (1, 6, 1)), (30, (1, 2, 2))])],
    "at the very end": [(13, [(1, (1, 4, 3))])],
    "a batch": [(7, []), (40, [(2, (1, 9, 2))]), (60, [(1, (1, 3, 4)), (30, (1, 2, 2))]), (5, [])],
}


@pytest.mark.parametrize("case", CASES)
def test_positions_equal_those_of_transformers(case):
    sequences = CASES[case]
    media = [(s, offset, grid) for s, (_, slots) in enumerate(sequences) for offset, grid in slots]
    positions, following = _host.mrope_positions(
        [length for length, _ in sequences],
        np.array([m[0] for m in media], dtype=np.int64),
        np.array([m[1] for m in media], dtype=np.int64),
        np.array([m[2] for m in media], dtype=np.int64).reshape(-1, 3),
    )
    start = 0
    for (length, slots), next_position in zip(sequences, following, strict=True):
        expected, expected_next = _qwen_positions(length, slots)
        assert torch.equal(torch.from_numpy(positions[:, start : start + length]), expected)
        assert next_position == expected_next
        start += length


@pytest.mark.parametrize(
    ("lengths", "owner", "offset", "grid", "message"),
    [
        ([5], [1], [0], [[1, 1, 1]], r"media_seq\[0\] = 1"),
        ([5], [0], [3], [[1, 1, 3]], r"media_offset\[0\] = 3"),
        ([9], [0, 0], [0, 3], [[1, 2, 2], [1, 1, 1]], r"media_offset\[1\] = 3"),
        ([5], [0], [0], [[1, 0, 3]], r"media_thw\[0\]"),
        ([-1], [], [], np.zeros((0, 3), np.int64), r"seq_lengths\[0\] = -1"),
        ([5], [0], [0], [[1, 3]], "media_thw"),
    ],
)
def test_media_outside_their_sequence_are_refused(lengths, owner, offset, grid, message):
    arrays = [np.array(x, dtype=np.int64) for x in (lengths, owner, offset, grid)]
    with pytest.raises(ValueError, match=message):
        _host.mrope_positions(*arrays)
