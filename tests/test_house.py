"""The house: imports go down only, the ground floor is jax alone, files are short.

A new module must be given its floor here.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "boot_jax"

# A package stands for all of its modules.
FLOORS = {
    0: "schedules prediction solvers guidance objectives",
    1: "models jsons",
    2: "conditions teachers student auxiliary tokenizers",
    3: "config validation sharding distributed interruption data shapes batches "
    "prompts workdir training",
    4: "sampling evaluation summary export",
    5: "main pipeline run inspection teaching prompted trained gallery judging recall "
    "stages stored student_batches comparing",
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
GROUND = FLOORS[0].split()
GROUND_NEEDS = {"jax", "numpy", *sys.stdlib_module_names}
FOREIGN_TO_GROUND = ("flax", "absl", "orbax", "optax", "ml_collections")

MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
LONGEST_MODULE, LONGEST_MAIN = 400, 100


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Every module that is imported, wherever in the file, by its full name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            # ``from package import module`` imports the module.
            full = [f"{base}.{alias.name}" for alias in node.names]
            found += [name if name in NAMES else base for name in full]
    return found


def floor_of(module: str) -> int:
    """The floor of a module; the package itself, with all its names, is the roof."""
    if module == PACKAGE:
        return max(FLOORS)
    return FLOOR[module.split(".")[1]]


def broken_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of a module, a line each."""
    floor, wrong = floor_of(module), []
    for name in imports(source, module, is_package):
        top = name.split(".")[0]
        if top == PACKAGE and floor_of(name) > floor:
            wrong.append(
                f"{module} (floor {floor}) imports {name} (floor {floor_of(name)}); "
                "imports only go down"
            )
        if top != PACKAGE and floor == 0 and top not in GROUND_NEEDS:
            wrong.append(f"{module} (floor 0) imports {name}; there it is jax alone")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_only_go_down(path):
    name = module_name(path)
    room = name.split(".")[1] if name != PACKAGE else None
    assert room is None or room in FLOOR, f"{path.relative_to(ROOT)} has no floor"
    wrong = broken_imports(path.read_text(), name, path.name == "__init__.py")
    assert not wrong, "\n".join([str(path.relative_to(ROOT)), *wrong])


def test_every_floor_is_stood_on():
    """Or the test above would look at nothing."""
    rooms = {name.split(".")[1] for name in NAMES if name != PACKAGE}
    assert set(GROUND) <= rooms
    assert {FLOOR.get(room) for room in rooms} >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        ("boot_jax.solvers", "import flax.linen as nn", "flax.linen"),
        ("boot_jax.solvers", "from absl import logging", "absl"),
        (
            "boot_jax.solvers",
            "from boot_jax.student import Student",
            "boot_jax.student",
        ),
        ("boot_jax.solvers", "from boot_jax import student", "boot_jax.student"),
        ("boot_jax.solvers", "import boot_jax", "boot_jax"),
        ("boot_jax.teachers.base", "from ..training import step", "training.step"),
        ("boot_jax.models.dit", "def f():\n    import boot_jax.data", "boot_jax.data"),
        ("boot_jax.data", "from .evaluation.plots import encode_png", "plots"),
        ("boot_jax.solvers", "from .prediction import expand", None),
        ("boot_jax.student", "from boot_jax.teachers import base\nimport optax", None),
        ("boot_jax.training.step", "from . import state\nimport flax", None),
    ],
)
def test_a_broken_import_is_named(module, source, wrong):
    found = broken_imports(source, module)
    if wrong is None:
        assert not found
    else:
        assert len(found) == 1
        assert found[0].startswith(f"{module} (floor ")
        assert wrong in found[0]


REFUSE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FOREIGN_TO_GROUND!r}:
            raise ImportError(f"{{name}} is not for the ground floor")

sys.meta_path.insert(0, Refuse())
"""


def run_without_foreigners(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REFUSE + program],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_ground_floor_needs_jax_alone():
    names = ", ".join(f"{PACKAGE}.{room}" for room in GROUND)
    program = f"""
import {names}
foreign = set({FOREIGN_TO_GROUND!r}) & {{name.split(".")[0] for name in sys.modules}}
assert not foreign, foreign
"""
    done = run_without_foreigners(program)
    assert done.returncode == 0, done.stderr
    # And the refusal does refuse.
    done = run_without_foreigners("import boot_jax.models.dit")
    assert "flax.linen is not for the ground floor" in done.stderr or (
        "flax is not for the ground floor" in done.stderr
    )


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_are_short(path):
    limit = LONGEST_MAIN if module_name(path) == "boot_jax.main" else LONGEST_MODULE
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines, over {limit}"
