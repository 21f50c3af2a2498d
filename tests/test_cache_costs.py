"""How much is computed, read and hashed: what is known costs nothing, what is new costs itself alone."""

import hashlib
import zlib

import pytest
import torch
from torch.utils.data import Dataset

import transferkit as tk
from cached import assert_same_run, changed, fit, make_model, make_trainer, total, weights_of


@pytest.fixture
def many():
    """500 images and their targets."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(500) % 3


@pytest.fixture(params=["memory", "files", "files of another trainer"])
def refit(request, make_backbone, many, tmp_path, images_seen):
    """Train on many images, then on others, with features in memory or in files; return how many were computed."""
    folder = None if request.param == "memory" else tmp_path

    def run(others):
        trainer = make_trainer(make_model(make_backbone), folder=folder)
        fit(trainer, many, batch_size=50)
        assert total(images_seen) == len(many[0])
        images_seen.clear()
        again = make_trainer(make_model(make_backbone), folder=folder)
        if request.param == "files of another trainer":
            trainer = again
        else:
            again.model.load_state_dict(trainer.model.state_dict())
        fit(trainer, others, batch_size=50)
        computed = total(images_seen)
        plain = make_trainer(make_model(make_backbone), cache=False)
        if trainer is not again:
            fit(plain, many, batch_size=50)
        fit(plain, others, batch_size=50)
        assert changed(weights_of(plain.model), trainer.model) == set()
        return computed

    return run


def test_ten_new_images_cost_ten(refit, many):
    """Ten images added to many, wherever they lie, are the only ones computed."""
    new = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    order = torch.randperm(510)
    assert refit((torch.cat([many[0], new])[order], torch.arange(510) % 3)) == 10


def test_another_order_costs_nothing(refit, many):
    """The same images in another order, with other targets, are known."""
    order = torch.randperm(500)
    assert refit((many[0][order], many[1])) == 0


def test_half_of_the_images_cost_nothing(refit, many):
    """A run uses a part of what was cached for another."""
    assert refit((many[0][::2], many[1][::2])) == 0


def test_the_same_image_twice_is_computed_once(refit, many):
    """Images that occur several times in a data set share their features."""
    new = 255 - many[0][:1]
    assert refit((torch.cat([new, many[0][:30], new]), torch.arange(32) % 3)) == 1


def test_every_image_is_computed_once(make_backbone, data, images_seen):
    """Over many epochs each training and validation image goes through the prefix once."""
    fit(make_trainer(make_model(make_backbone, "block3")), data, validation_data=(255 - data[0], data[1]), epochs=6)
    assert total(images_seen) == 24 + 24


class Counted(Dataset):
    """Images that count how often they are read."""

    def __init__(self, data):
        self.data = data
        self.reads = [0] * len(data[0])

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.data[0][index], int(self.data[1][index])


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "files"])
def test_each_fit_reads_an_image_once(make_backbone, many, tmp_path, in_folder):
    """Finding out what is known and computing the rest take one reading; looks for randomness come on top."""
    trainer = make_trainer(make_model(make_backbone), folder=tmp_path if in_folder else None)
    for _ in range(2):
        dataset = Counted(many)
        fit(trainer, dataset)
        assert sorted(dataset.reads)[: 500 - 21] == [1] * (500 - 21)


def test_without_the_cache_every_epoch_computes(make_backbone, data, images_seen):
    """With `cache=False` every image is computed in each epoch and where the head is measured; nothing is cached."""
    trainer = make_trainer(make_model(make_backbone), cache=False)
    fit(trainer, data, validation_data=data, epochs=3)
    assert total(images_seen) == 24 + 3 * (24 + 24)
    assert trainer.training.features.chunks == []


@pytest.mark.parametrize(("cache", "hashes"), [(False, False), ("auto", True)])
def test_without_the_cache_nothing_is_hashed(make_backbone, data, monkeypatch, cache, hashes):
    """`cache=False` takes no digest or checksum of a weight or an image; with the cache, both are taken."""
    trainer = make_trainer(make_model(make_backbone), cache=cache)
    hashed = []
    sha256, crc32 = hashlib.sha256, zlib.crc32

    class Counting:
        def __init__(self, content=b""):
            self.hash = sha256()
            self.update(content)

        def update(self, content):
            hashed.append(memoryview(content).nbytes)
            self.hash.update(content)

        def copy(self):
            other = Counting()
            other.hash = self.hash.copy()
            return other

        def __getattr__(self, name):
            return getattr(self.hash, name)

    monkeypatch.setattr(hashlib, "sha256", Counting)
    monkeypatch.setattr(zlib, "crc32", lambda content: hashed.append(len(content)) or crc32(content))
    fit(trainer, data, validation_data=data)
    images, weights = data[0].numel(), sum(p.numel() * 4 for p in trainer.model.backbone.parameters())
    assert (sum(hashed) > images + 2 * weights) == hashes
    assert (sum(hashed) < 1000) != hashes  # seeds of the epochs and steps


# ---- the boundary moves


def test_a_deeper_boundary_runs_the_layers_between(make_backbone, data, images_seen):
    """After the boundary moved deeper only the layers in between run, and the run is that of a new trainer."""
    trainers = [make_trainer(make_model(make_backbone, "block3"), cache=mode) for mode in ("auto", False)]
    assert_same_run(trainers, data)
    for trainer in trainers:
        tk.freeze_until(trainer.model, "head")
    images_seen.clear()
    fit(trainers[0], data)
    assert images_seen == [(24, 6)]
    fit(trainers[1], data)
    assert changed(weights_of(trainers[0].model), trainers[1].model) == set()


def test_a_shallower_boundary_starts_from_the_images(make_backbone, data, images_seen):
    """After the boundary moved back every image is computed again, from its pixels."""
    trainers = [make_trainer(make_model(make_backbone, "head"), cache=mode) for mode in ("auto", False)]
    assert_same_run(trainers, data)
    for trainer in trainers:
        tk.freeze_until(trainer.model, "block3")
    images_seen.clear()
    fit(trainers[0], data)
    assert images_seen == [(24, 0)]
    fit(trainers[1], data)
    assert changed(weights_of(trainers[0].model), trainers[1].model) == set()


def test_each_image_starts_from_the_deepest_features_it_has(make_backbone, data, images_seen):
    """Of images known behind different numbers of layers, each is carried on from where it is known."""
    trainer = make_trainer(make_model(make_backbone, "block2"))
    for boundary, count in (("block2", 18), ("block4", 12), ("head", 6)):
        tk.freeze_until(trainer.model, boundary)
        fit(trainer, (data[0][:count], data[1][:count]))
    images_seen.clear()
    fit(trainer, data)
    assert sorted(images_seen, key=lambda seen: seen[1]) == [(6, 0), (6, 3), (6, 9)]
