"""The first number that is not finite is found where it arises, and on every rank."""

from __future__ import annotations

import re

import pytest
import torch

import ringattn
from ringattn.errors import InputError, NotFiniteError
from ringattn.training import check_finite
from tests.workers import Workers


def _planted(mesh: ringattn.Mesh, odd: int, where: str) -> str:
    """Three calls; in the second, one rank has a NaN. What every rank hears."""
    sharding = ringattn.Sharding(24, mesh)
    model = torch.nn.Linear(8, 8)
    try:
        with check_finite(mesh, 7, model):
            for nth in range(3):
                x = torch.randn(1, 2, sharding.count, 8)
                q, k, v = model(x), model(x), model(x)
                if mesh.rank == odd and nth == 1 and where == "v":
                    v = torch.where(torch.arange(8) == 3, float("inf"), v)
                out = ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding)
                if mesh.rank == odd and nth == 1 and where == "gradient":
                    out = out * torch.tensor(float("nan"))
                out.sum().backward()
            if mesh.rank == odd and where == "parameter":
                assert model.bias.grad is not None
                model.bias.grad[2] = float("nan")
    except NotFiniteError as error:
        return str(error)
    assert mesh.connected().observer is None
    return "none"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("v", r"on rank 1 of 3, in v of attention forward \d+ \(16 of 128 numbers\)"),
        ("gradient", r"on rank 1 of 3, in output_gradient of attention backward \d+ \(128 of 128 numbers\)"),
        ("parameter", r"on rank 1 of 3, in the gradient of bias \(1 of 8 numbers\)"),
        ("nowhere", "none"),
    ],
)
def test_every_rank_hears_where_it_is(gloo: Workers, where: str, said: str) -> None:
    for results in (ringattn.simulate(_planted, 1, where, ring=3).results, gloo.run(3, _planted, 1, where)):
        assert len({*results}) == 1
        pattern = said if said == "none" else f"^Step 7: the first numbers that are not finite are {said}"
        assert re.search(pattern, results[0]), results[0]


def test_an_error_within_it_is_raised_as_it_is() -> None:
    mesh = ringattn.init(transport="local")
    with pytest.raises(ZeroDivisionError), check_finite(mesh, 1):
        raise ZeroDivisionError
    assert mesh.connected().observer is None
    with pytest.raises(InputError, match="mesh"):
        check_finite(None, 1).__enter__()  # type: ignore[arg-type]
