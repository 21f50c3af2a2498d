"""New heads, heads of the user's own, and the cut between what is frozen and what trains."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import transferkit as tk
from tiny import make_images
from transferkit.errors import ArgumentError, HeadMismatchError, UnknownLayerError

Maker = Callable[..., tk.Backbone]


POOLINGS = ["flatten", "avg", "max", "avgmax", "halves"]


# --- the built-in head


def halves(output: Tensor) -> list[Tensor]:
    """Means of the upper and the lower half of the rows; a middle row is in both."""
    height = output.shape[2]
    return [output[:, :, : (height + 1) // 2].mean(dim=(2, 3)), output[:, :, height // 2 :].mean(dim=(2, 3))]


@pytest.mark.parametrize("hidden", [(), (16,), (16, 8)])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_have_one_column_for_each_class(make_backbone: Maker, pooling: str, hidden: tuple[int, ...]) -> None:
    """Every pooling with any number of hidden layers gives (N, classes), for features of more than one position."""
    model = tk.attach_head(make_backbone(image_size=96), 5, hidden=hidden, pooling=pooling)
    widths = [
        {"flatten": 8 * 3 * 3, "avgmax": 2 * (8 + 8 + 8), "halves": 3 * (8 + 8 + 8)}.get(pooling, 8 + 8 + 8),
        *hidden,
        5,
    ]

    assert tuple(model(torch.randn(2, 3, 96, 96)).shape) == (2, 5)
    linear = [module for module in model.head if isinstance(module, nn.Linear)]
    assert [(module.in_features, module.out_features) for module in linear] == list(itertools.pairwise(widths))


@pytest.mark.parametrize(
    ("pooling", "pooled"),
    [
        ("avg", lambda output: output.mean(dim=(2, 3))),
        ("max", lambda output: output.amax(dim=(2, 3))),
        ("avgmax", lambda output: torch.cat([output.mean(dim=(2, 3)), output.amax(dim=(2, 3))], dim=1)),
        ("halves", lambda output: torch.cat([*halves(output), output.amax(dim=(2, 3))], dim=1)),
    ],
)
def test_pooling_is_over_positions(make_backbone: Maker, pooling: str, pooled: Callable[[Tensor], Tensor]) -> None:
    """The logits are those of the pooling that the head is called, of blocks 3, 4 and 5 in this order."""
    model = tk.attach_head(make_backbone(image_size=96), 5, pooling=pooling)
    images = torch.randn(4, 3, 96, 96)
    outputs = [images]
    for layer in model.backbone.features:
        outputs.append(layer(outputs[-1].clone()))  # a copy: ReLUs work in place
    blocks = [pooled(outputs[place + 1]) for place in (8, 11, 14)]

    assert [len(block[0, 0]) for block in (outputs[9], outputs[12], outputs[15])] == [12, 6, 3]
    torch.testing.assert_close(model(images), model.head.logits(torch.cat(blocks, dim=1)))  # sums in another order


def test_flattened_features_keep_every_position(make_backbone: Maker) -> None:
    """With pooling="flatten" the head is one linear layer on every number of the last block alone."""
    model = tk.attach_head(make_backbone(image_size=96), 5, pooling="flatten")
    features = torch.randn(4, 8, 3, 3)

    assert torch.equal(model.head(features), model.head.logits(features.flatten(1)))
    assert model.layers == ()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_layers_have_names_by_number(backbone: tk.Backbone, pooling: str) -> None:
    """The head's layers are standardize if it pools, fc1, relu1, dropout1, fc2, ... and logits."""
    model = tk.attach_head(backbone, 2, hidden=(16, 8), dropout=0.25, pooling=pooling)

    assert [name for name, _ in model.head.named_children()] == [
        "flatten",
        *(["standardize"] if pooling != "flatten" else []),
        *("fc1", "relu1", "dropout1", "fc2", "relu2", "dropout2", "logits"),
    ]
    assert model.head.dropout1.p == model.head.dropout2.p == 0.25


def test_without_dropout_there_is_no_dropout_layer(backbone: tk.Backbone) -> None:
    """dropout=0 adds no layer, and the last layer has neither ReLU nor dropout behind it."""
    assert [n for n, _ in tk.attach_head(backbone, 2).head.named_children()] == ["flatten", "standardize", "logits"]
    assert [n for n, _ in tk.attach_head(backbone, 2, hidden=(16,)).head.named_children()] == [
        *("flatten", "standardize", "fc1", "relu1", "logits")
    ]


def test_without_hidden_layers_features_are_dropped(backbone: tk.Backbone) -> None:
    """dropout= of a linear head drops features, in training only."""
    head = tk.attach_head(backbone, 2, dropout=0.5).head
    features = torch.randn(2, 72, 1, 1)

    assert [name for name, _ in head.named_children()] == ["flatten", "standardize", "dropout", "logits"]
    assert not torch.equal(head(features), head(features))
    assert torch.equal(head.eval()(features), head.logits(features.flatten(1)))


def test_features_are_standardised_once_they_are_measured(backbone: tk.Backbone) -> None:
    """A new head leaves features as they are; with mean and std it subtracts the one and divides by the other."""
    head = tk.attach_head(backbone, 2).head
    features = torch.randn(6, 72, 1, 1)
    assert torch.equal(head(features), head.logits(features.flatten(1)))

    head.standardize.mean.copy_(torch.linspace(-1, 1, 72))
    head.standardize.std.copy_(torch.linspace(0.5, 2, 72))

    standardized = (features.flatten(1) - torch.linspace(-1, 1, 72)) / torch.linspace(0.5, 2, 72)
    assert torch.equal(head(features), head.logits(standardized))
    assert torch.equal(head.eval()(features), head.logits(standardized))


def test_standardising_trains_nothing(backbone: tk.Backbone) -> None:
    """Mean, std and the number of images are saved with the model and are no parameters."""
    model = tk.attach_head(backbone, 2)

    assert {name for name, _ in model.head.named_buffers()} == {
        *("standardize.mean", "standardize.std", "standardize.num_images")
    }
    assert {name for name, _ in model.head.named_parameters()} == {"logits.weight", "logits.bias"}
    assert {f"head.{name}" for name, _ in model.head.named_buffers()} < set(model.state_dict())


def test_hidden_dropout_is_active_in_training_only(backbone: tk.Backbone) -> None:
    """Dropout changes logits from call to call in training mode and not in eval mode."""
    model = tk.attach_head(backbone, 2, hidden=(64,), dropout=0.5)
    features = torch.randn(2, 72, 1, 1)

    assert not torch.equal(model.head(features), model.head(features))
    assert torch.equal(model.eval().head(features), model.head(features))


def test_full_vgg16_head_has_25088_inputs() -> None:
    """VGG16 at 224 pixels flattens to 512 * 7 * 7 inputs, and pools to 256 + 512 + 512, by two means and a maximum."""
    backbone = tk.load_backbone("vgg16", weights=None)

    assert tk.attach_head(backbone, 10, hidden=(16,), pooling="flatten").head.fc1.in_features == 25_088
    assert tk.attach_head(backbone, 10, hidden=(16,)).head.fc1.in_features == 3 * 1_280


def test_heads_follow_the_seed(backbone: tk.Backbone) -> None:
    """The same seed gives the same initial head, another seed another."""
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(tk.attach_head(backbone, 3).head.logits.weight)

    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_model_is_head_after_backbone(backbone: tk.Backbone, pooling: str) -> None:
    """model(x) is head(backbone(x)), bit for bit, of the pooled outputs where the head pools."""
    model = tk.attach_head(backbone, 3, hidden=(16,), pooling=pooling)
    images = torch.randn(2, 3, 32, 32)
    features = model.backbone(images, model.pools)

    assert tuple(features.shape) == (2, {"flatten": 8, "avgmax": 48, "halves": 72}.get(pooling, 24), 1, 1)
    assert torch.equal(model(images), model.head(features))


def test_the_backbone_is_not_copied(backbone: tk.Backbone) -> None:
    """The model's backbone is the one given, its frozen layers as they were."""
    model = tk.attach_head(tk.freeze_until(backbone, "block3"), 2)

    assert model.backbone is backbone
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        f"backbone.features.{place}.{kind}" for place in (0, 3) for kind in ("weight", "bias")
    ]


# --- classes


def test_classes_by_name(backbone: tk.Backbone) -> None:
    """Class names are kept in their order."""
    assert tk.attach_head(backbone, ["owl", "cat", "dog"]).classes == ("owl", "cat", "dog")


def test_classes_by_number(backbone: tk.Backbone) -> None:
    """A number of classes names them "0", "1", ..."""
    assert tk.attach_head(backbone, 3).classes == ("0", "1", "2")


@pytest.mark.parametrize("number", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_number_of_classes_may_be_any_whole_number(backbone: tk.Backbone, number: int) -> None:
    """A number of classes computed with numpy or torch (labels.max() + 1) serves like an int."""
    assert tk.attach_head(backbone, number).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ({"owl": 2, "cat": 0, "dog": np.int64(1)}, ("cat", "dog", "owl")),
        ({"owl": 2, "cat": 0, "dog": 1}.keys(), ("owl", "cat", "dog")),
        (np.array(["owl", "cat"]), ("owl", "cat")),
        (np.array([2, 5]), ("2", "5")),
        (torch.tensor([2, 5]), ("2", "5")),
        (list(torch.tensor([2, 5])), ("2", "5")),
        ({"owl": 7, "cat": 9}.keys(), ("owl", "cat")),
    ],
    ids=str,
)
def test_names_may_come_in_many_types(backbone: tk.Backbone, classes: Any, names: tuple[str, ...]) -> None:
    """Names keep their order; those of a `class_to_idx` take that of its indices; labels of torch are as of numpy."""
    assert tk.attach_head(backbone, classes).classes == names


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (1, r"got 1 classes \(0\): expected 2 or more.*\[\"no\", \"yes\"\]"),
        (0, r"got 0 classes: expected 2 or more.*\[\"no\", \"yes\"\]"),
        (-4, r"got 0 classes: expected 2 or more"),
        (True, r"expected 2 or more"),
        (["cat"], r"got 1 classes \(cat\): expected 2 or more.*\[\"no\", \"yes\"\]"),
        ([], r"got 0 classes: expected 2 or more"),
        ("abc", r"classes='abc' cannot be used: expected a list of class names, or their number"),
        (["cat", "dog", "cat"], r"class names repeat: cat\. Expected 3 different names"),
        (10.0, r"classes=10\.0.*expected"),
        (None, r"classes=None.*expected"),
        ({"cat", "dog"}, r"classes=\{.*cannot be used: expected.*no order, pass sorted\(classes\)"),
        (frozenset("ab"), r"cannot be used: expected.*no order, pass sorted\(classes\)"),
        ({"cat": 0, "dog": 2}, r"cannot be used: expected.*a mapping has the indices 0, 1, ..., each once"),
        ({0: "cat", 1: "dog"}, r"cannot be used: expected.*a mapping has the indices 0, 1, ..., each once"),
        ({"cat": 0, "dog": [1]}, r"cannot be used: expected.*a mapping has the indices 0, 1, ..., each once"),
        (b"ab", r"classes=b'ab' cannot be used: expected a list of class names"),
        (torch.tensor(3.0), r"classes=tensor\(3.\) cannot be used: expected a list of class names"),
        (["cat", None], r"cannot be used: expected a list.*Names are text or whole numbers"),
        (np.array([0.0, math.nan]), r"cannot be used: expected.*Names are text or whole numbers"),
        (torch.eye(2), r"cannot be used: expected.*Names are text or whole numbers"),
        ([b"cat", b"dog"], r"cannot be used: expected.*Names are text"),
    ],
)
def test_unusable_classes_are_refused(backbone: tk.Backbone, classes: object, message: str) -> None:
    """Fewer than two classes, one string, repeated names and what is neither number nor list are refused."""
    for call in (tk.attach_head, lambda *a: tk.fine_tune(a[0], make_images(), classes=a[1], verbose=0)):
        if classes is not None or call is tk.attach_head:
            with pytest.raises(ArgumentError, match=message):
                call(backbone, classes)  # type: ignore[arg-type]


# --- arguments


@pytest.mark.parametrize("hidden", [(0,), (16, -1), (16.0,), (True,), ("16",), 16])
def test_unusable_widths_are_refused(backbone: tk.Backbone, hidden: object) -> None:
    """A width that is no whole number of 1 or more, or a number in place of a list, is refused."""
    with pytest.raises(ArgumentError, match=r"hidden.*expected"):
        tk.attach_head(backbone, 2, hidden=hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [1.0, -0.1, 50, float("nan")])
def test_unusable_dropout_is_refused(backbone: tk.Backbone, dropout: float) -> None:
    """A fraction of 1 or more, a negative one, a percentage and nan are refused with the range."""
    with pytest.raises(ArgumentError, match=rf"dropout={dropout!r} is out of range: expected a fraction from 0 up to"):
        tk.attach_head(backbone, 2, hidden=(8,), dropout=dropout)


@pytest.mark.parametrize(
    ("pooling", "remedy"),
    [("average", "Did you mean 'avg'"), ("sum", "Known: 'avg', 'max', 'avgmax', 'halves', 'flatten'")],
)
def test_unknown_pooling_is_refused(backbone: tk.Backbone, pooling: str, remedy: str) -> None:
    """A misspelt pooling is refused with the poolings there are."""
    with pytest.raises(ArgumentError, match=rf"pooling='{pooling}' is not known.*{remedy}"):
        tk.attach_head(backbone, 2, pooling=pooling)


def test_a_second_head_is_refused(model: tk.TransferModel) -> None:
    """A model that has a head already is refused with the way to its backbone."""
    with pytest.raises(HeadMismatchError, match=r"to a TransferModel: expected a Backbone.*pass model\.backbone"):
        tk.attach_head(model, 2)  # type: ignore[arg-type]


def test_another_module_is_refused() -> None:
    """A module that is no backbone is refused with the function that makes one."""
    with pytest.raises(HeadMismatchError, match=r"to a Linear: expected a Backbone from load_backbone\.$"):
        tk.attach_head(nn.Linear(2, 2), 2)  # type: ignore[arg-type]


# --- a head of one's own


def own_head(inputs: int = 8, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(inputs), nn.Dropout(0.5), nn.Linear(inputs, outputs))


def test_an_own_head_is_used_as_it_is(backbone: tk.Backbone) -> None:
    """A head that fits becomes the model's head, and no arguments are kept for it."""
    head = own_head()

    model = tk.attach_head(backbone, 3, head=head)

    assert model.head is head
    assert model.head_arguments is None
    assert tuple(model(torch.randn(2, 3, 32, 32)).shape) == (2, 3)


def test_built_in_arguments_are_kept_for_checkpoints(backbone: tk.Backbone) -> None:
    """Of a built-in head the arguments are kept that build it again."""
    model = tk.attach_head(backbone, 3, hidden=(16, 8), dropout=0.25, pooling="max")

    assert model.head_arguments == {"hidden": [16, 8], "dropout": 0.25, "pooling": "max"}


@pytest.mark.parametrize("training", [True, False])
def test_checking_an_own_head_leaves_it_as_it_was(backbone: tk.Backbone, *, training: bool) -> None:
    """The check changes no statistics, no gradient, no random number and no module's mode."""
    head = own_head().train(training)
    head[1].eval()
    before = copy.deepcopy(head.state_dict())
    modes = [module.training for module in head.modules()]
    random_numbers = torch.get_rng_state()

    tk.attach_head(backbone, 3, head=head)

    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert [module.training for module in head.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(parameter.grad is None for parameter in head.parameters())


def test_a_refused_head_keeps_its_mode(backbone: tk.Backbone) -> None:
    """A head that does not fit is in the mode it was in."""
    head = own_head(inputs=9)

    with pytest.raises(HeadMismatchError, match=r"expected|Expected"):
        tk.attach_head(backbone, 3, head=head)
    assert all(module.training for module in head.modules())


@pytest.mark.parametrize(
    "head",
    [own_head(inputs=9), nn.Linear(8, 3), nn.Sequential(nn.Flatten(), nn.Linear(25_088, 3))],
    ids=["norm", "not flat", "other image size"],
)
def test_a_head_for_other_features_is_refused(backbone: tk.Backbone, head: nn.Module) -> None:
    """A head that does not take the features is refused with their shape and the layer to begin with."""
    with pytest.raises(
        HeadMismatchError,
        match=r"does not accept the backbone's features: .*inputs \(N, 8, 1, 1\); start it with nn\.Flat",
    ):
        tk.attach_head(backbone, 3, head=head)


class Pair(nn.Module):
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features, features


@pytest.mark.parametrize(
    ("head", "got"),
    [
        (own_head(outputs=4), r"\(2, 4\)"),
        (nn.Identity(), r"\(2, 8, 1, 1\)"),
        (Pair(), "tuple"),
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.Flatten(0)), r"\(6,\)"),
    ],
    ids=["count", "features", "tuple", "flat"],
)
def test_a_head_for_other_classes_is_refused(backbone: tk.Backbone, head: nn.Module, got: str) -> None:
    """A head that gives anything but one logit for each image and class is refused with got and expected."""
    with pytest.raises(
        HeadMismatchError,
        match=rf"head returns {got} for 2 images: expected logits of shape \(2, 3\).*last layer, or cla",
    ):
        tk.attach_head(backbone, 3, head=head)


@pytest.mark.parametrize("argument", [{"hidden": (8,)}, {"dropout": 0.5}, {"pooling": "avg"}, {"pooling": "flatten"}])
def test_an_own_head_and_built_in_arguments_exclude_each_other(backbone: tk.Backbone, argument: dict) -> None:
    """Arguments of the built-in head together with a head of one's own are refused, not ignored."""
    with pytest.raises(ArgumentError, match=r"describe the built-in head: pass these or head="):
        tk.attach_head(backbone, 3, head=own_head(), **argument)


# --- the layers that it takes


@pytest.mark.parametrize(
    ("layers", "names", "numbers"),
    [
        (None, ["block3_pool", "block4_pool", "block5_pool"], 8 + 8 + 8),
        (["block5"], ["block5_pool"], 8),
        (("block4", "block5"), ["block4_pool", "block5_pool"], 8 + 8),
        (["block5", "block1", "block3"], ["block1_pool", "block3_pool", "block5_pool"], 4 + 8 + 8),
        (["block5_relu1", "block2_conv1"], ["block2_conv1", "block5_relu1"], 4 + 8),
        (["block4_pool", "block3_relu1"], ["block3_relu1", "block4_pool"], 8 + 8),
        ({"block4": 1}.keys(), ["block4_pool"], 8),
        (np.array(["block4", "block2"]), ["block2_pool", "block4_pool"], 4 + 8),
    ],
    ids=["default", "one", "several", "unordered", "named", "block and layer", "keys", "array"],
)
@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax"])
def test_the_head_takes_the_layers_it_is_given(
    backbone: tk.Backbone, layers: object, names: list[str], numbers: int, pooling: str
) -> None:
    """Blocks and layers of any order are taken in forward order; a block is its last layer."""
    model = tk.attach_head(backbone, 3, layers=layers, pooling=pooling)  # type: ignore[arg-type]
    images, pooled = torch.randn(2, 3, 32, 32), []
    output = images
    for name, layer in zip(model.backbone.layer_names, model.backbone.features, strict=True):
        output = layer(output.clone())  # a copy: ReLUs work in place
        pooled += [output.mean(dim=(2, 3))] if name in names and pooling != "max" else []
        pooled += [output.amax(dim=(2, 3))] if name in names and pooling != "avg" else []

    assert model.layers == tuple(names)
    assert model.head.logits.in_features == numbers * (2 if pooling == "avgmax" else 1)
    torch.testing.assert_close(model(images), model.head.logits(torch.cat(pooled, dim=1)))


@pytest.mark.parametrize(
    ("last", "modules"), [("block5", 15), ("block4", 12), ("block3_relu1", 8), ("block3_conv1", 7), ("block1", 3)]
)
def test_the_backbone_ends_with_the_last_layer_taken(backbone: tk.Backbone, last: str, modules: int) -> None:
    """Layers behind the last one taken are not part of the model; the others are the backbone's own."""
    model = tk.attach_head(backbone, 3, layers=["block1_relu1", last])
    names = backbone.layer_names[:modules]

    assert [*model.backbone.features] == [*backbone.features][:modules]
    assert model.backbone.layer_names == names
    assert (model.backbone.name, model.backbone.preprocess) == (backbone.name, backbone.preprocess)
    assert (model.backbone is backbone) == (last == "block5")
    assert len(backbone.features) == 15
    assert tuple(model(torch.randn(2, 3, 32, 32)).shape) == (2, 3)
    assert model.backbone.feature_shape == tuple(model.backbone(torch.randn(1, 3, 32, 32)).shape[1:])


def test_a_shorter_backbone_is_frozen_as_the_whole_one_was(make_backbone: Maker) -> None:
    """Layers that were frozen before stay frozen and in eval mode, and a model of fewer layers is frozen like any."""
    backbone = tk.freeze_until(make_backbone(batch_norm=True), "block2")
    model = tk.attach_head(backbone, 3, layers=["block3"]).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    assert [module.training for module in norms] == [False, True, True]
    assert len(model.split()[0]) == 4
    assert len(tk.freeze_until(model, "head").split()[0]) == len(model.backbone.features) == 12
    assert [parameter.requires_grad for parameter in model.head.parameters()] == [True, True]
    with pytest.raises(UnknownLayerError, match=r"until layer 'block4'.*no such layer. Did you mean 'block3'"):
        tk.freeze_until(model, "block4")


def test_blocks_of_a_shorter_backbone_are_the_last_three(backbone: tk.Backbone) -> None:
    """A head for a backbone that another head shortened takes the last three blocks that there are."""
    model = tk.attach_head(tk.attach_head(backbone, 2, layers=["block4_conv1"]).backbone, 3)

    assert model.layers == ("block2_pool", "block3_pool", "block4_conv1")


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["block4", "blok5"], UnknownLayerError, r"output of layer 'blok5': tiny has no such.*Did you mean 'block5'"),
        (["block3_relu2"], UnknownLayerError, r"layer 'block3_relu2': tiny has no such layer. Did you mean 'block3_re"),
        (["block6"], UnknownLayerError, r"output of layer 'block6': tiny has no such layer"),
        (["head"], UnknownLayerError, r"output of layer 'head': tiny has no such layer"),
        (["block"], UnknownLayerError, r"output of layer 'block': tiny has no such layer"),
        ([4], UnknownLayerError, r"output of layer 4: tiny has no such layer"),
        (["block4", "block5", "block4"], ArgumentError, r"'block5', 'block4'\] name block4_pool twice"),
        (["block4", "block4_pool"], ArgumentError, r"\['block4', 'block4_pool'\] name block4_pool twice"),
        ("block4", ArgumentError, r"layers='block4' cannot be used: expected a list of names, such as \[\"block4"),
        ([], ArgumentError, r"layers=\[\] cannot be used: expected a list of names"),
        ((), ArgumentError, r"layers=\(\) cannot be used: expected a list of names"),
        (4, ArgumentError, r"layers=4 cannot be used: expected a list of names"),
        (True, ArgumentError, r"layers=True cannot be used: expected a list of names"),
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [False, True], ids=["built-in", "own head"])
def test_unusable_layers_are_refused(
    backbone: tk.Backbone, layers: object, error: type[Exception], message: str, *, own: bool
) -> None:
    """Layers that are misspelt, named twice, one string, none or no list are refused with what was expected."""
    with pytest.raises(error, match=message):
        tk.attach_head(backbone, 2, layers=layers, head=own_head() if own else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [["block5"], ["block4", "block5"], []])
def test_layers_are_not_flattened(backbone: tk.Backbone, layers: list[str]) -> None:
    """pooling="flatten" takes the last block as it is, and refuses layers= with what to do."""
    with pytest.raises(ArgumentError, match=r"layers=\[.*\] cannot be flattened: .*the last block alone. Leave layers"):
        tk.attach_head(backbone, 2, layers=layers, pooling="flatten")


def test_an_own_head_takes_pooled_layers(backbone: tk.Backbone) -> None:
    """With layers= a head of one's own gets their pooled outputs as (N, D, 1, 1), and the backbone ends with them."""
    shapes = []
    head = own_head(inputs=3 * (4 + 8))
    head[0].register_forward_pre_hook(lambda _module, inputs: shapes.append(tuple(inputs[0].shape)))

    model = tk.attach_head(backbone, 3, layers=["block3_relu1", "block2"], head=head)

    assert tuple(model(torch.randn(4, 3, 32, 32)).shape) == (4, 3)
    assert shapes == [(2, 36, 1, 1), (2, 36, 1, 1), (4, 36, 1, 1)]  # the check in both modes, and the images
    assert (model.head, model.head_arguments) == (head, None)
    assert model.layers == ("block2_pool", "block3_relu1")
    assert len(model.backbone.features) == 8


def test_an_own_head_without_layers_takes_the_last_block_as_it_is(make_backbone: Maker) -> None:
    """Without layers= a head of one's own gets the output of the last layer, every position of it."""
    model = tk.attach_head(make_backbone(image_size=64), 3, head=own_head(inputs=8 * 2 * 2))

    assert (model.layers, model.pools) == ((), {})
    assert torch.equal(model.eval()(torch.ones(2, 3, 64, 64)), model.head(model.backbone(torch.ones(2, 3, 64, 64))))


def test_an_own_head_for_other_layers_is_refused(backbone: tk.Backbone) -> None:
    """A head that does not take the pooled outputs is refused with their shape."""
    with pytest.raises(HeadMismatchError, match=r"does not accept the backbone's features: .*inputs \(N, 48, 1, 1\)"):
        tk.attach_head(backbone, 3, layers=["block4", "block5"], head=own_head(inputs=8))


# --- split


@pytest.mark.parametrize(
    ("layer", "length"), [("block1", 0), ("block2", 5), ("block3", 10), ("block4", 17), ("block5", 24), ("head", 31)]
)
def test_vgg16_is_cut_at_its_blocks(layer: str, length: int) -> None:
    """VGG16 is cut behind the pool before the block that trains, and both parts together are the model."""
    model = tk.attach_head(tk.load_backbone("vgg16", weights=None, image_size=32), 3).eval()
    tk.freeze_until(model, layer)
    images = torch.randn(1, 3, 32, 32)
    prefix, suffix = model.split()

    assert len(prefix) == length
    assert length == 0 or isinstance(prefix[-1], nn.MaxPool2d)
    with torch.no_grad():
        assert torch.equal(suffix(prefix(images)), model(images))


@pytest.mark.parametrize("layer", ["block3_conv2", "block3_relu1", "block4_pool", "block5_conv3", "block5_relu3"])
def test_a_cut_within_a_block_falls_behind_a_relu_or_pool(layer: str) -> None:
    """In VGG16 the prefix always ends in a ReLU or a pool, since a ReLU works in place on what lies before it."""
    model = tk.attach_head(tk.load_backbone("vgg16", weights=None, image_size=32), 3)

    prefix, suffix = tk.freeze_until(model, layer).split()

    assert isinstance(prefix[-1], nn.ReLU | nn.MaxPool2d)
    assert isinstance(suffix[0], nn.Conv2d | nn.MaxPool2d | nn.Sequential)


@pytest.mark.parametrize("layer", [None, "block1", "block1_conv1"])
def test_nothing_frozen_gives_an_empty_prefix(model: tk.TransferModel, layer: str | None) -> None:
    """With nothing frozen the prefix is empty and gives the images as they are."""
    prefix, suffix = tk.freeze_until(model, layer).split()
    images = torch.randn(2, 3, 32, 32)

    assert len(prefix) == 0
    assert prefix(images) is images
    assert torch.equal(suffix(images), model(images))


def test_a_frozen_backbone_leaves_the_head_as_suffix(model: tk.TransferModel) -> None:
    """With the backbone frozen the suffix is the head alone."""
    prefix, suffix = tk.freeze_until(model, "head").split()

    assert [*prefix] == [*model.backbone.features]
    assert [*suffix] == [model.head]


def test_a_norm_in_training_mode_ends_the_prefix(make_backbone: Maker) -> None:
    """Frozen by hand, a batch norm in training mode still changes: the prefix ends before it, in eval mode behind."""
    model = tk.attach_head(make_backbone(batch_norm=True), 3)
    model.backbone.requires_grad_(False)

    assert len(model.train().split()[0]) == 1
    assert len(model.eval().split()[0]) == len(model.backbone.features)


def test_dropout_in_training_mode_ends_the_prefix(backbone: tk.Backbone) -> None:
    """A head frozen by hand whose dropout is active is not part of the prefix."""
    model = tk.attach_head(backbone, 3, hidden=(16,), dropout=0.5).requires_grad_(False)

    assert len(model.train().split()[1]) == 1
    assert len(model.eval().split()[1]) == 0


def test_both_parts_share_the_models_parameters(model: tk.TransferModel) -> None:
    """Training the suffix trains the model: the parts hold the model's own parameters."""
    _, suffix = tk.freeze_until(model, "block5").split()

    assert {id(p) for p in suffix.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_splitting_leaves_the_model_as_it_was(model: tk.TransferModel) -> None:
    """Making the parts changes no mode and nothing frozen."""
    tk.freeze_until(model, "block3").train()
    before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]

    model.split()

    assert ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]) == before
