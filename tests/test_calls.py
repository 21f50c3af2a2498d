"""What people type who come from Keras, fastai or scikit-learn: it works, or one sentence says what to write."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VGG16_Weights

import transferkit as tk
from tiny import CLASSES, make_backbone, make_images, make_model, make_trainer
from transferkit.base.display import Display
from transferkit.errors import ArgumentError, CallError, MissingMethodError
from transferkit.model.backbone import _find_weights

DATA = make_images()


@pytest.fixture
def trainer():
    return make_trainer(make_model(make_backbone(), "head"))


CALLS = {
    "fit(x, y)": (lambda t: t.fit(*DATA), r"fit\(data, validation_data=...\).*\(images, targets\)"),
    "fit(x=, y=)": (lambda t: t.fit(x=DATA[0], y=DATA[1]), r"fit\(\(images, targets\)\)"),
    "fit(train, val)": (lambda t: t.fit(DATA, DATA), "validation_data="),
    "fit()": (lambda t: t.fit(), "data"),
    "metrics": (lambda t: t.fit(DATA, metrics=["accuracy"]), "Trainer .*metrics="),
    "class_weight": (lambda t: t.fit(DATA, class_weight={0: 1.0}), r"CrossEntropy\(class_weights="),
    "sample_weight": (lambda t: t.fit(DATA, sample_weight=[1.0]), "loss of your own"),
    "shuffle": (lambda t: t.fit(DATA, shuffle=True), "shuffled in each epoch"),
    "learning_rate": (lambda t: t.fit(DATA, learning_rate=1e-3), "write lr="),
    "n_epochs": (lambda t: t.fit(DATA, n_epochs=3), "write epochs="),
    "val_data": (lambda t: t.fit(DATA, val_data=DATA), "write validation_data="),
    "steps_per_epoch": (lambda t: t.fit(DATA, steps_per_epoch=3), "leave it out"),
    "workers": (lambda t: t.fit(DATA, workers=3), "write num_workers="),
    "optimizer in fit": (lambda t: t.fit(DATA, optimizer="adam"), "Trainer has optimizer="),
    "typo": (lambda t: t.fit(DATA, epoch=3), "Did you mean 'epochs'"),
    "predict verbose": (lambda t: t.predict(DATA[0], verbose=0), "leave it out"),
    "predict(x, 32)": (lambda t: t.predict(DATA[0], 32), "batch_size="),
    "evaluate(x, y)": (lambda t: t.evaluate(*DATA), r"\(images, targets\)"),
    "Trainer(m, 'adam', lr)": (lambda t: tk.Trainer(t.model, "adam", 1e-3), "optimizer=..., lr="),
    "Trainer(learning_rate)": (lambda t: tk.Trainer(t.model, learning_rate=1e-3), "write lr="),
    "Trainer(epochs)": (lambda t: tk.Trainer(t.model, epochs=3), r"Trainer\.fit .*epochs="),
    "Trainer(criterion)": (lambda t: tk.Trainer(t.model, criterion=nn.CrossEntropyLoss()), "write loss="),
    "Trainer(momentum)": (lambda t: tk.Trainer(t.model, momentum=0.9), r"functools\.partial"),
    "pretrained": (lambda _: tk.load_backbone("vgg11", pretrained=True), "write weights="),
    "include_top": (lambda _: tk.load_backbone("vgg11", include_top=False), "attach_head"),
    "input_shape": (lambda _: tk.load_backbone("vgg11", input_shape=(224, 224, 3)), "write image_size="),
    "num_classes": (lambda _: tk.attach_head(make_backbone(), num_classes=3), "write classes="),
    "trainable": (lambda _: tk.fine_tune(make_backbone(), DATA, trainable=False), "write freeze_until="),
    "search": (lambda t: tk.search(t.model, {}, DATA, epochs=2), "Trainer.fit"),
    "restore_best_weights": (lambda _: tk.EarlyStopping(restore_best_weights=True), "leave it out"),
    "mode": (lambda _: tk.EarlyStopping("val_loss", mode="min"), "leave it out"),
    "save_best_only": (lambda _: tk.Checkpoint("never", save_best_only=True), "best weights back"),
    "weight": (lambda _: tk.CrossEntropy(weight=[1.0, 2.0]), "write class_weights="),
}


@pytest.mark.parametrize("call", CALLS)
def test_arguments_of_others_are_named_as_here(trainer, call):
    """One sentence says what to write instead; nothing was done; it is still a TypeError."""
    action, sentence = CALLS[call]
    with pytest.raises(CallError, match=sentence):
        action(trainer)
    assert trainer.global_step == 0
    assert issubclass(CallError, TypeError)
    assert not Path("never").exists()


def test_an_error_inside_a_call_is_its_own(trainer):
    """A TypeError of the user's code is not taken for a call that does not fit."""

    def wrong(_trainer, _report):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine") as caught:
        trainer.fit(DATA, epochs=1, callbacks=[wrong], verbose=0)
    assert not isinstance(caught.value, CallError)


METHODS = ["fit", "evaluate", "predict", "predict_proba", "predict_classes", "lr_find", "solve", "summary", "save"]


@pytest.mark.parametrize("kind", ["model", "backbone", "loaded"])
def test_a_model_says_who_has_its_methods(tmp_path, kind):
    """`model.fit`, and `load_model(path).predict`; to ask whether there is one is no error."""
    model = make_model(tk.load_backbone("vgg11", weights=None, image_size=32))
    if kind == "loaded":
        tk.save_model(model, tmp_path / "a.pt")
        model = tk.load_model(tmp_path / "a.pt")
    owner = model.backbone if kind == "backbone" else model
    for name in METHODS:
        with pytest.raises(MissingMethodError, match=rf"has no {name}: write .*{name}.*\("):
            getattr(owner, name)
        assert not hasattr(owner, name)


def test_trainable_freezes_nothing_and_is_refused(trainer):
    """Keras's attribute, on the model or on a layer, would be ignored in silence."""
    for module in (trainer.model.backbone, trainer.model.backbone.features[0]):
        module.trainable = False
        with pytest.raises(ArgumentError, match=r"freezes nothing in torch.*freeze_until"):
            trainer.fit(DATA, verbose=0)
        del module.trainable


def test_what_is_plain_works(trainer, tmp_path):
    """Capital letters, pairs of sizes, Keras's name of the weights, metrics=["accuracy"], history["loss"], folders."""
    assert tk.load_backbone("VGG11", weights=None, image_size=(64, 64)).image_size == 64
    for size in ([64, 64], (64, 64, 3)):
        assert tk.load_backbone("vgg11", weights=None, image_size=size).image_size == 64
    with pytest.raises(ArgumentError, match=r"\(64, 96\)"):
        tk.load_backbone("vgg11", weights=None, image_size=(64, 96))
    assert _find_weights("imagenet", "vgg16") == VGG16_Weights.DEFAULT
    assert _find_weights("imagenet1k_features", "vgg16") == VGG16_Weights.IMAGENET1K_FEATURES
    built = [tk.Trainer(trainer.model, optimizer=name).optimizer for name in ("SGD", "sgd")]
    assert type(built[0]) is torch.optim.SGD
    assert [group["lr"] for group in built[0].param_groups] == [group["lr"] for group in built[1].param_groups]
    assert tk.Trainer(trainer.model, metrics=["accuracy"]).metrics == {}
    folder = tmp_path / "runs" / "a"
    history = trainer.fit(DATA, epochs=2, verbose=0, callbacks=[tk.Checkpoint(folder)])
    assert history["loss"] == history.history["loss"]
    assert list(history) == list(history.history)
    with pytest.raises(ArgumentError, match=r"history\['acuracy'\].*'accuracy'"):
        history["acuracy"]
    assert list(folder.glob("step-*.pt"))
    trainer.fit(DATA, epochs=1, verbose=0, callbacks=None)


@pytest.mark.parametrize(
    ("callbacks", "sentence"),
    [
        ([tk.Checkpoint], r"the class Checkpoint.*Checkpoint\("),
        ([tk.EarlyStopping], "the class EarlyStopping"),
        (tk.EarlyStopping("loss"), "expected a list"),
        ([lambda report: None], r"takes \(report\): expected a function of \(trainer, report\)"),
        (["early"], "expected a list of functions"),
    ],
)
def test_callbacks_that_cannot_be_called_are_refused_before_a_step(trainer, callbacks, sentence):
    """A class, a single one, a function of other arguments, a name."""
    with pytest.raises(ArgumentError, match=sentence):
        trainer.fit(DATA, callbacks=callbacks, verbose=0)
    assert trainer.global_step == 0


@pytest.mark.parametrize("build", [make_model(make_backbone()), make_backbone(), None])
def test_search_wants_a_function(build):
    """A model is no function that makes one."""
    with pytest.raises(ArgumentError, match=r"lambda: attach_head"):
        tk.search(build, {"lr": [1e-3]}, DATA, validation_data=DATA, verbose=0)


def test_freeze_until_says_which_comes_first(trainer):
    """The model, then the layer."""
    with pytest.raises(ArgumentError, match=r"freeze_until\(model, 'head'\)"):
        tk.freeze_until("head", trainer.model)


# ---- what is shown


def test_the_time_left_is_that_of_epochs_on_cached_features(trainer, capsys, monkeypatch):
    """The first epoch computes features; the time of that is not counted for those to come."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    fill = type(trainer.training.features).fill

    def slow(*arguments, **named):
        clock[0] += 1000
        return fill(*arguments, **named)

    monkeypatch.setattr(type(trainer.training.features), "fill", slow)
    trainer.model.head.standardize.num_images.fill_(1)  # or the features are computed before the first epoch
    tick = lambda *_: clock.__setitem__(0, clock[0] + 2)  # noqa: E731
    trainer.model.head.register_forward_pre_hook(tick)
    trainer.fit(DATA, epochs=3, batch_size=24)
    shown = " ".join(capsys.readouterr().out.split())
    assert "1,002.0 s 0 images/s 4 s left" in shown.replace("1002.0", "1,002.0")


def test_the_epoch_put_back_and_a_finished_run_are_told(trainer, capsys, tmp_path):
    """After a run whose best epoch is not its last, and where nothing is left to do."""
    folder = tmp_path / "run"
    history = trainer.fit(
        DATA, validation_data=DATA, epochs=4, lr=50.0, callbacks=[tk.Checkpoint(folder)], resume_from=folder
    )
    assert history.best_epoch < 3
    assert f"restored the weights of epoch {history.best_epoch + 1}, the best" in capsys.readouterr().out
    other = make_trainer(make_model(make_backbone(), "head"))
    other.fit(DATA, validation_data=DATA, epochs=4, lr=50.0, callbacks=[tk.Checkpoint(folder)], resume_from=folder)
    assert "nothing to train: this run ended after epoch 4 of 4" in capsys.readouterr().out


def test_lines_fit_80_columns(capsys):
    """Figures go on in a second line; what follows the last break is whole."""
    figures = "  ".join(f"figure_{number} 0.1234" for number in range(12))
    Display(2).say(figures)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert "".join(lines) == figures


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "cp437"])
def test_output_in_any_encoding(trainer, monkeypatch, encoding):
    """What the output cannot show is escaped, and the run goes on."""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
    Display(2).say("café ± \udcff 猫")
    trainer.solve(DATA, verbose=2)
    assert b"solved the head" in output.getvalue()
    assert output.getvalue().decode(encoding).count("\n") == 3


def test_an_output_that_is_full_ends_no_run(trainer, monkeypatch):
    """A disk that takes no more lines."""
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        trainer.solve(DATA, verbose=2)
        with contextlib.suppress(OSError):
            full.close()
    assert trainer.model.head.logits.weight.any()


@pytest.mark.parametrize("logger", ["CSVLogger"])
def test_a_log_that_cannot_be_written_ends_no_run(trainer, tmp_path, monkeypatch, logger):
    """A warning names the file, and all epochs are trained."""

    def full(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transferkit.training.loggers.atomic_write", full)
    with pytest.warns(UserWarning, match=r"could not write .*log\.csv, and the run goes on.*No space"):
        trainer.fit(DATA, epochs=3, verbose=0, callbacks=[getattr(tk, logger)(tmp_path / "log.csv")])
    assert trainer.epoch == 3


def test_a_figure_without_a_window_says_what_to_do(trainer):
    """In a script `show()` warns; nothing is raised."""
    pytest.importorskip("matplotlib")
    history = trainer.fit(DATA, epochs=1, verbose=0)
    with pytest.warns(UserWarning, match=r"savefig"):
        history.plot().show()


class ZMQInteractiveShell:
    """As much of a notebook's shell as a figure needs."""

    def __init__(self):
        self.events, self.callbacks = self, []

    def register(self, _event, function):
        self.callbacks.append(function)

    def unregister(self, _event, function):
        self.callbacks.remove(function)

    def after_cell(self):
        for function in list(self.callbacks):
            function()


@pytest.mark.parametrize("last", [True, False])
def test_a_notebook_shows_each_figure_once(monkeypatch, last):
    """Wherever in a cell it is drawn: as its last line, or before."""
    pytest.importorskip("matplotlib")
    shown, shell = [], type("Shell", (ZMQInteractiveShell,), {})()  # Colab's is derived, too
    ipython = type(sys)("IPython")
    ipython.version_info = (9, 0)
    ipython.get_ipython = lambda: shell
    ipython.display = type(sys)("IPython.display")
    ipython.display.display = lambda data, raw: shown.append(data["image/png"][:4])
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    figure = tk.plot_confusion_matrix(tk.Assessment(np.eye(3, dtype=np.float32), np.ones(3), np.arange(3), CLASSES))
    if last:
        figure._ipython_display_()
    shell.after_cell()
    shell.after_cell()
    assert shown == [b"\x89PNG"]
