"""Metrics and figures of callbacks join every report, the history, the plots, early stopping and the loggers."""

import copy
import csv
import math

import numpy as np
import pytest
import torch

import transferkit as tk
from tiny import make_model, make_trainer
from transferkit.errors import ArgumentError


def macro_recall(probabilities, targets):
    """Mean over the classes of the fraction of their images that are right."""
    right = probabilities.argmax(dim=1) == targets
    return torch.stack([right[targets == index].float().mean() for index in range(3)]).mean()


def test_a_resumed_epoch_reports_all_of_its_images(backbone, data, tmp_path):
    """An epoch that was stopped in the middle has the figures of an uninterrupted one, also those of metrics."""
    histories = []
    for resume_from in (None, tmp_path / "step-00000002.pt"):
        trainer = make_trainer(make_model(copy.deepcopy(backbone), "head"), metrics={"recall": macro_recall})
        callbacks = [tk.Checkpoint(tmp_path, every_steps=1, keep_last=10)]
        history = trainer.fit(data, epochs=2, batch_size=8, callbacks=callbacks, resume_from=resume_from, verbose=0)
        histories.append({name: values for name, values in history.history.items() if name != "epoch_s"})

    assert histories[0] == histories[1]
    assert len(histories[0]["recall"]) == 2


class Counted:
    """A metric with state, as torchmetrics has."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.count, self.updates = 0, 0

    def update(self, probabilities, targets):
        self.count, self.updates = self.count + len(targets), self.updates + 1

    def compute(self):
        return torch.tensor(self.count + 1000.0 * (self.updates - 1))


@pytest.mark.parametrize("cache", [True, False])
def test_metrics_join_reports(backbone, data, cache):
    """A function and an object give a figure of the training and of the validation images, cached features or not."""
    model = make_model(backbone, "head")
    trainer = make_trainer(model, metrics={"recall": macro_recall, "images": Counted()}, cache=cache)
    validation = (data[0][:9], data[1][:9])
    history = trainer.fit(data, validation_data=validation, epochs=2, batch_size=8, verbose=0)
    assert history.history["images"] == [24.0, 24.0]
    assert history.history["val_images"] == [9.0, 9.0]
    expected = macro_recall(torch.from_numpy(trainer.predict_proba(validation[0])), validation[1]).item()
    assert history.history["val_recall"][history.best_epoch] == pytest.approx(expected)
    assert trainer.evaluate(validation) == pytest.approx(
        {"loss": history.reports[history.best_epoch].val_loss, "accuracy": max(history.history["val_accuracy"])}
        | {"recall": expected, "images": 9.0},
        rel=1e-5,
    )
    assert trainer.assess(validation).metrics == pytest.approx({"recall": expected, "images": 9.0})


def test_the_training_figure_is_of_the_outputs_while_the_weights_change(backbone, data):
    """The metric of the training images sees the outputs of each step before its update, in the order of the epoch."""
    seen = []
    trainer = make_trainer(make_model(backbone), metrics={"one": lambda p, t: seen.append((p, t)) or 0.0})
    steps = list(make_trainer(make_model(backbone)).steps(data, batch_size=10))
    trainer.fit(data, batch_size=10, verbose=0, epochs=1)
    (probabilities, targets), *_ = seen
    assert probabilities.shape == (24, 3)
    assert torch.equal(targets, torch.cat([step.targets for step in steps]))


@pytest.mark.slow  # an extra that the fast tests do without
def test_torchmetrics_serves(backbone, data):
    """A torchmetrics object gives the figure it gives over all images at once."""
    torchmetrics = pytest.importorskip("torchmetrics")
    f1 = torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")
    trainer = make_trainer(make_model(backbone, "head"), metrics={"f1": f1})
    trainer.fit(data, validation_data=data, epochs=2, batch_size=7, verbose=0)
    probabilities = torch.from_numpy(trainer.predict_proba(data[0]))
    expected = torchmetrics.functional.f1_score(probabilities, data[1], "multiclass", num_classes=3, average="macro")
    assert trainer.evaluate(data)["f1"] == pytest.approx(expected.item())


@pytest.mark.parametrize("metrics", [["accuracy"], ["loss", macro_recall], [macro_recall], (macro_recall,)])
def test_a_list_serves(model, metrics):
    """Functions go by their names; accuracy and loss, which are always measured, may be in the list."""
    expected = ["macro_recall"] if macro_recall in metrics else []
    assert list(make_trainer(model, metrics=metrics).metrics) == expected


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"val_f1": macro_recall}, r"has the name 'val_f1': expected a Python name"),
        ({"lr": macro_recall}, r"has the name 'lr': expected a Python name other than"),
        ({"top 3": macro_recall}, r"has the name 'top 3'"),
        ({"f1": "macro"}, r"metrics\['f1'\] is 'macro': expected a function"),
        ({"f1": Counted}, r"metrics\['f1'\] is .*expected a function"),
        ("accuracy", "metrics='accuracy' cannot be used"),
        (macro_recall, "cannot be used: expected a mapping"),
    ],
    ids=["val_", "taken", "no name", "text", "class", "a string", "a function"],
)
def test_metrics_that_cannot_be_used_are_refused(model, metrics, message):
    """Names that are taken or no Python names, and what is no metric, are refused when the trainer is made."""
    with pytest.raises(ArgumentError, match=message):
        make_trainer(model, metrics=metrics)


def test_a_metric_that_gives_no_number_is_refused_by_name(model, data):
    """One number is expected; several are named with the remedy."""
    trainer = make_trainer(model, metrics={"each": lambda probabilities, targets: probabilities.mean(dim=0)})
    with pytest.raises(ArgumentError, match=r"metrics\['each'\] returned tensor.*expected one number.*average"):
        trainer.evaluate(data)


# ---- where figures go


def pets_in(path):
    """The column `pets` of a log."""
    return [row["pets"] for row in csv.DictReader(path.read_text().splitlines())]


def test_a_callback_adds_a_figure(model, data, tmp_path, capsys):
    """A number assigned to the report joins history, line, plot and loggers, whatever the order of the callbacks."""

    def add(trainer, report):
        report.pets = 0.25 + report.epoch

    logger = tk.CSVLogger(tmp_path / "log.csv")
    history = make_trainer(model).fit(data, epochs=2, batch_size=8, callbacks=[logger, add])
    assert history.history["pets"] == [0.25, 1.25]
    assert "<th>pets</th>" in history._repr_html_()
    assert pets_in(tmp_path / "log.csv") == ["0.25", "1.25"]
    pytest.importorskip("matplotlib")
    assert [part.get_title() for part in history.plot().axes[0].child_axes] == [
        "loss",
        "accuracy",
        "pets",
        "learning rate",
    ]


def test_a_figure_of_some_epochs_is_nan_in_the_others():
    """A figure that one report lacks is NaN there."""
    reports = [tk.EpochReport(epoch, 1.0, 0.5, 1e-3, 1.0) for epoch in range(3)]
    reports[1].pets = 0.5
    values = tk.History(reports).history["pets"]
    assert np.array_equal(values, [math.nan, 0.5, math.nan], equal_nan=True)


@pytest.mark.parametrize(("monitor", "epochs"), [("val_flat", 3), ("own", 3), ("falling_error", 6)])
def test_early_stopping_watches_metrics_and_figures_of_callbacks(model, data, monitor, epochs):
    """A metric or an added figure that does not improve ends the run; an error improves downwards."""

    def add(trainer, report):
        report.own, report.falling_error = 1.0, 1.0 / (1 + report.epoch)

    trainer = make_trainer(model, metrics={"flat": lambda probabilities, targets: 0.5})
    callbacks = [tk.EarlyStopping(monitor, patience=2), add]
    history = trainer.fit(data, validation_data=data, epochs=6, verbose=0, callbacks=callbacks)
    assert len(history.reports) == epochs


def test_early_stopping_names_a_misspelt_metric_before_a_step(model, data):
    """A name close to a figure is refused before the run, one that no report has after the first epoch."""
    trainer = make_trainer(model, metrics={"recall": macro_recall})
    with pytest.raises(ArgumentError, match="monitor='val_recal' is not a metric"):
        trainer.fit(data, validation_data=data, callbacks=[tk.EarlyStopping("val_recal")], verbose=0, epochs=1)
    assert trainer.global_step == 0
    with pytest.raises(ArgumentError, match="monitors 'pets', which the report lacks: it has loss, accuracy"):
        trainer.fit(data, callbacks=[tk.EarlyStopping("pets")], verbose=0, epochs=1)


def test_a_logger_goes_on_with_a_file_that_lacks_a_figure(make_backbone, data, tmp_path):
    """Lines of an earlier run without the metric stay, with nothing in its column."""
    trainer = make_trainer(make_model(make_backbone()))
    trainer.fit(data, callbacks=[tk.CSVLogger(tmp_path / "log.csv")], verbose=0, epochs=1)
    trainer.fit(
        data, callbacks=[lambda _, report: setattr(report, "pets", 1.0), tk.CSVLogger(tmp_path / "log.csv")], epochs=1
    )
    assert pets_in(tmp_path / "log.csv") == ["", "1.0"]


def test_evaluating_the_validation_data_in_a_callback_computes_no_features(backbone, data, images_seen):
    """A callback that evaluates or assesses the run's validation data uses its cached features."""
    model, measured = make_model(backbone, "head"), []
    validation = (data[0][:9], data[1][:9])

    def look(trainer, report):
        measured.append((trainer.evaluate(validation), trainer.assess(validation).accuracy, report))

    make_trainer(model, cache=True).fit(data, validation_data=validation, epochs=2, callbacks=[look], verbose=0)
    assert sum(count for count, _ in images_seen) == 24  # the validation images are among the training images
    for figures, accuracy, report in measured:
        assert figures == {"loss": report.val_loss, "accuracy": report.val_accuracy}
        assert accuracy == report.val_accuracy
