"""Break what each guarantee depends on, in copies of the tree, and check that its tests fail.

    python tests/run_mutations.py [--only WORD] [--jobs 2] [--sample N --seed S] [--survivors 0]

tests/guarantees.md lists the guarantees, and tests/mutants.py finds the ways to break a definition.
"""

import argparse
import ast
import difflib
import importlib.util
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from mutants import find_definition, mutants

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("fork")


class Guarantee(NamedTuple):
    """A promise, the definition that it depends on, and the tests that notice it broken."""

    promise: str
    definition: str
    tests: str
    equivalent: frozenset[str]


class Mutant(NamedTuple):
    """One way to break a guarantee: the module that holds its definition, as it is and broken."""

    guarantee: Guarantee
    label: str
    path: Path
    before: str
    after: str


def read_guarantees() -> list[Guarantee]:
    """Return the rows of tests/guarantees.md, each with its mutants that make no difference."""
    text = (ROOT / "tests" / "guarantees.md").read_text()
    rows = re.findall(r"^\| (.+) \| `(.+)` \| (.+) \|$", text, re.MULTILINE)
    equivalent = re.findall(r"^- `([^`]+)`: `([^`]+)`: ", text, re.MULTILINE)
    return [Guarantee(*row, frozenset(label for name, label in equivalent if name == row[1])) for row in rows]


def mutants_of(guarantee: Guarantee, package: Path = ROOT / "src" / "transferkit") -> Iterator[Mutant]:
    """Yield all mutants of a guarantee's definition, the equivalent ones too."""
    stem, _, name = guarantee.definition.rpartition(":")
    outermost = re.compile(rf"^(def|class) {name.split('.')[0]}\b", re.MULTILINE)
    for path in sorted(package.rglob(f"{stem or '*'}.py")):
        if not outermost.search(text := path.read_text()):
            continue
        module = ast.parse(text)
        if (definition := find_definition(module, name)) is not None:
            before = ast.unparse(module)
            for label, after in mutants(module, definition):
                yield Mutant(guarantee, label, path.relative_to(package), before, after)


def find_tests(names: str) -> list[str]:
    """Return the files, or the functions in them, that have these names, for pytest."""
    files = {path.relative_to(ROOT): path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    found = []
    for name in names.split():
        function = re.compile(rf"^def {name}\(", re.MULTILINE)
        places = [str(path) for path in files if path.stem == name]
        places += [f"{path}::{name}" for path, text in files.items() if function.search(text)]
        if not places:
            raise LookupError(f"there is no test or file of tests called {name}")
        found += places
    return found


def run_pytest(tree: Path, tests: list[str]) -> None:
    """Run tests on the library in a tree and end the process with pytest's exit status."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": f"{tree}/src", "OMP_NUM_THREADS": "1"}
    sys.path[0] = f"{tree}/src"
    pytest = importlib.import_module("pytest")
    ignored = "ignore::pytest.PytestAssertRewriteWarning"  # hypothesis is imported already
    os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", ignored, "-m", "not gpu", *tests])))


def status_of(tree: Path, tests: list[str], limit_s: float) -> int | None:
    """Return pytest's exit status; None if it did not end in time."""
    process = FORK.Process(target=run_pytest, args=(tree, tests))
    process.start()
    process.join(limit_s)
    status = process.exitcode
    with suppress(ProcessLookupError):
        os.killpg(int(process.pid or 0), signal.SIGKILL)  # and whatever the tests left
    process.join()
    return status


def job_tree(folder: str) -> Path:
    """Return this process's copy of what the tests need, made when it is first asked for."""
    tree = Path(folder) / str(os.getpid())
    if not tree.exists():
        for name in ("src", "tests", "examples", "docs"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tree / name)
    return tree


def seconds_of(tests: list[str], folder: str) -> float | None:
    """Return how long tests take on the tree as it is; None if one fails."""
    tree, started = job_tree(folder), time.monotonic()
    return time.monotonic() - started if status_of(tree, tests, 3600) == 0 else None


def survives(mutant: Mutant, limit_s: float, folder: str) -> bool:
    """Say whether all tests pass on a mutant."""
    path = job_tree(folder) / "src" / "transferkit" / mutant.path
    compiled = Path(importlib.util.cache_from_source(str(path)))
    path.write_text(mutant.after)
    status = status_of(job_tree(folder), find_tests(mutant.guarantee.tests), limit_s)
    path.write_text(mutant.before)
    compiled.unlink(missing_ok=True)  # Python compares sizes and seconds only
    return status == 0


def main() -> None:
    """Print the mutants that no test notices, and fail if there are more than allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="guarantees that have this in promise, definition or tests")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sample", type=int, help="number of mutants to draw at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", type=int, default=0, help="how many may go unnoticed")
    options = parser.parse_args()
    chosen = [one for one in read_guarantees() if options.only in " ".join(one[:3])]
    todo = [mutant for one in chosen for mutant in mutants_of(one) if mutant.label not in one.equivalent]
    if options.sample is not None and options.sample < len(todo):
        todo = sorted(random.Random(options.seed).sample(todo, options.sample), key=todo.index)
    if not todo:
        sys.exit(f"no guarantee has {options.only!r} in it")
    for name in ("hypothesis", "pytest", "torch", "torchvision.transforms.v2"):
        importlib.import_module(name)  # before the fork, which saves each run of tests four seconds
    survivors = 0
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.jobs, FORK) as pool:
        tests = sorted({test for mutant in todo for test in find_tests(mutant.guarantee.tests)})
        if (seconds := pool.submit(seconds_of, tests, folder).result()) is None:
            sys.exit(f"these tests fail on the tree as it is: python -m pytest -m 'not gpu' {' '.join(tests)}")
        unnoticed = pool.map(survives, todo, repeat(max(60, seconds)), repeat(folder))
        for number, (mutant, survived) in enumerate(zip(todo, unnoticed, strict=True), start=1):
            if survived:
                survivors += 1
                lines = difflib.unified_diff(mutant.before.splitlines(), mutant.after.splitlines(), n=1, lineterm="")
                print(f"\n{mutant.guarantee.definition} survives {mutant.label!r} in {mutant.path}")
                print("\n".join(list(lines)[2:]), flush=True)
            if number % 25 == 0:
                print(f"{number} of {len(todo)} mutants done", flush=True)
    print(f"{len(todo) - survivors} of {len(todo)} mutants are noticed")
    sys.exit(survivors > options.survivors)


if __name__ == "__main__":
    main()
