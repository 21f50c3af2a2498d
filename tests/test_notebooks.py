"""The notebooks run from top to bottom, offline, and lie in the repository with small outputs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import offline

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
MAX_BYTES = 250_000

EXECUTE = """
import sys, warnings
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
for cell in notebook.cells:
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
        cell.source = cell.source.replace("budget=40", "budget=10")
NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


def outputs(path: Path) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def kinds(path: Path) -> list[set[str]]:
    """What kinds of output each cell has; how many pieces a text came in is chance."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    shown = {"display_data": "execute_result"}  # a figure shows itself, or is shown as the result of its cell
    kinds = [{shown.get(output["output_type"], output["output_type"]) for output in cell["outputs"]} for cell in cells]
    return [found - {"stream"} or found for found in kinds]  # what is said beside a result depends on the images


def test_there_are_two() -> None:
    """A tour, and one on choosing what to freeze."""
    assert [path.stem for path in NOTEBOOKS] == ["tour", "what_to_freeze"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_there_and_small(path: Path) -> None:
    """Every cell of code was run in order, without an error or a warning, and the file has at most 250 kB."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [
        output for output in outputs(path) if output["output_type"] == "error" or output.get("name") == "stderr"
    ] == []
    assert any("image/png" in output.get("data", {}) for output in outputs(path))
    assert path.stat().st_size <= MAX_BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_the_machine_is_in_it(path: Path) -> None:
    """No output names a folder of the machine it was made on."""
    text = json.dumps(outputs(path))
    assert not any(word in text for word in ("/home/", "/tmp/", "/root/", "/work/", "site-packages"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, small_assets: Path) -> None:
    """From top to bottom, on fewer images, offline, with the same kinds of outputs as it has here."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    (tmp_path / "assets").symlink_to(small_assets)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    copy = Path(shutil.copy(path, folder))
    command = [sys.executable, "-c", EXECUTE, copy.name]
    result = subprocess.run(command, cwd=folder, env=offline(tmp_path), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert kinds(copy) == kinds(path)
