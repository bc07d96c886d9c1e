"""Kernels chosen by measurement: what is measured, kept and agreed on. Times are told here, never taken."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ringattn
from ringattn.errors import AgreementError, InputError
from ringattn.kernels import OneDNN, Reference, Sdpa, choice
from ringattn.kernels.base import Kernel
from ringattn.kernels.choice import chosen_kernel
from ringattn.kernels.machine import Machine, processor
from ringattn.kernels.rates import MARGIN, Rates, Work, Workload
from ringattn.kernels.store import Entry, Store
from ringattn.kernels.trial import ROUNDS, measure
from ringattn.mechanisms.base import Mechanism, Problem
from ringattn.mechanisms.softmax import Softmax
from tests.workers import Workers

LARGE = Work(pairs=1 << 20, side=1000)
WORKLOAD = Workload("Softmax", "float32", 64, 64, 2, 1, 64, True)
MACHINE = Machine("a processor", 1, "2.0", ("onednn 1", "sdpa 1"))


def _problem(**changes: Any) -> Problem:
    given = {"mechanism": Softmax(), "batch": 1, "heads": 4, "kv_heads": 2, "dim": 64, "value_dim": 64}
    return Problem(**{**given, "dtype": torch.float32, "device": torch.device("cpu"), **changes})


def _told(onednn: float, sdpa: float) -> choice.Measure:
    """What measures these seconds."""
    seconds = {"onednn": onednn, "sdpa": sdpa}

    def rates(kernels: Sequence[Kernel], mechanism: Mechanism, workload: Workload) -> Rates:
        return Rates(workload, tuple((str(kernel), seconds[str(kernel)]) for kernel in kernels))

    return rates


def _never(kernels: Sequence[Kernel], mechanism: Mechanism, workload: Workload) -> Rates:
    raise AssertionError("nothing was to be measured")


@pytest.mark.parametrize(
    ("onednn", "sdpa", "taken"),
    [
        (1.0, 0.5, Sdpa()),
        (1.0, 2.0, OneDNN()),
        (1 / (MARGIN + 1e-6), 1.0, OneDNN()),
        (1 / (MARGIN - 1e-6), 1.0, Sdpa()),
    ],
)
def test_auto_takes_the_fastest_and_noise_does_not_flip_it(onednn: float, sdpa: float, taken: Kernel) -> None:
    kernel, reason = chosen_kernel("auto", _problem(), LARGE, rates=_told(onednn, sdpa))
    assert kernel == taken
    assert f"sdpa {sdpa * 1e3:.1f} ms, onednn {onednn * 1e3:.1f} ms for Softmax, float32" in reason


@pytest.mark.parametrize(
    ("kernel", "changes", "work", "taken"),
    [
        ("sdpa", {}, LARGE, Sdpa()),  # asked for by name
        (Reference(rows=3), {}, LARGE, Reference(rows=3)),
        ("auto", {}, None, Sdpa()),  # nothing known about the tiles
        ("auto", {}, Work(1000, 100), Sdpa()),  # too small
        ("auto", {"mechanism": Softmax(softcap=2.0)}, LARGE, OneDNN()),  # the only one that can
        ("auto", {"value_dim": 32}, LARGE, OneDNN()),
        ("auto", {"dtype": torch.float64}, LARGE, Sdpa()),
        ("auto", {"device": torch.device("cuda"), "dtype": torch.bfloat16}, LARGE, Sdpa()),
        ("auto", {"mechanism": ringattn.Hard()}, LARGE, Reference()),
    ],
)
def test_nothing_is_measured_where_there_is_nothing_to_choose(
    kernel: Any, changes: dict[str, Any], work: Work | None, taken: Kernel
) -> None:
    assert chosen_kernel(kernel, _problem(**changes), work, rates=_never)[0] == taken


def test_a_rank_that_asks_a_predicate_still_takes_part_in_the_choice() -> None:
    subjects = []

    def decide(subject: str, choose: Callable[[], int]) -> int:
        subjects.append(subject)
        return choose()

    for allows in (None, lambda q, k: q >= k):
        kernel, _ = chosen_kernel("auto", _problem(allows=allows), LARGE, decide=decide, rates=_told(2.0, 1.0))
        assert kernel == (Sdpa() if allows is None else Reference())
    assert len(subjects) == 2 and len(set(subjects)) == 1


@pytest.mark.parametrize("mask", [ringattn.Causal(), ringattn.Predicate(lambda q, k: (q + k) % 3 > 0)], ids=str)
def test_every_rank_sees_the_same_work(mask: ringattn.Mask) -> None:
    plans = ringattn.plan_all(mask, 301, layout="striped", ring=4)
    assert len({plan.area for plan in plans}) > 1
    assert len({Work.from_plan(plan) for plan in plans}) == 1


def test_classes_of_problems() -> None:
    def made(work: Work = LARGE, **changes: Any) -> Workload:
        workload = Workload.from_problem(_problem(**changes), work)
        assert workload is not None
        return workload

    assert made() == Workload("Softmax", "float32", 64, 64, 2, 1, 1024, True)  # one thread, groups of two
    assert made(Work(1 << 20, 900)) == made(Work(1 << 20, 1100)), "sides in powers of two"
    assert made(Work(1 << 30, 1 << 20)).side == 2048
    assert made(Work(1 << 20, 3)).side == 64
    large = Work(1 << 30, 1 << 20)
    assert made(large, dim=256, value_dim=256).side < made(large).side, "a trial takes about as long for any dims"
    assert made(constants=frozenset("qkv")).backward is False
    assert made(constants=frozenset("qk")).backward is True
    assert Workload.from_problem(_problem(), Work(10, 4)) is None
    assert Workload.from_problem(_problem(device=torch.device("cuda")), LARGE) is None


def test_a_measurement_is_the_least_of_times_taken_in_turn() -> None:
    runs: list[str] = []
    times = {"onednn": iter((9.0, 3.0, 5.0)), "sdpa": iter((4.0, 7.0, 6.0))}

    class Timed(Reference):
        def __init__(self, name: str) -> None:
            super().__init__()
            object.__setattr__(self, "name", name)

        def forward(self, *args: Any) -> Any:
            runs.append(str(self))
            return super().forward(*args)

        def __str__(self) -> str:
            return str(vars(self)["name"])

    now = itertools.count()
    reads: list[float] = [0.0]

    def clock() -> float:
        if next(now) % 2:
            reads.append(reads[-1] + next(times[runs[-1]]))
        return reads[-1]

    kernels = [Timed("onednn"), Timed("sdpa")]
    rates = measure(kernels, Softmax(), WORKLOAD, clock)
    assert rates.seconds == (("onednn", 3.0), ("sdpa", 4.0))
    assert runs == ["onednn", "sdpa"] * (ROUNDS + 1)


@pytest.mark.parametrize("backward", [False, True])
def test_a_measurement_leaves_the_random_state_alone(backward: bool) -> None:
    before = torch.get_rng_state()
    rates = measure([OneDNN(), Sdpa()], Softmax(), dataclasses.replace(WORKLOAD, backward=backward))
    assert rates.names == ("onednn", "sdpa") and all(seconds > 0 for _, seconds in rates.seconds)
    assert torch.equal(before, torch.get_rng_state())


# -- the store -----------------------------------------------------------------------------------------------------


def _rates(sdpa: float = 1.0, workload: Workload = WORKLOAD) -> Rates:
    return Rates(workload, (("onednn", 2.0), ("sdpa", sdpa)))


def test_rates_are_kept_for_their_class_and_machine(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "kernels.json")
    assert store.found_or_measured(MACHINE, WORKLOAD, _rates) == _rates()

    def never() -> Rates:
        raise AssertionError("measured twice")

    assert store.found_or_measured(MACHINE, WORKLOAD, never) == _rates()
    assert store.found_or_measured(dataclasses.replace(MACHINE, threads=2), WORKLOAD, lambda: _rates(3.0)) == _rates(
        3.0
    )
    others: tuple[dict[str, Any], ...] = ({"processor": "b"}, {"torch": "2.1"}, {"kernels": ("onednn 2", "sdpa 1")})
    for other in others:
        assert store.find(dataclasses.replace(MACHINE, **other), WORKLOAD) is None
    assert store.find(MACHINE, dataclasses.replace(WORKLOAD, side=128)) is None
    store.keep(Entry(MACHINE, _rates(5.0)))
    assert store.find(MACHINE, WORKLOAD) == _rates(5.0) and len(store.entries()) == 2
    newer = Entry(dataclasses.replace(MACHINE, kernels=("onednn 2", "sdpa 1")), _rates(6.0))
    store.keep(newer)
    assert newer in store.entries() and len(store.entries()) == 2, "in place of those of the kernel's old version"
    assert store.clear() == 2 and store.entries() == [] and store.clear() == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"rates": 4}',
        '{"rates": [{"machine": {}, "rates": {}}]}',
        "[" * 100_000,
        '{"rates": [{"count": 1' + "0" * 400 + "}]}",
        '{"rates": [{"machine": {"kernels": 3}}]}',
        "\x00\xff",
    ],
)
def test_a_corrupt_file_costs_a_measurement_and_is_replaced(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path / "kernels.json")
    (tmp_path / "kernels.json").write_bytes(text.encode("latin-1"))
    assert store.found_or_measured(MACHINE, WORKLOAD, _rates) == _rates()
    assert store.entries() == [Entry(MACHINE, _rates())]


@pytest.mark.parametrize(
    "seconds",
    [[], [["onednn", -1.0]], [["onednn", "nan"]], [["onednn"]], [["ghost", 1.0]], [["reference", 1e-9], ["sdpa", 1.0]]],
)
def test_rates_that_are_none_are_not_believed(tmp_path: Path, seconds: Any) -> None:
    store = Store(tmp_path / "kernels.json")
    store.keep(Entry(MACHINE, _rates()))
    values = json.loads((tmp_path / "kernels.json").read_text())
    values["rates"][0]["rates"]["seconds"] = seconds
    (tmp_path / "kernels.json").write_text(json.dumps(values))
    assert store.entries() == []


def test_an_unwritable_store_costs_a_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for store in (Store(None), Store(tmp_path / "file" / "kernels.json")):
        for _ in range(2):
            assert store.found_or_measured(MACHINE, WORKLOAD, _rates) == _rates()
        assert store.entries() == []
    assert (tmp_path / "file").read_text() == ""


def test_one_measures_while_the_others_wait(tmp_path: Path) -> None:
    """Each thread has a lock of its own, as processes have."""
    measured, found = [], []
    begin = threading.Barrier(3)

    def slow() -> Rates:
        measured.append(threading.get_ident())
        time.sleep(0.2)
        return _rates(float(len(measured)))

    def run() -> None:
        begin.wait()
        found.append(Store(tmp_path / "kernels.json").found_or_measured(MACHINE, WORKLOAD, slow))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1 and found == [_rates()] * 3


def test_the_wait_for_another_process_is_bounded(tmp_path: Path) -> None:
    from filelock import FileLock

    store = Store(tmp_path / "kernels.json", wait=0.01)
    with FileLock(tmp_path / "kernels.json.lock"):
        assert store.found_or_measured(MACHINE, WORKLOAD, _rates) == _rates()


def test_the_store_lies_in_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Store.of_user().path == tmp_path / "ringattn" / "kernels.json"
    for given in ("", "relative"):  # which the standard wants ignored
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert Store.of_user().path == tmp_path / ".cache" / "ringattn" / "kernels.json"


def test_the_processor_is_told_from_its_next_generation(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n\nprocessor\t: 1\n"
    )
    assert processor(tmp_path / "cpuinfo").startswith("AMD EPYC (family 25, model 17, stepping 1, ")
    assert processor(tmp_path / "missing")
    assert Machine.here([OneDNN(), Sdpa()]).kernels == (f"onednn {OneDNN.version}", f"sdpa {Sdpa.version}")


# -- ranks ---------------------------------------------------------------------------------------------------------


class _Told:
    """Stands in for the measurement: on a rank of its own, each says another kernel is faster."""

    def __init__(self, fastest: Callable[[], str]) -> None:
        self.fastest, self.count = fastest, 0

    def __call__(self, kernels: Sequence[Kernel], mechanism: Mechanism, workload: Workload) -> Rates:
        self.count += 1
        fastest = self.fastest()
        return Rates(workload, tuple((str(kernel), 1.0 if str(kernel) == fastest else 2.0) for kernel in kernels))


def _call(mesh: ringattn.Mesh, mask: ringattn.Mask, wrong: bool = False) -> None:
    sharding = ringattn.Sharding(2048, mesh, "contiguous")
    g = torch.Generator().manual_seed(mesh.rank)
    q, k, v = (torch.randn(1, 2, sharding.count - wrong, 16, generator=g) for _ in range(3))
    ringattn.attention(q, k, v, mask, sharding=sharding)


def _decisions(mesh: ringattn.Mesh) -> tuple[list[int], int]:
    """What a rank has decided after calls of two masks of one class, and the control messages of the second."""
    transport = mesh.connected()
    _call(mesh, ringattn.Causal())
    before = transport.counters.control_messages
    _call(mesh, ringattn.Documents([2048]) & ringattn.Causal())
    return list(transport.decisions.values()), transport.counters.control_messages - before


def test_virtual_ranks_take_what_rank_0_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = _Told(lambda: "onednn")
    monkeypatch.setattr(choice, "measure", told)
    assert ringattn.simulate(_decisions, ring=3).results == [([1], 2)] * 3  # onednn; then the call's digests alone
    assert told.count == 1
    ringattn.simulate(_decisions, ring=3)
    assert told.count == 1, "kept for the next run"


def _decisions_on_a_process(mesh: ringattn.Mesh, folder: str) -> tuple[list[int], int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", f"{folder}/{mesh.rank}")  # as on machines of their own
        patch.setattr(choice, "measure", _Told(lambda: "sdpa" if mesh.rank else "onednn"))
        mesh.connected().decisions.clear()
        try:
            return _decisions(mesh)
        finally:
            mesh.connected().decisions.clear()


def test_processes_take_what_rank_0_measured(gloo: Workers, tmp_path: Path) -> None:
    assert gloo.run(3, _decisions_on_a_process, str(tmp_path)) == [([1], 2)] * 3


def test_a_rank_that_refuses_while_the_others_choose_is_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "measure", _Told(lambda: "sdpa"))

    def run(mesh: ringattn.Mesh) -> str:
        with pytest.raises((AgreementError, InputError)) as caught:
            _call(mesh, ringattn.Causal(), wrong=mesh.rank == 1)
        return type(caught.value).__name__

    assert ringattn.simulate(run, ring=3).results == ["AgreementError", "InputError", "AgreementError"]


def test_explain_shows_the_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "measure", _Told(lambda: "sdpa"))
    q, k, v = (torch.randn(1, 2, 1024, 16) for _ in range(3))
    sharding = ringattn.Sharding(2048, ringattn.Mesh.virtual(2), "contiguous")
    said = ringattn.explain(q, k, v, ringattn.Causal(), sharding=sharding)
    assert said.splitlines()[-1] == (
        "  kernel sdpa: auto took the fastest, as measured here: sdpa 1000.0 ms, onednn 2000.0 ms for Softmax, "
        "float32, 1 head of 16, tiles of 1024, forward"
    )


def _with_other_threads(mesh: ringattn.Mesh) -> list[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 + mesh.rank)
    try:
        sharding = ringattn.Sharding(4096, mesh)
        made = []
        for batch in (1, 2):
            q, k, v = (torch.randn(batch, 1, sharding.count, 64) for _ in range(3))
            made.append(ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding).shape[0])
        return made
    finally:
        torch.set_num_threads(before)


def test_ranks_with_other_numbers_of_threads_agree(gloo: Workers) -> None:
    assert gloo.run(2, _with_other_threads) == [[1, 2]] * 2
