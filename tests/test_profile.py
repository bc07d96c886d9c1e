"""Profiles: files that are whole or refused, what all ranks get of them, and what ``auto`` makes of them."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringattn
from ringattn.errors import InputError
from ringattn.kernels.choice import Profiled, chosen_kernel, contenders
from ringattn.kernels.machine import Machine
from ringattn.kernels.rates import Rates, Work, Workload
from ringattn.kernels.store import Entry
from ringattn.mechanisms.base import Problem
from ringattn.mesh import Mesh
from ringattn.plans.links import Floats
from ringattn.profile import NAME, Profile
from tests.workers import SIZE, Workers

PROBLEM = Problem(ringattn.Softmax(), 1, 8, 8, 64, 64, torch.float32, torch.device("cpu"))
WORK = Work(pairs=1 << 22, side=1024)


def table(ranks: int, usual: float, far: Iterable[tuple[int, int]], value: float) -> Floats:
    """Alike between all ranks, but for some pairs."""
    found: Floats = np.full((ranks, ranks), usual)
    np.fill_diagonal(found, 0)
    for first, second in far:
        found[first, second] = found[second, first] = value
    return found


def profile(
    ranks: int = 4, far: Iterable[tuple[int, int]] = (), entries: tuple[Entry, ...] = (), transport: str = "gloo"
) -> Profile:
    pairs = list(far)
    return Profile(transport, table(ranks, 1e-4, pairs, 0.02), table(ranks, 1e9, pairs, 25e6), entries)


def entry(side: int, **seconds: float) -> Entry:
    """As if this machine had been measured."""
    workload = Workload("Softmax", "float32", 64, 64, 1, 1, side, True)
    machine = Machine.here([kernel for kernel in contenders(PROBLEM) if str(kernel) in seconds])
    return Entry(machine, Rates(workload, tuple(seconds.items())))


def equal(first: Profile, second: Profile) -> bool:
    tables = ((first.latency, second.latency), (first.bandwidth, second.bandwidth))
    return (first.transport, first.entries) == (second.transport, second.entries) and all(
        np.array_equal(*each) for each in tables
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.profile"
    for ranks in (4, 1):
        whole = profile(ranks, entries=(entry(256, sdpa=0.1, onednn=0.2),))
        whole.write(path)
        assert equal(Profile.read(path), whole)
    assert [each.name for each in tmp_path.iterdir()] == ["cluster.profile"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cluster.profile"
    profile(2).write(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"cluster.profile cannot be written: No space left on device"):
        profile(4).write(path)
    assert equal(Profile.read(path), profile(2))
    assert [each.name for each in tmp_path.iterdir()] == ["cluster.profile"]
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        profile(2).write(tmp_path / "missing" / "cluster.profile")


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "cluster.profile"
    profile(3, entries=(entry(256, sdpa=0.1),)).write(path)
    whole = path.read_text()
    value = json.loads(whole)
    changed = {**value, "content": {**value["content"], "transport": "mpi"}}
    wrong = [whole[:cut] for cut in (0, 1, len(whole) // 3, len(whole) - 2)]
    wrong += ["[]", "3", '"x"', "{}", "null", json.dumps(changed), json.dumps({**value, NAME: 2}), "\x00\xff"]
    for text in wrong:
        path.write_text(text)
        with pytest.raises(InputError, match="is no profile of ringattn") as refused:
            Profile.read(path)
        assert "\n" not in str(refused.value) and "ringattn doctor --profile" in str(refused.value)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Profile.read(tmp_path / "missing")
    with pytest.raises(InputError, match="is no file"):
        Profile.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latency", [[0.0, float("nan")], [1.0, 0.0]]),
        ("latency", [[0.0, -1.0], [1.0, 0.0]]),
        ("bandwidth", [[0.0, 0.0], [1.0, 0.0]]),
        ("bandwidth", [[0.0]]),
        ("bandwidth", [[0.0, 1.0]]),
        ("latency", []),
        ("latency", "x"),
        ("rates", [{}]),
        ("rates", 3),
    ],
)
def test_content_that_nobody_measures_is_refused_though_its_digest_is_right(
    name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cluster.profile"
    profile(2).write(path)
    whole = json.loads(path.read_text())
    whole["content"][name] = value
    path.write_text(json.dumps(whole))
    monkeypatch.setattr("ringattn.profile._digest", lambda _: whole["digest"])
    with pytest.raises(InputError, match="is damaged"):
        Profile.read(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_profile_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.profile"
    path.write_bytes(data)
    with pytest.raises(InputError):
        Profile.read(path)


@pytest.mark.parametrize(
    ("far", "mask", "layout", "taken"),
    [
        ((), ringattn.Causal(), "contiguous", "ring"),  # no longer by ring than by route: neighbours only
        ([(0, 3)], ringattn.Causal(), "contiguous", "ring"),  # which does not send from the last rank to the first
        ([(0, 3)], ringattn.Full(), "contiguous", "route"),  # each of the two needs one shard that way, and no more
        ([(0, 2)], ringattn.Full(), "contiguous", "ring"),  # round it
        ([(0, 2), (1, 3)], ringattn.Causal(), "zigzag", "ring"),  # though more is received by ring
        ([(0, 1)], ringattn.Causal() & ringattn.Window(100), "zigzag", "route"),
    ],
)
def test_auto_goes_round_slow_links(
    far: list[tuple[int, int]], mask: ringattn.masks.Mask, layout: str, taken: str
) -> None:
    reasons = set()
    for rank in range(4):
        mesh = Mesh.virtual(ring=4, rank=rank).profiled(profile(4, far))
        for each in (mesh, pickle.loads(pickle.dumps(mesh))):  # a loader's worker plans the same
            plan = ringattn.plan(mask, ringattn.Sharding(4096, each, layout, mask))
            assert plan.description.startswith(taken)
            reasons.add(plan.reason)
    (reason,) = reasons
    assert reason.startswith(f"auto took {taken}: ") and "the profile's links" in reason


def test_replicas_have_links_of_their_own() -> None:
    whole = profile(4, [(2, 3)])
    slow = [Mesh(2, data=2, rank=rank).profiled(whole).links for rank in range(4)]
    assert [links.latency[0, 1] for links in slow if links is not None] == [1e-4, 1e-4, 0.02, 0.02]
    assert Mesh.local().profiled(profile(1)).links is None


def test_auto_takes_the_kernel_that_the_profile_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("measured")

    problem = PROBLEM
    both = {str(kernel) for kernel in contenders(problem)}
    assert both == {"sdpa", "onednn"}
    small, large = entry(256, sdpa=0.1, onednn=0.3), entry(1024, sdpa=0.3, onednn=0.1)
    monkeypatch.setattr("ringattn.kernels.choice.stored", fail)
    for entries, work, expected in (
        ((small,), WORK, "sdpa"),
        ((large,), WORK, "onednn"),
        ((small, large), dataclasses.replace(WORK, side=900), "onednn"),
        ((small, large), dataclasses.replace(WORK, side=100), "sdpa"),
    ):
        kernel, reason = chosen_kernel("auto", problem, work, rates=Profiled(entries))
        assert str(kernel) == expected and reason.startswith("auto took the fastest, as measured by the profile")
    elsewhere = dataclasses.replace(small, machine=dataclasses.replace(small.machine, processor="another"))
    with pytest.raises(AssertionError, match="measured"):
        chosen_kernel("auto", problem, WORK, rates=Profiled((elsewhere,)))
    with pytest.raises(AssertionError, match="measured"):
        chosen_kernel("auto", dataclasses.replace(problem, dim=128, value_dim=128), WORK, rates=Profiled((small,)))


def _start(_: Mesh, path: str, transport: str) -> tuple[str, str]:
    """What a rank that starts with a profile has of it, or what it says; and its warnings."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            mesh = ringattn.init(transport=transport, profile=path, timeout=30)  # type: ignore[arg-type]
            assert mesh.profile is not None
            said = f"{mesh.profile.transport}, {mesh.profile.size} ranks, {len(mesh.profile.entries)} entries"
            sharding = ringattn.Sharding(4096, mesh, "contiguous")
            said += f", {ringattn.plan(ringattn.Full(), sharding).reason[:15]}"
        except ringattn.RingAttentionError as error:
            said = f"{type(error).__name__}: {error}"
    return said, " ".join(str(each.message) for each in warned if each.category is UserWarning)


@pytest.mark.parametrize("kind", ["gloo", "mpi"])
def test_all_ranks_get_what_rank_0_reads(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    workers: Workers = request.getfixturevalue(kind)
    path = tmp_path / "cluster.profile"

    def start() -> tuple[set[str], list[str]]:
        said, warned = zip(*workers.run(SIZE, _start, str(path), kind), strict=True)
        return set(said), list(warned)

    refused, _ = start()
    assert {each.split(":")[0] for each in refused} == {"InputError", "AgreementError"}
    assert all("cannot be read: No such file or directory" in each for each in refused)
    profile(SIZE, [(0, 3)], (entry(256, sdpa=0.1),), kind).write(path)
    assert start() == ({f"{kind}, 4 ranks, 1 entries, auto took route"}, [""] * SIZE)
    profile(3, transport=kind).write(path)
    said, warned = start()
    assert said == {f"{kind}, 0 ranks, 0 entries, auto took ring:"}
    assert "is of 3 ranks" in warned[0] and warned[1:] == [""] * (SIZE - 1)


def test_one_process(tmp_path: Path) -> None:
    path = tmp_path / "cluster.profile"
    profile(1, transport="local").write(path)
    assert ringattn.init(profile=path).profile is not None
    assert ringattn.init(profile=str(path), transport="local").profile is not None
    assert ringattn.init().profile is None
    with pytest.raises(InputError, match="profile must be the path of a file, or None; got 3"):
        ringattn.init(profile=3)  # type: ignore[arg-type]
    path.write_text("{")
    with pytest.raises(InputError, match="is no profile of ringattn"):
        ringattn.init(profile=path)


def test_a_name_that_no_file_has_is_refused() -> None:
    with pytest.raises(InputError, match="NUL"):
        Profile.read(Path("a\0b"))
