"""Errors, public names, docstrings, and who imports whom."""

import ast
import doctest
import inspect
from pathlib import Path

import pytest

import transferkit as tk
from transferkit import errors
from transferkit.errors import TransferKitError, close_matches

SOURCE = Path(tk.__file__).parent
MODULES = sorted(path.stem for path in SOURCE.glob("*.py"))
ERRORS = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Exception) and value is not TransferKitError
]


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, wherever in the file but for annotations alone."""
    found = set()
    tree = ast.parse((SOURCE / f"{module}.py").read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add("a relative import")
        elif isinstance(node, ast.ImportFrom) and node.module == "transferkit":
            found |= {alias.name if alias.name in MODULES else "__init__" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transferkit."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "transferkit"]
            found |= {name.split(".")[1] if "." in name else "__init__" for name in names}
    return found


GRAPH = {module: imports_of(module) for module in MODULES}


def reachable(module: str) -> set[str]:
    seen, ahead = set(), [module]
    while ahead:
        for name in GRAPH[ahead.pop()] - seen:
            seen.add(name)
            ahead.append(name)
    return seen


def test_there_are_errors():
    """The walk finds the errors."""
    assert len(ERRORS) > 10


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_the_librarys_and_a_builtin(error):
    """Each error can be caught as `TransferKitError` and as a builtin more telling than Exception."""
    builtin = [base for base in error.__mro__ if base.__module__ == "builtins"]
    assert issubclass(error, TransferKitError)
    assert builtin[0] not in (Exception, BaseException, object)
    assert error.__doc__


def test_base_error_is_public():
    """The base of all errors is a public name."""
    assert tk.TransferKitError is TransferKitError


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("addam", ["adam", "sgd"], "Did you mean 'adam'?"),
        ("block5_conv", ["block5_conv1", "block5_conv2", "head"], "Did you mean 'block5_conv2' or 'block5_conv1'?"),
        ("xyz", ["adam", "sgd"], "Known: 'adam', 'sgd'."),
        (5, ["adam"], "Known: 'adam'."),
    ],
)
def test_close_matches_names_what_comes_close(name, known, hint):
    """Names that come close are listed, the closest first; if there are none, all."""
    assert close_matches(name, known) == hint


def test_public_names_are_sorted_and_once_each():
    """`__all__` is in order."""
    assert sorted(set(tk.__all__)) == tk.__all__


@pytest.mark.parametrize("name", tk.__all__)
def test_public_name_exists_and_is_documented(name):
    """Every public name can be imported and has a docstring of its own."""
    value = getattr(tk, name)
    docstring = vars(value)["__doc__"] if inspect.isclass(value) else value.__doc__
    assert docstring
    assert not docstring.startswith(f"{name}(")  # what a dataclass writes of itself


@pytest.mark.parametrize("name", [name for name in tk.__all__ if inspect.isfunction(getattr(tk, name))])
def test_every_public_function_has_an_example_that_runs(name):
    """pytest runs the examples in docstrings; each public function has one that is not skipped."""
    found = doctest.DocTestFinder(recurse=False).find(getattr(tk, name), name)
    assert [example for test in found for example in test.examples if not any(example.options.values())]


@pytest.mark.parametrize("name", [name for name in tk.__all__ if inspect.isclass(getattr(tk, name))])
def test_public_methods_are_documented(name):
    """Every public method has a docstring; a property has one or is described in that of its class."""
    cls = getattr(tk, name)
    bare = []
    for method, value in vars(cls).items():
        if method.startswith("_"):
            continue
        described = isinstance(value, property) and f"{method}:" in cls.__doc__
        if (inspect.isfunction(value) or isinstance(value, property)) and not value.__doc__ and not described:
            bare.append(method)
    assert not bare


@pytest.mark.parametrize("module", MODULES)
def test_functions_and_classes_are_documented(module):
    """Every module, and every public function and class in it, has a docstring."""
    tree = ast.parse((SOURCE / f"{module}.py").read_text())
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare
    assert ast.get_docstring(tree)


def test_errors_import_nothing_of_the_package():
    """`errors` stands alone, so that everything can import it."""
    assert GRAPH["errors"] == set()


@pytest.mark.parametrize(
    "module",
    ["device", "preprocessing", "weights", "images", "targets", "randomness", "schedules", "data", "augmentation"],
)
def test_parts_below_know_nothing_of_models(module):
    """Devices, images, targets and data serve without a model."""
    assert reachable(module).isdisjoint({"backbone", "freezing", "head", "step", "trainer", "__init__"})


@pytest.mark.parametrize("module", ["backbone", "freezing", "head", "step", "checkpoint"])
def test_models_know_nothing_of_the_trainer(module):
    """Models can be built and used without the trainer."""
    assert reachable(module).isdisjoint({"trainer", "__init__"})


def test_freezing_and_head_do_not_need_each_other():
    """Freezing works on any module, and heads on any backbone."""
    assert "head" not in reachable("freezing")
    assert "freezing" not in reachable("head")


def test_only_the_package_and_the_search_import_the_trainer():
    """Nothing but the list of public names, and the search, imports the trainer."""
    assert [module for module in MODULES if "trainer" in GRAPH[module]] == ["__init__", "hyperparameter_search"]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_itself_in_the_end(module):
    """There are no cycles, and nothing imports the package's own list of public names."""
    assert module not in reachable(module)
    assert "__init__" not in GRAPH[module]
    assert GRAPH[module] <= set(MODULES)
