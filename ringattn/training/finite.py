"""Where the first number came from that is not finite: on which rank, in which call, in which step.

A NaN in one rank's keys is in every rank's loss a moment later, and in every weight after the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ringattn.checking import instance, integer
from ringattn.errors import NotFiniteError
from ringattn.mesh import Mesh
from ringattn.runtime.agreement import gathered

LAST = 1 << 60  # after every pass: gradients of parameters


@dataclasses.dataclass
class _Found:
    """The first tensor of this rank that holds such a number: in which order it was seen, and what it is."""

    passes: int = 0
    order: int = LAST + 1
    what: str = ""

    def look(self, where: str, tensors: Mapping[str, Tensor]) -> None:
        """Called with what goes into a pass, then with what comes out of it."""
        self.passes += 1
        self.note(self.passes, {f"{name} of {where}": x for name, x in tensors.items()})

    def note(self, order: int, tensors: Mapping[str, Tensor]) -> None:
        for name, x in tensors.items():
            if self.order > LAST and (count := int((~x.isfinite()).sum())):
                self.order, self.what = order, f"{name} ({count} of {x.numel()} numbers)"


@contextlib.contextmanager
def check_finite(mesh: Mesh, step: int, model: nn.Module | None = None) -> Iterator[None]:
    """Looks at what goes into every attention call within it and what comes out, forward and backward.

    Every rank enters and leaves it together; when they leave, they compare what they saw, in a few small messages. Of
    numbers that are not finite, the earliest is reported, on all ranks: of those of one call, what goes in before what
    comes out. It reads every tensor once more, and on a GPU waits for each: for finding a fault, or for runs that can
    afford it.

    Args:
        mesh: the ranks.
        step: of training, for the message.
        model: whose parameters' gradients are looked at too, at the end.

    Raises:
        InputError: an argument is wrong.
        NotFiniteError: there is one; names the rank, the call and the step. On every rank.

    Example:
        >>> import torch, ringattn
        >>> from ringattn.training import check_finite
        >>> mesh = ringattn.init()
        >>> q = torch.full((1, 1, 4, 8), float("nan"))
        >>> with check_finite(mesh, step=12):  # doctest: +ELLIPSIS
        ...     _ = ringattn.attention(q, q, q, ringattn.Causal(), sharding=ringattn.Sharding(4, mesh))
        Traceback (most recent call last):
        ringattn.errors.NotFiniteError: Step 12: the first numbers that are not finite are on rank 0 of 1, in q of ...
    """
    transport = instance(mesh, Mesh, "mesh", "a ringattn.Mesh, as ringattn.init() returns").connected()
    integer(step, "step", needed="the number of a step")
    if model is not None:
        instance(model, nn.Module, "model", "a torch.nn.Module, or None")
    found = _Found()
    before, transport.observer = transport.observer, found.look
    try:
        yield
    finally:
        transport.observer = before
    if model is not None:
        gradients = {f"the gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.note(LAST, {name: _local(gradient) for name, gradient in gradients.items()})
    order, rank, what = min(gathered(mesh.everyone, (found.order, mesh.rank, found.what), "check_finite"))
    if order <= LAST:
        raise NotFiniteError(
            f"Step {step}: the first numbers that are not finite are on rank {rank} of {mesh.size}, in {what}. Look at "
            f"that rank's batch, and at what comes before in the model."
        )


def _local(gradient: Tensor) -> Tensor:
    """This rank's part of one that FSDP2 has cut."""
    part: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return part.detach() if part.is_floating_point() else torch.zeros(())
