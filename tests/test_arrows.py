"""Which room of the library may know which: imports go downward, wherever in a file they stand."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent.parent / "masa_lib"
#: from the bottom up; a room imports those in front of it
ROOMS = ("errors", "hub", "crash_safe_files", "crash_safe_folders", "config", "tasks", "models", "engines", "method",
         "gates", "runs", "analysis", "training", "recipes", "scaleout", "lessons", "cli")
#: what every room may use
GROUND = {"errors", "hub", "crash_safe_files", "crash_safe_folders", "config"}
#: what the method alone may know, so that it can be read without the rest
OF_METHOD = {"errors", "config", "tasks", "engines"}


def imports() -> dict[str, set[str]]:
    """Module to the modules of the library that it imports, as dotted names below `masa_lib`."""
    paths = {".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix(".__init__"): path
             for path in LIBRARY.rglob("*.py") if path.stem != "__main__"}  # a program, which may call the commands
    return {name: {found for node in ast.walk(ast.parse(path.read_text(encoding="utf8")))
                   for found in _imported(node) if found in paths and found != name} for name, path in paths.items()}


def _imported(node: ast.AST) -> set[str]:
    """Every name that an import could mean, a module or something in it."""
    if isinstance(node, ast.Import):
        return {alias.name.removeprefix("masa_lib.") for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "masa_lib":
        module = node.module.removeprefix("masa_lib").removeprefix(".")
        names = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
        return names | {module}
    return set()


def room(module: str) -> str:
    return module.split(".")[0]


def arrows() -> set[tuple[str, str]]:
    """Pairs of different rooms, the first of which imports the second."""
    return {(room(module), room(other)) for module, others in imports().items() for other in others
            if room(module) != room(other)}


def test_every_module_is_in_a_room() -> None:
    assert {room(module) for module in imports()} - {"__init__"} == set(ROOMS)


def test_contributors_are_told_every_room_in_this_order() -> None:
    text = (LIBRARY.parent / "CONTRIBUTING.md").read_text(encoding="utf8")
    told = re.findall(r"^\| `masa_lib/(\w+)", text, re.MULTILINE)
    assert told == [name for name in ROOMS if name not in GROUND - {"config"}]


def test_imports_go_downward() -> None:
    wrong = [f"{module} -> {other}" for module, others in imports().items() for other in others
             if room(module) in ROOMS and ROOMS.index(room(module)) < ROOMS.index(room(other))]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(imports()).prepare()  # raises CycleError, with the circle


def test_the_method_knows_tasks_and_engines_alone() -> None:
    assert {other for module, other in arrows() if module == "method"} <= OF_METHOD


def test_lessons_are_imported_by_their_commands_alone() -> None:
    assert {module for module, other in arrows() if other == "lessons"} == {"cli"}


def test_the_rooms_know_few_others() -> None:
    assert len([pair for pair in arrows() if pair[1] not in GROUND]) <= 60
