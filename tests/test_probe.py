"""`probe`: every block's features scored by a solved head, before any training."""

import pytest
import torch

import transferkit as tk
from tiny import CLASSES, make_backbone, make_images, weights_of
from transferkit.errors import ArgumentError
from transferkit.linear.choice import solve
from transferkit.linear.table import Table

PLAIN = {"device": "cpu", "precision": "fp32", "verbose": 0, "classes": CLASSES}
BLOCKS = ("block1", "block2", "block3", "block4", "block5")
SETS = [(block,) for block in BLOCKS] + [BLOCKS[-count:] for count in (2, 3, 4, 5)]


def test_a_score_is_that_of_the_head_on_those_layers_alone():
    """Each score is what cross-validation gives a head on the pooled features of these blocks; the best has least loss.

    Every block is scored alone, then the last two to five together, and the table shows all of them.
    """
    data = make_images(48)
    found = tk.probe(make_backbone(), data, **PLAIN)
    assert [score.layers for score in found.scores] == SETS
    for score in found.scores:
        model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, layers=score.layers), "head")
        features = tk.cache_features(model, data, device="cpu", precision="fp32").features
        table = Table.of_tensor(features, columns=model.columns)
        solved = solve(table, data[1], tk.CrossEntropy(), classes=3)
        best = min(solved.path, key=lambda strength: strength.loss)
        assert (score.accuracy, score.l2) == (best.accuracy, best.l2)
        assert score.loss == pytest.approx(best.loss, rel=1e-4)
    assert found.best.loss == min(score.loss for score in found.scores)
    assert str(found).count("±") == len(found.scores)
    assert found._repr_html_().count("<tr>") == len(found.scores) + 1


def test_image_sizes_are_compared_and_the_backbone_is_left_as_it_was():
    """Each size is a pass with scores of its own; weights, what is frozen, modes and preprocessing stay."""
    pytest.importorskip("matplotlib")
    backbone = tk.freeze_until(make_backbone(batch_norm=True).train(), "block3")
    before = weights_of(backbone), [p.requires_grad for p in backbone.parameters()], backbone.preprocess
    modes = [module.training for module in backbone.modules()]
    found = tk.probe(backbone, make_images(24), image_sizes=(32, 64), **PLAIN)
    assert [(score.layers, score.image_size) for score in found.scores] == [
        (s, size) for size in (32, 64) for s in SETS
    ]
    assert sorted(found.feature_seconds) == [32, 64]
    axes = found.plot().axes[0]
    assert len(axes.get_yticklabels()) == 9
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["32 px", "64 px"]
    assert all(torch.equal(value, before[0][name]) for name, value in backbone.state_dict().items())
    assert [p.requires_grad for p in backbone.parameters()] == before[1]
    assert backbone.preprocess == before[2]
    assert [module.training for module in backbone.modules()] == modes


@pytest.mark.parametrize(
    "arguments",
    [
        {"folds": 1},
        {"image_sizes": (16,)},
        {"image_sizes": 32},
        {"image_sizes": []},
        {"image_sizes": "32"},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_refused(arguments):
    """A number that makes no sense is refused by name."""
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        tk.probe(make_backbone(), make_images(24), **PLAIN, **arguments)


@pytest.mark.parametrize("call", [tk.probe, tk.audit])
def test_something_else_than_a_backbone_is_refused(call):
    """A model with a head is refused; the message says what is expected."""
    with pytest.raises(ArgumentError, match=r"backbone is a TransferModel: expected a Backbone from load_backbone"):
        call(tk.attach_head(make_backbone(), 3), make_images(24), **PLAIN)


@pytest.mark.parametrize("call", [tk.probe, tk.audit])
def test_a_device_that_contradicts_the_precision_is_refused(call):
    """A `Device` has a precision of its own: another one beside it is no silent choice of either."""
    arguments = {**PLAIN, "device": tk.Device("cpu", precision="fp32"), "precision": "bf16"}
    with pytest.raises(ArgumentError, match="precision='bf16' contradicts"):
        call(make_backbone(), make_images(24), **arguments)
