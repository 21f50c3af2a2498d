"""What many tests share: a network and images so small that a run takes milliseconds, and what to ask of a run."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torch.utils.hooks import RemovableHandle
from torchvision.models.vgg import make_layers

import transferkit as tk
from transferkit.data.preprocessing import CONVENTIONS

CLASSES = ["cat", "dog", "owl"]

STANDARDIZE = frozenset(f"head.standardize.{name}" for name in ("mean", "std", "num_images"))
"""Buffers of a head that pools: measured of the training images before the first step, and changed by no step."""

# ---- networks, trainers, images


def make_backbone(*, batch_norm: bool = False, image_size: int = 32, seed: int = 0) -> tk.Backbone:
    """Return a VGG of five blocks with one narrow convolution each: 32x32 pixels to 8 features."""
    torch.manual_seed(seed)
    layers = make_layers([4, "M", 4, "M", 8, "M", 8, "M", 8, "M"], batch_norm=batch_norm)
    return tk.Backbone("tiny", layers, CONVENTIONS["IMAGENET1K_V1"].with_image_size(image_size))


def make_model(
    backbone: tk.Backbone, boundary: str | None = None, *, seed: int = 1, **head: object
) -> tk.TransferModel:
    """Return the backbone with a head of three classes, frozen until `boundary`."""
    torch.manual_seed(seed)
    return tk.freeze_until(tk.attach_head(backbone, CLASSES, **head), boundary)


PLAIN = {"device": "cpu", "precision": "fp32", "lr": 1e-2, "schedule": "constant", "clip_grad_norm": None}


def make_trainer(model: tk.TransferModel, *, micro_batch_size: int | None = None, **arguments: object) -> tk.Trainer:
    """Return a trainer that computes in fp32 on the CPU, with a learning rate for so small a network."""
    trainer = tk.Trainer(model, **{**PLAIN, **arguments})
    trainer.micro_batch_size = micro_batch_size
    return trainer


def make_images(count: int = 24, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return raw images of three classes that can be told apart, each by one bright channel, and their targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), targets] += 120
    return images, targets


class Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, data: tuple[Tensor, Tensor]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*self.data, strict=True))


class Rows(Dataset):
    """Samples in a list."""

    def __init__(self, rows: list[object]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> object:
        return self.rows[index]


def in_head(trainer: tk.Trainer, look: Callable[[Tensor], object]) -> RemovableHandle:
    """Call `look` with what goes through the head, whatever part of the model is run."""
    layer = next(module for module in trainer.model.head.modules() if isinstance(module, nn.ReLU))
    return layer.register_forward_pre_hook(lambda _module, inputs: look(inputs[0]))


# ---- what a run came to


def lines_of(printed: str) -> list[str]:
    """Return the lines that were printed, those whole that were broken at 80 columns; words are one space apart."""
    return [" ".join(line.split()) for line in re.sub(r"\n  (?=\S)", " ", printed).splitlines()]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all weights and statistics."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def summed(model: nn.Module) -> dict[str, list[float]]:
    """Return a few numbers that depend on every weight."""
    return {
        name: [value.double().sum().item(), value.double().abs().max().item()]
        for name, value in model.state_dict().items()
    }


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Return the names of weights and statistics that are not those of `weights_of`, in any bit."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def figures(history: tk.History) -> dict[str, list[float | None]]:
    """Return all that a history holds but the seconds."""
    return {name: values for name, values in history.history.items() if name != "epoch_s"}


def differences(one: object, other: object, place: str = "") -> list[str]:
    """Return the places at which two states of any depth differ, in type, shape or any bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [place]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{place}: {sorted(map(str, one.keys() ^ other.keys()))} in one alone"]
        return [found for key in one for found in differences(one[key], other[key], f"{place}/{key}")]
    if type(one) is not type(other):
        return [place]
    if isinstance(one, list | tuple):
        return differences(dict(enumerate(one)), dict(enumerate(other)), place)
    return [] if one == other else [place]


# ---- programs in processes of their own


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment, in which a program can import this file and computes with one thread."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def offline(home: Path) -> dict[str, str]:
    """Return the environment of a user without a network, whose home is an empty folder."""
    nobody = "http://127.0.0.1:9"  # one thread: where other programs compute too, waiting for a second one takes long
    settings = {"OMP_NUM_THREADS": "1", "http_proxy": nobody, "https_proxy": nobody}
    path = {name: os.environ[name] for name in ["PYTHONPATH"] if name in os.environ}  # where the library may be
    return {"PATH": "/usr/bin:/bin", "HOME": str(home), **settings, **path}


def run_script(code: str, name: str, folder: Path) -> None:
    """Become a process that runs code in a folder, offline, with warnings as errors; it prints into `printed.txt`."""
    os.chdir(folder)
    printed = os.open("printed.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ.update(offline(folder))
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


def python(program: str, *arguments: object, timeout: float = 120) -> str:
    """Run a program in a process of its own and return what it printed; one that fails fails the test."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout
