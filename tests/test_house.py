"""The house: who may import whom, and that nothing optional is needed to begin."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ringattn"
OPTIONAL = ("deepspeed", "flash_attn", "matplotlib", "mpi4py", "safetensors", "transformers", "triton")

# What each module or folder may import of the package. Members of a folder never import each other, save those named.
VALUES = {"errors", "bands", "masks", "layouts", "tiles"}
PLANS = VALUES | {"demand", "accounting", "plans"}
MESH = {"mesh", "sharding", "agreement", "transports.base"}
MAY: dict[str, set[str]] = {
    "errors": set(),
    "reference.measure": set(),
    "reference": {"reference.measure"},
    "bands": set(),
    "masks.base": {"bands", "errors"},
    "masks.spelling": {"errors", "masks.base", "masks.banded", "masks.blockwise"},
    "masks": {"bands", "errors", "masks.base"},
    "layouts.base": {"bands"},
    "layouts.choice": {"errors", "masks", "layouts.base", "layouts.balanced", "layouts.simple"},
    "layouts": {"bands", "masks", "errors", "layouts.base"},
    "tiles": {"bands", "layouts", "masks"},
    "demand": {"bands", "layouts", "masks", "tiles"},
    "accounting": VALUES | {"plans"},  # plans for its types only
    "plans": VALUES | {"accounting", "verification"},  # verification where plan.verify() is called
    "verification": PLANS,
    "assembly": PLANS,
    "transports.base": {"errors"},
    "transports": {"errors", "transports.base"},
    "agreement": {"errors", "transports.base"},
    "mesh": {"errors", "transports.base", "transports.local", "transports.torch_distributed"},
    "sharding": {"errors", "bands", "layouts", "masks", "mesh", "agreement"},
    "schedules.base": PLANS | {"assembly"},
    "schedules": PLANS | {"assembly", "schedules.base"},
    "planning": PLANS
    | MESH
    | {"assembly", "mechanisms.base", "schedules.base", "schedules.ring", "schedules.route", "schedules.scan"},
    "mechanisms.base": {"errors"},
    "mechanisms": {"errors", "mechanisms.base", "mechanisms.dropout"},
    "kernels.base": {"mechanisms.base", "tiles"},
    "kernels.lowering": {"bands", "tiles"},
    "kernels.choice": {"errors", "mechanisms.base", "kernels.base"}
    | {"kernels.chunked", "kernels.onednn", "kernels.reference", "kernels.sdpa"},
    # a kernel serves one mechanism, and may be lowered to
    "kernels": {"bands", "tiles", "mechanisms.base", "mechanisms.softmax", "kernels.base", "kernels.lowering"},
    "call": PLANS | {"agreement", "kernels.base", "mechanisms.base", "transports.base"},
    "cargo.base": PLANS | {"mechanisms.base", "transports.base"},
    "cargo": PLANS | {"call", "cargo.base", "mechanisms.base", "transports.base"},
    "engine": PLANS | {"call", "cargo.base", "cargo.keys", "cargo.summaries", "mechanisms.base", "transports.base"},
    "autograd": {"call", "engine", "errors"},
    "functional": PLANS
    | MESH
    | {"call", "autograd", "planning", "schedules.base", "kernels.base", "kernels.choice"}
    | {"mechanisms.base", "mechanisms.softmax"},
    "startup": {"errors", "mesh", "transports.torch_distributed"},
    "simulator": {"errors", "mesh", "transports.base", "transports.simulator"},
}
OUTER = ("training", "inference", "integrations", "performance", "cli")


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> list[tuple[str, int]]:
    """The modules of the package that a file imports, and the lines; ``""`` is the package itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = {f"ringattn.{_name(p)}" for p in PACKAGE.rglob("*.py")}
            names = [full if full in modules else node.module for full in inner]
        found += [(n.partition(".")[2], node.lineno) for n in names if n.split(".")[0] == "ringattn"]  # type: ignore[attr-defined]
    return found


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_arrows(path: Path) -> None:
    name = _name(path)
    if name.split(".")[0] in OUTER:
        return  # what users hold may import everything
    allowed = MAY.get(name, MAY.get(name.split(".")[0]))
    assert allowed is not None, f"{name} is not in the table of arrows"
    front = f"{name}." if path.name == "__init__.py" else None  # a folder's front may show its members
    wrong = [
        f"line {line}: {target or 'ringattn'}"
        for target, line in _imports(path)
        if target not in allowed and not (front and target.startswith(front))
    ]
    assert not wrong, f"{name} may import {sorted(allowed)}"


def test_no_module_bears_the_name_of_a_public_function() -> None:
    import ringattn

    functions = {name for name in ringattn.__all__ if callable(getattr(ringattn, name))}
    assert not functions & {_name(path).split(".")[0] for path in MODULES}


def test_the_package_imports_without_any_optional_dependency() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); import ringattn, ringattn.cli"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=PACKAGE.parent, timeout=120)


def test_importing_the_package_imports_nothing_heavy_but_torch() -> None:
    code = f"import ringattn, sys; print([m for m in {(*OPTIONAL, 'typer', 'rich')!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=120, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_the_top_level_is_kept() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    if listed.returncode:
        return  # an unpacked source archive has no index to look at
    top = {line.split("/")[0] for line in listed.stdout.split()}
    allowed = {"ringattn", "launch", "tests", "scripts", "pyproject.toml", "README.md", "LICENSE"}
    assert not {name for name in top if not name.startswith(".")} - allowed
