"""`probe`: every block's features scored by a solved head, before any training."""

import pytest
import torch

import transferkit as tk
from tiny import CLASSES, make_backbone, make_images, weights_of
from transferkit.errors import ArgumentError
from transferkit.linear.choice import solve
from transferkit.linear.table import Table

PLAIN = {"device": "cpu", "precision": "fp32", "verbose": 0, "classes": CLASSES}


def test_a_score_is_that_of_the_head_on_those_layers_alone():
    """Each score is what cross-validation gives a head on the pooled features of these blocks."""
    data = make_images(48)
    found = tk.probe(make_backbone(), data, **PLAIN)
    for score in found.scores:
        model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, layers=score.layers), "head")
        features = tk.cache_features(model, data, device="cpu", precision="fp32").features
        table = Table.of_tensor(features, columns=model.columns)
        solved = solve(table, data[1], tk.CrossEntropy(), classes=3)
        best = min(solved.path, key=lambda strength: strength.loss)
        assert (score.accuracy, score.l2) == (best.accuracy, best.l2)
        assert score.loss == pytest.approx(best.loss, rel=1e-4)


def test_every_block_is_scored_alone_and_the_last_ones_together():
    """Five blocks give five scores of one, and one each of the last two to five."""
    sets = [score.layers for score in tk.probe(make_backbone(), make_images(24), **PLAIN).scores]
    blocks = ("block1", "block2", "block3", "block4", "block5")
    assert sets == [(block,) for block in blocks] + [blocks[-count:] for count in (2, 3, 4, 5)]


def test_the_backbone_is_left_as_it_was():
    """Weights, what is frozen, modes and preprocessing stay, whatever image sizes are tried."""
    backbone = tk.freeze_until(make_backbone(batch_norm=True).train(), "block3")
    before = weights_of(backbone), [p.requires_grad for p in backbone.parameters()], backbone.preprocess
    modes = [module.training for module in backbone.modules()]
    tk.probe(backbone, make_images(24), image_sizes=(32, 64), **PLAIN)
    assert all(torch.equal(value, before[0][name]) for name, value in backbone.state_dict().items())
    assert [p.requires_grad for p in backbone.parameters()] == before[1]
    assert backbone.preprocess == before[2]
    assert [module.training for module in backbone.modules()] == modes


def test_image_sizes_are_compared():
    """Each size is a pass of its own, with scores of its own."""
    found = tk.probe(make_backbone(), make_images(24), image_sizes=(32, 64), **PLAIN)
    assert [score.image_size for score in found.scores] == [32] * 9 + [64] * 9
    assert sorted(found.feature_seconds) == [32, 64]


def test_the_best_has_the_lowest_loss():
    """`best` is the score that cross-validation likes best, and the table shows all of them."""
    found = tk.probe(make_backbone(), make_images(48), **PLAIN)
    assert found.best.loss == min(score.loss for score in found.scores)
    assert str(found).count("±") == len(found.scores)
    assert found._repr_html_().count("<tr>") == len(found.scores) + 1


def test_a_picture_shows_each_set_with_its_error():
    """The plot has a row for each set of blocks and a series for each size."""
    pytest.importorskip("matplotlib")
    axes = tk.probe(make_backbone(), make_images(24), image_sizes=(32, 64), **PLAIN).plot().axes[0]
    assert len(axes.get_yticklabels()) == 9
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["32 px", "64 px"]


@pytest.mark.parametrize("arguments", [{"folds": 1}, {"image_sizes": (16,)}, {"seed": -1}])
def test_values_out_of_range_are_refused(arguments):
    """A number that makes no sense is refused by name."""
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        tk.probe(make_backbone(), make_images(24), **PLAIN, **arguments)


def test_something_else_than_a_backbone_is_refused():
    """A model with a head is refused; the message says what is expected."""
    with pytest.raises(ArgumentError, match=r"backbone is a TransferModel: expected a Backbone from load_backbone"):
        tk.probe(tk.attach_head(make_backbone(), 3), make_images(24), **PLAIN)
