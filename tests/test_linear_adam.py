"""Adam without the gradient in memory: the bits of autocast and fused Adam, or it is not used."""

import copy
import ctypes
import platform
import shutil
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

import transferkit as tk
from transferkit import linear_adam
from transferkit.linear_adam import LinearAdam, find_linear_adam, load_kernel

needs_kernel = pytest.mark.skipif(load_kernel() is None, reason="not compiled, or a CPU without AVX512-BF16")


@pytest.fixture(autouse=True)
def _every_size(monkeypatch):
    """Small layers count as large."""
    monkeypatch.setattr(linear_adam, "LARGE", 1)


def make_head(*, inputs, width, bias=True, dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, width, bias=bias), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 5, bias=bias)]
    return nn.Sequential(*layers)


def train(network, optimizer, *, steps, batch_size, inputs, with_kernel):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        torch.manual_seed(step)
        images = torch.randn(batch_size, inputs, generator=generator)
        targets = torch.randint(0, 5, (batch_size,), generator=generator)
        special = LinearAdam(network, optimizer, load_kernel()) if with_kernel else None
        with torch.autocast("cpu", torch.bfloat16), special or nullcontext():
            logits = network(images)
        functional.cross_entropy(logits.float(), targets).backward()
        if special is not None:
            special.update()
            assert network[0].weight.grad is None or step == 0
        optimizer.step()
        optimizer.zero_grad()


def both(network, make_optimizer, **arguments):
    results = []
    for with_kernel in (True, False):
        copied = copy.deepcopy(network)
        optimizer = make_optimizer(copied.parameters())
        train(copied, optimizer, with_kernel=with_kernel, **arguments)
        moments = [optimizer.state[p][name] for p in copied.parameters() for name in ("step", "exp_avg", "exp_avg_sq")]
        results.append([*copied.state_dict().values(), *moments])
    return results


@needs_kernel
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.1, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3, betas=(0.3, 0.5), eps=1e-3, fused=True),
    ],
    ids=["adam", "weight_decay", "adamw", "betas"],
)
def test_weights_and_moments_are_those_of_fused_adam(make_optimizer, steps):
    """After any number of steps, every weight and moment has the same bits."""
    network = make_head(inputs=256, width=128, dropout=0.5)
    mine, plain = both(network, make_optimizer, steps=steps, batch_size=32, inputs=256)
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


@needs_kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 3, 17, 64])
@pytest.mark.parametrize("inputs", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 33])
def test_odd_shapes(batch_size, inputs, width, bias):
    """Rows, columns and batches that fill no register give the same weights to the last bit of the gradient's bf16."""
    network = make_head(inputs=inputs, width=width, bias=bias)
    mine, plain = both(
        network, lambda p: torch.optim.Adam(p, lr=1e-3, fused=True), steps=4, batch_size=batch_size, inputs=inputs
    )
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    """However the rows are divided among threads, the bits are the same."""
    before = torch.get_num_threads()
    network = make_head(inputs=300, width=200)
    optimizer = {"steps": 3, "batch_size": 8, "inputs": 300}
    alone, _ = both(network, lambda p: torch.optim.Adam(p, fused=True), **optimizer)
    try:
        torch.set_num_threads(threads)
        divided, _ = both(network, lambda p: torch.optim.Adam(p, fused=True), **optimizer)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, divided, strict=True))


@needs_kernel
def test_a_weight_used_otherwise_too_gets_the_sum_of_both_gradients():
    """A penalty on the weight adds its gradient; the optimizer makes the one update."""
    network = make_head(inputs=64, width=32)
    results = []
    for with_kernel in (True, False):
        copied = copy.deepcopy(network)
        optimizer = torch.optim.Adam(copied.parameters(), lr=1e-2, fused=True)
        for _ in range(3):
            special = LinearAdam(copied, optimizer, load_kernel())
            with torch.autocast("cpu", torch.bfloat16), special if with_kernel else nullcontext():
                logits = copied(torch.ones(4, 64))
            (logits.float().square().mean() + copied[0].weight.square().sum()).backward()
            special.update()
            optimizer.step()
            optimizer.zero_grad()
        results.append(copied[0].weight)
        assert optimizer.state[copied[0].weight]["step"] == 3
    torch.testing.assert_close(*results)


@needs_kernel
def test_infinite_and_undefined_gradients_come_through_as_with_adam():
    """A NaN in a batch makes the same weights NaN."""
    network = make_head(inputs=40, width=24)
    results = []
    for with_kernel in (True, False):
        copied = copy.deepcopy(network)
        optimizer = torch.optim.Adam(copied.parameters(), fused=True)
        train(copied, optimizer, steps=1, batch_size=4, inputs=40, with_kernel=False)
        images = torch.ones(4, 40)
        images[0, 3] = float("nan")
        special = LinearAdam(copied, optimizer, load_kernel())
        with torch.autocast("cpu", torch.bfloat16), special if with_kernel else nullcontext():
            logits = copied(images)
        logits.float().sum().backward()
        special.update()
        optimizer.step()
        results.append(copied[0].weight.detach())
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert results[0].isnan().any()


@needs_kernel
@pytest.mark.parametrize("arguments", [{}, {"optimizer": "adamw", "weight_decay": 0.1}, {"schedule": "cosine"}])
def test_the_trainer_gives_the_same_weights_with_the_kernel_and_without(model, data, monkeypatch, arguments):
    """`fit` in bf16 ends with the same bits, dropped last batches, validation and all."""
    results = []
    for kernel in (load_kernel, lambda: None):
        monkeypatch.setattr(linear_adam, "load_kernel", kernel)
        copied = tk.freeze_until(copy.deepcopy(model), "head")
        trainer = tk.Trainer(copied, lr=1e-2, device="cpu", precision="bf16", **arguments)
        trainer.fit(data, validation_data=data, epochs=3, batch_size=7, verbose=0)
        results.append(copied.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@needs_kernel
def test_the_trainer_uses_it(model, data, monkeypatch):
    """After the first step, which the optimizer makes itself, every large weight is updated by the kernel."""
    calls = []
    kernel = load_kernel()

    def counted(*arguments):
        calls.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(linear_adam, "load_kernel", lambda: counted)
    trainer = tk.Trainer(tk.freeze_until(model, "head"), device="cpu", precision="bf16")
    trainer.fit(data, epochs=2, batch_size=8, verbose=0)
    assert len(calls) == 2 * (2 * 3 - 1)  # two layers, three steps an epoch


@pytest.mark.parametrize(
    "arguments",
    [
        {"clip_grad_norm": 1.0},
        {"micro_batch_size": 4},
        {"optimizer": "sgd"},
        {"precision": "fp32"},
        {"optimizer": lambda p: torch.optim.Adam(p, amsgrad=True, fused=True)},
        {"optimizer": lambda p: torch.optim.Adam(p, fused=False)},
    ],
    ids=str,
)
def test_it_is_not_used_where_it_would_not_give_the_same(model, data, monkeypatch, arguments):
    """Clipping, micro-batches, other optimizers, their variants and fp32 go the ordinary way."""
    monkeypatch.setattr(linear_adam, "_run_kernel", None)  # a call would fail
    if callable(arguments.get("optimizer")):
        arguments = {"optimizer": arguments["optimizer"](model.parameters())}
    tk.freeze_until(model, "head")
    tk.Trainer(model, device="cpu", **{"precision": "bf16", **arguments}).fit(data, epochs=2, verbose=0)


def test_it_is_not_used_with_hooks_that_look_at_gradients(model):
    """A hook of the optimizer or of a weight sees a gradient."""
    device = tk.Device("cpu", precision="bf16")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    optimizer.register_step_pre_hook(lambda *_: None)
    assert find_linear_adam(model, optimizer, device=device) is None
    model.head.fc1.weight.register_hook(lambda gradient: gradient)
    assert id(model.head.fc1.weight) not in LinearAdam(model, torch.optim.Adam(model.parameters()), None)._groups


@pytest.mark.skipif(
    platform.system() != "Linux"
    or platform.machine() != "x86_64"
    or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="no compiler, or another machine",
)
def test_it_is_compiled_where_there_is_a_compiler():
    """Building the package compiles the kernel; on another processor it is there and not called."""
    path = linear_adam.Path(linear_adam.__file__).with_name("adam_linear.so")
    assert ctypes.CDLL(str(path)).adam_linear
