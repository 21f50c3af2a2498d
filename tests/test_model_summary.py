"""The table of a model's layers."""

import copy

import pytest
import torch
from torch import nn

import transferkit as tk
from transferkit.errors import ArgumentError


def layers(model):
    return {layer.name: layer for layer in tk.summary(model).layers}


def test_totals_are_those_of_the_model(model):
    """Parameters add up to the model's, trainable ones too."""
    table = tk.summary(tk.freeze_until(model, "block4"))
    assert table.num_parameters == sum(p.numel() for p in model.parameters())
    assert sum(layer.num_parameters for layer in table.layers) == table.num_parameters
    assert table.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(table.share(layer) for layer in table.layers) == pytest.approx(1.0)


def test_shapes_and_arithmetic_of_known_layers(model):
    """A convolution's multiply-adds are outputs times kernel size, a fully connected layer's its weights."""
    table = layers(model)
    assert (table["block1_conv1"].output_shape, table["block1_conv1"].multiply_adds) == ((4, 32, 32), 4 * 32 * 32 * 27)
    assert (table["block3_conv1"].output_shape, table["block3_conv1"].multiply_adds) == ((8, 8, 8), 8 * 8 * 8 * 36)
    assert (table["head.fc1"].output_shape, table["head.fc1"].multiply_adds) == ((16,), 16 * 72)
    assert table["block1_pool"].multiply_adds == 0


@pytest.mark.parametrize(("boundary", "cached"), [(None, 0), ("block3", 6), ("head", 15)])
def test_cached_layers_are_the_frozen_prefix(model, boundary, cached):
    """Cached layers are the frozen prefix, and what is cached does not train."""
    tk.freeze_until(model, boundary)
    table = tk.summary(model)
    assert [layer.cached for layer in table.layers[: len(model.backbone.features)]].count(True) == cached
    assert len(model.split()[0]) == cached
    for layer in table.layers:
        assert not (layer.cached and layer.trains)


@pytest.mark.parametrize(
    ("head", "rows", "features"),
    [
        ({"pooling": "flatten"}, 15, 8),
        ({}, 15, 72),
        ({"layers": ["block4", "block1"], "pooling": "max"}, 12, 12),
        ({"layers": ["block3_relu1"], "pooling": "avg"}, 8, 8),
    ],
    ids=["flatten", "default", "shorter", "within a block"],
)
def test_the_layers_of_the_head_decide_where_the_table_ends(backbone, head, rows, features):
    """The backbone's rows end with the last layer that the head takes, with the shapes of the layers themselves."""
    model = tk.attach_head(backbone, 3, **head)
    table = tk.summary(tk.freeze_until(model, "block2"))
    own = [layer for layer in table.layers if not layer.name.startswith("head.")]
    assert [layer.name for layer in own] == list(model.backbone.layer_names)
    assert len(own) == rows
    assert own[-1].output_shape == model.backbone.feature_shape
    assert [layer.name for layer in own if layer.cached] == ["block1_conv1", "block1_relu1", "block1_pool"]
    assert layers(model)["head.flatten"].output_shape == (features,)
    assert ("head.standardize" in layers(model)) == (head.get("pooling") != "flatten")
    assert table.num_parameters == sum(p.numel() for p in model.parameters())
    assert sum(layer.num_parameters for layer in table.layers) == table.num_parameters


def test_a_hook_on_the_backbone_leaves_nothing_cached(model):
    """Where `fit` caches nothing, because a hook would not be called, no layer is marked as cached."""
    tk.freeze_until(model, "head").backbone.register_forward_hook(lambda *_: None)
    assert not any(layer.cached for layer in tk.summary(model).layers)
    assert "0% of them cached" in str(tk.summary(model))


def test_the_model_is_as_it_was(make_backbone):
    """Weights, statistics, modes, hooks and random numbers are as they were, also where modes differ."""
    model = tk.attach_head(make_backbone(batch_norm=True), 3, hidden=(8,), dropout=0.5).train()
    model.head.dropout1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    tk.summary(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


class Twice(nn.Module):
    """A head that uses one module twice and has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.wide, self.narrow = nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, features):
        return self.narrow(self.wide(self.wide(self.flatten(features)))) * self.scale


def test_a_head_of_ones_own(backbone):
    """A module used twice has two rows, and totals count every parameter of the model once."""
    model = tk.attach_head(backbone, 3, head=Twice())
    table = tk.summary(model)
    assert [layer.name for layer in table.layers].count("head.wide") == 2
    assert table.num_parameters == sum(p.numel() for p in model.parameters())


def test_a_backbone_alone(backbone):
    """A backbone without a head has a table too; none of its layers is cached yet."""
    table = tk.summary(tk.freeze_until(backbone, "block3"))
    assert len(table.layers) == len(backbone.features)
    assert not any(layer.cached for layer in table.layers)


def test_it_prints_one_line_a_layer(model):
    """The text has a heading, a line for each layer and one for the whole; HTML has as many rows."""
    table = tk.summary(tk.freeze_until(model, "head"))
    lines = str(table).splitlines()
    assert len(lines) == len(table.layers) + 2
    assert "frozen, cached" in lines[1]
    assert lines[-1].startswith(f"{table.num_parameters:,} parameters, {table.num_trainable:,} train; ")
    assert repr(table) == str(table)
    assert table._repr_html_().count("<tr>") == len(table.layers) + 1


def test_something_else_is_refused():
    """Another module is refused by name."""
    with pytest.raises(ArgumentError, match="model is a Linear: expected a Backbone"):
        tk.summary(nn.Linear(2, 2))
