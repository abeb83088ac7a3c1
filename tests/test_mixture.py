"""Which rows a step takes: exact shares, every row once an epoch, the same at a position whoever asks."""

import collections

import pytest

from cosmo_fast.data.mixture import Mixture


def mixture(seed=0):
    return Mixture({"a": ([f"a{i}" for i in range(7)], 2.0), "b": ([f"b{i}" for i in range(5)], 1.0)}, seed)


def test_shares_are_exact_at_every_position():
    drawn = mixture().draw(90)
    for count in range(1, 91):
        from_a = sum(item.startswith("a") for item in drawn[:count])
        assert abs(from_a - count * 2 / 3) < 1


def test_every_epoch_takes_every_row_once_in_an_order_of_its_own():
    drawn = [item for item in mixture().draw(63) if item.startswith("a")]
    epochs = [drawn[i : i + 7] for i in range(0, 42, 7)]
    assert all(collections.Counter(epoch) == collections.Counter(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_position_gives_the_same_rows_after_a_resume():
    whole, first = mixture(), mixture()
    rows = whole.draw(40)
    first.draw(17)
    resumed = mixture()
    resumed.taken.update(first.taken)
    assert resumed.draw(23) == rows[17:]
    assert mixture(seed=1).draw(40) != rows


@pytest.mark.parametrize(
    "sources, message",
    [({}, "names no file"), ({"a": ([], 1.0)}, "'a' has no rows"), ({"a": ([1], 0.0)}, "'a' has weight 0.0")],
)
def test_bad_sources_are_named(sources, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sources, 0)
