"""Gradients of a sharded batch: added up over all ranks, whatever a wrapper makes of them, and clipped by their norm.

Each rank's loss is its share of one mean over all labels, so its gradients are shares too: they are *added* over data,
ring and ulysses. Wrappers average: DDP and FSDP2 divide by the ranks of their mesh, DeepSpeed by a number that depends
on its stage and on what it was told of the sequence; and some add up over replicas alone, which no scale can mend.
`gradient_factor` measures which it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.checking import instance, listed, number, shown
from ringattn.errors import InputError, UnsupportedError
from ringattn.mesh import Mesh
from ringattn.runtime import agreement
from ringattn.runtime.agreement import exchanged
from ringattn.transports.base import SUMMED, Transport

BUCKET = 1 << 24  # numbers that travel at once: 64 MB
PROBE = 2.0**-12  # so small that no wrapper clips it, and exact in every dtype
TOLERANCE = 1e-2  # of factors, which may have been rounded to bfloat16
EXACT = 1e-6  # of those that have not


def sum_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Adds every rank's gradients to those of all others, in place: for a model without a wrapper.

    Sums are made in float32 (float64 for float64), in the same order on every rank. A parameter without a gradient on
    some ranks, as where a shard has no labels, gets the sum of the others'; one without any keeps none.

    Raises:
        UnsupportedError: a wrapper has cut the parameters, and adds up their gradients itself.
        AgreementError: the ranks that share a sequence train different parameters.
    """
    _check_mesh(mesh)
    with _heard(mesh.everyone):
        parameters = _trained(model)
    if mesh.size == 1:
        return
    _compare(parameters, mesh.everyone)
    for bucket in _buckets(parameters):
        _sum_bucket(bucket, mesh)


def total(share: Tensor, mesh: Mesh) -> Tensor:
    """The sum of every rank's share, on every rank: the loss itself, for logging. Without a gradient.

    Raises:
        InputError: it is no tensor of numbers that can be added up.
        AgreementError: the ranks' shares are of other shapes, or a rank has refused its own.
    """
    _check_mesh(mesh)
    with _heard(mesh.everyone):
        added = (
            instance(share, Tensor, "share", "a tensor, this rank's share")
            .detach()
            .clone(memory_format=torch.contiguous_format)
        )
        if added.dtype not in SUMMED or added.is_meta:
            raise InputError(
                f"share must be a tensor of float32, float64, bfloat16, float16, int64 or int32; got {added.dtype} on "
                f"{added.device}."
            )
    if mesh.everyone.agrees:
        agreement.check(mesh.everyone, {"call": "total", "shapes": str(list(added.shape)), "dtype": str(added.dtype)})
    mesh.everyone.sum(added, label="the loss")
    return added


def gradient_factor(step: Callable[[nn.Module, Tensor], object], mesh: Mesh) -> float:
    """By what factor a wrapper's gradients differ from the sum over all ranks, measured.

    Divide the loss by it, ``(token_loss(logits, batch) / factor).backward()``, and everything that sees gradients
    afterwards, clipping and optimizers alike, sees the right ones.

    Args:
        step: ``step(probe, x)`` wraps ``probe``, a module of one parameter, exactly as the model will be wrapped, and
            runs one backward pass: ``wrapped(x).backward()``, or ``engine.backward(engine(x))``. The wrapper must live
            until then. All ranks call it. It may return the whole gradient, where the parameter does not have it.
            With gradient accumulation it runs all passes of an optimizer step, all but one on ``x * 0``: the factor is
            then that of one of them.
        mesh: the ranks.

    Returns:
        1 where gradients are added up, 1 / n where they are averaged over n ranks.

    Raises:
        UnsupportedError: on every rank, where gradients of some ranks do not arrive or arrive with another factor:
            those are partial sums, and no factor makes them right. Says which arrive. Also where step fails on another
            rank; on that one its own error is raised.

    Example:
        Of FSDP2 with mixed precision, over all ranks; ``mesh=mesh.device_mesh()["data", "ring"]`` is HSDP::

            def wrap(module):
                precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
                return fully_shard(module, mesh=mesh.device_mesh(flat=True), mp_policy=precision)

            model, factor = wrap(model), gradient_factor(lambda probe, x: wrap(probe)(x).backward(), mesh)

        >>> import ringattn
        >>> gradient_factor(lambda probe, x: probe(x).backward(), ringattn.init())
        1.0
    """
    _check_mesh(mesh)
    if not callable(step):
        raise InputError(f"step must be a function of a module and a tensor; got {shown(step)}.")
    probe = _Probe(mesh.size)
    device = mesh.connected().device
    probe.to(device)
    x = torch.zeros(mesh.size, device=device)
    x[mesh.rank] = PROBE  # so that entry r of the gradient says how rank r's share has arrived
    try:
        found = _whole_gradient(step(probe, x), probe, mesh)
    except Exception:
        with contextlib.suppress(Exception):  # the step's own error is the one to show
            _failed_ranks(True, mesh)
        raise
    if failed := _failed_ranks(False, mesh):
        raise UnsupportedError(f"step failed on rank {failed} of {mesh.size}; the error there says why.")
    (factor,) = mesh.everyone.sum_numbers(float(found[0]) if mesh.rank == 0 else 0.0)
    right = bool((found - factor).abs().max() <= TOLERANCE * abs(factor)) and factor != 0
    (agreeing,) = mesh.everyone.sum_numbers(right)
    if agreeing != mesh.size:
        raise UnsupportedError(_partial_sums(found, mesh))
    return _rounded(factor, mesh)


def scale_gradients(parameters: nn.Module | Iterable[Tensor], factor: float) -> None:
    """Divides the gradients by the factor of `gradient_factor`, in place, where the loss was not.

    Raises:
        UnsupportedError: ZeRO holds the gradients: the loss is divided instead.
    """
    divisor = number(factor, "factor", above=0)
    found = _tensors(parameters)
    _refuse_zero(found, "Divide the loss by the factor before engine.backward.")
    if divisor != 1:
        for parameter in found:
            if parameter.grad is not None:
                parameter.grad.div_(divisor)


def clip_grad_norm(parameters: nn.Module | Iterable[Tensor], max_norm: float, *, factor: float = 1.0) -> Tensor:
    """Scales the gradients so that their norm is at most ``max_norm``; returns what it was, the same on all ranks.

    For plain parameters after `sum_gradients`, for DDP, and for the DTensors of FSDP2, of which every rank has a part.

    Args:
        factor: of `gradient_factor`, where the gradients still have it: they are divided by it first.

    Raises:
        UnsupportedError: ZeRO holds the gradients, and clips them itself (``gradient_clipping`` in its config).
    """
    most = number(max_norm, "max_norm", above=0)
    found = [p for p in _tensors(parameters) if p.grad is not None]
    _refuse_zero(found, "Set gradient_clipping in its config and divide the loss by the factor.")
    scale_gradients(found, factor)
    gradients = [p.grad for p in found if p.grad is not None]
    norms = [_norm(list(group)) for group in _by_mesh(gradients).values()]
    norm = torch.stack(norms).square().sum().sqrt() if norms else torch.zeros(())
    coefficient = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(coefficient.to(gradient.device))
    return norm


class _Probe(nn.Module):
    """A parameter of one entry for each rank, and a loss that is linear in it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def _whole_gradient(returned: object, probe: nn.Module, mesh: Mesh) -> Tensor:
    """By what factor each rank's share is in the gradient of the probe's parameter, whoever holds it."""
    (parameter,) = probe.parameters()
    found: Any = parameter.grad
    if isinstance(returned, Tensor) and returned.dim():  # one without dimensions is the loss, as engines return it
        found = returned
    elif _of_zero(parameter):
        from deepspeed.utils import safe_get_full_grad

        found = safe_get_full_grad(parameter)
    if found is None:
        raise InputError("step left no gradient in the probe; it must wrap it and run one backward pass.")
    whole: Tensor = found.full_tensor() if hasattr(found, "full_tensor") else found
    if whole.shape != (mesh.size,):
        raise InputError(f"step must leave the probe's gradient, [{mesh.size}]; got {list(whole.shape)}.")
    return whole.detach().double().cpu() / PROBE


def _failed_ranks(failed: bool, mesh: Mesh) -> str:
    """The ranks that say so, which all hear: a rank that left without a word would be waited for."""
    said = exchanged(mesh.everyone, bytes([failed]), "a probe of gradients")
    return ", ".join(str(rank) for rank, each in enumerate(said) if any(each))


def _partial_sums(found: Tensor, mesh: Mesh) -> str:
    """Which gradients reach this rank, in words."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(found.tolist()):
        ranks.setdefault(f"{value:.3g}", []).append(rank)
    said = "; ".join(
        f"{'not at all' if value in ('0', '-0') else f'times {value}'} those of rank {', '.join(map(str, those))}"
        for value, those in ranks.items()
    )
    return (
        f"The wrapper does not add up the gradients of all {mesh.size} ranks of {mesh.axes}. Rank {mesh.rank} gets "
        f"{said}: these are partial sums, and training on them is wrong. Wrap over all ranks of the mesh, as "
        f"fully_shard(model, mesh=mesh.device_mesh(flat=True)) and DistributedDataParallel(model) do, or start "
        f"DeepSpeed with ringattn.integrations.deepspeed; and keep the wrapper until the backward pass is done."
    )


def _rounded(factor: float, mesh: Mesh) -> float:
    """The fraction that was meant, where rounding has blurred it."""
    n = max(round(1 / factor), 1)
    if abs(factor * n - 1) <= EXACT:
        return 1 / n
    meant = {1.0 / n for n in (1, mesh.data, mesh.sequence_size, mesh.size)}
    nearest = min(meant, key=lambda value: abs(value - factor))
    return nearest if abs(nearest - factor) <= TOLERANCE * nearest else factor


def _check_mesh(mesh: object) -> None:
    instance(mesh, Mesh, "mesh", "a ringattn.Mesh, as ringattn.init() returns").connected()


def _tensors(parameters: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    found = listed(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    if found is None or not all(isinstance(each, Tensor) for each in found):
        raise InputError(f"parameters must be a module, or tensors in a list; got {shown(parameters)}.")
    return found


def _of_zero(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO has the parameter's gradient."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _refuse_zero(parameters: Iterable[Tensor], instead: str) -> None:
    if any(_of_zero(parameter) for parameter in parameters):
        raise UnsupportedError(f"DeepSpeed's ZeRO holds these gradients in parts of its own. {instead}")


def _refuse_sharded(parameters: Iterable[Tensor], what: str, instead: str) -> None:
    if any(_of_zero(parameter) or hasattr(parameter, "full_tensor") for parameter in parameters):
        raise UnsupportedError(f"{what}; these are parts, which FSDP2 or ZeRO adds up itself: {instead}.")


def _by_mesh(gradients: Iterable[Tensor]) -> dict[object, list[Tensor]]:
    """Gradients that one norm can be taken of: plain ones, or those sharded over the same mesh."""
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        kind = (getattr(gradient, "device_mesh", None), gradient.device, gradient.dtype)
        groups.setdefault(kind, []).append(gradient)
    return groups


def _norm(gradients: list[Tensor]) -> Tensor:
    """In float32 at least: in bfloat16 a norm has three digits, and adds nothing once it is 256 times its summands."""
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    if wide != gradients[0].dtype:
        gradients = [torch.linalg.vector_norm(gradient, dtype=wide) for gradient in gradients]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@contextlib.contextmanager
def _heard(transport: Transport) -> Iterator[None]:
    """What is raised within is told to the other ranks, which are about to compare what they add up."""
    try:
        yield
    except Exception as error:
        agreement.refuse(transport, error)
        raise


def _trained(model: object) -> list[nn.Parameter]:
    module = instance(model, nn.Module, "model", "a torch.nn.Module")
    parameters = [p for p in module.parameters() if p.requires_grad]
    _refuse_sharded(parameters, "sum_gradients adds up whole gradients", "leave sum_gradients out")
    return parameters


def _compare(parameters: Iterable[nn.Parameter], transport: Transport) -> None:
    """Ranks that sent each other gradients of other sizes would end, or add up what does not belong together."""
    if not transport.agrees:
        return
    shapes = [(tuple(p.shape), p.dtype) for p in parameters]
    digest = hashlib.blake2b(repr(shapes).encode(), digest_size=8).hexdigest()
    agreement.check(
        transport,
        {"call": "sum_gradients", "shapes": f"{len(shapes)} parameters #{digest}"},
        "Make the same model on all of them, and freeze the same parameters.",
    )


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device whose gradients travel together."""
    for _, equal in itertools.groupby(sorted(parameters, key=_kind_of), key=_kind_of):
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in equal:
            if bucket and size + parameter.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        yield bucket


def _kind_of(parameter: nn.Parameter) -> str:
    return f"{parameter.dtype} {parameter.device}"


def _sum_bucket(bucket: list[nn.Parameter], mesh: Mesh) -> None:
    """One message of all gradients, and of whether there are any: whether others have some is not known before."""
    wide = torch.promote_types(bucket[0].dtype, torch.float32)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    there = torch.tensor([p.grad is not None for p in bucket], dtype=wide, device=bucket[0].device)
    flat = torch.cat([*(part.flatten().to(wide) for part in parts), there])
    mesh.everyone.sum(flat, label="gradients")
    *sums, there = flat.split([*(p.numel() for p in bucket), len(bucket)])
    for parameter, added, count in zip(bucket, sums, there.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(added.view_as(parameter))
