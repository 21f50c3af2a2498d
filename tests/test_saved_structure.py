"""A model that no file describes is refused when it is saved, and a file of another structure when it is read."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import tiny
import transferkit as tk
from transferkit.errors import CheckpointError, CheckpointTypeError


def make_model(**head: object) -> tk.TransferModel:
    return tiny.make_model(tiny.make_backbone(batch_norm=True), "head", **{"hidden": (16,), "dropout": 0.5, **head})


def replaced(part: str, index: object, layer: nn.Module) -> Callable[[tk.TransferModel], object]:
    """Return what puts another layer in the place of one."""

    def replace(model: tk.TransferModel) -> None:
        sequential = model.head if part == "head" else model.backbone.features
        if isinstance(index, str):
            setattr(sequential, index, layer)
        else:
            sequential[index] = layer

    return replace


def with_setting(name: str, value: object, *, part: str, index: int) -> Callable[[tk.TransferModel], object]:
    """Return what changes a setting of a layer in place."""
    return lambda model: setattr((model.head if part == "head" else model.backbone.features)[index], name, value)


def own_forward(model: tk.TransferModel) -> None:
    forward = model.head.fc1.forward
    model.head.fc1.forward = lambda inputs: 2 * forward(inputs)


def compiled_part(model: tk.TransferModel) -> None:
    model.backbone.features[0] = torch.compile(model.backbone.features[0], backend="eager")


def other_pools(model: tk.TransferModel) -> None:
    model.pools = {index: pool._replace(name="max") for index, pool in model.pools.items()}


CHANGES: dict[str, tuple[Callable[[tk.TransferModel], object], str]] = {
    "activation of the head": (replaced("head", "relu1", nn.Sigmoid()), "head.relu1 is a Sigmoid instead of a ReLU"),
    "no activation": (replaced("head", "relu1", nn.Identity()), "head.relu1 is a Identity instead of a ReLU"),
    "dropout": (with_setting("p", 0.1, part="head", index=4), "head.dropout1.p is 0.1 instead of 0.5"),
    "no dropout": (replaced("head", "dropout1", nn.Identity()), "head.dropout1 is a Identity instead of a Dropout"),
    "activation of the backbone": (replaced("backbone", 2, nn.GELU()), "backbone.features.2 is a GELU"),
    "pooling of the backbone": (replaced("backbone", 3, nn.AvgPool2d(2)), "backbone.features.3 is a AvgPool2d"),
    "adapter": (
        replaced("backbone", 4, nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))),
        "backbone.features.4",
    ),
    "stride": (with_setting("stride", (2, 2), part="backbone", index=4), "backbone.features.4.stride is (2, 2)"),
    "padding mode": (
        with_setting("padding_mode", "reflect", part="backbone", index=4),
        "backbone.features.4.padding_mode is 'reflect'",
    ),
    "epsilon": (with_setting("eps", 0.1, part="backbone", index=1), "backbone.features.1.eps is 0.1"),
    "pools": (other_pools, "it pools "),
    "forward of its own": (own_forward, "head.fc1 has a forward of its own"),
    "pruned": (lambda model: prune.l1_unstructured(model.head.fc1, "weight", 0.5), "prune.remove(layer, 'weight')"),
    "pruned backbone": (
        lambda model: prune.l1_unstructured(model.backbone.features[0], "weight", 0.5),
        "prune.remove(layer, 'weight')",
    ),
    "weight norm": (lambda model: parametrizations.weight_norm(model.head.fc1), "remove_parametrizations"),
    "spectral norm": (lambda model: nn.utils.spectral_norm(model.head.fc1), "remove_spectral_norm"),
    "bfloat16": (lambda model: model.bfloat16(), "Convert it: model.float()"),
    "half": (lambda model: model.head.half(), "Convert it: model.float()"),
    "double": (lambda model: model.double(), "Convert it: model.float()"),
    "compiled part": (compiled_part, "Save the model that was compiled"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_could_not_be_built_again_is_not_saved(tmp_path: Path, change: str) -> None:
    """Whatever of a model its file does not hold is refused by name when it is saved, and no file is written."""
    model = make_model()
    changed, message = CHANGES[change]
    changed(model)

    with pytest.raises(CheckpointTypeError, match=re.escape(message)):
        tk.save_model(model, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["activation of the head", "adapter", "pruned"])
def test_trainer_save_refuses_it_as_well(tmp_path: Path, change: str) -> None:
    """A trainer's file is for load_model, too."""
    model = make_model()
    CHANGES[change][0](model)

    with pytest.raises(CheckpointTypeError, match="load_model could not build this model again"):
        tiny.make_trainer(model).save(tmp_path / "model.pt")


WRAPPERS = {
    "averaged": (torch.optim.swa_utils.AveragedModel, r"AveragedModel.*Pass what it wraps: model\.module\."),
    "parallel": (nn.DataParallel, r"DataParallel.*Pass what it wraps: model\.module\."),
    "compiled": (lambda model: torch.compile(model, backend="eager"), r"Pass what it wraps: model\._orig_mod\."),
    "backbone": (lambda model: model.backbone, "is a Backbone: expected a TransferModel. Build one with attach_head"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_is_refused_and_what_is_inside_is_named(tmp_path: Path, wrapper: str) -> None:
    """A wrapped model is no TransferModel: the message says where the one inside is, and that can be saved."""
    wrap, message = WRAPPERS[wrapper]
    wrapped = wrap(make_model())

    with pytest.raises(CheckpointTypeError, match=message):
        tk.save_model(wrapped, tmp_path / "model.pt")
    inside = getattr(wrapped, "module", getattr(wrapped, "_orig_mod", None))
    if isinstance(inside, tk.TransferModel):
        tk.save_model(inside, tmp_path / "model.pt")


@pytest.mark.parametrize("change", ["inplace", "head of its own", "unfrozen", "compiled in place", "new last layer"])
def test_what_changes_no_structure_is_saved(tmp_path: Path, change: str) -> None:
    """Other weights, modes and boundaries, a head of the user's own and `model.compile()` are saved as before."""
    own = nn.Sequential(nn.Flatten(), nn.GELU(), nn.Linear(8, 3)) if change == "head of its own" else None
    model = make_model() if own is None else tiny.make_model(tiny.make_backbone(), head=own, layers=None)
    if change == "inplace":
        model.backbone.features[2].inplace = False
    if change == "unfrozen":
        tk.freeze_until(model, None).train()
    if change == "compiled in place":
        model.compile(backend="eager")
    if change == "new last layer":
        model.head.logits = nn.Linear(16, 3)

    tk.save_model(model, tmp_path / "model.pt")


def test_a_saved_head_of_another_activation_is_refused(tmp_path: Path) -> None:
    """A head of the user's own without weights that would show it: the types of its layers are compared."""
    heads = [nn.Sequential(nn.Flatten(), kind(), nn.Linear(8, 3)) for kind in (nn.GELU, nn.Tanh)]
    models = [tiny.make_model(tiny.make_backbone(), head=head) for head in heads]
    tk.save_model(models[0], tmp_path / "model.pt")
    trainer = tiny.make_trainer(models[0])
    trainer.save(tmp_path / "run.pt")

    with pytest.raises(CheckpointError, match=r"head\.1 is a Tanh instead of a GELU"):
        tiny.make_trainer(models[1]).load(tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=r"head\.1 is a Tanh instead of a GELU"):
        tk.load_model(tmp_path / "model.pt", head=heads[1], backbone=models[1].backbone)


def test_a_run_of_a_changed_model_is_resumed(tmp_path: Path) -> None:
    """A Checkpoint saves any model: the script that resumes makes the same change; without it, resuming is refused."""

    def fit(epochs: int, *, change: bool) -> tk.TransferModel:
        model = make_model()
        if change:
            model.head.relu1 = nn.Sigmoid()
        trainer = tiny.make_trainer(model)
        callbacks = [tk.Checkpoint(tmp_path)]
        trainer.fit(tiny.make_images(), epochs=epochs, verbose=0, callbacks=callbacks, resume_from=tmp_path)
        return model

    fit(1, change=True)
    with pytest.raises(CheckpointError, match=r"head\.relu1 is a ReLU instead of a Sigmoid"):
        fit(2, change=False)
    assert fit(2, change=True).head.relu1.__class__ is nn.Sigmoid
