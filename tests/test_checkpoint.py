"""Checkpoints: the same model, the same training to the bit, and nothing changed by a file that does not fit."""

import copy
import functools
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.vgg import make_layers

import transferkit as tk
from tiny import Stream, make_images, make_trainer
from tiny import make_backbone as make_tiny
from transferkit.errors import CheckpointError, HeadMismatchError
from transferkit.model import backbone as backbone_module
from transferkit.saving import archive

Maker = Callable[..., tk.Backbone]
Data = tuple[Tensor, Tensor]


class Narrow(nn.Module):
    """A VGG network with few channels."""

    def __init__(self, batch_norm: bool, **options: Any) -> None:
        super().__init__()
        self.features = make_layers([4, "M", 4, "M", 8, "M", 8, "M", 8, "M"], batch_norm=batch_norm)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's names of networks stand for narrow ones, which load_model builds in milliseconds."""
    builder = lambda name: functools.partial(Narrow, name.endswith("_bn"))  # noqa: E731
    monkeypatch.setattr(backbone_module, "get_model_builder", builder)


def named_model(name: str = "vgg11", **head: Any) -> tk.TransferModel:
    """A network of the library, which load_model can build again."""
    torch.manual_seed(0)
    backbone = tk.load_backbone(name, weights=None, image_size=32, preprocessing="KERAS")
    return tk.attach_head(backbone, ["cat", "dog", "owl"], **head)


def tiny_trainer(make_backbone: Maker, seed: int = 0, boundary: str | None = "block4", **options: Any) -> tk.Trainer:
    model = tk.attach_head(make_backbone(batch_norm=True, seed=seed), ["cat", "dog", "owl"], hidden=(16,), dropout=0.5)
    options = {"optimizer": "adam", "lr": 1e-2, "seed": seed, **options}
    return tk.Trainer(tk.freeze_until(model, boundary), device="cpu", precision="fp32", **options)


def train(trainer: tk.Trainer, data: Data, epochs: int = 1) -> None:
    """Three steps an epoch."""
    trainer.fit(data, epochs=epochs, batch_size=8, augment="flip", verbose=0)


def flat(state: object, name: str = "") -> dict[str, object]:
    """Every leaf of a nested state by its path."""
    if isinstance(state, dict):
        return {path: leaf for key, value in state.items() for path, leaf in flat(value, f"{name}/{key}").items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)), name)
    return {name: state.clone() if isinstance(state, Tensor) else state}


def differing(left: object, right: object) -> list[str]:
    """Paths at which two states differ, in any bit of a tensor."""
    a, b = flat(left), flat(right)
    return [
        path
        for path in sorted({*a, *b})
        if path not in a
        or path not in b
        or not (torch.equal(a[path], b[path]) if isinstance(a[path], Tensor) else a[path] == b[path])
    ]


def modes(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, module.training) for name, module in model.named_modules()]


# --- load_model


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("vgg11", {"hidden": (16,), "dropout": 0.5}),
        ("vgg11_bn", {"hidden": (8, 4), "pooling": "avg"}),
        ("vgg11", {"pooling": "max"}),
    ],
    ids=["hidden", "batch norm", "pooled"],
)
def test_the_model_comes_back_from_the_file_alone(
    tmp_path: Path, data: Data, narrow: None, name: str, head: dict[str, Any]
) -> None:
    """From a checkpoint alone comes a model in eval mode that gives the same logits for raw images, bit for bit."""
    model = tk.freeze_until(named_model(name, **head), "block5")
    trainer = tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2)
    trainer.fit((data[0][:4], data[1][:4]), batch_size=4, verbose=0, epochs=1)
    trainer.save(tmp_path / "model.pt")

    torch.manual_seed(99)
    loaded = tk.load_model(tmp_path / "model.pt")

    model.eval().to(memory_format=torch.contiguous_format)  # the trainer lays it out otherwise, which rounds otherwise
    images = data[0][:2]
    with torch.no_grad():
        assert torch.equal(loaded(loaded.backbone.preprocess(images)), model(model.backbone.preprocess(images)))
    assert not any(module.training for module in loaded.modules())
    assert differing(loaded.state_dict(), model.state_dict()) == []


LAYERS = {
    "default": {"hidden": (8,), "dropout": 0.5},
    "flatten": {"pooling": "flatten"},
    "average": {"pooling": "avg"},
    "one": {"layers": ["block4"]},
    "several": {"layers": ["block5", "block2"], "pooling": "max"},
    "within a block": {"layers": ["block3_relu1", "block1"], "hidden": (4,)},
}


def same_logits(model: tk.TransferModel, other: tk.TransferModel, data: Data) -> bool:
    """Whether two models give the same logits for raw images, bit for bit, in the same memory layout."""
    models = [each.eval().to(memory_format=torch.contiguous_format) for each in (model, other)]
    with torch.no_grad():
        return torch.equal(*(each(each.backbone.preprocess(data[0][:4])) for each in models))


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
@pytest.mark.parametrize("head", LAYERS)
def test_the_layers_of_a_head_come_back(tmp_path: Path, data: Data, narrow: None, name: str, head: str) -> None:
    """From the file alone comes a model of as many layers, that pools the same ones and gives the same logits."""
    model = tk.freeze_until(named_model(name, **LAYERS[head]), "block2")
    trainer = tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2)
    train(trainer, data)
    trainer.save(tmp_path / "model.pt")

    loaded = tk.load_model(tmp_path / "model.pt")

    assert (loaded.layers, loaded.pools) == (model.layers, model.pools)
    assert loaded.backbone.layer_names == model.backbone.layer_names
    assert len(loaded.backbone.features) == len(model.backbone.features)
    assert loaded.head_arguments == model.head_arguments
    assert differing(loaded.state_dict(), model.state_dict()) == []
    assert same_logits(model, loaded, data)


@pytest.mark.parametrize("backbone", ["whole", "shortened"])
@pytest.mark.parametrize("head", LAYERS)
def test_a_head_without_its_frozen_layers_finds_them(
    tmp_path: Path, data: Data, narrow: None, head: str, backbone: str
) -> None:
    """Saved with frozen=False a head of any layers comes back on the whole backbone, and on that of the model."""
    model = tk.freeze_until(named_model("vgg11_bn", **LAYERS[head]), "head")
    train(tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2), data)
    tk.save_model(model, tmp_path / "head.pt", frozen=False)
    given = copy.deepcopy(model.backbone) if backbone == "shortened" else named_model("vgg11_bn").backbone
    other = named_model("vgg11_bn").backbone
    with torch.no_grad():
        other.features[0].bias[0] += 1

    loaded = tk.load_model(tmp_path / "head.pt", backbone=given)

    assert all(name.startswith("head.") for name in archive.read_checkpoint(tmp_path / "head.pt")["model"]["weights"])
    assert [*loaded.backbone.features] == [*given.features][: len(model.backbone.features)]
    assert loaded.layers == model.layers
    assert same_logits(model, loaded, data)
    with pytest.raises(CheckpointError, match=r"head\.pt was saved without its \d+ frozen weights"):
        tk.load_model(tmp_path / "head.pt", backbone=other)
    with pytest.raises(CheckpointError, match=r"head\.pt was saved without its \d+ frozen weights"):
        tk.load_model(tmp_path / "head.pt")


@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("head", ["default", "several", "within a block"])
def test_a_loaded_model_is_cut_like_the_one_saved(tmp_path: Path, narrow: None, head: str, *, batch_norm: bool) -> None:
    """After save and load, suffix(prefix(x)) is the saved model's output at boundaries of every kind, in both modes."""
    model = named_model("vgg11_bn" if batch_norm else "vgg11", **{**LAYERS[head], "dropout": 0.0})
    images = torch.randn(4, 3, 32, 32)
    for boundary in [*model.backbone.layer_names[::4], "head", None]:  # every kind of layer among them
        tk.save_model(tk.freeze_until(model, boundary), tmp_path / "model.pt")
        loaded = tk.load_model(tmp_path / "model.pt")
        for training in (False, True):
            prefix, suffix = loaded.train(training).split()
            assert len(prefix) == len(model.train(training).split()[0])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=training):
                assert torch.equal(suffix(prefix(images)), model(images))


def test_an_own_head_on_pooled_layers_comes_back(tmp_path: Path, data: Data, narrow: None) -> None:
    """The layers that a head of the user's own takes are in the file, and the head is given again."""

    def own() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * (4 + 8), 3))

    model = named_model(head=own(), layers=["block4", "block1"])
    tk.save_model(model, tmp_path / "model.pt")

    loaded = tk.load_model(tmp_path / "model.pt", head=own())

    assert (loaded.layers, loaded.pools) == (("block1_pool", "block4_pool"), model.pools)
    assert same_logits(model, loaded, data)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_temperature_comes_back(tmp_path: Path, data: Data, narrow: None, temperature: float) -> None:
    """A loaded model predicts with the temperature of the one saved, from the file and through a trainer."""
    model = named_model()
    model.temperature = temperature
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    trainer.save(tmp_path / "model.pt")
    other = tk.Trainer(named_model(), device="cpu", precision="fp32")

    other.load(tmp_path / "model.pt")

    loaded = tk.Trainer(tk.load_model(tmp_path / "model.pt"), device="cpu", precision="fp32")
    assert loaded.model.temperature == other.model.temperature == temperature
    expected = trainer.predict_proba(data[0])
    assert (loaded.predict_proba(data[0]) == expected).all()
    assert (other.predict_proba(data[0]) == expected).all()


def test_classes_preprocessing_and_head_come_back(tmp_path: Path) -> None:
    """Class names, convention, image size and head of a real VGG network are in the file, whose name may be text."""
    model = named_model("vgg11", hidden=(8,), dropout=0.25, pooling="avg")
    tk.Trainer(model, device="cpu").save(str(tmp_path / "model.pt"))

    loaded = tk.load_model(str(tmp_path / "model.pt"))

    assert loaded.classes == ("cat", "dog", "owl")
    assert loaded.backbone.preprocess == model.backbone.preprocess
    assert loaded.backbone.fingerprint == model.backbone.fingerprint
    assert loaded.head_arguments == {"hidden": [8], "dropout": 0.25, "pooling": "avg"}
    assert repr(loaded.head) == repr(model.head)


def test_a_convention_of_ones_own_comes_back(tmp_path: Path, narrow: None) -> None:
    """A Preprocessing of the user's own comes back from the file with every number."""
    own = tk.Preprocessing("mine", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (1, 2, 0))
    model = tk.attach_head(tk.load_backbone("vgg11", weights=None, image_size=40, preprocessing=own), 2)
    tk.save_model(model, tmp_path / "model.pt")

    preprocess = tk.load_model(tmp_path / "model.pt").backbone.preprocess

    assert preprocess == own.with_image_size(40)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    assert torch.equal(preprocess(images), own.with_image_size(40)(images))


@pytest.mark.parametrize("layer", [None, "block1_relu1", "block3_bn1", "block5", "head", "head.logits"])
def test_what_is_frozen_comes_back(tmp_path: Path, narrow: None, layer: str | None) -> None:
    """The loaded model has the same parameters frozen, and train() moves the same modules into training mode."""
    model = tk.freeze_until(named_model("vgg11_bn", hidden=(8,), dropout=0.5), layer)
    tk.save_model(model, tmp_path / "model.pt")

    loaded = tk.load_model(tmp_path / "model.pt")

    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    kinds = [nn.BatchNorm2d, nn.Dropout]
    assert [m.training for m in loaded.train().modules() if type(m) in kinds] == [
        m.training for m in model.train().modules() if type(m) in kinds
    ]


def test_everything_frozen_comes_back(tmp_path: Path, narrow: None) -> None:
    """A model of which every parameter is frozen, to predict only, is loaded with every parameter frozen."""
    tk.save_model(named_model().requires_grad_(False), tmp_path / "model.pt")

    assert not any(parameter.requires_grad for parameter in tk.load_model(tmp_path / "model.pt").parameters())


def test_an_own_head_must_be_given_again(tmp_path: Path, narrow: None) -> None:
    """A checkpoint with a head of the user's own asks for that head, and takes only one built the same way."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    tk.save_model(named_model(head=head), tmp_path / "model.pt")
    again, other = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), nn.Sequential(nn.Flatten(), nn.Linear(8, 4))

    loaded = tk.load_model(tmp_path / "model.pt", head=again)

    assert loaded.head is again
    assert torch.equal(again[1].weight, head[1].weight)
    with pytest.raises(CheckpointError, match=r"model\.pt has a head of the user's own.*pass one built the same way"):
        tk.load_model(tmp_path / "model.pt")
    other.append(nn.Linear(4, 3))
    with pytest.raises(CheckpointError, match=r"missing head\.2\.weight.*head\.1\.weight \(3, 8\) instead of \(4, 8\)"):
        tk.load_model(tmp_path / "model.pt", head=other)


# --- resuming

OPTIMIZERS = {
    "adam": {"optimizer": "adam", "lr": {"backbone": 1e-3, "head": 1e-2}},
    "sgd": {"optimizer": "sgd", "weight_decay": 0.01},
    "rmsprop": {"optimizer": "rmsprop"},
    "amsgrad": {"optimizer": functools.partial(torch.optim.AdamW, amsgrad=True)},
    "adafactor": {"optimizer": torch.optim.Adafactor},
    "asgd": {"optimizer": torch.optim.ASGD},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_training_is_the_uninterrupted_one(make_backbone: Maker, data: Data, tmp_path: Path, name: str) -> None:
    """Three steps, a checkpoint, and three more in a fresh trainer give bit for bit what six steps give."""
    whole = tiny_trainer(make_backbone, **OPTIMIZERS[name])
    train(whole, data)
    whole.save(tmp_path / "run.pt")
    halfway = copy.deepcopy(flat(whole.state_dict()))
    train(whole, data)

    resumed = tiny_trainer(make_backbone, seed=7, boundary=None, **OPTIMIZERS[name])
    torch.rand(100)
    resumed.load(tmp_path / "run.pt")
    assert differing(flat(resumed.state_dict()), halfway) == []
    train(resumed, data)

    assert differing(resumed.state_dict(), whole.state_dict()) == []
    assert modes(resumed.model) == modes(whole.model)
    assert (resumed.epoch, resumed.global_step, resumed.seed) == (2, 6, 0)


@pytest.mark.parametrize("head", LAYERS)
def test_resumed_training_of_any_head_is_the_uninterrupted_one(
    make_backbone: Maker, data: Data, tmp_path: Path, head: str
) -> None:
    """Whatever layers a head takes, what it standardises by is loaded and not measured anew on resuming."""
    arguments = {"hidden": (16,), **LAYERS[head]}
    trainers = []
    for seed in (0, 7):
        model = tk.attach_head(make_backbone(batch_norm=True, seed=seed), ["cat", "dog", "owl"], **arguments)
        trainers.append(tk.Trainer(tk.freeze_until(model, "block2"), device="cpu", precision="fp32", lr=1e-2))
    whole, resumed = trainers
    train(whole, data)
    whole.save(tmp_path / "run.pt")
    train(whole, data)

    resumed.load(tmp_path / "run.pt")
    train(resumed, data)

    assert differing(resumed.state_dict(), whole.state_dict()) == []


@pytest.mark.parametrize("entry", ["model", "optimizer", "progress"])
def test_every_part_of_the_state_matters(make_backbone: Maker, data: Data, entry: str) -> None:
    """Without any one part of its state a resumed training is not the uninterrupted one."""
    whole = tiny_trainer(make_backbone)
    train(whole, data)
    state = copy.deepcopy(whole.state_dict())
    train(whole, data)
    resumed = tiny_trainer(make_backbone, seed=7)

    resumed.load_state_dict({**state, entry: resumed.state_dict()[entry]})
    train(resumed, data)

    assert differing(resumed.state_dict()["model"], whole.state_dict()["model"]) != []


@pytest.mark.parametrize(("first", "second"), [("head", "block3"), ("block3", "head"), ("block5", None)])
def test_the_boundary_may_move_after_loading(
    make_backbone: Maker, data: Data, tmp_path: Path, first: str, second: str | None
) -> None:
    """Freezing more or less after the checkpoint gives the same bits with and without the checkpoint between."""
    whole = tiny_trainer(make_backbone, boundary=first)
    train(whole, data)
    whole.save(tmp_path / "run.pt")
    resumed = tiny_trainer(make_backbone, seed=7, boundary="block2")
    resumed.load(tmp_path / "run.pt")

    for trainer in (whole, resumed):
        tk.freeze_until(trainer.model, second)
        train(trainer, data)

    assert differing(resumed.state_dict(), whole.state_dict()) == []


def test_loading_goes_back_to_the_boundary_of_the_checkpoint(make_backbone: Maker, data: Data, tmp_path: Path) -> None:
    """A checkpoint brings back its boundary and what was frozen by hand behind it; training is then as it was."""
    trainer = tiny_trainer(make_backbone, boundary="block4")
    trainer.model.head.fc1.requires_grad_(False)
    train(trainer, data)
    trainer.save(tmp_path / "run.pt")
    frozen = [parameter.requires_grad for parameter in trainer.model.parameters()]
    train(trainer, data)
    expected = copy.deepcopy(flat(trainer.state_dict()))

    tk.freeze_until(trainer.model, None)
    train(trainer, data)
    trainer.load(tmp_path / "run.pt")
    assert [parameter.requires_grad for parameter in trainer.model.parameters()] == frozen
    train(trainer, data)

    assert differing(flat(trainer.state_dict()), expected) == []


def test_optimizer_state_goes_by_name(make_backbone: Maker, data: Data) -> None:
    """The optimizer's state is kept under parameter names, for those parameters that trained."""
    trainer = tiny_trainer(make_backbone, boundary="block5")
    train(trainer, data)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}

    state = trainer.state_dict()["optimizer"]

    assert set(state["state"]) == trained
    assert state["class"] == "Adam"
    assert [group["name"] for group in state["groups"]] == [*(f"block{n}" for n in range(1, 6)), "head"]


def test_learning_rates_come_back(make_backbone: Maker, tmp_path: Path) -> None:
    """The learning rates of a checkpoint replace those of the trainer that loads it."""
    tiny_trainer(make_backbone, lr={"backbone": 1e-5, "head": 1e-3}).save(tmp_path / "run.pt")
    trainer = tiny_trainer(make_backbone, lr=1.0)

    trainer.load(tmp_path / "run.pt")

    assert [(group["lr"], group["base_lr"]) for group in trainer.optimizer.param_groups] == [
        *[(1e-5,) * 2] * 5,
        (1e-3,) * 2,
    ]


def test_saving_changes_nothing(make_backbone: Maker, data: Data, tmp_path: Path) -> None:
    """Training with a checkpoint after the first epoch is training without."""
    saving, plain = (tiny_trainer(make_backbone, schedule="constant") for _ in range(2))

    train(saving, data)
    saving.save(tmp_path / "run.pt")
    train(saving, data)
    train(plain, data, epochs=2)

    assert differing(saving.state_dict(), plain.state_dict()) == []


# --- checkpoints of another model


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short run, which tests only read."""
    trainer, path = tiny_trainer(make_tiny), tmp_path_factory.mktemp("run") / "run.pt"
    train(trainer, make_images())
    trainer.save(path)
    return path


OTHER_LAYERS = r"the checkpoint has layers \['block3_pool', 'block4_pool', 'block5_pool'\], the model "
MANY = [f"class {number}" for number in range(37)]


@pytest.mark.parametrize(
    ("model", "optimizer", "error", "message"),
    [
        (
            {"classes": ["cat", "dog"]},
            "adam",
            HeadMismatchError,
            r"3 classes \(cat, dog, owl.*model 2 \(cat, dog",
        ),
        ({"classes": ["cat", "owl", "dog"]}, "adam", HeadMismatchError, r"the model 3 \(cat, owl, dog.*load_model"),
        ({"classes": MANY}, "adam", HeadMismatchError, r"has 3 classes \(cat.*the model 37 \(class 0"),
        (
            {"hidden": (17,)},
            "adam",
            CheckpointError,
            r"weight \(16, 72\) instead of \(17, 72\).*head built otherw",
        ),
        (
            {"layers": ["block4", "block5"]},
            "adam",
            CheckpointError,
            OTHER_LAYERS + r"\['block4_pool', 'block5_pool'\]: ex",
        ),
        (
            {"layers": ["block3_relu1"]},
            "adam",
            CheckpointError,
            OTHER_LAYERS + r"\['block3_relu1'\]: expected the same",
        ),
        ({"pooling": "flatten"}, "adam", CheckpointError, OTHER_LAYERS + r"\[\]: expected the same"),
        ({"pooling": "avg"}, "adam", CheckpointError, r"has pooling halves, the model avg: expected the same"),
        ({"pooling": "max"}, "adam", CheckpointError, r"has pooling halves, the model max: expected the same"),
        ({"dropout": 0.2}, "adam", CheckpointError, r"head\.dropout1\.p is 0\.2 instead of 0\.5: expected the same"),
        ({"image_size": 64}, "adam", CheckpointError, r"preprocessing .*'image_size': 32.*'image_size': 64.*the same"),
        ({"name": "other"}, "adam", CheckpointError, r"backbone tiny, the model other: expected the same"),
        ({}, "sgd", CheckpointError, r"optimizer is Adam with 6 groups, the live one SGD with 6.*Build the Trainer"),
        ({}, "adamw", CheckpointError, r"optimizer is Adam with 6 groups, the live one AdamW.*Build the Trainer"),
        ({}, "one group", CheckpointError, r"Adam with 6 groups, the live one Adam with 1\. Build"),
    ],
    ids=[
        "fewer",
        "order",
        "many",
        "head",
        "layers",
        "within a block",
        "flatten",
        "average",
        "maximum",
        "dropout",
        "image size",
        "backbone",
        "sgd",
        "adamw",
        "groups",
    ],
)
def test_the_checkpoint_of_another_model_is_refused(
    make_backbone: Maker,
    data: Data,
    run_file: Path,
    model: dict[str, Any],
    optimizer: str,
    error: type[Exception],
    message: str,
) -> None:
    """Another model or optimizer is refused with what differs, and the trainer is bit for bit as it was."""
    backbone = make_backbone(batch_norm=True, image_size=model.get("image_size", 32), seed=7)
    backbone.name = model.get("name", "tiny")
    head = {name: model[name] for name in ("layers", "pooling") if name in model}
    classes, hidden = model.get("classes", ["cat", "dog", "owl"]), model.get("hidden", (16,))
    network = tk.attach_head(backbone, classes, hidden=hidden, dropout=model.get("dropout", 0.5), **head)
    one_group = torch.optim.Adam(network.parameters())
    trainer = tk.Trainer(network, optimizer=one_group if optimizer == "one group" else optimizer, device="cpu")
    train(trainer, (data[0], data[1] % 2))
    before = copy.deepcopy(flat(trainer.state_dict())), modes(network)

    with pytest.raises(error, match=message):
        trainer.load(run_file)

    assert differing(flat(trainer.state_dict()), before[0]) == []
    assert modes(network) == before[1]


# --- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a": torch.zeros(2)},
            rf"x\.pt has checkpoint format none: .*, which reads format {archive.FORMAT}\. Expected",
        ),
        ([1, 2], r"x\.pt has checkpoint format none"),
        ({"format": archive.FORMAT}, r"x\.pt lacks model"),
    ],
    ids=["state dict", "list", "empty"],
)
def test_a_file_of_other_tensors_is_refused(tmp_path: Path, content: object, message: str) -> None:
    """A state dict, a list, and a file that has the format's number and nothing else are refused by name."""
    torch.save(content, tmp_path / "x.pt")

    with pytest.raises(CheckpointError, match=message):
        tk.load_model(tmp_path / "x.pt")


def test_a_checkpoint_is_plain_types_and_tensors(run_file: Path) -> None:
    """A checkpoint loads with weights_only=True, says what wrote it, and has the permissions of any new file."""
    state = torch.load(run_file, weights_only=True)

    assert state["format"] == archive.FORMAT
    assert state["versions"]["torch"] == version("torch")
    assert set(state["versions"]) == {"transferkit", "torch", "torchvision"}
    (run_file.parent / "plain").touch()
    assert oct(run_file.stat().st_mode) == oct((run_file.parent / "plain").stat().st_mode)


def test_a_path_in_the_current_folder_is_written(
    make_backbone: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare file name, as str, is written into the current folder."""
    monkeypatch.chdir(tmp_path)

    tiny_trainer(make_backbone).save("run.pt")

    assert archive.read_checkpoint("run.pt")["format"] == archive.FORMAT


def test_a_loader_without_a_length_is_resumed_in_the_middle_of_an_epoch(make_backbone, data, tmp_path):
    """Of a stream the batches already trained on are read and passed over."""
    loader, trainers = DataLoader(Stream(data), batch_size=8), []
    for resume_from in (None, tmp_path / "step-00000004.pt"):
        trainers.append(make_trainer(tk.attach_head(make_backbone(), 3)))
        callbacks = [tk.Checkpoint(tmp_path, every_steps=1, keep_last=10)]
        trainers[-1].fit(loader, epochs=2, callbacks=callbacks, resume_from=resume_from, verbose=0)

    whole, resumed = (trainer.model.state_dict() for trainer in trainers)
    assert [trainer.global_step for trainer in trainers] == [6, 6]
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize("hidden", [(), (16,)])
def test_dropout_of_the_head_is_on_after_loading(make_backbone: Maker, tmp_path: Path, hidden: tuple[int, ...]) -> None:
    """Layers before the first trainable parameter that were not frozen, such as dropout, follow `train` as before."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), 3, hidden=hidden, dropout=0.5), "head")
    before = [(name, module.training) for name, module in model.train().named_modules()]
    trainer = tk.Trainer(model, device="cpu")
    trainer.save(tmp_path / "run.pt")
    trainer.load(tmp_path / "run.pt")

    assert [(name, module.training) for name, module in model.train().named_modules()] == before
    loaded = tk.load_model(tmp_path / "run.pt", backbone=make_backbone())
    assert [(name, module.training) for name, module in loaded.train().named_modules()] == before
