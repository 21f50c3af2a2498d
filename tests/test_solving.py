"""`Trainer.solve` and `Trainer.calibrate`: the solved head and the temperature in a model, wherever the model goes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk
from tiny import CLASSES, changed, differences, make_images, make_model, make_trainer, weights_of
from transferkit.errors import ArgumentError, CacheError, HeadMismatchError
from transferkit.linear.choice import STRENGTHS, solve
from transferkit.linear.table import Table
from transferkit.linear.temperature import fit_temperature


def noisy_images(count=60, *, seed=0):
    """Images of three classes of which some are labelled as another class: no head is right on all of them."""
    images, targets = make_images(count, seed=seed)
    wrong = torch.rand(count, generator=torch.Generator().manual_seed(seed + 7)) < 0.3
    return images, torch.where(wrong, (targets + 1) % 3, targets)


def head_trainer(backbone, *, head=None, **arguments):
    return make_trainer(make_model(backbone, "head", **(head or {})), **arguments)


def rows_of(trainer, data, **arguments):
    """Return the features of images as one table, and their targets."""
    features = tk.cache_features(trainer.model, data, device=trainer.device, **arguments)
    rows, targets = features.numpy()
    columns = trainer.model.columns or None
    return Table.of_tensor(torch.from_numpy(rows), columns=columns), torch.from_numpy(targets)


def logits_of(trainer, images):
    with torch.no_grad():
        return trainer.model.eval()(trainer.model.backbone.preprocess(images))


def assert_solution(model, solved):
    """The head is the solution, for standardized features."""
    head = model.head
    for value, expected in [
        (head.logits.weight, solved.weight),
        (head.logits.bias, solved.bias),
        (head.standardize.mean, solved.mean.float()),
        (head.standardize.std, solved.std.float()),
    ]:
        torch.testing.assert_close(value.detach(), expected, rtol=1e-3, atol=1e-5)


# ---- the head


def test_the_head_is_the_solution_on_cached_features(backbone):
    """Weights, statistics, penalty and scores are those that the solver finds on the same rows."""
    data = noisy_images()
    trainer = head_trainer(backbone)
    found = trainer.solve(data, verbose=0)
    rows, targets = rows_of(trainer, data)
    expected = solve(rows, targets, tk.CrossEntropy(), classes=3)
    assert_solution(trainer.model, expected)
    assert_solution(trainer.model, found)
    assert (found.l2, found.path) == (expected.l2, expected.path)
    assert int(trainer.model.head.standardize.num_images) == 60
    assert trainer.global_step == trainer.epoch == 0


def test_predictions_are_those_of_the_solution(backbone):
    """The model's logits are the solution's on the features as they are."""
    data = noisy_images()
    trainer = head_trainer(backbone)
    weight, bias = trainer.solve(data, verbose=0).folded()
    rows, _ = rows_of(trainer, data)
    (block,) = rows.blocks()
    torch.testing.assert_close(logits_of(trainer, data[0]), block @ weight.T + bias, rtol=1e-3, atol=1e-4)
    assert trainer.evaluate(data)["accuracy"] > 0.6


def test_only_head_and_temperature_change(backbone):
    """Solving changes the head and nothing before it, and leaves the model in eval mode."""
    trainer = head_trainer(backbone, head={"dropout": 0.5})
    before = weights_of(trainer.model)
    trainer.solve(noisy_images(), verbose=0)
    assert {name.split(".")[0] for name in changed(before, trainer.model)} == {"head"}
    assert not any(module.training for module in trainer.model.modules())


def test_a_penalty_that_is_given_is_used(backbone):
    """`l2` is the penalty: a strong one gives small weights, and it alone is scored."""
    sizes = []
    for l2 in (10.0, 1e-3):
        trainer = head_trainer(backbone)
        found = trainer.solve(noisy_images(), l2=l2, verbose=0)
        assert (found.l2, [strength.l2 for strength in found.path]) == (l2, [l2])
        sizes.append(trainer.model.head.logits.weight.norm().item())
    assert sizes[0] < sizes[1] / 5


@pytest.mark.parametrize(
    ("arguments", "name"), [({"l2": 0}, "l2=0"), ({"l2": -1.0}, "l2=-1"), ({"folds": 1}, "folds=1")]
)
def test_values_out_of_range_are_refused(backbone, arguments, name):
    """The penalty is above 0 and there are 2 folds or more."""
    with pytest.raises(ArgumentError, match=f"{name}"):
        head_trainer(backbone).solve(noisy_images(), verbose=0, **arguments)


def test_validation_images_choose_the_penalty(backbone):
    """With validation data the penalty is the best on these images, and all training images are solved with it."""
    data, validation = noisy_images(), noisy_images(30, seed=1)
    trainer = head_trainer(backbone)
    found = trainer.solve(data, validation_data=validation, verbose=0)
    held_out = rows_of(trainer, validation)
    expected = solve(*rows_of(trainer, data), tk.CrossEntropy(), classes=3, validation=held_out)
    assert found.path == expected.path
    assert len(found.held_out) == 30
    assert_solution(trainer.model, expected)
    expected_temperature = fit_temperature(found.logits, validation[1], tk.CrossEntropy())
    assert trainer.model.temperature == pytest.approx(expected_temperature, rel=1e-5)


def test_views_are_rows_of_their_own(backbone):
    """With n_views each view of an image is a row; all views of an image are held out together."""
    data = noisy_images()
    views = {"augment": "flip", "n_views": 3}
    trainer = head_trainer(backbone)
    found = trainer.solve(data, verbose=0, **views)
    rows, targets = rows_of(trainer, data, **views)
    assert rows.shape[0] == 180
    groups = torch.arange(60).repeat(3)
    assert_solution(trainer.model, solve(rows, targets, tk.CrossEntropy(), classes=3, groups=groups))
    assert len(found.held_out) == 180
    assert int(trainer.model.head.standardize.num_images) == 60
    with pytest.raises(CacheError, match="n_views"):
        head_trainer(backbone).solve(data, augment="flip", verbose=0)


def test_class_weights_and_smoothing_count(backbone):
    """The loss that is minimised is the trainer's, with weights from the data's own frequencies."""
    images, _ = noisy_images()
    targets = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    weights = [60 / (3 * 40), 60 / (3 * 15), 60 / (3 * 5)]
    trainer = head_trainer(backbone, loss=tk.CrossEntropy(class_weights="balanced", label_smoothing=0.1))
    found = trainer.solve((images, targets), l2=0.01, verbose=0)
    loss = tk.CrossEntropy(class_weights=weights, label_smoothing=0.1).for_run(None, 3, torch.device("cpu"))
    rows = rows_of(trainer, (images, targets))
    assert_solution(trainer.model, solve(*rows, loss, classes=3, strengths=[0.01]))
    plain = solve(*rows, tk.CrossEntropy(), classes=3, strengths=[0.01])
    assert (plain.weight - found.weight).abs().max() > 0.01


def test_images_may_have_several_labels(backbone):
    """With binary cross-entropy each label is a problem of its own; the temperature serves its probabilities."""
    images, targets = noisy_images()
    labels = torch.stack([targets == 0, targets != 1, targets == 2], dim=1).float()
    trainer = head_trainer(backbone, loss=tk.BinaryCrossEntropy())
    found = trainer.solve((images, labels), verbose=0)
    rows = Table.of_tensor(torch.from_numpy(pooled_rows(trainer, images)), columns=trainer.model.columns)
    expected = solve(rows, labels, tk.BinaryCrossEntropy(), classes=3, strengths=[found.l2])
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-3, atol=1e-5)
    probabilities = (logits_of(trainer, images) / trainer.model.temperature).sigmoid().numpy()
    np.testing.assert_allclose(trainer.predict_proba(images), probabilities, rtol=1e-4, atol=1e-6)
    assert trainer.predict(images).shape == (60, 3)


def pooled_rows(trainer, images):
    model = trainer.model
    with torch.no_grad():
        return model.backbone(model.backbone.preprocess(images), model.pools).flatten(1).numpy()


@pytest.mark.parametrize(
    "head",
    [{"pooling": "flatten"}, {"head": nn.Sequential(nn.Flatten(), nn.Linear(8, 3))}],
    ids=["flattened", "of one's own"],
)
def test_a_head_that_does_not_standardise_gets_the_same_function(backbone, head):
    """Flatten and Linear take the solution with mean and std folded into the weights."""
    data = noisy_images()
    trainer = head_trainer(backbone, head=head)
    weight, bias = trainer.solve(data, verbose=0).folded()
    linear = trainer.model.head[-1]
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, bias)
    assert trainer.evaluate(data)["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("head", "names"),
    [
        ({"hidden": (16,)}, "Flatten, Standardize, Linear, ReLU, Linear"),
        ({"head": nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 3))}, "Flatten, Linear, Linear"),
        ({"head": nn.Sequential(nn.Flatten(), nn.Linear(8, 3, bias=False))}, "Flatten, Linear"),
        ({"head": nn.Sequential(nn.Conv2d(8, 3, 1), nn.Flatten())}, "Conv2d, Flatten"),
    ],
    ids=["hidden", "two layers", "no bias", "convolution"],
)
def test_a_head_that_is_not_linear_is_refused(backbone, head, names):
    """What has no closed optimum is refused with its layers and what is expected; nothing changes."""
    trainer = head_trainer(backbone, head=head)
    before = weights_of(trainer.model)
    with pytest.raises(
        HeadMismatchError, match=f"the head has the layers {names}, and only a linear one can be solved"
    ):
        trainer.solve(noisy_images(), verbose=0)
    assert changed(before, trainer.model) == set()


@pytest.mark.parametrize("boundary", ["block5", None])
def test_layers_before_the_head_must_be_frozen(backbone, boundary):
    """Where layers before the head train, solving is refused with the call that freezes them."""
    trainer = make_trainer(make_model(backbone, boundary))
    with pytest.raises(CacheError, match=r"layers before the head train.*freeze_until\(model, 'head'\)"):
        trainer.solve(noisy_images(), verbose=0)


def test_a_loader_that_reads_in_order_is_its_data_set(backbone):
    """Training and validation data may come in a DataLoader that does not shuffle; one that does is refused."""
    train, validation = noisy_images(), noisy_images(30, seed=1)
    loaders = [DataLoader(TensorDataset(*data), batch_size=7) for data in (train, validation)]
    plain, loaded = head_trainer(backbone), head_trainer(backbone)
    expected = plain.solve(train, validation_data=validation, verbose=0)
    found = loaded.solve(loaders[0], validation_data=loaders[1], verbose=0)
    assert (found.l2, found.path) == (expected.l2, expected.path)
    torch.testing.assert_close(found.weight, expected.weight)
    with pytest.raises(CacheError):
        loaded.solve(DataLoader(TensorDataset(*train), shuffle=True), verbose=0)


def test_a_frozen_head_is_refused(backbone):
    """A head that does not train is not solved either."""
    trainer = head_trainer(backbone)
    trainer.model.requires_grad_(False)
    with pytest.raises(CacheError, match="the head is frozen, too"):
        trainer.solve(noisy_images(), verbose=0)


def test_what_is_solved_is_said_in_one_line(backbone, capsys):
    """A line has the held-out accuracy and the penalty; with verbose=0 there is none."""
    found = head_trainer(backbone).solve(noisy_images(), verbose=2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"solved the head: {found}"
    assert f"L2 {found.l2:.3g}" in last
    head_trainer(backbone).solve(noisy_images(), verbose=0)
    assert capsys.readouterr().out == ""


def test_strengths_fall(backbone):
    """The penalties tried are the first of the 13, from strong to weak."""
    found = head_trainer(backbone).solve(noisy_images(), verbose=0)
    tried = [strength.l2 for strength in found.path]
    assert tried == list(STRENGTHS[: len(tried)])
    assert found.l2 in tried


# ---- training from it


def test_training_continues_from_the_solved_head(backbone):
    """After solving, block 5 and the head train from there: the first loss is the solved head's, and it falls."""
    data = noisy_images()
    trainer = head_trainer(backbone, lr=1e-3)
    trainer.solve(data, verbose=0)
    solved = weights_of(trainer.model)
    trainer.model.temperature = 1.0
    expected = trainer.evaluate(data)["loss"]
    tk.freeze_until(trainer.model, "block5")
    history = trainer.fit(data, epochs=10, batch_size=60, verbose=0)
    assert history.history["loss"][0] == pytest.approx(expected, rel=1e-4)
    assert history.history["loss"][-1] < expected
    assert {name.split(".")[0] for name in changed(solved, trainer.model)} == {"backbone", "head"}
    assert not {"head.standardize.mean", "head.standardize.std"} & changed(solved, trainer.model)


def test_the_optimizer_forgets_the_head_it_trained(backbone):
    """Momentum of a head that solving replaced does not push the new one: training starts as with a new optimizer."""
    data = noisy_images()
    used, fresh = head_trainer(backbone), head_trainer(backbone)
    used.fit(data, epochs=2, batch_size=20, verbose=0)
    used.solve(data, verbose=0)
    assert not set(used.model.head.parameters()) & set(used.optimizer.state)
    fresh.solve(data, verbose=0)
    fresh.model.load_state_dict(copy.deepcopy(used.model.state_dict()))
    for trainer in (used, fresh):
        next(trainer.steps(data, batch_size=60))
    torch.testing.assert_close(used.model.head.logits.weight, fresh.model.head.logits.weight, rtol=1e-4, atol=1e-6)


# ---- the temperature


def calibrated(backbone, temperature=2.5):
    trainer = head_trainer(backbone)
    trainer.solve(noisy_images(), verbose=0)
    trainer.model.temperature = temperature
    return trainer


@pytest.mark.parametrize(("rows", "held_out"), [(20_000, 60), (10, 15)], ids=["all folds", "one fold"])
def test_solving_calibrates_by_images_held_out(backbone, monkeypatch, rows, held_out):
    """The temperature is the best for the logits of held-out images, from heads that were not trained on them."""
    monkeypatch.setattr("transferkit.linear.choice.ONE_FOLD_ROWS", rows)
    data = noisy_images()
    trainer = head_trainer(backbone)
    found = trainer.solve(data, verbose=0)
    assert len(found.held_out) == held_out
    expected = fit_temperature(found.logits, data[1][found.held_out], tk.CrossEntropy())
    assert trainer.model.temperature == pytest.approx(expected, rel=1e-6)
    assert trainer.model.temperature != 1.0


def test_calibrate_gives_the_least_loss(backbone):
    """The temperature is that of `fit_temperature` on the model's logits, whatever the model had before."""
    validation = noisy_images(30, seed=2)
    trainer = calibrated(backbone)
    expected = fit_temperature(logits_of(trainer, validation[0]), validation[1], tk.CrossEntropy())
    assert trainer.calibrate(validation) == pytest.approx(expected, rel=1e-4)
    assert trainer.model.temperature == pytest.approx(expected, rel=1e-4)
    best = trainer.evaluate(validation)["loss"]
    for factor in (0.6, 1.6):  # further than the image with a random label moves it
        trainer.model.temperature = expected * factor
        assert trainer.evaluate(validation)["loss"] > best


def test_a_temperature_changes_probabilities_and_no_prediction(backbone):
    """predict_proba and assess divide logits by the temperature; the classes stay."""
    data = noisy_images()
    trainer = calibrated(backbone)
    predicted = trainer.predict(data[0])
    expected = (logits_of(trainer, data[0]) / 2.5).softmax(dim=1)
    np.testing.assert_allclose(trainer.predict_proba(data[0]), expected.numpy(), rtol=1e-4, atol=1e-6)
    losses = -expected[torch.arange(60), data[1]].log()
    np.testing.assert_allclose(trainer.assess(data).losses, losses.numpy(), rtol=1e-3, atol=1e-5)
    trainer.model.temperature = 1.0
    assert np.array_equal(trainer.predict(data[0]), predicted)
    assert not np.allclose(trainer.predict_proba(data[0]), expected.numpy(), rtol=1e-2)


def test_a_temperature_is_saved_loaded_and_exported(make_backbone, tmp_path):
    """The file of a model, a trainer that loads it, and the exported module have the temperature."""
    trainer = calibrated(make_backbone())
    images = noisy_images()[0]
    expected = trainer.predict_proba(images)
    tk.save_model(trainer.model, tmp_path / "model.pt")
    loaded = tk.load_model(tmp_path / "model.pt", backbone=make_backbone())
    trainer.save(tmp_path / "trainer.pt")
    other = head_trainer(make_backbone())
    other.load(tmp_path / "trainer.pt")
    assert loaded.temperature == other.model.temperature == 2.5
    assert np.array_equal(other.predict_proba(images), expected)
    exported = tk.WithPreprocessing(trainer.model)(images)
    np.testing.assert_allclose(exported.detach().numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("train", [lambda t, d: t.fit(d, epochs=1, verbose=0), lambda t, d: list(t.steps(d))])
def test_training_sets_the_temperature_back(backbone, train):
    """A temperature belongs to the weights that it was fitted to: training sets it to 1."""
    trainer = calibrated(backbone)
    train(trainer, noisy_images())
    assert trainer.model.temperature == 1.0


def test_lr_find_keeps_the_temperature(backbone):
    """The sweep leaves the model as it was, temperature and all."""
    trainer = calibrated(backbone)
    before = copy.deepcopy(trainer.state_dict())
    trainer.lr_find(noisy_images(), num_steps=3, verbose=0)
    assert differences(before["model"], trainer.state_dict()["model"]) == []
    assert trainer.model.temperature == 2.5
    assert list(trainer.model.classes) == CLASSES
