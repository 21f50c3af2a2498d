"""A run that may wreck pretrained layers says so first; the default rates do not."""

import warnings

import pytest
import torch
from torch import Tensor

import transferkit as tk
from tiny import make_images


@pytest.fixture(scope="module")
def pretrained() -> dict[str, Tensor]:
    """The weights of a network whose biases are not 0, as they are after training."""
    torch.manual_seed(0)
    state = tk.load_backbone("vgg11", weights=None, image_size=32).state_dict()
    return {name: value + 0.01 if name.endswith("bias") else value for name, value in state.items()}


def trainer_of(weights: dict[str, Tensor] | None, boundary: str | None = None, **settings: object) -> tk.Trainer:
    torch.manual_seed(0)
    backbone = tk.load_backbone("vgg11", weights=weights, preprocessing="IMAGENET1K_V1", image_size=32)
    model = tk.freeze_until(tk.attach_head(backbone, 3), boundary)
    return tk.Trainer(model, device="cpu", precision="fp32", **settings)


def warned(trainer: tk.Trainer, **arguments: object) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(make_images(6), **{"epochs": 1, "batch_size": 6, "verbose": 0, **arguments})
    return [str(warning.message) for warning in told]


HIGH = {
    "everything": (None, {"lr": 1e-3}, {}),
    "block 5": ("block5", {"lr": 1e-3}, {}),
    "a rate of fit": (None, {}, {"lr": 1e-3}),
    "rates by block": (None, {"lr": {"head": 1e-3, "backbone": 1e-4, "block5": 2e-3}}, {}),
    "AdamW": (None, {"lr": 1e-3, "optimizer": "adamw"}, {}),
    "a class": (None, {"optimizer": torch.optim.Adam}, {}),
    "SGD": (None, {"lr": 0.1, "optimizer": "sgd"}, {}),
    "unfrozen later": ("head", {"lr": 1e-3}, {"epochs": 2, "callbacks": [tk.GradualUnfreezing({1: "block5"})]}),
}


@pytest.mark.parametrize("name", HIGH)
def test_a_high_rate_for_pretrained_layers_is_warned_of_once(pretrained: dict[str, Tensor], name: str) -> None:
    """Before pretrained layers train at a rate that makes them forget, one warning says what to do."""
    boundary, settings, arguments = HIGH[name]
    trainer = trainer_of(pretrained, boundary, **settings)
    (message,) = warned(trainer, **arguments)
    assert "freeze_until(model, 'head')" in message
    assert warned(trainer, **arguments) == []


LOW = {
    "defaults": (None, {}),
    "defaults of SGD": (None, {"optimizer": "sgd"}),
    "frozen": ("head", {"lr": 1e-2}),
    "by block": (None, {"lr": {"head": 1e-3, "backbone": 1e-4}}),
    "3e-4": (None, {"lr": 3e-4}),
    "Adadelta": (None, {"optimizer": torch.optim.Adadelta}),
}


@pytest.mark.parametrize("name", LOW)
def test_a_rate_that_suits_is_not_warned_of(pretrained: dict[str, Tensor], name: str) -> None:
    """Forgetting `freeze_until` is harmless at the default rates, and a head alone may learn fast."""
    boundary, settings = LOW[name]
    assert warned(trainer_of(pretrained, boundary, **settings)) == []


def test_random_layers_may_learn_fast() -> None:
    """Layers that were never trained have nothing to forget, in the first run and the next."""
    trainer = trainer_of(None, lr=1e-3)
    assert warned(trainer) + warned(trainer) == []


def test_a_loaded_model_is_pretrained(tmp_path) -> None:
    """A model from `load_model` trains on at the default rates of its parts, and at 1e-3 with a warning."""
    trainer = trainer_of(None, lr=1e-3)
    warned(trainer)
    trainer.save(tmp_path / "a.pt")
    rates = {
        group["name"]: group["lr"] for group in tk.Trainer(tk.load_model(tmp_path / "a.pt")).optimizer.param_groups
    }
    assert (rates.pop("head"), set(rates.values())) == (3e-4, {1e-4})
    loaded = tk.Trainer(tk.load_model(tmp_path / "a.pt"), lr=1e-3, device="cpu", precision="fp32")
    assert len(warned(loaded)) == 1


@pytest.mark.parametrize("optimizer", [lambda model: torch.optim.Adam(model.parameters(), lr=1e-3)])
def test_the_advice_for_an_optimizer_that_is_built_is_another(pretrained: dict[str, Tensor], optimizer: object) -> None:
    """With an optimizer of the user's own, rates are those of its groups; what the message says is not warned of."""
    model = trainer_of(pretrained).model
    (message,) = warned(tk.Trainer(model, optimizer=optimizer(model), device="cpu", precision="fp32"))
    assert message.endswith("in an optimizer of your own a group of parameters with lr=0.0001.")
    groups = [{"params": model.backbone.parameters(), "lr": 1e-4}, {"params": model.head.parameters()}]
    advised = tk.Trainer(model, optimizer=torch.optim.Adam(groups, lr=1e-3), device="cpu", precision="fp32")
    assert warned(advised) == []
