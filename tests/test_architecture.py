"""Who may import whom, how long a module may be, and what `import octavo` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import octavo

ROOT = Path(octavo.__file__).parent
LAYERS = (
    ("names", "files", "patterns"),
    ("formats", "rounding", "scaling", "table", "recipes", "reference"),
    ("kernels",),
    ("casts", "qtensor", "cuts", "archive", "checkpoint"),
    ("torch", "jax", "engine", "diagnose"),
    ("mpemu",),
    ("lab",),
    ("cli", "cli_runs"),
)
"""From the bottom up: a module imports from its own layer and from those below."""
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
BASE = (*LAYERS[0], *LAYERS[1])
NOT_A_NAME = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers", "handler", "handlers"}

MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: `torch` for torch/ops.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, absolute: `octavo.formats`, `numpy`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found |= {name.name for name in names}
            case ast.ImportFrom(level=0, module=str(module), names=names):
                found |= {f"{module}.{name.name}" for name in names} if module == "octavo" else {module}
            case ast.ImportFrom():
                raise AssertionError(f"{path}:{node.lineno}: a relative import; write octavo. out")
    return found


def parts_imported(path: Path) -> set[str]:
    """The parts of octavo that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("octavo.")}


def test_every_part_of_the_package_has_its_layer() -> None:
    assert {part_of(path) for path in MODULES} <= set(RANK)


@every_module
def test_nothing_imports_what_is_above_it(path: Path) -> None:
    own = RANK[part_of(path)]
    above = {part for part in parts_imported(path) if RANK.get(part, -1) > own}
    assert not above


@every_module
def test_modules_import_from_one_another_and_not_through_the_package(path: Path) -> None:
    assert parts_imported(path) <= set(RANK)


@pytest.mark.parametrize("name", BASE)
def test_the_base_needs_numpy_and_the_standard_library_alone(name: str) -> None:
    path = ROOT / f"{name}.py"
    roots = {module.split(".")[0] for module in imports(path)} - {"octavo"}
    assert roots <= {"numpy", *sys.stdlib_module_names}
    assert parts_imported(path) <= set(BASE)


@every_module
def test_the_frameworks_know_nothing_of_each_other(path: Path) -> None:
    other = {"torch": "jax", "jax": "torch"}.get(part_of(path))
    assert other not in parts_imported(path)
    assert other not in {module.split(".")[0] for module in imports(path)}


@every_module
def test_a_module_stays_under_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


@every_module
def test_a_module_is_named_for_what_it_holds(path: Path) -> None:
    words = {word for part in path.relative_to(ROOT).parts for word in part.removesuffix(".py").split("_")}
    assert not words & NOT_A_NAME


def run(program: str) -> list[str]:
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_importing_octavo_loads_no_framework() -> None:
    loaded = run("import sys, octavo; print(*sys.modules)")
    assert "octavo" in loaded
    assert not {"numpy", "torch", "jax", "numba"} & set(loaded)


def test_formats_recipes_and_the_reference_load_no_framework() -> None:
    loaded = run("import sys; from octavo import Recipe, formats, recipes, reference, scaling; print(*sys.modules)")
    assert "numpy" in loaded
    assert not {"torch", "jax", "numba"} & set(loaded)


def test_every_public_name_is_there_and_no_other() -> None:
    for name in octavo.__all__:
        assert name in dir(octavo)
        assert getattr(octavo, name) is not None
    with pytest.raises(AttributeError, match="module 'octavo' has no attribute 'encoed'"):
        _ = octavo.encoed
