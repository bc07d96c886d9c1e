"""The house: who may import whom, and that nothing optional is needed to begin."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ringattn"
OPTIONAL = (
    "accelerate",
    "deepspeed",
    "flash_attn",
    "matplotlib",
    "mpi4py",
    "peft",
    "safetensors",
    "transformers",
    "triton",
)

# What each module may import of the package, "folder.*" standing for the members that have no line of their own:
# members of a folder never import each other, save those named. A permission that nobody uses is an error.
MAY: dict[str, str] = {
    "errors": "",
    "declared": "",
    "readable": "",
    "checking": "readable errors",
    "naming": "checking errors",
    "bands": "errors",
    "handles": "errors",
    "recent": "",
    "reference.measure": "errors",
    "reference.hashes": "",
    "reference.scoring": "errors reference.measure",
    "reference.*": "errors reference.hashes reference.measure reference.scoring",
    "masks.base": "readable bands checking errors handles",
    "masks.spelling": "checking errors naming masks.base masks.banded masks.blockwise",
    "masks.*": "bands checking errors masks.base",
    "layouts.base": "checking bands errors masks",
    "layouts.grouped": "bands layouts.base",
    "layouts.choice": "masks naming layouts.base layouts.balanced layouts.simple",
    "layouts.*": "checking bands errors masks layouts.base",
    "plans.tiles": "bands layouts masks",
    "plans.demand": "bands layouts masks plans.tiles",
    "plans.shape": "payloads.base",
    "plans.exchanges": "bands payloads.base plans.tiles declared",
    "plans.stages": "bands",
    "plans.transfers": "bands plans.stages plans.tiles",
    "plans.clock": "plans.shape plans.steps",
    "plans.walk": "plans.exchanges plans.tiles",
    "plans.buffers": "plans.exchanges",
    "plans.cost": "bands checking errors masks plans.exchanges plans.shape plans.tiles plans.steps declared",
    "plans.steps": "bands layouts masks payloads.base plans.buffers plans.exchanges plans.shape plans.tiles "
    "plans.walk declared",
    "plans.coverage": "bands errors layouts plans.tiles plans.steps",
    "plans.slices": "bands plans.steps",
    "plans.homing": "bands errors plans.steps plans.tiles",
    "plans.verification": "bands checking errors layouts plans.coverage plans.exchanges plans.homing plans.slices "
    "plans.tiles plans.steps declared",
    "plans.plan": "plans.cost plans.steps plans.verification",
    "plans.passing": "bands masks plans.exchanges plans.plan plans.steps plans.tiles",
    "plans.assembly": "bands errors payloads.base plans.tiles plans.demand plans.plan plans.shape plans.steps declared",
    "plans.deal": "errors layouts.base",
    "plans.swap": "bands errors layouts plans.deal plans.shape declared",
    "plans.ulysses": "bands errors layouts payloads.keys plans.cost plans.deal plans.plan plans.swap plans.tiles "
    "plans.verification plans.exchanges",
    "plans.tree": "errors plans.cost",
    "plans.grid": "bands errors layouts masks plans.tiles plans.coverage plans.demand plans.plan",
    "plans.links": "bands plans.assembly",
    "plans.wavefront": "checking errors plans.plan plans.shape plans.verification",
    "plans.wave": "bands errors layouts masks mechanisms.ordered plans.cost plans.coverage plans.grid plans.plan "
    "plans.planning plans.shape plans.wavefront schedules.wave sharding schedules.route plans.shaping",
    "plans.shaping": "checking errors mechanisms.base mechanisms.softmax payloads.queries plans.plan plans.shape "
    "readable payloads.base",
    "plans.candidates": "bands layouts mechanisms.base payloads.base payloads.queries plans.clock plans.deal "
    "plans.demand plans.links plans.shape plans.shaping plans.tiles readable schedules",
    "plans.choice": "errors mechanisms.base mesh naming plans.deal plans.demand plans.links plans.shaping "
    "plans.tiles readable schedules schedules.wave mechanisms.softmax plans.candidates plans.clock plans.shape",
    "plans.planning": "bands checking errors layouts masks mesh sharding mechanisms.base mechanisms.ordered "
    "payloads.queries plans.assembly plans.demand plans.passing readable plans.plan plans.slices schedules "
    "plans.deal plans.swap plans.ulysses plans.choice plans.shaping plans.shape",
    "schedules.base": "checking bands errors payloads.base payloads.keys plans.assembly plans.demand plans.shape "
    "mechanisms.base",
    "schedules.wave": "checking schedules.base",
    "schedules.ulysses": "checking errors plans.shape schedules.base",
    "schedules.all_gather": "bands checking plans.assembly plans.demand plans.tiles schedules.base",
    "schedules.pass_q": "bands errors payloads.base payloads.queries schedules.route",
    "schedules.*": "bands checking errors layouts schedules.base payloads.base payloads.summaries plans.assembly "
    "plans.demand plans.stages plans.transfers plans.tiles",
    "mechanisms.blocks": "",
    "mechanisms.base": "errors mechanisms.blocks",
    "mechanisms.dropout": "checking errors mechanisms.base mechanisms.blocks",
    "mechanisms.lse": "mechanisms.base",
    "mechanisms.choices": "mechanisms.blocks",
    "mechanisms.additive": "",
    "mechanisms.scores": "checking errors mechanisms.additive mechanisms.base mechanisms.blocks",
    "mechanisms.features": "",
    "mechanisms.walk": "",
    "mechanisms.thresholds": "mechanisms.base",
    "mechanisms.ordered": "checking errors mechanisms.base mechanisms.walk mechanisms.blocks",
    "mechanisms.*": "checking errors mechanisms.base mechanisms.choices mechanisms.dropout mechanisms.features "
    "mechanisms.lse mechanisms.scores mechanisms.ordered mechanisms.thresholds mechanisms.blocks",
    "kernels.base": "mechanisms.base naming plans.tiles",
    "kernels.lowering": "bands plans.tiles",
    "kernels.machine": "kernels.base",
    "kernels.rates": "readable bands layouts mechanisms.base plans.plan",
    "kernels.store": "kernels.machine kernels.rates",
    "kernels.trial": "mechanisms.base plans.tiles kernels.base kernels.rates",
    "kernels.choice": "errors naming mechanisms mechanisms.base kernels kernels.base kernels.machine kernels.rates "
    "kernels.store kernels.trial",
    "kernels.*": "bands mechanisms.base mechanisms.softmax plans.tiles kernels.base kernels.lowering "
    "mechanisms.ordered mechanisms.blocks",
    "transports.base": "errors declared",
    "transports.torch_distributed": "errors groups transports.base transports.news declared",
    "transports.news": "errors transports.told",
    "transports.told": "",
    "transports.*": "errors transports.base",
    "groups": "",
    "profile": "errors kernels.store plans.links transports.base",
    "mesh": "plans.links profile checking errors groups transports.base transports.local transports.torch_distributed",
    "sharding": "readable checking bands errors handles layouts masks mesh recent runtime.agreement "
    "runtime.transforms layouts.grouped",
    "runtime.agreement": "checking errors readable runtime.transforms transports.base",
    "runtime.transforms": "errors",
    "runtime.spelling": "errors",
    "runtime.call": "handles kernels.base mechanisms.base payloads.queries plans.passing plans.plan plans.wave "
    "transports.base runtime.agreement runtime.gathering runtime.messages plans.deal plans.swap",
    "runtime.gathering": "mechanisms.base payloads.base payloads.keys payloads.outputs plans.cost plans.grid "
    "plans.plan runtime.messages transports.base",
    "runtime.deterministic": "mechanisms.base payloads.outputs plans.grid runtime.call runtime.gathering "
    "mechanisms.blocks",
    "runtime.passing": "kernels.base kernels.reference mechanisms.base payloads.base payloads.columns payloads.outputs "
    "payloads.queries plans.tiles runtime.call runtime.preparing",
    "runtime.messages": "mechanisms.base payloads.base payloads.columns plans.exchanges plans.plan plans.shape "
    "plans.steps transports.base declared",
    "runtime.arguments": "checking errors mechanisms.base sharding",
    "runtime.request": "checking errors masks sharding kernels.base kernels.choice kernels.rates mechanisms.base "
    "payloads.outputs plans.passing readable plans.plan plans.planning runtime.agreement runtime.call "
    "runtime.gathering runtime.spelling kernels.reference mechanisms.ordered plans.wave schedules.base "
    "schedules.wave transports.base plans.swap plans.ulysses runtime.dealing schedules.ulysses plans.choice "
    "runtime.arguments",
    "runtime.all_to_all": "plans.deal plans.swap transports.base",
    "runtime.engines": "runtime.call runtime.deterministic runtime.engine runtime.passing runtime.wave",
    "runtime.ulysses": "mechanisms.base plans.deal runtime.all_to_all runtime.call runtime.engines",
    "runtime.dealing": "errors mechanisms.base mechanisms.ordered plans.deal plans.swap runtime.call",
    "runtime.wave": "mechanisms.base mechanisms.ordered mechanisms.walk payloads.base payloads.keys plans.wavefront "
    "runtime.call runtime.messages",
    "runtime.folding": "mechanisms.base plans.tree transports.base",
    "runtime.preparing": "mechanisms.base runtime.agreement transports.base",
    "runtime.running": "errors transports.base",
    "runtime.replicated": "bands kernels.base masks mechanisms.base plans.demand plans.planning plans.tiles "
    "runtime.call runtime.folding runtime.preparing sharding",
    "collectives.pooling": "checking kernels.choice layouts masks mechanisms.base mechanisms.softmax readable "
    "runtime.agreement runtime.replicated runtime.request runtime.running runtime.transforms sharding "
    "runtime.arguments",
    "collectives.chosen_rows": "bands checking functional kernels.reference masks mechanisms.base mechanisms.ordered "
    "mechanisms.softmax readable runtime.agreement runtime.call runtime.folding runtime.replicated runtime.request "
    "runtime.running runtime.transforms runtime.wave sharding transports.base runtime.arguments",
    "collectives.stopping": "checking errors functional masks mechanisms.mocha mechanisms.monotonic "
    "mechanisms.ordered runtime.agreement runtime.transforms sharding runtime.arguments",
    "collectives.reduction": "checking mechanisms.base mesh runtime.agreement runtime.folding runtime.transforms "
    "transports.base",
    "collectives.neighbours": "bands checking layouts masks mechanisms.base mechanisms.softmax payloads.base "
    "plans.coverage plans.grid plans.plan plans.planning runtime.agreement runtime.messages runtime.transforms "
    "schedules.route sharding transports.base",
    "runtime.heads": "mechanisms.base payloads.base",
    "runtime.engine": "mechanisms.base payloads.base plans.shape runtime.call runtime.heads runtime.messages "
    "runtime.preparing",
    "runtime.op": "handles runtime.call runtime.request runtime.running runtime.spelling runtime.transforms "
    "transports.base runtime.ulysses runtime.engines",
    "payloads.base": "kernels.base mechanisms.base plans.tiles",
    "payloads.columns": "",
    "payloads.outputs": "mechanisms.base payloads.columns",
    "payloads.queries": "mechanisms.base payloads.base payloads.columns payloads.outputs",
    "payloads.*": "errors kernels.base mechanisms.base plans.tiles payloads.base mechanisms.blocks",
    "functional": "masks sharding kernels.base mechanisms.base mechanisms.ordered mechanisms.softmax "
    "mechanisms.total runtime.op runtime.request runtime.spelling runtime.transforms schedules.base",
    "collectives.cumulative": "checking errors functional runtime.agreement sharding",
    "conformance.battery": "checking mesh conformance.case conformance.drawing conformance.judging conformance.leaks "
    "conformance.running errors kernels layouts masks mechanisms naming readable schedules mechanisms.ordered "
    "plans.choice",
    "conformance.case": "checking errors kernels.base layouts masks mechanisms naming schedules.base "
    "mechanisms.ordered",
    "conformance.drawing": "conformance.case kernels layouts masks mechanisms naming schedules mechanisms.ordered",
    "conformance.judging": "conformance.case conformance.running errors mechanisms reference mechanisms.ordered",
    "conformance.leaks": "conformance.case conformance.running",
    "conformance.running": "conformance.case errors functional masks mesh mechanisms.ordered mechanisms.total "
    "plans.cost plans.plan plans.planning plans.wave plans.wavefront runtime.agreement sharding simulator "
    "plans.ulysses checking schedules.base",
    "saving": "layouts masks mesh sharding",
    "rendezvous": "errors",
    "meeting": "readable checking errors rendezvous runtime.agreement transports.base transports.news",
    "startup": "profile checking errors groups mesh meeting rendezvous transports.mpi transports.torch_distributed",
    "simulator.transport": "errors transports.base",
    "simulator.virtual": "checking errors mesh simulator.transport transports.base",
}
OUTER = ("advice", "cli", "diagnosis", "integrations", "modules", "trainer", "training")


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


def _line(name: str) -> str:
    """The line of the table that a module falls under."""
    return name if name in MAY else f"{name.partition('.')[0]}.*"


INNER = [path for path in MODULES if _name(path).split(".")[0] not in OUTER]  # what users hold may import everything


@pytest.mark.parametrize("path", [path for path in INNER if path.name != "__init__.py"], ids=_name)
def test_arrows(path: Path) -> None:
    name = _name(path)
    assert _line(name) in MAY, f"{name} is not in the table of arrows"
    allowed = MAY[_line(name)].split()
    wrong = [f"line {line}: {target or 'ringattn'}" for target, line in _imports(path) if target not in allowed]
    assert not wrong, f"{name} may import {allowed}"


@pytest.mark.parametrize("path", [path for path in INNER if path.name == "__init__.py"], ids=_name)
def test_the_front_of_a_folder_shows_its_members_and_nothing_else(path: Path) -> None:
    assert not [target for target, _ in _imports(path) if not target.startswith(f"{_name(path)}.")]


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports within functions and for type checkers count: a circle is one whenever it is walked."""
    imports = {_name(path): {target for target, _ in _imports(path)} for path in MODULES}
    left = dict(imports)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other, or what does: {sorted(left)}"


def test_every_permission_is_used() -> None:
    used: dict[str, set[str]] = {}
    for path in INNER:
        used.setdefault(_line(_name(path)), set()).update(target for target, _ in _imports(path))
    unused = {line: sorted(set(may.split()) - used.get(line, set())) for line, may in MAY.items()}
    assert not {line: may for line, may in unused.items() if may or line not in used}


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


def test_the_package_imports_quickly() -> None:
    """Importing it takes what importing PyTorch takes: no compiler, no plots, no command line."""
    code = (
        "import sys, torch; before = {*sys.modules}; import ringattn; "
        "print(*{name.split('.')[0] if not name.startswith('torch.') else name for name in {*sys.modules} - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert {*done.stdout.split()} <= {"ringattn", "numpy", "filelock"}
