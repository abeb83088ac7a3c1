"""Which rows and keys each program of prefix_attention.py takes: lists made on the host, once for all layers."""

import numpy as np

ALWAYS = 1 << 30  # the shift and the diagonal of keys that every row sees


def _ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0 0 1 1 1 … and 0 1 0 1 2 … for counts 2 3 …"""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _ranges(owner: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of n owners' entries begin and end in a sorted list of them."""
    return tuple(np.searchsorted(owner, np.arange(n), side) for side in ("left", "right"))


def _longest_first(columns, cost: np.ndarray) -> np.ndarray:
    return np.stack(columns, 1)[np.argsort(-cost, kind="stable")]


def row_tiles(table: np.ndarray, positions: int, mixed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of at most `positions` query positions, of one segment or (mixed) of neighbours with the same prefix.

    Returns (tiles, 2): first and last piece; and (pieces, 7): the tile's positions [begin, end) are the rows base +
    position (a tile's first piece, its prefix, covers all of them); of the keys k_start, k_start + 1, …, each of them
    sees those up to shift + position, some row sees `keys`, and all rows of the tile see `clear`.
    """
    table = table[table[:, 1] > 0]
    q_start, q_length, k_start, k_length, *prefix = table.T
    new = np.ones(len(table), bool)
    new[1:] = (table[1:, 4:] != table[:-1, 4:]).any(1) | (not mixed)
    run, heads = np.cumsum(new) - 1, np.flatnonzero(new)
    before = np.cumsum(q_length) - q_length
    offset = before - before[heads][run]  # of the segment in its run
    run_tiles = -(-np.add.reduceat(q_length, heads) // positions) if len(table) else heads
    first_tile = np.cumsum(run_tiles) - run_tiles
    owner, index = _ragged((offset + q_length - 1) // positions - offset // positions + 1)
    in_run = offset[owner] // positions + index
    start, tile = in_run * positions - offset[owner], first_tile[run[owner]] + in_run
    begin, end = np.maximum(-start, 0), np.minimum(q_length[owner] - start, positions)
    shift = (k_length - q_length)[owner] + start
    keys, tiles = shift + end, int(run_tiles.sum())
    alone = np.bincount(tile, minlength=tiles)[tile] == 1
    pieces = np.stack((begin, end, q_start[owner] + start, k_start[owner], shift, keys, (shift + begin + 1) * alone), 1)
    first = np.flatnonzero(np.diff(tile, prepend=-1))
    p_start, p_length = (column[owner[first]] for column in prefix)
    zero = np.zeros_like(p_start)
    used = np.bincount(tile, weights=end - begin, minlength=tiles).astype(np.int64)
    prefixes = np.stack((zero, used, zero, p_start, zero + ALWAYS, p_length, p_length), 1)[p_length > 0]
    order = np.argsort(np.append(np.flatnonzero(p_length), tile), kind="stable")
    tile = np.append(np.flatnonzero(p_length), tile)[order]
    pieces = np.append(prefixes, pieces, 0)[order]
    cost = np.bincount(tile, weights=pieces[:, 5], minlength=tiles)
    return _longest_first(_ranges(tile, tiles), cost), pieces


def key_tiles(table: np.ndarray, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of at most `keys` key rows with the same readers.

    Returns (tiles, 4): first key, number of keys, first and last reader; and (readers, 3): the query rows [begin, end)
    that see the key n where n <= row + diagonal.
    """
    table = table[table[:, 1] > 0]
    q_start, q_length, k_start, k_length, p_start, p_length = table.T
    new = np.ones(len(table), bool)  # neighbours in rows and prefix read the prefix as one
    new[1:] = (table[1:, 4:] != table[:-1, 4:]).any(1) | (q_start[1:] != (q_start + q_length)[:-1])
    heads, tails = np.flatnonzero(new), np.flatnonzero(np.append(new[1:], True))[: len(table)]
    start, length = np.append(k_start, p_start[heads]), np.append(k_length, p_length[heads])
    begin, end = np.append(q_start, q_start[heads]), np.append(q_start + q_length, (q_start + q_length)[tails])
    diagonal = np.append(k_start + k_length - q_length - q_start, np.full(len(heads), ALWAYS))
    # An interval of keys is cut where another begins or ends, so that all keys of a tile have the same readers.
    edges = np.unique(np.append(start, start + length))
    low, high = np.searchsorted(edges, start), np.searchsorted(edges, start + length)
    owner, index = _ragged(high - low)
    stretch = low[owner] + index
    order = np.argsort(stretch, kind="stable")
    readers = np.stack((begin, end, diagonal), 1)[owner[order]]
    stretch = stretch[order]
    first, last = _ranges(stretch, max(len(edges) - 1, 0))
    read = np.bincount(stretch, weights=readers[:, 1] - readers[:, 0], minlength=len(first))
    size = np.diff(edges) if len(edges) else edges
    tile, index = _ragged(np.where(last > first, -(-size // keys), 0))
    at = index * keys
    columns = (edges[tile] + at, np.minimum(size[tile] - at, keys), first[tile], last[tile])
    return _longest_first(columns, read[tile]), readers
