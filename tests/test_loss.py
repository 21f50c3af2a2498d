"""Losses are parts: cross-entropy, binary cross-entropy for several labels per image, and a user's own."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk
from tiny import CLASSES, differences, make_images, make_model, make_trainer, weights_of
from transferkit.errors import ArgumentError, CheckpointError, TargetError
from transferkit.training.loss import BinaryCrossEntropy, CrossEntropy, FunctionLoss


@pytest.fixture
def labels():
    """24 raw images, each bright in the channels whose labels it has: none, one, two or all three."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(24)[:, None].bitwise_right_shift(torch.arange(3)) & 1
    images = torch.randint(0, 120, (24, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images + 120 * rows[:, :, None, None].byte(), rows.float()


def focal(logits, targets):
    """A loss of the user's own."""
    return ((1 - (-functional.cross_entropy(logits, targets, reduction="none")).exp()) ** 2).mean()


# ---- binary cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_binary_cross_entropy_is_torchs(smoothing, weights):
    """Sum over the batch divided by its size is the mean of torch's function, smoothed and weighted."""
    logits, targets = torch.randn(7, 3), (torch.rand(7, 3) > 0.5).float()
    source = tk.data.open.open_data((torch.zeros(7, 3, 8, 8, dtype=torch.uint8), targets), CLASSES, multi_label=True)
    loss = BinaryCrossEntropy(label_smoothing=smoothing, positive_weights=weights)
    found = loss.for_run(source, 3, torch.device("cpu"))
    value = found.sum(logits, targets) / found.total_weight(targets)
    smoothed = targets * (1 - smoothing) + smoothing / 2
    weight = None if weights is None else torch.tensor(weights)
    expected = functional.binary_cross_entropy_with_logits(logits, smoothed, pos_weight=weight)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    plain = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    assert torch.equal(found.each(logits, targets), plain)


def test_balanced_positive_weights_are_the_ratio_of_absent_to_present(labels):
    """A label on a quarter of the images weighs three; one on no image weighs one."""
    images, _ = labels
    rows = torch.zeros(24, 3)
    rows[:6, 0], rows[:12, 1] = 1, 1
    source = tk.data.open.open_data((images, rows), CLASSES, multi_label=True)
    found = BinaryCrossEntropy(positive_weights="balanced").for_run(source, 3, torch.device("cpu"))
    assert found.positive_weights.tolist() == [3.0, 1.0, 1.0]


def test_several_labels_are_learnt(backbone, labels):
    """From multi-hot targets to labels: probabilities of their own, a matrix of labels, names, and figures that fit."""
    images, rows = labels
    trainer = make_trainer(make_model(backbone), loss=tk.BinaryCrossEntropy(), lr=1e-2)
    history = trainer.fit((images, rows), validation_data=(images, rows), epochs=25, batch_size=8, verbose=0)
    assert max(history.history["val_accuracy"]) > 0.8
    probabilities = trainer.predict_proba(images)
    with torch.no_grad():
        logits = trainer.model.eval()(trainer.model.backbone.preprocess(images))
    np.testing.assert_allclose(probabilities, logits.sigmoid().numpy(), rtol=1e-4, atol=1e-6)
    predicted = trainer.predict(images)
    assert (predicted.dtype, predicted.shape) == (np.bool_, (24, 3))
    assert np.array_equal(predicted, probabilities >= 0.5)
    names = trainer.predict_classes(images)
    assert names == [[name for name, has in zip(CLASSES, row, strict=True) if has] for row in predicted]
    assert [] in names  # an image may have no label
    both, either = (predicted & (rows.numpy() > 0)).sum(1), (predicted | (rows.numpy() > 0)).sum(1)
    accuracy = np.where(either > 0, both / np.maximum(either, 1), 1.0).mean()
    measured = trainer.evaluate((images, rows))
    assert measured["accuracy"] == pytest.approx(accuracy)
    assert measured["loss"] == pytest.approx(functional.binary_cross_entropy_with_logits(logits, rows).item(), rel=1e-4)


@pytest.mark.parametrize("form", ["int", "bool", "numpy", "data set", "loader"])
def test_multi_hot_rows_of_any_kind_train_the_same(make_backbone, labels, form):
    """Rows of integers, of bools, numpy's, and those of a data set or loader give the weights of float rows."""
    images, rows = labels
    forms = {
        "int": (images, rows.long()),
        "bool": (images, rows.bool()),
        "numpy": (images.numpy(), rows.numpy().astype(np.uint8)),
        "data set": TensorDataset(images, rows.long()),
        "loader": DataLoader(TensorDataset(images, rows), batch_size=24),
    }
    trained = []
    for data in ((images, rows), forms[form]):
        trainer = make_trainer(make_model(make_backbone()), loss=tk.BinaryCrossEntropy(), cache=False, optimizer="sgd")
        trainer.fit(data, batch_size=None if form == "loader" and data is forms[form] else 24, verbose=0, epochs=1)
        trained.append(weights_of(trainer.model))
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-5, atol=1e-6)


def test_the_threshold_decides_and_goes_with_the_model(backbone, labels, tmp_path):
    """A label counts from the threshold on; saved, loaded and exported models use it, and training goes on with it."""
    images, rows = labels
    trainer = make_trainer(make_model(backbone), loss=tk.BinaryCrossEntropy(threshold=0.2))
    trainer.fit((images, rows), epochs=2, verbose=0)
    probabilities = trainer.predict_proba(images)
    assert np.array_equal(trainer.predict(images), probabilities >= 0.2)
    assert not np.array_equal(probabilities >= 0.2, probabilities >= 0.5)
    trainer.save(tmp_path / "a.pt")
    tk.save_model(trainer.model, tmp_path / "b.pt")
    exported = tk.WithPreprocessing(trainer.model)
    np.testing.assert_allclose(exported(images).numpy(), probabilities, rtol=1e-4, atol=1e-6)
    assert exported.threshold == 0.2


def test_a_saved_model_knows_its_kind(tmp_path):
    """load_model gives back the threshold, and a trainer of such a model takes binary cross-entropy by itself."""
    backbone = tk.load_backbone("vgg11", weights=None, image_size=32)
    model = tk.freeze_until(tk.attach_head(backbone, CLASSES), "head")
    trainer = make_trainer(model, loss=tk.BinaryCrossEntropy(threshold=0.3))
    trainer.save(tmp_path / "a.pt")
    loaded = make_trainer(tk.load_model(tmp_path / "a.pt"))
    assert loaded.model.threshold == 0.3
    images = make_images(2)[0]
    assert np.array_equal(loaded.predict(images), trainer.predict(images))
    other = make_trainer(tk.freeze_until(tk.attach_head(backbone, CLASSES), "head"))
    before = weights_of(other.model)
    with pytest.raises(CheckpointError, match="has labels of an image: several, the model one"):
        other.load(tmp_path / "a.pt")
    assert differences(before, weights_of(other.model)) == []


def test_a_run_with_several_labels_is_resumed(make_backbone, labels, tmp_path):
    """A stopped run goes on to the weights of one that never stopped; with another loss it is refused."""

    def run(loss, **arguments):
        trainer = make_trainer(make_model(make_backbone()), loss=loss, metrics={"hamming": hamming})
        trainer.fit(labels, validation_data=labels, batch_size=8, verbose=0, **arguments)
        return trainer

    loss = tk.BinaryCrossEntropy(positive_weights="balanced")
    whole = run(loss, epochs=3)
    run(loss, epochs=1, callbacks=[tk.Checkpoint(tmp_path)])
    resumed = run(loss, epochs=3, resume_from=tmp_path)
    assert differences(weights_of(whole.model), weights_of(resumed.model)) == []
    assert [vars(report) | {"epoch_s": 0} for report in resumed.history.reports] == [
        vars(report) | {"epoch_s": 0} for report in whole.history.reports
    ]
    with pytest.raises(CheckpointError, match="loss="):
        run(tk.BinaryCrossEntropy(), epochs=3, resume_from=tmp_path)


def hamming(probabilities, targets):
    """Fraction of the labels that are right."""
    return ((probabilities >= 0.5) == targets.bool()).float().mean()


def test_an_assessment_of_several_labels(backbone, labels):
    """Figures of each class count its labels; what needs one label an image is refused; pictures can be drawn."""
    images, rows = labels
    trainer = make_trainer(make_model(backbone), loss=tk.BinaryCrossEntropy(), metrics={"hamming": hamming})
    trainer.fit((images, rows), epochs=3, verbose=0)
    found = trainer.assess((images, rows))
    predicted, true = trainer.predict(images), rows.numpy().astype(bool)
    assert found.accuracy == pytest.approx(trainer.evaluate((images, rows))["accuracy"])
    assert found.metrics["hamming"] == pytest.approx((predicted == true).mean())
    for figures, (mine, theirs) in zip(found.per_class(), zip(predicted.T, true.T, strict=True), strict=True):
        assert figures.support == theirs.sum()
        assert figures.recall == pytest.approx((mine & theirs).sum() / theirs.sum())
    assert f"hamming {found.metrics['hamming']:.4f}" in str(found)
    with pytest.raises(ArgumentError, match="confusion_matrix needs images with exactly one label"):
        found.confusion_matrix()
    with pytest.raises(ArgumentError, match="top_k_accuracy needs images with exactly one label"):
        found.top_k_accuracy(2)
    pytest.importorskip("matplotlib")
    drawn = [text.get_text() for text in tk.plot_confusion_matrix(found).axes[0].texts]
    assert [int(text) for text in drawn[::3]] == [int((p & t).sum()) for p, t in zip(predicted.T, true.T, strict=True)]
    titles = [part.get_title() for part in tk.plot_predictions(found, (images, rows), num_images=24).axes[0].child_axes]
    assert any("none" in title for title in titles)
    assert any("cat + dog" in title for title in titles)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.arange(24) % 3, r"several labels per image, expected rows \(N, 3\) of 0 and 1.*numpy.eye"),
        (torch.zeros(24, 2), r"shape \(24, 2\).*expected rows \(N, 3\)"),
        (torch.full((24, 3), 2), r"target row 0 has entries from 2 to 2: expected 1 for each label"),
        (torch.full((24, 3), math.nan), "target row 0 has entries from nan"),
    ],
)
def test_other_targets_than_multi_hot_rows_are_refused(model, data, targets, message):
    """Class indices, rows of another width and entries beyond 0 and 1 are refused before a step, with what to do."""
    trainer = make_trainer(model, loss=tk.BinaryCrossEntropy())
    with pytest.raises(TargetError, match=message):
        trainer.fit((data[0], targets), verbose=0, epochs=1)
    assert trainer.global_step == 0


def test_multi_hot_rows_without_the_loss_name_it(model, labels):
    """Cross-entropy refuses rows that do not sum to one and says which loss takes them."""
    with pytest.raises(TargetError, match=r"several labels per image, pass Trainer\(loss=transferkit.Binary"):
        make_trainer(model).fit(labels, verbose=0, epochs=1)


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 1.5, math.nan, "a"])
def test_a_threshold_out_of_range_is_refused(threshold):
    """A threshold is above 0 and below 1."""
    with pytest.raises(ArgumentError, match="threshold="):
        tk.BinaryCrossEntropy(threshold=threshold)


# ---- a loss of the user's own


@pytest.mark.parametrize("boundary", ["head", None])
def test_a_function_trains_as_in_a_plain_loop(make_backbone, data, boundary):
    """A function of (logits, targets) gives the weights of a loop that minimises it."""
    trainer = make_trainer(
        make_model(make_backbone(), boundary, pooling="flatten"), loss=focal, optimizer="sgd", lr=0.1
    )
    trainer.fit(data, batch_size=24, verbose=0, epochs=1)
    model = make_model(make_backbone(), boundary, pooling="flatten")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = tk.data.sources.epoch_order(24, 0, 0)
    focal(model(model.backbone.preprocess(data[0][order])), data[1][order]).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_micro_batches_weigh_a_functions_parts(make_backbone, data):
    """5 images in parts of 2, 2 and 1 give the update of the mean over 5."""
    trained = []
    for micro_batch_size in (None, 2):
        trainer = make_trainer(
            make_model(make_backbone()), loss=focal, optimizer="sgd", lr=0.1, micro_batch_size=micro_batch_size
        )
        trainer.fit((data[0][:5], data[1][:5]), batch_size=5, verbose=0, epochs=1)
        trained.append(weights_of(trainer.model))
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-6)


def test_evaluation_uses_the_function(model, data):
    """evaluate and assess give the function's value for each image."""
    trainer = make_trainer(model, loss=nn.MultiMarginLoss())
    with torch.no_grad():
        logits = model.eval()(model.backbone.preprocess(data[0]))
    expected = nn.MultiMarginLoss(reduction="none")(logits, data[1])
    assert trainer.evaluate(data)["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    np.testing.assert_allclose(trainer.assess(data).losses, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_torchs_binary_loss_means_several_labels(model, labels):
    """nn.BCEWithLogitsLoss trains multi-hot targets and sets the threshold to 1/2."""
    trainer = make_trainer(model, loss=nn.BCEWithLogitsLoss())
    trainer.fit(labels, verbose=0, epochs=1)
    assert model.threshold == 0.5
    assert trainer.predict(labels[0]).shape == (24, 3)


def test_a_function_for_several_labels(model, labels):
    """With model.threshold set, a function of the user's own gets multi-hot rows."""
    model.threshold = 0.5
    seen = []
    trainer = make_trainer(
        model,
        loss=lambda logits, rows: seen.append(rows.shape) or functional.binary_cross_entropy_with_logits(logits, rows),
    )
    trainer.fit(labels, batch_size=24, verbose=0, epochs=1)
    assert seen[-1] == (24, 3)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"returned a tensor \(2,\): expected the mean over the batch"),
        (lambda logits, targets: 1.0, "returned a float: expected the mean"),
        (lambda logits, targets: logits.detach().sum(), "detached from the logits"),
        (lambda logits: logits.sum(), r"cannot be called with logits \(2, 3\) and targets \(2,\)"),
    ],
    ids=["no reduction", "a number", "detached", "one argument"],
)
def test_a_function_that_is_no_loss_is_refused_before_a_step(model, data, loss, message):
    """What does not return one number that depends on the logits is refused with what is expected."""
    before = weights_of(model)
    with pytest.raises(ArgumentError, match=message):
        make_trainer(model, loss=loss).fit(data, verbose=0, epochs=1)
    assert differences(before, weights_of(model)) == []


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 0.0])),
        nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2),
    ],
)
def test_a_loss_that_ignores_a_class_is_refused(model, data, loss):
    """It has no mean for images of that class alone, where evaluate would say nan; the advice ignores them as well."""
    with pytest.raises(ArgumentError, match=r"no mean for images of class 2 alone: pass transferkit") as caught:
        make_trainer(model, loss=loss)
    advised = eval(str(caught.value).rsplit("pass ", 1)[1][:-1], {"transferkit": tk})
    assert advised == CrossEntropy(loss.label_smoothing, [1.0, 1.0, 0.0])
    trainer = make_trainer(model, loss=advised)
    trainer.fit(data, verbose=0, epochs=1)
    assert math.isfinite(trainer.evaluate(data)["loss"])
    make_trainer(model, loss=nn.CrossEntropyLoss(ignore_index=3))


@pytest.mark.parametrize("loss", [nn.NLLLoss(), nn.functional.nll_loss])
def test_a_loss_of_log_probabilities_is_refused(model, loss):
    """For logits it has no minimum."""
    with pytest.raises(ArgumentError, match=r"takes log-probabilities.*logits.*CrossEntropyLoss or cross_entropy"):
        make_trainer(model, loss=loss)


def test_a_loss_with_parameters_is_refused(model):
    """Nobody would train them."""
    with pytest.raises(ArgumentError, match="has parameters of its own"):
        make_trainer(model, loss=nn.Linear(3, 3))


def test_settings_are_described():
    """Two losses with other settings have other descriptions: a resumed run compares them."""
    losses = [
        CrossEntropy(),
        CrossEntropy(0.1),
        CrossEntropy(class_weights=[1.0, 2.0]),
        BinaryCrossEntropy(),
        BinaryCrossEntropy(label_smoothing=0.1),
        BinaryCrossEntropy(positive_weights=[1.0, 2.0]),
        FunctionLoss(focal),
        FunctionLoss(nn.MultiMarginLoss()),
        FunctionLoss(nn.MultiMarginLoss(margin=2.0)),
    ]
    assert len({loss.describe() for loss in losses}) == len(losses) - 1  # a module's repr says what it says
