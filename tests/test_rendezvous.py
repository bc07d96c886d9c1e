"""The resolver of launchers: environments as each of them makes them, and halves of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.errors import InputError
from ringattn.rendezvous import NAMES, Launch, first_host

PLAIN = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29400"}
TORCHRUN = PLAIN | {
    "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "ROLE_RANK": "5",
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
DEEPSPEED = PLAIN | {"LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "1", "OMPI_UNIVERSE_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-head-4711@1", "PMIX_RANK": "3",
}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM_JOB = {
    "SLURM_JOB_ID": "1234", "SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_TASKS_PER_NODE": "2(x3)",
}  # fmt: skip
SRUN = SLURM_JOB | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.1.1",
}  # fmt: skip
SALLOC = SLURM_JOB | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "gpu07"}
PYTORCHJOB = {
    "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "2", "PET_NNODES": "4",
    "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
JOBSET = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "4", "JOBSET_NAME": "long", "REPLICATED_JOB_NAME": "ranks"}
SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_TASK_ID": "sky-2026-11-25-long_1",
}  # fmt: skip


def found(environment: Mapping[str, str]) -> tuple[Any, ...]:
    launch = Launch.found(environment)
    return (
        launch.launcher, launch.rank, launch.world, launch.local_rank, launch.local_world, launch.address, launch.port,
    )  # fmt: skip


CASES = {
    "torchrun": (TORCHRUN, ("torchrun", 5, 8, 1, 4, "10.0.0.7", 29400)),
    "torchrun in a task of srun": (SRUN | TORCHRUN, ("torchrun", 5, 8, 1, 4, "10.0.0.7", 29400)),
    "torchrun in a rank of mpirun": (HYDRA | TORCHRUN, ("torchrun", 5, 8, 1, 4, "10.0.0.7", 29400)),
    "torchrun in a pod of a PyTorchJob": (
        PYTORCHJOB | {"PET_NPROC_PER_NODE": "8"} | TORCHRUN,
        ("torchrun", 5, 8, 1, 4, "10.0.0.7", 29400),
    ),
    "torchrun on a node of SkyPilot": (
        SKYPILOT | {"SKYPILOT_NUM_GPUS_PER_NODE": "8"} | TORCHRUN,
        ("torchrun", 5, 8, 1, 4, "10.0.0.7", 29400),
    ),
    "deepspeed": (DEEPSPEED, ("deepspeed", 5, 8, 1, 4, "10.0.0.7", 29400)),
    "deepspeed with mpirun's variables around it": (HYDRA | DEEPSPEED, ("deepspeed", 5, 8, 1, 4, "10.0.0.7", 29400)),
    "Open MPI, two hosts": (OPEN_MPI, ("mpirun", 3, 4, 1, 2, None, 27200)),
    "Open MPI, the head given by -x": (
        OPEN_MPI | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"},
        ("mpirun", 3, 4, 1, 2, "head", 1234),
    ),
    "Open MPI on one host": (
        OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"},
        ("mpirun", 3, 4, 3, 4, "127.0.0.1", 27200),
    ),
    "MPICH and Intel MPI": (HYDRA, ("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500)),
    "mpirun -n 1": (
        HYDRA | {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
        ("mpirun", 0, 1, 0, 1, "127.0.0.1", 29500),
    ),
    "mpirun that started its proxies with srun": (SRUN | HYDRA, ("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500)),
    "srun": (SRUN, ("srun", 3, 6, 1, 2, "gpu07", 11262)),
    "srun --mpi=pmi2": (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "6"}, ("srun", 3, 6, 1, 2, "gpu07", 11262)),
    "srun over unequal nodes": (
        SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1(x3)", "SLURM_LOCALID": "0"},
        ("srun", 3, 6, 0, 1, "gpu07", 11262),
    ),
    "srun on one node": (
        SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0"},
        ("srun", 3, 6, 1, 6, "127.0.0.1", 11262),
    ),
    "srun, its head and port set": (
        SRUN | {"MASTER_ADDR": "gpu08", "MASTER_PORT": "1234"},
        ("srun", 3, 6, 1, 2, "gpu08", 1234),
    ),
    "a wrapper that says again what srun says": (
        SRUN | {"RANK": "3", "WORLD_SIZE": "6"},
        ("srun", 3, 6, 1, 2, "gpu07", 11262),
    ),
    "set ranks win over those of srun": (SRUN | PLAIN, ("environment", 5, 8, 0, 1, "10.0.0.7", 29400)),
    "a shell of salloc": (SALLOC, ("none", 0, 1, 0, 1, None, None)),
    "a batch script": (SLURM_JOB, ("none", 0, 1, 0, 1, None, None)),
    "PyTorchJob": (PYTORCHJOB, ("pytorchjob", 2, 4, 0, 1, "job-master-0", 23456)),
    "JobSet": (JOBSET, ("jobset", 2, 4, 0, 1, "long-ranks-0-0.long", 29500)),
    "an indexed Job of pods by themselves": ({"JOB_COMPLETION_INDEX": "2"}, ("none", 0, 1, 0, 1, None, None)),
    "SkyPilot": (SKYPILOT, ("skypilot", 1, 2, 0, 1, "10.0.0.1", 23437)),
    "SkyPilot, one node": (
        {**SKYPILOT, "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"},
        ("none", 0, 1, 0, 1, None, None),
    ),
    "by hand": (PLAIN, ("environment", 5, 8, 0, 1, "10.0.0.7", 29400)),
    "empty is not set": ({"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": ""}, ("none", 0, 1, 0, 1, None, None)),
    "nothing": ({"PATH": "/bin", "LOCAL_RANK": "0"}, ("none", 0, 1, 0, 1, None, None)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_launcher(name: str) -> None:
    environment, expected = CASES[name]
    before = dict(environment)
    assert found(environment) == expected
    assert environment == before
    launch = Launch.found(environment)
    assert launch.reason and launch.started == (launch.launcher != "none")
    assert launch.agent == ("TORCHELASTIC_RUN_ID" in environment)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, "RANK given.*: WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set. Start with torchrun"),
        ({"MASTER_ADDR": "x"}, "MASTER_ADDR given.*: RANK, WORLD_SIZE, MASTER_PORT is not set"),
        ({**PLAIN, "RANK": "8"}, "RANK in the environment is below WORLD_SIZE, which is 8; got 8"),
        ({**PLAIN, "WORLD_SIZE": "0"}, "WORLD_SIZE in the environment is a number from 1 to below .*; got '0'"),
        ({**PLAIN, "MASTER_PORT": "70000"}, "MASTER_PORT .*; got '70000'"),
        ({**PLAIN, "LOCAL_RANK": "-1"}, "LOCAL_RANK .*; got '-1'"),
        ({**PLAIN, "RANK": "²"}, "RANK .*; got '²'"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun set TORCHELASTIC_RUN_ID; torchrun given.*: RANK, WORLD_SIZE"),
        ({"PMI_RANK": "0"}, "PMI_SIZE is not set"),
        ({"PMI_SIZE": "4"}, "PMI_RANK is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not set"),
        ({**HYDRA, "PMI_RANK": "x"}, r"RANK \(PMI_RANK\) in the environment is a number .*; got 'x'"),
        ({**HYDRA, "RANK": "0"}, "RANK=0 is set, WORLD_SIZE is not, and mpirun says PMI_RANK=1. Set both, or unset"),
        ({**SRUN, "WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set, RANK is not, and srun says SLURM_STEP_NUM_TASKS=6"),
        ({**SRUN, "SLURM_PROCID": ""}, "SLURM_PROCID is not set"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
        ({**PYTORCHJOB, "PET_NPROC_PER_NODE": "8"}, "Let its command start torchrun"),
        ({"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "job-worker-0:23456"}, "RANK, WORLD_SIZE.* is not set"),
        ({"JOB_COMPLETION_INDEX": "1", "JOBSET_NAME": "long"}, "WORLD_SIZE, MASTER_ADDR is not set"),
        ({**SKYPILOT, "SKYPILOT_NUM_GPUS_PER_NODE": "8"}, "Start torchrun in the task's run section"),
        ({**SKYPILOT, "SKYPILOT_NODE_IPS": ""}, "SKYPILOT_NODE_IPS is not set"),
    ],
)
def test_what_is_half_said_is_refused(environment: Mapping[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Launch.found(environment)


@given(
    st.sampled_from([PLAIN, TORCHRUN, DEEPSPEED, OPEN_MPI, HYDRA, SRUN, PYTORCHJOB, JOBSET, SKYPILOT]).flatmap(
        lambda whole: st.tuples(
            st.just(whole), st.sets(st.sampled_from(sorted(whole))), st.sampled_from(["", "x", "-3", "999999999999"])
        )
    )
)
def test_halves_are_read_as_the_whole_or_refused(case: tuple[dict[str, str], set[str], str]) -> None:
    """Never another rank or world than that of the whole environment, except one process, and no other exception."""
    whole, gone, text = case
    expected = Launch.found(whole)
    for half in ({k: v for k, v in whole.items() if k not in gone}, {**whole, **dict.fromkeys(gone, text)}):
        try:
            launch = Launch.found(half)
        except InputError:
            continue
        if launch.started:
            assert (launch.rank, launch.world) == (expected.rank, expected.world)
        else:
            assert not any(half.get(name) for name in (*NAMES[:2], *NAMES[4:]))


@given(st.dictionaries(st.sampled_from([*NAMES, *{**TORCHRUN, **OPEN_MPI, **HYDRA, **SRUN, **SKYPILOT}]), st.text()))
def test_any_texts_are_a_launch_or_an_input_error(environment: dict[str, str]) -> None:
    with contextlib.suppress(InputError):
        assert Launch.found(environment).reason


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-4],m3", "n1"), ("n[003,7-9]-ib,b", "n003-ib"), ("r[1-2]n[00-15]", "r1n00")],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
