"""What public functions say about arguments that make no sense."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

import ringattn
from ringattn import checking
from ringattn.errors import InputError
from ringattn.masks import Mask

api: Any = ringattn  # called with what its types forbid


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: api.simulate("x", ring=2), "simulate runs a function of a mesh on every rank; got 'x'"),
        (lambda: api.simulate(print, ring=0), "simulate's ring is a number of ranks"),
        (lambda: api.simulate(print, ring=10**6), "simulate's ring is a number of ranks"),
        (lambda: api.simulate(print, ring=2.0), "got 2.0"),
        (lambda: api.balance([]), "plans must be plans, as plan_all makes them, in a list, at least one"),
        (lambda: api.balance("x"), "got 'x'"),
        (lambda: api.verify([]), "every rank's plan"),
        (lambda: api.verify(3), "every rank's plan"),
        (lambda: api.lower_bound("causal", 8, 2), "mask must be a ringattn mask"),
        (lambda: api.lower_bound(api.Causal(), 8, 0), "ranks is a number of ranks"),
        (lambda: api.lower_bound(api.Causal(), 8.0, 1), "length is a number of tokens"),
        (lambda: api.lower_bound(api.Causal(), 8, 2, float("nan")), "imbalance must be a finite number"),
        (lambda: api.lower_bound(api.Causal(), 8, 2, 0.5), "of at least 1; got 0.5"),
        (lambda: api.Causal().dense([[1, 2]], [1]), "two rows of positions; got 2 and 1 dimensions"),
        (lambda: _plan_of("int32"), "one of float64, float32, bfloat16, float16; got 'int32'"),
        (lambda: _plan_of(torch.complex64), "got torch.complex64"),
        (lambda: api.Causal().describe(-1), "length is a number of tokens"),
        (lambda: api.Causal().describe(8, "x"), "kv_length is a number of tokens"),
    ],
)
def test_refused(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


def _plan_of(dtype: Any) -> object:
    return api.plan(api.Causal(), api.Sharding(8, api.init()), heads=(2, 2), head_dims=(8, 8), dtype=dtype)


def test_the_checks() -> None:
    assert api.Sharding(np.int64(24), api.init()) == api.Sharding(24, api.init())
    assert checking.integer(np.int64(3), "n") == 3
    assert checking.number(np.float32(0.5), "x", above=0) == 0.5
    assert checking.flag(np.True_, "f") is True
    assert checking.pair((4, 2), "heads", "two") == (4, 2)
    assert checking.dtype("bfloat16") is checking.dtype(torch.bfloat16) is torch.bfloat16
    assert checking.positions([]).dtype == np.int64
    wrong: Any
    for wrong in (True, 1.0, -1, 2**40, None, Unprintable()):
        with pytest.raises(InputError, match=r"n is an integer, from 0 to below 2\^40; got"):
            checking.integer(wrong, "n")
    for wrong in (0, float("inf"), "1", True, 1j):
        with pytest.raises(InputError, match="x must be a finite number of seconds above 0; got"):
            checking.number(wrong, "x", above=0, unit="seconds")
    for wrong in (7, "off", None):
        with pytest.raises(InputError, match="f must be True or False; got"):
            checking.flag(wrong, "f")
    for wrong in ((1,), "ab", (0, 1), 3):
        with pytest.raises(InputError, match="heads"):
            checking.pair(wrong, "heads", "two numbers")
    for wrong in ("nn", 3, float):
        with pytest.raises(InputError, match="dtype must be a torch dtype or its name"):
            checking.dtype(wrong)


MASK: Mask = (ringattn.Documents([3, 4, 9]) & ~ringattn.Blocks(np.eye(4, dtype=bool), 4)) | ringattn.SinkTokens(1)
KEPT = ("auto", "contiguous", "zigzag", "striped", "balanced", ringattn.Explicit([[(0, 4)], [(4, 16)]]))


@pytest.mark.parametrize("layout", KEPT)
def test_masks_and_shardings_are_loaded_from_files_that_may_hold_no_code(layout: Any) -> None:
    sharding = ringattn.Sharding(16, ringattn.Mesh.virtual(2, rank=1), layout, MASK)
    MASK.dense(sharding.positions, sharding.positions)  # leaves a bitmap behind, which is not saved
    file = io.BytesIO()
    torch.save((MASK, sharding), file)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    with torch.serialization.safe_globals(ringattn.safe_globals()):
        mask, again = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert (mask, again) == (MASK, sharding) and again.positions.tolist() == sharding.positions.tolist()
    assert ringattn.plan(mask, again).hash == ringattn.plan(MASK, sharding).hash


def test_every_mask_and_layout_may_be_loaded() -> None:
    safe = {*ringattn.safe_globals()}
    kinds = {x for x in vars(ringattn).values() if isinstance(x, type) and issubclass(x, (Mask, ringattn.Layout))}
    assert kinds - safe == {Mask, ringattn.Layout, ringattn.Predicate}
