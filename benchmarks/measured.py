"""Keep track of which pages hold figures that are older than the code they measure.

    python benchmarks/measured.py                        # list such pages, and let each say so
    python benchmarks/measured.py docs/performance.md    # after measuring again: the page is up to date

A page depends on the modules in `docs/results/measured.json`, which also holds their digest when the page was last
measured. Comments and docstrings do not count. tests/test_measured.py holds that no page keeps silent.
"""

import ast
import functools
import hashlib
import json
import re
import sys
from pathlib import Path

import transferkit

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(transferkit.__file__).parent
RECORD = ROOT / "docs" / "results" / "measured.json"
PLACE = "<!-- whether the code has changed since -->\n"
SENTENCE = "*The code has changed since the figures on this page were measured.*\n"


def code_of(source: str) -> str:
    """Return the lines of a module without docstrings, comments, blank lines and indentation."""
    texts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr) and _is_text(node.value)]
    described = {line for text in texts for line in range(text.lineno, (text.end_lineno or 0) + 1)}
    lines = [line.strip() for number, line in enumerate(source.splitlines(), start=1) if number not in described]
    return "\n".join(line for line in lines if line and not line.startswith("#"))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@functools.cache
def read_code(file: Path) -> str:
    return code_of(file.read_text())


def digest(modules: list[str]) -> str:
    """Return the digest of what the modules do: files of the package, or folders of it.

    Raises:
        FileNotFoundError: When the package has no such module.
    """
    state = hashlib.sha256()
    for name in sorted(modules):
        path = PACKAGE / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            state.update(f"{file.relative_to(PACKAGE).as_posix()} {read_code(file)}\n".encode())
    return state.hexdigest()[:16]


def read_record() -> dict[str, dict]:
    return json.loads(RECORD.read_text())


def stale_pages() -> list[str]:
    """Return the pages whose code has changed since they were measured."""
    return [page for page, entry in read_record().items() if digest(entry["modules"]) != entry["digest"]]


def commands(page: str) -> list[str]:
    """Return the benchmarks that a page names."""
    found = re.findall(r"benchmarks/\w+\.py[^\n`;]*", (ROOT / page).read_text())
    return sorted({f"python {command.strip()}" for command in found})


def tell(page: str, *, stale: bool) -> None:
    """Let a page say that its figures are old, or not.

    Raises:
        ValueError: When it has no place for that.
    """
    path = ROOT / page
    text = path.read_text()
    if text.count(PLACE) != 1:
        raise ValueError(f"{page} has {text.count(PLACE)} lines {PLACE.strip()!r}: expected one, after a blank line")
    text = text.replace(PLACE + SENTENCE, PLACE)
    path.write_text(text.replace(PLACE, PLACE + SENTENCE) if stale else text)


def main() -> None:
    record = read_record()
    for page in sys.argv[1:]:
        if page not in record:
            raise SystemExit(f"{page} is not in {RECORD.name}: expected one of {', '.join(record)}")
        record[page]["digest"] = digest(record[page]["modules"])
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    stale = stale_pages()
    for page in record:
        tell(page, stale=page in stale)
    for page in stale:
        print(f"{page}: measure again with\n  " + "\n  ".join(commands(page)))


if __name__ == "__main__":
    main()
