"""Early stopping and gradual unfreezing, alone and in a run."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import transferkit as tk
from transferkit.errors import ArgumentError, UnknownLayerError
from transferkit.model.freezing import first_trainable


def report(epoch: int, **figures: float) -> tk.EpochReport:
    return tk.EpochReport(epoch, **{"loss": 1.0, "accuracy": 0.5, "lr": 1e-3, "epoch_s": 1.0, **figures})


def kerass(values: list[float], patience: int, min_delta: float, sign: float) -> bool:
    """What Keras's EarlyStopping does with a figure, epoch after epoch: whether the last of them ends the run."""
    best, waited = -math.inf, 0
    for place, value in enumerate(values):
        waited += 1
        if sign * value > best + min_delta or place == 0:
            best, waited = (sign * value if not math.isnan(value) else -math.inf), 0
    return waited >= patience


numbers = st.floats(0, 1) | st.just(math.nan)


@given(st.lists(numbers, min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([0.0, 0.1]), st.booleans())
def test_early_stopping_waits_as_keras_does(values, patience, min_delta, of_loss):
    """It ends after `patience` epochs that are not better than the best so far by `min_delta`; NaN is not better."""
    stopping = tk.EarlyStopping("val_loss" if of_loss else "val_accuracy", patience=patience, min_delta=min_delta)
    assert stopping.is_over(values) == kerass(values, patience, min_delta, -1.0 if of_loss else 1.0)


def test_early_stopping_ends_a_run(model, data):
    """A figure that cannot improve by `min_delta` ends the run after `patience` more epochs than the first."""
    trainer = tk.Trainer(tk.freeze_until(model, "head"), device="cpu")
    stopping = tk.EarlyStopping("loss", patience=2, min_delta=100.0)
    history = trainer.fit(data, epochs=9, callbacks=[stopping], verbose=0)
    assert len(history.reports) == 3


def test_early_stopping_begins_anew_with_each_run(model, data):
    """It counts the epochs of the run under way alone."""
    trainer = tk.Trainer(tk.freeze_until(model, "head"), device="cpu")
    callbacks = [tk.EarlyStopping("loss", patience=2, min_delta=100.0)]
    for _ in range(2):
        assert len(trainer.fit(data, epochs=9, callbacks=callbacks, verbose=0).reports) == 3


def test_a_resumed_run_stops_where_the_uninterrupted_one_does(make_backbone, data, tmp_path):
    """Nothing of early stopping is lost with the process: what it waited for counts on."""

    def fit(epochs):
        torch.manual_seed(0)
        model = tk.freeze_until(tk.attach_head(make_backbone(), 3), "head")
        callbacks = [tk.Checkpoint(tmp_path / "run"), tk.EarlyStopping("loss", patience=3, min_delta=100.0)]
        trainer = tk.Trainer(model, device="cpu", schedule="constant")
        return trainer.fit(data, epochs=epochs, callbacks=callbacks, resume_from=tmp_path / "run", verbose=0)

    assert len(fit(2).reports) == 2
    assert len(fit(9).reports) == 4


def test_watching_validation_without_any_is_refused_before_a_step(model, data):
    """The message names the figure and both remedies; no step was made."""
    trainer = tk.Trainer(tk.freeze_until(model, "head"), device="cpu")
    with pytest.raises(ArgumentError, match=r"monitors val_accuracy.*pass validation_data or validation_split.*loss"):
        trainer.fit(data, callbacks=[tk.EarlyStopping()], verbose=0, epochs=1)
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": 3}, "monitor=3 cannot be used: expected the name of a metric"),
        ({"patience": 0}, "patience=0 cannot be used: expected a whole number of 1"),
        ({"min_delta": -1}, "min_delta=-1 cannot be used: expected a finite number of 0"),
    ],
)
def test_early_stopping_refuses(arguments, message):
    """Arguments out of range are refused by name."""
    with pytest.raises(ArgumentError, match=message):
        tk.EarlyStopping(**arguments)


def test_gradual_unfreezing_moves_the_boundary_before_its_epochs(model, data):
    """Before each epoch that is named training begins at the layer that is named, and in between it stays."""
    trainer = tk.Trainer(tk.freeze_until(model, "head"), device="cpu", lr=1e-4)
    seen = []
    unfreezing = tk.GradualUnfreezing({1: "block5", 3: "block3", 4: None})
    look = lambda trainer, _: seen.append(first_trainable(trainer.model))  # noqa: E731 - after the epoch's unfreezing
    trainer.fit(data, epochs=5, callbacks=[look, unfreezing], verbose=0)
    assert seen == ["block5_conv1", "block5_conv1", "block3_conv1", "block1_conv1", "block1_conv1"]


def test_what_is_unfrozen_trains_and_what_is_not_keeps_its_bits(model, data):
    """Block 5 trains from epoch 1 on; blocks 1 to 4 keep every bit."""
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    trainer = tk.Trainer(tk.freeze_until(model, "head"), device="cpu", lr=1e-2)
    trainer.fit(data, epochs=2, callbacks=[tk.GradualUnfreezing({1: "block5"})], verbose=0)
    changed = {name for name, value in model.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"features.12.weight", "features.12.bias"}


def test_gradual_unfreezing_goes_on_in_a_resumed_run(make_backbone, data, tmp_path):
    """A run stopped at the epoch of an unfreezing and resumed has the weights of one that was not stopped."""

    def fit(folder, epochs):
        torch.manual_seed(0)
        model = tk.freeze_until(tk.attach_head(make_backbone(), 3), "head")
        callbacks = [tk.Checkpoint(folder), tk.GradualUnfreezing({1: "block5", 2: "block4"})]
        trainer = tk.Trainer(model, device="cpu", lr=1e-3, schedule="constant")
        trainer.fit(data, epochs=epochs, callbacks=callbacks, resume_from=folder, verbose=0)
        return model.state_dict()

    for epochs in (1, 2):
        fit(tmp_path / "stopped", epochs)
    resumed, whole = fit(tmp_path / "stopped", 4), fit(tmp_path / "whole", 4)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_an_unknown_layer_is_refused_before_a_step(model, data):
    """A name that is no layer is refused with close names before the first step."""
    trainer = tk.Trainer(tk.freeze_until(model, "head"), device="cpu")
    with pytest.raises(UnknownLayerError, match=r"block55.*Did you mean"):
        trainer.fit(data, callbacks=[tk.GradualUnfreezing({1: "block55"})], verbose=0, epochs=1)
    assert trainer.global_step == 0


@pytest.mark.parametrize("layers", [{}, ["block5"], {0: "block5"}, {"1": "block5"}, {1.5: "block5"}])
def test_gradual_unfreezing_refuses(layers):
    """It takes a mapping from epochs, 1 or more, to layers."""
    with pytest.raises(ArgumentError, match=r"layers.*expected a (mapping|whole number)"):
        tk.GradualUnfreezing(layers)


def test_callbacks_work_with_whatever_has_a_history():
    """They need nothing of a trainer but its history and model."""
    trainer = SimpleNamespace(history=tk.History([report(0, loss=1.0), report(1, loss=2.0)]))
    assert tk.EarlyStopping("loss", patience=1)(trainer, trainer.history.reports[-1]) is True
