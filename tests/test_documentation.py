"""What the documentation says of the code is true."""

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path

import transferkit
from transferkit.base import torch_files

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_tests_that_the_documentation_names_exist() -> None:
    """Every `test_file.py::test_name` on a page is a test."""
    named = {match for page in PAGES for match in re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text())}
    there = {
        (path.name, name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 30
    assert named - there == set()


def test_links_within_the_repository_lead_somewhere() -> None:
    """Every relative link on a page is a file."""
    links = [(page, target) for page in PAGES for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())]
    assert [(page.name, target) for page, target in links if not (page.parent / target).exists()] == []


def test_files_that_pages_name_are_there() -> None:
    """Every file or folder of the repository that a page names, in a command or in the text, exists."""
    pattern = r"(?<![\w./-])(?:\.ci|benchmarks|docs|examples|fuzz|src|tests)/[\w./-]*\w"
    named = [(page, name) for page in PAGES for name in re.findall(pattern, page.read_text())]
    assert len(named) > 30
    package = Path(transferkit.__file__).parent.parent  # which may be installed, and not be in src
    places = {name: package / name[4:] if name.startswith("src/") else ROOT / name for _, name in named}
    assert [(page.name, name) for page, name in named if not places[name].exists()] == []


def test_calls_that_pages_show_are_there() -> None:
    """Every `tk.name` on a page is public, and every `trainer.name(` is a method of `Trainer`."""
    text = "\n".join(page.read_text() for page in PAGES)
    public = set(re.findall(r"\btk\.(\w+)", text))
    methods = set(re.findall(r"\btrainer\.(\w+)\(", text))
    assert len(public) > 8
    assert public - set(transferkit.__all__) == set()
    assert {name for name in methods if not hasattr(transferkit.Trainer, name)} == set()


def test_the_limits_that_security_quotes_are_those_of_the_code() -> None:
    """SECURITY.md has the numbers of parts and of bytes of pickle above which a file is refused."""
    text = (ROOT / "SECURITY.md").read_text()
    assert re.findall(r"more than ([\d,]+) members", text) == [f"{torch_files.MAX_MEMBERS:,}"]
    assert [int(size) * 2**20 for size in re.findall(r"over (\d+) MiB of\s+pickle", text)] == [
        torch_files.MAX_PICKLE_BYTES
    ]


def test_the_reference_has_every_public_name_once() -> None:
    """Each name that `import transferkit` gives is on one page of docs/reference, and no other name is."""
    pages = [page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md")]
    listed = [
        name
        for page in pages
        for name in re.findall(r"^\.\. auto\w+:: transferkit\.(\w+)(?:\(\))?$", page, re.MULTILINE)
    ]
    assert sorted(set(listed) - {"errors"}) == sorted(transferkit.__all__)
    assert len(listed) == len(set(listed))


def test_design_lists_every_module() -> None:
    """The layout in docs/design.md names each file of the package, and no other."""
    layout = re.search(r"```\nsrc/transferkit/\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    assert layout is not None
    package = Path(transferkit.__file__).parent
    listed = re.findall(r"^ +([\w/]+\.py)", layout[1], re.MULTILINE)
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert sorted(listed) == sorted(file for file in files if "__init__" not in file)


def default_of(name: str) -> object:
    """Return a default by the name that docs/defaults.md gives it: `function(argument=)` or `module.CONSTANT`."""
    called = re.fullmatch(r"([\w.]+)\((\w+)=\)", name)
    if called is None:
        module, constant = name.rsplit(".", 1)
        return getattr(importlib.import_module(f"transferkit.{module}"), constant)
    function = functools.reduce(getattr, called[1].split("."), transferkit)
    return inspect.signature(function).parameters[called[2]].default


def test_defaults_are_those_of_the_code() -> None:
    """The values in docs/defaults.md are the code's, and `fine_tune`'s constants are all there."""
    text = (ROOT / "docs" / "defaults.md").read_text()
    rows = re.findall(r"^\| `([\w.]+(?:\(\w+=\)|\.[A-Z_]+))` \| `(.+?)`", text, re.MULTILINE)
    assert len(rows) > 25
    assert {name: ast.literal_eval(value) for name, value in rows} == {name: default_of(name) for name, _ in rows}
    module = importlib.import_module("transferkit.fine_tuning")
    constants = {f"fine_tuning.{name}" for name in vars(module) if re.fullmatch(r"[A-Z][A-Z_]+", name)}
    listed = {name for name, _ in rows if re.fullmatch(r"fine_tuning\.[A-Z_]+", name)}
    assert constants - {"fine_tuning.PLAN", "fine_tuning.ALL_IMAGES"} == listed


def messages_of_the_library() -> list[str]:
    """Every text in the library's code, with `...` for each value in it."""
    texts = []
    for path in Path(transferkit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts))
    return texts


def test_messages_that_troubleshooting_quotes_are_raised() -> None:
    """Each message in the table of docs/how-to/troubleshooting.md is one that the library has."""
    page = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    texts = messages_of_the_library()
    assert len(quoted) > 20
    patterns = {message: re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL) for message in quoted}
    assert [message for message, pattern in patterns.items() if not any(map(pattern.search, texts))] == []
