"""Fixtures for all tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.trainer.conftest import load_trainer
from tests.workers import GlooWorkers, MpiWorkers, Workers

INTEGRATIONS = ("accelerate", "deepspeed", "peft", "transformers")
ABSENT = [name for name in INTEGRATIONS if importlib.util.find_spec(name) is None]
collect_ignore = ["integrations"] if ABSENT else []

# One seed of hypothesis for every run: a suite that passed passes again; the long runs draw their own.
# How fast examples are drawn depends on the machine, and says nothing about the code.
slow = [HealthCheck.too_slow]
settings.register_profile("suite", derandomize=True, deadline=None, print_blob=True, suppress_health_check=slow)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Every test begins with one thread, whatever another has left: matrix products of more round otherwise.

    The suite compares bits with the Gloo ranks, which have one each, and small tensors gain nothing from a second.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of the suite's own: it neither reads nor writes the user's rates."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def gloo(cache: Path) -> Iterator[Workers]:
    """Four Gloo ranks, shared by all tests of the session."""
    workers = GlooWorkers()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def mpi(cache: Path) -> Iterator[Workers]:
    """Four MPI ranks, shared by all tests of the session."""
    workers = MpiWorkers()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def trainer() -> Iterator[ModuleType]:
    """`launch/train.py` as a module."""
    module = load_trainer()
    yield module
    del sys.modules[module.__name__]


def pytest_report_header() -> list[str]:
    """Says which tests are left out, and how to have them."""
    if not ABSENT:
        return []
    return [f"tests/integrations is left out: it needs {', '.join(ABSENT)}. Install them: scripts/setup integrations"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
