"""Figures in the documentation are no older than the code they measure, or the page says so."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def measured() -> ModuleType:
    """`benchmarks/measured.py`."""
    spec = importlib.util.spec_from_file_location("measured", ROOT / "benchmarks" / "measured.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_page_with_old_figures_keeps_silent(measured: ModuleType) -> None:
    """A page whose measured code has changed says so; `python benchmarks/measured.py` writes the sentence."""
    stale = measured.stale_pages()
    silent = [page for page in stale if measured.SENTENCE not in (ROOT / page).read_text()]
    assert not silent, f"measure these again, or let them say so: python benchmarks/measured.py {' '.join(silent)}"
    wrong = [
        page for page in measured.read_record() if page not in stale and measured.SENTENCE in (ROOT / page).read_text()
    ]
    assert not wrong, wrong


def test_every_page_that_names_a_benchmark_is_on_record(measured: ModuleType) -> None:
    """No page with figures is forgotten."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {page.relative_to(ROOT).as_posix() for page in pages if "benchmarks/" in page.read_text()}
    assert named - {"docs/project"} <= set(measured.read_record())


@pytest.mark.parametrize(
    ("after", "same"),
    [('def f():\n    """Another."""\n\n    # why\n    return 1', True), ("def f():\n    return 2", False)],
)
def test_only_what_the_code_does_counts(measured: ModuleType, after: str, same: bool) -> None:
    """Docstrings and comments change no digest; another result does."""
    assert (measured.code_of(after) == measured.code_of('def f():\n    """One."""\n    return 1')) is same
