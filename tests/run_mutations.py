"""Break each line that tests/MUTATIONS.md lists, in a copy, and see that its test fails.

    python tests/run_mutations.py [--only WORD] [--jobs 2]

An entry is a heading with the promise, a line "Test: `path::name`", and a diff of one place in one file. The test must
pass on the tree as it is and fail on the copy; the diff's old lines must be there exactly once.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENTRY = re.compile(
    r"^### (?P<promise>.+?)\n+Test: `(?P<test>[^`]+)`\n+```diff\n--- (?P<file>\S+)\n(?P<diff>.*?)```", re.M | re.S
)
LIMIT_S = 240


@dataclass(frozen=True)
class Mutation:
    """One way to break a promise."""

    promise: str
    test: str
    file: str
    old: str
    new: str


def read_mutations(text: str) -> list[Mutation]:
    """Return the entries of the list."""
    found = []
    for entry in ENTRY.finditer(text):
        lines = entry["diff"].splitlines()
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line.startswith(sign)) for sign in "-+")
        found.append(Mutation(entry["promise"], entry["test"], entry["file"], old, new))
    return found


def passes(tree: Path, tests: list[str]) -> bool:
    """Say whether tests pass on the library in a tree."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *tests]
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode in (4, 5):  # no such test, or none that ran
        raise RuntimeError(f"pytest did not run {tests}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def copy_tree(folder: str) -> Path:
    """Copy what the tests need."""
    tree = Path(folder) / "tree"
    for name in ("src", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def survives(mutation: Mutation) -> str | None:
    """Return what is wrong with a mutation; None if its test notices it."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(folder)
        path = tree / mutation.file
        content = path.read_text()
        if (count := content.count(mutation.old)) != 1:
            return f"its old lines are in {mutation.file} {count} times: expected once"
        path.write_text(content.replace(mutation.old, mutation.new))
        return f"{mutation.test} still passes" if passes(tree, [mutation.test]) else None


def main() -> None:
    """Run all, and fail if one survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="entries whose promise, test or file has this in it")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    mutations = read_mutations((ROOT / "tests" / "MUTATIONS.md").read_text())
    mutations = [one for one in mutations if options.only in f"{one.promise} {one.test} {one.file}"]
    if not mutations or not passes(ROOT, sorted({mutation.test for mutation in mutations})):
        sys.exit("the tests do not pass on the tree as it is, or none was chosen")
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, fault in zip(mutations, pool.map(survives, mutations), strict=True):
            survivors += fault is not None
            print(
                f"{'SURVIVES' if fault else 'noticed '}  {mutation.promise}{f': {fault}' if fault else ''}", flush=True
            )
    print(f"{len(mutations) - survivors} of {len(mutations)} mutations are noticed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
