"""Where each module of the package lies, and that imports go one way: down this list."""

import ast
from pathlib import Path

import pytest

import transferkit as tk

ORDER = [
    {"errors"},
    {"base"},
    {"compute"},
    {"data"},
    {"model"},
    {"features", "saving"},
    {"linear"},
    {"analysis"},
    {"results"},
    {"training"},
    {"trainer"},
    {"searching", "probing", "fine_tuning", "data_audit", "explaining"},
    {"api"},
    {"__init__"},
    {"command"},
    {"__main__"},
]
"""The files and folders of the package, from the lowest up: each may import what stands above it here, and itself."""

SOURCE = Path(tk.__file__).parent
MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, wherever in the file, for annotations too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("transferkit.") in MODULES else str(node.module) for name in parts}
    return {name.removeprefix("transferkit.") for name in found if name.split(".")[0] == "transferkit"}


GRAPH = {module: imports_of(module) for module in MODULES}


def room(module: str) -> str:
    """The file or folder at the root of the package that a module lies in."""
    return module.split(".")[0]


def test_the_root_is_a_table_of_contents():
    """The root holds the files and folders that the order names, and ten files."""
    assert {room(module) for module in MODULES} == set(LEVEL)
    assert len([module for module in MODULES if "." not in module]) == 10


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    """A module imports from its own folder and from what lies below it, from modules and not from folders."""
    assert GRAPH[module] <= set(MODULES)
    assert not [
        name for name in GRAPH[module] if room(name) != room(module) and LEVEL[room(name)] >= LEVEL[room(module)]
    ]


def test_there_are_no_cycles():
    """No module imports itself in the end."""

    def reachable(module: str) -> set[str]:
        seen, ahead = set(), [module]
        while ahead:
            new = GRAPH[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    assert [module for module in MODULES if module in reachable(module)] == []


def test_freezing_and_head_do_not_need_each_other():
    """Freezing works on any module, and heads on any backbone."""
    assert "model.head" not in GRAPH["model.freezing"]
    assert "model.freezing" not in GRAPH["model.head"]


@pytest.mark.parametrize("module", MODULES)
def test_functions_and_classes_are_documented(module):
    """Every module, and every public function and class in it, has a docstring."""
    tree = ast.parse(MODULES[module].read_text())
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare
    assert ast.get_docstring(tree)
