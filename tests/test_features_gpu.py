"""Kept features on a GPU. Not run where there is none."""

import copy

import pytest
import torch

import transferkit as tk
from transferkit.features.cache import FeatureCache

pytestmark = pytest.mark.gpu


def trained(model, data, **arguments):
    copied = tk.freeze_until(copy.deepcopy(model), "head")
    trainer = tk.Trainer(copied, lr=1e-2, device="cuda", **arguments)
    trainer.fit(data, validation_data=data, epochs=3, batch_size=7, verbose=0)
    return trainer


def test_features_lie_on_the_gpu_and_train_as_without_the_cache(model, data):
    """What fits in a share of the GPU's free memory stays there; the weights are those of an uncached run."""
    cached, uncached = trained(model, data), trained(model, data, cache=False)
    assert all(kept.features.is_cuda for kept in cached._features._kept)
    for name, value in cached.model.state_dict().items():
        torch.testing.assert_close(value, uncached.model.state_dict()[name], rtol=1e-2, atol=1e-3)


def test_features_that_do_not_fit_there_lie_in_pinned_memory(model, data, monkeypatch):
    """Batches then cross from pinned host memory, with the same weights as from the GPU."""
    resident = trained(model, data)
    room = FeatureCache._room
    monkeypatch.setattr(FeatureCache, "_room", lambda self, place: 0 if place.type == "cuda" else room(self, place))
    pinned = trained(model, data)
    assert all(kept.features.is_pinned() for kept in pinned._features._kept)
    for name, value in pinned.model.state_dict().items():
        assert torch.equal(value, resident.model.state_dict()[name])


def test_a_file_is_copied_to_the_gpu(model, data, tmp_path):
    """A second trainer finds the features in the folder and has them on the GPU."""
    first = trained(model, data, cache=tmp_path)
    second = trained(model, data, cache=tmp_path)
    assert all(kept.features.is_cuda for kept in second._features._kept)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


def test_compiled_training(model, data):
    """`torch_compile` trains to the weights of a run without it, within the format's rounding."""
    compiled, plain = trained(model, data, torch_compile=True), trained(model, data)
    for name, value in compiled.model.state_dict().items():
        torch.testing.assert_close(value, plain.model.state_dict()[name], rtol=1e-2, atol=1e-3)
