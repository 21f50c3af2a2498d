"""Small real networks and data, and a guard that no test leaves the process changed."""

import gc
import os
import random
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import transferkit as tk
from transferkit.features.prefix import Prefix

ASSETS = Path(__file__).parent.parent / "examples" / "assets"

torch.set_num_threads(1)  # the networks here are so small that a second thread costs more than it brings

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a process in the background may ignore it, as would its children

BackboneMaker = Callable[..., tk.Backbone]


def pytest_collection_finish() -> None:
    """Thousands of collected tests stay to the end: garbage collections, of which many tests ask for, pass them by."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _process_unchanged() -> Iterator[None]:
    """Each test begins with the same random numbers and ends with the process as it found it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what is meant
    before = _process_state()
    yield
    ends = time.monotonic() + 5
    while threading.active_count() > before["threads"] and time.monotonic() < ends:
        gc.collect()  # the threads of queues to workers end by themselves, a moment after the queues are closed
        time.sleep(0.01)
    assert _process_state() == before


def _process_state() -> dict[str, Any]:
    return {
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "threads": threading.active_count(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "float32 products": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "default type": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture
def make_backbone() -> BackboneMaker:
    """A VGG of five blocks with one narrow convolution each: 32x32 pixels to 8 features, in microseconds."""
    return tiny.make_backbone


@pytest.fixture
def backbone(make_backbone: BackboneMaker) -> tk.Backbone:
    return make_backbone()


@pytest.fixture
def model(backbone: tk.Backbone) -> tk.TransferModel:
    """The tiny backbone with a head of three classes, nothing frozen."""
    return tk.attach_head(backbone, tiny.CLASSES, hidden=(16,))


@pytest.fixture
def flat_model(backbone: tk.Backbone) -> tk.TransferModel:
    """The same with a head that takes every position of the last block: nothing is measured before the first step."""
    return tk.attach_head(backbone, tiny.CLASSES, hidden=(16,), pooling="flatten")


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """24 raw images of three classes that can be told apart: each has one bright channel."""
    return tiny.make_images()


@pytest.fixture
def half_device(monkeypatch: pytest.MonkeyPatch) -> tk.Device:
    """A CPU that says it can do fp16: the real gradient scaler, without a GPU."""
    monkeypatch.setattr("transferkit.compute.device.supported_precisions", lambda device: ("fp16", "fp32"))
    return tk.Device("cpu", "fp16")


@pytest.fixture(scope="session")
def small_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like examples/assets, with 16 training and 8 test images of each class instead of 200 and 50."""
    folder = tmp_path_factory.mktemp("examples") / "assets"
    folder.mkdir()
    weights, images = "vgg16_imagenet_features_bf16.pt", "cifar10_subset.zip"
    (folder / weights).symlink_to(ASSETS / weights)
    with zipfile.ZipFile(ASSETS / images) as whole, zipfile.ZipFile(folder / images, "w") as part:
        for name in whole.namelist():
            if name.endswith(".jpg") and int(Path(name).stem) < (16 if name.startswith("train/") else 8):
                part.writestr(name, whole.read(name))
    return folder


@pytest.fixture
def every_warning() -> Iterator[None]:
    """torch gives some warnings once in a process: here each time, and warnings are errors."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.fixture
def images_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many images went through a prefix's layers `first` and on, as pairs (count, first)."""
    seen: list[tuple[int, int]] = []
    call = Prefix.__call__

    def counted(self: Prefix, inputs: Tensor, *, first: int = 0) -> Tensor:
        if bool(inputs.any()):  # the one image of zeros that tells the shape does not count
            seen.append((len(inputs), first))
        return call(self, inputs, first=first)

    monkeypatch.setattr(Prefix, "__call__", counted)
    return seen


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only the superuser can mount a small disk")
    yield folder
    gc.collect()  # mapped files hold the disk
    subprocess.run(["umount", folder], check=True)
