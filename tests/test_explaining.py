"""Where a model sees a class, and the training images most like an image."""

import numpy as np
import pytest
import torch
from torch import nn

import transferkit as tk
from tiny import CLASSES, make_backbone, make_images, make_model, make_trainer
from transferkit.errors import ArgumentError
from transferkit.explaining import activation_maps

HEADS = {
    "mean and maximum": {},
    "mean": {"pooling": "avg"},
    "maximum of one block": {"pooling": "max", "layers": ["block4"]},
    "flattened": {"pooling": "flatten"},
}


def solved(**head: object) -> tk.Trainer:
    trainer = make_trainer(make_model(make_backbone(), "head", **head))
    trainer.solve(make_images(60), verbose=0)
    return trainer


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_places_of_a_map_sum_to_the_logit(head):
    """A map sums to the logit, and with a linear head what does not lie in a place is the same for every image."""
    trainer = solved(**head)
    images, _ = make_images(12, seed=3)
    inputs = trainer.model.backbone.preprocess(images)
    with torch.no_grad():
        logits = trainer.model.eval()(inputs)
    for index in range(3):
        maps = activation_maps(trainer.model, inputs, torch.full((12,), index))
        torch.testing.assert_close(maps.sum(dim=(1, 2)), logits[:, index], rtol=1e-3, atol=1e-3)
        assert maps.flatten(1).std(dim=1).min() > 1e-4 or trainer.model.backbone.feature_shape == (8, 1, 1)


def test_with_hidden_layers_the_map_is_the_slope():
    """Where the head is not linear, a small change of an activation changes the logit by what the map says of it."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    model = make_model(make_backbone(), head=head).double().eval()
    inputs = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model.backbone(inputs)
        scaled = output * (1 + 1e-6)
        change = (model.head(scaled) - model.head(output))[:, 1] / 1e-6
        logits = model(inputs)[:, 1]
    maps = activation_maps(model, inputs, torch.tensor([1, 1])).double()
    torch.testing.assert_close(maps.sum(dim=(1, 2)), logits, rtol=1e-4, atol=1e-5)
    centred = output - output.mean(dim=(2, 3), keepdim=True)
    assert centred.abs().max() > 0
    assert not torch.allclose(change, logits, rtol=1e-2)  # the bias and the curve are no part of a place


def test_the_map_is_where_the_object_is():
    """An object in one quarter of the image changes the map of its class most in that quarter."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(90) % 3
    images = torch.randint(0, 60, (90, 3, 128, 128), dtype=torch.uint8, generator=generator)
    images[torch.arange(90), targets, 16:48, 80:112] += 180
    backbone = make_backbone()
    backbone.preprocess = backbone.preprocess.with_image_size(128)
    trainer = make_trainer(make_model(backbone, "head"))
    trainer.solve((images, targets), verbose=0)
    without = images[:30].clone()
    without[torch.arange(30), targets[:30], 16:48, 80:112] -= 180
    change = tk.explain(trainer, images[:30], targets[:30]) - tk.explain(trainer, without, targets[:30])
    quarters = np.abs(change).reshape(30, 2, 64, 2, 64).sum(axis=(2, 4)).reshape(30, 4)
    assert (quarters.argmax(axis=1) == 1).mean() > 0.9


def test_classes_may_be_given_in_every_form():
    """A name, an index, a list of either, or none: then each image's most probable class is explained."""
    trainer = solved()
    images, _ = make_images(5, seed=1)
    first = tk.explain(trainer, images, CLASSES[0])
    assert first.shape == (5, 32, 32)
    assert first.dtype == np.float32
    for same in (0, [0] * 5, [CLASSES[0]] * 5, np.zeros(5, np.int64), torch.zeros(5, dtype=torch.int64)):
        assert np.array_equal(tk.explain(trainer, images, same), first)
    predicted = trainer.predict(images)
    assert np.array_equal(tk.explain(trainer, images), tk.explain(trainer, images, predicted))
    one_by_one = tk.explain(trainer, images, batch_size=2)
    np.testing.assert_allclose(one_by_one, tk.explain(trainer, images, batch_size=5), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("classes", "match"), [("cow", "class 'cow' is unknown"), (3, "class 3"), ([0], "1 classes")])
def test_an_unknown_class_is_refused(classes, match):
    """Another class, or classes for another number of images, are refused by name."""
    with pytest.raises(ArgumentError, match=match):
        tk.explain(solved(), make_images(5)[0], classes)


def test_nothing_of_the_model_changes():
    """Weights, gradients, modes and the random generator stay."""
    trainer = solved()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    modes = [module.training for module in trainer.model.modules()]
    state = torch.get_rng_state()
    tk.explain(trainer, make_images(4)[0])
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert [module.training for module in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_the_picture_shows_class_and_probability():
    """The picture has a title for each image, and images of other sizes are shown as the model sees them."""
    pytest.importorskip("matplotlib")
    trainer = solved()
    images = torch.nn.functional.interpolate(make_images(8)[0].float(), (40, 60)).to(torch.uint8)
    parts = tk.plot_explanations(trainer, images, num_images=3).axes[0].child_axes
    probabilities = trainer.predict_proba(images[:3])
    expected = [f"{CLASSES[row.argmax()]} {row.max():.2f}" for row in probabilities]
    assert [part.get_title() for part in parts] == expected
    assert parts[0].get_images()[0].get_array().shape == (32, 32, 3)


def test_the_nearest_training_image_is_itself():
    """A training image finds itself first, with a cosine of 1, then images of its class."""
    trainer = solved()
    data = make_images(60)
    indices, cosines = tk.nearest_images(trainer, data, data[0][10:14], count=3)
    assert indices[:, 0].tolist() == [10, 11, 12, 13]
    np.testing.assert_allclose(cosines[:, 0], 1, rtol=1e-4)
    assert (data[1][indices[:, 1]] == data[1][10:14]).all()
    assert (np.diff(cosines, axis=1) <= 0).all()
    with pytest.raises(ArgumentError, match="count=61 cannot be used: expected 1 to 60"):
        tk.nearest_images(trainer, data, data[0][:1], count=61)


def test_a_batch_is_shown_with_its_classes(tmp_path):
    """Images of a folder, of arrays or of a Dataset are shown with the names of their own labels."""
    pytest.importorskip("matplotlib")
    images, targets = make_images(30)
    parts = tk.show_batch((images, targets), CLASSES, num_images=9).axes[0].child_axes
    assert len(parts) == 9
    for part in parts:
        shown = np.asarray(part.get_images()[0].get_array())
        place = next(row for row in range(30) if np.array_equal(images[row].permute(1, 2, 0).numpy(), shown))
        assert part.get_title() == CLASSES[targets[place]]
    with pytest.raises(ArgumentError, match="num_images"):
        tk.show_batch((images, targets), CLASSES, num_images=0)


def test_backbone_and_trainer_are_shown_in_one_line():
    """The line names blocks as freeze_until does, what is frozen, and how far training has come."""
    trainer = make_trainer(make_model(make_backbone(), "block5"))
    assert repr(trainer.model.backbone) == (
        "Backbone(tiny, 32 px, block1, block2, block3, block4, block5; frozen: block1, block2, block3, block4)"
    )
    trainer.fit(make_images(24), epochs=2, verbose=0)
    assert repr(trainer).startswith("Trainer(tiny at 32 px, 3 classes, trains from block5_conv1 on, Adam, ")
    assert repr(trainer).endswith("epoch 2)")
    assert "\n" not in repr(trainer) + repr(trainer.model.backbone)
    assert repr(tk.freeze_until(make_backbone(), None)).endswith("frozen: none)")
