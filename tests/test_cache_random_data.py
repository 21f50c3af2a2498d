"""Data that is not the same each time is never cached, however rarely it differs; data that changes is read again."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import tiny
import transferkit as tk
from transferkit.base.randomness import find_generators, next_numbers, seeded, state_of
from transferkit.data.resized import resized
from transferkit.errors import CacheError

COUNT = 120
RARE = (5, 11, 50)  # not among the 16 that are looked at before


class Sometimes(Dataset[tuple[Tensor, Any]]):
    """Images and targets of which a few are changed at random."""

    def __init__(self, change: Callable[[Tensor, int], tuple[Tensor, Any]], rng: object = None) -> None:
        self.images, self.targets = tiny.make_images(COUNT)
        self.change = change
        self.rng = rng

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, target = self.images[index], int(self.targets[index])
        return self.change(image, target) if index in RARE else (image, target)


def flipped_if(draw: Callable[[], float]) -> Callable[[Tensor, int], tuple[Tensor, int]]:
    return lambda image, target: (image.flip(-1) if draw() < 0.5 else image, target)


GLOBAL: dict[str, Callable[[Tensor, int], tuple[Tensor, Any]]] = {
    "torch": flipped_if(lambda: float(torch.rand(()))),
    "torch, normal": flipped_if(lambda: float(torch.randn(3)[0])),
    "numpy": flipped_if(np.random.rand),
    "numpy, normal": flipped_if(np.random.randn),
    "Python": flipped_if(random.random),
    "a target of torch's": lambda image, target: (image, (target + int(torch.randint(3, ()))) % 3),
    "a target of Python's": lambda image, target: (image, (target + random.randrange(3)) % 3),
}


def fitted(cache: bool | str, dataset: Dataset[Any], **arguments: Any) -> dict[str, Tensor]:
    trainer = tiny.make_trainer(tiny.make_model(tiny.make_backbone(), "head"), cache=cache)
    trainer.fit(dataset, **{"epochs": 2, "batch_size": 16, "verbose": 2, **arguments})
    return tiny.weights_of(trainer.model)


@pytest.mark.parametrize("change", GLOBAL)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_random_numbers_for_a_few_images_are_noticed(capsys, change, workers):
    """A run on data that draws for three images of 120 is the run without the cache, and a line says why."""
    runs = [fitted(cache, Sometimes(GLOBAL[change]), num_workers=workers) for cache in ("auto", False)]

    assert tiny.differences(*runs) == []
    assert "the data set drew random numbers for image 5, so its transform is random" in capsys.readouterr().out


_GENERATOR = np.random.default_rng(0)

OWN: dict[str, Callable[[], Dataset[Any]]] = {
    "numpy's Generator": lambda: _with_attribute(np.random.default_rng(0), lambda rng: rng.random()),
    "numpy's RandomState": lambda: _with_attribute(np.random.RandomState(0), lambda rng: rng.rand()),
    "Python's Random": lambda: _with_attribute(random.Random(0), lambda rng: rng.random()),
    "torch's Generator": lambda: _with_attribute(torch.Generator(), lambda rng: float(torch.rand((), generator=rng))),
    "a global of the module": lambda: Sometimes(flipped_if(lambda: _GENERATOR.random() + 0.0)),
    "a bound method": lambda: Sometimes(flipped_if(random.Random(0).random)),
}


def _with_attribute(rng: Any, draw: Callable[[Any], float]) -> Dataset[Any]:
    return Sometimes(flipped_if(lambda: draw(rng)), rng)


@pytest.mark.parametrize("own", OWN)
def test_a_generator_of_the_data_sets_own_is_noticed(capsys, own):
    """A generator that the data set holds, or that its functions refer to, is watched like the global ones."""
    fitted("auto", OWN[own]())
    assert "drew random numbers for image 5" in capsys.readouterr().out
    with pytest.raises(CacheError, match="drew random numbers for image 5"):
        fitted(True, OWN[own]())


def test_every_reader_of_data_once_notices():
    """cache_features, solve, probe and the resized images of a search: none takes a random image for a fixed one."""
    model = tiny.make_model(tiny.make_backbone(), "head")
    dataset = Sometimes(GLOBAL["torch"])
    with pytest.raises(CacheError, match="drew random numbers"):
        tk.cache_features(model, dataset, device="cpu", precision="fp32")
    with pytest.raises(CacheError, match="drew random numbers"):
        tiny.make_trainer(model).solve(dataset, verbose=0)
    with pytest.raises(CacheError, match="drew random numbers"):
        tk.probe(tiny.make_backbone(), dataset, classes=3, device="cpu", verbose=0)
    assert resized(dataset, model.classes, model.backbone.preprocess, device=tk.Device("cpu")) is None


def test_fixed_views_need_fixed_targets(capsys):
    """With n_views each image has one target: a data set whose targets are random is not cached."""
    noisy = Sometimes(GLOBAL["a target of torch's"])
    runs = [fitted(cache, noisy, n_views=3, epochs=3) for cache in ("auto", False)]

    assert tiny.differences(*runs) == []
    assert "not cached: the data set's targets change from view to view" in capsys.readouterr().out


def test_a_data_set_that_draws_nothing_is_cached(capsys):
    """Generators that are there and not used do no harm, the global ones included."""
    for rng in (np.random.default_rng(0), random.random, np.random.rand, torch.default_generator):
        fitted(True, Sometimes(lambda image, target: (image, target), rng))
        assert "features of 120 images: computed, cached" in capsys.readouterr().out


class Scheduled(Dataset[tuple[Tensor, int]]):
    """Images or targets that depend on an epoch which a callback counts, as samplers with `set_epoch` have it."""

    def __init__(self, what: str) -> None:
        self.images, self.targets = tiny.make_images(COUNT)
        self.what, self.epoch = what, 0

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.images[index], int(self.targets[index])
        return (image.roll(self.epoch, -1), target) if self.what == "images" else (image, (target + self.epoch) % 3)

    def __call__(self, *_: object) -> None:
        self.epoch += 1


@pytest.mark.parametrize("what", ["images", "targets"])
def test_data_that_a_callback_changes_is_read_again(what):
    """A callback that changes the data set between two epochs has the effect that it has without the cache."""
    runs = []
    for cache in (True, False):
        dataset = Scheduled(what)
        runs.append(fitted(cache, dataset, callbacks=[dataset]))
    assert tiny.differences(*runs) == []


def test_arrays_that_a_callback_writes_to_are_read_again():
    """The same for images in memory."""

    def fit(cache: bool) -> dict[str, Tensor]:
        images, targets = tiny.make_images(COUNT)
        return fitted(cache, (images, targets), callbacks=[lambda *_: images.bitwise_xor_(255) is None])

    assert tiny.differences(fit(True), fit(False)) == []


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), lambda: torch.randperm(3), random.random, np.random.rand])
def test_the_next_numbers_tell_of_any_draw(draw):
    """After any draw from a global generator its next number is another."""
    with seeded(3):
        first = next_numbers()
    with seeded(3):
        assert next_numbers() == first
    with seeded(3):
        draw()
        assert next_numbers() != first


def test_generators_are_found_where_they_are_held():
    """In attributes, containers, closures and globals of functions, and in objects that hold each other."""
    rngs = [random.Random(1), np.random.default_rng(1), np.random.RandomState(1), torch.Generator()]

    class Holder:
        def __init__(self, rng: object) -> None:
            self.rng = rng
            self.me = self

        def __getitem__(self, index: int) -> float:
            return _GENERATOR.random()

    root = [{"a": Holder(rngs[0])}, (rngs[1],), lambda: rngs[2], [[rngs[3]]]]
    found = find_generators(root)
    assert {id(rng) for rng in found} == {id(rng) for rng in [*rngs, _GENERATOR]}
    before = [*map(state_of, found)]
    assert [*map(state_of, found)] == before
    for rng in rngs[:3]:
        rng.random() if not isinstance(rng, np.random.RandomState) else rng.rand()
    torch.rand(1, generator=rngs[3])
    _GENERATOR.random()
    assert all(one != other for one, other in zip(map(state_of, found), before, strict=True))


def test_a_hook_for_all_modules_keeps_features_from_being_cached(capsys):
    """A hook that torch calls for each module would not be called for frozen layers that run once."""
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with pytest.raises(CacheError, match="has hooks or a forward of its own"):
            fitted(True, tiny.make_images())
        fitted("auto", tiny.make_images(), epochs=2)
    finally:
        handle.remove()
    assert "not cached" in capsys.readouterr().out
    assert seen.count(torch.nn.Conv2d) >= 5 * 2
