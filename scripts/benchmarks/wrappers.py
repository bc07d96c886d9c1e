"""Every wrapper against one process: losses, and how far SGD moves every parameter, on the same tokens.

Prints a Markdown table of the largest relative differences after a few steps with clipping, over gradients that are
accumulated or not and shards that are even, uneven or without labels; then the configurations that add up gradients of
some ranks only, each with what measures it. Exit code 1 where a difference is larger than it may be.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

import ringattn
from ringattn.errors import UnsupportedError
from ringattn.trainer.model import Decoder, Shape
from ringattn.training import Batch, accumulate, clip_grad_norm, gradient_factor, sum_gradients, token_loss, total
from scripts.benchmarks.teams import Team, Worker

ALLOWED = 1e-5
MESHES = ((1, 2, 1), (2, 1, 1), (2, 2, 1), (1, 3, 1), (1, 4, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2))
SHARDS = ("even", "uneven", "one without labels")
ACCUMULATIONS = (1, 3)
SHAPE = Shape(layers=2, width=32, heads=4, kv_heads=2)
RATE, CLIP = 32.0, 0.125
WEIGHTS = (1.0, 0.03, 1.0, 0.03, 1.0)  # of the loss at each step: some gradients are clipped and some are not. A wrong
# scale shows only where they are not, a wrong norm only where they are.
LENGTHS = {"even": 48, "uneven": 53, "one without labels": 48}


@dataclasses.dataclass(frozen=True)
class Case:
    """One training of a few steps."""

    wrapper: str
    data: int
    ring: int
    accumulation: int
    shards: str
    ulysses: int = 1

    @property
    def mesh(self) -> tuple[int, int, int]:
        return self.data, self.ring, self.ulysses

    @property
    def sequence(self) -> int:
        """Ranks that share one."""
        return self.ring * self.ulysses


@dataclasses.dataclass
class Trace:
    """What a training did: its losses, and by how much each parameter moved."""

    losses: list[float]
    movement: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest relative differences of two traces."""

    loss: float
    movement: float
    parameter: str

    @property
    def largest(self) -> float:
        return max(self.loss, self.movement)


def difference(found: Trace, expected: Trace) -> Difference:
    """Relative to each loss, and to the norm of each parameter's movement."""
    losses = [abs(a - b) / abs(b) for a, b in zip(found.losses, expected.losses, strict=True)]
    moved = {
        name: float((found.movement[name].double() - there.double()).norm() / there.double().norm())
        for name, there in expected.movement.items()
    }
    worst = max(moved, key=lambda name: moved[name])
    return Difference(max(losses), moved[worst], worst)


def layout_of(case: Case) -> ringattn.Layout:
    """Contiguous shards of one length; or of which rank 0 has half the tokens."""
    length = LENGTHS[case.shards]
    if case.shards != "uneven" or case.sequence == 1:
        return ringattn.Contiguous()
    cuts = [0, length // 2, *(length // 2 + 1 + i * 5 for i in range(case.sequence - 2)), length]
    return ringattn.Explicit([[run] for run in itertools.pairwise(cuts)])


def start() -> Decoder:
    """A model that moves far: weights near 1 are rounded by 6e-8 at each step, which the movement must dwarf."""
    model = Decoder(SHAPE, seed=0)
    with torch.no_grad():
        model.head.weight.mul_(10)
    return model


def samples(case: Case, step: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Tokens and labels [1, S] of each replica, of each batch that it accumulates."""
    generator = torch.Generator().manual_seed(step)
    length = LENGTHS[case.shards]
    dealt = []
    for replica, turn in itertools.product(range(case.data), range(case.accumulation)):
        tokens = torch.randint(256, (1, length), generator=generator)
        labels = tokens.clone()
        labels[0, : 5 * turn + 1] = -100  # so that batches differ in their number of labels
        if case.shards == "one without labels" and replica == 0:
            labels[0, length - length // case.sequence + 1 :] = -100  # of the last shard; labels are shifted by one
            if case.sequence == 1:
                labels[:] = -100
        dealt.append((tokens, labels))
    return [dealt[i * case.accumulation :][: case.accumulation] for i in range(case.data)]


def one_process(case: Case) -> Trace:
    """Plain PyTorch on all tokens."""
    model = start()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    attend = functools.partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    losses = []
    for step, weight in enumerate(WEIGHTS):
        dealt = list(itertools.chain(*samples(case, step)))
        count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in dealt)
        loss = 0.0
        for tokens, labels in dealt:
            logits = model(tokens, torch.arange(tokens.shape[1]), attend)[0, :-1]
            share = functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / count
            (weight * share).backward()
            loss += float(share.detach())
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert (norm > CLIP) == (weight == 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return Trace(losses, {name: after.detach() - before[name] for name, after in model.named_parameters()})


def logits_of(model: Any, batch: Batch) -> Tensor:
    """By `Ulysses` where the mesh has an axis for it, and otherwise as ``auto`` has it."""
    schedule = "ulysses" if batch.sharding.mesh.ulysses > 1 else "auto"
    logits: Tensor = model(batch.tokens, batch.positions, functools.partial(batch.attend, schedule=schedule))
    return logits


Step = Callable[[list[Batch], float], Tensor]
"""One optimizer step on the loss times a weight; returns this rank's share of the loss."""


def torch_loop(wrapped: nn.Module, factor: float, mesh: ringattn.Mesh | None = None) -> Step:
    """The loop of plain PyTorch and its wrappers. With a mesh, gradients are summed here."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=RATE)

    def step(batches: list[Batch], weight: float) -> Tensor:
        loss = torch.zeros(())
        for batch in batches:
            share = token_loss(logits_of(wrapped, batch), batch)
            (weight * share / factor).backward()
            loss += share.detach()
        if mesh is not None:
            sum_gradients(wrapped, mesh)
        clip_grad_norm(wrapped, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def plain(model: nn.Module, mesh: ringattn.Mesh, _: Case) -> Step:
    return torch_loop(model, 1.0, mesh)


def ddp(model: nn.Module, mesh: ringattn.Mesh, _: Case) -> Step:
    def wrap(module: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(module, process_group=mesh.device_mesh(flat=True).get_group())

    return torch_loop(wrap(model), measured(wrap, mesh))


def fsdp2(model: nn.Module, mesh: ringattn.Mesh, _: Case, *, flat: bool) -> Step:
    from torch.distributed.fsdp import fully_shard

    devices = mesh.device_mesh(flat=True) if flat else of_replicas(mesh)

    def wrap(module: nn.Module) -> nn.Module:
        for block in getattr(module, "blocks", ()):
            fully_shard(block, mesh=devices)
        fully_shard(module, mesh=devices)
        return module

    return torch_loop(wrap(model), measured(wrap, mesh))


def of_replicas(mesh: ringattn.Mesh) -> DeviceMesh:
    """The replicas, and all ranks of a sequence on one dimension."""
    devices = mesh.device_mesh()
    if mesh.ulysses == 1:
        return devices["data", "ring"]
    devices["ring", "ulysses"]._flatten("sequence")
    return devices["data", "sequence"]


def measured(wrap: Callable[[nn.Module], nn.Module], mesh: ringattn.Mesh) -> float:
    kept = []  # a wrapper must outlive the backward pass

    def step(probe: nn.Module, x: Tensor) -> None:
        kept.append(wrap(probe))
        kept[0](x).backward()

    return gradient_factor(step, mesh)


def zero(model: nn.Module, mesh: ringattn.Mesh, case: Case, *, stage: int) -> Step:
    from ringattn.integrations.deepspeed import initialize

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, factor = initialize(model, mesh, config, optimizer=torch.optim.SGD(model.parameters(), lr=RATE))

    def step(batches: list[Batch], weight: float) -> Tensor:
        loss = torch.zeros(())
        for batch in batches:
            share = token_loss(logits_of(engine, batch), batch)
            engine.backward(weight * share / factor)
            engine.step()
            loss += share.detach()
        return loss

    return step


WRAPPERS: dict[str, Callable[[nn.Module, ringattn.Mesh, Case], Step]] = {
    "plain": plain,
    "DDP": ddp,
    "FSDP2, flat": functools.partial(fsdp2, flat=True),
    "FSDP2, HSDP": functools.partial(fsdp2, flat=False),
    **{f"ZeRO {stage}": functools.partial(zero, stage=stage) for stage in range(4)},
}


def train(worker: Worker, case: Case) -> Trace | None:
    """The same on the ranks of the case's mesh; the trace on rank 0."""
    if worker.rank >= math.prod(case.mesh):
        return None
    mesh: ringattn.Mesh = worker.kept["mesh"]
    model = start()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    step = WRAPPERS[case.wrapper](model, mesh, case)
    losses = []
    for turn, weight in enumerate(WEIGHTS):
        own = samples(case, turn)[mesh.coordinates["data"]]
        batches = [Batch(tokens, mesh, labels=labels, layout=layout_of(case)) for tokens, labels in own]
        losses.append(float(total(step(accumulate(batches), weight), mesh)))
    after = {name: whole(weight) for name, weight in model.named_parameters()}
    return Trace(losses, {name: after[name] - before[name] for name in before}) if worker.rank == 0 else None


def whole(weight: nn.Parameter) -> Tensor:
    """A parameter that wrappers may have cut; all ranks ask for it."""
    if hasattr(weight, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor = safe_get_full_fp32_param(weight)
        return found.detach().clone()
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()


def regroup(worker: Worker, sizes: tuple[int, int, int], folder: str) -> None:
    """The first ranks become a world of their own, with nothing left of the one before."""
    size, (_, ring, ulysses) = math.prod(sizes), sizes
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()  # which forgets DeepSpeed's own groups too, but not that it had started
        vars(comm)["cdb"] = None
    if dist.is_initialized():
        dist.destroy_process_group()
    if worker.rank < size:
        store = FileStore(str(Path(folder) / "x".join(map(str, sizes))), size)
        dist.init_process_group("gloo", store=store, rank=worker.rank, world_size=size)
        worker.kept["mesh"] = ringattn.init(ring, ulysses)


def quiet(_: Worker) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def partial_sums(worker: Worker) -> dict[str, str]:
    """Configurations that look right and are not, on two replicas of two ranks, and what is said of each."""
    mesh: ringattn.Mesh = worker.kept["mesh"]
    if mesh.axes != {"data": 2, "ring": 2, "ulysses": 1}:
        return {}
    zero(nn.Linear(1, 1), mesh, Case("", 2, 2, 1, "even"), stage=0)  # DeepSpeed has started, as it does with a mesh
    said = {}
    for name, step in configurations(mesh):
        try:
            said[name] = f"not refused: factor {gradient_factor(step, mesh):g}"
        except UnsupportedError as error:
            said[name] = str(error).partition(". ")[2].partition(": these are")[0]
    forget()
    return said


def forget() -> None:
    """DeepSpeed keeps, in the process, what an engine was told of the sequence: none after it may find it."""
    from deepspeed.utils import groups

    groups.mpu, groups.mesh_device = None, None


def configurations(mesh: ringattn.Mesh) -> Iterator[tuple[str, Callable[[nn.Module, Tensor], object]]]:
    from torch.distributed.fsdp import fully_shard

    devices = mesh.device_mesh()
    kept: list[nn.Module] = []

    def ddp_on(group: Any, probe: nn.Module, x: Tensor) -> None:
        kept.append(nn.parallel.DistributedDataParallel(probe, process_group=group))
        kept[-1](x).backward()

    def fsdp_on(devices: Any, probe: nn.Module, x: Tensor) -> None:
        fully_shard(probe, mesh=devices)
        probe(x).backward()

    yield "DDP over the replicas", functools.partial(ddp_on, mesh.data_group)
    yield "DDP over the ring", functools.partial(ddp_on, devices.get_group("ring"))
    yield "FSDP2 over the replicas", functools.partial(fsdp_on, devices["data"])
    yield "FSDP2 over the ring", functools.partial(fsdp_on, devices["ring"])
    for stage in range(4):
        own: dict[str, Any] = {"sequence_parallel_size": 2, "data_parallel_size": 2}
        yield f"ZeRO {stage}, sizes of sequences and replicas in its config", with_deepspeed(stage, own)
        yield f"ZeRO {stage}, mesh_param=(2, 2)", with_deepspeed(stage, {}, mesh_param=(2, 2))
        yield f"ZeRO {stage}, an mpu with sequence-data groups", with_deepspeed(stage, {}, mpu=SequenceGroups(mesh))


def with_deepspeed(stage: int, own: dict[str, Any], **options: Any) -> Callable[[nn.Module, Tensor], None]:
    """`deepspeed.initialize` itself, told of the sequence as its documentation has it."""

    def step(probe: nn.Module, x: Tensor) -> None:
        import deepspeed

        forget()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.SGD(probe.parameters(), lr=0.0)
        engine, *_ = deepspeed.initialize(model=probe, optimizer=optimizer, config=config | own, **options)
        engine.backward(engine(x))

    return step


class SequenceGroups:
    """An mpu as DeepSpeed-Ulysses takes it."""

    def __init__(self, mesh: ringattn.Mesh) -> None:
        devices = mesh.device_mesh()
        self._groups = {"data": mesh.data_group, "sequence": devices.get_group("ring")}
        self._groups["sequence_data"] = mesh.device_mesh(flat=True).get_group()
        self._groups["model"] = devices.get_group("ulysses")

    def __getattr__(self, name: str) -> Callable[[], Any]:
        kind, _, what = name.removeprefix("get_").partition("_parallel_")
        if not name.startswith("get_") or kind not in self._groups:
            raise AttributeError(name)
        group = self._groups[kind]
        answers: dict[str, Callable[[], Any]] = {
            "group": lambda: group,
            "rank": lambda: dist.get_rank(group),
            "world_size": lambda: dist.get_world_size(group),
        }
        return answers[what]


def cell(found: Sequence[Difference]) -> str:
    return f"{max(d.loss for d in found):.1e} / {max(d.movement for d in found):.1e}"


def table(
    results: dict[Case, Difference], wrappers: Sequence[str], meshes: Sequence[tuple[int, int, int]]
) -> Iterator[str]:
    yield "| " + " | ".join(["(data, ring, ulysses)", *map(str, meshes)]) + " |"
    yield "|---" * (len(meshes) + 1) + "|"
    for wrapper in wrappers:
        cells = [
            cell([d for case, d in results.items() if (case.wrapper, case.mesh) == (wrapper, mesh)]) for mesh in meshes
        ]
        yield "| " + " | ".join([wrapper, *cells]) + " |"


def mesh_of(text: str) -> tuple[int, int, int]:
    data, ring, ulysses = map(int, f"{text}x1".split("x")[:3])
    return data, ring, ulysses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mesh", type=mesh_of, nargs="+", default=list(MESHES), help="data x ring x ulysses, as 2x2 or 1x2x2"
    )
    parser.add_argument("--wrapper", nargs="+", choices=WRAPPERS, default=list(WRAPPERS))
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the ranks have
    started = time.perf_counter()
    results: dict[Case, Difference] = {}
    said: dict[str, str] = {}
    kinds = list(itertools.product(ACCUMULATIONS, SHARDS))
    largest = max(map(math.prod, options.mesh))
    with Team(largest) as team, tempfile.TemporaryDirectory(prefix="ringattn-wrappers-") as folder:
        team.call(quiet)
        if largest >= 4 and any(wrapper.startswith("ZeRO") for wrapper in options.wrapper):
            team.call(regroup, (2, 2, 1), tempfile.mkdtemp(dir=folder))
            said = team.call(partial_sums)[0]
        # The largest first: DeepSpeed counts modules in each process, and compares the counts of its ranks.
        for mesh in sorted(options.mesh, key=math.prod, reverse=True):
            data, ring, ulysses = mesh
            team.call(regroup, mesh, folder)
            for accumulation, shards in kinds:
                expected = one_process(Case("", data, ring, accumulation, shards, ulysses))
                for wrapper in options.wrapper:
                    case = Case(wrapper, data, ring, accumulation, shards, ulysses)
                    (found, *_) = team.call(train, case)
                    assert found is not None
                    results[case] = difference(found, expected)
    print("\n".join(table(results, options.wrapper, options.mesh)))
    worst = max(results, key=lambda case: results[case].largest)
    print(
        f"\nLargest relative differences of the losses / of a parameter's movement over {len(WEIGHTS)} SGD steps, of "
        f"which three are clipped, of {len(kinds)} trainings each: accumulation {', '.join(map(str, ACCUMULATIONS))}; "
        "shards "
        f"{', '.join(SHARDS)}. The largest, {results[worst].largest:.1e}, is of {worst.wrapper} on "
        f"{worst.mesh}, accumulation {worst.accumulation}, shards {worst.shards}: "
        f"{results[worst].parameter}. {time.perf_counter() - started:.0f} s."
    )
    for name, text in said.items():
        print(f"- {name}: {text}")
    return int(results[worst].largest > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
