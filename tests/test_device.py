"""Where the arithmetic runs and in which number format."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk
from transferkit.compute.device import supported_precisions
from transferkit.errors import ArgumentError, DeviceError


@pytest.fixture
def no_accelerator(monkeypatch):
    """A machine with a CPU and nothing else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def small_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))


def small_loader() -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    images, targets = torch.randn(20, 3, 8, 8, generator=generator), torch.arange(20) % 3
    return DataLoader(TensorDataset(images, targets), batch_size=8)


# ---- the choice of a device


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("device", ["auto", "cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_the_cpu_has_one_name(device):
    """On a machine without accelerator "auto" is the CPU, and every way to write the CPU is the same."""
    assert tk.Device(device).torch_device == torch.device("cpu")


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3", torch.device("cuda", 1), "mps"])
def test_absent_device_is_refused_with_those_present(device):
    """A device that the machine lacks is refused with what there is."""
    with pytest.raises(
        DeviceError, match=rf"device '{device}' is not available on this machine: expected one of \['cpu'\].*auto"
    ):
        tk.Device(device)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", None, 1.5])
def test_unknown_device_is_refused_with_those_present(device):
    """A device that torch does not know is refused with what there is."""
    with pytest.raises(
        DeviceError, match=r"device .* is not known to torch: expected one of \['cpu'\], 'auto' or a torch.d"
    ):
        tk.Device(device)


@pytest.mark.usefixtures("no_accelerator")
def test_number_of_an_absent_device_is_refused():
    """A number, as torch takes for a GPU, is refused where there is none."""
    with pytest.raises(DeviceError, match=r"device .*5.* expected .*\['cpu'\]"):
        tk.Device(5)


def test_repr_says_device_and_precision():
    """The repr is the call that makes it."""
    assert repr(tk.Device("cpu", "fp32")) == "Device('cpu', precision='fp32')"


# ---- the choice of a number format


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_only_where_the_cpu_computes_it(monkeypatch, native, chosen):
    """On a CPU "auto" is bf16 where the hardware has it and fp32 elsewhere, where bf16 is slower."""
    monkeypatch.setattr("transferkit.compute.device._cpu_has_bf16", lambda: native)
    assert tk.Device("cpu").precision == chosen


@pytest.mark.parametrize(("avx512", "amx", "chosen"), [(1, 0, "bf16"), (0, 1, "bf16"), (1, 1, "bf16"), (0, 0, "fp32")])
def test_either_instruction_set_is_enough_for_bf16(monkeypatch, avx512, amx, chosen):
    """AVX512-BF16 and AMX each compute bf16 natively; "auto" asks torch for both."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert tk.Device("cpu").precision == chosen


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_format_asked_for_is_taken(monkeypatch, native, precision, dtype):
    """bf16 and fp32 can be asked for on any CPU."""
    monkeypatch.setattr("transferkit.compute.device._cpu_has_bf16", lambda: native)
    device = tk.Device("cpu", precision)
    assert (device.precision, device.dtype) == (precision, dtype)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp16")],
)
def test_auto_on_cuda_follows_the_capability(monkeypatch, capability, expected):
    """On CUDA "auto" is bf16 from capability 8.0 on and fp16 before; both can be asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    able = supported_precisions(torch.device("cuda", 0))
    assert able[0] == expected
    assert set(able) == {"bf16", "fp16", "fp32"}


def test_mps_computes_in_fp32():
    """On MPS there is fp32 alone."""
    assert supported_precisions(torch.device("mps")) == ("fp32",)


def test_fp16_on_the_cpu_is_refused_with_the_alternatives():
    """fp16 on a CPU is refused with the formats that it has."""
    with pytest.raises(
        DeviceError, match=r"'fp16' is not supported on cpu: expected one of .*bf16.*precision=\"auto\""
    ):
        tk.Device("cpu", "fp16")


@pytest.mark.parametrize(
    ("precision", "hint"),
    [("bf17", "Did you mean 'bf16'"), ("double", "Known: 'fp32', 'bf16', 'fp16'"), (16, "'fp16'")],
)
def test_unknown_format_is_refused(precision, hint):
    """An unknown format is refused with those that come close."""
    with pytest.raises(ArgumentError, match=rf"precision={precision!r} is not known. .*{hint}"):
        tk.Device("cpu", precision)


# ---- number formats at work


def test_autocast_runs_products_in_bf16_and_keeps_parameters():
    """In bf16 products come out in bf16 while the parameters and their gradients stay fp32."""
    device = tk.Device("cpu", "bf16")
    layer = device.prepare(nn.Linear(3, 2))
    with device.autocast():
        output = layer(torch.ones(4, 3))
    device.backward(output.float().sum())
    assert output.dtype == torch.bfloat16
    assert {layer.weight.dtype, layer.weight.grad.dtype} == {torch.float32}


def test_autocast_in_fp32_changes_nothing():
    """In fp32 products stay fp32."""
    device = tk.Device("cpu", "fp32")
    with device.autocast():
        output = nn.Linear(3, 2)(torch.ones(4, 3))
        assert not torch.is_autocast_enabled("cpu")
    assert output.dtype == torch.float32


def fail_in(device: tk.Device) -> None:
    with device.autocast():
        raise RuntimeError("inside")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_ends_with_its_block(precision):
    """After the block, also one that failed, torch is as it was."""
    device = tk.Device("cpu", precision)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="inside"):
        fail_in(device)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("call", ["autocast", "backward"])
def test_tf32_is_allowed_inside_only(monkeypatch, call):
    """fp32 on CUDA allows TF32 inside `autocast` and `backward`, and puts the setting back."""
    device = tk.Device("cpu", "fp32")
    monkeypatch.setattr(device, "torch_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: torch.no_grad())
    parameter = torch.ones(1, requires_grad=True)
    loss = parameter * 2
    seen = []
    loss.register_hook(lambda gradient: seen.append(torch.get_float32_matmul_precision()))
    if call == "backward":
        device.backward(loss)
    else:
        with device.autocast():
            seen.append(torch.get_float32_matmul_precision())
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == "highest"


# ---- a loop of one's own


def plain_training() -> nn.Module:
    model = small_net().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, targets in small_loader():
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_device_alone_serves_a_plain_loop():
    """A loop of one's own with `Device` in fp32 gives, bit for bit, the weights of one without it."""
    device = tk.Device("cpu", "fp32")
    model = device.prepare(small_net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, targets in device.batches(small_loader()):
        with device.autocast():
            loss = nn.functional.cross_entropy(model(images), targets)
        device.step(loss, optimizer)
    expected = plain_training().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_bf16_loop_learns():
    """A loop of one's own in bf16 brings the loss down."""
    device = tk.Device("cpu", "bf16")
    model = device.prepare(small_net())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        for images, targets in device.batches(small_loader()):
            with device.autocast():
                loss = nn.functional.cross_entropy(model(images).float(), targets)
            device.step(loss, optimizer)
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_prepare_lays_convolutions_out_channels_last_in_place():
    """`prepare` returns the same module, its convolutions channels-last, its values unchanged."""
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    assert tk.Device("cpu", "fp32").prepare(model) is model
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_batches_keep_order_and_number(count):
    """Every batch comes once and in order, none of an empty loader."""
    loader = [(torch.full((2,), index), index) for index in range(count)]
    batches = list(tk.Device("cpu").batches(loader))
    assert [(images.tolist(), number) for images, number in batches] == [([i, i], i) for i in range(count)]


def test_batches_move_tensors_and_lists_and_pass_the_rest(monkeypatch):
    """Tensors, also those in lists, go to the device; everything else comes as it is."""
    device = tk.Device("cpu")
    monkeypatch.setattr(device, "torch_device", torch.device("meta"))
    places, name = (1, 2), object()
    batch = next(device.batches([(torch.ones(2), [torch.ones(1), "a", [torch.ones(3)]], places, name, None)]))
    assert batch[0].device.type == batch[1][0].device.type == batch[1][2][0].device.type == "meta"
    assert batch[1][1] == "a"
    assert batch[2] is places
    assert batch[3] is name
    assert batch[4] is None


def test_batches_read_one_ahead():
    """The next batch is read before the current one is handed out."""
    read = []
    batches = tk.Device("cpu").batches((read.append(index) or torch.ones(1),) for index in range(3))
    next(batches)
    assert read == [0, 1]


def test_backward_adds_gradients_up():
    """`backward` adds to the gradients that are there, and `update` uses them up."""
    device = tk.Device("cpu", "fp32")
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    device.backward(parameter.sum() * 2)
    device.backward(parameter.sum() * 3)
    assert parameter.grad.item() == 5.0
    device.update(optimizer)
    assert parameter.grad is None
    assert parameter.item() == 1.0 - 0.5 * 5.0


@pytest.mark.parametrize(("gradient", "applied"), [(3.0, 1.0), (0.5, 0.5)])
def test_clipping_limits_the_gradient(gradient, applied):
    """A gradient above the limit is cut to it, one below is left."""
    device = tk.Device("cpu", "fp32")
    parameter = nn.Parameter(torch.zeros(1))
    device.step(parameter.sum() * gradient, torch.optim.SGD([parameter], lr=1.0), clip_grad_norm=1.0)
    assert parameter.item() == pytest.approx(-applied, rel=1e-5)


def test_clipping_limits_all_groups_together():
    """The limit applies to the norm over all groups of parameters at once."""
    device = tk.Device("cpu", "fp32")
    one, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [other]}], lr=1.0)
    device.step(one.sum() * 3 + other.sum() * 4, optimizer, clip_grad_norm=1.0)
    assert (one.item(), other.item()) == (pytest.approx(-0.6, rel=1e-5), pytest.approx(-0.8, rel=1e-5))


# ---- gradient scaling


def make_optimizer(name: str, parameter: nn.Parameter) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam([parameter], lr=0.1, fused=True)
    return torch.optim.SGD([parameter], lr=0.1, fused=name == "fused sgd")


@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["sgd", "fused sgd", "adam"])
def test_overflow_skips_the_update_and_lowers_the_scale(half_device, name, clip_grad_norm):
    """A gradient that overflows under the scale changes no weight, halves the scale and is cleared."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(name, parameter)
    scale = half_device.scaler.get_scale()
    half_device.step(parameter.sum() * 1e38, optimizer, clip_grad_norm=clip_grad_norm)
    assert parameter.item() == 1.0
    assert half_device.scaler.get_scale() == scale / 2
    assert parameter.grad is None


@pytest.mark.parametrize("name", ["sgd", "fused sgd"])
def test_scaled_gradient_is_unscaled_before_the_update(half_device, name):
    """An ordinary gradient is applied as if there were no scale."""
    parameter = nn.Parameter(torch.ones(1))
    half_device.step(parameter.sum() * 2, make_optimizer(name, parameter))
    assert parameter.item() == pytest.approx(1.0 - 0.1 * 2)


@pytest.mark.parametrize(("gradient", "applied"), [(3.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("name", ["sgd", "fused sgd"])
def test_clipping_applies_to_unscaled_gradients(half_device, name, gradient, applied):
    """The limit is one on the true gradients, not on those multiplied by the scale."""
    parameter = nn.Parameter(torch.zeros(1))
    half_device.step(parameter.sum() * gradient, make_optimizer(name, parameter), clip_grad_norm=1.0)
    assert parameter.item() == pytest.approx(-0.1 * applied, rel=1e-5)


def test_gradients_below_fp16_survive(half_device):
    """A gradient that fp16 would round to zero arrives, thanks to the scale."""
    parameter = nn.Parameter(torch.ones(1))
    half_device.step(parameter.half().sum().float() * 1e-9, torch.optim.SGD([parameter], lr=1.0e9))
    assert parameter.item() < 0.5


def test_without_fp16_there_is_no_scaling():
    """In fp32 and bf16 the scaler does nothing."""
    assert not tk.Device("cpu", "fp32").scaler.is_enabled()
    assert not tk.Device("cpu", "bf16").scaler.is_enabled()


def test_fp16_training_goes_on_after_overflow(half_device, model, data):
    """`Trainer` in fp16 skips the first steps that overflow, then learns, with clipping and micro-batches."""
    half_device.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    trainer = tk.Trainer(model, device=half_device, lr=1e-2, clip_grad_norm=1.0)
    trainer.micro_batch_size = 3
    before = model.head.logits.weight.clone()
    next(trainer.steps(data, batch_size=8))
    assert torch.equal(model.head.logits.weight, before)
    half_device.scaler.update(1024.0)
    history = trainer.fit(data, epochs=8, batch_size=8, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0] / 2


# ---- memory


def test_memory_is_within_the_total():
    """There is some memory free, and not more than there is."""
    memory = tk.Device("cpu").memory()
    assert 2**20 < memory["free"] <= memory["total"]


def test_memory_of_another_device_is_refused(monkeypatch):
    """Where the system does not tell, that is what the message says."""
    device = tk.Device("cpu")
    monkeypatch.setattr(device, "torch_device", torch.device("mps"))
    with pytest.raises(DeviceError, match=r"free memory of mps is unknown: expected CUDA, or a CPU under Linux"):
        device.memory()


# ---- CUDA


@pytest.mark.gpu
def test_cuda_is_found_with_its_index():
    """ "auto" takes CUDA where there is one, and names its index."""
    assert tk.Device().torch_device == tk.Device("cuda").torch_device == torch.device("cuda", 0)


@pytest.mark.gpu
def test_module_and_batches_are_on_cuda():
    """`prepare`, `move` and `batches` put everything on the GPU, in order and with the same values."""
    device = tk.Device("cuda", "fp32")
    assert device.prepare(small_net())[0].weight.is_cuda
    expected = list(small_loader())
    moved = list(device.batches(small_loader()))
    assert all(images.is_cuda and targets.is_cuda for images, targets in moved)
    for (images, targets), (other_images, other_targets) in zip(moved, expected, strict=True):
        assert torch.equal(images.cpu(), other_images)
        assert torch.equal(targets.cpu(), other_targets)
    assert device.move([torch.ones(1), "a"])[0].is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_cuda_autocast_runs_in_the_short_format(precision, dtype):
    """Products on CUDA come out in the short format; fp16 has an enabled scaler."""
    device = tk.Device("cuda", precision)
    layer = device.prepare(nn.Linear(8, 8))
    with device.autocast():
        output = layer(torch.ones(4, 8, device=device.torch_device))
    assert output.dtype == dtype
    assert device.scaler.is_enabled() == (precision == "fp16")


@pytest.mark.gpu
def test_cuda_overflow_is_skipped():
    """On CUDA a gradient that overflows changes nothing and halves the scale, with clipping and a fused optimizer."""
    device = tk.Device("cuda", "fp16")
    parameter = nn.Parameter(torch.ones(1, device=device.torch_device))
    optimizer = torch.optim.Adam([parameter], lr=0.1, fused=True)
    loss = parameter.sum() * 1e38
    scale = device.scaler.scale(torch.ones(1, device=device.torch_device)).item()
    device.step(loss, optimizer, clip_grad_norm=1.0)
    assert parameter.item() == 1.0
    assert device.scaler.get_scale() == scale / 2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_fit_is_roughly_that_of_the_cpu(make_backbone, data, precision):
    """`fit` on CUDA gives roughly the losses of `fit` on the CPU (2 % in fp32 with TF32, 10 % in the short formats)."""
    losses = []
    for device in (tk.Device("cpu", "fp32"), tk.Device("cuda", precision)):
        torch.manual_seed(1)
        model = tk.attach_head(make_backbone(), ["cat", "dog", "owl"])
        trainer = tk.Trainer(model, device=device, lr=1e-3)
        losses.append(trainer.fit(data, epochs=3, batch_size=8, augment="flip", verbose=0).history["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if precision == "fp32" else 0.1)


@pytest.mark.gpu
def test_cuda_memory_is_within_the_total():
    """CUDA's memory is reported in bytes."""
    memory = tk.Device("cuda").memory()
    assert 0 < memory["free"] <= memory["total"]
