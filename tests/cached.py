"""What the tests of the feature cache share: tiny trainers with and without it, and the comparison of their runs."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

import transferkit as tk
from transferkit.data.preprocessing import CONVENTIONS

CLASSES = ["cat", "dog", "owl"]
EPOCHS = 2
HEAD = {"hidden": (16,), "dropout": 0.5}

Data = tuple[Tensor, Tensor]
Change = Callable[[tk.TransferModel], object]


def make_model(
    make_backbone: Callable[..., tk.Backbone],
    boundary: str | None = "head",
    *,
    batch_norm: bool = False,
    image_size: int = 32,
    **head: Any,
) -> tk.TransferModel:
    """Return a tiny VGG with a head of three classes, frozen until `boundary`."""
    torch.manual_seed(1)
    backbone = make_backbone(batch_norm=batch_norm, image_size=image_size)
    return tk.freeze_until(tk.attach_head(backbone, CLASSES, **(head or HEAD)), boundary)


def make_trainer(model: tk.TransferModel, *, folder: Path | str | None = None, **arguments: Any) -> tk.Trainer:
    """Return a trainer in bf16 on the CPU, with files of features in `folder`."""
    arguments |= {} if folder is None else {"cache": folder}
    return tk.Trainer(model, **{"device": "cpu", "precision": "bf16", "lr": 1e-2, **arguments})


def through_the_whole_model(trainer: tk.Trainer) -> tk.Trainer:
    """Let a trainer use neither prefix nor cache: with a hook on the first layer it runs the whole model."""
    trainer.model.backbone.features[0].register_forward_hook(lambda *_: None)
    trainer.training.cache_mode = False
    return trainer


def fit(trainer: tk.Trainer, data: Any, **arguments: Any) -> tk.History:
    """Train for two epochs in batches of seven."""
    return trainer.fit(data, **{"epochs": EPOCHS, "batch_size": 7, "verbose": 0, **arguments})


def figures(history: tk.History) -> dict[str, list[float | None]]:
    """Return all that a history holds but the seconds."""
    return {name: values for name, values in history.history.items() if name != "epoch_s"}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all weights and statistics."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Return the names of weights and statistics that differ in any bit."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def assert_same_run(trainers: Iterable[tk.Trainer], data: Any, **arguments: Any) -> None:
    """All trainers end with the same history, weights and probabilities, bit for bit."""
    first, *others = trainers
    assert others
    expected = figures(fit(first, data, **arguments))
    images = data[0] if isinstance(data, tuple) else data
    probabilities, weights = first.predict_proba(images), weights_of(first.model)
    for other in others:
        assert figures(fit(other, data, **arguments)) == expected
        assert changed(weights, other.model) == set()
        assert (other.predict_proba(images) == probabilities).all()


def preprocess(images: Tensor) -> Tensor:
    """Return raw images as the tiny network's input."""
    return CONVENTIONS["IMAGENET1K_V1"].with_image_size(32)(images)


def total(images_seen: list[tuple[int, int]]) -> int:
    """Return how many images the fixture `images_seen` counted."""
    return sum(count for count, _ in images_seen)


def lines_of(capsys: Any) -> list[str]:
    """Return the lines printed since the last look, without that of the best epoch; broken ones are whole again."""
    printed = capsys.readouterr().out.replace("\n  ", "  ")
    return [line for line in printed.splitlines() if not line.startswith("restored the weights of epoch")]


def refusals(lines: list[str]) -> list[str]:
    """Return the lines that say that features are not cached."""
    return [line for line in lines if "not cached" in line]


class RandomlyFlipped(Dataset[tuple[Tensor, int]]):
    """Images with a random transform of their own."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.flip = v2.RandomHorizontalFlip()

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.flip(self.data[0][index]), int(self.data[1][index])


# ---- frozen layers that are no pure function of their input


class Unknown(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images * 2


class Doubled(nn.ReLU):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * 2


def _hook(model: tk.TransferModel) -> None:
    model.backbone.features[4].register_forward_hook(lambda _module, _inputs, output: output * 2)


def _hook_with_keywords(model: tk.TransferModel) -> None:
    model.backbone.features[4].register_forward_hook(lambda *_: None, with_kwargs=True)


def _pre_hook(model: tk.TransferModel) -> None:
    model.backbone.features[4].register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))


def _backward_hook(model: tk.TransferModel) -> None:
    model.backbone.features[4].register_full_backward_hook(lambda *_: None)


def _backward_pre_hook(model: tk.TransferModel) -> None:
    model.backbone.features[4].register_full_backward_pre_hook(lambda *_: None)


def _own_forward(model: tk.TransferModel) -> None:
    forward = model.backbone.features[4].forward
    model.backbone.features[4].forward = lambda images: forward(images) * 2


def _parametrized(model: tk.TransferModel) -> None:
    nn.utils.parametrizations.weight_norm(model.backbone.features[6])
    tk.freeze_until(model, "head")
    with torch.no_grad():
        model.backbone.features[6].parametrizations.weight.original0.mul_(2)


def _spectral_norm(model: tk.TransferModel) -> None:
    torch.manual_seed(0)  # it draws a first vector
    nn.utils.spectral_norm(model.backbone.features[6])
    tk.freeze_until(model, "head")


def _replaced(layer: nn.Module) -> Change:
    def replace(model: tk.TransferModel) -> None:
        model.backbone.features[4] = layer
        tk.freeze_until(model, "head")

    return replace


def _model_hook(model: tk.TransferModel) -> None:
    model.register_forward_hook(lambda _module, _inputs, output: output * 2)


def _backbone_hook(model: tk.TransferModel) -> None:
    model.backbone.register_forward_hook(lambda _module, _inputs, output: output * 2)


def _features_hook(model: tk.TransferModel) -> None:
    model.backbone.features.register_forward_hook(lambda _module, _inputs, output: output * 2)


def _features_pre_hook(model: tk.TransferModel) -> None:
    model.backbone.features.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))


def _backbone_forward(model: tk.TransferModel) -> None:
    forward = model.backbone.forward
    model.backbone.forward = lambda *inputs: forward(*inputs) * 2


IMPURE: dict[str, tuple[Change, str]] = {
    "hook": (_hook, "layer 4 "),
    "hook with keywords": (_hook_with_keywords, "layer 4 "),
    "pre-hook": (_pre_hook, "layer 4 "),
    "backward hook": (_backward_hook, "layer 4 "),
    "backward pre-hook": (_backward_pre_hook, "layer 4 "),
    "own forward": (_own_forward, "layer 4 "),
    "parametrized": (_parametrized, "layer 6 "),
    "spectral norm": (_spectral_norm, "layer 6 "),
    "subclass": (_replaced(Doubled()), "layer 4 "),
    "unknown": (_replaced(Unknown()), "layer 4 "),
    "dropout at rest": (_replaced(nn.Dropout()), "layer 4 "),
    "batch statistics": (_replaced(nn.BatchNorm2d(4, track_running_stats=False)), "layer 4 "),
    "hook on the model": (_model_hook, "the TransferModel "),
    "hook on the backbone": (_backbone_hook, "the Backbone "),
    "hook on the features": (_features_hook, "the Sequential "),
    "pre-hook on the features": (_features_pre_hook, "the Sequential "),
    "own forward of the backbone": (_backbone_forward, "the Backbone "),
}
"""Changes of a frozen model after which its features may not be cached, and what the reason begins with."""
