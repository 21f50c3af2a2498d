"""Cached features on a GPU. Not run where there is none."""

import copy

import pytest
import torch

import transferkit as tk
from cached import make_trainer
from transferkit.features import cache as cache_module
from transferkit.features.cache import FeatureCache

pytestmark = pytest.mark.gpu


def trained(model, data, **arguments):
    copied = tk.freeze_until(copy.deepcopy(model), "head")
    trainer = make_trainer(copied, device="cuda", precision="auto", **arguments)
    trainer.fit(data, validation_data=data, epochs=3, batch_size=7, verbose=0)
    return trainer


def test_features_lie_on_the_gpu_and_train_as_without_the_cache(model, data):
    """What fits in a share of the GPU's free memory stays there; the weights are those of an uncached run."""
    cached, uncached = trained(model, data), trained(model, data, cache=False)
    assert all(chunk.features.is_cuda for chunk in cached.training.features.chunks)
    for name, value in cached.model.state_dict().items():
        torch.testing.assert_close(value, uncached.model.state_dict()[name], rtol=1e-2, atol=1e-3)


def test_features_that_do_not_fit_there_lie_in_pinned_memory(model, data, monkeypatch):
    """Batches then cross from pinned host memory, with the same weights as from the GPU."""
    resident = trained(model, data)
    room = FeatureCache._room
    monkeypatch.setattr(FeatureCache, "_room", lambda self, place: 0 if place.type == "cuda" else room(self, place))
    pinned = trained(model, data)
    assert all(chunk.features.is_pinned() for chunk in pinned.training.features.chunks)
    for name, value in pinned.model.state_dict().items():
        assert torch.equal(value, resident.model.state_dict()[name])


def test_files_are_copied_to_the_gpu(model, data, tmp_path, monkeypatch):
    """A second trainer finds the features in several files and has them in one tensor on the GPU."""
    monkeypatch.setattr(cache_module, "CHUNK_IMAGES", 8)
    monkeypatch.setattr("transferkit.features.prefix._PIXELS_ON_GPU", 4 * 32 * 32)
    first, second = (trained(model, data, folder=tmp_path) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 3
    assert [chunk.features.is_cuda for chunk in second.training.features.chunks] == [True]
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
