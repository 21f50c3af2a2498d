"""Checkpoints: the same model, the same training to the bit, and nothing changed by a file that does not fit."""

import copy
import functools
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import transferkit as tk
from transferkit.errors import CheckpointError, HeadMismatchError
from transferkit.saving import archive

Maker = Callable[..., tk.Backbone]
Data = tuple[Tensor, Tensor]


def small_model(name: str = "vgg11", seed: int = 0, **head: Any) -> tk.TransferModel:
    """A real network of the library, which load_model can build again, with few parameters in its head."""
    torch.manual_seed(seed)
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


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


# --- load_model


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("vgg11", {"hidden": (16,), "dropout": 0.5}),
        ("vgg11_bn", {"hidden": (8, 4), "pooling": "avg"}),
        ("vgg11", {"pooling": "max"}),
    ],
)
def test_the_model_comes_back_from_the_file_alone(tmp_path: Path, data: Data, name: str, head: dict[str, Any]) -> None:
    """From a checkpoint alone comes a model in eval mode that gives the same logits for raw images, bit for bit."""
    model = tk.freeze_until(small_model(name, **head), "block5")
    trainer = tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2)
    trainer.fit((data[0][:4], data[1][:4]), batch_size=4, verbose=0)
    trainer.save(tmp_path / "model.pt")

    torch.manual_seed(99)
    loaded = tk.load_model(tmp_path / "model.pt")

    model.eval().to(memory_format=torch.contiguous_format)  # the trainer lays it out otherwise, which rounds otherwise
    images = data[0][:2]
    with torch.no_grad():
        assert torch.equal(loaded(loaded.backbone.preprocess(images)), model(model.backbone.preprocess(images)))
    assert not any(module.training for module in loaded.modules())
    assert differing(loaded.state_dict(), model.state_dict()) == []


def test_classes_preprocessing_and_head_come_back(tmp_path: Path) -> None:
    """Class names, convention, image size and the head's arguments are in the file."""
    model = small_model(hidden=(8,), dropout=0.25, pooling="avg")
    tk.Trainer(model, device="cpu").save(str(tmp_path / "model.pt"))

    loaded = tk.load_model(str(tmp_path / "model.pt"))

    assert loaded.classes == ("cat", "dog", "owl")
    assert loaded.backbone.preprocess == model.backbone.preprocess
    assert loaded.backbone.fingerprint == model.backbone.fingerprint
    assert loaded.head_arguments == {"hidden": [8], "dropout": 0.25, "pooling": "avg"}
    assert repr(loaded.head) == repr(model.head)


def test_a_convention_of_ones_own_comes_back(tmp_path: Path) -> None:
    """A Preprocessing of the user's own comes back from the file with every number."""
    own = tk.Preprocessing("mine", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (1, 2, 0))
    model = tk.attach_head(tk.load_backbone("vgg11", weights=None, image_size=40, preprocessing=own), 2)
    tk.Trainer(model, device="cpu").save(tmp_path / "model.pt")

    preprocess = tk.load_model(tmp_path / "model.pt").backbone.preprocess

    assert preprocess == own.with_image_size(40)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    assert torch.equal(preprocess(images), own.with_image_size(40)(images))


@pytest.mark.parametrize("layer", [None, "block1_relu1", "block3_bn1", "block5", "head", "head.logits"])
def test_what_is_frozen_comes_back(tmp_path: Path, layer: str | None) -> None:
    """The loaded model has the same parameters frozen, and train() moves the same modules into training mode."""
    model = tk.freeze_until(small_model("vgg11_bn", hidden=(8,), dropout=0.5), layer)
    tk.Trainer(model, device="cpu").save(tmp_path / "model.pt")

    loaded = tk.load_model(tmp_path / "model.pt")

    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    norms = [nn.BatchNorm2d, nn.Dropout]
    assert [m.training for m in loaded.train().modules() if type(m) in norms] == [
        m.training for m in model.train().modules() if type(m) in norms
    ]


def test_everything_frozen_comes_back(tmp_path: Path) -> None:
    """A model of which every parameter is frozen, to predict only, is loaded with every parameter frozen."""
    model = small_model().requires_grad_(False)
    tk.Trainer(model, device="cpu").save(tmp_path / "model.pt")

    assert not any(parameter.requires_grad for parameter in tk.load_model(tmp_path / "model.pt").parameters())


def test_an_own_head_must_be_given_again(tmp_path: Path) -> None:
    """A checkpoint with a head of the user's own asks for that head, and loads its weights into the one given."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(512, 3))
    model = small_model(head=head)
    tk.Trainer(model, device="cpu").save(tmp_path / "model.pt")
    again = nn.Sequential(nn.Flatten(), nn.Linear(512, 3))

    loaded = tk.load_model(tmp_path / "model.pt", head=again)

    assert loaded.head is again
    assert torch.equal(again[1].weight, head[1].weight)
    with pytest.raises(CheckpointError, match=r"model\.pt has a head of the user's own.*not in the file: pass head="):
        tk.load_model(tmp_path / "model.pt")


def test_another_own_head_is_refused(tmp_path: Path) -> None:
    """A head built in another way than the saved one is refused with the names that differ."""
    tk.Trainer(small_model(head=nn.Sequential(nn.Flatten(), nn.Linear(512, 3))), device="cpu").save(tmp_path / "a.pt")
    other = nn.Sequential(nn.Flatten(), nn.Linear(512, 4), nn.Linear(4, 3))

    with pytest.raises(
        CheckpointError, match=r"missing head\.2\.weight.*head\.1\.weight \(3, 512\) instead of \(4, 51"
    ):
        tk.load_model(tmp_path / "a.pt", head=other)


# --- resuming

OPTIMIZERS = [
    {"optimizer": "adam", "lr": {"backbone": 1e-3, "head": 1e-2}},
    {"optimizer": "sgd", "weight_decay": 0.01},
    {"optimizer": "rmsprop"},
    {"optimizer": functools.partial(torch.optim.AdamW, amsgrad=True)},
]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=["adam", "sgd", "rmsprop", "amsgrad"])
def test_resumed_training_is_the_uninterrupted_one(
    make_backbone: Maker, data: Data, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Three steps, a checkpoint, and three more in a fresh trainer give bit for bit what six steps give."""
    whole = tiny_trainer(make_backbone, **options)
    train(whole, data)
    whole.save(tmp_path / "run.pt")
    halfway = copy.deepcopy(flat(whole.state_dict()))
    train(whole, data)

    resumed = tiny_trainer(make_backbone, seed=7, boundary=None, **options)
    torch.rand(100)
    resumed.load(tmp_path / "run.pt")
    assert differing(flat(resumed.state_dict()), halfway) == []
    train(resumed, data)

    assert differing(resumed.state_dict(), whole.state_dict()) == []
    assert modes(resumed.model) == modes(whole.model)
    assert (resumed.epoch, resumed.global_step, resumed.seed) == (2, 6, 0)


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
    """A checkpoint from before the boundary moved brings back its boundary, and training from it is as it was."""
    trainer = tiny_trainer(make_backbone, boundary="block4")
    train(trainer, data)
    trainer.save(tmp_path / "run.pt")
    train(trainer, data)
    expected = copy.deepcopy(flat(trainer.state_dict()))

    tk.freeze_until(trainer.model, None)
    train(trainer, data)
    trainer.load(tmp_path / "run.pt")
    train(trainer, data)

    assert differing(flat(trainer.state_dict()), expected) == []


def test_hand_frozen_parameters_stay_frozen_through_a_checkpoint(make_backbone: Maker, tmp_path: Path) -> None:
    """What the user froze by hand behind the first trainable layer is still frozen after loading."""
    trainer = tiny_trainer(make_backbone, boundary="block4")
    trainer.model.head.fc1.requires_grad_(False)
    before = [parameter.requires_grad for parameter in trainer.model.parameters()]
    trainer.save(tmp_path / "run.pt")

    trainer.load(tmp_path / "run.pt")

    assert [parameter.requires_grad for parameter in trainer.model.parameters()] == before


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

    assert [(group["lr"], group["initial_lr"]) for group in trainer.optimizer.param_groups] == [
        *[(1e-5,) * 2] * 5,
        (1e-3,) * 2,
    ]


def test_saving_changes_nothing(make_backbone: Maker, data: Data, tmp_path: Path) -> None:
    """Training with a checkpoint after the first epoch is training without."""
    saving, plain = tiny_trainer(make_backbone), tiny_trainer(make_backbone)

    train(saving, data)
    saving.save(tmp_path / "run.pt")
    train(saving, data)
    train(plain, data, epochs=2)

    assert differing(saving.state_dict(), plain.state_dict()) == []


# --- checkpoints that do not fit


def refused_unchanged(trainer: tk.Trainer, path: Path, error: type[Exception], message: str) -> None:
    """The trainer refuses the checkpoint and is bit for bit as it was."""
    before = copy.deepcopy(flat(trainer.state_dict())), modes(trainer.model)
    with pytest.raises(error, match=message):
        trainer.load(path)
    assert differing(flat(trainer.state_dict()), before[0]) == []
    assert modes(trainer.model) == before[1]


@pytest.fixture
def run_file(make_backbone: Maker, data: Data, tmp_path: Path) -> Path:
    """The checkpoint of a short run."""
    trainer = tiny_trainer(make_backbone)
    train(trainer, data)
    trainer.save(tmp_path / "run.pt")
    return tmp_path / "run.pt"


@pytest.mark.parametrize(
    ("classes", "theirs"), [(["cat", "dog"], r"2 \(cat, dog"), (["cat", "owl", "dog"], r"3 \(cat, owl, dog")]
)
def test_other_classes_are_refused(
    make_backbone: Maker, data: Data, run_file: Path, classes: list[str], theirs: str
) -> None:
    """Another number of classes, or another order, is refused with both lists, and nothing is changed."""
    trainer = tk.Trainer(tk.attach_head(make_backbone(batch_norm=True), classes, hidden=(16,)), device="cpu")
    train(trainer, (data[0], data[1] % 2))

    refused_unchanged(
        trainer, run_file, HeadMismatchError, rf"has 3 classes \(cat, dog, owl.*the model {theirs}.*load_model"
    )


def test_another_head_is_refused(make_backbone: Maker, data: Data, run_file: Path) -> None:
    """A head of other widths is refused with names and shapes, and nothing is changed."""
    model = tk.attach_head(make_backbone(batch_norm=True), ["cat", "dog", "owl"], hidden=(17,))
    trainer = tk.Trainer(model, device="cpu")
    train(trainer, data)

    refused_unchanged(
        trainer, run_file, CheckpointError, r"head\.fc1\.weight \(16, 8\) instead of \(17, 8\).*head built otherwise"
    )


def test_another_preprocessing_is_refused(make_backbone: Maker, data: Data, run_file: Path) -> None:
    """Another image size or convention is refused with both, and nothing is changed."""
    model = tk.attach_head(make_backbone(batch_norm=True, image_size=48), ["cat", "dog", "owl"], hidden=(16,))
    trainer = tk.Trainer(model, device="cpu")
    train(trainer, data)

    refused_unchanged(
        trainer, run_file, CheckpointError, r"preprocessing .*'image_size': 32.*'image_size': 48.*the same"
    )


def test_another_backbone_is_refused(make_backbone: Maker, run_file: Path) -> None:
    """Another network is refused with both names, and nothing is changed."""
    trainer = tk.Trainer(small_model(), device="cpu")

    refused_unchanged(trainer, run_file, CheckpointError, r"backbone tiny, the model vgg11: expected the same")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_another_optimizer_is_refused(make_backbone: Maker, data: Data, run_file: Path, optimizer: str) -> None:
    """Another optimizer is refused with both names before the model's weights are touched."""
    trainer = tiny_trainer(make_backbone, seed=7, optimizer=optimizer)
    train(trainer, data)

    refused_unchanged(
        trainer,
        run_file,
        CheckpointError,
        r"optimizer is Adam with 6 groups, the live one (SGD|AdamW).*Build the Trainer",
    )


def test_other_optimizer_groups_are_refused(make_backbone: Maker, data: Data, run_file: Path) -> None:
    """An optimizer of the same class with other groups is refused, and nothing is changed."""
    model = tiny_trainer(make_backbone, seed=7).model
    trainer = tk.Trainer(model, optimizer=torch.optim.Adam(model.parameters()), device="cpu", precision="fp32")
    train(trainer, data)

    refused_unchanged(
        trainer, run_file, CheckpointError, r"Adam with 6 groups, the live one Adam with 1: expected the s"
    )


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the state in a checkpoint and write it back, whole."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["optimizer"]["state"].update(other={}), r"state for 'other', which the model does not have"),
        (
            lambda s: s["optimizer"]["state"]["head.fc1.bias"].update(exp_avg=torch.zeros(5)),
            r"exp_avg of shape \(5,\), torch\.float32, for head\.fc1\.bias: expected shape \(16,\)",
        ),
        (lambda s: s["model"]["weights"].pop("head.fc1.bias"), r"do not fit the model: missing head\.fc1\.bias"),
        (lambda s: s.pop("optimizer"), r"optimizer"),
        (lambda s: s["progress"].pop("epoch"), r"epoch"),
        (lambda s: s["model"].pop("classes"), r"classes"),
    ],
    ids=["stranger", "shape", "weight", "no optimizer", "no epoch", "no classes"],
)
def test_an_edited_checkpoint_is_refused(
    make_backbone: Maker, data: Data, run_file: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """A checkpoint whose parts do not belong together, or lack one, is refused; nothing is changed."""
    trainer = tiny_trainer(make_backbone, seed=7)
    train(trainer, data)

    refused_unchanged(trainer, edited(run_file, change), CheckpointError, message)


def test_a_boundary_the_model_does_not_have_is_refused(make_backbone: Maker, data: Data, run_file: Path) -> None:
    """A checkpoint frozen until a layer this model lacks is refused before the weights are touched."""
    trainer = tiny_trainer(make_backbone, seed=7)
    train(trainer, data)
    edited(run_file, lambda state: state["model"].update(first_trainable="block7_conv1"))

    refused_unchanged(trainer, run_file, tk.TransferKitError, r"block7_conv1")


# --- files that are no checkpoints


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """A checkpoint of little more than its form."""
    archive.write_checkpoint(tmp_path / "small.pt", {"model": {"a": torch.randn(64)}, "note": "text"})
    return tmp_path / "small.pt"


@pytest.mark.parametrize("read", [tk.load_model, archive.read_checkpoint])
def test_a_missing_file_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Where nothing is, or a folder, the message says what belongs there."""
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*none\.pt: expected a file that Trainer\.save wrote"):
        read(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*expected a file that Trainer\.save wrote"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"<html>", b"PK\x03\x04", b"\x80\x02."])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file of another kind is refused with its size and the way to load weights alone."""
    (tmp_path / "other.pt").write_bytes(content)

    with pytest.raises(
        CheckpointError, match=rf"other\.pt \({len(content)} bytes\) as a checkpoint.*load_backbone\(wei"
    ):
        tk.load_model(tmp_path / "other.pt")


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.7, 0.999])
def test_a_truncated_checkpoint_is_refused(small_file: Path, kept: float) -> None:
    """A checkpoint cut short anywhere is refused with its size."""
    small_file.write_bytes(small_file.read_bytes()[: int(kept * small_file.stat().st_size)])

    with pytest.raises(CheckpointError, match=r"small\.pt \(\d+ bytes\) as a checkpoint.*Trainer\.save wrote, whole"):
        tk.load_model(small_file)


def test_a_flipped_bit_in_a_weight_is_refused(small_file: Path) -> None:
    """One flipped bit in a tensor's numbers, which torch.load does not notice, is refused."""
    content = bytearray(small_file.read_bytes())
    numbers = torch.load(small_file, weights_only=True)["model"]["a"].numpy().tobytes()
    content[content.index(numbers) + 100] ^= 1
    small_file.write_bytes(content)

    with pytest.raises(
        CheckpointError, match=r"small\.pt .*damaged in its part '.*data/0'.*delete it and use an earli"
    ):
        tk.load_model(small_file)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, place: float, bit: int) -> None:
    """A flipped bit anywhere in a checkpoint gives a CheckpointError or, in padding, the same state: never another."""
    good = checkpoint_bytes()
    content = bytearray(good)
    content[int(place * len(content))] ^= 1 << bit
    path = tmp_path / "flipped.pt"
    path.write_bytes(content)

    assert outcome(path) in {"refused", "the same"}


@functools.cache
def checkpoint_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"format": archive.FORMAT, "model": {"a": torch.arange(20.0)}, "note": "text"}, file)
    return file.getvalue()


def outcome(path: Path) -> str:
    try:
        state = archive.read_checkpoint(path)
    except CheckpointError:
        return "refused"
    return "the same" if not differing(state, torch.load(io.BytesIO(checkpoint_bytes()))) else "another"


@pytest.mark.parametrize("part", ["name", "entry", "sizes", "method"])
def test_a_damaged_table_of_contents_is_refused(small_file: Path, part: str) -> None:
    """Damage to the file's table of contents is refused like any other."""
    content = bytearray(small_file.read_bytes())
    entry = content.index(b"PK\x01\x02")  # the first entry; a field lies at a fixed distance from its start
    content[entry + {"name": 46, "entry": 42, "sizes": 20, "method": 10}[part]] ^= 0xFF
    small_file.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"small\.pt.*(as a checkpoint|is damaged)"):
        tk.load_model(small_file)


def test_a_plain_state_dict_is_refused(tmp_path: Path, backbone: tk.Backbone) -> None:
    """A file of weights alone is refused as no checkpoint."""
    torch.save(backbone.state_dict(), tmp_path / "weights.pt")

    with pytest.raises(CheckpointError, match=r"weights\.pt has checkpoint format none: .*reads format 2"):
        tk.load_model(tmp_path / "weights.pt")


def test_a_file_without_a_state_is_refused(tmp_path: Path) -> None:
    """A file of a list, and one that has the format's number and nothing else, are refused."""
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"format": archive.FORMAT}, tmp_path / "empty.pt")

    with pytest.raises(CheckpointError, match=r"list\.pt has checkpoint format none"):
        tk.load_model(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"empty\.pt"):
        tk.load_model(tmp_path / "empty.pt")


def test_a_newer_format_is_refused(run_file: Path) -> None:
    """A checkpoint of a later format is refused with both numbers."""
    edited(run_file, lambda state: state.update(format=99))

    with pytest.raises(
        CheckpointError,
        match=r"run\.pt has checkpoint format 99, written by transferkit .*: this is.*reads format 2.*newer",
    ):
        tk.load_model(run_file)


@pytest.mark.parametrize("form", ["pickle", "torch", "inside a checkpoint"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, form: str) -> None:
    """A checkpoint with code in it is refused, and the code does not run."""
    path, canary = tmp_path / "evil.pt", tmp_path / "canary"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(canary), protocol=2))
    else:
        torch.save({"format": archive.FORMAT, "model": Payload(canary)} if form != "torch" else Payload(canary), path)

    with pytest.raises(CheckpointError, match=r"cannot read .*evil\.pt .*as a checkpoint"):
        tk.load_model(path)
    assert not canary.exists()


# --- writing


def test_a_checkpoint_is_plain_types_and_tensors(run_file: Path) -> None:
    """A checkpoint loads with weights_only=True, and says what wrote it."""
    state = torch.load(run_file, weights_only=True)

    assert state["format"] == archive.FORMAT
    assert state["versions"]["torch"] == version("torch")
    assert set(state["versions"]) == {"transferkit", "torch", "torchvision"}
    assert zipfile.ZipFile(run_file).testzip() is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt("stop")])
def test_an_interrupted_write_leaves_the_old_file(
    make_backbone: Maker, run_file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A full disk or Ctrl-C in mid-write leaves the old checkpoint whole, and no other file."""
    before = run_file.read_bytes()

    def broken(state: object, file: io.BufferedWriter) -> None:
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(type(error), match=re.escape(str(error))):
        tiny_trainer(make_backbone).save(run_file)
    assert run_file.read_bytes() == before
    assert [path.name for path in run_file.parent.iterdir()] == ["run.pt"]


def test_a_write_is_flushed_before_it_takes_the_old_ones_place(
    make_backbone: Maker, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk does not take the content, the old checkpoint stays and no other file."""
    before = run_file.read_bytes()

    def failing(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        tiny_trainer(make_backbone, seed=3).save(run_file)
    assert run_file.read_bytes() == before
    assert [path.name for path in run_file.parent.iterdir()] == ["run.pt"]


def test_a_missing_folder_is_refused(make_backbone: Maker, tmp_path: Path) -> None:
    """Saving into a folder that is not there is an OSError that names it."""
    with pytest.raises(OSError, match=r"no/such"):
        tiny_trainer(make_backbone).save(tmp_path / "no" / "such" / "run.pt")


def test_a_folder_in_the_way_leaves_no_file(make_backbone: Maker, tmp_path: Path) -> None:
    """Saving to the path of a folder is an OSError, and leaves no half-written file."""
    (tmp_path / "folder").mkdir()

    with pytest.raises(OSError, match=r"folder"):
        tiny_trainer(make_backbone).save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_checkpoint_can_be_read_by_others(run_file: Path) -> None:
    """A checkpoint has the permissions of any new file."""
    (run_file.parent / "plain").touch()

    assert oct(run_file.stat().st_mode) == oct((run_file.parent / "plain").stat().st_mode)


def test_a_path_in_the_current_folder_is_written(
    make_backbone: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare file name, as str, is written into the current folder."""
    monkeypatch.chdir(tmp_path)

    tiny_trainer(make_backbone).save("run.pt")

    assert archive.read_checkpoint("run.pt")["format"] == archive.FORMAT
