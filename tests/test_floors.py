"""The house: imports run downwards and in no circle, and each rule of a floor holds (CONTRIBUTING, the house)."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import labelpenet

ROOT = Path(labelpenet.__file__).parent
FLOORS = (
    {"errors", "old_recipe", "progress"},
    {"config"},
    {"instances"},
    {"data", "calibration"},
    {"evaluation", "models", "formats", "engine", "visualize"},
    {"training"},
    {"report", "review"},
    {"demo"},
    {"cli", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
STRANGERS = {  # rooms that lie no higher, but are none of a room's business
    "engine": {"models", "formats", "calibration", "evaluation"},
    "formats": {"models", "engine", "calibration"},
    "evaluation": {"models", "engine", "calibration"},
    "calibration": {"data"},
    "models": {"engine", "formats", "evaluation"},
}


@functools.cache
def imports() -> dict[str, set[str]]:
    """For each module the modules of the package that it imports, wherever in the file, but not for types alone."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        found[name] = set()
        for node in ast.walk(tree):
            if id(node) in typing:
                continue
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("labelpenet"):
                found[name] |= {f"{node.module}.{one.name}" for one in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                found[name] |= {one.name for one in node.names if one.name.startswith("labelpenet")}
    return {name: {one for one in others if one in found and one != name} for name, others in found.items()}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_room_has_a_floor():
    assert {room(module) for module in imports()} - {""} <= set(LEVEL)


def test_imports_run_downwards_and_mind_their_own_business():
    wrong = []
    for module, others in imports().items():
        for other in others:
            here, there = room(module), room(other)
            if not here or not there or here == there:
                continue
            if LEVEL[there] > LEVEL[here] or there in STRANGERS.get(here, ()):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: {o for o in others if not name.startswith(f"{o}.")} for name, others in imports().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " > ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
