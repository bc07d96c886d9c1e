"""How far two runs of the same steps are from each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOLERANCE = 1e-5  # relative, float32: what is left is the order in which sums are rounded


@dataclass
class Trace:
    """Some steps of a run: each step's loss and gradients, and the parameters at the end."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def add(self, loss: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """A step's loss and gradients."""
        self.losses.append(loss.detach().clone())
        for name, gradient in gradients.items():
            self.gradients.setdefault(name, []).append(gradient.detach().clone())

    def close(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = {name: parameter.detach().clone() for name, parameter in parameters.items()}


@dataclass(frozen=True)
class Difference:
    """Largest relative differences over all steps: of the loss, and of each parameter and its gradient."""

    loss: float
    gradients: dict[str, float]
    parameters: dict[str, float]

    @property
    def largest(self) -> float:
        return max(self.loss, *self.gradients.values(), *self.parameters.values())

    def table(self) -> str:
        width = max(map(len, self.gradients))
        lines = [f"{'':{width}}  gradient  parameter"]
        lines += [
            f"{name:{width}}  {self.gradients[name]:8.1e}  {self.parameters[name]:9.1e}" for name in self.gradients
        ]
        lines += [f"{'loss':{width}}  {self.loss:8.1e}"]
        return "\n".join(lines)


def compare(run: Trace, reference: Trace) -> Difference:
    steps = zip(*reference.gradients.values(), strict=True)
    whole = [float(torch.stack([x.double().norm() for x in step]).norm()) for step in steps]
    return Difference(
        loss=_largest(run.losses, reference.losses),
        gradients={
            name: _largest(run.gradients[name], expected, whole) for name, expected in reference.gradients.items()
        },
        parameters={name: _largest([run.parameters[name]], [reference.parameters[name]]) for name in run.parameters},
    )


def _largest(got: list[Tensor], expected: list[Tensor], whole: list[float] | None = None) -> float:
    sizes = whole or [0.0] * len(got)
    return max(relative(a, b, size) for a, b, size in zip(got, expected, sizes, strict=True))


def relative(got: Tensor, expected: Tensor, whole: float = 0.0) -> float:
    """Norm of the difference over the norm of what is expected, formed in float64. NaN counts as infinite.

    Args:
        whole: the norm of all that it is part of, by a hundredth of which a smaller part is judged: where gradients
            cancel, as those of queries that see one key, rounding is all there is, on each processor another.
    """
    size, off = expected.double().norm().clamp(min=whole / 100), (got.double() - expected.double()).norm()
    ratio = off / size if size > 0 else torch.where(off > 0, torch.inf, 0.0)
    return float(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf))
