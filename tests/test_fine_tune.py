"""`fine_tune`: from a backbone and images to the best model, in one call."""

import os
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk
from tiny import CLASSES, make_backbone, make_images, weights_of
from transferkit import fine_tuning
from transferkit.errors import ArgumentError, CacheError, CheckpointError, CheckpointWriteError, TransferKitError
from transferkit.results.history import History
from transferkit.training.progress import BestWeights

PLAIN = {"device": "cpu", "precision": "fp32", "verbose": 0}


def faint_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images like `make_images`, in which the channel that tells the class is so faint that no solved head is sure."""
    images, targets = make_images(count)
    images[torch.arange(count), targets] -= 80
    return images, targets


def fine_tune(count: int = 72, data: object = None, **arguments: object) -> tk.Trainer:
    data = make_images(count) if data is None else data
    backbone = arguments.pop("backbone", None) or make_backbone()
    return tk.fine_tune(backbone, data, **{"classes": CLASSES, "epochs": 3, **PLAIN, **arguments})


def compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("features were computed")

    monkeypatch.setattr(fine_tuning, "features_of", fail)


def train_twice(**arguments: object) -> tk.Trainer:
    """Call `fine_tune` where training deeper layers is better, so that all images are trained on once more."""
    return fine_tune(data=faint_images(150), **{"lr": 1e-3, "seed": 2, **arguments})


def equal(first: tk.Trainer, second: tk.Trainer) -> bool:
    pairs = zip(first.model.state_dict().items(), second.model.state_dict().items(), strict=True)
    same = all(name == other and torch.equal(value, another) for (name, value), (other, another) in pairs)
    return same and first.model.temperature == second.model.temperature


def backbone_of(trainer: tk.Trainer) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights_of(trainer.model).items() if name.startswith("backbone")}


def test_it_learns():
    """Three classes that differ by one bright channel are told apart on images it has not seen."""
    trainer = fine_tune(150)
    assert trainer.evaluate(make_images(60, seed=5))["accuracy"] > 0.9


def test_the_same_seed_gives_the_same_model_bit_for_bit():
    """Without a budget in seconds everything depends on the seed; another seed gives another model."""
    torch.manual_seed(1)
    first = fine_tune(seed=3, epochs=2)
    torch.manual_seed(2)
    assert equal(first, fine_tune(seed=3, epochs=2))
    assert not equal(first, fine_tune(seed=4, epochs=2))


def test_the_backbone_that_was_passed_stays_as_it_was():
    """Deeper layers train in a copy: who probes the backbone afterwards does not see layers that saw the images."""
    backbone = make_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    trainer = train_twice(backbone=backbone)
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.backbone.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.training


@pytest.mark.parametrize("arguments", [{"count": 57}, {"freeze_until": "head"}])
def test_the_backbone_stays_where_there_is_too_little_of_something(arguments):
    """With 19 images of a class, or when told so, nothing but the head is fitted, to all images."""
    trainer = fine_tune(augment=None, **arguments)
    untouched = {f"backbone.{name}": value for name, value in make_backbone().state_dict().items()}
    assert all(torch.equal(value, untouched[name]) for name, value in backbone_of(trainer).items())
    solved = tk.Trainer(
        tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, dropout=0.5), "head"),
        loss=tk.CrossEntropy(label_smoothing=0.1),
        device="cpu",
        precision="fp32",
    )
    solved.solve(make_images(arguments.get("count", 72)), verbose=0)
    assert torch.equal(solved.model.head.logits.weight, trainer.model.head.logits.weight)


def test_without_time_the_head_is_fitted_to_all_images(capsys):
    """No time for deeper training, nor for another search of the penalty: one penalty, on 65 images, then on all."""
    trainer = fine_tune(budget=1e-3, verbose=2)
    printed = capsys.readouterr().out
    assert "no time for deeper training" in printed
    assert len({line.split("L2 ")[1] for line in printed.splitlines() if "solved the head" in line}) == 1
    assert trainer.model.head.standardize.num_images == 72
    untouched = {f"backbone.{name}": value for name, value in make_backbone().state_dict().items()}
    assert all(torch.equal(value, untouched[name]) for name, value in backbone_of(trainer).items())


def test_the_solved_head_stays_where_training_is_no_better(capsys):
    """Rates that wreck the model cost nothing: by the held-out images the solved head is better, and it comes back."""
    trainer = fine_tune(lr=30.0, augment=None, verbose=2)
    assert "no better on the held-out images: the solved head stays" in capsys.readouterr().out
    untouched = {f"backbone.{name}": value for name, value in make_backbone().state_dict().items()}
    assert all(torch.equal(value, untouched[name]) for name, value in backbone_of(trainer).items())
    assert equal(trainer, fine_tune(freeze_until="head", augment=None))
    assert not any(parameter.requires_grad for parameter in trainer.model.backbone.parameters())


def test_choices_of_the_user_are_kept(capsys):
    """Learning rate, epochs, batch size and the first layer that trains are those given."""
    rates = {"head": 1e-3, "backbone": 2e-3}
    trainer = fine_tune(lr=rates, epochs=2, batch_size=13, freeze_until="block3_conv1", verbose=2)
    assert "2 epochs of training from block3_conv1 on" in capsys.readouterr().out
    assert [group["base_lr"] for group in trainer.optimizer.param_groups] == [2e-3] * 5 + [1e-3]
    assert len(trainer.history.reports) == 2
    assert trainer.global_step == 2 * 5  # 65 images, since 7 are held out


def test_layers_are_passed_on():
    """The head takes the layers named."""
    trainer = fine_tune(layers=["block4", "block5"], freeze_until="head", augment=None)
    assert trainer.model.layers == ("block4_pool", "block5_pool")


def test_validation_data_is_what_chooses(capsys):
    """With validation data no training image is held out, and its figures decide."""
    trainer = fine_tune(validation_data=make_images(30, seed=7), epochs=1, verbose=2)
    printed = capsys.readouterr().out
    assert "on 30 held-out images" in printed
    assert "features of 72 images" in printed
    assert trainer.history.reports[0].val_accuracy is not None


def test_one_interrupt_ends_training_and_the_best_model_comes_back():
    """Ctrl-C in the second epoch: the call returns, with the best of what was there."""

    calls = []

    def interrupt(_probabilities: object, _targets: object) -> float:
        calls.append(1)
        if len(calls) == 4:  # training and validation of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    trainer = fine_tune(150, epochs=30, metrics={"interrupt": interrupt})
    assert len(trainer.history.reports) < 30
    assert trainer.evaluate(make_images(60, seed=5))["accuracy"] > 0.9


def test_a_run_that_broke_is_continued_as_if_it_had_not(tmp_path):
    """After an error in the middle, the same call with the same folder gives the bits of an undisturbed one."""
    whole = fine_tune(seed=1)
    calls = []

    def break_down(_probabilities: object, _targets: object) -> float:
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("power failure")
        return 0.0

    with pytest.raises(RuntimeError, match="power failure"):
        fine_tune(seed=1, folder=tmp_path / "run", metrics={"calm": break_down})
    again = fine_tune(seed=1, folder=tmp_path / "run", metrics={"calm": lambda *_: 0.0})
    assert equal(whole, again)


def test_the_second_run_is_continued_as_well(tmp_path, capsys):
    """After an error in the run on all images, the same call gives the bits of an undisturbed one."""
    whole = train_twice(verbose=2)
    assert "training again on all 150 images" in capsys.readouterr().out
    calls = []

    def break_down(_probabilities: object, _targets: object) -> float:
        calls.append(1)
        if len(calls) == 11:  # 1 before, 3 epochs with validation, 1 after, then the third epoch without
            raise RuntimeError("power failure")
        return 0.0

    with pytest.raises(RuntimeError, match="power failure"):
        train_twice(folder=tmp_path / "run", metrics={"calm": break_down})
    assert list((tmp_path / "run" / "all").glob("step-*.pt"))
    again = train_twice(folder=tmp_path / "run", metrics={"calm": lambda *_: 0.0})
    assert equal(whole, again)


def test_the_mean_of_both_runs_remains(monkeypatch):
    """The weights are half those of the run without the held-out images and half those of the run on all."""
    found = []
    monkeypatch.setattr(BestWeights, "average", lambda self: found.extend([self.copies, weights_of(self.model)]))
    train_twice()
    monkeypatch.undo()
    first, second = found
    mean = {name: (first[name] + second[name]) / 2 for name in first if first[name].is_floating_point()}
    trained = {name: value for name, value in weights_of(train_twice().model).items() if name in mean}
    assert "backbone.features.9.weight" in trained
    for name, value in trained.items():
        assert not torch.equal(first[name], second[name]) or "standardize" in name
        torch.testing.assert_close(value, mean[name])


def test_the_average_of_the_last_steps_counts_whichever_epoch_was_best(monkeypatch, capsys):
    """A first epoch that happens to be best on the few held-out images is not what is kept."""
    monkeypatch.setattr(fine_tuning._Job, "_train_again", lambda *_: None)
    last = train_twice()
    monkeypatch.setattr(History, "best_epoch", property(lambda history: 0 if history.reports else None))
    assert equal(last, train_twice(verbose=2))
    assert "restored" not in capsys.readouterr().out


def test_an_interrupt_in_the_second_run_leaves_the_first(capsys):
    """Ctrl-C while all images are trained on: the model of the first run remains."""
    calls = []

    def interrupt(_probabilities: object, _targets: object) -> float:
        calls.append(1)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tuning._Job, "_train_again", lambda *_: None)
        first = train_twice()
    trainer = train_twice(metrics={"interrupt": interrupt}, verbose=2)
    assert "interrupted" in capsys.readouterr().out
    assert equal(first, trainer)
    assert trainer.history.reports[-1].val_accuracy is not None


def test_a_budget_that_is_spent_ends_training_between_epochs(monkeypatch, capsys):
    """Where epochs take longer than planned, the run ends with the last that fits, and nothing is trained again."""
    monkeypatch.setattr(fine_tuning._Job, "plan", lambda *_: fine_tuning._Plan("block5", 1000, None))
    trainer = fine_tune(epochs=None, budget=0.5, verbose=2)
    assert 1 <= len(trainer.history.reports) < 1000
    assert "once more" not in capsys.readouterr().out


def test_a_plan_made_by_the_clock_is_kept(tmp_path, capsys):
    """With a budget the number of epochs depends on the machine: a continued run has the one it began with."""
    folder = tmp_path / "run"
    fine_tune(folder=folder, epochs=2, freeze_until="block5", augment=None)
    fine_tune(folder=folder, epochs=None, freeze_until="auto", budget=1e4, augment=None, verbose=2)
    assert "2 epochs of training from block5" in capsys.readouterr().out


@pytest.mark.parametrize("budget", [None, 1e9])
def test_minutes_are_announced_where_no_budget_limits_them(monkeypatch, capsys, budget):
    """Who has set no budget is told, before training, that it takes minutes and how to end it sooner."""
    monkeypatch.setattr(fine_tuning, "_STEP_PASSES", 1e9)  # any training takes hours
    fine_tune(budget=budget, epochs=3, verbose=1)
    assert ("budget= or Ctrl-C ends it sooner" in capsys.readouterr().out) == (budget is None)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a run of 2 epochs from block 5 on."""
    folder = tmp_path_factory.mktemp("begun")
    fine_tune(folder=folder, epochs=2, freeze_until="block5", augment=None)
    return folder


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"epochs": 4}, "epochs=2, this call has epochs=4"),
        ({"freeze_until": "block4"}, "freeze_until=block5, this call has freeze_until=block4"),
        ({"lr": 1e-3}, "lr=None, this call has lr=0.001"),
        ({"seed": 1}, "seed=0, this call has seed=1"),
        ({"batch_size": 8}, "batch_size=32"),
        ({"augment": "flip"}, "augment=None"),
        ({"layers": ["block4", "block5"]}, "layers=None"),
        ({"loss": tk.CrossEntropy()}, "loss="),
        ({"data": make_images(72, seed=5)}, " data="),
        ({"validation_data": make_images(9)}, "validation_data=None"),
        ({"backbone": make_backbone(seed=3)}, "backbone="),
    ],
)
def test_other_choices_than_those_of_the_folder_are_refused(begun, monkeypatch, other, name):
    """A folder of a call with other arguments is not continued: the call says which, before it computes anything."""
    arguments = {"folder": begun, "epochs": 2, "freeze_until": "block5", "augment": None}
    compute_nothing(monkeypatch)
    with pytest.raises(ArgumentError, match=f"holds a run with.*{name}.*Name another folder"):
        fine_tune(**{**arguments, **other})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"plan": {"epochs": 2}}', '{"epochs": 2}'])
def test_a_damaged_plan_is_refused(tmp_path, monkeypatch, content):
    """A folder whose plan cannot be read is refused with what to do, before anything is computed."""
    (tmp_path / "plan.json").write_text(content)
    compute_nothing(monkeypatch)
    with pytest.raises(CheckpointError, match=r"plan.json cannot be read.*name another one"):
        fine_tune(folder=tmp_path)


@pytest.mark.parametrize("folder", ["file", 3])
def test_a_folder_that_cannot_be_is_refused(tmp_path, monkeypatch, folder):
    """A file in the place of the folder, or no path at all, is refused before anything is computed."""
    (tmp_path / "file").write_text("")
    compute_nothing(monkeypatch)
    with pytest.raises(CheckpointWriteError, match="Expected a folder"):
        fine_tune(folder=tmp_path / folder if isinstance(folder, str) else folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"freeze_until": "blok4"},
        {"freeze_until": "block5", "layers": ["block3"]},
        {"augment": "flp"},
        {"epochs": 0},
        {"epochs": 2.5},
        {"epochs": "3"},
        {"data": (torch.randn(72, 3, 32, 32), torch.arange(72) % 3)},  # preprocessed, and to be augmented
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(monkeypatch, wrong):
    """A layer, a change of images or a number that cannot be used costs no features."""
    compute_nothing(monkeypatch)
    with pytest.raises(TransferKitError):
        fine_tune(**wrong)


def test_loaders_that_keep_their_order_are_data():
    """A `DataLoader` that only reads a data set gives the model of that data set, for validation, too."""
    train, held_out = TensorDataset(*make_images(72)), TensorDataset(*make_images(30, seed=7))
    plain = fine_tune(data=train, validation_data=held_out, epochs=1)
    assert equal(plain, fine_tune(data=DataLoader(train, 16), validation_data=DataLoader(held_out, 16), epochs=1))
    with pytest.raises(ArgumentError, match=r"validation_data is a DataLoader that shuffles.*pass its data set"):
        fine_tune(data=train, validation_data=DataLoader(held_out, 16, shuffle=True))


@pytest.mark.parametrize(("call", "epochs"), [(1, 0), (8, 3)])
def test_an_interrupt_while_models_are_compared_leaves_the_best_so_far(capsys, call, epochs):
    """Ctrl-C in the comparison before or after the training: the call returns, and nothing more is computed."""
    calls = []

    def interrupt(_probabilities: object, _targets: object) -> float:
        calls.append(1)
        if len(calls) == call:  # 1 before, 3 epochs with validation, 1 after
            os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    trainer = train_twice(metrics={"interrupt": interrupt}, verbose=2)
    assert trainer.epoch == epochs
    assert len(calls) == call
    printed = capsys.readouterr().out
    assert "interrupted: kept the best model so far" in printed
    assert printed.count("solved the head") == 1
    assert trainer.evaluate(faint_images(60))["accuracy"] > 0.5


def test_a_misspelt_layer_leaves_no_plan(tmp_path):
    """After a call that was refused, the corrected one runs."""
    with pytest.raises(TransferKitError):
        fine_tune(folder=tmp_path / "run", freeze_until="blok5")
    assert fine_tune(folder=tmp_path / "run", freeze_until="block5", epochs=1).global_step > 0


def test_several_labels():
    """With binary cross-entropy an image may have several labels, to the end."""
    images, targets = make_images(72)
    rows = torch.nn.functional.one_hot(targets, 3)
    rows[::3, 0] = 1
    trainer = fine_tune(data=(images, rows), loss=tk.BinaryCrossEntropy(), epochs=1)
    assert trainer.predict(images).dtype == np.bool_
    assert trainer.predict(images).shape == (72, 3)


def test_classes_come_from_the_data():
    """A data set that names its classes needs no others; targets alone tell their number; neither is refused."""
    images, targets = make_images(30)
    named = TensorDataset(images, targets)
    named.classes = CLASSES
    quick = {"classes": None, "freeze_until": "head", "augment": None}
    assert fine_tune(data=named, **quick).model.classes == tuple(CLASSES)
    assert fine_tune(data=(images, targets), **quick).model.classes == ("0", "1", "2")
    assert fine_tune(data=TensorDataset(images, targets), **quick).model.classes == ("0", "1", "2")
    triples = TensorDataset(images, targets, targets)
    with pytest.raises(ArgumentError, match=r"classes of a TensorDataset are not known.*pass classes="):
        fine_tune(data=triples, classes=None)


def test_a_loader_that_shuffles_is_refused():
    """Features cannot be kept of images whose order nobody knows; the message says what to pass."""
    loader = DataLoader(TensorDataset(*make_images(30)), batch_size=5, shuffle=True)
    with pytest.raises((CacheError, ArgumentError), match=r"DataLoader.*pass"):
        fine_tune(data=loader)


@pytest.mark.parametrize(("name", "value"), [("budget", 0), ("budget", -1.0), ("seed", -1), ("batch_size", 0)])
def test_values_out_of_range_are_refused(name, value):
    """A number that makes no sense is refused by name, before anything is computed."""
    with pytest.raises(ArgumentError, match=name):
        fine_tune(**{name: value})
