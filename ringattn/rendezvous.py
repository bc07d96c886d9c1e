"""Which ranks a launcher started, read from the environment and from nothing else.

Precedence, first to last:

1. RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, where they are set: each wins over what
   any launcher says, and is never overwritten. torchrun, deepspeed and Kubeflow's PyTorchJob set them all.
2. What they leave open is filled in by the first of these that started the process: torchrun; deepspeed; mpirun, that
   of Open MPI before that of MPICH and Intel MPI; srun; a PyTorchJob; a JobSet's or another indexed Job; SkyPilot.
3. Nothing: one process.

RANK and WORLD_SIZE are one statement: where one of them is set, the launcher's word for the other is taken only if both
agree on the first. One task is no world: neither a shell of salloc, nor a batch script, nor ``srun -n 1``, nor a pod of
an indexed Job that is told no WORLD_SIZE. Anything half said is an error.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping

from ringattn.errors import InputError

Environment = Mapping[str, str]

WHO = ("RANK", "WORLD_SIZE")
WHERE = ("MASTER_ADDR", "MASTER_PORT")
NAMES = (*WHO, "LOCAL_RANK", "LOCAL_WORLD_SIZE", *WHERE)
LIMITS = {
    "RANK": (0, 1 << 31),
    "WORLD_SIZE": (1, 1 << 31),
    "LOCAL_RANK": (0, 1 << 31),
    "LOCAL_WORLD_SIZE": (1, 1 << 31),
    "MASTER_PORT": (0, 1 << 16),
}
PORT = "29500"  # torch's own default, where every job has hosts of its own
PORTS = range(10_000, 30_000)  # below those that systems hand out by themselves
START = "Start with torchrun, deepspeed, mpirun or srun, which set what is needed"


@dataclasses.dataclass(frozen=True)
class Launch:
    """This process among those that were started with it.

    Attributes:
        launcher: ``torchrun``, ``deepspeed``, ``mpirun``, ``srun``, ``pytorchjob``, ``jobset``, ``skypilot``,
            ``environment`` (the variables of 1. by themselves) or ``none``.
        reason: what in the environment says so, in words.
        rank, world: among all processes.
        local_rank, local_world: among those of this host.
        address, port: where rank 0, or the launcher's agent, is met; None where nobody says, as under an mpirun of
            several hosts.
        agent: the launcher's agent keeps a store there; otherwise rank 0 is to.
    """

    launcher: str
    reason: str
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str | None = None
    port: int | None = None
    agent: bool = False

    @property
    def started(self) -> bool:
        """Whether a launcher started this process."""
        return self.launcher != "none"

    @classmethod
    def found(cls, environment: Environment) -> Launch:
        """What the environment says, by the precedence above.

        Raises:
            InputError: it says a half of it, or contradicts itself.
        """
        own = {name: environment[name] for name in NAMES if environment.get(name)}
        launcher = next(filter(None, (find(environment) for find in LAUNCHERS)), None)
        if launcher is None and not {*WHO, *WHERE} & own.keys():
            return cls("none", _alone(environment))
        said = _settled(launcher or _Said("environment", "no launcher is recognised"), own)
        values = {**said.values, **own}
        _need_all(said, values)
        numbers = {name: _number(name, values[name], said) for name in LIMITS if name in values}
        if numbers["RANK"] >= numbers["WORLD_SIZE"]:
            raise InputError(
                f"RANK in the environment is below WORLD_SIZE, which is {numbers['WORLD_SIZE']}; "
                f"got {numbers['RANK']}. {START}."
            )
        return cls(
            said.launcher,
            said.why + (f"; taken as they are set: {', '.join(own)}" if own else ""),
            numbers["RANK"],
            numbers["WORLD_SIZE"],
            numbers.get("LOCAL_RANK", 0),
            numbers.get("LOCAL_WORLD_SIZE", 1),
            values.get("MASTER_ADDR"),
            numbers.get("MASTER_PORT"),
            agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


@dataclasses.dataclass(frozen=True)
class _Said:
    """What one launcher says.

    Attributes:
        values: texts by our names.
        sources: the launcher's own names of them.
    """

    launcher: str
    why: str
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _settled(said: _Said, own: Environment) -> _Said:
    """What the launcher says, unless what is set of RANK and WORLD_SIZE is of another world."""
    different = [name for name in WHO if name in own and own[name] != said.values.get(name, own[name])]
    if not different:
        return said
    if all(name in own for name in WHO):
        return _Said("environment", f"{said.why}, but RANK and WORLD_SIZE are set to others")
    name, other = different[0], next(each for each in WHO if each not in own)
    raise InputError(
        f"{name}={own[name]} is set, {other} is not, and {said.launcher} says "
        f"{said.sources.get(name, name)}={said.values[name]}. Set both, or unset {name}."
    )


def _need_all(said: _Said, values: Environment) -> None:
    needed = WHO if said.launcher == "mpirun" else (*WHO, *WHERE)
    missing = [said.sources.get(name, name) for name in needed if not values.get(name)]
    if missing:
        there = ", ".join(name for name in NAMES if values.get(name)) or said.launcher
        raise InputError(
            f"The environment says a half of how this process was started ({said.why}; {there} given): "
            f"{', '.join(missing)} is not set. {START}; or unset the others to run one process."
        )


def _number(name: str, text: str, said: _Said) -> int:
    least, below = LIMITS[name]
    if text.isdecimal() and text.isascii() and len(text) < 12 and least <= int(text) < below:
        return int(text)
    source = f" ({said.sources[name]})" if name in said.sources else ""
    raise InputError(f"{name}{source} in the environment is a number from {least} to below {below}; got {text!r}.")


def _torchrun(environment: Environment) -> _Said | None:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    return _Said("torchrun", "torchrun set TORCHELASTIC_RUN_ID")


def _deepspeed(environment: Environment) -> _Said | None:
    if not {"CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"} <= environment.keys():
        return None
    return _Said(
        "deepspeed", "deepspeed set CROSS_RANK and LOCAL_SIZE", *_read(environment, LOCAL_WORLD_SIZE="LOCAL_SIZE")
    )


def _open_mpi(environment: Environment) -> _Said | None:
    names = {"RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE"}
    names |= {"LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE"}
    if not {names["RANK"], names["WORLD_SIZE"]} & environment.keys():
        return None
    job = environment.get("PMIX_NAMESPACE", "")
    return _of_mpirun("Open MPI's mpirun set OMPI_COMM_WORLD_RANK", *_read(environment, **names), job)


def _hydra(environment: Environment) -> _Said | None:
    """MPICH and Intel MPI. srun sets PMI_RANK too, but none of the local names."""
    names = {"RANK": "PMI_RANK", "WORLD_SIZE": "PMI_SIZE"}
    names |= {"LOCAL_RANK": "MPI_LOCALRANKID", "LOCAL_WORLD_SIZE": "MPI_LOCALNRANKS"}
    task = environment.get("SLURM_PROCID", "no task")
    by_srun = "MPI_LOCALRANKID" not in environment and environment.get("PMI_RANK") == task
    if not {"PMI_RANK", "PMI_SIZE"} & environment.keys() or by_srun:
        return None
    return _of_mpirun("mpirun (MPICH's or Intel MPI's) set PMI_RANK", *_read(environment, **names), "")


def _of_mpirun(why: str, values: dict[str, str], sources: dict[str, str], job: str) -> _Said:
    """Mpirun does not say where rank 0 is: on one host that needs no saying."""
    here = {"MASTER_ADDR": "127.0.0.1"} if values.get("LOCAL_WORLD_SIZE") == values.get("WORLD_SIZE") else {}
    return _Said("mpirun", why, {**values, **here, "MASTER_PORT": _port(job) if job else PORT}, sources)


def _srun(environment: Environment) -> _Said | None:
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    values, sources = _read(environment, **names)
    tasks, node = _tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", "")), environment.get("SLURM_NODEID", "0")
    if node.isdecimal() and int(node) < len(tasks):
        values["LOCAL_WORLD_SIZE"] = tasks[int(node)]
    if nodes := environment.get("SLURM_STEP_NODELIST", ""):
        values["MASTER_ADDR"] = "127.0.0.1" if environment.get("SLURM_STEP_NUM_NODES") == "1" else first_host(nodes)
    values["MASTER_PORT"] = _port(f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}")
    sources["MASTER_ADDR"] = "SLURM_STEP_NODELIST"
    return _Said("srun", "srun set SLURM_STEP_NUM_TASKS to more than one", values, sources)


def _pytorchjob(environment: Environment) -> _Said | None:
    if not {"PET_NNODES", "PET_NODE_RANK", "PET_RDZV_ENDPOINT"} & environment.keys():
        return None
    each = environment.get("PET_NPROC_PER_NODE", "1")
    if each not in ("1", "auto", "cpu", "gpu") and "LOCAL_RANK" not in environment:
        raise InputError(
            f"The PyTorchJob asks for PET_NPROC_PER_NODE={each} processes in a pod, and LOCAL_RANK is not set: this is "
            f"the pod's only one. Let its command start torchrun, as launch/kubernetes.yaml does."
        )
    return _Said("pytorchjob", "Kubeflow's PyTorchJob set PET_NNODES")


def _jobset(environment: Environment) -> _Said | None:
    """Kubernetes sets the index alone: a pod's environment has to say that the pods of a Job are one world."""
    asked = environment.get("JOBSET_NAME") or environment.get("WORLD_SIZE")
    if "JOB_COMPLETION_INDEX" not in environment or not asked:
        return None
    values, sources = _read(environment, RANK="JOB_COMPLETION_INDEX")
    name, job = environment.get("JOBSET_NAME"), environment.get("REPLICATED_JOB_NAME")
    if name and job:
        values["MASTER_ADDR"] = f"{name}-{job}-0-0.{name}"
    return _Said("jobset", "Kubernetes set JOB_COMPLETION_INDEX", {**values, "MASTER_PORT": PORT}, sources)


def _skypilot(environment: Environment) -> _Said | None:
    if environment.get("SKYPILOT_NUM_NODES", "1") == "1" or all(name in environment for name in WHO):
        return None
    gpus = environment.get("SKYPILOT_NUM_GPUS_PER_NODE", "0")
    if gpus not in ("0", "1"):
        raise InputError(
            f"SkyPilot starts one process on a node, and SKYPILOT_NUM_GPUS_PER_NODE is {gpus}. Start torchrun in the "
            f"task's run section, as launch/skypilot.yaml does."
        )
    values, sources = _read(environment, RANK="SKYPILOT_NODE_RANK", WORLD_SIZE="SKYPILOT_NUM_NODES")
    if addresses := environment.get("SKYPILOT_NODE_IPS", "").split():
        values["MASTER_ADDR"] = addresses[0]
    values["MASTER_PORT"] = _port(environment.get("SKYPILOT_TASK_ID", ""))
    return _Said(
        "skypilot",
        "SkyPilot set SKYPILOT_NUM_NODES to more than one",
        values,
        {**sources, "MASTER_ADDR": "SKYPILOT_NODE_IPS"},
    )


LAUNCHERS: tuple[Callable[[Environment], _Said | None], ...] = (
    _torchrun, _deepspeed, _open_mpi, _hydra, _srun, _pytorchjob, _jobset, _skypilot,
)  # fmt: skip


def _alone(environment: Environment) -> str:
    """Why this is one process."""
    if "SLURM_JOB_ID" in environment:
        return "in a Slurm job, but no task of an srun of several: srun -n N starts a world"
    if "SKYPILOT_NUM_NODES" in environment:
        return "one node of SkyPilot, and no launcher started in it"
    if "JOB_COMPLETION_INDEX" in environment:
        return "a pod of an indexed Job that is told neither WORLD_SIZE nor JOBSET_NAME"
    return "no launcher's variables are set"


def _read(environment: Environment, **names: str) -> tuple[dict[str, str], dict[str, str]]:
    """What a launcher's own names hold, by ours; and the names."""
    return {ours: environment[own] for ours, own in names.items() if environment.get(own)}, names


def _port(job: str) -> str:
    """A port for everybody of this job and, most likely, of no other."""
    return str(PORTS[zlib.crc32(job.encode()) % len(PORTS)])


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes.

    >>> first_host("gpu[07-11,20],login1"), first_host("rack[2-3]n[0-7]-ib")
    ('gpu07', 'rack2n0-ib')
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else nodes)


def _tasks(text: str) -> list[str]:
    """Slurm's tasks of each node: 2(x3),1 is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d{1,6})\))?", text)
    return [tasks for tasks, times in found for _ in range(int(times or 1))]
