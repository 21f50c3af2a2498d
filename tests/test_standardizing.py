"""The head's features are standardized by the training images, which are measured once, before the first step."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn

import transferkit as tk
from tiny import STANDARDIZE, changed, make_images, make_model, make_trainer, weights_of
from transferkit.data.sources import epoch_order
from transferkit.errors import NonFiniteError

KINDS = range(8, 72, 8)
"""Where the maxima of blocks 3, 4 and 5 and the means of blocks 4 and 5 begin."""


def statistics(model):
    layer = model.head.standardize
    return layer.mean, layer.std, int(layer.num_images)


def pooled(model, images):
    """Return what the head's pools make of images, in float64."""
    with torch.no_grad():
        features = model.backbone(model.backbone.preprocess(images), model.pools)
    return features.flatten(1).double().numpy()


def assert_statistics(model, features, count):
    mean, std, num_images = statistics(model)
    assert num_images == count
    np.testing.assert_allclose(mean.numpy(), features.mean(axis=0), rtol=1e-4, atol=1e-6)
    for own, deviations in zip(np.split(std.numpy(), KINDS), np.split(features.std(axis=0), KINDS), strict=True):
        median = np.quantile(deviations[deviations > 0], 0.5, method="lower")
        np.testing.assert_allclose(own, np.maximum(deviations, median), rtol=1e-3)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("count", [24, 2060])
def test_statistics_are_those_of_the_first_training_images(backbone, cache, count):
    """Mean and std are numpy's over the first epoch's first 2,048 images, from cached features or not."""
    images, targets = make_images(count)
    trainer = make_trainer(make_model(backbone, "head"), cache=cache)
    trainer.steps((images, targets), batch_size=100)
    first = images[epoch_order(count, 0, 0)[:2048]]
    assert_statistics(trainer.model, pooled(trainer.model.eval(), first), min(count, 2048))


def test_an_image_more_would_be_seen(backbone):
    """The comparison can fail: without the last of the images the statistics are others."""
    trainer = make_trainer(make_model(backbone, "head"))
    trainer.steps(make_images(24), batch_size=8)
    with pytest.raises(AssertionError):
        assert_statistics(trainer.model, pooled(trainer.model.eval(), make_images(24)[0][:-1]), 24)


def test_they_are_measured_once(backbone, data):
    """A second run on other images keeps the statistics of the first."""
    trainer = make_trainer(make_model(backbone, "head"))
    trainer.fit(data, epochs=1, batch_size=8, verbose=0)
    before = [value.clone() for value in statistics(trainer.model)[:2]]
    trainer.fit((255 - data[0], data[1]), epochs=2, batch_size=8, verbose=0)
    list(trainer.steps((255 - data[0], data[1])))
    assert all(map(torch.equal, statistics(trainer.model)[:2], before))


def test_validation_images_are_not_measured(backbone, data):
    """Held-out images, given or split off, have no part in the statistics."""
    plain, given = (make_trainer(make_model(backbone, "head")) for _ in range(2))
    plain.fit(data, epochs=1, verbose=0)
    given.fit(data, validation_data=(255 - data[0], data[1]), epochs=1, verbose=0)
    assert all(map(torch.equal, statistics(plain.model)[:2], statistics(given.model)[:2]))
    split = make_trainer(make_model(backbone, "head"))
    split.fit(data, validation_split=0.25, epochs=1, verbose=0)
    assert statistics(split.model)[2] == 18


def test_they_are_saved_loaded_and_not_measured_again(make_backbone, data, tmp_path):
    """A saved model has the statistics, and training it further on other images keeps them."""
    trainer = make_trainer(make_model(make_backbone(), "head"))
    trainer.fit(data, epochs=1, batch_size=8, verbose=0)
    trainer.save(tmp_path / "model.pt")
    loaded = tk.load_model(tmp_path / "model.pt", backbone=make_backbone(seed=3))
    other = make_trainer(make_model(make_backbone(seed=4), "head"))
    other.load(tmp_path / "model.pt")
    other.fit((255 - data[0], data[1]), epochs=1, batch_size=8, verbose=0)
    for model in (loaded, other.model):
        assert all(map(torch.equal, statistics(model)[:2], statistics(trainer.model)[:2]))
        assert statistics(model)[2] == 24


def test_a_resumed_run_keeps_them(make_backbone, data, tmp_path):
    """A resumed run takes the statistics of its checkpoint, and ends bit for bit as the whole one."""
    models = [make_model(make_backbone(), "head"), make_model(make_backbone(), "head", seed=9)]
    options = {"epochs": 2, "batch_size": 8, "augment": "flip", "verbose": 0}
    callbacks = [tk.Checkpoint(tmp_path / "run", every_steps=2, keep_last=9)]
    make_trainer(models[0]).fit(data, callbacks=callbacks, **options)
    make_trainer(models[1]).fit(data, resume_from=tmp_path / "run" / "step-00000002.pt", **options)
    assert changed(weights_of(models[0]), models[1]) == set()


def test_lr_find_leaves_no_trace(backbone, data):
    """The sweep standardises as training does, and leaves the head unmeasured."""
    trainer = make_trainer(make_model(backbone, "head"))
    before = weights_of(trainer.model)
    seen = []
    trainer.model.head.logits.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    trainer.lr_find(data, batch_size=24, num_steps=2, verbose=0)
    assert seen[-1].mean(dim=0).abs().max() < 1e-4
    assert changed(before, trainer.model) == set()
    assert statistics(trainer.model)[2] == 0


def test_a_constant_feature_is_divided_by_the_median_of_its_kind(backbone, data):
    """A channel that is 0 for every image stays 0, instead of NaN or a huge number."""
    model = make_model(backbone, "head")
    with torch.no_grad():
        model.backbone.features[12].weight[0] = 0
        model.backbone.features[12].bias[0] = 0.3
    trainer = make_trainer(model)
    trainer.fit(data, epochs=1, batch_size=8, verbose=0)
    mean, std, _ = statistics(model)
    constant = 3 * (8 + 8)  # behind the means and maxima of blocks 3 and 4
    for kind in std[constant:].split(8):
        assert kind[0] == kind.min() > 0
    assert mean[constant].item() == pytest.approx(0.3, rel=1e-6)
    assert bool(torch.isfinite(torch.from_numpy(trainer.predict_proba(data[0]))).all())


def test_the_global_generators_are_as_they_were(backbone, data):
    """Measuring, with dropout in the head and augmentation, draws from no global generator."""
    trainer = make_trainer(make_model(backbone, "head", hidden=(16,), dropout=0.5))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    trainer.steps(data, batch_size=8, augment="flip")
    assert statistics(trainer.model)[2] == 24
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_the_modes_are_as_they_were(backbone, data):
    """A layer that the user put into eval mode is in eval mode after measuring."""
    model = make_model(backbone, "head", hidden=(16,), dropout=0.5)
    model.head.dropout1.eval()
    modes = [module.training for module in model.modules()]
    make_trainer(model).steps(data, batch_size=8)
    assert [module.training for module in model.modules()] == modes


def test_batch_norm_that_trains_counts_no_measured_image(make_backbone, data):
    """Features are measured as steps will see them, normalised by each batch; running statistics stay as they were."""
    model = make_model(make_backbone(batch_norm=True), None)
    before = weights_of(model)
    make_trainer(model).steps(data, batch_size=8)
    assert changed(before, model) == set(STANDARDIZE)
    order = epoch_order(24, 0, 0)
    rows = np.concatenate([pooled(model.train(), data[0][places]) for places in order.split(8)])
    assert_statistics(model, rows, 24)


def test_images_that_are_not_finite_are_left_out(backbone, data):
    """An image of which the network makes NaN spoils its own step alone, not the statistics."""
    images = backbone.preprocess(data[0])
    images[5, 0, 0, 0] = float("nan")
    trainer = make_trainer(make_model(backbone, "head"), max_skipped=3)
    trainer.fit((images, data[1]), epochs=1, batch_size=4, verbose=0)
    mean, std, num_images = statistics(trainer.model)
    assert num_images == 23
    assert bool(torch.isfinite(torch.cat([mean, std])).all())
    assert trainer.history.reports[0].skipped == 1


def test_where_no_image_is_finite_the_first_step_says_where(backbone, data):
    """A network that makes NaN of every image is refused by the first step, which names the layer; nothing is set."""
    model = make_model(backbone, None)
    with torch.no_grad():
        model.backbone.features[3].bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 0 .*first in the output of backbone\.features\.3 "):
        make_trainer(model).fit(data, epochs=1, batch_size=8, verbose=0)
    assert statistics(model)[2] == 0


def test_a_signal_while_measuring_ends_the_run_with_a_checkpoint(backbone, data, tmp_path):
    """Ctrl-C between two measured batches is raised after the state before the first step was saved."""
    model = make_model(backbone, None)
    sent = []
    model.head.logits.register_forward_pre_hook(
        lambda *_: None if sent else sent.append(os.kill(os.getpid(), signal.SIGINT))
    )
    with pytest.raises(KeyboardInterrupt, match="stopped after step 0; saved to"):
        make_trainer(model).fit(data, epochs=1, batch_size=8, callbacks=[tk.Checkpoint(tmp_path)], verbose=0)
    assert statistics(model)[2] == 0
    resumed = make_trainer(make_model(backbone, None, seed=7))
    resumed.fit(data, epochs=1, batch_size=8, resume_from=tmp_path, verbose=0)
    assert statistics(resumed.model)[2] == 24


def test_a_head_of_ones_own_with_the_layer_is_measured_too(backbone, data):
    """Any `Standardize` in a head is measured, such as one behind a layer of the user's own."""
    layer = type(make_model(backbone).head.standardize)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer(8), nn.Linear(8, 3))
    model = tk.freeze_until(tk.attach_head(backbone, 3, head=head), "head")
    make_trainer(model).fit(data, epochs=1, batch_size=8, verbose=0)
    with torch.no_grad():
        rows = backbone(backbone.preprocess(data[0])).mean(dim=(2, 3)).double()
    torch.testing.assert_close(head[2].mean.double(), rows.mean(dim=0), rtol=1e-4, atol=1e-6)
    assert int(head[2].num_images) == 24
