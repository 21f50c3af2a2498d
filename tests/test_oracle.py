"""The trainer against a plain PyTorch loop: the same weights, bit for bit where the arithmetic is the same."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk
from tiny import CLASSES

EPOCHS, BATCHES = 4, 5  # 20 steps; 106 images in batches of 24 leave 10 for the last


def plain_loop(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    frozen: int,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    criterion: nn.Module,
    clip_grad_norm: float | None = None,
) -> None:
    model.to(memory_format=torch.channels_last)
    for parameter in model.backbone.features[:frozen].parameters():
        parameter.requires_grad_(False)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(EPOCHS):
        model.train()
        model.backbone.features[:frozen].eval()
        for images, targets in loader:
            optimizer.zero_grad()
            loss = criterion(model(images), targets)
            loss.backward()
            if clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
            optimizer.step()


def make_loader(backbone: tk.Backbone) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (106, 3, 32, 32), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 3, (106,), generator=generator)
    dataset = TensorDataset(backbone.preprocess(images), targets)
    return DataLoader(dataset, batch_size=24, shuffle=True, generator=torch.Generator().manual_seed(2))


def fused_adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def fused_sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-2, fused=True)


def both_trained(
    backbone: tk.Backbone,
    *,
    boundary: str | None = None,
    make_optimizer: Callable[..., torch.optim.Optimizer] = fused_adam,
    criterion: nn.Module | None = None,
    clip_grad_norm: float | None = None,
    **arguments: object,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights after the plain loop and after `Trainer.fit`, from the same start on the same batches."""
    model = tk.attach_head(backbone, CLASSES, hidden=(16,), pooling="flatten")
    plain = copy.deepcopy(model)
    names = backbone.layer_names
    frozen = {None: 0, "block3": names.index("block3_conv1"), "head": len(names)}[boundary]
    plain_loop(
        plain,
        make_loader(backbone),
        frozen=frozen,
        make_optimizer=make_optimizer,
        criterion=criterion or nn.CrossEntropyLoss(),
        clip_grad_norm=clip_grad_norm,
    )
    trainer = tk.Trainer(
        tk.freeze_until(model, boundary),
        precision="fp32",
        device="cpu",
        lr=1e-3,
        schedule="constant",
        clip_grad_norm=clip_grad_norm,
        **arguments,
    )
    trainer.fit(make_loader(backbone), epochs=EPOCHS, verbose=0)
    assert trainer.global_step == EPOCHS * BATCHES
    return plain.state_dict(), model.state_dict()


def assert_bit_equal(plain: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
    different = [name for name, value in plain.items() if not torch.equal(value, trained[name])]
    assert not different


@pytest.mark.parametrize("boundary", [None, "block3", "head"])
def test_adam_gives_the_weights_of_a_plain_loop(backbone, boundary):
    """20 steps of Adam give, bit for bit, the weights of a plain loop, whatever is frozen."""
    assert_bit_equal(*both_trained(backbone, boundary=boundary))


@pytest.mark.parametrize("boundary", [None, "block3", "head"])
def test_batch_norm_gives_the_weights_and_statistics_of_a_plain_loop(make_backbone, boundary):
    """With batch norm too, statistics and all, frozen blocks being in eval mode."""
    assert_bit_equal(*both_trained(make_backbone(batch_norm=True), boundary=boundary))


@pytest.mark.parametrize("boundary", [None, "block3", "head"])
def test_sgd_gives_the_weights_of_a_plain_loop(backbone, boundary):
    """20 steps of SGD with momentum and weight decay give, bit for bit, the weights of a plain loop."""
    plain, trained = both_trained(
        backbone, boundary=boundary, make_optimizer=fused_sgd, optimizer="sgd", weight_decay=1e-2
    )
    assert_bit_equal(plain, trained)


@pytest.mark.parametrize("boundary", [None, "block3"])
def test_clipping_gives_the_weights_of_a_plain_loop(backbone, boundary):
    """`clip_grad_norm` gives, bit for bit, what `torch.nn.utils.clip_grad_norm_` before each step gives."""
    plain, trained = both_trained(
        backbone, boundary=boundary, make_optimizer=fused_sgd, optimizer="sgd", weight_decay=1e-2, clip_grad_norm=0.01
    )
    assert_bit_equal(plain, trained)


@pytest.mark.parametrize(
    ("criterion", "arguments"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), {"loss": tk.CrossEntropy(label_smoothing=0.1)}),
        (
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0])),
            {"loss": tk.CrossEntropy(class_weights=[1.0, 2.0, 5.0])},
        ),
        (
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]), label_smoothing=0.1),
            {"loss": tk.CrossEntropy(label_smoothing=0.1, class_weights=[1.0, 2.0, 5.0])},
        ),
    ],
    ids=["label smoothing", "class weights", "both"],
)
def test_smoothing_and_class_weights_give_the_weights_of_a_plain_loop(backbone, criterion, arguments):
    """Label smoothing and class weights mean what they mean in `nn.CrossEntropyLoss`.

    Not bit for bit: the trainer divides a sum where torch divides each term, so that a batch can be split.
    """
    plain, trained = both_trained(
        backbone, make_optimizer=fused_sgd, optimizer="sgd", weight_decay=1e-2, criterion=criterion, **arguments
    )
    for name, value in plain.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: name + text)


def test_the_plain_loop_would_show_a_difference(backbone):
    """The comparison can fail: another learning rate by one part in a thousand gives other weights."""
    plain, trained = both_trained(backbone, make_optimizer=lambda p: torch.optim.Adam(p, lr=1.001e-3, fused=True))
    assert not torch.equal(plain["head.logits.weight"], trained["head.logits.weight"])
