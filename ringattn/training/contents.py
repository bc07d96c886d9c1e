"""What a checkpoint holds of a model and its optimizer: tensors by canonical names, whatever has wrapped them.

    model/blocks.0.attention.query.weight              a parameter or a buffer
    optimizer/blocks.0.attention.query.weight/exp_avg  what the optimizer keeps of it

`Contents` is of plain models, DDP and FSDP2; `ringattn.training.zero` has DeepSpeed's ZeRO. Both give the same names
and whole shapes, so that what one has saved another loads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ringattn.checking import instance
from ringattn.errors import CheckpointError, InputError, UnsupportedError
from ringattn.training.storage import Manifest, Stored

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # what torch.compile and checkpoint wrappers put into names
PLAIN = (bool, int, float, str, type(None))
SHOWN = 3  # names in an error


class Contents:
    """A model and its optimizer, plain, in DDP or in FSDP2.

    Attributes:
        module: without wrappers.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        if optimizer is not None:
            instance(optimizer, Optimizer, "optimizer", "a torch.optim.Optimizer, or None")
        self.module = unwrapped(model)
        self.optimizer = optimizer
        self.parameters = named_parameters(self.module)
        self._names = {parameter: name for name, parameter in self.parameters.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of every parameter and buffer."""
        return {name: tuple(x.shape) for name, x in {**self.parameters, **named_buffers(self.module)}.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything by its name; the parameters themselves, not copies."""
        found = {f"model/{name}": x.detach() for name, x in self.parameters.items()}
        found |= {f"model/{name}": x for name, x in named_buffers(self.module).items()}
        for name, state in self._states().items():
            found |= {f"optimizer/{name}/{key}": x for key, x in state.items() if isinstance(x, Tensor)}
        return found

    def outline(self) -> dict[str, Any] | None:
        """Of the optimizer what is not in tensors, for JSON: options of its groups, and single values."""
        if self.optimizer is None:
            return None
        values = {
            name: {key: _plain(x, key) for key, x in state.items() if not isinstance(x, Tensor)}
            for name, state in self._states().items()
        }
        return {"groups": groups(self.optimizer, self._groups()), "values": {n: v for n, v in values.items() if v}}

    def targets(self, manifest: Manifest) -> dict[str, Tensor]:
        """Where to load what is saved: the parameters themselves, and new tensors for the optimizer.

        Raises:
            CheckpointError: it is of another model, or of another optimizer.
        """
        compare(self.shapes(), manifest)
        found = {f"model/{name}": x.detach() for name, x in self.parameters.items()}
        found |= {f"model/{name}": x for name, x in named_buffers(self.module).items()}
        if self.optimizer is None:
            return found
        states = saved_states(manifest)
        check_groups(self._groups(), manifest)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names[parameter]
                for key, stored in states.get(name, {}).items():
                    found[f"optimizer/{name}/{key}"] = _target(parameter, key, stored, group)
        return found

    def adopt(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Gives the optimizer what has been loaded; the parameters have it already."""
        if self.optimizer is None:
            return
        states = saved_states(manifest)
        outline = manifest.content["optimizer"]
        for parameters in self._groups():
            for name in parameters:
                keys = states.get(name, {})
                state = {key: tensors[f"optimizer/{name}/{key}"] for key in keys}
                self.optimizer.state[self.parameters[name]] = {**state, **outline["values"].get(name, {})}
        set_options(self.optimizer, outline)

    def _groups(self) -> list[list[str]]:
        """The names of the parameters of every group."""
        assert self.optimizer is not None
        try:
            return [[self._names[p] for p in group["params"]] for group in self.optimizer.param_groups]
        except KeyError as error:
            raise InputError(
                "The optimizer has parameters that the model has not. Make it of the model's parameters, after the "
                "model was wrapped."
            ) from error

    def _states(self) -> dict[str, Mapping[str, Any]]:
        if self.optimizer is None:
            return {}
        return {name: self.optimizer.state.get(self.parameters[name], {}) for names in self._groups() for name in names}


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, its parameters in parts where FSDP2 has cut them."""
    inner: Any = instance(model, nn.Module, "model", "a torch.nn.Module")
    while isinstance(inner, DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner._orig_mod
    for module in inner.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation some parameters may still be whole
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UnsupportedError(
                f"{type(module).__name__} has a state of its own kind, which no checkpoint here holds."
            )
    return inner  # type: ignore[no-any-return]


def of_deepspeed(model: nn.Module) -> bool:
    """Whether this is an engine of DeepSpeed, which then has been imported."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Each once, by the first of its names."""
    return {_canonical(name): parameter for name, parameter in module.named_parameters()}


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that belong to a saved model."""
    found = {}
    for prefix, inner in module.named_modules():
        for name, buffer in inner.named_buffers(recurse=False):
            if name not in inner._non_persistent_buffers_set:
                found[_canonical(f"{prefix}.{name}".lstrip("."))] = buffer
    return found


def _canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def saved_states(manifest: Manifest) -> dict[str, dict[str, Stored]]:
    """What is saved of the optimizer, by the name of the parameter."""
    found: dict[str, dict[str, Stored]] = {}
    for full, stored in manifest.tensors.items():
        if full.startswith("optimizer/"):
            name, _, key = full.removeprefix("optimizer/").rpartition("/")
            found.setdefault(name, {})[key] = stored
    return found


def compare(shapes: Mapping[str, tuple[int, ...]], manifest: Manifest) -> None:
    """Refuses a checkpoint of another model."""
    prefix = "model/"
    saved = {n.removeprefix(prefix): s.shape for n, s in manifest.tensors.items() if n.startswith(prefix)}
    wrong = []
    if missing := shapes.keys() - saved.keys():
        wrong.append(f"it has no {_some(missing)}")
    if unknown := saved.keys() - shapes.keys():
        wrong.append(f"the model has no {_some(unknown)}")
    unlike = {n for n in shapes.keys() & saved.keys() if shapes[n] != saved[n]}
    if unlike:
        wrong.append("shapes differ: " + _some(f"{n} {list(saved[n])} instead of {list(shapes[n])}" for n in unlike))
    if wrong:
        raise CheckpointError(f"{manifest.path} is of another model: {'; '.join(wrong)}.")


def groups(optimizer: Any, names: Iterable[list[str]]) -> list[dict[str, Any]]:
    """The options of every group of parameters, for JSON."""
    return [
        {"names": sorted(each), "options": {key: _plain(x, key) for key, x in group.items() if key != "params"}}
        for each, group in zip(names, optimizer.param_groups, strict=True)
    ]


def check_groups(names: list[list[str]], manifest: Manifest) -> None:
    """Refuses a checkpoint of an optimizer with other groups."""
    outline = manifest.content["optimizer"]
    if outline is None:
        raise CheckpointError(f"{manifest.path} was saved without an optimizer. Load it with optimizer=None.")
    saved = [group["names"] for group in outline["groups"]]
    if saved != [sorted(each) for each in names]:
        sizes = " and ".join(str([len(each) for each in lists]) for lists in (saved, names))
        raise CheckpointError(
            f"{manifest.path} is of an optimizer with other groups of parameters: {sizes} parameters in each. Make "
            f"the same groups, or load it with optimizer=None."
        )


def set_options(optimizer: Any, outline: Mapping[str, Any]) -> None:
    """Learning rates and the like, as they were saved."""
    for group, saved in zip(optimizer.param_groups, outline["groups"], strict=True):
        for key, value in saved["options"].items():
            old = group.get(key)
            if isinstance(old, Tensor):
                old.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def _target(parameter: Tensor, key: str, stored: Stored, group: Mapping[str, Any]) -> Tensor:
    """An empty tensor for a state: cut as the parameter where it has its shape, else whole."""
    if key == "step":  # torch's optimizers read it on the CPU, those apart that never leave the GPU
        on_device = group.get("capturable") or group.get("fused")
        return torch.empty(stored.shape, dtype=stored.dtype, device=parameter.device if on_device else "cpu")
    if stored.shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=stored.dtype, requires_grad=False)
    if hasattr(parameter, "full_tensor"):
        raise UnsupportedError(
            f"The optimizer's {key} has the shape {list(stored.shape)}, its parameter {list(parameter.shape)}: of an "
            f"FSDP2 model only states with the parameter's shape can be loaded. Pass optimizer=None, or unwrap it."
        )
    return torch.empty(stored.shape, dtype=stored.dtype, device=parameter.device)


def _plain(value: Any, key: str) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(x, PLAIN) for x in value)):
        return value
    raise UnsupportedError(f"The optimizer's {key} is a {type(value).__name__}; checkpoints hold tensors and numbers.")


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
