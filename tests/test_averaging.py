"""`WeightAverage`: the moving average of what trains, against one written out here, and in runs that end and resume."""

from contextlib import contextmanager

import pytest
import torch

import transferkit as tk
from tiny import changed, figures, make_backbone, make_images, make_model, make_trainer, weights_of
from transferkit.errors import ArgumentError, CheckpointError
from transferkit.model.freezing import trainable_state


class Seen:
    """Remembers the weights after each step, in each validation and after each epoch; may fail in a validation."""

    def __init__(self, *, fails_in=None):
        self.steps, self.trains, self.validated, self.after = [], [], [], []
        self.fails_in = fails_in

    def after_step(self, trainer):
        self.steps.append(weights_of(trainer.model))
        self.trains.append(set(trainable_state(trainer.model)))

    @contextmanager
    def validating(self, trainer):
        self.validated.append(weights_of(trainer.model))
        if self.fails_in == len(self.validated):
            raise RuntimeError("something broke")
        yield

    def __call__(self, trainer, report):
        self.after.append(weights_of(trainer.model))


def average_of(seen, decay, steps):
    """Return the moving average over the first `steps` steps, written out: each weight since it began to train."""
    average = {}
    for number in range(steps):
        keep = min(decay, (number + 1) / (11 + number))
        for name in seen.trains[number]:
            live = seen.steps[number][name]
            before = average.get(name, live)
            average[name] = before * keep + live * (1 - keep) if live.is_floating_point() else live
    return average


def assert_average(weights, average):
    for name, value in average.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7)


def fit(model, callbacks, *, epochs=4, validated=True, **arguments):
    trainer = make_trainer(model, **arguments)
    validation = make_images(9, seed=1) if validated else None
    history = trainer.fit(
        make_images(), validation_data=validation, epochs=epochs, batch_size=8, callbacks=callbacks, verbose=0
    )
    return trainer, history


def new_model(boundary="block5", *, batch_norm=False, seed=0):
    return make_model(make_backbone(batch_norm=batch_norm, seed=seed), boundary, hidden=(16,), dropout=0.5)


@pytest.mark.parametrize("boundary", ["head", "block5", None])
@pytest.mark.parametrize("decay", [0.2, 0.99])
def test_validation_sees_the_average_over_all_steps(boundary, decay):
    """Each validation sees the exponential average of the weights of every step, and what is frozen as it is."""
    model, seen = new_model(boundary), Seen()
    before = weights_of(model)
    fit(model, [tk.WeightAverage(decay), seen])
    for epoch, weights in enumerate(seen.validated, start=1):
        average = average_of(seen, decay, 3 * epoch)
        assert_average(weights, average)
        assert all(torch.equal(weights[name], before[name]) for name in before.keys() - average.keys())
    assert changed(seen.validated[-1], model) | changed(seen.steps[-1], model)  # they differ from one another


def test_decay_0_averages_nothing():
    """With decay 0 the average is the last step's weights, bit for bit."""
    model, seen = new_model(), Seen()
    fit(model, [tk.WeightAverage(0.0), seen])
    for epoch, weights in enumerate(seen.validated, start=1):
        assert all(torch.equal(value, seen.steps[3 * epoch - 1][name]) for name, value in weights.items())


def test_the_best_weights_are_the_averaged_ones():
    """The model ends with the average of the best epoch, which scores what the history says."""
    model, seen = new_model(), Seen()
    trainer, history = fit(model, [tk.WeightAverage(0.9), seen], epochs=6)
    assert changed(seen.validated[history.best_epoch], model) == set()
    measured, best = trainer.evaluate(make_images(9, seed=1)), history.reports[history.best_epoch]
    assert (measured["loss"], measured["accuracy"]) == (pytest.approx(best.val_loss, rel=1e-5), best.val_accuracy)


def test_steps_see_the_live_weights():
    """The average changes no step: weights and training figures are those of a run without it."""
    averaged, plain = Seen(), Seen()
    _, one = fit(new_model(), [tk.WeightAverage(0.9), averaged])
    _, other = fit(new_model(), [plain])
    assert (one.history["loss"], one.history["accuracy"]) == (other.history["loss"], other.history["accuracy"])
    for left, right in zip(averaged.steps + averaged.after, plain.steps + plain.after, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in right)
    assert one.history["val_loss"] != other.history["val_loss"]


def test_without_validation_the_average_stays():
    """A run without validation data ends with the average over all steps in the model."""
    model, seen = new_model(), Seen()
    fit(model, [tk.WeightAverage(0.9), seen], validated=False)
    assert_average(weights_of(model), average_of(seen, 0.9, 12))
    assert changed(seen.steps[-1], model)


def test_each_run_begins_a_new_average():
    """The same callback in a second run averages the steps of that run alone."""
    model, callback = new_model(), tk.WeightAverage(0.9)
    trainer, _ = fit(model, [callback], epochs=2)
    seen = Seen()
    trainer.fit(make_images(), epochs=2, batch_size=8, callbacks=[callback, seen], verbose=0)
    assert_average(weights_of(model), average_of(seen, 0.9, 6))


@pytest.mark.parametrize("validated", [True, False])
def test_a_resumed_run_has_the_same_average(tmp_path, validated):
    """Resumed after any step, a run ends with the weights and figures of the one that never stopped, bit for bit."""

    def run(seed=0, **arguments):
        model = new_model(batch_norm=True, seed=seed)
        trainer = make_trainer(model)
        callbacks = [tk.WeightAverage(0.9), *arguments.pop("callbacks", [])]
        validation = make_images(9, seed=1) if validated else None
        options = {"validation_data": validation, "epochs": 3, "batch_size": 8, "verbose": 0}
        return model, trainer.fit(make_images(), callbacks=callbacks, **options, **arguments)

    whole, history = run(callbacks=[tk.Checkpoint(tmp_path / "run", every_steps=1, keep_last=100)])
    paths = sorted((tmp_path / "run").glob("step-*.pt"))
    assert len(paths) == 9
    for path in paths[::4]:  # in the first epoch, in the middle of the second, at the end
        resumed, again = run(seed=5, resume_from=path)
        assert changed(weights_of(whole), resumed) == set(), path
        assert figures(again) == figures(history)


@pytest.mark.parametrize("callbacks", [[], [tk.WeightAverage(0.8)]], ids=["without", "another decay"])
def test_a_resume_with_another_average_is_refused(tmp_path, callbacks):
    """A run is not resumed without its average or with another decay, and nothing changes."""
    fit(new_model(), [tk.WeightAverage(0.9), tk.Checkpoint(tmp_path / "run")])
    trainer = make_trainer(new_model())
    before = weights_of(trainer.model)
    options = {"validation_data": make_images(9, seed=1), "epochs": 4, "batch_size": 8, "verbose": 0}
    with pytest.raises(CheckpointError, match=r"callbacks with a state=.*WeightAverage\(0\.9\).*expected the same"):
        trainer.fit(make_images(), callbacks=callbacks, resume_from=tmp_path / "run", **options)
    assert changed(before, trainer.model) == set()


def test_layers_that_train_later_join_the_average():
    """Layers that a callback unfreezes are averaged from their first step on; the others since the run began."""
    model, seen = new_model("head"), Seen()
    fit(model, [tk.WeightAverage(0.9), seen, tk.GradualUnfreezing({2: "block5"})])
    assert len(seen.trains[5]) < len(seen.trains[6])
    assert_average(seen.validated[1], average_of(seen, 0.9, 6))
    assert_average(seen.validated[3], average_of(seen, 0.9, 12))


def test_batch_norm_is_averaged_and_its_counter_copied():
    """Running statistics of batch norm that trains are averaged; the number of batches is the last step's."""
    model, seen = new_model(None, batch_norm=True), Seen()
    fit(model, [tk.WeightAverage(0.9), seen], epochs=2)
    counter, mean = "backbone.features.1.num_batches_tracked", "backbone.features.1.running_mean"
    assert [int(weights[counter]) for weights in seen.validated] == [3, 6]
    assert_average(seen.validated[-1], average_of(seen, 0.9, 6))
    assert not torch.equal(seen.validated[-1][mean], seen.steps[-1][mean])


def test_an_error_in_validation_leaves_the_live_weights():
    """After an error in the first validation the model has the weights of the last step, not the average."""
    model, seen = new_model(), Seen(fails_in=1)
    with pytest.raises(RuntimeError, match="something broke"):
        fit(model, [tk.WeightAverage(0.9), seen])
    assert changed(seen.steps[-1], model) == set()
    assert changed(seen.validated[0], model)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("steps"),
        lambda state: state.update({"head.logits.bias": torch.zeros(4)}),
        lambda state: state.update({"head.logits.bias": torch.zeros(3, dtype=torch.float64)}),
        lambda state: state.update(other=torch.zeros(3)),
    ],
    ids=["steps", "shape", "dtype", "name"],
)
def test_an_average_that_does_not_fit_is_refused(spoil):
    """What a file holds is compared with the model before it is taken over."""
    model, callback = new_model(), tk.WeightAverage(0.9)
    fit(model, [callback], epochs=1)
    state = callback.state()
    spoil(state)
    with pytest.raises(CheckpointError, match="average of the weights does not fit the model"):
        tk.WeightAverage(0.9).load(state, model.state_dict())


@pytest.mark.parametrize("restore_best", [True, False])
def test_what_is_frozen_during_a_run_keeps_its_bits(restore_best):
    """Layers that a callback freezes stay as they are then, and the validation loss is that of the weights returned."""
    model, frozen = new_model("block4"), {}

    def freeze(trainer, report):
        if report.epoch == 1:
            frozen.update({name: value.clone() for name, value in trainable_state(model).items() if "head" not in name})
            tk.freeze_until(model, "head")

    trainer, history = fit(model, [tk.WeightAverage(0.9, restore_best=restore_best), freeze])
    last = history.best_epoch if restore_best else len(history.reports) - 1
    found = trainer.evaluate(make_images(9, seed=1))["loss"]
    assert found == pytest.approx(history.reports[last].val_loss, rel=1e-6)
    if last > 1:
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in frozen.items())


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), "much"])
def test_decay_out_of_range_is_refused(decay):
    """The decay is at least 0 and less than 1."""
    with pytest.raises(ArgumentError, match=r"decay=.* is out of range: expected a fraction"):
        tk.WeightAverage(decay)
