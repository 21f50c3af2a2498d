"""The trainer: fit, steps, evaluate, predict."""

import functools
import math
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk
from tiny import (
    CLASSES,
    STANDARDIZE,
    Stream,
    changed,
    differences,
    figures,
    lines_of,
    make_model,
    make_trainer,
    weights_of,
)
from transferkit.errors import ArgumentError, ImageError, NonFiniteError, NothingToTrainError, TargetError
from transferkit.model.freezing import first_trainable


def wrong(data):
    """The same images with wrong targets: the more is learned, the worse is this accuracy."""
    return data[0], (data[1] + 1) % 3


# ---- learning


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 1e-2), ("adamw", 1e-2), ("sgd", 2e-2), ("rmsprop", 3e-3)])
def test_fit_learns(make_backbone, data, optimizer, lr):
    """The loss falls and three classes that can be told apart are told apart."""
    trainer = make_trainer(make_model(make_backbone()), optimizer=optimizer, lr=lr, clip_grad_norm=1.0)
    history = trainer.fit(data, epochs=20, batch_size=8, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0] / 2
    assert trainer.evaluate(data)["accuracy"] > 0.9


def test_bf16_learns(make_backbone, data):
    """So it is in bf16, with parameters that stay fp32."""
    trainer = make_trainer(make_model(make_backbone()), precision="bf16")
    history = trainer.fit(data, epochs=15, batch_size=8, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0] / 2
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def trained(make_backbone, data, *, seed=0, **arguments):
    model = make_model(make_backbone(), hidden=(16,), dropout=0.5)
    trainer = make_trainer(model, seed=seed)
    history = trainer.fit(data, epochs=3, batch_size=8, augment=["flip", "color"], verbose=0, **arguments)
    return figures(history), weights_of(model)


def test_same_seed_same_bits(make_backbone, data):
    """The same seed gives the same history and weights bit for bit, dropout, order, split and augmentation included."""
    first = trained(make_backbone, data, validation_split=0.25)
    torch.rand(7), random.random()
    second = trained(make_backbone, data, validation_split=0.25)
    assert first[0] == second[0]
    assert differences(first[1], second[1]) == []


def test_another_seed_gives_another_result(make_backbone, data):
    """Another seed gives another history and other weights."""
    first, second = (trained(make_backbone, data, seed=seed) for seed in (0, 1))
    assert first[0]["loss"] != second[0]["loss"]
    assert not torch.equal(first[1]["head.fc1.weight"], second[1]["head.fc1.weight"])


def test_dropout_follows_the_seed(make_backbone, data):
    """Dropout alone, with one batch in one order, follows the seed and changes from step to step."""
    losses = []
    for seed in (0, 0, 1):
        model = make_model(make_backbone(), hidden=(64,), dropout=0.5)
        loader = DataLoader(TensorDataset(*data), batch_size=24)
        steps = make_trainer(model, seed=seed, lr=1e-30, optimizer="sgd").steps(loader, epochs=2)
        losses.append([step.loss.item() for step in steps])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert losses[0][0] != losses[0][1]


def test_numpy_seed_is_the_seed(make_backbone, data):
    """A seed out of numpy gives what the same Python number gives, and can be saved and loaded."""
    first, second = (trained(make_backbone, data, seed=seed) for seed in (3, np.int64(3)))
    assert first[0] == second[0]


@pytest.mark.parametrize("seed", ["x", 1.5, None])
def test_seed_that_cannot_be_used_is_refused(model, seed):
    """A seed is a whole number."""
    with pytest.raises(ArgumentError, match=rf"seed={seed!r} cannot be used: expected a whole number"):
        make_trainer(model, seed=seed)


def test_fit_leaves_the_global_generators_alone(make_backbone, data):
    """The user's own random numbers are the same after a run as without it."""
    model = make_model(make_backbone(), hidden=(16,), dropout=0.5)
    trainer = make_trainer(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    trainer.fit(data, validation_split=0.25, epochs=2, batch_size=8, augment="trivial", verbose=0)
    trainer.fit(list(zip(*data, strict=True)), validation_data=data, batch_size=8, verbose=0, epochs=1)
    trainer.predict(data)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


# ---- frozen layers


@pytest.mark.parametrize("arguments", [{}, {"optimizer": "adamw"}, {"optimizer": "sgd", "weight_decay": 0.1}])
@pytest.mark.parametrize("boundary", ["block3", "head"])
def test_frozen_layers_stay_bit_identical(make_backbone, data, boundary, arguments):
    """Parameters and batch norm statistics before the boundary keep every bit; all after it change.

    What standardises the features is measured, not trained.
    """
    model = tk.attach_head(make_backbone(batch_norm=True), CLASSES)
    before = weights_of(model)
    trainer = make_trainer(tk.freeze_until(model, boundary), **arguments)
    trainer.fit(data, epochs=2, batch_size=8, verbose=0)
    first = len(model.backbone.features) if boundary == "head" else model.backbone.layer_names.index("block3_conv1")
    expected = {
        name
        for name in before
        if name.startswith("head.") or int(name.removeprefix("backbone.features.")[:2].strip(".")) >= first
    }
    assert changed(before, model) - STANDARDIZE == expected - STANDARDIZE


def test_frozen_layers_have_no_optimizer_state(model, data):
    """No momentum is kept for what is frozen."""
    trainer = make_trainer(tk.freeze_until(model, "block3"))
    trainer.fit(data, verbose=0, epochs=1)
    assert {id(parameter) for parameter in trainer.optimizer.state} == {
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    }


def test_second_phase_trains_what_was_unfrozen(model, data):
    """After `freeze_until(model, "block3")` a second `fit` trains blocks 3 to 5 too, with the same groups.

    The features stay standardized as in the first phase.
    """
    trainer = make_trainer(tk.freeze_until(model, "head"))
    optimizer = trainer.optimizer
    trainer.fit(data, epochs=2, batch_size=8, verbose=0)
    before = weights_of(model)
    tk.freeze_until(model, "block3")
    history = trainer.fit(data, epochs=2, batch_size=8, lr={"backbone": 1e-4, "head": 1e-3}, verbose=0)
    assert (
        changed(before, model)
        == {name for name in before if name.startswith("head.") or name.split(".")[2] in ("6", "9", "12")} - STANDARDIZE
    )
    assert trainer.optimizer is optimizer
    assert len(optimizer.param_groups) == 6
    assert history.history["lr"] == [1e-3, 1e-3]
    assert history.epoch == [2, 3]


def test_freezing_more_in_the_second_phase_stops_it(model, data):
    """What is frozen after a first phase keeps every bit, although the optimizer has momentum for it."""
    trainer = make_trainer(model, optimizer="sgd", weight_decay=0.1)
    trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    before = weights_of(model)
    tk.freeze_until(model, "head")
    trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    assert {name.split(".")[0] for name in changed(before, model)} == {"head"}


@pytest.mark.parametrize("call", ["fit", "steps"])
def test_nothing_to_train_is_refused(model, data, call):
    """Where everything is frozen there is an error before any step, with the remedy."""
    trainer = make_trainer(model)
    model.requires_grad_(False)
    with pytest.raises(NothingToTrainError, match=r"every parameter is frozen. freeze_until\(model, 'head'\) trains"):
        getattr(trainer, call)(data)
    assert trainer.global_step == 0


# ---- learning rate


def test_schedule_spans_each_fit(model, data):
    """Each call of `fit` runs its schedule from its beginning to its end, over all of its epochs."""
    trainer = make_trainer(model, schedule="linear", lr=1.0, optimizer=functools.partial(torch.optim.SGD, fused=True))
    first = [step.lr for step in trainer.steps(data, epochs=2, batch_size=8, lr=6e-3)]
    second = [step.lr for step in trainer.steps(data, batch_size=8)]
    assert first == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])
    assert second == pytest.approx([6e-3, 4e-3, 2e-3])


def test_schedule_goes_on_when_freezing_changes(model, data):
    """A callback that unfreezes in the middle of a run changes neither schedule nor groups."""
    trainer, rates = make_trainer(tk.freeze_until(model, "head"), schedule="linear", lr=6e-3), []

    def unfreeze(trainer, report):
        tk.freeze_until(model, "block5")
        rates.extend(group["lr"] for group in trainer.optimizer.param_groups)

    history = trainer.fit(data, epochs=3, batch_size=12, verbose=0, callbacks=[unfreeze])
    assert history.history["lr"] == pytest.approx([5e-3, 3e-3, 1e-3])
    assert rates == pytest.approx([5e-3] * 6 + [3e-3] * 6 + [1e-3] * 6)


def test_warm_up_comes_first(model, data):
    """The rate rises over the warm-up and then follows the schedule."""
    trainer = make_trainer(model, schedule=tk.warmup("linear", 1 / 3), lr=4e-3)
    rates = [step.lr for step in trainer.steps(data, epochs=2, batch_size=8)]
    assert rates == pytest.approx([4e-3 / 25, 4e-3 * 13 / 25, 4e-3, 3e-3, 2e-3, 1e-3])


@pytest.mark.parametrize("call", ["fit", "steps"])
def test_schedule_without_length_is_refused_before_a_step(model, data, call):
    """A schedule that needs the number of steps is refused at the call where a loader does not tell."""
    trainer = make_trainer(model, schedule="cosine")
    with pytest.raises(ArgumentError, match=r"needs the number of steps, but the DataLoader has no length"):
        getattr(trainer, call)(DataLoader(Stream(data), batch_size=8))
    assert trainer.global_step == 0


def test_rates_of_the_groups_are_used(make_backbone, data):
    """A mapping gives backbone and head different rates: the one's update is that many times smaller."""
    updates = []
    for lr in ({"backbone": 1e-3, "head": 1e-3}, {"backbone": 1e-5, "head": 1e-3}):
        model = make_model(make_backbone())
        before = weights_of(model)
        next(make_trainer(model, lr=lr, optimizer="sgd").steps(data, batch_size=24))
        updates.append(
            [model.state_dict()[n] - before[n] for n in ("backbone.features.0.weight", "head.logits.weight")]
        )
    torch.testing.assert_close(updates[1][0], updates[0][0] / 100, rtol=1e-2, atol=1e-8)
    assert torch.equal(updates[1][1], updates[0][1])


def test_optimizer_instance_is_used(make_backbone, data):
    """An instance trains the model as the same optimizer by class does."""
    first, second = make_model(make_backbone()), make_model(make_backbone())
    instance = torch.optim.SGD(first.parameters(), lr=1e-2, fused=True)
    make_trainer(first, optimizer=instance, lr=None).fit(data, batch_size=8, verbose=0, epochs=1)
    make_trainer(second, optimizer=torch.optim.SGD).fit(data, batch_size=8, verbose=0, epochs=1)
    assert differences(first.state_dict(), second.state_dict()) == []


# ---- the best epoch


def test_best_epoch_is_restored(model, data):
    """After a run the model is as it was after the epoch with the highest validation accuracy."""
    after = []
    trainer = make_trainer(model)
    history = trainer.fit(
        data,
        validation_data=wrong(data),
        epochs=12,
        batch_size=8,
        verbose=0,
        callbacks=[lambda trainer, report: after.append(weights_of(model))],
    )
    assert history.best_epoch < 11
    assert differences(weights_of(model), after[history.best_epoch]) == []
    assert not torch.equal(after[-1]["head.logits.weight"], model.head.logits.weight)
    assert trainer.evaluate(wrong(data), batch_size=8)["accuracy"] == max(history.history["val_accuracy"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_best_epoch_is_restored_whatever_ends_the_run(model, data, error):
    """An error or an interruption too leaves the model as it was after the best epoch."""
    after, reports = [], []

    def stop(trainer, report):
        after.append(weights_of(model))
        reports.append(report)
        if len(reports) == 12:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        make_trainer(model).fit(data, validation_data=wrong(data), epochs=20, batch_size=8, verbose=0, callbacks=[stop])
    best = tk.History(reports).best_epoch
    assert best < 11
    assert differences(weights_of(model), after[best]) == []


def test_best_epoch_is_restored_after_unfreezing(make_backbone, data):
    """Layers unfrozen after the best epoch are put back too, batch norm statistics included, and stay unfrozen."""
    model = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), CLASSES), "head")
    after = []

    def unfreeze(trainer, report):
        after.append(weights_of(model))
        if len(after) == 1:
            tk.freeze_until(model, None)

    history = make_trainer(model).fit(
        data, validation_data=wrong(data), epochs=12, batch_size=8, verbose=0, callbacks=[unfreeze]
    )
    assert history.best_epoch < 11
    assert differences(weights_of(model), after[history.best_epoch]) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_that_diverged_does_not_leave_nan(model, data):
    """An epoch whose weights are not numbers is not restored as the best, however its accuracy came out."""

    def break_model(trainer, report):
        with torch.no_grad():
            model.head.logits.weight.fill_(float("nan"))

    zeros = (data[0], torch.zeros(24, dtype=torch.int64))  # the largest of logits that are not numbers is the first
    with pytest.raises(NonFiniteError, match="the logits of image 0"):
        make_trainer(model, lr=1e-30, max_skipped=10).fit(
            wrong(data), validation_data=zeros, epochs=2, batch_size=24, verbose=0, callbacks=[break_model]
        )
    assert model.head.logits.weight.isfinite().all()


def test_last_weights_stay_without_validation_data(model, data):
    """Without validation data no epoch is the best, and the last weights stay."""
    after = []
    callbacks = [lambda trainer, report: after.append(weights_of(model))]
    make_trainer(model).fit(data, epochs=8, batch_size=8, verbose=0, callbacks=callbacks)
    assert differences(weights_of(model), after[-1]) == []


# ---- callbacks


def test_callback_gets_trainer_and_report(model, data):
    """Each callback is called once an epoch with the trainer and that epoch's report."""
    calls = []
    trainer = make_trainer(model)
    history = trainer.fit(data, epochs=3, verbose=0, callbacks=[lambda *arguments: calls.append(arguments)])
    assert [call[0] for call in calls] == [trainer] * 3
    assert [call[1] for call in calls] == history.reports


@pytest.mark.parametrize(
    ("answer", "epochs"),
    [(True, 1), (np.bool_(True), 1), (torch.ones(()) > 0, 1), (None, 3), (np.bool_(False), 3), ({}, 3)],
)
def test_callback_that_returns_true_ends_the_run(model, data, answer, epochs):
    """True ends the run after all callbacks were called; any other value does not."""
    calls = []
    history = make_trainer(model).fit(
        data, epochs=3, verbose=0, callbacks=[lambda *_: answer, lambda *_: calls.append(1)]
    )
    assert len(history.reports) == len(calls) == epochs


@pytest.mark.parametrize("answer", [1, "stop", 0.5, np.int64(1)])
def test_callback_that_returns_something_like_true_is_warned_of(model, data, answer):
    """A number or text ends no run, and a warning says that True does."""
    with pytest.warns(UserWarning, match="True does"):
        history = make_trainer(model).fit(data, epochs=2, verbose=0, callbacks=[lambda *_: answer])
    assert len(history.reports) == 2


def test_callback_that_is_no_list_is_refused_before_a_step(model, data):
    """One function instead of a list of them is refused before an epoch is lost on it."""
    trainer = make_trainer(model)
    with pytest.raises(ArgumentError, match=r"callbacks.*expected a (list|sequence)"):
        trainer.fit(data, callbacks=lambda trainer, report: None, verbose=0, epochs=1)
    assert trainer.global_step == 0


def test_callback_may_evaluate(model, data):
    """A callback that evaluates does not change the run, and the next epoch trains in training mode."""
    modes = []
    trainer = make_trainer(model)
    trainer.fit(
        data,
        epochs=2,
        verbose=0,
        callbacks=[lambda trainer, report: modes.append((trainer.evaluate(data), model.training)[1])],
    )
    assert modes == [True, True]


# ---- steps


def test_steps_yield_what_was_done(model, data):
    """Each step tells epoch, index, count and rate, with loss and hits as tensors on the device."""
    trainer = make_trainer(model)
    steps = list(trainer.steps(data, epochs=2, batch_size=10))
    assert [(step.epoch, step.index, step.count) for step in steps] == [
        (0, 0, 10), (0, 1, 10), (0, 2, 4), (1, 0, 10), (1, 1, 10), (1, 2, 4),
    ]  # fmt: skip
    assert all(isinstance(step.loss, torch.Tensor) and step.loss.shape == () for step in steps)
    assert all(isinstance(step.correct, torch.Tensor) and 0 <= step.correct <= step.count for step in steps)
    assert {step.lr for step in steps} == {1e-2}
    assert (trainer.epoch, trainer.global_step) == (2, 6)


def test_steps_are_made_when_asked_for(flat_model, data):
    """No step is made before it is asked for, and none after."""
    trainer = make_trainer(flat_model)
    before = weights_of(flat_model)
    steps = trainer.steps(data, batch_size=8)
    assert changed(before, flat_model) == set()
    next(steps)
    assert trainer.global_step == 1
    assert "head.logits.weight" in changed(before, flat_model)


def test_steps_give_what_fit_gives(make_backbone, data):
    """The same training with `steps` and with `fit` gives the same weights."""
    first, second = (make_model(make_backbone(), hidden=(16,), dropout=0.5) for _ in range(2))
    list(make_trainer(first).steps(data, epochs=2, batch_size=8, augment="flip"))
    make_trainer(second).fit(data, epochs=2, batch_size=8, augment="flip", verbose=0)
    assert differences(first.state_dict(), second.state_dict()) == []


def test_evaluating_between_steps_changes_nothing(make_backbone, data):
    """`evaluate` and `predict` between steps leave training mode, random numbers and result as without them."""
    first, second = (make_model(make_backbone(), hidden=(16,), dropout=0.5) for _ in range(2))
    list(make_trainer(first).steps(data, epochs=2, batch_size=8))
    trainer = make_trainer(second)
    for _ in trainer.steps(data, epochs=2, batch_size=8):
        trainer.evaluate(data)
        trainer.predict(data[0])
        assert second.training
    assert differences(first.state_dict(), second.state_dict()) == []


BAD_ARGUMENTS = [
    ({"epochs": 0}, ArgumentError, r"epochs=0 cannot be used: expected a whole number of 1 or more"),
    ({"epochs": 2.0}, ArgumentError, r"epochs=2.0 cannot be used: expected a whole number of 1"),
    ({"epochs": True}, ArgumentError, r"epochs=True cannot be used: expected a whole number of 1"),
    ({"batch_size": 0}, ArgumentError, r"batch_size=0 cannot be used: expected a whole number of 1 or more"),
    ({"batch_size": -3}, ArgumentError, r"batch_size=-3 cannot be used: expected a whole number"),
    ({"batch_size": 2.5}, ArgumentError, r"batch_size=2.5 cannot be used: expected a whole number of 1"),
    ({"batch_size": True}, ArgumentError, r"batch_size=True cannot be used: expected a whole number of 1"),
    ({"lr": 0}, ArgumentError, r"lr=0 cannot be used: expected a finite number above 0"),
    ({"lr": -1}, ArgumentError, r"lr=-1 cannot be used: expected a finite number above 0"),
    ({"lr": math.nan}, ArgumentError, r"lr=nan cannot be used: expected a finite number"),
    ({"lr": math.inf}, ArgumentError, r"lr=inf cannot be used: expected a finite number"),
    ({"lr": "x"}, ArgumentError, r"lr='x' cannot be used: expected a finite number"),
    ({"lr": {"neck": 1e-3}}, ArgumentError, r"lr names the groups \['neck'\]: expected a rate for each of"),
    ({"augment": "flop"}, ArgumentError, r"augment='flop' is not known. Did you mean 'flip'"),
    ({"num_workers": -1}, ArgumentError, r"num_workers=-1 cannot be used: expected a whole number of 0"),
]


@pytest.mark.parametrize(("arguments", "error", "match"), BAD_ARGUMENTS)
@pytest.mark.parametrize("call", ["fit", "steps"])
def test_arguments_of_a_run_are_checked_at_the_call(model, data, call, arguments, error, match):
    """A bad argument of `fit` or `steps` is refused at the call, before any step and before iteration."""
    trainer = make_trainer(model)
    with pytest.raises(error, match=match):
        getattr(trainer, call)(data, **arguments)
    assert trainer.global_step == 0


def test_data_of_steps_is_checked_at_the_call(model, data):
    """Data that cannot be used is refused when `steps` is called, not when it is iterated."""
    with pytest.raises(TargetError, match=r"24 images but 2 targets"):
        make_trainer(model).steps((data[0], [0, 1]))


def test_whole_numbers_of_numpy_serve(model, data):
    """Epochs and batch size out of a numpy grid are whole numbers like any other."""
    trainer = make_trainer(model)
    trainer.fit(data, epochs=np.int64(2), batch_size=np.int32(8), verbose=0)
    assert trainer.global_step == 6


@pytest.mark.parametrize("call", ["fit", "steps", "evaluate", "predict"])
def test_batch_size_of_a_loader_is_its_own(model, data, call):
    """A batch size together with a DataLoader is refused, not ignored."""
    loader = DataLoader(TensorDataset(*data), batch_size=8)
    with pytest.raises(ArgumentError, match=r"batch_size=4 has no effect on a DataLoader, which makes its own batches"):
        getattr(make_trainer(model), call)(loader, batch_size=4)


# ---- arguments of the trainer


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lr": 0}, r"lr=0 cannot be used"),
        ({"lr": math.nan}, r"lr=nan cannot be used"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1 cannot be used: expected a finite number of 0 or more"),
        ({"optimizer": "addam"}, r"optimizer='addam' is not known. Did you mean 'adam"),
        ({"schedule": "cosin"}, r"schedule='cosin' is not known. Did you mean 'cosine'"),
        ({"clip_grad_norm": 0}, r"clip_grad_norm=0 cannot be used: expected a finite number above 0"),
        ({"clip_grad_norm": math.nan}, r"clip_grad_norm=nan cannot be used: expected a finite number above 0"),
        ({"micro_batch_size": 0}, r"micro_batch_size=0 cannot be used: expected a whole number of 1"),
        ({"micro_batch_size": 1.5}, r"micro_batch_size=1.5 cannot be used: expected a whole number of 1"),
        ({"max_skipped": -1}, r"max_skipped=-1 cannot be used: expected a whole number of 0"),
        ({"loss": "bce"}, r"loss='bce' cannot be used: expected transferkit.CrossEntropy"),
        ({"loss": nn.CrossEntropyLoss}, r"cannot be used: expected transferkit.CrossEntropy"),
        ({"cache": "atuo"}, r"cache='atuo' cannot be used: expected \"auto\", True, False or a folder"),
        ({"cache": 3}, r"cache=3 cannot be used: expected \"auto\", True, False or a folder"),
        (
            {"loss": tk.CrossEntropy(class_weights=[1.0, 2.0])},
            r"class_weights=\[1.0, 2.0\] cannot be used: expected 3 finite numbers",
        ),
        ({"precision": "bf17"}, r"precision='bf17' is not known. Did you mean 'bf16'"),
        (
            {"device": tk.Device("cpu", "fp32"), "precision": "bf16"},
            r"'bf16' contradicts Device\('cpu', precision='fp32'",
        ),
    ],
)
def test_arguments_of_the_trainer_are_checked(model, arguments, match):
    """A bad argument is refused when the trainer is made."""
    with pytest.raises(ArgumentError, match=match):
        make_trainer(model, **arguments)


@pytest.mark.parametrize("arguments", [{"weight_decay": "x"}, {"clip_grad_norm": "x"}])
def test_argument_that_is_no_number_is_refused_by_name(model, arguments):
    """What is no number where one is expected is refused by name, not with Python's own error."""
    with pytest.raises(ArgumentError, match=rf"{next(iter(arguments))}='x'.*expected"):
        make_trainer(model, **arguments)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), None, "vgg16"])
def test_model_of_another_kind_is_refused(other):
    """What is no TransferModel is refused with the way to make one."""
    with pytest.raises(
        ArgumentError, match=rf"model is a {type(other).__name__}: expected a TransferModel from attach"
    ):
        make_trainer(other)


def test_backbone_without_head_is_refused(backbone):
    """A backbone without a head is refused with the way to attach one."""
    with pytest.raises(ArgumentError, match=r"model is a Backbone: expected a TransferModel from attach_head"):
        make_trainer(backbone)


def test_device_and_the_same_precision_agree(model):
    """A `Device` is used as it is, and saying its precision again is no contradiction."""
    device = tk.Device("cpu", "fp32")
    assert tk.Trainer(model, device=device, precision="fp32").device is device
    assert tk.Trainer(model, device=tk.Device("cpu", "bf16")).device.precision == "bf16"


# ---- validation, evaluation


class Spy(nn.Module):
    """A head that notes the mode of each call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.modes = []

    def forward(self, features):
        self.modes.append(self.training)
        return self.layer(features.flatten(1))


def test_validation_is_in_eval_mode_and_training_in_training_mode(backbone, data):
    """The model is in eval mode while validated and in training mode while trained, in every epoch."""
    model = tk.attach_head(backbone, CLASSES, head=Spy())
    model.head.modes.clear()
    make_trainer(model).fit(data, validation_data=data, epochs=2, batch_size=12, verbose=0)
    assert model.head.modes == [True, True, False, False] * 2
    assert not model.training


def test_training_is_in_training_mode_whatever_came_before(flat_model, data):
    """A model that was in eval mode before fit, or is put into it by a callback, trains in training mode."""
    modes = []
    flat_model.head.register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer = make_trainer(flat_model.eval())
    trainer.fit(data, epochs=2, batch_size=24, callbacks=[lambda *_: flat_model.eval() and None], verbose=0)

    assert modes == [True, True]


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_leaves_the_mode(model, data, mode):
    """`evaluate` and `predict` put the mode back as they found it, also after an error."""
    trainer = make_trainer(model)
    model.train(mode)
    trainer.evaluate(data)
    trainer.predict(data[0])
    with pytest.raises(ImageError, match="not preprocessed"):
        trainer.predict(data[0] / 255)
    assert model.training is mode
    assert model.head.training is mode


@pytest.mark.parametrize("batch_size", [1, 7, 24, 100])
def test_evaluate_is_the_mean_over_images(model, data, batch_size):
    """Loss and accuracy are the means over all images, whatever the batches, unsmoothed and unweighted."""
    trainer = make_trainer(model, loss=tk.CrossEntropy(label_smoothing=0.3, class_weights=[1.0, 5.0, 9.0]))
    images, targets = data[0], data[1].sort().values  # so that batches differ
    with torch.no_grad():
        logits = model.eval()(model.backbone.preprocess(images))
    measured = trainer.evaluate((images, targets), batch_size=batch_size)
    assert measured["loss"] == pytest.approx(functional.cross_entropy(logits, targets).item(), rel=1e-6)
    assert measured["accuracy"] == (logits.argmax(dim=1) == targets).sum().item() / 24


def test_training_figures_are_means_over_images(flat_model, data):
    """A ragged last batch counts by its images in the reported training loss and accuracy."""
    images, targets = data
    with torch.no_grad():
        logits = flat_model(flat_model.backbone.preprocess(images))
    history = make_trainer(flat_model, lr=1e-30, optimizer="sgd").fit(data, batch_size=11, verbose=0, epochs=1)
    assert history.history["loss"] == pytest.approx([functional.cross_entropy(logits, targets).item()], rel=1e-6)
    assert history.history["accuracy"] == [(logits.argmax(dim=1) == targets).sum().item() / 24]


def test_reported_loss_includes_smoothing_and_weights(flat_model, data):
    """The training loss is the one that is minimised; the validation loss is plain."""
    with torch.no_grad():
        logits = flat_model(flat_model.backbone.preprocess(data[0]))
    weights = torch.tensor([1.0, 5.0, 9.0])
    expected = functional.cross_entropy(logits, data[1], weights, label_smoothing=0.3).item()
    trainer = make_trainer(
        flat_model, lr=1e-30, optimizer="sgd", loss=tk.CrossEntropy(label_smoothing=0.3, class_weights=weights)
    )
    history = trainer.fit(data, validation_data=data, batch_size=24, verbose=0, epochs=1)
    assert history.history["loss"] == pytest.approx([expected], rel=1e-5)
    assert history.history["val_loss"] == pytest.approx([functional.cross_entropy(logits, data[1]).item()], rel=1e-6)


# ---- prediction


def test_predict_is_the_most_probable_class(model, data):
    """`predict` is the argmax of `predict_proba`, whose rows sum to one and are softmax of the logits, in order."""
    trainer = make_trainer(model)
    trainer.fit(data, epochs=5, batch_size=8, verbose=0)
    probabilities, classes = trainer.predict_proba(data[0]), trainer.predict(data[0])
    with torch.no_grad():
        expected = model.eval()(model.backbone.preprocess(data[0])).softmax(dim=1).numpy()
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (24, 3))
    assert (classes.dtype, classes.shape) == (np.int64, (24,))
    assert np.array_equal(classes, probabilities.argmax(axis=1))
    assert len(set(classes.tolist())) > 1
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_raw_and_preprocessed_images_are_predicted_alike(model, data):
    """Raw tensors, NHWC arrays and preprocessed tensors give the same probabilities, bit for bit."""
    trainer = make_trainer(model)
    expected = trainer.predict_proba(data[0])
    assert np.array_equal(trainer.predict_proba(data[0].permute(0, 2, 3, 1).numpy()), expected)
    assert np.array_equal(trainer.predict_proba(model.backbone.preprocess(data[0])), expected)


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_prediction_does_not_depend_on_the_batch(model, data, batch_size):
    """An image has the same probabilities whatever batch it is in (1e-5: kernels sum in another order)."""
    trainer = make_trainer(model)
    np.testing.assert_allclose(
        trainer.predict_proba(data[0], batch_size=batch_size), trainer.predict_proba(data[0]), rtol=1e-5
    )


def test_prediction_uses_the_statistics_of_training(make_backbone, data):
    """With batch norm and dropout a prediction is repeatable and changes no state."""
    model = tk.attach_head(make_backbone(batch_norm=True), CLASSES, hidden=(16,), dropout=0.5)
    trainer = make_trainer(model)
    trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    before = weights_of(model)
    assert np.array_equal(trainer.predict_proba(data[0]), trainer.predict_proba(data[0]))
    assert changed(before, model) == set()


def test_one_image_is_predicted_like_a_batch_of_one(model, data):
    """One image without batch dimension gives what it gives in a batch: an array of one prediction."""
    trainer = make_trainer(model)
    assert (trainer.predict_proba(data[0][0]) == trainer.predict_proba(data[0][:1])).all()
    assert trainer.predict_classes(data[0][0]) == [model.classes[trainer.predict(data[0][:1])[0]]]


def test_assessment_agrees_with_evaluation(model, data):
    """`assess` gives the loss and accuracy of `evaluate`, and `predict_proba`'s probabilities, in order."""
    trainer = make_trainer(model)
    assessment, scores = trainer.assess(data, batch_size=5), trainer.evaluate(data, batch_size=5)
    assert (assessment.loss, assessment.accuracy) == pytest.approx((scores["loss"], scores["accuracy"]))
    assert (assessment.probabilities == trainer.predict_proba(data[0], batch_size=5)).all()
    assert assessment.targets.tolist() == data[1].tolist()
    assert assessment.classes == model.classes


def test_history_is_that_of_the_run_under_way(model, data):
    """Callbacks see the epochs so far, the one just reported included; afterwards it is what `fit` returned."""
    trainer = make_trainer(tk.freeze_until(model, "head"))
    assert trainer.history is None
    seen = []

    def callback(trainer, report):
        seen.append((len(trainer.history.reports), trainer.history.reports[-1] is report))

    history = trainer.fit(data, epochs=2, callbacks=[callback], verbose=0)
    assert seen == [(1, True), (2, True)]
    assert trainer.history is history
    trainer.fit(data, epochs=1, callbacks=[callback], verbose=0)
    assert seen[2:] == [(1, True)]


def test_history_of_a_resumed_run_has_the_epochs_before(make_backbone, data, tmp_path):
    """In another process's trainer, callbacks see the epochs that were made before it was resumed."""
    seen = []

    def fit(epochs):
        trainer = make_trainer(tk.freeze_until(make_model(make_backbone()), "head"))
        count = lambda trainer, report: seen.append([one.epoch for one in trainer.history.reports])  # noqa: E731
        callbacks = [count, tk.Checkpoint(tmp_path / "run")]
        return trainer, trainer.fit(data, epochs=epochs, callbacks=callbacks, resume_from=tmp_path / "run", verbose=0)

    _, before = fit(2)
    resumed, history = fit(3)
    assert seen == [[0], [0, 1], [0, 1, 2]]
    assert resumed.history is history
    assert history.reports[:2] == before.reports


def test_a_checkpoint_holds_what_gradual_unfreezing_did(model, data, tmp_path):
    """What `GradualUnfreezing` does after an epoch is in that epoch's checkpoint, whatever their order."""
    trainer = make_trainer(tk.freeze_until(model, "head"))
    callbacks = [tk.Checkpoint(tmp_path / "run"), tk.GradualUnfreezing({1: "block5"})]
    trainer.fit(data, epochs=1, callbacks=callbacks, verbose=0)
    fresh = make_trainer(tk.freeze_until(model, None))
    fresh.load(tmp_path / "run" / f"step-{trainer.global_step:08d}.pt")
    assert first_trainable(fresh.model) == "block5_conv1"


def test_balanced_weights_let_every_class_count_alike(make_backbone, data):
    """`"balanced"` trains as with the numbers that make the images of each class count the same in all."""
    images, targets = data[0][:18], torch.tensor([0] * 12 + [1] * 4 + [2] * 2)
    trained = []
    for weights in ("balanced", [18 / (3 * 12), 18 / (3 * 4), 18 / (3 * 2)]):
        torch.manual_seed(0)
        model = tk.freeze_until(tk.attach_head(make_backbone(), 3), "head")
        make_trainer(model, loss=tk.CrossEntropy(class_weights=weights)).fit(
            (images, targets), epochs=2, batch_size=6, verbose=0
        )
        trained.append(weights_of(model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


# ---- the update


@pytest.mark.parametrize(
    "arguments",
    [{}, {"loss": tk.CrossEntropy(class_weights=[1.0, 2.0, 5.0])}, {"loss": tk.CrossEntropy(label_smoothing=0.1)}],
)
def test_micro_batches_give_the_update_of_the_batch(make_backbone, data, arguments):
    """5 images in parts of 2, 2 and 1 give the update of 5 at once (rtol 1e-5: sums in another order)."""
    trained = []
    for micro_batch_size in (None, 2):
        model = make_model(make_backbone(), pooling="flatten")
        trainer = make_trainer(model, optimizer="sgd", lr=0.1, micro_batch_size=micro_batch_size, **arguments)
        trainer.fit((data[0][:10], data[1][:10]), batch_size=5, epochs=2, verbose=0)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_update(make_backbone, data):
    """With SGD and rate 1 the whole update has the norm of the limit, where it would be larger without."""
    norms = []
    for clip_grad_norm in (None, 0.01):
        model = make_model(make_backbone(), pooling="flatten")
        before = weights_of(model)
        trainer = make_trainer(model, optimizer=torch.optim.SGD, lr=1.0, clip_grad_norm=clip_grad_norm)
        next(trainer.steps(data, batch_size=24))
        norms.append(
            torch.cat([(value - before[n]).flatten() for n, value in model.state_dict().items()]).norm().item()
        )
    assert norms[0] > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_the_default_schedule_is_a_warmup_and_a_cosine(model, data):
    """Without `schedule` each step's rate is the head's own times `warmup("cosine", 0.1)` at its place in the run."""
    steps = list(tk.Trainer(model, device="cpu", precision="fp32").steps(data, epochs=4, batch_size=8))
    expected = [3e-4 * tk.warmup("cosine", 0.1)(number / 12) for number in range(12)]
    assert [step.lr for step in steps] == pytest.approx(expected, rel=1e-12)
    assert steps[0].lr < steps[2].lr > steps[-1].lr


def test_the_default_schedule_is_constant_where_the_run_has_no_known_length(model, data):
    """A loader without a length trains at the rates as they are."""
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    assert {step.lr for step in trainer.steps(DataLoader(Stream(data), batch_size=8), epochs=2)} == {3e-4}


def test_gradients_are_clipped_by_default(make_backbone, data):
    """Without `clip_grad_norm` an update by SGD at rate 1 has norm 1 where it would be larger; None does not clip."""
    norms = []
    for arguments in ({}, {"clip_grad_norm": None}):
        model = make_model(make_backbone(), pooling="flatten")
        with torch.no_grad():
            model.head.logits.weight.mul_(100)
        before = weights_of(model)
        trainer = tk.Trainer(
            model, optimizer=torch.optim.SGD, lr=1.0, schedule="constant", device="cpu", precision="fp32", **arguments
        )
        next(trainer.steps(data, batch_size=24))
        norms.append(torch.cat([(value - before[n]).flatten() for n, value in model.state_dict().items()]).norm())
    assert norms[0] == pytest.approx(1.0, rel=1e-3)
    assert norms[1] > 2.0


def test_fit_makes_ten_epochs_by_default(model, data):
    """Without `epochs` a run has ten."""
    assert len(make_trainer(model).fit(data, verbose=0).reports) == 10


def test_optimizer_is_fused(model):
    """The update is one kernel."""
    assert [group["fused"] for group in make_trainer(model).optimizer.param_groups] == [True] * 6


# ---- what is printed


def test_fit_prints_a_line_at_the_start_and_one_an_epoch(model, data, capsys):
    """The first line says what is frozen, what trains, where and in which format; then one line an epoch."""
    history = make_trainer(tk.freeze_until(model, "head"), cache=False).fit(data, validation_data=data, epochs=2)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    lines = lines_of(printed)
    frozen, training = (f"{sum(p.numel() for p in part.parameters()):,}" for part in (model.backbone, model.head))
    lines = [line for line in lines if not line.startswith("the weights of epoch")]
    assert len(lines) == 3
    assert lines[0] == f"frozen: {frozen} parameters before head.fc1; training: {training} parameters; on cpu in fp32"
    first, second = (" ".join(str(report).split()) for report in history.reports)
    assert re.fullmatch(r" [\d,]+ images/s \d+ s left", lines[1].removeprefix(first))
    assert re.fullmatch(r" [\d,]+ images/s", lines[2].removeprefix(second))
    assert lines[1].startswith("epoch 1 loss ")


def test_fit_prints_nothing_when_told_so(model, data, capsys):
    """`verbose=0` prints nothing, on neither stream; nor do the other calls."""
    trainer = make_trainer(model)
    trainer.fit(data, validation_data=data, epochs=2, verbose=0)
    list(trainer.steps(data))
    trainer.evaluate(data)
    trainer.predict(data)
    assert capsys.readouterr() == ("", "")


def test_history_counts_epochs_over_the_life_of_the_trainer(model, data):
    """The second call of `fit` goes on counting; its history is its own."""
    trainer = make_trainer(model)
    trainer.fit(data, epochs=2, verbose=0)
    history = trainer.fit(data, validation_data=data, verbose=0, epochs=1)
    assert history.epoch == [2]
    assert list(history.history) == ["loss", "accuracy", "lr", "epoch_s", "val_loss", "val_accuracy"]
    assert all(len(values) == 1 for values in history.history.values())
