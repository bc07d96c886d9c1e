"""What may be around the model: nothing, DDP, FSDP2 or DeepSpeed's ZeRO. One class each, all used alike.

The loss of a rank is its share of the mean, so gradients are to be added up over all ranks of the mesh. A wrapper that
averages them gets the loss divided by its factor, which `gradient_factor` has measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.errors import UnsupportedError
from ringattn.mesh import Mesh
from ringattn.trainer.config import Config
from ringattn.trainer.model import Decoder
from ringattn.training import clip_grad_norm, gradient_factor, sum_gradients

Optimize = Callable[[nn.Module], torch.optim.Optimizer]


class Plain:
    """No wrapper: every rank has all weights, and adds up all gradients.

    Attributes:
        module: the model itself, whose parameters the optimizer has.
        optimizer: of these parameters.
        saved: what a checkpoint is of.
    """

    factor = 1.0

    def __init__(self, model: Decoder, mesh: Mesh, config: Config, optimize: Optimize) -> None:
        self.module, self.mesh, self.clip = model, mesh, config.clip
        self.optimizer = optimize(model)
        self.saved: dict[str, Any] = {"model": model, "optimizer": self.optimizer}

    def __call__(self, *inputs: Any) -> Tensor:
        """The logits of this rank's tokens."""
        logits: Tensor = self.module(*inputs)
        return logits

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of a share of the loss; after the last share of a step it is that of the whole loss."""
        (loss / self.factor).backward()
        if last:
            sum_gradients(self.module, self.mesh)

    def step(self) -> float:
        """Clips, steps, and forgets the gradients; their norm before."""
        norm = clip_grad_norm(self.module, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def gradients(self) -> dict[str, Tensor]:
        """The whole gradients of the step, on every rank."""
        return {name: _whole(p.grad) for name, p in self.module.named_parameters() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        """All weights, on every rank; every rank asks."""
        return {name: _whole(weight) for name, weight in self.module.state_dict().items()}


class Ddp(Plain):
    """torch's DistributedDataParallel: every rank has all weights; gradients travel while others are computed."""

    def __init__(self, model: Decoder, mesh: Mesh, config: Config, optimize: Optimize) -> None:
        super().__init__(model, mesh, config, optimize)
        self.factor = gradient_factor(lambda probe, x: _backward(_data_parallel(probe, mesh), x), mesh)
        self._wrapped = _data_parallel(model, mesh)

    def __call__(self, *inputs: Any) -> Tensor:
        logits: Tensor = self._wrapped(*inputs)
        return logits

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.factor).backward()


class Fsdp2(Plain):
    """torch's fully_shard over all ranks, replicas and ring alike: every rank has a part of every weight."""

    def __init__(self, model: Decoder, mesh: Mesh, config: Config, optimize: Optimize) -> None:
        from torch.distributed.fsdp import fully_shard

        sharded: Callable[[nn.Module], Any] = partial(fully_shard, mesh=mesh.device_mesh(flat=True))
        self.factor = gradient_factor(lambda probe, x: _backward(sharded(probe), x), mesh)
        for block in model.blocks:
            sharded(block)
        sharded(model)
        super().__init__(model, mesh, config, optimize)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.factor).backward()


class DeepSpeed(Plain):
    """DeepSpeed's engine: ZeRO cuts optimizer states (1), gradients (2) and weights (3) over all ranks."""

    def __init__(self, model: Decoder, mesh: Mesh, config: Config, optimize: Optimize) -> None:
        from ringattn.integrations.deepspeed import initialize

        super().__init__(model, mesh, config, optimize)
        settings = {
            "zero_optimization": {"stage": config.zero},
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": config.batch // config.replicas,
            "gradient_clipping": config.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine, self.factor = initialize(model, mesh, settings, optimizer=self.optimizer)
        self.saved = {"model": self.engine}

    def __call__(self, *inputs: Any) -> Tensor:
        logits: Tensor = self.engine(*inputs)
        return logits

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss / self.factor)
        if not last:
            self.engine.step()  # which only counts the shares until the last one

    def step(self) -> float:
        norm = (
            nn.utils.get_total_norm(list(self.gradients().values()))
            if self.engine.zero_optimization_stage() == 0
            else None
        )
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(p) for name, p in self.module.named_parameters()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        if self.engine.zero_optimization_stage() < 3:
            return super().weights()
        return {name: safe_get_full_fp32_param(p) for name, p in self.module.named_parameters()}


WRAPPERS: dict[str, type[Plain]] = {"none": Plain, "ddp": Ddp, "fsdp2": Fsdp2, "deepspeed": DeepSpeed}
"""By the name that --wrap takes."""


def wrap(model: Decoder, mesh: Mesh, config: Config, optimize: Optimize) -> Plain:
    """The model with what --wrap puts around it.

    Raises:
        UnsupportedError: that needs torch.distributed, and the ranks are joined by something else.
    """
    joined = mesh.connected().name
    if config.wrap != "none" and joined not in ("gloo", "nccl"):
        raise UnsupportedError(
            f"--wrap {config.wrap} needs torch.distributed, and these ranks are joined by {joined}. Start them with "
            f"torchrun, or leave --wrap out."
        )
    return WRAPPERS[config.wrap](model, mesh, config, optimize)


def _data_parallel(module: nn.Module, mesh: Mesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module, process_group=mesh.device_mesh(flat=True).get_group())


def _backward(wrapped: Callable[[Tensor], Tensor], x: Tensor) -> None:
    wrapped(x).backward()


def _whole(x: Tensor) -> Tensor:
    """The tensor that this may be a part of."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
