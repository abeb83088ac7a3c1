"""Which rows a step takes: exact shares, every row once an epoch, the same at a position whoever asks."""

import collections

import pytest

from cosmo_fast.data.mixture import Mixture, by_label


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


def test_labels_come_in_their_proportions_and_files_keep_theirs_within_a_label():
    rows = {
        "a": ([("x", i) for i in range(9)] + [("y", 0)], 3.0),
        "b": ([("x", i) for i in range(2)] + [(None, 0)], 1.0),
    }
    parts = by_label(rows, {"x": 2, "y": 1, "*": 1}, lambda row: row[0])
    drawn = Mixture({name: ([(name, *row) for row in items], w) for name, (items, w) in parts.items()}, 0).draw(160)
    counts = collections.Counter(name for name, *_ in drawn)
    assert counts == {"a#x": 60, "b#x": 20, "a#y": 40, "b#*": 40}
    assert by_label(rows, {"x": 1, "*": 0}, lambda row: row[0]).keys() == {"a#x", "b#x"}
    with pytest.raises(ValueError, match=r"no weight for the label None in b"):
        by_label(rows, {"x": 1, "y": 1}, lambda row: row[0])
    with pytest.raises(ValueError, match=r"no row of a, b has the label\(s\) \['z'\]"):
        by_label(rows, {"x": 1, "*": 1, "z": 1}, lambda row: row[0])


def test_a_curriculum_opens_the_easiest_rows_first_and_resumes_at_its_place():
    items = [7, 1, 4, 0, 9, 3, 8, 2, 6, 5]

    def fresh():
        return Mixture({"a": (items, 1.0)}, 0, difficulty=float)

    whole = fresh()
    first, then = whole.draw(30, 0.3), whole.draw(40, 1.0)
    assert collections.Counter(first) == {0: 10, 1: 10, 2: 10}, "every open row once an epoch"
    assert set(then) == set(items) and max(collections.Counter(then).values()) <= 5
    assert set(fresh().draw(9, 0.001)) == {0}, "one row is always open"
    cut, again = fresh(), fresh()
    cut.draw(13, 0.3)
    again.taken.update(cut.taken)
    again.skipped.update(cut.skipped)
    assert again.draw(17, 0.3) + again.draw(40, 1.0) == first[13:] + then
    assert Mixture({"a": (items, 1.0)}, 0).draw(20) == fresh().draw(20), "an open curriculum changes nothing"
