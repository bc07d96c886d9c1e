"""The trainer as a module, and a corpus small enough to read."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ringattn.trainer.config import Config

ROOT = Path(__file__).parents[2]


def load_trainer() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("trainer_under_test", ROOT / "launch" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 12 small files, one of them longer than any context used here, and things to be passed over."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for i in range(11):
        (folder / "deep" / f"{i}.txt").write_text("".join(f"{i}.{j} abc\n" for j in range(i + 2)))
    (folder / "long.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    (folder / "empty.txt").write_text("")
    (folder / "picture.bin").write_bytes(b"\x00\x01\x02")
    (folder / ".hidden").write_text("secret")
    return folder


@pytest.fixture
def tiny(texts: Path) -> Config:
    return Config(data=texts, length=61, layers=2, width=16, heads=4, kv_heads=2, steps=3, batch=1, check=3, warmup=1)
