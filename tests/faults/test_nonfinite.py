"""No infinite number and no NaN reaches the weights, the buffers or the optimizer's state."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import tiny
import transferkit as tk
from tiny import CLASSES, changed, differences, weights_of
from transferkit.compute.device import step_where
from transferkit.errors import ArgumentError, NonFiniteError, TargetError

MARK = 50.0  # a pixel of this value makes a batch bad
BAD = 3  # number of the bad batch, of 6
GRADIENTS = ["NaN gradient", "infinite gradient", "one entry"]
KINDS = ["NaN pixel", "infinite loss", *GRADIENTS]


class Broken(torch.autograd.Function):
    """Passes its input on, and makes its gradient, or one entry of it, something else."""

    @staticmethod
    def forward(ctx, tensor, value, everywhere):
        ctx.value, ctx.everywhere = value, everywhere
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.flatten()[slice(None) if ctx.everywhere else slice(5, 6)] = ctx.value
        return gradient, None, None


class Head(nn.Module):
    """Two layers that go wrong, in one of several ways, where an image of the batch is marked."""

    def __init__(self, kind, *, batch_norm=False, dropout=0.0, width=16):
        super().__init__()
        self.kind = kind
        self.fc1 = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Linear(width, 3)
        self.marked = False

    def forward(self, features):
        marked = self.marked and self.training
        weight = self.fc1.weight
        if marked and self.kind == "one entry":
            weight = Broken.apply(weight, math.nan, False)
        hidden = functional.linear(features.flatten(1), weight, self.fc1.bias)
        logits = self.logits(self.dropout(self.norm(hidden).relu()))
        if marked and self.kind == "infinite loss":  # with gradients that are finite
            return logits.index_fill(1, torch.tensor([1]), -math.inf)
        if marked and self.kind in ("NaN gradient", "infinite gradient"):
            return Broken.apply(logits, math.nan if self.kind == "NaN gradient" else math.inf, True)
        return logits


@pytest.fixture
def make_trainer(make_backbone):
    """A trainer of a network that goes wrong on marked images."""

    def make(kind, *, batch_norm=False, dropout=0.0, width=16, **arguments):
        backbone = make_backbone(batch_norm=batch_norm)
        torch.manual_seed(1)
        head = Head(kind, batch_norm=batch_norm, dropout=dropout, width=width)
        backbone.register_forward_pre_hook(
            lambda module, inputs: setattr(head, "marked", bool((inputs[0] == MARK).any()))
        )
        model = tk.attach_head(backbone, CLASSES, head=head)
        if callable(arguments.get("optimizer")):
            arguments["optimizer"] = arguments["optimizer"](model.parameters())
            arguments["lr"] = None
        return tiny.make_trainer(model, **arguments)

    return make


@pytest.fixture
def half(monkeypatch):
    """A CPU that says it can do fp16, so that gradients are scaled."""
    monkeypatch.setattr("transferkit.compute.device.supported_precisions", lambda device: ("bf16", "fp16", "fp32"))


def make_batches(kind=None, *, bad=(BAD,), number=6, without=()):
    """Batches of four images in their order, some of them bad, or without some of them."""
    generator = torch.Generator().manual_seed(3)
    images, targets = torch.randn(4 * number, 3, 32, 32, generator=generator), torch.arange(4 * number) % 3
    for batch in bad if kind else ():
        images[4 * batch + 1, 2, 5, 7] = math.nan if kind == "NaN pixel" else MARK
    kept = [place for place in range(4 * number) if place // 4 not in without]
    return DataLoader(TensorDataset(images[kept], targets[kept]), batch_size=4)


def trained_state(trainer):
    state = trainer.state_dict()
    return {"model": state["model"], "optimizer": state["optimizer"]}


def assert_same_state(one, other):
    assert differences(trained_state(one), trained_state(other)) == []


# ---- raised, with the state of the step before


def assert_stops_before_the_bad_step(make, kind):
    """Step 9 of two epochs is bad: an error says so, and all is as in a run that ended with step 8."""
    stopped, reference = make(kind), make(kind)
    stopped.fit(make_batches(), verbose=0, epochs=1)
    with pytest.raises(NonFiniteError, match=r"step 9 \(epoch 1, batch 3, all from 0\)") as caught:
        stopped.fit(make_batches(kind), verbose=0, epochs=1)
    reference.fit(make_batches(), verbose=0, epochs=1)
    reference.fit(make_batches(without=range(BAD, 6)), verbose=0, epochs=1)
    assert_same_state(stopped, reference)
    assert (stopped.global_step, reference.global_step) == (9, 9)
    assert all(parameter.grad is None for parameter in stopped.model.parameters())
    return str(caught.value)


FIRST = {
    "NaN pixel": "the network's input for image 1 of the batch",
    "infinite loss": "the loss",
    "NaN gradient": "the gradient of ",
    "infinite gradient": "the gradient of ",
    "one entry": "the gradient of head.fc1.weight",
}


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "fp32") for kind in KINDS), ("NaN gradient", "bf16")])
def test_the_step_changes_nothing_and_the_message_says_where(make_trainer, kind, precision):
    """Weights, batch norm's statistics and Adam's state stay those of the step before; the bad tensor is named."""
    make = functools.partial(make_trainer, batch_norm=True, dropout=0.5, precision=precision)
    message = assert_stops_before_the_bad_step(make, kind)
    assert f"first in {FIRST[kind]}" in message


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("one entry", {"optimizer": "adamw", "weight_decay": 0.1}),
        ("infinite loss", {"optimizer": "sgd", "weight_decay": 0.1}),
        ("one entry", {"optimizer": "rmsprop"}),
        ("infinite loss", {"optimizer": functools.partial(torch.optim.Adam, lr=1e-2, fused=False)}),
        ("one entry", {"optimizer": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.5, fused=True)}),
        ("one entry", {"optimizer": functools.partial(torch.optim.Adamax, lr=1e-2)}),
        ("infinite loss", {"clip_grad_norm": 0.1}),
        ("one entry", {"micro_batch_size": 3}),
        ("infinite loss", {"micro_batch_size": 1, "clip_grad_norm": 1.0, "optimizer": "sgd"}),
    ],
    ids=str,
)
def test_with_every_optimizer_clipping_and_parts(make_trainer, kind, arguments):
    """It holds for fused optimizers, others and instances, with clipping, micro-batches and recomputing."""
    assert_stops_before_the_bad_step(functools.partial(make_trainer, dropout=0.5, **arguments), kind)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("NaN pixel", {}),
        ("infinite loss", {"clip_grad_norm": 1.0}),
        ("infinite loss", {"optimizer": "rmsprop", "clip_grad_norm": 1.0}),
    ],
)
def test_with_scaled_gradients(make_trainer, half, kind, arguments):
    """A bad loss is raised in fp16 too, with the state of the step before, the loss's own gradients finite or not."""
    make = functools.partial(make_trainer, precision="fp16", batch_norm=True, **arguments)
    assert_stops_before_the_bad_step(make, kind)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_scaled_gradients_that_are_not_finite_change_no_weight(make_trainer, half, kind):
    """In fp16 they are the scaler's business: the step counts, no weight changes and the scale is halved."""
    skipped, reference = (make_trainer(kind, precision="fp16") for _ in range(2))
    for trainer in (skipped, reference):
        trainer.device.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    skipped.fit(make_batches(kind, number=4), verbose=0, epochs=1)
    reference.fit(make_batches(number=3), verbose=0, epochs=1)
    assert_same_state(skipped, reference)
    assert (skipped.global_step, skipped.device.scaler.get_scale()) == (4, 512.0)


def differences_to_copy(trainer):
    """Return a function that says what of a trainer's weights and optimizer has changed since."""
    copied = _copied(trained_state(trainer))
    return lambda: differences(copied, trained_state(trainer))


def _copied(part):
    if isinstance(part, torch.Tensor):
        return part.detach().clone()
    if isinstance(part, dict):
        return {key: _copied(value) for key, value in part.items()}
    return [_copied(value) for value in part] if isinstance(part, list | tuple) else part


def test_a_checkpoint_is_saved_there(make_trainer, tmp_path):
    """A `Checkpoint` holds the state of the step before the bad one, though it saves after epochs alone."""
    stopped, reference, loaded = (make_trainer("NaN gradient") for _ in range(3))
    with pytest.raises(NonFiniteError):
        stopped.fit(make_batches("NaN gradient"), callbacks=[tk.Checkpoint(tmp_path)], verbose=0, epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{BAD:08d}.pt"]
    reference.fit(make_batches(without=range(BAD, 6)), verbose=0, epochs=1)
    loaded.load(tmp_path / f"step-{BAD:08d}.pt")
    assert_same_state(loaded, reference)


def test_steps_raise_it_too(make_trainer):
    """A loop over `steps` gets the steps before, and the error."""
    trainer, made = make_trainer("NaN gradient"), []
    with pytest.raises(NonFiniteError, match="step 3 "):
        made.extend(step.index for step in trainer.steps(make_batches("NaN gradient")))
    assert made == [0, 1, 2]


def test_the_tensor_is_named_as_in_the_model(make_backbone, data):
    """Behind a frozen backbone, whose layers are split off, the name is still one of the model's."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, hidden=(16,)), "head")
    model.head.fc1.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"first in the gradient of head\.fc1\.weight"):
        tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2).fit(data, verbose=0, epochs=1)


def test_the_output_is_named_as_in_the_model(make_backbone, data):
    """The first layer whose output is infinite is named, split off or not."""
    model = tk.attach_head(make_backbone(), CLASSES, hidden=(16,))
    model.head.fc1.weight.data[3, 2] = math.inf
    for boundary in (None, "head"):
        tk.freeze_until(model, boundary)
        with pytest.raises(NonFiniteError, match=r"first in the output of head\.fc1 \(Linear\)"):
            tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2).fit(data, verbose=0, epochs=1)


def test_buffers_that_a_head_assigns_anew_are_put_back(make_backbone, data):
    """A running mean that is made anew in each forward pass, not written to in place, is put back as well."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))
            self.layer = nn.Linear(8, 3)

        def forward(self, features):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * features.detach().mean((0, 2, 3))
            return self.layer(features.flatten(1) - self.mean)

    model = tk.attach_head(make_backbone(), CLASSES, head=Centred())
    images = model.backbone.preprocess(data[0])
    images[:, 0, 3, 3] = math.nan
    with pytest.raises(NonFiniteError):
        tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2).fit((images, data[1]), verbose=0, epochs=1)
    assert torch.equal(model.head.mean, torch.zeros(8))


# ---- finite, but too large


class Scaled(nn.Module):
    """A head whose first layer's gradient is scaled from one step on."""

    def __init__(self, scale, step):
        super().__init__()
        self.fc1, self.logits, self.left = nn.Linear(8, 16), nn.Linear(16, 3), step
        self.fc1.weight.register_hook(self.scaled)
        self.scale = scale

    def scaled(self, gradient):
        self.left -= 1
        return gradient * self.scale if self.left < 0 else gradient

    def forward(self, features):
        return self.logits(self.fc1(features.flatten(1)).relu())


OPTIMIZERS = ["adam", "adamw", "rmsprop", functools.partial(torch.optim.Adagrad, lr=1e-2), "sgd"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize(("scale", "clip_grad_norm"), [(1e20, None), (1e30, 1.0), (1e37, None)])
def test_a_gradient_whose_square_overflows_is_not_applied(make_backbone, data, optimizer, clip_grad_norm, scale):
    """It would make second moments infinite for good, or be clipped to nothing: the step is an error that names it."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, head=Scaled(scale, 2)), "head")
    arguments = {"optimizer": optimizer, "clip_grad_norm": clip_grad_norm}
    trainer = tiny.make_trainer(model, **arguments | ({} if isinstance(optimizer, str) else {"lr": None}))
    with pytest.raises(NonFiniteError, match=r"step 2 .*too large, first in the gradient of head\.fc1\.weight"):
        trainer.fit(data, batch_size=6, verbose=0, epochs=2)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert all(bool(value.isfinite().all()) for value in [*moments, *model.state_dict().values()])


def test_a_large_gradient_that_can_be_squared_is_applied(make_backbone, data):
    """Adam divides by the gradient's size: a loss with large gradients trains as before."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, head=Scaled(1e10, 2)), "head")
    trainer = tiny.make_trainer(model)
    trainer.fit(data, batch_size=6, verbose=0, epochs=1)
    assert trainer.global_step == 4


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_batch_of_classes_that_count_nothing_counts_nothing(
    make_backbone, data, label_smoothing, clip_grad_norm, micro_batch_size
):
    """A batch whose class weights sum to 0 has a loss and a gradient of 0, with smoothing and without."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, hidden=(16,)), "head")
    loss = tk.CrossEntropy(class_weights=[0.0, 1.0, 1.0], label_smoothing=label_smoothing)
    trainer = tiny.make_trainer(model, loss=loss, optimizer="sgd", clip_grad_norm=clip_grad_norm)
    trainer.micro_batch_size = micro_batch_size
    images, targets = data[0][:18], torch.arange(18) % 3
    targets[:6] = 0
    steps = trainer.steps(DataLoader(TensorDataset(images, targets), batch_size=6))
    before = weights_of(model)
    assert float(next(steps).loss) == 0
    assert changed(before, model) <= tiny.STANDARDIZE
    assert float(next(steps).loss) > 0
    assert "head.fc1.weight" in changed(before, model)


# ---- updates that overflow


def assert_weights_are_refused(trainer, data, name, **arguments):
    with pytest.raises(NonFiniteError, match=rf"{name} became infinite or NaN in an update.*learning rate"):
        trainer.fit(data, batch_size=24, verbose=0, epochs=1, **arguments)


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [
        ("sgd", 3e38),
        (functools.partial(torch.optim.Adam, eps=0.0), 1e-2),
        (functools.partial(torch.optim.SGD, weight_decay=1e30), 1e20),
    ],
    ids=["rate", "eps", "decay"],
)
def test_weights_that_an_update_makes_infinite_are_an_error(make_backbone, data, optimizer, lr, tmp_path):
    """The last step's gradients were finite and no later step tells: the epoch ends in an error; nothing is saved."""
    head = Head(None)
    head.fc1.bias.register_hook(lambda gradient: gradient * 0 + torch.tensor([0.0, *[1e10] * 15]))
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, head=head), "head")
    trainer = tiny.make_trainer(model, optimizer=optimizer, lr=lr)
    assert_weights_are_refused(trainer, data, r"head\.\w+\.\w+", callbacks=[tk.Checkpoint(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_bias_of_minus_infinity_that_relu_hides_is_an_error(make_backbone, data):
    """Its unit is always 0, so every loss and gradient stays finite: only the weight itself tells."""
    head = Head(None)
    head.fc1.bias.data[3] = -math.inf
    head.fc1.bias.register_hook(lambda gradient: gradient * 0)
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, head=head), "head")
    assert_weights_are_refused(tiny.make_trainer(model), data, r"head\.fc1\.bias")


def test_the_best_epoch_comes_back_where_a_later_one_overflows(make_backbone, data):
    """Weights of the best epoch are in the model after the error."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, hidden=(16,)), "head")
    trainer = tiny.make_trainer(model, lr=1e-3)
    best = []

    def overflow(trainer, report):
        best.append(weights_of(model))
        model.head.fc1.bias.data[3] = -math.inf

    with pytest.raises(NonFiniteError, match="became infinite"):
        trainer.fit(data, validation_data=data, batch_size=24, verbose=0, epochs=2, callbacks=[overflow])
    assert changed(best[0], model) == set()


# ---- left out


@pytest.mark.parametrize(
    ("kind", "bad", "arguments"),
    [
        ("NaN pixel", BAD, {}),
        ("infinite loss", BAD, {}),
        ("one entry", 0, {}),
        ("one entry", BAD, {"precision": "bf16"}),
        ("one entry", 0, {"optimizer": "adamw", "weight_decay": 0.1}),
        ("NaN pixel", BAD, {"optimizer": "sgd"}),
        ("infinite loss", BAD, {"optimizer": "rmsprop", "clip_grad_norm": 1.0}),
        ("one entry", BAD, {"micro_batch_size": 2}),
        ("one entry", 0, {"optimizer": functools.partial(torch.optim.Adagrad, lr=1e-2, fused=True)}),
    ],
    ids=str,
)
def test_a_step_left_out_is_as_if_its_batch_had_not_been_there(make_trainer, kind, arguments, bad):
    """5 updates of 6, and the bits of a run without the bad batch, be it the first: dropout, moments, means."""
    arguments = {"batch_norm": True, "dropout": 0.5, **arguments}
    skipping = make_trainer(kind, max_skipped=10, **arguments)
    reference = make_trainer(kind, **arguments)
    torch.full((10_000,), 1e30)  # what memory that is not cleared may hold
    history = skipping.fit(make_batches(kind, bad=(bad,)), verbose=0, epochs=1)
    expected = reference.fit(make_batches(without=(bad,)), verbose=0, epochs=1)
    assert (skipping.global_step, history.reports[0].skipped) == (5, 1)
    assert history.history["loss"] == expected.history["loss"]
    assert history.history["accuracy"] == expected.history["accuracy"]
    assert differences(skipping.model.state_dict(), reference.model.state_dict()) == []
    assert differences(skipping.state_dict()["optimizer"]["state"], reference.state_dict()["optimizer"]["state"]) == []


def test_it_is_counted_and_printed_and_the_schedule_moves_with_the_updates(make_trainer, capsys):
    """The line of the epoch tells how many were left out; the last of 5 updates is at progress 4/6."""
    trainer = make_trainer("NaN gradient", max_skipped=10, schedule="linear", lr=1.0)
    rates = [step.lr for step in trainer.steps(make_batches("NaN gradient"))]
    assert rates == pytest.approx([1 - made / 6 for made in range(5)])
    history = trainer.fit(make_batches("NaN gradient"), lr=1e-3, epochs=1)
    assert "1 steps skipped: not finite" in capsys.readouterr().out
    assert history.reports[0].skipped == 1
    assert trainer.global_step == 10


def test_the_budget_holds_over_a_run(make_trainer):
    """Two of a budget of two pass in the first epoch; the third, in the second, is an error."""
    trainer = make_trainer("NaN gradient", max_skipped=2)
    reports = []
    with pytest.raises(NonFiniteError, match=r"step 5 \(epoch 1, batch 1, .*max_skipped=.* it is 2"):
        trainer.fit(
            make_batches("NaN gradient", bad=(1, 2)),
            epochs=2,
            callbacks=[lambda trainer, report: reports.append(report.skipped)],
            verbose=0,
        )
    assert reports == [2]
    none = make_trainer("NaN gradient", max_skipped=0)
    with pytest.raises(NonFiniteError, match="step 3 "):
        none.fit(make_batches("NaN gradient"), verbose=0, epochs=1)


def test_what_was_left_out_is_remembered_over_a_stop(make_trainer, tmp_path):
    """A run that stops behind a bad batch and is resumed has the report and the bits of one that did not."""
    make = functools.partial(make_trainer, "NaN gradient", max_skipped=1, dropout=0.5)
    whole, stopped, resumed = make(), make(), make()
    expected = whole.fit(make_batches("NaN gradient"), verbose=0, epochs=1)
    checkpoint = tk.Checkpoint(tmp_path, every_steps=4)

    def stop(module, inputs):
        if stopped.global_step == 4:
            raise InterruptedError

    stopped.model.head.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        stopped.fit(make_batches("NaN gradient"), callbacks=[checkpoint], verbose=0, epochs=1)
    history = resumed.fit(make_batches("NaN gradient"), resume_from=tmp_path, verbose=0, epochs=1)
    assert history.reports[0].skipped == 1
    assert history.history["loss"] == expected.history["loss"]
    assert_same_state(resumed, whole)


def test_an_epoch_of_nothing_but_bad_steps_has_no_loss(make_trainer):
    """A mean over no image is not a loss of 0, which would be the best there is."""
    trainer = make_trainer("NaN gradient", max_skipped=10)
    report = trainer.fit(make_batches("NaN gradient", bad=(0, 1), number=2), verbose=0, epochs=1).reports[0]
    assert report.skipped == 2
    assert math.isnan(report.loss)


def test_a_parameter_without_elements_is_looked_past(make_backbone, data):
    """A head may hold an empty parameter: its gradient, without a number, neither stops a run nor hides a bad one."""
    head = Head(None)
    head.empty = nn.Parameter(torch.empty(0, 3))
    head.register_forward_hook(lambda module, inputs, logits: logits + module.empty.sum())
    model = tk.attach_head(make_backbone(), CLASSES, head=head)
    for precision in ("fp32", "bf16"):
        before = weights_of(model)
        tiny.make_trainer(model, precision=precision).fit(data, verbose=0, epochs=1)
        assert {"head.fc1.weight", "head.logits.bias"} < changed(before, model)
    head.fc1.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"first in the gradient of head\.fc1\.weight"):
        tiny.make_trainer(model).fit(data, verbose=0, epochs=1)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_nan_pixel_in_the_first_batch_is_no_other_than_in_the_fourth(make_trainer, policy):
    """Which batch is the first is chance: the same error, or the same skip, as anywhere else."""
    trainer = make_trainer("NaN pixel", max_skipped=10 if policy == "skip" else 0)
    if policy == "skip":
        assert trainer.fit(make_batches("NaN pixel", bad=(0,)), verbose=0, epochs=1).reports[0].skipped == 1
    else:
        with pytest.raises(NonFiniteError, match=r"step 0 .*the network's input for image 1"):
            trainer.fit(make_batches("NaN pixel", bad=(0,)), verbose=0, epochs=1)


# ---- fused kernels that are told on the device


FUSED = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1, fused=True),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, fused=True),
}


@pytest.mark.parametrize("gradient", [1.0, math.nan])
@pytest.mark.parametrize("made", [0, 2])
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_step_is_made_only_where_it_may(name, made, gradient):
    """After a step that may not be made, weights and every later step are those of an optimizer without it."""
    parameters = [nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2)]
    optimizers = [FUSED[name]([parameter]) for parameter in parameters]

    def step(which, *, finite, value=0.5):
        parameters[which].grad = torch.full((1000,), value)
        step_where(torch.tensor(finite), optimizers[which])

    for _ in range(made):
        step(0, finite=True)
        step(1, finite=True)
    dirt = [torch.full((1000,), 1e30) for _ in range(8)]  # what memory that is not cleared may hold
    del dirt
    step(0, finite=False, value=gradient)
    assert torch.equal(*parameters)
    step(0, finite=True)
    step(1, finite=True)
    assert torch.equal(*parameters)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert differences(*states) == []
    assert not hasattr(optimizers[0], "found_inf")
    assert not hasattr(optimizers[0], "grad_scale")


# ---- a scale that collapses


@pytest.mark.parametrize("number", [20, 60])
def test_a_scale_that_collapses_is_an_error(make_trainer, half, number):
    """Gradients that overflow in every step end the run, after 50 steps or an epoch at most, and change nothing."""
    trainer = make_trainer("NaN gradient", precision="fp16")
    changes = differences_to_copy(trainer)
    with pytest.raises(NonFiniteError, match=r'fp16 gradient scale fell to .*precision="bf16"'):
        trainer.fit(make_batches("NaN gradient", bad=range(number), number=number), epochs=2, verbose=0)
    assert trainer.global_step <= 50
    assert 0 < trainer.device.scaler.get_scale() < 1
    assert [name for name in changes() if name.startswith(".model")] == []


# ---- what cannot be used is refused before


@pytest.mark.parametrize("targets", [torch.full((24,), -100), torch.tensor([-100, *range(3)] * 6)])
def test_the_label_that_torch_would_ignore_is_refused(model, data, targets):
    """-100 is no class here: a mean over no image would be NaN."""
    with pytest.raises(TargetError, match="-100"):
        tk.Trainer(model, device="cpu", precision="fp32").fit((data[0], targets), verbose=0, epochs=1)


RATES = [math.nan, math.inf, -1e-3, 0.0, -0.0]


@pytest.mark.parametrize("lr", RATES)
def test_rates_that_cannot_be_used_are_refused(model, data, lr):
    """A rate that is NaN, infinite, negative or zero is refused where it is given, and changes nothing."""
    for rates in (lr, {"backbone": 1e-3, "head": lr}):
        with pytest.raises(ArgumentError, match="lr"):
            tk.Trainer(model, device="cpu", lr=rates)
    trainer = tk.Trainer(model, device="cpu", precision="fp32", lr=1e-3)
    for call in (trainer.fit, trainer.steps):
        with pytest.raises(ArgumentError, match="lr="):
            call(data, lr=lr)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    assert trainer.global_step == 0


@pytest.mark.parametrize("lr", [math.inf, math.nan])
def test_rates_of_an_optimizer_that_is_already_built_are_looked_at(model, lr):
    """torch takes an infinite rate, and one written to a group later; the first step would make every weight NaN."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ArgumentError, match="lr"):
        tk.Trainer(model, optimizer=optimizer, device="cpu")


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_schedule_that_gives_no_number_is_an_error_before_the_step(model, data, factor):
    """The user's own function may return NaN or infinity: no weight becomes one."""
    trainer = tk.Trainer(model, device="cpu", precision="fp32", schedule=lambda p: 1.0 if p < 0.5 else factor)
    with pytest.raises(tk.TransferKitError, match="schedule"):
        trainer.fit(data, batch_size=6, verbose=0, epochs=1)
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("argument", [{"max_skipped": "ignore"}, {"max_skipped": -1}, {"max_skipped": 1.5}])
def test_policies_that_cannot_be_used_are_refused(model, argument):
    """The message names the argument and what it may be."""
    with pytest.raises(ArgumentError, match=next(iter(argument))):
        tk.Trainer(model, device="cpu", **argument)


# ---- an ordinary run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("adam", lambda groups: torch.optim.Adam(groups, lr=1e-2, fused=True)),
        ("adamw", lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True)),
        ("sgd", lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, fused=True)),
        ("rmsprop", lambda groups: torch.optim.RMSprop(groups, lr=1e-2)),
    ],
)
def test_an_ordinary_run_has_the_bits_of_a_plain_loop(make_trainer, precision, name, optimizer):
    """Looking for bad numbers changes no bit of weights, statistics and moments: they are those of torch alone."""
    trainer, plain = (make_trainer(None, batch_norm=True, optimizer=name, precision=precision) for _ in range(2))
    trainer.fit(make_batches(), epochs=2, verbose=0)
    model = plain.model.train()
    own = optimizer([{"params": part.parameters()} for part in (model.backbone, model.head)])
    for _ in range(2):
        for images, targets in make_batches():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images)
            (functional.cross_entropy(logits.float(), targets, reduction="sum") / len(targets)).backward()
            own.step()
            own.zero_grad()
    assert differences(trainer.model.state_dict(), model.state_dict()) == []
    states = [built.state_dict()["state"] for built in (trainer.optimizer, own)]
    assert differences(*states) == []
