"""A sweep over learning rates leaves nothing changed, whatever ends it."""

import contextlib
import copy
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import tiny
import transferkit as tk
from tiny import CLASSES, differences, make_trainer
from transferkit.base.randomness import derive_seed, seeded
from transferkit.data.sources import epoch_order
from transferkit.errors import ArgumentError, NothingToTrainError


def make_model(make_backbone, *, frozen="block4", batch_norm=False, dropout=0.5, **head):
    return tiny.make_model(make_backbone(batch_norm=batch_norm), frozen, hidden=(16,), dropout=dropout, **head)


def snapshot(trainer):
    """Return all that must not change, as copies."""
    model = trainer.model
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    return copy.deepcopy(
        {
            "weights": model.state_dict(),
            "buffers": dict(model.named_buffers()),
            "modes": {name: module.training for name, module in model.named_modules()},
            "modes asked for": {
                name: module.train.mode for name, module in model.named_modules() if "train" in vars(module)
            },
            "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
            "optimizer": trainer.optimizer.state_dict(),
            "has state": {name: p in trainer.optimizer.state for name, p in model.named_parameters()},
            "scaler": trainer.device.scaler.state_dict(),
            "counters": [trainer.epoch, trainer.global_step, trainer.seed, trainer.micro_batch_size],
            "reports": None if trainer.history is None else list(trainer.history.reports),
            "torch": torch_state,
            "python": python_state,
            "numpy": [torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in numpy_state],
        }
    )


def assert_nothing_changed(before, trainer):
    assert differences(before, snapshot(trainer)) == []


def loader(data, **arguments):
    return DataLoader(TensorDataset(*data), batch_size=8, **arguments)


# ---- nothing is changed

CASES = {
    "adam": {},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd"},
    "rmsprop": {"optimizer": "rmsprop"},
    "clipped": {"clip_grad_norm": 0.1},
    "by block": {"lr": {"backbone": 1e-5, "block5": 1e-4, "head": 1e-3}, "schedule": tk.warmup("cosine", 0.2)},
    "balanced": {"loss": tk.CrossEntropy(class_weights="balanced")},
    "smoothed": {"loss": tk.CrossEntropy(label_smoothing=0.1, class_weights=[1.0, 2.0, 3.0])},
}


@pytest.mark.parametrize("case", CASES)
def test_lr_find_changes_nothing(make_backbone, data, case):
    """Weights, modes, gradients, optimizer, counters and generators are what they were, before training and after."""
    trainer = make_trainer(make_model(make_backbone), **CASES[case])
    for trained_before in (False, True):
        if trained_before:
            trainer.fit(data, epochs=1, batch_size=8, verbose=0)
        before = snapshot(trainer)
        assert bool(before["optimizer"]["state"]) == trained_before
        assert len(trainer.lr_find(data, batch_size=8, num_steps=5, verbose=0).lrs) == 5
        assert_nothing_changed(before, trainer)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("frozen", [None, "block3", "head"])
def test_batch_norm_stays(make_backbone, data, frozen, mode):
    """Statistics and counters of batch norm, every module's mode and the mode that unfreezing gives it stay."""
    trainer = make_trainer(make_model(make_backbone, frozen=frozen, batch_norm=True))
    trainer.model.train(mode)
    before = snapshot(trainer)
    assert any("num_batches_tracked" in name for name in before["buffers"])
    trainer.lr_find(data, batch_size=8, num_steps=4, verbose=0)
    assert_nothing_changed(before, trainer)
    modes = {module.training for module in tk.freeze_until(trainer.model, None).modules()}
    assert modes == {mode}


def test_a_mixture_of_modes_stays(make_backbone, data):
    """A module that the user put into eval mode by hand is in eval mode again."""
    trainer = make_trainer(make_model(make_backbone, frozen=None, batch_norm=True).train())
    trainer.model.head.eval()
    trainer.model.backbone.features[1].eval()
    before = snapshot(trainer)
    trainer.lr_find(data, batch_size=8, num_steps=3, verbose=0)
    assert_nothing_changed(before, trainer)


def test_gradients_of_the_users_own_stay_and_do_not_count(make_backbone, data):
    """Gradients left over from a backward pass of the user's own are there again, and change no step of the sweep."""
    model = make_model(make_backbone)
    trainer = make_trainer(model)
    clean = trainer.lr_find(data, batch_size=8, num_steps=4, lr_min=1e-2, verbose=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 3.0)
    same = [parameter.grad for parameter in model.parameters()]
    before = snapshot(trainer)
    assert trainer.lr_find(data, batch_size=8, num_steps=4, lr_min=1e-2, verbose=0).losses == clean.losses
    assert_nothing_changed(before, trainer)
    assert all(one is parameter.grad for one, parameter in zip(same, model.parameters(), strict=True))


class Counting(nn.Module):
    """A head with a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, features):
        if self.training:
            self.seen += 1
        return self.linear(features.flatten(1))


def test_buffers_that_are_not_saved_stay(make_backbone, data):
    """A buffer that is left out of the state dict is put back too."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, head=Counting()), "head")
    trainer = make_trainer(model)
    model.head.seen.fill_(7)
    before = snapshot(trainer)
    trainer.lr_find(data, batch_size=8, num_steps=3, verbose=0)
    assert_nothing_changed(before, trainer)


def test_shared_state_of_an_optimizer_stays(make_backbone, data):
    """The tensors of the optimizer's state are the very same objects, and lists and other entries are as before."""

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter].setdefault("seen", []).append(1)
            self.state["steps"] = {"count": self.state["steps"].get("count", 0) + 1}
            self.param_groups[0][f"after {self.state['steps']['count']} steps"] = True
            return super().step(closure)

    model = make_model(make_backbone)
    trainer = make_trainer(model, lr=None, optimizer=Noting(model.parameters(), lr=0.01, momentum=0.9))
    trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    kept = trainer.optimizer.state
    identities = {id(value) for state in kept.values() for value in state.values() if isinstance(value, torch.Tensor)}
    before = snapshot(trainer)
    trainer.lr_find(data, batch_size=8, num_steps=3, verbose=0)
    assert_nothing_changed(before, trainer)
    assert trainer.optimizer.state is kept
    assert kept["steps"] == {"count": 3}
    values = [value for state in kept.values() for value in state.values()]
    assert {id(value) for value in values if isinstance(value, torch.Tensor)} == identities
    assert [value for value in values if isinstance(value, list)] == [[1, 1, 1]] * len(list(model.parameters()))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.NAdam, torch.optim.Adagrad])
def test_a_users_own_optimizer_stays(make_backbone, data, make):
    """An optimizer built by the user, in groups of its own, with its own lr and initial_lr."""
    model = make_model(make_backbone)
    groups = [{"params": model.head.parameters(), "lr": 0.02}, {"params": model.backbone.parameters(), "lr": 0.001}]
    optimizer = make(groups, lr=0.5)
    trainer = make_trainer(model, lr=None, optimizer=optimizer)
    before = snapshot(trainer)
    seen = []
    optimizer.register_step_pre_hook(lambda one, *_: seen.append([group["lr"] for group in one.param_groups]))
    trainer.lr_find(data, batch_size=8, num_steps=3, lr_min=1e-6, lr_max=1e-2, verbose=0)
    assert_nothing_changed(before, trainer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.001]
    for rates, expected in zip(seen, [1e-6, 1e-4, 1e-2], strict=True):
        assert rates == pytest.approx([20 * expected, expected], rel=1e-9)


def test_the_gradient_scale_stays(make_backbone, data, half_device):
    """With an enabled scaler, scale and growth count are as before, though the sweep made the scale fall."""
    half_device.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
    trainer = make_trainer(make_model(make_backbone), device=half_device, precision="auto", clip_grad_norm=1.0)
    scaler = half_device.scaler
    scaler.scale(torch.ones(1))
    scaler._growth_tracker.fill_(1)
    before = snapshot(trainer)
    assert before["scaler"]["scale"] == 2.0**14
    assert len(trainer.lr_find(data, batch_size=8, num_steps=6, verbose=0).lrs) == 6
    assert_nothing_changed(before, trainer)
    assert half_device.scaler is scaler


# ---- whatever ends it


@contextlib.contextmanager
def at_step(trainer, number, act):
    """Call `act` inside of the forward pass of a step, counted from 0."""
    calls = []

    def look(_module, _inputs):
        calls.append(0)
        if len(calls) == number + 1:
            act()

    hook = next(iter(trainer.model.head.children())).register_forward_pre_hook(look)
    yield calls
    hook.remove()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise RuntimeError("something broke")


@pytest.mark.parametrize("number", [0, 4])
@pytest.mark.parametrize(("act", "error"), [(interrupt, KeyboardInterrupt), (fail, RuntimeError)])
def test_nothing_changes_when_it_is_ended(make_backbone, data, act, error, number):
    """Ctrl-C and an error in the first or the last step leave everything as it was; then fit works."""
    trainer = make_trainer(make_model(make_backbone, batch_norm=True))
    trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    before = snapshot(trainer)
    with at_step(trainer, number, act) as calls, pytest.raises(error):
        trainer.lr_find(data, batch_size=8, num_steps=5, verbose=0)
    assert len(calls) == number + 1
    assert_nothing_changed(before, trainer)
    trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    assert len(trainer.lr_find(data, batch_size=8, num_steps=2, verbose=0).lrs) == 2


def test_ctrl_c_while_features_are_computed_ends_it(make_backbone, data, monkeypatch, images_seen):
    """Ctrl-C while the images go through the frozen layers ends it after that batch."""
    trainer = make_trainer(make_model(make_backbone))
    monkeypatch.setattr("transferkit.features.prefix._PIXELS_ON_CPU", 4 * 32 * 32)
    augmented = []

    def watched(image):
        augmented.append(image)
        if len(augmented) == 6:
            interrupt()
        return image

    with pytest.raises(KeyboardInterrupt):
        trainer.lr_find(data, augment=watched, n_views=2, batch_size=8, num_steps=3, verbose=0)
    assert sum(count for count, _ in images_seen) < 12
    assert trainer.optimizer.state == {}


def test_after_an_interrupted_fit_it_runs(make_backbone, data):
    """A signal that ended a call of fit does not end what comes after it, where features are computed as well."""
    trainer = make_trainer(make_model(make_backbone))

    def stop(trainer, report):
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(data, batch_size=8, epochs=3, callbacks=[stop], verbose=0)
    other = (data[0].flip(0), data[1].flip(0))
    assert len(list(trainer.steps(other, batch_size=8))) == 3
    assert len(trainer.lr_find((data[0].flip(3), data[1]), batch_size=8, num_steps=3, verbose=0).lrs) == 3


def test_a_callback_may_call_it(make_backbone, data):
    """Called from a callback, it changes nothing of the run around it, and a signal still ends that as it should."""
    results = []
    for inside in (False, True):
        trainer = make_trainer(make_model(make_backbone))

        def look(trainer, report, inside=inside):
            if inside:
                trainer.lr_find(data, batch_size=8, num_steps=3, verbose=0)
            if report.epoch == 1:
                interrupt()

        with pytest.raises(KeyboardInterrupt, match="stopped after step 6"):
            trainer.fit(data, batch_size=8, epochs=4, callbacks=[look], verbose=0)
        results.append(copy.deepcopy(trainer.model.state_dict()))
    assert differences(*results) == []


def test_a_failing_update_leaves_the_gradient_scaler_usable(make_backbone, data, half_device):
    """An optimizer that raises between unscaling and update leaves neither its state nor the scaler in the middle."""

    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                fail()
            return super().step(closure)

    model = make_model(make_backbone, pooling="flatten")
    optimizer = Failing(model.parameters(), lr=0.01)
    trainer = make_trainer(model, lr=None, optimizer=optimizer, device=half_device, precision="auto", clip_grad_norm=1)
    before = snapshot(trainer)
    with pytest.raises(RuntimeError, match="something broke"):
        trainer.lr_find(data, batch_size=8, num_steps=3, verbose=0)
    assert_nothing_changed(before, trainer)
    optimizer.fails = False
    trainer.fit(data, batch_size=8, verbose=0, epochs=1)


def test_a_loss_that_is_not_a_number_at_once_ends_it(make_backbone, data, capsys):
    """A NaN in the head ends the sweep after one step, changes nothing, suggests nothing, and that is said."""
    trainer = make_trainer(make_model(make_backbone, batch_norm=True, frozen=None))
    with torch.no_grad():
        trainer.model.head.fc1.bias[0] = torch.nan
    weights = {n: v.nan_to_num(nan=1e9) if v.is_floating_point() else v for n, v in trainer.model.state_dict().items()}
    before = {**snapshot(trainer), "weights": copy.deepcopy(weights)}
    found = trainer.lr_find(data, batch_size=8, verbose=2)
    after = snapshot(trainer)
    after["weights"] = {n: v.nan_to_num(nan=1e9) if v.is_floating_point() else v for n, v in after["weights"].items()}
    assert differences(before, after) == []
    assert str(found.losses) == "[nan]"
    assert found.suggestion is None
    assert "none" in found._repr_html_()
    assert "lr_find suggests nothing: the loss of the first step is not finite" in capsys.readouterr().out


def test_a_diverging_sweep_ends_early_and_changes_nothing(make_backbone, data):
    """Rates that make the weights infinite end the sweep; nothing of that is left."""
    trainer = make_trainer(make_model(make_backbone, batch_norm=True), optimizer="sgd")
    before = snapshot(trainer)
    found = trainer.lr_find(data, batch_size=8, num_steps=40, lr_min=1e-3, lr_max=1e30, verbose=0)
    assert len(found.lrs) == len(found.losses) < 40
    assert_nothing_changed(before, trainer)


# ---- fit afterwards


@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("shuffling", [False, True])
def test_fit_gives_the_same_bits_as_without(make_backbone, data, trained_before, shuffling):
    """A call of fit after it gives the weights and figures of one without, also from a loader that shuffles."""
    results = []
    for find in (False, True):
        trainer = make_trainer(make_model(make_backbone, batch_norm=True), schedule="one_cycle")
        torch.manual_seed(5)
        given = loader(data, shuffle=True) if shuffling else data
        size = {} if shuffling else {"batch_size": 8}
        if trained_before:
            trainer.fit(given, verbose=0, **size)
        if find:
            trainer.lr_find(given, num_steps=7, verbose=0, **size)
        history = trainer.fit(given, epochs=2, validation_data=data, verbose=0, **size)
        results.append([snapshot(trainer), history.history["loss"], history.history["val_loss"]])
        results[-1][0].pop("reports")  # have times
    assert differences(*results) == []


def test_features_are_computed_once(make_backbone, data, images_seen):
    """The sweep computes the features of every image once, and fit computes none."""
    trainer = make_trainer(make_model(make_backbone))
    trainer.lr_find(data, batch_size=8, num_steps=10, verbose=0)
    assert sum(count for count, _ in images_seen) == 24
    trainer.fit(data, epochs=2, batch_size=8, verbose=0)
    trainer.lr_find(data, batch_size=4, num_steps=3, verbose=0)
    assert sum(count for count, _ in images_seen) == 24


def test_views_are_those_of_fit(make_backbone, data, images_seen):
    """With n_views the features of every view are computed once, and are those that fit takes."""
    trainer = make_trainer(make_model(make_backbone))
    trainer.lr_find(data, batch_size=8, num_steps=4, augment="color", n_views=2, verbose=0)
    trainer.fit(data, batch_size=8, augment="color", n_views=2, verbose=0, epochs=1)
    assert sum(count for count, _ in images_seen) == 48


# ---- what it measures


def by_hand(trainer, data, rates, *, batch_size, network, **options):
    """Return the losses of plain training steps at each rate."""
    losses, batches, epoch = [], [], 0
    images = trainer.model.backbone.preprocess(data[0])
    base = [group["lr"] for group in trainer.optimizer.param_groups]
    network.train()
    for index, rate in enumerate(rates):
        if not batches:
            order = epoch_order(len(images), trainer.seed, epoch)
            batches, epoch = list(order.split(batch_size)), epoch + 1
        places = batches.pop(0)
        for group, own in zip(trainer.optimizer.param_groups, base, strict=True):
            group["lr"] = rate * own / base[-1]
        with seeded(derive_seed(trainer.seed, "lr_find", index)):
            loss = functional.cross_entropy(network(images[places]), data[1][places], **options)
        loss.backward()
        if trainer.training.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), trainer.training.clip_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("optimizer", "clip_grad_norm", "batch_norm"), [("adam", None, True), ("sgd", 0.05, True), ("sgd", None, False)]
)
def test_losses_are_those_of_a_plain_loop(make_backbone, data, optimizer, clip_grad_norm, batch_norm):
    """Each loss is that of a plain training loop, written out here, at the same rates, over ends of epochs too."""
    arguments = {"optimizer": optimizer, "clip_grad_norm": clip_grad_norm, "lr": {"backbone": 1e-4, "head": 1e-2}}
    trainer = make_trainer(
        make_model(make_backbone, frozen=None, batch_norm=batch_norm, pooling="flatten"), **arguments
    )
    found = trainer.lr_find(data, batch_size=10, num_steps=8, lr_min=1e-3, lr_max=0.3, verbose=0)
    rates = [1e-3 * 300 ** (step / 7) for step in range(8)]
    assert found.lrs == pytest.approx(rates, rel=1e-12)
    assert found.losses == pytest.approx(by_hand(trainer, data, rates, batch_size=10, network=trainer.model), rel=1e-6)


@pytest.mark.parametrize("arguments", [{"cache": False}, {"micro_batch_size": 5}])
def test_ways_of_computing_give_the_same_losses(make_backbone, data, arguments):
    """No cache and micro-batches change no loss (rtol 1e-4: other sums), and nothing else."""
    sweeps = []
    for given in ({}, arguments):
        trainer = make_trainer(make_model(make_backbone, frozen="block3", dropout=0.0), **given)
        before = snapshot(trainer)
        sweeps.append(trainer.lr_find(data, batch_size=10, num_steps=6, lr_min=1e-4, lr_max=1e-2, verbose=0))
        assert_nothing_changed(before, trainer)
    assert sweeps[1].losses == pytest.approx(sweeps[0].losses, rel=1e-4)


def test_the_sweep_is_in_training_mode(make_backbone, data):
    """Of a model in eval mode the sweep trains with dropout, as fit does."""
    trainers = [make_trainer(make_model(make_backbone)) for _ in range(2)]
    for trainer, mode in zip(trainers, (True, False), strict=True):
        trainer.model.train(mode)
    one, other = (trainer.lr_find(data, batch_size=8, num_steps=4, verbose=0).losses for trainer in trainers)
    assert one == other


def test_weights_of_classes_and_smoothing_count(make_backbone, data):
    """The losses are weighted and smoothed as those of fit; "balanced" comes from the data that is given."""
    targets = torch.tensor([0] * 16 + [1] * 6 + [2] * 2)
    weights = torch.tensor([24 / (3 * 16), 24 / (3 * 6), 24 / (3 * 2)])
    trainer = make_trainer(
        make_model(make_backbone, frozen=None, pooling="flatten"),
        loss=tk.CrossEntropy(label_smoothing=0.2, class_weights="balanced"),
    )
    found = trainer.lr_find((data[0], targets), batch_size=8, num_steps=4, lr_min=1e-4, lr_max=1e-2, verbose=0)
    options = {"weight": weights, "label_smoothing": 0.2}
    expected = by_hand(trainer, (data[0], targets), found.lrs, batch_size=8, network=trainer.model, **options)
    assert found.losses == pytest.approx(expected, rel=1e-5)


def test_batches_pass_through_in_micro_batches(make_backbone, data):
    """Micro-batches reach the sweep: a layer sees parts of the batch."""
    trainer = make_trainer(make_model(make_backbone, frozen=None, pooling="flatten"), micro_batch_size=3)
    sizes = []
    trainer.model.backbone.features[0].register_forward_hook(lambda _module, inputs, _: sizes.append(len(inputs[0])))
    trainer.lr_find(data, batch_size=8, num_steps=2, lr_max=1e-4, verbose=0)
    assert sizes == [3, 3, 2] * 2


def test_a_second_sweep_is_the_first(make_backbone, data):
    """The same call gives the same losses again, with dropout, and after other random numbers were drawn."""
    trainer = make_trainer(make_model(make_backbone))
    given = loader(data, shuffle=True)
    first = trainer.lr_find(given, num_steps=5, lr_min=1e-3, verbose=0)
    torch.rand(3)
    assert trainer.lr_find(given, num_steps=5, lr_min=1e-3, verbose=0).losses == first.losses


def test_fewer_images_than_steps_go_round(make_backbone, data):
    """Five images serve for twelve steps; two steps are enough for a sweep."""
    trainer = make_trainer(make_model(make_backbone))
    few = (data[0][:5], data[1][:5])
    assert len(trainer.lr_find(few, batch_size=2, num_steps=12, lr_max=1e-3, verbose=0).lrs) == 12
    assert trainer.lr_find(few, num_steps=2, lr_max=1e-3, verbose=0).lrs == pytest.approx([1e-6, 1e-3], rel=1e-12)


def test_a_loader_serves(make_backbone, data):
    """A DataLoader in order gives the losses of the images in that order, and nothing is changed."""
    trainer = make_trainer(make_model(make_backbone))
    before = snapshot(trainer)
    found = trainer.lr_find(loader(data), num_steps=5, verbose=0)
    assert len(found.losses) == 5
    assert_nothing_changed(before, trainer)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_min": 1e-3, "lr_max": 1e-3}, r"lr_min=0\.001 is not below lr_max=0\.001: expected a range"),
        ({"lr_min": 1.0, "lr_max": 1e-3}, r"lr_min=1\.0 is not below lr_max=0\.001"),
        ({"lr_min": 0.0}, r"lr_min=0\.0 cannot be used: expected a finite number above 0"),
        ({"lr_max": float("nan")}, r"lr_max=nan cannot be used"),
        ({"lr_max": float("inf")}, r"lr_max=inf cannot be used"),
        ({"num_steps": 1}, r"num_steps=1"),
        ({"num_steps": 2.5}, r"num_steps=2\.5"),
        ({"verbose": 3}, r"verbose=3 is not known"),
        ({"batch_size": 0}, r"batch_size=0"),
    ],
)
def test_values_out_of_range_are_refused(model, data, arguments, message):
    """Arguments that make no range, and others out of range, are refused and change nothing."""
    trainer = make_trainer(tk.freeze_until(model, "head"))
    before = snapshot(trainer)
    with pytest.raises(ArgumentError, match=message):
        trainer.lr_find(data, **arguments)
    assert_nothing_changed(before, trainer)


def test_everything_frozen_is_refused(model, data):
    """Where nothing trains there is no learning rate to look for."""
    trainer = make_trainer(tk.freeze_until(model, "head"))
    model.head.requires_grad_(requires_grad=False)
    with pytest.raises(NothingToTrainError, match="every parameter is frozen"):
        trainer.lr_find(data, verbose=0)


def test_a_rate_of_zero_is_refused(make_backbone, data):
    """Groups keep their proportion to the last one, whose own rate must not be 0."""
    model = make_model(make_backbone)
    groups = [{"params": model.head.parameters()}, {"params": model.backbone.parameters(), "lr": 0.0}]
    trainer = make_trainer(model, lr=None, optimizer=torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(ArgumentError, match=r"the optimizer's last group is 0.*expected one above 0"):
        trainer.lr_find(data, verbose=0)


# ---- the suggestion


def test_the_suggestion_trains(make_backbone, data):
    """On real steps there is a suggestion, within the range, and fit takes it."""
    trainer = make_trainer(make_model(make_backbone, frozen=None, dropout=0.0))
    found = trainer.lr_find(data, batch_size=8, verbose=0)
    assert 1e-7 < found.suggestion < 0.1
    history = trainer.fit(data, lr=found.suggestion, epochs=10, batch_size=8, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
