"""Where memory does not suffice, the same step is made in smaller parts, or nothing is changed."""

import copy
import functools
import json
import sys

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import tiny
import transferkit as tk
from tiny import CLASSES, differences, python
from transferkit.compute.out_of_memory import is_out_of_memory, reserve_state
from transferkit.errors import NonFiniteError, OutOfMemoryError
from transferkit.features.prefix import Prefix

ERRORS = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."),
    "older": lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "runtime": lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "host": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 400 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError,
}
OTHERS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 16x3)"),
    OSError(12, "Cannot allocate memory"),
    ValueError("out of memory"),
]


class Failing(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(ctx, tensor, make_error):
        ctx.make_error = make_error
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.make_error()


class Head(nn.Module):
    """Fails where it is given more than `limit` images at once while training."""

    def __init__(self, limit, make_error, where, *, width=16):
        super().__init__()
        self.limit, self.make_error, self.where = limit, make_error, where
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3, bias=False)
        )
        self.sizes = []

    def forward(self, features):
        fails = self.training and torch.is_grad_enabled() and len(features) > self.limit
        if self.training and not fails:
            self.sizes.append(len(features))
        if fails and self.where == "forward":
            raise self.make_error()
        logits = self.layers(features)
        return Failing.apply(logits, self.make_error) if fails else logits


@pytest.fixture
def make_trainer(make_backbone):
    """A trainer of a network with dropout and batch norm whose head fails on too many images at once."""

    def make(limit=100, *, error="torch", where="forward", width=16, **arguments):
        backbone = make_backbone(batch_norm=True)
        torch.manual_seed(1)
        make_error = error if callable(error) else ERRORS[error]
        model = tk.attach_head(backbone, CLASSES, head=Head(limit, make_error, where, width=width))
        model.head.sizes.clear()  # those of the check
        return tiny.make_trainer(model, **arguments)

    return make


def copied(trainer):
    return copy.deepcopy({name: trainer.state_dict()[name] for name in ("model", "optimizer")})


def assert_same_state(one, other):
    assert differences(copied(one), copied(other)) == []


# ---- the bits of smaller parts


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS)
def test_the_step_is_that_of_smaller_parts_from_the_start(make_trainer, data, capsys, error, where):
    """Weights, dropout masks, batch norm's statistics, moments and figures are those of `micro_batch_size=2`."""
    falling, small = make_trainer(2, error=error, where=where), make_trainer(micro_batch_size=2)
    history = falling.fit(data, epochs=2, batch_size=9)
    said = capsys.readouterr().out
    expected = small.fit(data, epochs=2, batch_size=9, verbose=0)
    assert falling.model.head.sizes == small.model.head.sizes == [2, 2, 2, 2, 1, 2, 2, 2, 2, 1, 2, 2, 2] * 2
    assert_same_state(falling, small)
    assert history.history["loss"] == expected.history["loss"]
    assert falling.micro_batch_size == 2
    assert said.count("out of memory: from here on micro-batches of 2; the updates stay the same") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"precision": "bf16"},
        {"optimizer": "sgd", "clip_grad_norm": 0.1},
        {"optimizer": "rmsprop"},
        {"loss": tk.CrossEntropy(label_smoothing=0.1, class_weights=[1.0, 2.0, 5.0])},
        {"micro_batch_size": 7},
    ],
    ids=str,
)
def test_with_other_settings(make_trainer, data, arguments):
    """It holds with bf16, clipping, other optimizers and losses, and from parts that were too large."""
    falling, small = (
        make_trainer(3, where="backward", **arguments),
        make_trainer(**{**arguments, "micro_batch_size": 2}),
    )
    for trainer in (falling, small):
        trainer.fit(data, batch_size=8, epochs=2, verbose=0)
    assert_same_state(falling, small)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_limit_that_is_met_in_a_later_step(make_trainer, data, where):
    """The steps before are whole, and the first that does not fit is made again from where it stood."""
    falling, small = make_trainer(8, where=where), make_trainer()

    def run(trainer, change):
        for step in trainer.steps(data, batch_size=8):
            if step.index == 1:
                change()

    run(falling, lambda: setattr(falling.model.head, "limit", 4))
    run(small, lambda: setattr(small, "micro_batch_size", 4))
    assert falling.model.head.sizes == small.model.head.sizes == [8, 8, 4, 4]
    assert_same_state(falling, small)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_limit_that_is_met_in_a_later_part(make_trainer, data, where):
    """Gradients of the parts that went through before are not counted twice when the step is begun again."""
    falling, small = make_trainer(where=where, micro_batch_size=4), make_trainer(micro_batch_size=2)
    head = falling.model.head
    head.register_forward_pre_hook(lambda module, inputs: setattr(head, "limit", 100 if not head.sizes else 3))
    for trainer in (falling, small):
        trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    assert head.sizes[:5] == [4, 2, 2, 2, 2]
    assert_same_state(falling, small)


def test_a_resumed_run_keeps_the_size(make_trainer, data, tmp_path):
    """What was found out is in the checkpoint: no step of the resumed run fails again, and the bits are the same."""
    whole, stopped, resumed = make_trainer(3), make_trainer(3), make_trainer(3)
    whole.fit(data, epochs=2, batch_size=8, verbose=0)
    stopped.fit(data, epochs=1, batch_size=8, callbacks=[tk.Checkpoint(tmp_path)], verbose=0)
    failures = []
    resumed.model.head.make_error = lambda: failures.append(1) or ERRORS["torch"]()
    resumed.fit(data, epochs=2, batch_size=8, resume_from=tmp_path, verbose=0)
    assert (failures, resumed.micro_batch_size) == ([], 2)
    assert_same_state(resumed, whole)


def test_a_step_that_is_not_finite_is_explained_in_the_same_parts(make_trainer, data):
    """Where a whole batch does not fit, looking for the bad number does not need it to."""
    trainer = make_trainer(3)
    trainer.model.head.layers[4].weight.register_hook(lambda gradient: gradient * torch.inf)
    tk.freeze_until(trainer.model, "head")
    with pytest.raises(NonFiniteError, match=r"step 0 .*the gradient of"):
        trainer.fit(data, batch_size=8, verbose=0, epochs=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_ragged_last_part_gives_the_gradient_of_the_whole(model, data, precision, size):
    """5 = 2+2+1 images, each for its share: the update of all five at once, but for rounding."""
    updates = []
    for micro_batch_size in (None, size):
        trainer = tiny.make_trainer(
            copy.deepcopy(model),
            optimizer=functools.partial(torch.optim.SGD, momentum=0),
            micro_batch_size=micro_batch_size,
            precision=precision,
            lr=1.0,
            loss=tk.CrossEntropy(class_weights=[1.0, 2.0, 5.0]),
        )
        trainer.fit((data[0][:5], data[1][:5]), batch_size=5, verbose=0, epochs=1)
        before = dict(model.named_parameters())
        updates.append({name: value - before[name] for name, value in trainer.model.named_parameters()})
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    for name, update in updates[0].items():
        assert (updates[1][name] - update).norm() <= tolerance * update.norm()


# ---- errors


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS)
def test_one_image_that_does_not_fit_is_an_error_that_changes_nothing(make_trainer, data, error, where):
    """The error tells what was asked for and how much is free, and weights, statistics and gradients are as before."""
    trainer = make_trainer(0, error=error, where=where)
    before = copied(trainer)
    with pytest.raises(OutOfMemoryError, match=r"one image at a time.*GiB free of .* GiB") as caught:
        trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    message, reason = str(caught.value), str(ERRORS[error]()).splitlines()
    assert (reason[0] if reason else "MemoryError") in message
    assert differences(copied(trainer), before) == []
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("error", OTHERS, ids=str)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_other_errors_pass_unchanged(make_trainer, data, error, where):
    """An error that has nothing to do with memory is not taken for one, and nothing is tried again."""
    raised = []
    trainer = make_trainer(4, error=lambda: raised.append(1) or error, where=where)
    with pytest.raises(type(error)) as caught:
        trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    assert caught.value is error
    assert raised == [1]
    assert trainer.micro_batch_size is None


@pytest.mark.parametrize("error", ["torch", "other"])
def test_what_a_failed_step_leaves_does_not_reach_the_next(make_trainer, data, error):
    """Gradients and statistics of the parts before the one that failed are not in the next run's first step."""
    make_error = ERRORS["torch"] if error == "torch" else lambda: RuntimeError("device-side assert triggered")
    failed, fresh = make_trainer(error=make_error, micro_batch_size=1), make_trainer(micro_batch_size=1)

    def fail_later(module, inputs):
        if len(failed.model.head.sizes) == 3:
            failed.model.head.limit = 0

    hook = failed.model.backbone.register_forward_pre_hook(fail_later)
    with pytest.raises(RuntimeError):
        failed.fit(data, batch_size=8, verbose=0, epochs=1)
    hook.remove()
    failed.model.head.limit = 100
    for trainer in (failed, fresh):
        trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    assert_same_state(failed, fresh)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "HIP out of memory. Tried to allocate 20.00 MiB",
        "MPS backend out of memory (MPS allocated: 1.00 GB)",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes. Buy new RAM!",
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "std::bad_alloc",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_every_spelling_is_known(message):
    """torch, its libraries and the C++ runtime have several words for the same."""
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not_taken_for_it(error):
    """Neither other faults of a device, nor other kinds of errors that use the words."""
    assert not is_out_of_memory(error)


# ---- the optimizer


class NoRoom(TorchFunctionMode):
    """Allocations of a kind fail, from the `skip`-th on."""

    def __init__(self, *functions, skip=0):
        super().__init__()
        self.functions, self.skip = functions, skip

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.functions:
            self.skip -= 1
            if self.skip < 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop"])
def test_no_room_for_the_optimizers_state_changes_nothing(make_trainer, data, optimizer, skip):
    """It is seen before the first parameter is changed: weights, statistics and state are as before, all of them."""
    trainer = make_trainer(optimizer=optimizer)
    before = copied(trainer)
    with NoRoom(torch.empty_like, skip=skip), pytest.raises(OutOfMemoryError, match=r"optimizer's state.*GiB free of"):
        trainer.fit(data, batch_size=8, verbose=0, epochs=1)
    assert differences(copied(trainer), before) == []
    assert not trainer.optimizer.state
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.global_step == 0


def test_an_optimizer_that_keeps_nothing_needs_no_room():
    """Plain SGD has no state: nothing is asked for, in no step."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    with NoRoom(torch.empty_like):
        reserve_state(optimizer, tk.Device("cpu"))
    assert parameter.grad is not None


@pytest.mark.parametrize("error", ["torch", "runtime", "python"])
def test_the_optimizers_own_step_is_never_made_twice(make_trainer, data, error):
    """An error in `optimizer.step` ends the run; a second try would step the first parameters twice."""
    calls = []

    class Short(torch.optim.SGD):
        def step(self, closure=None):
            calls.append(1)
            if len(calls) == 2:
                raise ERRORS[error]()
            super().step(closure)

    failing = make_trainer(optimizer=functools.partial(Short, fused=False))
    reference = make_trainer(optimizer=functools.partial(torch.optim.SGD, fused=False))
    with pytest.raises((RuntimeError, MemoryError)):
        failing.fit(data, batch_size=8, verbose=0, epochs=1)
    next(reference.steps(data, batch_size=8))
    parameters = [dict(trainer.model.named_parameters()) for trainer in (failing, reference)]
    assert len(calls) == 2
    assert differences(*parameters) == []


# ---- the frozen layers


class Crowded(TorchFunctionMode):
    """Convolutions of more than `limit` images at once fail."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.failures = limit, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d and len(args[0]) > self.limit:
            self.failures += 1
            raise ERRORS["torch"]()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("boundary", ["block3", "head"])
def test_the_prefix_falls_back_with_the_same_bits(make_backbone, data, precision, boundary):
    """The frozen layers' output is that of smaller parts from the start, and later batches begin with these."""
    model = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), CLASSES), boundary).eval()
    device, preprocess = tk.Device("cpu", precision), model.backbone.preprocess
    device.prepare(model)
    falling, small = (Prefix(model.split()[0], preprocess, device=device) for _ in range(2))
    small.batch_size = 3
    images = preprocess(data[0])
    falling.batch_size = 12
    with Crowded(4) as crowd:
        once = falling(images)
        assert (falling.batch_size, crowd.failures) == (3, 2)
        assert torch.equal(falling(images), once)
    assert crowd.failures == 2
    assert torch.equal(once, small(images))


def test_the_prefix_falls_back_behind_layers_already_computed(make_backbone, data):
    """Begun behind a convolution, with a layer that works in place, it falls back as well."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES), "head").eval()
    prefix = Prefix(model.split()[0], model.backbone.preprocess, device=tk.Device("cpu", "fp32"))
    with torch.no_grad():
        inputs = model.backbone.features[0](model.backbone.preprocess(data[0]))
        expected = torch.cat([prefix(part, first=1) for part in torch.split(inputs, 6)])
        with Crowded(6):
            assert torch.equal(prefix(inputs, first=1), expected)


def test_the_prefix_says_when_one_image_does_not_fit(make_backbone, data):
    """Then the run ends with the same error as a training step."""
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES), "head")
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    with Crowded(0), pytest.raises(OutOfMemoryError, match=r"frozen layers, even one image at a time.*GiB free of"):
        trainer.fit(data, verbose=0, epochs=1)


@pytest.mark.parametrize("cache", [True, False])
def test_a_run_on_frozen_layers_that_fall_back(make_backbone, data, cache):
    """`fit` with a frozen backbone ends with the weights of one with enough memory, to rounding, cached or not."""
    results = []
    for limit in (100, 2):
        torch.manual_seed(1)
        model = tk.attach_head(make_backbone(), CLASSES)
        trainer = tk.Trainer(tk.freeze_until(model, "head"), cache=cache, device="cpu", precision="fp32", lr=1e-2)
        with Crowded(limit) as crowd:
            trainer.fit(data, epochs=2, batch_size=8, verbose=0)
        assert (crowd.failures > 0) == (limit == 2)
        results.append(dict(model.named_parameters()))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-5)


# ---- memory that really runs out


REAL = """
import copy, json, resource
from torch import nn
from tiny import changed, make_backbone, make_images, make_model, make_trainer

head = nn.Sequential(nn.Flatten(), nn.Linear(8, 60000), nn.ReLU(), nn.Dropout(0.5), nn.Linear(60000, 3))
models = [make_model(make_backbone(batch_norm=True), head=head)]
models.append(copy.deepcopy(models[0]))
data = make_images(256)


def limit(free):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (free if free < 0 else size + free, resource.RLIM_INFINITY))


make_trainer(copy.deepcopy(models[0])).fit((data[0][:2], data[1][:2]), epochs=1, verbose=0)  # what torch allocates once
trainer = make_trainer(models[0])
result = {}
limit(150 * 2**20)
try:
    trainer.fit(data, epochs=1, batch_size=256)  # one step: a later one may find less memory, and fall back further
except BaseException as error:
    result["error"] = repr(error)
limit(-1)
size = trainer.micro_batch_size
result["size"] = size
if size is not None and "error" not in result:
    other = make_trainer(models[1])
    other.micro_batch_size = size
    other.fit(data, epochs=1, batch_size=256, verbose=0)
    result["differ"] = list(changed(models[1].state_dict(), models[0]))
print("\\n" + json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space")
def test_memory_that_really_runs_out():
    """In a process that may take 150 MB more, a batch that needs 400 goes through in parts, with the parts' bits."""
    printed = python(REAL)
    result = json.loads(printed.splitlines()[-1])
    assert "error" not in result
    assert 1 <= result["size"] < 256
    assert result["differ"] == []
    assert f"from here on micro-batches of {result['size']}" in printed
