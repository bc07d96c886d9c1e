"""The doctor: planted slow ranks and links are named, on virtual ranks, and real ranks are measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ringattn
from ringattn.cli import app
from ringattn.diagnosis import Examination, Instruments, examine, findings
from ringattn.diagnosis.computing import Trial, gigaflops, measured
from ringattn.diagnosis.examination import steps
from ringattn.diagnosis.facts import Facts
from ringattn.diagnosis.heatmap import draw
from ringattn.diagnosis.links import opponent, rounds
from ringattn.mesh import Mesh
from ringattn.profile import Profile
from ringattn.transports.base import Message, Transport
from scripts.benchmarks.teams import mpirun
from tests.workers import Workers

LATENCY, BANDWIDTH, SPEED = 1e-4, 1e7, 10.0
Links = dict[frozenset[int], float]


@pytest.mark.parametrize("size", range(1, 18))
def test_every_pair_meets_once_and_all_pairs_of_a_round_at_once(size: int) -> None:
    met = []
    for turn in range(rounds(size)):
        others = [opponent(rank, turn, size) for rank in range(size)]
        assert all(other is None or (others[other] == rank and other != rank) for rank, other in enumerate(others))
        assert others.count(None) == size % 2
        met += [(rank, other) for rank, other in enumerate(others) if other is not None and rank < other]
    assert sorted(met) == list(itertools.combinations(range(size), 2))


class Timed(Transport):
    """A transport whose messages take the time that is planted, by a clock of its own."""

    def __init__(
        self, inner: Transport, late: dict[frozenset[int], float], narrow: dict[frozenset[int], float]
    ) -> None:
        super().__init__("simulator", inner.rank, inner.size, agreement=True)
        self._inner, self._late, self._narrow = inner, late, narrow
        self.now = 0.0

    def refusal(self, device: torch.device) -> str | None:
        return self._inner.refusal(device)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], label: str) -> Callable[[], None]:
        handle = self._inner.exchange(sends, receives, label=label)

        def complete() -> None:
            handle.wait()
            for peer, buffer in [*sends, *receives]:
                link = frozenset((self.rank, peer))
                self.now += self._late.get(link, LATENCY) + buffer.nbytes / self._narrow.get(link, BANDWIDTH)

        return complete


def examined(
    size: int,
    slow: dict[int, float] | None = None,
    late: Links | None = None,
    narrow: Links | None = None,
    ahead: dict[int, float] | None = None,
) -> Examination:
    """Virtual ranks, of which some are slow and some links late or narrow."""
    advanced = [0] * size

    def on_rank(mesh: Mesh) -> Examination:
        transport = Timed(mesh.connected(), late or {}, narrow or {})

        def advance() -> None:
            advanced[mesh.rank] += 1

        instruments = Instruments(
            clock=lambda: transport.now,
            wall=lambda: (ahead or {}).get(mesh.rank, 0.0),
            trial=lambda _: Trial("sdpa", SPEED * (slow or {}).get(mesh.rank, 1.0)),
            advance=advance,
        )
        return examine(Mesh.virtual(ring=size, rank=mesh.rank, transport=transport), instruments)

    found = ringattn.simulate(on_rank, ring=size).results
    assert all(dataclasses.replace(each, trial=found[0].trial) == found[0] for each in found)
    assert advanced == [steps(size)] * size
    first: Examination = found[0]
    return first


def spread(found: Examination, hosts: int) -> Examination:
    """The same with ranks on several hosts."""
    each = -(-found.size // hosts)
    facts = [dataclasses.replace(x, host=f"host{i // each}", cores=99) for i, x in enumerate(found.facts)]
    return dataclasses.replace(found, facts=tuple(facts))


def test_the_planted_figures_are_measured() -> None:
    found = examined(5, late={frozenset((1, 3)): 0.02}, ahead={2: 3.0})
    assert found.size == 5 and found.transport == "simulator"
    for i, j in itertools.permutations(range(5), 2):
        expected = 0.02 if {i, j} == {1, 3} else LATENCY
        assert found.latency[i][j] == pytest.approx(expected, rel=0.01)
        assert found.bandwidth[i][j] == pytest.approx(BANDWIDTH / 2, rel=0.35)
    assert found.offsets == pytest.approx((0, 0, 3, 0, 0), abs=1e-3)
    assert found.ring is not None and found.all_to_all is not None
    # the slowest link and rank: 4096 operations a pair at 10 GFLOP/s, 4096 bytes a key, and 20 ms
    assert found.hidden_from is not None
    key = 4096 / min(x for row in found.bandwidth for x in row if x)
    left, right = found.hidden_from**2 * 4096 / (SPEED * 1e9), found.hidden_from * key + 0.02
    assert left == pytest.approx(right, rel=0.01)
    assert examined(1).hidden_from is None


@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_that_are_alike_give_no_findings(size: int) -> None:
    assert findings(spread(examined(size), 1)) == []
    assert findings(spread(examined(size), 2)) == []


def test_a_slow_rank_and_a_late_link_are_named() -> None:
    found = spread(examined(6, slow={3: 0.4}, late={frozenset((2, 5)): 0.02}), 1)
    first, second = findings(found)
    assert first.startswith("rank 3 computes at 0.4 of the others' rate (4 against 10 GFLOP/s)")
    assert second.startswith("the link 2-5 has 20 ms against 101 us elsewhere")


def test_a_narrow_link_and_a_rank_all_of_whose_links_are() -> None:
    (one,) = findings(spread(examined(5, narrow={frozenset((0, 4)): 5e5}), 1))
    assert one.startswith("the link 0-4 carries ") and "/s against " in one and "within a host (host0 and host0)" in one
    narrow = {frozenset((2, other)): 5e5 for other in (0, 1, 3, 4, 5)}
    (all_of_one,) = findings(spread(examined(6, narrow=narrow), 6))
    assert all_of_one.startswith("all links of rank 2 carry ") and "look at host2's network" in all_of_one


def test_hundreds_of_ranks_are_judged_at_once() -> None:
    size, few = 512, spread(examined(2), 1)
    narrow = [[BANDWIDTH / (4 if 7 in (i, j) or {i, j} == {1, 2} else 1) for j in range(size)] for i in range(size)]
    facts = tuple(dataclasses.replace(few.facts[0], host=f"host{i // 8}") for i in range(size))
    many = dataclasses.replace(
        few,
        facts=facts,
        latency=((LATENCY,) * size,) * size,
        bandwidth=tuple(map(tuple, narrow)),
        speeds=(SPEED,) * size,
        offsets=(0.0,) * size,
    )
    started = time.monotonic()
    said = findings(many)
    assert time.monotonic() - started < 20
    assert [each.split(" carr")[0] for each in said] == [
        "all links of rank 7", "the link 1-2", "all links of rank 7",
    ]  # fmt: skip


def test_links_between_hosts_are_compared_with_each_other() -> None:
    """That they are slower than those within is no link's fault."""
    between = {frozenset((i, j)): 0.02 for i in range(3) for j in range(3, 6)}
    found = spread(examined(6, late=between), 2)
    assert findings(found) == [
        "links between hosts have 20 ms one way, the median: they are far apart, and every message of every call takes "
        "that long. Ask for hosts in one place."
    ]
    assert findings(spread(examined(6, late={**between, frozenset((0, 3)): 0.5}), 2))[0].startswith(
        "the link 0-3 has 500 ms against 20 ms elsewhere, between hosts (host0 and host1)"
    )


def test_links_that_are_slow_for_what_the_ranks_compute() -> None:
    found = dataclasses.replace(spread(examined(4), 1), speeds=(1000.0,) * 4)
    (one,) = findings(found)
    assert one.startswith("links are slow for what these ranks compute") and f"{found.hidden_from} tokens" in one


def test_clocks_versions_and_threads() -> None:
    found = spread(examined(4, ahead={2: -2.0, 3: -2.0}), 2)
    assert findings(found) == ["the clock of host1 is 2.00 s behind that of host0: logs mislead."]
    facts = list(spread(examined(4), 1).facts)
    facts[1] = dataclasses.replace(facts[1], versions={**facts[1].versions, "torch": "2.12.0"})
    facts[2] = dataclasses.replace(facts[2], threads=97)
    said = findings(dataclasses.replace(found, facts=tuple(facts), offsets=(0.0,) * 4))
    assert said[0] == f"torch differs: {torch.__version__} on rank 0, 2, 3; 2.12.0 on rank 1."
    assert said[1].startswith("4 ranks on host0 start ") and said[1].endswith("set OMP_NUM_THREADS=24.")
    crowded = tuple(dataclasses.replace(x, cores=3) for x in facts)
    said = findings(dataclasses.replace(found, facts=crowded, offsets=(0.0,) * 4))
    assert said[-1] == "4 ranks share the 3 cores of host0, and wait for each other's."


def test_the_heat_map(tmp_path: Path) -> None:
    few = examined(4)
    table = ((1.0,) * 20,) * 20
    many = dataclasses.replace(few, facts=few.facts * 5, latency=table, bandwidth=table)
    for found in (few, examined(1), many):
        draw(found, tmp_path / "links.png")
        assert (tmp_path / "links.png").read_bytes().startswith(b"\x89PNG")


def _of_real_ranks(mesh: Mesh) -> Any:
    found = examine(mesh, Instruments(trial=lambda _: Trial("sdpa", 1.0)))
    return dataclasses.asdict(found)


@pytest.mark.parametrize("kind", ["gloo", "mpi"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_real_ranks(kind: str, size: int, request: pytest.FixtureRequest) -> None:
    workers: Workers = request.getfixturevalue(kind)
    found = workers.run(size, _of_real_ranks)
    assert all(each["latency"] == found[0]["latency"] for each in found)
    assert found[0]["transport"] == kind
    assert [Facts(**x).host for x in found[0]["facts"]] == [found[0]["facts"][0]["host"]] * size
    assert (found[0]["facts"][0]["gpu_aware_mpi"] is None) == (kind != "mpi")
    for i, j in itertools.permutations(range(size), 2):
        assert 0 < found[0]["latency"][i][j] == found[0]["latency"][j][i] < 10
        assert 1e5 < found[0]["bandwidth"][i][j] < 1e12
    assert all(abs(offset) < 1 for offset in found[0]["offsets"])  # one host has one clock
    assert found[0]["ring"] > 0 and found[0]["all_to_all"] > 0


def test_the_trial_measures_what_auto_would_choose_among() -> None:
    trial = measured(torch.device("cpu"))
    assert len({entry.rates.workload for entry in trial.entries}) == 16
    rates = gigaflops(trial.entries[0].rates)
    assert trial.kernel in rates and trial.gigaflops == rates[trial.kernel] > 0.1


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_on_one_process(tmp_path: Path) -> None:
    shown = run("doctor", "--json", "--plot", str(tmp_path / "one.png"))
    assert shown.exit_code == 0, shown.output
    value = json.loads(shown.stdout)
    assert (value["launcher"], value["transport"], len(value["ranks"])) == ("none", "local", 1)
    assert value["ring"] is None and value["findings"] == []
    assert value["rates"] and value["kernel"] in value["rates"][0]["seconds"]
    assert (tmp_path / "one.png").exists()


@pytest.mark.parametrize("name", ["links.txt", "missing/links.png"])
def test_a_picture_that_cannot_be_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringattn.cli.doctor.examine", lambda *_: examined(2))
    shown = run("doctor", "--plot", str(tmp_path / name))
    assert shown.exit_code == 2
    assert shown.stderr.count("\n") == 1 and ("must end in .png" in shown.stderr or "cannot write" in shown.stderr)


def test_what_it_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    found = spread(examined(6, slow={3: 0.4}, late={frozenset((2, 5)): 0.02}), 2)
    monkeypatch.setattr("ringattn.cli.doctor.examine", lambda *_: found)
    shown = run("doctor")
    assert shown.exit_code == 0, shown.output
    for words in (
        "6 on 2 hosts, host0, host1",
        "simulator",
        "between hosts: ",
        "rank 3 computes at 0.4",
        "the link 2-5",
    ):
        assert words in shown.output


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_launched_ranks_write_a_profile(launcher: str, tmp_path: Path) -> None:
    """Two processes, as a user starts them: what rank 0 prints and writes is of both, and can be read."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if launcher == "mpirun":
        start = [*mpirun(2), sys.executable]
    path = tmp_path / "cluster.profile"
    done = subprocess.run(
        [*start, "-m", "ringattn.cli", "doctor", "--json", "--profile", str(path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    transport = {"torchrun": "gloo", "mpirun": "mpi"}[launcher]
    assert (value["launcher"], value["transport"], len(value["ranks"])) == (launcher, transport, 2)
    profile = Profile.read(path)
    assert (profile.transport, profile.latency.tolist()) == (transport, value["latency"])
    assert len(profile.entries) == len(value["rates"]) > 0
