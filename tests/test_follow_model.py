"""What is replaced, added, unfrozen or assigned after `Trainer(...)` trains, or is refused before a step."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import transferkit as tk
from tiny import changed, make_backbone, make_images, make_model, make_trainer, weights_of
from transferkit.errors import ArgumentError, TransferKitError

DATA = make_images()


def trainer_of(boundary: str | None = "head", *, trained: bool = False, **settings: object) -> tk.Trainer:
    """Return a trainer of a small head, which has made an epoch if `trained`."""
    trainer = make_trainer(make_model(make_backbone(), boundary, hidden=(8,)), **settings)
    if trained:
        fit(trainer)
    return trainer


def fit(trainer: tk.Trainer, **arguments: object) -> tk.History:
    return trainer.fit(DATA, **{"epochs": 1, "batch_size": 8, "verbose": 0, **arguments})


def new_last_layer(model: tk.TransferModel) -> nn.Module:
    model.head.logits = nn.Linear(8, 3)
    return model.head.logits


def new_head(model: tk.TransferModel) -> nn.Module:
    model.head = nn.Sequential(nn.Flatten(), nn.Linear(model.head.fc1.in_features, 3))
    return model.head


def new_convolution(model: tk.TransferModel) -> nn.Module:
    model.backbone.features[12] = nn.Conv2d(8, 8, 3, padding=1)
    return model.backbone.features[12]


def adapter(model: tk.TransferModel) -> nn.Module:
    added = nn.Conv2d(8, 8, 1)
    model.backbone.features[12] = nn.Sequential(model.backbone.features[12], added)
    return added


def added_to_head(model: tk.TransferModel) -> nn.Module:
    model.head.insert(5, nn.Linear(3, 3))
    return model.head[5]


CHANGES = [new_last_layer, new_head, new_convolution, adapter, added_to_head]
OPTIMIZERS = ["adam", "adamw", "sgd", "rmsprop", torch.optim.NAdam, functools.partial(torch.optim.SGD, momentum=0.5)]


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_replaced_or_added_trains(
    change: Callable[[tk.TransferModel], nn.Module], optimizer: object, *, trained: bool
) -> None:
    """A layer that the model got after the trainer was made trains like the others, in the group of its place."""
    trainer = trainer_of(optimizer=optimizer, trained=trained)
    added = change(trainer.model)
    before = weights_of(added)
    fit(trainer)
    assert changed(before, added) == set(before)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in trainer.model.parameters()} == held


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_callback_replaces_trains(change: Callable[[tk.TransferModel], nn.Module]) -> None:
    """So does a layer that a callback replaces between two epochs of a run."""
    trainer, added = trainer_of(), []

    def replace(trainer: tk.Trainer, report: tk.EpochReport) -> None:
        if report.epoch == 0:
            added.append(change(trainer.model))
            added.append(weights_of(added[0]))

    fit(trainer, epochs=2, callbacks=[replace])
    assert changed(added[1], added[0]) == set(added[1])


def test_a_replaced_layer_begins_without_momentum() -> None:
    """What the optimizer remembered of the old layer does not move the new one, and is not saved."""
    trainer = trainer_of(optimizer="adam", trained=True)
    new_last_layer(trainer.model)
    assert "head.logits.weight" not in trainer.state_dict()["optimizer"]["state"]
    assert "head.fc1.weight" in trainer.state_dict()["optimizer"]["state"]


def test_a_trainer_with_a_replaced_layer_is_saved_and_loaded(tmp_path) -> None:
    """A checkpoint of it holds the new layer, and another one takes it over."""
    trainer, other = trainer_of(trained=True), trainer_of(trained=True)
    for one in (trainer, other):
        new_last_layer(one.model)
    trainer.save(tmp_path / "a.pt")
    other.load(tmp_path / "a.pt")
    assert changed(weights_of(trainer.model), other.model) == set()
    other.load_state_dict(trainer.state_dict())


@pytest.mark.parametrize("boundaries", [("block5", "block4"), ("head.logits", "head"), ("head", None)])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
def test_unfrozen_layers_train_beside_those_with_momentum(optimizer: str, boundaries: tuple[str, str | None]) -> None:
    """Layers of one group may begin to train at different times, with every optimizer."""
    trainer = trainer_of(boundaries[0], optimizer=optimizer, trained=True)
    tk.freeze_until(trainer.model, boundaries[1])
    before = weights_of(trainer.model)
    fit(trainer)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable <= changed(before, trainer.model)


# ---- an optimizer that is already built


def over_head(model: tk.TransferModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.head.parameters(), lr=0.1)


def unfreeze(trainer: tk.Trainer, report: object = None) -> None:
    tk.freeze_until(trainer.model, "block5")


LACKS = r"lacks 2 that train \(backbone.features.12.weight.*trainer.optimizer ="


def test_an_optimizer_that_lacks_unfrozen_layers_is_refused() -> None:
    """Layers that it does not hold are named before a step, in fit, steps and lr_find."""
    model = make_model(make_backbone(), "head", hidden=(8,))
    trainer = make_trainer(model, optimizer=over_head(model), lr=None)
    fit(trainer)
    unfreeze(trainer)
    before = weights_of(model)
    for call in (lambda: fit(trainer), lambda: trainer.steps(DATA), lambda: trainer.lr_find(DATA, verbose=0)):
        with pytest.raises(ArgumentError, match=LACKS):
            call()
    assert changed(before, model) == set()
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # as the message says
    fit(trainer)
    assert "backbone.features.12.weight" in changed(before, model)


def test_gradual_unfreezing_refuses_an_optimizer_before_the_first_step() -> None:
    """What will be unfrozen later must be held from the start."""
    model = make_model(make_backbone(), "head", hidden=(8,))
    trainer = make_trainer(model, optimizer=over_head(model), lr=None)
    with pytest.raises(ArgumentError, match=LACKS):
        fit(trainer, epochs=3, callbacks=[tk.GradualUnfreezing({1: "block5"})])
    assert trainer.global_step == 0


def test_a_callback_that_unfreezes_what_the_optimizer_lacks_ends_the_run() -> None:
    """It is an error before the epoch in which the layers would not train."""
    model = make_model(make_backbone(), "head", hidden=(8,))
    trainer = make_trainer(model, optimizer=over_head(model), lr=None)
    with pytest.raises(ArgumentError, match=LACKS):
        fit(trainer, epochs=3, callbacks=[unfreeze])
    assert trainer.global_step == 3


@pytest.mark.parametrize("where", ["between", "callback"])
def test_a_group_that_is_added_trains_at_its_rate(where: str) -> None:
    """`add_param_group` after unfreezing gives the new layers their own rate, between runs and within one."""
    model = make_model(make_backbone(), "head", hidden=(8,))
    trainer = make_trainer(model, optimizer=over_head(model), lr=None)
    before = weights_of(model)

    def add(*_: object) -> None:
        if len(trainer.optimizer.param_groups) == 1:
            unfreeze(trainer)
            trainer.optimizer.add_param_group({"params": model.backbone.features[12].parameters(), "lr": 1e-3})

    if where == "between":
        fit(trainer)
        add()
    fit(trainer, epochs=2, callbacks=[add] if where == "callback" else [])
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.1, 1e-3]
    assert "backbone.features.12.weight" in changed(before, model)


def test_a_group_of_strangers_is_refused() -> None:
    """Parameters that the model does not have would train nothing."""
    trainer = trainer_of(trained=True)
    trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1e-5})
    with pytest.raises(ArgumentError, match=r"holds 1 parameters of another model and lacks 0 that train\. Build"):
        fit(trainer)


def test_an_optimizer_with_state_from_the_start_is_refused_after_a_change() -> None:
    """Adagrad makes its state when it is built, so a new layer would have none."""
    trainer = trainer_of(optimizer=torch.optim.Adagrad)
    new_last_layer(trainer.model)
    with pytest.raises(ArgumentError, match=r"lacks 2 that train \(head.logits.weight"):
        fit(trainer)
    trainer.optimizer = torch.optim.Adagrad
    fit(trainer)


# ---- what is assigned on the trainer


@pytest.mark.parametrize("make", [lambda model: torch.optim.SGD(model.parameters(), lr=0.5), lambda _: "sgd"])
def test_an_optimizer_that_is_assigned_trains(make: Callable[[tk.TransferModel], object]) -> None:
    """Another optimizer, or its name, takes the place of the first."""
    trainer = trainer_of(optimizer="adam", trained=True)
    trainer.optimizer = make(trainer.model)
    before = weights_of(trainer.model)
    fit(trainer)
    assert type(trainer.optimizer) is torch.optim.SGD
    assert "head.logits.weight" in changed(before, trainer.model)


def test_an_optimizer_of_another_model_is_not_assigned() -> None:
    """One that would train nothing is refused, and the first one stays."""
    trainer = trainer_of(optimizer="adam")
    with pytest.raises(ArgumentError, match="does not belong to the model"):
        trainer.optimizer = torch.optim.SGD(make_backbone().parameters(), lr=0.5)
    assert type(trainer.optimizer) is torch.optim.Adam


@pytest.mark.parametrize(
    "name",
    [
        "lr",
        "loss",
        "model",
        "schedule",
        "scheduler",
        "seed",
        "metrics",
        "device",
        "clip_grad_norm",
        "epochs",
    ],
)
def test_a_setting_that_would_not_reach_the_trainer_is_refused(name: str) -> None:
    """Assigning what a trainer was made with, or what `fit` takes, is an error that says where it belongs."""
    with pytest.raises(TransferKitError, match=rf"trainer.{name} = ... would have no effect.*an argument of Trainer"):
        setattr(trainer_of(), name, 1)


def test_a_trainer_keeps_what_callbacks_put_on_it() -> None:
    """A name of the user's own is an attribute like any other."""
    trainer = trainer_of()
    trainer.best_so_far = 0.5
    assert trainer.best_so_far == 0.5


# ---- gradients


@pytest.mark.parametrize("clip_grad_norm", [None, 1e-3])
def test_gradients_stay_between_steps(clip_grad_norm: float | None) -> None:
    """A loop over steps, and `after_step` of a callback, see the gradients that were applied; later nothing is left."""
    trainer, norms = trainer_of(clip_grad_norm=clip_grad_norm), []

    def look(trainer: tk.Trainer) -> None:
        gradients: list[Tensor] = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        assert len(gradients) == 4
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    class Look:
        def __call__(self, trainer: tk.Trainer, report: object) -> None:
            pass

        def after_step(self, trainer: tk.Trainer) -> None:
            look(trainer)

    for _ in trainer.steps(DATA, batch_size=8):
        look(trainer)
    fit(trainer, callbacks=[Look()])
    assert len(norms) == 6
    assert all(norm > 0 for norm in norms)
    assert clip_grad_norm is None or norms == pytest.approx([clip_grad_norm] * 6, rel=1e-2)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
