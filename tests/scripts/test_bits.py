"""scripts/bench bits: processes that a launcher starts give the bits of virtual ranks."""

from __future__ import annotations

import shutil
import sys
import sysconfig

import pytest

from ringattn.conformance import simulated
from scripts.benchmarks import bits

MPIRUN = shutil.which("mpirun", path=sysconfig.get_path("scripts"))


@pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed")
def test_mpi_gives_the_bits_of_one_rank() -> None:
    assert MPIRUN is not None
    found = bits.launched([MPIRUN, "-n", "2", sys.executable], 150)
    for name, case in bits.cases(150):
        assert {*found[name]} == {bits.digest(simulated(case))}
    assert len({hashes[0] for hashes in found.values()}) == len(found)
