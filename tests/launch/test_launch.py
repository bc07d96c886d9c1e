"""The files of launch/: what a machine without their clusters can say of them, and a run of those it can start."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from ringattn.trainer.config import Config

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TOOLS = Path(sysconfig.get_path("scripts"))  # torchrun, shellcheck, mpirun
SHELL = sorted(
    path
    for folder in (LAUNCH, ROOT / "scripts")
    for path in folder.iterdir()
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
)
TRAINING = (
    *("--length", "64", "--steps", "2", "--eval-packs", "2", "--eval-every", "2"),
    *("--layers", "1", "--width", "16", "--heads", "2", "--kv-heads", "1"),
)


def checked(text: str, name: str) -> None:
    """Fails with shellcheck's words."""
    done = subprocess.run(
        [TOOLS / "shellcheck", "--shell", "bash", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{name}:\n{done.stdout}"


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    checked(path.read_text(), path.name)


# Names of fields, as the schemas of PyTorchJob kubeflow.org/v1, of Kubernetes' pods and of SkyPilot's tasks have them,
# as far as they are used here: a type, the fields of an object, or those of each item of a list. "*" is any name.
POD: dict[str, Any] = {
    "spec": {
        "containers": [
            {
                "name": str,
                "image": str,
                "workingDir": str,
                "command": [str],
                "args": [str],
                "resources": {"limits": {"*": int}},
                "volumeMounts": [{"name": str, "mountPath": str}],
            }
        ],
        "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": str}}],
    }
}
REPLICAS = {"replicas": int, "restartPolicy": ("Always", "OnFailure", "Never", "ExitCode"), "template": POD}
PYTORCHJOB = {
    "apiVersion": ("kubeflow.org/v1",),
    "kind": ("PyTorchJob",),
    "metadata": {"name": str},
    "spec": {
        "nprocPerNode": str,
        "runPolicy": {"cleanPodPolicy": ("Running", "All", "None")},
        "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": REPLICAS},
    },
}
SKYPILOT = {
    "name": str,
    "num_nodes": int,
    "resources": {"accelerators": str},
    "workdir": str,
    "envs": {"*": str},
    "setup": str,
    "run": str,
}


def fits(value: Any, schema: Any, at: str = "") -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict), at
        for name, inner in value.items():
            assert name in schema or "*" in schema, f"{at}: {name} is no field; there are {', '.join(schema)}"
            fits(inner, schema.get(name, schema.get("*")), f"{at}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), at
        for item in value:
            fits(item, schema[0], f"{at}[]")
    elif isinstance(schema, tuple):
        assert value in schema, at
    else:
        assert type(value) is schema, f"{at} is to be a {schema.__name__}; got {value!r}"


def document(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


def pods() -> list[Any]:
    """The templates of the job's pods, the master's first."""
    replicas = document("kubernetes.yaml")["spec"]["pytorchReplicaSpecs"]
    return [replicas[name]["template"] for name in ("Master", "Worker")]


def test_the_documents_fit_their_schemas() -> None:
    job, task = document("kubernetes.yaml"), document("skypilot.yaml")
    fits(job, PYTORCHJOB)
    fits(task, SKYPILOT)
    for pod in pods():
        (container,) = pod["spec"]["containers"]
        assert container["name"] == "pytorch"  # which the operator gives its variables to
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    with pytest.raises(AssertionError, match="is no field"):
        fits({"nodes": 2}, SKYPILOT)
    with pytest.raises(AssertionError, match="got '2'"):
        fits({"num_nodes": "2"}, SKYPILOT)


def test_the_options_they_give_are_those_of_the_trainer() -> None:
    container = document("kubernetes.yaml")["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][
        0
    ]
    words = [*container["args"], *document("skypilot.yaml")["envs"]["OPTIONS"].split()]
    for path in SHELL:
        for line in path.read_text().splitlines() if path.parent == LAUNCH else ():
            if line.startswith("#     ") and f"launch/{path.name} " in line:
                words += line.partition(f"launch/{path.name}")[2].split()
    known = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config)}
    options = {word for word in words if word.startswith("--")}
    assert options and options <= known


def train(line: list[str | Path], folder: Path, **environment: str) -> list[float]:
    """The losses of a small run of the trainer on two ranks that this line starts."""
    texts = folder / "texts"
    texts.mkdir()
    (texts / "text.txt").write_text("".join(f"line {i}\n" for i in range(200)))
    options = [*TRAINING, "--data", str(texts), "--folder", str(folder / "run")]
    path = {"PATH": f"{TOOLS}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, *options] if "OPTIONS" not in environment else line,
        cwd=ROOT,
        env={**os.environ, **path, **environment, "OPTIONS": " ".join(options)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on " in done.stdout
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Those of torchrun; every launcher's are the same."""
    found = train([LAUNCH / "torchrun.sh"], tmp_path_factory.mktemp("torchrun"), RANKS="2")
    assert len(found) == 2
    return pytest.approx(found, rel=1e-6)


@pytest.mark.skipif(shutil.which("mpirun", path=TOOLS) is None, reason="mpirun is not installed")
def test_mpirun(tmp_path: Path, losses: Any) -> None:
    assert train([LAUNCH / "mpirun.sh"], tmp_path, RANKS="2") == losses


@pytest.mark.skipif(shutil.which("mpirun", path=TOOLS) is None, reason="mpirun is not installed")
def test_mpirun_saves_and_goes_on(tmp_path: Path, losses: Any) -> None:
    first, then = tmp_path / "first", tmp_path / "then"
    first.mkdir()
    then.mkdir()
    assert train([LAUNCH / "mpirun.sh", "--save-every", "1"], first, RANKS="2") == losses
    source = first / "run" / "checkpoints" / "step-00000001"
    found = train([LAUNCH / "mpirun.sh", "--resume", str(source)], then, RANKS="2")
    assert found == pytest.approx(losses.expected[1:], rel=1e-6)


@pytest.mark.skipif(shutil.which("mpirun", path=TOOLS) is None, reason="mpirun is not installed")
def test_wrappers_under_mpirun_talk_over_gloo(tmp_path: Path, losses: Any) -> None:
    assert train([LAUNCH / "mpirun.sh", "--wrap", "ddp"], tmp_path, RANKS="2") == losses


OPEN_MPI = shutil.which("mpirun.openmpi")
OPEN_MPI_LIBRARY = next(Path("/usr/lib").glob("*/libmpi.so.40"), None)


@pytest.mark.skipif(
    not (OPEN_MPI and OPEN_MPI_LIBRARY), reason="Open MPI is not installed: apt-get install openmpi-bin"
)
def test_open_mpi(tmp_path: Path, losses: Any) -> None:
    """mpi4py's wheel takes Debian's library by its path; that root and few cores are meant, Open MPI must be told."""
    asked = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    asked |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "MPI4PY_LIBMPI": str(OPEN_MPI_LIBRARY)}
    assert train([LAUNCH / "mpirun.sh"], tmp_path, RANKS="2", MPIRUN=str(OPEN_MPI), **asked) == losses


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (
            "HYDRA build details:",
            "-n 16 -genv OMP_NUM_THREADS 3 -f HOSTS -ppn 8 -genv MASTER_ADDR machine0 -genv MASTER_PORT 29500 python",
        ),
        (
            "mpirun.openmpi (OpenRTE) 4.1.4",
            "-n 16 -x OMP_NUM_THREADS=3 --bind-to none --hostfile HOSTS --map-by ppr:8:node -x MASTER_ADDR=machine0 "
            "-x MASTER_PORT=29500 python",
        ),
        ("mpirun (Open MPI) 5.0.5", "-n 16 -x OMP_NUM_THREADS=3 --bind-to none --hostfile HOSTS --map-by"),
    ],
)
@pytest.mark.parametrize("listed", ["machine0\nmachine1\n", "# ours\n\nmachine0:8\nmachine1:8\n", "machine0 slots=8\n"])
def test_each_mpirun_gets_options_of_its_own(tmp_path: Path, version: str, expected: str, listed: str) -> None:
    mpirun, hosts = tmp_path / "mpirun", tmp_path / "hosts"
    hosts.write_text(listed)
    mpirun.write_text(f'#!/usr/bin/env bash\n[ "$1" = --version ] && echo "{version}" || printf "%s " "$@"\n')
    mpirun.chmod(0o755)
    settings = {"MPIRUN": str(mpirun), "RANKS": "16", "EACH": "8", "HOSTS": str(hosts), "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [LAUNCH / "mpirun.sh", "--length", "64"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.replace(str(hosts), "HOSTS").startswith(expected)
    assert done.stdout.endswith("launch/train.py --length 64 ")


def test_the_command_of_a_pod(tmp_path: Path, losses: Any) -> None:
    """As the operator would start the only pod of a job of two processes."""
    container = document("kubernetes.yaml")["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][
        0
    ]
    told = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", "WORLD_SIZE": "2", "RANK": "0"}
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": "23456", "PET_MASTER_ADDR": "localhost"}
    assert train(container["command"], tmp_path, PET_MASTER_PORT="23456", **told, **where) == losses


def test_the_task_of_skypilot(tmp_path: Path, losses: Any) -> None:
    task = document("skypilot.yaml")
    checked(task["run"], "run")
    told = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1"}
    line: list[str | Path] = ["bash", "-c", task["run"]]
    assert train(line, tmp_path, OPTIONS="", SKYPILOT_NUM_GPUS_PER_NODE="2", **told) == losses


HAS_SLURM = os.geteuid() == 0 and all(
    shutil.which(name, path="/usr/bin:/usr/sbin") for name in ("munged", "slurmd", "slurmctld", "sbatch")
)


@pytest.mark.skipif(not HAS_SLURM, reason="Slurm's daemons need root, and apt-get install slurm-wlm munge")
def test_slurm(tmp_path: Path, losses: Any) -> None:
    """The batch script in a cluster of this machine alone, its GPU line left out as it says."""
    script, output = tmp_path / "slurm.sbatch", tmp_path / "output"
    text = (LAUNCH / "slurm.sbatch").read_text()
    script.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("#SBATCH --gpus")))
    small = ["--nodes", "1", "--ntasks-per-node", "2", "--cpus-per-task", "1", "--output", str(output)]
    shown = f'sbatch --wait "$@" || failed=1; cat {output}; exit "${{failed:-0}}"'
    line: list[str | Path] = [ROOT / "scripts" / "slurm", "bash", "-c", shown, "sbatch", *small, script]
    assert train(line, tmp_path, PYTHON=sys.executable) == losses
