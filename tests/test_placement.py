"""Where tensors lie on a GPU, and that the host does not wait for it: on torch's fake tensors, which need no GPU.

Backward passes and autocast need a real one: see `make gpu`.
"""

from collections.abc import Iterator

import pytest
import torch
from tests.tiny import CLASSES, make_backbone, make_model
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

import transferkit as tk
from transferkit.compute.device import step_where
from transferkit.training.loss import BinaryCrossEntropy, CrossEntropy, Loss
from transferkit.training.metrics import Sums, count_correct
from transferkit.training.step import evaluation_step

CARD = torch.device("cuda", 0)
LOSSES = ["cross-entropy", "class weights", "binary"]


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    """Tensors without numbers: the host cannot read one, and no operation takes tensors of two devices."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.fixture
def card() -> tk.Device:
    device = tk.Device("cpu", precision="fp32")
    device.torch_device = CARD
    return device


def model_on_card(boundary: str | None) -> tk.TransferModel:
    with unset_fake_temporarily():
        model = make_model(make_backbone(batch_norm=True), boundary, hidden=(8,), dropout=0.5)
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                placed = torch.empty(value.shape, device=CARD)
                module._parameters[name] = nn.Parameter(placed, requires_grad=value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CARD)
    return model


def batch(loss: str) -> tuple[torch.Tensor, torch.Tensor, Loss]:
    """Return images, targets and the loss, as they are on the card."""
    images = torch.empty(4, 3, 32, 32, device=CARD)
    if loss == "binary":
        return images, torch.empty(4, len(CLASSES), device=CARD), BinaryCrossEntropy()
    weights = torch.empty(len(CLASSES), device=CARD) if loss == "class weights" else None
    targets = torch.empty(4, dtype=torch.int64, device=CARD)
    return images, targets, CrossEntropy(class_weights=weights, label_smoothing=0.1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("boundary", ["head", "block5", None])
def test_forward_pass_and_loss_stay_on_the_card(card: tk.Device, boundary: str | None, loss: str) -> None:
    """Network, loss and running sums are computed on the card, and the host never waits for a number."""
    images, targets, kind = batch(loss)
    frozen, rest = model_on_card(boundary).train().split()
    with card.autocast():
        logits = rest(frozen(images))
    total = kind.sum(logits, targets) / kind.total_weight(targets)
    sums = Sums(CARD)
    correct = count_correct(logits, targets, 0.5 if loss == "binary" else None)
    sums.add(total.detach(), correct, len(images), logits=logits, targets=targets)
    assert (logits.device, total.device, logits.shape) == (CARD, CARD, (4, 3))


def test_evaluation_stays_on_the_card(card: tk.Device) -> None:
    """Logits of an evaluation step lie on the card, and the host never waits for a number."""
    logits = evaluation_step(model_on_card("head").eval(), torch.empty(4, 3, 32, 32, device=CARD), device=card)
    assert (logits.device, logits.dtype) == (CARD, torch.float32)


def test_a_batch_left_on_the_host_is_noticed(card: tk.Device) -> None:
    """The check itself can fail: images on the host do not pass through a network on the card."""
    with pytest.raises(RuntimeError, match=r"[dD]evice"):
        evaluation_step(model_on_card("head").eval(), torch.empty(4, 3, 32, 32), device=card)


def test_a_number_read_on_the_host_is_noticed() -> None:
    """The check itself can fail: an optimizer that is not fused must be told by the host whether to make its step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.empty(2, device=CARD))], fused=False)
    with pytest.raises(DataDependentOutputException):
        step_where(torch.empty((), dtype=torch.bool, device=CARD), optimizer)
