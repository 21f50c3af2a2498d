"""What importing the library says when torchvision does not fit, and what it leaves alone."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from transferkit.base.installation import check_torchvision
from transferkit.errors import TorchvisionMismatchError

SOURCE = str(Path(sys.modules[check_torchvision.__module__].__file__ or "").parents[2])


def run_python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, with some folders before all others on the path."""
    path = os.pathsep.join([*map(str, folders), SOURCE])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def broken_torchvision(folder: Path, statement: str) -> Path:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(statement)
    return folder


@pytest.mark.parametrize(
    "statement",
    [
        'raise RuntimeError("operator torchvision::nms does not exist")',
        'raise ImportError("undefined symbol: _ZN3c10")',
        'raise OSError("libtorch.so: cannot open shared object file")',
        'raise ModuleNotFoundError("No module named torchvision")',
    ],
    ids=["operator", "symbol", "library", "missing"],
)
def test_a_torchvision_for_another_torch_is_explained(tmp_path: Path, statement: str) -> None:
    """A torchvision that does not load is told when the library is first used: why, both versions, what to install."""
    done = run_python("from transferkit import Trainer", broken_torchvision(tmp_path, statement))
    last = done.stderr.strip().splitlines()[-1]

    assert done.returncode == 1
    assert last.startswith("transferkit.errors.TorchvisionMismatchError: torchvision does not load: ")
    assert statement.split('"')[1] in last
    assert f"Got torch {version('torch')} with torchvision {version('torchvision')}; expected torch" in last
    assert "pip install --upgrade --force-reinstall torch torchvision" in last


def test_the_explanation_comes_in_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is an ImportError, so that code which tries optional imports sees it as one."""
    broken_torchvision(tmp_path, 'raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")

    with pytest.raises(
        ImportError, match=r"operator torchvision::nms does not exist.*Got torch.*pip install"
    ) as caught:
        check_torchvision()
    assert isinstance(caught.value, TorchvisionMismatchError)


def test_another_error_in_torchvision_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that no mismatch causes comes through as it is."""
    broken_torchvision(tmp_path, 'raise KeyError("something else")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")

    with pytest.raises(KeyError, match="something else"):
        check_torchvision()


def test_this_installation_is_in_order() -> None:
    """The pair these tests run with loads."""
    assert check_torchvision() is None


@pytest.mark.slow
def test_importing_leaves_the_process_alone() -> None:
    """Importing transferkit draws and seeds no random number, starts no CUDA, prints and warns nothing, and changes
    no setting of torch's.
    """
    code = """
import hashlib, json, logging, os, pickle, random, signal, sys, threading
import numpy, torch, torchvision

def state():
    return {
        "torch": torch.initial_seed(),
        "random": hashlib.sha256(pickle.dumps(
            (torch.get_rng_state().numpy(), random.getstate(), numpy.random.get_state()))).hexdigest(),
        "cuda": torch.cuda.is_initialized(),
        "threads": [threading.active_count(), torch.get_num_threads()],
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "logging": [logging.root.level, len(logging.root.handlers)],
        "settings": [str(torch.get_default_dtype()), torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
            torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()],
    }

before = state()
import transferkit
after = state()
print(json.dumps([after["cuda"], [key for key in before if before[key] != after[key]]]))
"""
    done = run_python(code)

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [False, []]
