"""Activation checkpointing changes memory and time, and no number."""

import gc

import pytest
import torch
from torch import nn

import transferkit as tk
from transferkit.errors import ArgumentError
from transferkit.model.recompute import Recomputed


def trained(make_backbone, data, *, layer, **arguments):
    torch.manual_seed(1)
    model = tk.attach_head(make_backbone(), ["cat", "dog", "owl"], hidden=(16,), dropout=0.5)
    tk.freeze_until(model, layer)
    trainer = tk.Trainer(model, lr=1e-2, device="cpu", **arguments)
    trainer.fit(data, epochs=2, batch_size=7, verbose=0)
    return model.state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layer", [None, "block3", "block5", "head"])
def test_training_gives_the_same_weights(make_backbone, data, layer, precision):
    """With activations recomputed or kept, dropout included, every weight is the same bit for bit."""
    kept = trained(make_backbone, data, layer=layer, precision=precision)
    recomputed = trained(make_backbone, data, layer=layer, precision=precision, recompute_activations=True)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def saved_elements(network, images):
    """How many numbers autograd keeps for the backward pass."""
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = network(images)
    held = sum(saved.values())
    del logits
    gc.collect()
    return held


def test_fewer_activations_are_kept(model):
    """Between the poolings nothing is kept for the backward pass."""
    images = torch.randn(4, 3, 32, 32)
    parameters = sum(p.numel() for p in model.parameters())
    assert saved_elements(Recomputed(model), images) < (saved_elements(model, images) - parameters) / 2


def test_batch_norm_that_trains_is_refused_before_anything_runs(make_backbone, data):
    """Its statistics would move twice in a step; the message names the layer and what to do."""
    model = tk.attach_head(make_backbone(batch_norm=True), ["cat", "dog", "owl"])
    trainer = tk.Trainer(model, device="cpu", recompute_activations=True)
    with pytest.raises(ArgumentError, match=r"features\.1\).*micro_batch_size"):
        trainer.fit(data, verbose=0)
    assert trainer.global_step == 0


def test_frozen_batch_norm_is_allowed(make_backbone, data):
    """Frozen, its statistics do not move at all."""
    model = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), ["cat", "dog", "owl"]), "head")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tk.Trainer(model, device="cpu", recompute_activations=True).fit(data, verbose=0)
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_head_of_ones_own_without_poolings(make_backbone, data):
    """A suffix without any pooling runs as it is."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    model = tk.freeze_until(tk.attach_head(make_backbone(), ["cat", "dog", "owl"], head=head), "head")
    history = tk.Trainer(model, device="cpu", recompute_activations=True).fit(data, verbose=0)
    assert len(history.reports) == 1
