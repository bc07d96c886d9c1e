"""Masks, layouts and the cut of one by the other, against boolean matrices."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringattn
from ringattn import bands, layouts, masks
from ringattn.conformance.drawing import LAYOUTS
from ringattn.errors import InputError, UnsupportedError
from ringattn.layouts import Layout
from ringattn.masks import Blocks, Causal, Documents, Full, Mask, Predicate, Prefix, SinkTokens, Window
from ringattn.plans import tiles
from tests.conformance import masks as any_mask


@given(data=st.data(), length=st.integers(0, 60))
def test_regions_are_the_pairs_a_mask_allows(data: st.DataObject, length: int) -> None:
    mask = data.draw(any_mask(length))
    where = np.arange(length)
    allowed = mask.dense(where, where).numpy()
    certain, asked = mask.regions(length, length), mask.partial(length, length)
    inside, doubtful = (bands.dense(regions, where, where) for regions in (certain, asked))
    assert np.array_equal(inside | (doubtful & allowed), allowed) and not (inside & doubtful).any()
    assert bands.area(certain) == inside.sum() and bands.area(asked) == doubtful.sum()
    assert np.array_equal(mask.row_areas(length, length), allowed.sum(axis=1))
    assert not len(asked) or "predicate" in str(mask)
    assert f" {allowed.sum():,} of {length:,} x {length:,} pairs" in mask.describe(length)


@given(data=st.data(), length=st.integers(0, 40))
def test_masks_are_values(data: st.DataObject, length: int) -> None:
    mask = data.draw(any_mask(length))
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert hash(pickle.loads(pickle.dumps(mask))) == hash(mask)
    if "predicate" in str(mask) or "#" in str(mask):
        return  # a function has no spelling, a large bitmap a long one
    again, where = masks.parse(str(mask)), torch.arange(length)
    assert torch.equal(again.dense(where, where), mask.dense(where, where))


def test_each_mask_is_what_its_docstring_says() -> None:
    where = torch.arange(6)
    q, k = where[:, None], where[None, :]
    for mask, wanted in (
        (Full(), torch.ones(6, 6, dtype=torch.bool)),
        (Causal(), k <= q),
        (Window(2, 1), (q - 2 <= k) & (k <= q + 1)),
        (Documents([2, 0, 1, 3]), torch.block_diag(*(torch.ones(n, n) for n in (2, 1, 3))).bool()),
        (Prefix(0), torch.zeros(6, 6, dtype=torch.bool)),
        (Prefix(2), (k < 2).expand(6, 6)),
        (SinkTokens(2), (k < 2) & (k <= q)),
    ):
        assert torch.equal(mask.dense(where, where), wanted), mask


def test_documents_of_two_sequences() -> None:
    mask = Documents([2, 3], [1, 4])
    wanted = torch.block_diag(torch.ones(2, 1), torch.ones(3, 4)).bool()
    assert torch.equal(mask.dense(range(5), range(5)), wanted)
    assert np.array_equal(bands.dense(mask.regions(5, 5), np.arange(5), np.arange(5)), wanted.numpy())


def test_local_positions() -> None:
    packed = Documents([3, 1, 2])
    for mask in (packed, packed & Causal(), (packed & Window(1)) | SinkTokens(1)):
        assert mask.local_positions(torch.tensor([5, 0, 3, 2])).tolist() == [1, 0, 0, 2]
    assert Causal().local_positions(torch.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Window(-1), "Window's left is a number of tokens"),
        (lambda: Prefix(2.5), "Prefix's n"),  # type: ignore[arg-type]
        (lambda: Documents([3, -1]), "document's length"),
        (lambda: Documents([3], [1, 2]), "as many kv_lengths"),
        (lambda: Documents([3, 4]).regions(8, 8), "sum to 7, the sequence has 8"),
        (lambda: Causal() & 3, "must be a ringattn mask"),  # type: ignore[operator]
        (lambda: masks.parse("causl"), "'causl' is not a mask"),
        (lambda: masks.parse("window:a"), "'window:a' is not a mask"),
        (lambda: masks.parse("causal&"), "missing at the end"),
        (lambda: masks.parse("(causal"), "not closed"),
        (lambda: masks.parse("causal causal"), "ends where 'causal' begins"),
    ],
)
def test_bad_masks_say_what_is_needed(make: object, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        make()  # type: ignore[operator]


@given(length=st.integers(0, 300), size=st.integers(1, 20), layout=st.sampled_from(LAYOUTS))
def test_layouts_share_every_position_out_once_and_evenly(length: int, size: int, layout: Layout) -> None:
    spans = layout.spans(length, size)
    held = [layouts.positions(spans, rank) for rank in range(size)]
    assert sorted(np.concatenate(held).tolist()) == list(range(length))
    assert all(np.array_equal(part, np.sort(part)) for part in held)
    counts = layouts.counts(spans, size)
    assert counts.tolist() == [len(part) for part in held]
    assert counts.max() - counts.min() <= 1


def test_auto_layout_is_the_simplest_that_balances() -> None:
    packed = Documents([4, 6]) & Causal()
    for mask, wanted in (
        (Causal(), "zigzag"),
        (Causal() & Full(), "zigzag"),
        (Documents([10]) & Causal(), "zigzag"),
        (packed, f"balanced({packed})"),
        (Window(3), "contiguous"),
        (Full(), "contiguous"),
        (None, "contiguous"),
    ):
        sharding = ringattn.Sharding(10, ringattn.Mesh.virtual(2), "auto", mask)
        assert str(sharding.layout) == wanted
        assert sharding.reason.startswith(f"auto took {wanted.partition(chr(40))[0]}: ")


@given(data=st.data(), length=st.integers(0, 300), size=st.integers(1, 20), many=st.booleans())
def test_balanced_shares_tokens_evenly_whatever_the_mask(
    data: st.DataObject, length: int, size: int, many: bool
) -> None:
    wanted = [data.draw(any_mask(length)) for _ in range(1 + many)]
    spans = ringattn.Balanced(wanted).spans(length, size)
    held = [layouts.positions(spans, rank) for rank in range(size)]
    assert sorted(np.concatenate(held).tolist()) == list(range(length))
    assert all(np.array_equal(part, np.sort(part)) for part in held)
    assert max(map(len, held)) - min(map(len, held)) <= 1


PACKED = Documents([9000, 1, 30, 20000, 5, 700, 35800])


@pytest.mark.parametrize("ranks", [2, 7, 64])
@pytest.mark.parametrize(
    "wanted",
    [
        [PACKED & Causal()],
        [PACKED],
        [PACKED & Causal() & Window(500)],
        [Causal()],
        [Window(1024)],
        [Prefix(20000) | Causal()],
        [Window(1024), Causal()],
        [Window(2048) | SinkTokens(64), Full()],
    ],
    ids=lambda masks: " + ".join(map(str, masks)),
)
def test_balanced_balances_area(wanted: list[Mask], ranks: int) -> None:
    length = 65536
    layout = ringattn.Balanced(wanted)
    areas = np.sum(
        [[p.area for p in ringattn.plan_all(mask, length, layout, "route", ring=ranks)] for mask in wanted], 0
    )
    assert areas.max() / areas.mean() <= 1.002


@given(data=st.data(), length=st.integers(0, 300), size=st.integers(1, 20), many=st.booleans())
def test_balanced_areas_differ_by_a_few_rows(data: st.DataObject, length: int, size: int, many: bool) -> None:
    wanted = [data.draw(any_mask(length)) for _ in range(1 + many)]
    spans = ringattn.Balanced(wanted).spans(length, size)
    rows = sum((mask.row_areas(length, length) for mask in wanted), np.zeros(length, int))
    areas = [rows[layouts.positions(spans, rank)].sum() for rank in range(size)]
    filled = min(size, length) or 1  # a rank without tokens has no area
    assert max(areas) <= rows.sum() / filled + 2 * rows.max(initial=0)


def test_balanced_leaves_documents_whole_where_they_fit() -> None:
    packed = Documents([5000, 2000, 3000] * 4) & Causal()
    plans = ringattn.plan_all(packed, 40000, ringattn.Balanced(packed), "route", ring=4)
    assert len({plan.area for plan in plans}) == 1
    assert sum(plan.traffic().received_tokens for plan in plans) == 0


def test_balanced_reduces_to_what_is_simple() -> None:
    for size, length in ((4, 4096), (3, 3000)):
        zigzag, contiguous = ringattn.Zigzag(), ringattn.Contiguous()
        assert np.array_equal(ringattn.Balanced(Causal()).spans(length, size), zigzag.spans(length, size))
        assert np.array_equal(ringattn.Balanced(Full()).spans(length, size), contiguous.spans(length, size))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ringattn.Balanced([]), "at least one mask"),
        (lambda: ringattn.Balanced(["causal"]), "must be a ringattn mask"),  # type: ignore[list-item]
        (lambda: layouts.named("balanced", None, 8), "needs to know what to balance"),
        (lambda: ringattn.Explicit([[(3, 2)]]), "ascending and not empty"),
        (lambda: ringattn.Explicit([[(4, 8), (0, 4)]]), "ascending and not empty"),
        (lambda: ringattn.Explicit([[(0, 8)]]).spans(8, 2), "1 ranks; the mesh has 2"),
        (lambda: ringattn.Explicit([[(0, 5)], [(4, 8)]]).spans(8, 2), "each of the 8 positions to one rank"),
        (lambda: ringattn.Explicit([[(0, 4)], [(4, 7)]]).spans(8, 2), "each of the 8 positions to one rank"),
    ],
)
def test_bad_layouts_say_what_is_needed(make: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()  # type: ignore[operator]


@given(
    data=st.data(),
    length=st.integers(0, 40),
    size=st.integers(1, 6),
    q_layout=st.sampled_from(LAYOUTS),
    k_layout=st.sampled_from(LAYOUTS),
)
def test_a_cut_holds_every_pair_once(
    data: st.DataObject, length: int, size: int, q_layout: Layout, k_layout: Layout
) -> None:
    mask = data.draw(any_mask(length, predicates=False))
    q_spans, k_spans = q_layout.spans(length, size), k_layout.spans(length, size)
    counted = np.zeros((length, length), dtype=int)
    for q_rank, k_rank, *tile in tiles.cut(mask.regions(length, length), q_spans, k_spans).tolist():
        queries, keys = layouts.positions(q_spans, q_rank), layouts.positions(k_spans, k_rank)
        q, m, q_step, k, n, k_step, lo, hi, q_position, q_stride, k_position, k_stride, partial = tile
        assert not partial
        for i in range(m):
            allowed = [j for j in range(n) if lo <= i - j <= hi]
            assert allowed, "every row of a tile holds a pair"
            at = queries[q + i * q_step]
            assert at == q_position + i * q_stride
            for j in allowed:
                assert keys[k + j * k_step] == k_position + j * k_stride
                counted[at, keys[k + j * k_step]] += 1
    where = np.arange(length)
    assert np.array_equal(counted, mask.dense(where, where).numpy())


def test_blocks_and_predicates_refuse_what_they_cannot_do() -> None:
    with pytest.raises(InputError, match="need a bitmap of 3 x 3 for 5 queries and 5 keys; got 2 x 2"):
        Blocks(np.eye(2, dtype=bool), 2).regions(5, 5)
    with pytest.raises(InputError, match="matrix of booleans; got int64 of shape"):
        Blocks([[0, 2]], 4)
    with pytest.raises(InputError, match="at least 1; got 0"):
        Blocks([[True]], 0)
    with pytest.raises(UnsupportedError, match="at most 32768 tokens; got 32769 queries"):
        Predicate(lambda q, k: q >= k).regions(32_769, 5)
    wrong: tuple[tuple[Any, str], ...] = (
        (lambda q, k: q - k, "must return a boolean tensor; it returned a tensor of torch.int64"),
        (lambda q, k: True, "must return a boolean tensor; it returned True"),
        (lambda q, k: torch.ones(3, dtype=torch.bool), r"must return a value a pair; it returned shape \[3\]"),
        (lambda q, k: q.nothing, "function failed on int64 positions: AttributeError"),
    )
    for fn, said in wrong:
        with pytest.raises(InputError, match=said):
            Predicate(fn).regions(5, 7)


def test_a_predicate_is_asked_again_only_where_blocks_hold_both() -> None:
    mask = Predicate(lambda q, k: q >= k)
    certain, asked = mask.regions(1024, 1024), mask.partial(1024, 1024)
    assert bands.area(asked) == 4 * 256**2 and bands.area(certain) == 6 * 256**2
    assert len((mask & Documents([256] * 4)).regions(1024, 1024)) == 0
    assert len((mask | Documents([256] * 4)).partial(1024, 1024)) == 0
    assert mask.signature(99, 99) != Predicate(lambda q, k: q > k).signature(99, 99)
    assert mask.signature(99, 99) == Predicate(lambda q, k: k <= q).signature(99, 99)


def test_masks_draw_themselves() -> None:
    from matplotlib.figure import Figure

    for mask in (Causal(), Documents([300, 724]) & Window(50), Blocks(np.eye(4), 256), ~Predicate(lambda q, k: q == k)):
        axes = Figure().subplots()
        mask.draw(axes, 1024)
        (image,) = axes.get_images()
        drawn, where = np.asarray(image.get_array()), np.linspace(0, 1023, 600).astype(int)
        assert np.array_equal(drawn, mask.dense(where, where).numpy())
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()


def test_layouts_draw_and_describe_themselves() -> None:
    from matplotlib.figure import Figure

    packed = Documents([30, 70]) & Causal()
    for layout in (*LAYOUTS, ringattn.Balanced(packed)):
        axes = Figure().subplots()
        layout.draw(axes, 100, 4)
        bars = sum(len(bar.get_paths()) for bar in axes.collections)
        assert bars == sum(n if stride > 1 else 1 for *_, n, stride in layout.spans(100, 4).tolist())
        assert layout.describe(100, 4).startswith(f"{layout}: 100 tokens on 4 ranks, 25 to 25 tokens a rank in ")


def test_masks_that_ask_are_divided_once_a_level() -> None:
    asked: list[int] = []

    def counted(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        asked.append(1)
        return (q * k) % 5 < 3

    mask: Mask = Predicate(counted)
    for i in range(20):
        mask = mask & Prefix(500 + i) if i % 2 else mask | Window(i)
    assert len(mask.classify(600, 600)[0]) > 0 and len(asked) == 3, "600 rows are asked for, 256 at a time"


def test_signatures_of_masks_that_ask_differ_where_the_masks_do() -> None:
    def of(fn: Any, length: int = 1024) -> str:
        return Predicate(fn).signature(length, length)

    def same(fn: Any) -> Any:
        fn.__qualname__ = "mask"
        return fn

    fns = [
        same(lambda q, k: q + k >= 0),
        same(lambda q, k: q + k < 0),
        same(lambda q, k: (q < 768) | (k < 768)),
        same(lambda q, k: (q // 256 == k // 256) & (q % 2 == 0)),
        same(lambda q, k: (q // 256 + k // 256 == 3) & (q % 2 == 0)),
    ]
    assert len({of(fn) for fn in fns}) == len(fns)

    class Even:
        def __call__(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (q + k) % 2 == 0

    assert of(Even()) == of(Even())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Blocks([[1, 0], [1]], 2), "all rows of one length"),
        (lambda: Blocks([[1]], 3).dense(range(9), range(3)), "ends at query position 3; got 8"),
        (lambda: Documents(5), "takes a list of lengths; got 5"),
        (lambda: Predicate(3), "needs a function"),  # type: ignore[arg-type]
        (lambda: ringattn.Explicit([[0, 4], [4, 8]]), "a list of runs"),  # type: ignore[list-item]
        (lambda: ringattn.Explicit([[(0.5, 4)]]), "a list of runs"),  # type: ignore[list-item]
        (lambda: ringattn.plan_all(Documents([3, 5], [2, 2]), 8, kv_length=4, ring=2), "mask of two sequences, name"),
    ],
)
def test_more_bad_input_says_what_is_needed(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_blocks_take_tensors() -> None:
    grid = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    assert Blocks(grid, 2) == Blocks([[1, 0], [0, 1]], 2)


def test_positions_of_keys_are_those_of_their_own_documents() -> None:
    mask = Documents([2, 3], [1, 4]) & Causal()
    assert mask.local_positions(range(5)).tolist() == [0, 1, 0, 1, 2]
    assert mask.local_positions(range(5), side="keys").tolist() == [0, 0, 1, 2, 3]
    with pytest.raises(InputError, match="side must be one of 'queries', 'keys'; got 'values'"):
        mask.local_positions([0], side="values")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([5], "ends at (query|key) position 5; got 5"),
        ([-1], "must be positions from 0 to below 2.40; got -1"),
        (torch.tensor([0.5]), "must be a tensor, array or list of integers"),
        ([True], "they are bool"),
        ("causal", "they are <U6"),
        ([[1, 2], [3]], "inhomogeneous"),
        (None, "they are object"),
        (2**70, "they are object"),
    ],
)
@pytest.mark.parametrize("mask", [Documents([2, 3]), Blocks([[1]], 5), (Blocks([[1]], 5) | Causal()) & ~Window(1)])
def test_positions_out_of_range_or_of_another_kind_are_refused(mask: Mask, positions: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        mask.local_positions(positions)
    with pytest.raises(InputError, match=words):
        mask.dense(positions, [0])
    with pytest.raises(InputError, match=words):
        mask.dense([0], positions)


def test_blocks_never_reads_from_behind() -> None:
    with pytest.raises(InputError, match="blocks:2/1 ends at key position 2; got -1"):
        Blocks([[1]], 2).allows(np.array([0]), np.array([-1]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(" * 5000 + "causal", "may be nested 200 deep"),
        ("~" * 5000 + "causal", "may be nested 200 deep"),
        ("&".join(["causal"] * 5000), "may be combined 200 deep"),
        (3, "A mask's text must be a string; got 3"),
        ("window:" + "9" * 5000, "is not a mask"),
        ("window:99999999999999999999", "from 0 to below 2^40"),
        ("full:3", "'full:3' is not a mask. Masks are full, causal, window:LEFT[,RIGHT], "),
        ("predicate:x", "cannot be imported: ModuleNotFoundError"),
        ("ringattn:Ring", "'ringattn:Ring' is not a mask"),
        ("ringattn:And:1", "the module ringattn has no 'And'"),
        ("ringattn.masks:And:1", "is not a mask"),
        ("ringattn:Predicate", "is not a mask"),
    ],
)
def test_texts_that_are_no_masks(text: Any, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        masks.parse(text)
    assert len(str(caught.value)) < 600


def test_combinations_stay_within_pythons_own_stack() -> None:
    mask: Mask = Causal()
    for n in range(199):
        mask = mask & Window(n) if n % 2 else ~mask
    where = range(4)
    assert pickle.loads(pickle.dumps(mask)) == mask and hash(mask) == hash(masks.parse(str(mask)))
    assert mask.dense(where, where).sum() == bands.area(mask.regions(4, 4))
    with pytest.raises(InputError, match="Masks may be combined 200 deep"):
        _ = ~(~mask)
