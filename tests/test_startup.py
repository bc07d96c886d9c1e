"""Meshes and start-up: what is refused and in which words, and ranks that start with different arguments."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import init_device_mesh

import ringattn
from ringattn.errors import InputError
from ringattn.meeting import Meeting
from ringattn.rendezvous import Launch
from tests.workers import Workers

api: Any = ringattn  # called with what its types forbid


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: api.init(agreement="off"), "agreement must be 'auto', True or False; got 'off'"),
        (lambda: api.init(agreement=None), "agreement must be 'auto', True or False; got None"),
        (lambda: api.init(agreement=1), "agreement must be 'auto', True or False; got 1"),
        (
            lambda: api.init(timeout="x"),
            "timeout, a number of seconds, must be a finite number above 0 and at most .*; got 'x'",
        ),
        (lambda: api.init(timeout=float("nan")), "timeout, a number of seconds"),
        (lambda: api.init(timeout=1e12), "timeout"),
        (lambda: api.init(ring="x"), "ring is a number of ranks, .*at least 1; got .x."),
        (lambda: api.init(ring=True), "got True"),
        (lambda: api.init(ulysses=0.5), "ulysses is a number of ranks"),
        (lambda: api.init(transport=3), "transport must be .*; got 3"),
        (lambda: api.Mesh(1, rank="x"), "A rank of this mesh is 0 to 0; got .x."),
        (lambda: api.Mesh("x"), "The ring axis needs at least one rank; it is a number of ranks"),
        (lambda: api.Mesh(2**63), "it is a number of ranks, below"),
        (lambda: api.Mesh(1, data=-1), "The data axis needs at least one rank"),
        (lambda: api.Mesh(1, transport="gloo"), "transport must be a ringattn transport.*; got 'gloo'"),
        (lambda: api.Mesh(4, transport=api.Mesh.local().transport), "joins 1 ranks; the mesh has 4"),
        (lambda: api.Mesh.virtual("x"), "The ring axis needs at least one rank; it is a number of ranks"),
        (lambda: api.Mesh.from_device_mesh("cp"), "a torch DeviceMesh"),
        (lambda: api.Mesh.from_device_mesh(None), "a torch DeviceMesh"),
    ],
)
def test_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", "x"), ("MASTER_PORT", "x"), ("RANK", "7")])
def test_an_environment_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    good = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29987"}
    for key, text in {**good, name: value}.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(InputError, match=f"{name}.*got '?{value}"):
        ringattn.init(transport="gloo", timeout=5)


def _of_torch(mesh: ringattn.Mesh) -> list[Any]:
    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    whole = ringattn.Mesh.from_device_mesh(device_mesh, ring="cp", ulysses=None, data="dp")
    turned = ringattn.Mesh.from_device_mesh(device_mesh, ring="dp", data="cp")
    alone = ringattn.Mesh.from_device_mesh(device_mesh["cp"], ring="cp")
    line = ringattn.Mesh.from_device_mesh(init_device_mesh("cpu", (4,), mesh_dim_names=("cp",)))
    found: list[Any] = [(each.coordinates, each.axes) for each in (whole, turned, alone, line)]
    make: Any = ringattn.Mesh.from_device_mesh
    for arguments, names in (
        ((device_mesh["cp"],), {}),
        ((device_mesh,), {}),
        ((device_mesh,), {"ring": "cp"}),
        ((device_mesh,), {"ring": "tp", "data": "dp"}),
        ((device_mesh,), {"ring": "cp", "data": "cp"}),
        ((device_mesh,), {"ring": 3, "data": "cp"}),
        ((device_mesh,), {"data": "dp"}),
        ((device_mesh,), {"ring": "cp", "data": "dp", "agreement": "off"}),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                make(*arguments, **names)
            found.append("no error")
        except (InputError, UserWarning) as error:
            found.append(str(error))
    full = torch.randn(1, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for each in (whole, turned, alone, line):
        sharding = ringattn.Sharding(24, each, "zigzag")
        part = sharding.split(full, 2)
        outputs.append(sharding.join(ringattn.attention(part, part, part, ringattn.Causal(), sharding=sharding), 2))
    return [*found, all(torch.allclose(x, outputs[0], atol=1e-6) for x in outputs)]


def test_the_whole_device_mesh_and_the_names_of_its_dimensions(gloo: Workers) -> None:
    for rank, found in enumerate(gloo.run(4, _of_torch)):
        row, column = divmod(rank, 2)
        both = {"data": 2, "ring": 2, "ulysses": 1}
        assert found[0] == ({"data": row, "ring": column, "ulysses": 0}, both)
        assert found[1] == ({"data": column, "ring": row, "ulysses": 0}, both)
        assert found[2] == ({"data": 0, "ring": column, "ulysses": 0}, {"data": 1, "ring": 2, "ulysses": 1})
        assert found[3] == ({"data": 0, "ring": rank, "ulysses": 0}, {"data": 1, "ring": 4, "ulysses": 1})
        for said, words in zip(
            found[4:12],
            (
                "is one dimension of a mesh that has 'dp' too",
                "ring must name the dimension",
                "'dp' of 2 ranks is not named",
                "has no dimension 'tp'; it has 'dp', 'cp'",
                "'cp' is named twice",
                "ring must name the dimension",
                "ring must name the dimension",
                "agreement must be",
            ),
            strict=True,
        ):
            assert words in said, said
        assert found[12]


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    """Starts as often as it is told to, with other arguments each time, and says what `init` said."""
    environment = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    while (given := pipe.recv()) is not None:
        try:
            mesh = ringattn.init(**{"transport": "gloo", "timeout": 20.0, **given})
            said = f"no error: {mesh.axes}"
        except ringattn.RingAttentionError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException:
            said = traceback.format_exc()
        pipe.send(said)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Callable[..., list[str]]]:
    """What `init` says on ranks that nothing has connected yet, when they start with these arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for rank in range(request.param):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, request.param, port, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)

    def start(*arguments: dict[str, Any]) -> list[str]:
        for pipe, given in zip(pipes, arguments, strict=False):
            pipe.send(given)
        return [pipe.recv() if pipe.poll(60) else "no answer" for pipe in pipes]

    yield start
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(10)
        process.kill()


def test_ranks_that_start_with_other_arguments_all_learn_who_and_which(ranks: Callable[..., list[str]]) -> None:
    for attempt in ("before they are connected", "over the group that is there"):
        started = time.monotonic()
        for arguments, words in (
            (({"ring": 1}, {"ring": 2}, {"ring": 2}), "ring (rank 0: 1; rank 1"),
            (({}, {"ring": 3}, {"ring": 3}), "ring (rank 0: None; rank 1"),
            (({"agreement": False}, {}, {}), "agreement (rank 0: False; rank 1"),
        ):
            said = ranks(*arguments)
            assert all(each.startswith("AgreementError: ") and words in each for each in said), (attempt, said)
        said = ranks({}, {"ring": "x"}, {})
        assert said[1].startswith("InputError: ring is a number of ranks"), (attempt, said)
        assert said[0].startswith("AgreementError: Rank 1 refused to start: InputError: ring is"), (attempt, said)
        assert time.monotonic() - started < 20, attempt
        said = ranks({"ring": 1}, {"ring": 1}, {"ring": 1})
        assert said == [f"no error: {{'data': {len(said)}, 'ring': 1, 'ulysses': 1}}"] * len(said), (attempt, said)


def _meet(store: Any, rank: int, world: int, ring: int, limit: float = 20.0) -> str:
    """What a meeting over this store says to a rank."""
    try:
        met = Meeting(store, rank, world, datetime.timedelta(seconds=limit)).agree({"ring": ring}, None, "here")
        met.store.set("after", "it")
    except ringattn.RingAttentionError as error:
        return f"{type(error).__name__}: {error}"
    return "met"


def test_a_rank_that_never_starts_is_named_by_those_that_did() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", "import ringattn; ringattn.init(transport='gloo', timeout=5)"],
            env={**os.environ, **told, "RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in started:
        said = process.communicate(timeout=90)[1].splitlines()
        assert said[-1] == "ringattn.errors.TransportError: Rank 2 did not start within 5 seconds."


def test_a_store_that_outlives_its_ranks_misleads_nobody() -> None:
    """torchrun keeps one store over restarts: of a world of other size, of meetings that never came about."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def together(world: int, rings: list[int], late: int, limit: float = 20.0) -> list[str]:
        clients = [TCPStore("127.0.0.1", store.port, wait_for_workers=False) for _ in rings]

        def start(rank: int) -> str:
            time.sleep(0.5 if rank == late else 0)
            return _meet(clients[rank], rank, world, rings[rank], limit)

        with ThreadPoolExecutor(len(rings)) as ranks:
            return list(ranks.map(start, range(len(rings))))

    for late in (0, 1):
        assert together(3, [1, 1, 1], late) == ["met"] * 3
        said = together(3, [1, 1], late, limit=1.0)  # a rank never comes
        assert said == ["TransportError: Rank 2 did not start within 1 seconds."] * 2
        store.set("ringattn/meeting", "ringattn/meeting/of-ranks-that-were-killed")
        store.set("ringattn/meeting/of-ranks-that-were-killed/1", '{"ring": "7"}')
        assert together(2, [1, 1], late) == ["met"] * 2
        assert all(each.startswith("AgreementError") for each in together(2, [1, 2], late))


def test_an_mpi_that_is_not_the_launchers() -> None:
    """Each process would be a world of its own, and train alone."""
    pytest.importorskip("mpi4py")
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [sys.executable, "-c", "import ringattn; ringattn.init(transport='mpi')"],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "InputError: environment started 2 ranks, and MPI knows of 1. Start with the mpirun of" in done.stderr


def test_gloo_under_an_mpirun_of_several_hosts_needs_to_be_told_where() -> None:
    told = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    limit = datetime.timedelta(seconds=1)
    with pytest.raises(InputError, match="where rank 0 is, and mpirun does not say: give all ranks MASTER_ADDR"):
        Meeting.found(Launch.found(told), "gloo", limit)
