"""The code on the pages of docs/ runs as it stands."""

import multiprocessing
import re
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tiny import run_script

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def script(page: Path) -> str:
    """Return a page's blocks of Python under their line numbers and nothing else; `>>>` blocks are doctests already."""

    def blank_or_code(block: re.Match[str]) -> str:
        code = block["code"] if block["language"] == "python" and not block["code"].startswith(">>>") else ""
        return "\n" + (code or "\n" * block["code"].count("\n"))

    fences = re.compile(r"^(?P<fence>```+)(?P<language>.*)\n(?P<code>(?:.*\n)*?)(?P=fence)$", re.MULTILINE)
    text, end, lines = page.read_text(), 0, ""
    for block in fences.finditer(text):
        lines += "\n" * text.count("\n", end, block.start()) + blank_or_code(block)
        end = block.end()
    return lines


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if script(page).strip()]


def test_blocks_of_code_keep_their_lines(tmp_path: Path) -> None:
    """Only blocks marked `python` are code, and an error in one names the page's own line."""
    page = tmp_path / "page.md"
    page.write_text(
        "Text\n\n```python\nx = 1\n```\n```text\nno code\n```\n```python\n>>> 1\n```\n\n```python\nx / 0\n```\n"
    )
    assert script(page).splitlines() == ["", "", "", "x = 1", *[""] * 9, "x / 0"]


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Makes processes that have imported torch, torchvision and the library already: three seconds for each page."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.datasets", "transferkit.api"])
    return context


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_code_of_a_page_runs(page: Path, tmp_path: Path, small_assets: Path, processes: ForkServerContext) -> None:
    """A page's Python blocks run, one after the other, from the root of a clone, offline, without a warning."""
    all_images = re.search(r"\b2000\b|\brare\b|\bassert\b", script(page))  # it takes some itself, or states a bound
    (tmp_path / "examples").symlink_to(ROOT / "examples" if all_images else small_assets.parent)
    process = processes.Process(target=run_script, args=(script(page), str(page), tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "printed.txt").read_text()
