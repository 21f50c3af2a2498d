"""What is frozen keeps every bit, whatever happens; and each image is seen once in an epoch."""

import copy
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import transferkit as tk
from tiny import CLASSES, make_trainer
from transferkit.data.sources import ArraySource, count_batches, epoch_order
from transferkit.errors import HeadMismatchError, NonFiniteError, NothingToTrainError, UnknownLayerError

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Head(nn.Module):
    """Fails, for want of memory, on more images than `limit`, and gives a NaN gradient where `bad`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)
        )
        self.limit, self.bad, self.failures = 100, False, 0

    def forward(self, features):
        if self.training and len(features) > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        logits = self.layers(features)
        if self.bad and self.training:
            logits = logits * torch.where(logits.detach() > -torch.inf, torch.nan, 1.0)
        return logits


def make_model(make_backbone, boundary):
    """A network with batch norm in backbone and head, whose statistics are not those it is built with."""
    backbone = make_backbone(batch_norm=True)
    torch.manual_seed(1)
    model = tk.attach_head(backbone, CLASSES, head=Head()).train()
    model(torch.randn(8, 3, 32, 32))
    return tk.freeze_until(model, boundary)


def is_before(name, boundary):
    """Whether a weight or buffer lies before a boundary, by the numbers of torchvision's layers."""
    first = {"block2": 4, "block3": 8, "block5": 16, "head": 1000}[boundary]
    return name.startswith("backbone.features.") and int(name.split(".")[2]) < first


def split_state(model, boundary):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return tuple(
        {name: value for name, value in state.items() if is_before(name, boundary) is frozen}
        for frozen in (True, False)
    )


def assert_frozen_bits(model, before, boundary):
    """Every weight and buffer before the boundary is as it was, and all others are not."""
    frozen, trained = before
    live = model.state_dict()
    assert frozen
    assert [name for name, value in frozen.items() if not torch.equal(live[name], value)] == []
    assert [name for name, value in trained.items() if torch.equal(live[name], value)] == []


SGD = functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1, nesterov=True)
RUNS = {
    "sgd": {"optimizer": SGD},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.5, "precision": "bf16"},
    "adam": {"optimizer": "adam", "weight_decay": 0.1, "cache": False, "clip_grad_norm": 0.5, "micro_batch_size": 3},
    "rmsprop": {"optimizer": "rmsprop", "weight_decay": 0.1, "cache": False},
}


@pytest.mark.parametrize(
    ("run", "boundary"),
    [
        ("sgd", "block2"),
        ("sgd", "head"),
        ("adamw", "block5"),
        ("adamw", "head"),
        ("adam", "block2"),
        ("rmsprop", "head"),
    ],
)
def test_20_steps(make_backbone, data, run, boundary):
    """Momentum, weight decay, batch norm, clipping and parts leave frozen weights and statistics as they were."""
    model = make_model(make_backbone, boundary)
    before = split_state(model, boundary)
    trainer = make_trainer(model, **RUNS[run])
    trainer.fit(data, epochs=5, batch_size=6, verbose=0)
    assert trainer.global_step == 20
    assert_frozen_bits(model, before, boundary)


@pytest.mark.parametrize("boundary", ["block3", "head"])
def test_after_training_all_of_it(make_backbone, data, boundary):
    """Momentum and moments gathered while a layer trained do not move it once it is frozen."""
    model = make_model(make_backbone, None)
    trainer = tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2, optimizer=SGD)
    trainer.fit(data, epochs=2, batch_size=6, verbose=0)
    tk.freeze_until(model, boundary)
    before = split_state(model, boundary)
    trainer.fit(data, epochs=5, batch_size=6, verbose=0)
    assert_frozen_bits(model, before, boundary)


@pytest.mark.parametrize(
    ("set_to_none", "trained_before", "fused"),
    [(False, True, True), (False, True, False), (False, False, True), (True, True, False)],
)
def test_a_loop_of_ones_own(make_backbone, data, set_to_none, trained_before, fused):
    """A user's loop with `zero_grad(set_to_none=False)`, momentum and weight decay leaves what is frozen."""
    boundary = "block3"
    model = make_model(make_backbone, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1, fused=fused)
    images = model.backbone.preprocess(data[0])

    def step():
        model.train()
        functional.cross_entropy(model(images), data[1]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)

    if trained_before:
        step()
    tk.freeze_until(model, boundary)
    before = split_state(model, boundary)
    for _ in range(20):
        step()
    assert_frozen_bits(model, before, boundary)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_step_that_is_not_finite(make_backbone, data, cache, policy):
    """Left out or raised, a bad step leaves what is frozen, and the other steps train the rest."""
    model = make_model(make_backbone, "block5")
    before = split_state(model, "block5")
    trainer = tk.Trainer(
        model,
        device="cpu",
        precision="fp32",
        lr=1e-2,
        cache=cache,
        max_skipped=10 if policy == "skip" else 0,
        optimizer=SGD,
    )
    bad = [8] if policy == "skip" else [8, 9]  # the ninth pass looks for what was wrong in the eighth
    passes = []
    model.head.register_forward_pre_hook(
        lambda head, inputs: passes.append(1) or setattr(head, "bad", len(passes) in bad)
    )
    if policy == "skip":
        trainer.fit(data, epochs=5, batch_size=6, verbose=0)
        assert trainer.global_step == 19
    else:
        with pytest.raises(NonFiniteError, match="step 7 "):
            trainer.fit(data, epochs=5, batch_size=6, verbose=0)
    assert_frozen_bits(model, before, "block5")


@pytest.mark.parametrize("cache", [True, False])
def test_memory_that_does_not_suffice(make_backbone, data, cache):
    """Steps that are begun again in smaller parts leave what is frozen."""
    model = make_model(make_backbone, "block5")
    model.head.limit = 3
    before = split_state(model, "block5")
    trainer = tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2, cache=cache, optimizer=SGD)
    trainer.fit(data, epochs=5, batch_size=6, verbose=0)
    assert model.head.failures == 1
    assert trainer.micro_batch_size == 3
    assert_frozen_bits(model, before, "block5")


def test_a_run_that_is_interrupted_and_resumed(make_backbone, data, tmp_path):
    """Stopped in step 7 of 20 and gone on with in another trainer: frozen bits as at the start, others as unstopped."""
    models = [make_model(make_backbone, "block5") for _ in range(3)]
    before = split_state(models[0], "block5")
    trainers = [tk.Trainer(m, device="cpu", precision="fp32", lr=1e-2, optimizer=SGD) for m in models]
    whole, stopped, resumed = trainers

    def stop(head, inputs):
        if stopped.global_step == 7:
            raise KeyboardInterrupt

    models[1].head.register_forward_pre_hook(stop)
    run = {"epochs": 5, "batch_size": 6, "verbose": 0}
    whole.fit(data, **run)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(data, callbacks=[tk.Checkpoint(tmp_path, every_steps=1)], **run)
    for parameter in models[2].parameters():
        parameter.data.add_(1)
    resumed.fit(data, resume_from=tmp_path, **run)
    for model in models:
        assert_frozen_bits(model, before, "block5")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), models[2].state_dict().values(), strict=True)
    )


def test_two_heads_unknown_layers_and_nothing_to_train(make_backbone, data):
    """Each has its own error, with close matches for a name, before anything is changed."""
    model = make_model(make_backbone, "head")
    modes = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(HeadMismatchError, match=r"already has a head: pass model\.backbone"):
        tk.attach_head(model, CLASSES)
    with pytest.raises(UnknownLayerError, match="block5"):
        tk.freeze_until(model, "blok5")
    assert [parameter.requires_grad for parameter in model.parameters()] == modes
    model.requires_grad_(requires_grad=False)
    before = copy.deepcopy(model.state_dict())
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    for call in (trainer.fit, trainer.steps):
        with pytest.raises(NothingToTrainError, match=r"every parameter is frozen.*freeze_until\(model, 'head'\)"):
            call(data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- properties


@SETTINGS
@given(draw=st.data(), batch_norm=st.booleans(), whole_model=st.booleans(), earlier=st.booleans())
def test_all_before_the_boundary_is_frozen_and_all_after_trains(make_backbone, draw, batch_norm, whole_model, earlier):
    """For any layer's name, in a backbone or a model, after another boundary or not."""
    backbone = make_backbone(batch_norm=batch_norm)
    model = tk.attach_head(backbone, CLASSES, hidden=(4,), dropout=0.5) if whole_model else backbone
    prefix = "backbone." if whole_model else ""
    places = {f"{prefix}features.{index}": index for index in range(len(backbone.features))}
    starts = [index for index, layer in enumerate(backbone.features) if isinstance(layer, nn.Conv2d)]
    for block, start in enumerate(starts, start=1):
        places |= {f"block{block}": start, f"block{block}_conv1": start}
    end = len(backbone.features)
    places |= {"head": end} if whole_model else {}
    places[None] = 0
    if earlier:
        tk.freeze_until(model, draw.draw(st.sampled_from(list(places))))
    layer = draw.draw(st.sampled_from(list(places)))
    tk.freeze_until(model, layer)
    modes = draw.draw(st.lists(st.booleans(), max_size=3))
    for mode in [*modes, True]:
        model.train(mode)
    for index, module in enumerate(backbone.features):
        assert all(parameter.requires_grad is (index >= places[layer]) for parameter in module.parameters())
        assert module.training is (index >= places[layer])
    if whole_model:
        assert all(parameter.requires_grad for parameter in model.head.parameters())
        assert all(module.training for module in model.head.modules())


@SETTINGS
@given(
    number=st.integers(1, 300),
    batch_size=st.integers(1, 64),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50),
    draw=st.data(),
)
def test_each_image_is_visited_once(number, batch_size, seed, epoch, draw):
    """However many images, and wherever an epoch is stopped and gone on with, every image is read exactly once."""
    source = ArraySource(torch.zeros(number, 3, 1, 1, dtype=torch.uint8), None, None)
    num_batches = count_batches(source, batch_size)
    stop = draw.draw(st.integers(0, num_batches))
    order = epoch_order(number, seed, epoch)
    visited = []
    for part in (order[: stop * batch_size], epoch_order(number, seed, epoch)[stop * batch_size :]):
        batches = [places for _, _, places in source.batches(batch_size, seed=seed, order=part)] if len(part) else []
        assert all(len(places) == batch_size for places in batches[:-1])
        visited.append(batches)
    assert len(visited[0]) == stop
    assert len(visited[0]) + len(visited[1]) == num_batches
    assert sorted(place for batches in visited for places in batches for place in places) == list(range(number))
    if number > 20:
        assert not torch.equal(epoch_order(number, seed, epoch + 1), order)
        assert not torch.equal(epoch_order(number, seed + 1, epoch), order)
