"""A run is resumed with the settings that it began with, or not at all."""

import functools

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

import transferkit as tk
from tiny import changed, make_backbone, make_images, make_model, make_trainer, weights_of
from transferkit.errors import CheckpointError

DATA = make_images()


class Darken:
    """An augmentation with a parameter that its representation does not show."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image * self.factor).to(torch.uint8)


def darken(image: torch.Tensor, factor: float = 0.5) -> torch.Tensor:
    return (image * factor).to(torch.uint8)


def darker(factor: float) -> object:
    return lambda image: darken(image, factor)


def trainer_of(
    boundary: str | None = "head", *, hidden: tuple[int, ...] = (8,), dropout: float = 0.5, **settings: object
) -> tk.Trainer:
    model = make_model(make_backbone(), boundary, hidden=hidden, dropout=dropout)
    return make_trainer(model, **settings)


def fit(trainer: tk.Trainer, **arguments: object) -> None:
    trainer.fit(DATA, **{"epochs": 1, "batch_size": 8, "verbose": 0, **arguments})


def set_dropout(trainer: tk.Trainer) -> tk.Trainer:
    trainer.model.head.dropout1.p = 0.1
    return trainer


def set_activation(trainer: tk.Trainer) -> tk.Trainer:
    trainer.model.head.relu1 = nn.LeakyReLU(0.1)
    return trainer


def freeze_by_hand(trainer: tk.Trainer) -> tk.Trainer:
    trainer.model.head.fc1.bias.requires_grad_(requires_grad=False)
    return trainer


def set_momentum(trainer: tk.Trainer) -> tk.Trainer:
    trainer.optimizer.param_groups[-1]["betas"] = (0.5, 0.5)
    return trainer


SGD, ADAM = torch.optim.SGD, torch.optim.Adam
PARTIAL = functools.partial

# The name in the message, the run's trainer, another one, the run's augmentation, another one.
OTHERS = {
    "deeper": ("freeze_until=head", {}, lambda: trainer_of("block5"), None, None),
    "shallower": ("freeze_until=block5", {"boundary": "block5"}, trainer_of, None, None),
    "by hand": ("frozen parameters", {}, lambda: freeze_by_hand(trainer_of()), None, None),
    "less dropout": (r"dropout1\.p is 0\.1 instead of 0\.5", {}, lambda: trainer_of(dropout=0.1), None, None),
    "no dropout": ("dropout1 is in one of them alone", {}, lambda: trainer_of(dropout=0.0), None, None),
    "dropout where none was": ("dropout1 is in one of them alone", {"dropout": 0.0}, trainer_of, None, None),
    "dropout by hand": (r"dropout1\.p is 0\.1 instead of 0\.5", {}, lambda: set_dropout(trainer_of()), None, None),
    "activation": ("relu1 is a LeakyReLU instead of a ReLU", {}, lambda: set_activation(trainer_of()), None, None),
    "momentum": (
        "momentum=0.9",
        {"optimizer": PARTIAL(SGD, momentum=0.9)},
        lambda: trainer_of(optimizer=PARTIAL(SGD, momentum=0.5)),
        None,
        None,
    ),
    "nesterov": (
        "nesterov=False",
        {"optimizer": PARTIAL(SGD, momentum=0.9)},
        lambda: trainer_of(optimizer=PARTIAL(SGD, momentum=0.9, nesterov=True)),
        None,
        None,
    ),
    "betas": (
        r"betas=\(0.9, 0.999\)",
        {"optimizer": ADAM},
        lambda: trainer_of(optimizer=PARTIAL(ADAM, betas=(0.8, 0.99))),
        None,
        None,
    ),
    "betas of one group": (r"betas=\(0.9, 0.999\)", {}, lambda: set_momentum(trainer_of()), None, None),
    "weight decay": ("weight_decay=0", {}, lambda: trainer_of(weight_decay=0.1), None, None),
    "a function's code": ("augment", {}, trainer_of, lambda image: image // 2, lambda image: image // 3),
    "a closure": ("augment", {}, trainer_of, darker(0.5), darker(0.4)),
    "an object": ("augment", {}, trainer_of, Darken(0.5), Darken(0.4)),
    "a partial": ("augment", {}, trainer_of, PARTIAL(darken, factor=0.5), PARTIAL(darken, factor=0.4)),
    "torchvision's": ("augment", {}, trainer_of, [v2.ColorJitter(0.2)], [v2.ColorJitter(0.4)]),
    "nested": ("augment", {}, trainer_of, v2.Compose([v2.ColorJitter(0.2)]), v2.Compose([v2.ColorJitter(0.4)])),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_setting_is_refused_by_name(tmp_path, name: str) -> None:
    """What the script now says is not passed over: the call is refused, with both values, and changes nothing."""
    message, settings, other, augment, other_augment = OTHERS[name]
    fit(trainer_of(**settings), callbacks=[tk.Checkpoint(tmp_path / "a")], augment=augment)
    trainer = other()
    before = weights_of(trainer.model)
    with pytest.raises(CheckpointError, match=f"{message}.*expected the same"):
        fit(trainer, resume_from=tmp_path / "a", augment=other_augment, epochs=2)
    assert changed(before, trainer.model) == set()


@pytest.mark.parametrize("augment", [lambda image: image // 2, darker(0.5), Darken(0.5), v2.ColorJitter(0.2), "flip"])
def test_the_same_settings_are_resumed(tmp_path, augment: object) -> None:
    """An augmentation of any kind is equal to itself, and a run with it ends as one that never stopped."""
    whole = trainer_of()
    fit(whole, epochs=2, augment=augment)
    fit(trainer_of(), callbacks=[tk.Checkpoint(tmp_path / "a")], augment=augment)
    trainer = trainer_of()
    fit(trainer, resume_from=tmp_path / "a", epochs=2, augment=augment)
    assert changed(weights_of(whole.model), trainer.model) == set()


def test_a_trainer_resumes_its_own_run_that_unfroze_layers(tmp_path) -> None:
    """After Ctrl-C the same trainer goes on, although its layers are no longer frozen as at the start."""

    def run(trainer: tk.Trainer, *callbacks: object, **arguments: object) -> None:
        fit(trainer, epochs=3, callbacks=[tk.GradualUnfreezing({1: "block5"}), *callbacks], **arguments)

    def stop(trainer: tk.Trainer, report: tk.EpochReport) -> None:
        if report.epoch == 1:
            raise KeyboardInterrupt

    stop.order = 3
    whole, trainer = trainer_of(), trainer_of()
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(trainer, tk.Checkpoint(tmp_path / "a"), stop)
    run(trainer, resume_from=tmp_path / "a")
    assert changed(weights_of(whole.model), trainer.model) == set()


def test_loading_copies_what_an_optimizer_remembers() -> None:
    """Two trainers that share a state dict do not share moments."""
    first, second = trainer_of(optimizer="adam"), trainer_of(optimizer="adam")
    fit(first)
    second.load_state_dict(first.state_dict())
    moments = {name: dict(state) for name, state in first.state_dict()["optimizer"]["state"].items()}
    copies = {name: {key: value.clone() for key, value in state.items()} for name, state in moments.items()}
    fit(second)
    for name, state in first.state_dict()["optimizer"]["state"].items():
        assert all(torch.equal(value, copies[name][key]) for key, value in state.items())
