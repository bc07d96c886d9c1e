"""Laws of the region algebra, against boolean matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import bands
from ringattn.bands import K0, K1, Q0, Q1, Regions

SIDE = 12
WHERE = np.arange(SIDE)


@st.composite
def one_region(draw: st.DrawFn) -> Regions:
    sides = [sorted(draw(st.lists(st.integers(0, SIDE), min_size=2, max_size=2))) for _ in "qk"]
    edge = st.one_of(st.integers(-SIDE - 2, SIDE + 2), st.sampled_from((-bands.INF, bands.INF)))
    lo, hi = draw(edge), draw(edge)
    return bands.regions([(*sides[0], *sides[1], lo, hi)])


def some_regions() -> st.SearchStrategy[Regions]:
    def together(parts: list[Regions]) -> Regions:
        out = bands.empty()
        for part in parts:
            out = bands.union(out, part)
        return out

    return st.lists(one_region(), max_size=12).map(together)


def dense(rows: Regions) -> bands.Mask:
    return bands.dense(rows, WHERE, WHERE)


@given(rows=one_region())
def test_canonical_regions_touch_every_row_and_column(rows: Regions) -> None:
    again, kept = bands.tighten(rows)
    assert np.array_equal(again, rows)
    assert len(kept) == len(rows)
    for row in rows:
        box = dense(rows)[row[Q0] : row[Q1], row[K0] : row[K1]]
        assert box.any(axis=0).all() and box.any(axis=1).all()


@given(a=some_regions(), b=some_regions())
def test_set_operations(a: Regions, b: Regions) -> None:
    for got, wanted in (
        (bands.intersect(a, b), dense(a) & dense(b)),
        (bands.difference(a, b), dense(a) & ~dense(b)),
        (bands.union(a, b), dense(a) | dense(b)),
        (bands.complement(a, SIDE, SIDE), ~dense(a)),
        (bands.rows_between(a, 3, 7), dense(a) & ((WHERE >= 3) & (WHERE < 7))[:, None]),
    ):
        assert np.array_equal(dense(got), wanted)
        # the area counts every region's pairs, so equality means that regions are disjoint
        assert bands.area(got) == wanted.sum()
        assert np.array_equal(bands.row_areas(got, SIDE), wanted.sum(axis=1))


@given(
    a=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20))),
    b=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20))),
)
def test_overlaps_finds_every_overlapping_pair(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    (a0, a1), (b0, b1) = (np.array([*sorted(pairs)], dtype=np.int64).reshape(-1, 2).T for pairs in (a, b))
    a1, b1 = a0 + a1 + 1, b0 + b1 + 1
    found = list(zip(*(x.tolist() for x in bands.overlaps(a0, a1, b0, b1)), strict=True))
    wanted = [(i, j) for i in range(len(a0)) for j in range(len(b0)) if a0[i] < b1[j] and b0[j] < a1[i]]
    assert sorted(found) == wanted


def test_one_long_interval_among_many_short_ones_costs_no_more_than_what_overlaps() -> None:
    count = 200_000  # squared, 300 GB
    start = np.append(0, np.arange(count))
    stop = np.append(count, np.arange(count) + 1)
    i, j = bands.overlaps(start, stop, start, stop)
    assert len(i) == (count + 1) + count + count  # the long one with all, each with the long one, each with itself
    assert np.array_equal(i, np.sort(i))
    short = (i > 0) & (j > 0)
    assert np.array_equal(i[short], j[short])


def test_many_regions_are_removed_in_order_n_log_n() -> None:
    count = 20_000
    edges = np.arange(count + 1) * 7
    rows = np.stack([edges[:-1], edges[1:], edges[:-1], edges[1:], *np.full((2, count), 0)], axis=1)
    documents = bands.tighten(rows)[0]
    whole = bands.regions([(0, 7 * count, 0, 7 * count, -bands.INF, bands.INF)])
    assert bands.area(bands.difference(whole, documents)) == (7 * count) ** 2 - 7 * count


def test_many_regions_over_the_same_queries_are_removed() -> None:
    stripes = bands.regions([(0, SIDE, k, k + 1, -bands.INF, bands.INF) for k in range(0, SIDE, 2)])
    stripes = np.concatenate([stripes, bands.regions([(q, SIDE, 2 * q + 1, 2 * q + 2, -9, 9) for q in range(5)])])
    assert len(stripes) > 8
    assert np.array_equal(dense(bands.complement(stripes, SIDE, SIDE)), ~dense(stripes))


@pytest.mark.parametrize("row", [(0, 0, 0, 5, -9, 9), (0, 5, 3, 3, -9, 9), (0, 5, 0, 5, 2, 1), (0, 2, 5, 9, 0, 9)])
def test_empty_regions_vanish(row: tuple[int, ...]) -> None:
    assert len(bands.regions([row])) == 0
