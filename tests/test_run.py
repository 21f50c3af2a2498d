"""What a call of `fit` checks before its first step."""

import pytest
import torch
from torch import Tensor, nn

import transferkit as tk
from transferkit.errors import ArgumentError


def with_batch_norm(backbone: tk.Backbone) -> tk.Trainer:
    head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    return tk.Trainer(tk.attach_head(backbone, 3, head=head), device="cpu", precision="fp32")


@pytest.mark.parametrize(("batch_size", "count"), [(1, 24), (23, 24), (22, 23), (2, 23)])
def test_a_batch_of_one_for_batch_norm_is_refused(
    backbone: tk.Backbone, data: tuple[Tensor, Tensor], batch_size: int, count: int
) -> None:
    """A batch size that leaves one image to a head with batch norm is refused at once, with one that serves."""
    images, targets = data[0][:count], data[1][:count]
    trainer = with_batch_norm(backbone)
    message = rf"batch_size={batch_size} leaves a batch of 1 image of {count}.*needs 2 or more"
    with pytest.raises(ArgumentError, match=message) as error:
        trainer.fit((images, targets), batch_size=batch_size, verbose=0, epochs=1)
    assert trainer.global_step == 0
    serves = int(str(error.value).rsplit("such as ", 1)[1].rstrip("."))
    trainer.fit((images, targets), batch_size=serves, verbose=0, epochs=1)


def test_a_batch_of_one_trains_without_batch_norm(model: tk.TransferModel, data: tuple[Tensor, Tensor]) -> None:
    """Elsewhere a last batch of one image is a batch like any other."""
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    counts = [step.count for step in trainer.steps(data, batch_size=23)]
    assert counts == [23, 1]


def test_frozen_batch_norm_takes_a_batch_of_one(backbone: tk.Backbone, data: tuple[Tensor, Tensor]) -> None:
    """Batch norm in the head that is frozen uses its statistics, and one image is enough."""
    trainer = with_batch_norm(backbone)
    tk.freeze_until(trainer.model, "head.2")
    before = trainer.model.head[1].running_mean.clone()
    trainer.fit(data, batch_size=23, verbose=0, epochs=1)
    assert torch.equal(trainer.model.head[1].running_mean, before)
