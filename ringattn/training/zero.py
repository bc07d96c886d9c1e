"""What a checkpoint holds of a DeepSpeed engine, whose ZeRO keeps weights and states in flat parts of its own.

Each parameter is gathered by itself, cut into rows over the ranks and let go: a rank never holds more than its share
and one whole parameter. Loading goes the same way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from ringattn.errors import UnsupportedError
from ringattn.mesh import Mesh
from ringattn.training.contents import (
    check_groups,
    compare,
    groups,
    named_buffers,
    named_parameters,
    saved_states,
    set_options,
)
from ringattn.training.storage import Manifest


def of_zero(engine: Any) -> bool:
    """Whether ZeRO, rather than torch, has the engine's optimizer states."""
    return any(hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") for p in engine.module.parameters())


class Zero:
    """The model and optimizer of an engine with ZeRO: the interface of `Contents`.

    Weights and states are those that the optimizer works on, in float32 where the model has fewer bits.
    """

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self.module: nn.Module = engine.module
        self._zero = engine.optimizer
        self._rows = _Rows(mesh)
        self.parameters = named_parameters(self.module)
        self._names = {parameter: name for name, parameter in self.parameters.items()}
        self._flats = _flats(self._zero)
        self._flat_of = {id(p): flat for flat, parameters in self._flats for p in parameters}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()}
        return found | {name: tuple(x.shape) for name, x in named_buffers(self.module).items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything by its name; every rank calls it, and gets its rows."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        found: dict[str, Tensor] = dict(named_buffers(self.module).items())
        for name, parameter in self.parameters.items():
            found[name] = self._rows.of(_whole(parameter))
        found = {f"model/{name}": x for name, x in found.items()}
        for name, parameter in self._trained():
            flat = self._flat_of[id(parameter)]
            for key, x in self._state(flat).items():
                if isinstance(x, Tensor):
                    cut = x.shape == flat.shape
                    whole = safe_get_full_optimizer_state(parameter, key) if cut else x.clone()
                    found[f"optimizer/{name}/{key}"] = self._rows.of(whole) if cut else whole
        return found

    def outline(self) -> dict[str, Any]:
        values = {
            name: {key: x for key, x in self._state(self._flat_of[id(p)]).items() if not isinstance(x, Tensor)}
            for name, p in self._trained()
        }
        return {"groups": groups(self._zero, self._groups()), "values": {n: v for n, v in values.items() if v}}

    def targets(self, manifest: Manifest) -> dict[str, Tensor]:
        compare(self.shapes(), manifest)
        check_groups(self._groups(), manifest)
        found = {f"model/{name}": x for name, x in named_buffers(self.module).items()}
        for name, parameter in self.parameters.items():
            dtype = self._flat_of[id(parameter)].dtype if id(parameter) in self._flat_of else parameter.dtype
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            found[f"model/{name}"] = self._rows.empty(shape, dtype, parameter.device)
        for name, states in saved_states(manifest).items():
            parameter = self.parameters[name]
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            for key, stored in states.items():
                cut = key != "step" and stored.shape == shape
                make = self._rows.empty if cut else _empty
                found[f"optimizer/{name}/{key}"] = make(stored.shape, stored.dtype, parameter.device)
        return found

    def adopt(self, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        """Gives weights and states to the engine; takes them out of ``tensors`` one by one."""
        states = saved_states(manifest)
        for flat, parameters in self._flats:
            self._prepare(flat, self._names[parameters[0]], tensors, manifest)
        self._link()
        for name, parameter in self.parameters.items():
            whole = _joined(tensors.pop(f"model/{name}"))
            if id(parameter) in self._flat_of:
                _set(parameter, whole)
            _set_working_copy(parameter, whole)
            for key in states.get(name, {}):
                state = tensors.pop(f"optimizer/{name}/{key}")
                if isinstance(state, DTensor):
                    _set(parameter, _joined(state), key)
        if hasattr(self._zero, "update_lp_params"):
            self._zero.update_lp_params()
        set_options(self._zero, manifest.content["optimizer"])

    def _prepare(self, flat: Tensor, first: str, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Makes the states of a flat part, as its first parameter has them; its optimizer may not have made a step."""
        state = dict(manifest.content["optimizer"]["values"].get(first, {}))
        for key in saved_states(manifest).get(first, {}):
            saved = tensors[f"optimizer/{first}/{key}"]
            whole = isinstance(saved, DTensor)
            state[key] = torch.zeros_like(flat, dtype=saved.dtype) if whole else saved.clone()
        self._zero.optimizer.state[flat] = state

    def _link(self) -> None:
        """ZeRO 1 and 2 note where a parameter has its states, in the first step: later groups have none yet."""
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _state(self, flat: Tensor) -> Mapping[str, Any]:
        return self._zero.optimizer.state.get(flat, {})  # type: ignore[no-any-return]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.parameters.items() if id(p) in self._flat_of)

    def _groups(self) -> list[list[str]]:
        return [[self._names[p] for p in parameters] for parameters in _groups(self._zero)]


class _Rows:
    """Cuts whole tensors into rows over all ranks of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh.device_mesh(flat=True)
        self._rank, self._size = self._mesh.get_local_rank(), self._mesh.size()

    def of(self, whole: Tensor) -> Tensor:
        """This rank's rows, the rest let go; a tensor without dimensions stays whole."""
        if whole.dim() == 0:
            return whole.detach().clone()
        first, last = self._bounds(whole.shape[0])
        return self._distributed(whole.detach()[first:last].clone(), whole.shape)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if not shape:
            return _empty(shape, dtype, device)
        first, last = self._bounds(shape[0])
        return self._distributed(_empty((last - first, *shape[1:]), dtype, device), torch.Size(shape))

    def _bounds(self, rows: int) -> tuple[int, int]:
        """As torch.chunk cuts."""
        each = -(-rows // self._size)
        return min(self._rank * each, rows), min((self._rank + 1) * each, rows)

    def _distributed(self, rows: Tensor, shape: torch.Size) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        cut: Tensor = DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return cut


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _joined(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _whole(parameter: nn.Parameter) -> Tensor:
    """The weight that the optimizer works on; of one that is not trained, the model's."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    if whole is not None:
        return whole  # type: ignore[no-any-return]
    with zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _set(parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
    """The weight that the optimizer works on, or one of its states."""
    from deepspeed import utils

    if hasattr(parameter, "_hp_mapping"):
        part, name = whole, "full"
    else:  # DeepSpeed's own cut goes beyond the end of a tensor that the ranks do not divide
        part, name = _part(parameter, whole), "local"
    if key is None:
        getattr(utils, f"safe_set_{name}_fp32_param")(parameter, part)
    else:
        getattr(utils, f"safe_set_{name}_optimizer_state")(parameter, part, key)


def _part(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a parameter of ZeRO-3, padded where its end is beyond the parameter's."""
    each, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
    part = whole.flatten()[rank * each : (rank + 1) * each]
    return functional.pad(part, (0, each - part.numel()))


def _set_working_copy(parameter: nn.Parameter, whole: Tensor) -> None:
    """The weight that the model works on; ZeRO 1 and 2 make theirs of the optimizer's, all at once."""
    from deepspeed import zero

    if not hasattr(parameter, "_hp_mapping"):
        with zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(whole)


def _flats(zero: Any) -> list[tuple[Tensor, list[nn.Parameter]]]:
    """The flat parts that the optimizer steps, and the parameters each has a share of."""
    return list(zip(_known(zero)[0](zero), _known(zero)[1](zero), strict=True))


def _groups(zero: Any) -> list[list[nn.Parameter]]:
    """The parameters of every group, as the user has made them."""
    return _known(zero)[2](zero)


Parts = Callable[[Any], list[Any]]


def _known(zero: Any) -> tuple[Parts, Parts, Parts]:
    """Where a ZeRO optimizer keeps its flat parts, their parameters, and the parameters of its groups."""
    if getattr(zero, "swap_optimizer", False):
        raise UnsupportedError("ZeRO keeps these states on NVMe; only states in memory can be saved here.")
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        groups: Parts = lambda z: [group["params"] for group in z.trainable_param_groups]  # noqa: E731
        return (lambda z: z.fp32_partitioned_groups_flat), (lambda z: z.fp16_groups), groups
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return (lambda z: z.single_partition_of_fp32_groups), (lambda z: z.bit16_groups), (lambda z: z.bit16_groups)
    raise UnsupportedError(f"Checkpoints know ZeRO 1, 2 and 3 of DeepSpeed; got its {type(zero).__name__}.")
