"""Errors, public names, docstrings, and who imports whom."""

import doctest
import inspect

import pytest

import transferkit as tk
from transferkit import errors
from transferkit.errors import TransferKitError, close_matches, printable

ERRORS = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Exception) and value is not TransferKitError
]


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


def test_what_could_forge_a_line_is_escaped_and_letters_stay():
    """Control characters and marks that turn the direction of text are escaped; letters of every alphabet are not."""
    assert printable("a\x1b[2Jb\u202ec \u00e9 \u732b") == "a\\x1b[2Jb\\u202ec \u00e9 \u732b"


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
