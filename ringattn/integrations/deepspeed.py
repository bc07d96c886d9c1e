"""DeepSpeed on a mesh: its engine for ZeRO 0 to 3, with the factor of its gradients; and its `DistributedAttention`.

To DeepSpeed, all ranks of the mesh are data-parallel ranks. It needs no mpu, no mesh and no word of the sequence:
gradients of all ranks are averaged, optimizer states and weights cut over all of them. What it offers beside that adds
up gradients of replicas alone at one stage or another (measured with 0.19.8, `scripts/bench wrappers`): ``mesh_param``,
and the sizes of sequences and replicas in its config, at stages 0 to 2; an mpu with groups of both at 3.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringattn.checking import instance, integer, shown
from ringattn.errors import InputError, MissingDependencyError, UnsupportedError
from ringattn.integrations.distributed_attention import DistributedAttention
from ringattn.mesh import Mesh
from ringattn.training.gradients import gradient_factor

__all__ = ["DistributedAttention", "initialize"]

PARTIAL = "with it DeepSpeed adds up the gradients of some ranks only, which are partial sums. Leave it out: "
REFUSED_KEYS = {
    "sequence_parallel_size": f"{PARTIAL}the mesh says which ranks share a sequence.",
    "data_parallel_size": f"{PARTIAL}the mesh says which ranks are replicas.",
    "tensor_parallel": "the ranks of a mesh hold no parts of a layer. Leave it out.",
    "managed_gradient_accumulation": "gradients are then added up in engine.step() alone, where they cannot be "
    "measured. Leave it out, and set gradient_accumulation_steps.",
}
HARMLESS = {"managed_gradient_accumulation": True}  # DeepSpeed's own default
REFUSED_OPTIONS = {
    "mpu": f"{PARTIAL}all ranks of the mesh are data-parallel ranks to DeepSpeed.",
    "mesh_param": f"{PARTIAL}all ranks of the mesh are data-parallel ranks to DeepSpeed.",
    "training_data": "it would deal other samples to each rank of a sequence. Use ringattn.training.Loader.",
}
NOT_PROBED = (  # keys of optimizers, and of what writes files
    *("optimizer", "scheduler", "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"),
    *("autotuning", "comet", "comms_logger", "csv_monitor", "dump_state", "flops_profiler", "tensorboard", "wandb"),
)
BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def initialize(
    model: nn.Module, mesh: Mesh, config: Mapping[str, Any] | str | Path, **options: Any
) -> tuple[Any, float]:
    """`deepspeed.initialize` for a model whose sequences are sharded over the mesh, and the factor of its gradients.

    Divide the loss by the factor: then what DeepSpeed clips, reports and steps on is the gradient of the whole batch.
    The factor, measured here on a module of one parameter, includes the division by ``gradient_accumulation_steps``.

        engine, factor = initialize(model, mesh, config, optimizer=optimizer)
        for batches in steps:  # as many as gradient_accumulation_steps
            for batch in accumulate(batches):
                loss = token_loss(engine(batch.tokens), batch)
                engine.backward(loss / factor)
                engine.step()

    Args:
        model: on one process as on many; its attention is `ringattn.attention`.
        mesh: all ranks of the world.
        config: DeepSpeed's, or its file. ``train_batch_size`` counts sequences: that of a rank, times the accumulation
            steps, times the replicas, and not times the ranks that share a sequence. (What the engine itself reports,
            ``engine.train_batch_size()`` and samples per second, counts every rank as a replica.) Without
            ``gradient_clipping`` DeepSpeed clips at 1.
        options: other arguments of `deepspeed.initialize`, such as ``optimizer``, ``lr_scheduler``,
            ``model_parameters``.

    Returns:
        DeepSpeed's engine and the factor. ``engine.optimizer`` and ``engine.lr_scheduler`` are the rest of what
        `deepspeed.initialize` returns; ``engine.save_checkpoint`` and ``load_checkpoint`` are DeepSpeed's own.

    Raises:
        InputError: the mesh is not the world's, or batch sizes do not fit together.
        UnsupportedError: a key or an option with which gradients are partial sums, or whatever else makes them so.
        MissingDependencyError: DeepSpeed is not installed.
    """
    settings = _settings(config, instance(mesh, Mesh, "mesh", "a ringattn.Mesh, as ringattn.init() returns"), options)
    _check_world(mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_deprecations())
        with _without_logs():
            deepspeed = _deepspeed(mesh)
            stack.enter_context(_without_shared_memory_op(deepspeed))
            _set_local_rank()
            factor = gradient_factor(functools.partial(_probe, deepspeed, settings), mesh)
        engine, *_ = deepspeed.initialize(model=model, config=settings, **options)
    return engine, factor


def _probe(deepspeed: Any, settings: dict[str, Any], probe: nn.Module, x: Tensor) -> None:
    """The passes of one optimizer step, with the share of one of them; of gradients that are only read."""
    probed = {name: value for name, value in settings.items() if name not in NOT_PROBED}
    probed |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if "fp16" in probed:
        probed["fp16"] = {**probed["fp16"], "loss_scale": 1}  # which is not part of the factor: the engine undoes it
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=probe, optimizer=optimizer, config=probed)
    for i in reversed(range(engine.gradient_accumulation_steps())):
        engine.backward(engine(x if i == 0 else x * 0))
        if i:
            engine.step()


def _settings(config: Mapping[str, Any] | str | Path, mesh: Mesh, options: Mapping[str, Any]) -> dict[str, Any]:
    """The config as DeepSpeed shall have it, checked."""
    for name, reason in REFUSED_OPTIONS.items():
        if options.get(name) is not None:
            raise UnsupportedError(f"deepspeed.initialize({name}=...) is not for a ringattn mesh: {reason}")
    settings = dict(config) if isinstance(config, Mapping) else _read(config)
    for name, reason in REFUSED_KEYS.items():
        if settings.get(name) not in (None, HARMLESS.get(name)):
            raise UnsupportedError(f"DeepSpeed's config key {name!r} is not for a ringattn mesh: {reason}")
    if options.get("optimizer") is None and "optimizer" not in settings:
        raise InputError("DeepSpeed trains with an optimizer: pass optimizer=..., or name one in its config.")
    return _batch_sizes(settings, mesh)


def _read(path: str | Path) -> dict[str, Any]:
    if not isinstance(path, (str, Path)):
        raise InputError(f"config is a dictionary as DeepSpeed takes it, or the path of its file; got {shown(path)}.")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"DeepSpeed's config cannot be read from {path}: {error}") from error
    return instance(found, dict, f"The content of {path}", "one JSON object")


def _batch_sizes(settings: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The settings with the sizes that a rank needs; DeepSpeed would take ranks of one sequence for replicas."""
    given = {name: settings.pop(name) for name in BATCH_SIZES if settings.get(name) is not None}
    sizes = {name: integer(value, f"DeepSpeed's {name}", least=1) for name, value in given.items()}
    whole, micro, steps = (sizes.get(name) for name in BATCH_SIZES)
    if micro is None:
        micro = 1 if whole is None else whole // (mesh.data * (steps or 1))
    if steps is None:
        steps = 1 if whole is None else whole // (mesh.data * micro or 1)
    if whole is not None and whole != micro * steps * mesh.data:
        raise InputError(
            f"train_batch_size must be train_micro_batch_size_per_gpu * gradient_accumulation_steps * replicas, here "
            f"{micro} * {steps} * {mesh.data}; got {whole}. The ranks of one sequence train on the same samples."
        )
    return settings | dict(zip(BATCH_SIZES[1:], (micro, steps), strict=True))


def _check_world(mesh: Mesh) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 0
    if world != mesh.size:
        raise InputError(
            f"DeepSpeed's engines meet over all ranks of torch.distributed, of which there are {world or 'none'}; this "
            f"mesh has {mesh.size}. Use the mesh of ringattn.init() under a launcher, as torchrun --nproc-per-node 2."
        )


def _deepspeed(mesh: Mesh) -> Any:
    """The module, on the mesh's kind of device."""
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise MissingDependencyError(
            f"ringattn.integrations.deepspeed needs DeepSpeed ({error}): pip install 'ringattn[deepspeed]'."
        ) from error
    theirs, ours = get_accelerator().device_name(), mesh.connected().device.type
    if theirs != ours:
        raise InputError(
            f"DeepSpeed runs on {theirs}, the mesh's transport on {ours}. Use ringattn.init(transport='nccl') on GPUs; "
            f"or start with DS_ACCELERATOR={ours} in the environment."
        )
    return deepspeed


def _set_local_rank() -> None:
    """DeepSpeed reads it, in ZeRO-3 at every step, and not every launcher sets it."""
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if torch.cuda.is_available() else 0))


@contextlib.contextmanager
def _without_shared_memory_op(deepspeed: Any) -> Iterator[None]:
    """DeepSpeed would compile an operation for inference when it starts, on every rank, of no use in training."""
    compatible, name = deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm"
    before = compatible.get(name, False)
    compatible[name] = False
    try:
        yield
    finally:
        compatible[name] = before


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    """Of the probe's engine, and of what DeepSpeed finds while it is imported: nobody asked for those."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Of DeepSpeed's own calls of PyTorch and others."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield
