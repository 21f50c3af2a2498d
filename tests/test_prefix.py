"""The frozen prefix: the same bits as the layers themselves, and a digest of all that they depend on."""

import copy
import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets import ImageFolder

import transferkit as tk
from cached import IMPURE, make_model
from transferkit.data.preprocessing import CONVENTIONS
from transferkit.features.cache import FeatureCache
from transferkit.features.prefix import NOTHING_FROZEN, Prefix, pure_prefix
from transferkit.model.layers import Layers

ASSETS = Path(__file__).parent.parent / "examples" / "assets"
CLASSES = ["cat", "dog", "owl"]
BOUNDARIES = ["block2", "block3", "block4_conv1", "block5", "block5_conv1", "head"]
V1 = CONVENTIONS["IMAGENET1K_V1"].with_image_size(32)


HEADS = {
    "avg": {"pooling": "avg"},
    "max": {"pooling": "max"},
    "both": {"pooling": "avgmax"},
    "halves": {"pooling": "halves"},
    "flatten": {"pooling": "flatten"},
    "block5": {"layers": ["block5"]},
    "other layers": {"layers": ["block4", "block5"]},
    "within blocks": {"layers": ["block2_relu1", "block3_conv1", "block5_conv1"]},
    "shorter": {"layers": ["block3", "block4"]},
    "shortest": {"layers": ["block3"]},
}


def frozen_layers(backbone, device, boundary="head", **head):
    model = tk.freeze_until(tk.attach_head(backbone, CLASSES, **head), boundary)
    return device.prepare(model).train().split()[0]


def with_statistics(backbone):
    """Give batch norm statistics that are neither 0 nor 1."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return backbone


def by_hand(layers, inputs, device):
    with torch.no_grad(), device.autocast():
        return layers(inputs)


def inputs_of(data, backbone):
    return backbone.preprocess(data[0])


def make_prefix(layers, device, preprocess=V1):
    return Prefix(layers, preprocess, device=device)


# ---- the output


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gives_the_bits_of_the_layers(make_backbone, data, precision, batch_norm, boundary):
    """The prefix gives, bit for bit and in the device's dtype, what the layers give under autocast."""
    device = tk.Device("cpu", precision)
    backbone = with_statistics(make_backbone(batch_norm=batch_norm))
    layers = frozen_layers(backbone, device, boundary)
    inputs = inputs_of(data, backbone)
    features = make_prefix(layers, device)(inputs)
    expected = by_hand(layers, inputs, device)
    assert features.dtype == expected.dtype == device.dtype
    assert torch.equal(features, expected)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("head", HEADS)
def test_gives_the_bits_of_the_layers_with_what_is_pooled(make_backbone, data, precision, head):
    """Before every layer the prefix gives the bits of the layers, rows of pooled numbers and all, from any start."""
    device = tk.Device("cpu", precision)
    backbone = with_statistics(make_backbone(batch_norm=True))
    layers, inputs = frozen_layers(backbone, device, **HEADS[head]), inputs_of(data, backbone)[:8]
    starts = {first: make_prefix(layers[:first], device)(inputs) for first in range(1, len(layers), 3)}
    for depth in range(1, len(layers) + 1):
        prefix, expected = make_prefix(layers[:depth], device), by_hand(layers[:depth], inputs, device)
        assert torch.equal(prefix(inputs), expected)
        assert prefix.outputs[-1] == (tuple(expected.permute(0, 2, 3, 1).shape[1:]), expected.dtype)
        for first in range(1, depth, 3):
            assert torch.equal(prefix(starts[first], first=first), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_batch_norm_before_the_first_convolution_gives_its_bits(data, precision):
    """A first layer that is no convolution gives its own bits: autocast leaves its input in fp32."""
    device = tk.Device("cpu", precision)
    layers = with_statistics(Layers([nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)]))
    layers = device.prepare(layers.eval().requires_grad_(False))
    inputs = V1(data[0])
    assert torch.equal(make_prefix(layers, device)(inputs), by_hand(layers, inputs, device))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_goes_on_behind_layers_already_computed(make_backbone, data, precision):
    """`first=k` on what the first k layers gave is, bit for bit, the output of all layers, for every k."""
    device = tk.Device("cpu", precision)
    backbone = with_statistics(make_backbone(batch_norm=True))
    layers = frozen_layers(backbone, device)
    prefix, inputs = make_prefix(layers, device), inputs_of(data, backbone)
    whole = prefix(inputs)
    for first in range(len(layers)):
        start = by_hand(layers[:first], inputs, device).clone()
        assert torch.equal(prefix(start, first=first), whole)


@pytest.mark.parametrize("batch_size", [1, 5, 24, 100])
def test_the_batch_size_does_not_matter(backbone, data, batch_size):
    """However many images are computed at once, each gives the same bits in bf16, in its place."""
    device = tk.Device("cpu", "bf16")
    layers = frozen_layers(backbone, device)
    prefix, inputs = make_prefix(layers, device), inputs_of(data, backbone)
    expected = by_hand(layers, inputs, device)
    prefix.batch_size = batch_size
    assert torch.equal(prefix(inputs), expected)


def test_large_images_are_computed_in_smaller_batches():
    """The number of images computed at once falls with their area and never below one."""
    device = tk.Device("cpu", "fp32")
    sizes = [make_prefix(Layers([]), device, V1.with_image_size(size)).batch_size for size in (64, 128, 4096)]
    assert sizes == [128, 32, 1]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_input_is_not_changed(make_backbone, data, precision):
    """Neither images nor features of fewer layers are overwritten, although VGG's ReLUs work in place."""
    device = tk.Device("cpu", precision)
    backbone = make_backbone()
    layers = frozen_layers(backbone, device)
    prefix, inputs = make_prefix(layers, device), inputs_of(data, backbone)
    for first in (0, 1):
        start = by_hand(layers[:first], inputs, device).contiguous(memory_format=torch.channels_last)
        before = start.clone()
        prefix(start, first=first)
        assert torch.equal(start, before)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_layers_stay_as_they_are(make_backbone, data, precision):
    """Making and calling a prefix leaves the model's own layers alone: values, precision, modes, gradients."""
    device = tk.Device("cpu", precision)
    backbone = make_backbone(batch_norm=True)
    layers = frozen_layers(backbone, device)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = make_prefix(layers, device)(inputs_of(data, backbone))
    assert not features.requires_grad
    assert [name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])] == []
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert not any(module.training for module in layers.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_features_can_be_trained_on(backbone, data, precision):
    """The output is an ordinary tensor: what comes behind it can be differentiated."""
    device = tk.Device("cpu", precision)
    features = make_prefix(frozen_layers(backbone, device), device)(inputs_of(data, backbone))
    linear = nn.Linear(3 * (8 + 8 + 8), 3)
    with device.autocast():
        linear(features.flatten(1)).sum().backward()
    assert linear.weight.grad.any()


@pytest.mark.slow
def test_vgg16_gives_one_image_the_same_bits_in_every_batch(tmp_path):
    """In bf16 the features of real images have the same bits in batches of 1, 2, 7, 16, 32 and 64."""
    with zipfile.ZipFile(ASSETS / "cifar10_subset.zip") as archive:
        archive.extractall(tmp_path)
    folder = ImageFolder(tmp_path / "test")
    chosen = range(0, len(folder), len(folder) // 64)
    pixels = torch.stack([torch.from_numpy(np.array(folder[index][0])) for index in chosen])[:64]
    backbone = tk.load_backbone(
        weights=ASSETS / "vgg16_imagenet_features_bf16.pt", preprocessing="IMAGENET1K_FEATURES", image_size=32
    )
    device = tk.Device("cpu", "bf16")
    layers = frozen_layers(backbone, device)
    prefix = make_prefix(layers, device, backbone.preprocess)
    inputs = backbone.preprocess(pixels.permute(0, 3, 1, 2))
    assert len(inputs) == 64
    whole = prefix(inputs)
    assert whole.shape == (64, 3 * (256 + 512 + 512), 1, 1)
    assert torch.equal(whole, by_hand(layers, inputs, device))
    for batch_size in (1, 2, 7, 16, 32):
        assert torch.equal(torch.cat([prefix(part) for part in torch.split(inputs, batch_size)]), whole)


# ---- digests


@pytest.fixture
def layers(make_backbone):
    return frozen_layers(make_backbone(batch_norm=True), tk.Device("cpu", "fp32"))


def digests(layers, *, precision="fp32", preprocess=V1):
    return make_prefix(layers, tk.Device("cpu", precision), preprocess).digests


def same(one, other):
    return [a == b for a, b in zip(one, other, strict=True)]


def test_there_is_a_digest_for_each_number_of_layers(layers):
    """There is one digest for each number of layers from 0 to all, and no two are alike."""
    assert len(set(digests(layers))) == len(layers) + 1


def test_equal_layers_have_equal_digests(layers):
    """A copy of the layers, in another memory layout even, has the same digests."""
    other = copy.deepcopy(layers).to(memory_format=torch.contiguous_format)
    assert digests(other) == digests(layers)


def test_a_shallower_prefix_has_the_first_digests(layers):
    """The digests of the first layers do not depend on how many follow."""
    assert digests(layers[:7]) == digests(layers)[:8]


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "bf16"},
        {"preprocess": V1.with_image_size(64)},
        {"preprocess": CONVENTIONS["IMAGENET1K_FEATURES"].with_image_size(32)},
        {"preprocess": CONVENTIONS["KERAS"].with_image_size(32)},
    ],
    ids=["precision", "image size", "preprocessing", "channel order"],
)
def test_what_comes_before_the_layers_counts(layers, other):
    """Another precision, image size or preprocessing gives other digests throughout."""
    assert not any(same(digests(layers), digests(layers, **other)))


def test_the_version_of_torch_counts(layers, monkeypatch):
    """Another version of torch gives other digests: its kernels may round differently."""
    before = digests(layers)
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert not any(same(before, digests(layers)))


@pytest.mark.parametrize("key", ["4.weight", "4.bias", "5.weight", "5.bias", "5.running_mean", "5.running_var"])
def test_every_weight_and_statistic_counts(layers, key):
    """The smallest change of one number gives other digests from its layer on, and not before."""
    before = digests(layers)
    tensor = layers.state_dict()[key]
    last = (-1,) * tensor.ndim
    tensor[last] = torch.nextafter(tensor[last], torch.tensor(9.0))
    index = int(key.split(".")[0])
    assert same(before, digests(layers)) == [True] * (index + 1) + [False] * (len(layers) - index)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True)),
        (nn.MaxPool2d(2), nn.AvgPool2d(2)),
        (nn.MaxPool2d(2), nn.MaxPool2d(2, stride=1)),
        (nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=1e-3)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, dilation=2)),
        (nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(2)),
        (nn.AvgPool2d(2), nn.AvgPool2d(2, divisor_override=1)),
        (nn.AvgPool2d(3, padding=1), nn.AvgPool2d(3, padding=1, count_include_pad=False)),
        (nn.AvgPool2d(3), nn.AvgPool2d(3, ceil_mode=True)),
        (nn.AvgPool2d([2, 2]), nn.AvgPool2d([2, 4])),
    ],
    ids=lambda layer: str(layer).replace(" ", ""),
)
def test_every_setting_of_a_layer_counts(one, other):
    """Layers with equal weights and another setting that changes the output have other digests."""
    other.load_state_dict(one.state_dict())
    first, second = (digests(Layers([layer.eval()])) for layer in (one, other))
    assert first[1] != second[1]


# ---- digests of layers that are pooled


def pooled_before(layers, depth):
    """What features behind so many layers hold: the pooled layers among them, and whether it is that alone."""
    pools = {place: pool.name for place, pool in layers.pools.items() if place < depth}
    return pools, bool(pools) and len(pools) == len(layers.pools)


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations_with_replacement(HEADS, 2)])
def test_features_of_different_heads_are_the_same_up_to_the_first_difference(backbone, data, one, other):
    """Behind so many layers the digests of two heads are equal just where their features hold the same.

    And where they are equal, the features are equal in every bit.
    """
    device, inputs = tk.Device("cpu", "bf16"), inputs_of(data, backbone)[:4]
    left, right = (frozen_layers(backbone, device, **HEADS[head]) for head in (one, other))
    known, found = (digests(layers, precision="bf16") for layers in (left, right))
    for depth in range(1, min(len(left), len(right)) + 1):
        equal = known[depth] == found[depth]
        assert equal == (pooled_before(left, depth) == pooled_before(right, depth))
        if equal:
            features = [make_prefix(layers[:depth], device)(inputs) for layers in (left, right)]
            assert torch.equal(*features)


def test_digests_do_not_depend_on_where_a_pooled_prefix_ends(backbone):
    """The digests of the first layers are the same for every boundary, whatever is pooled behind it."""
    layers = frozen_layers(backbone, tk.Device("cpu", "fp32"))
    for depth in range(1, len(layers)):
        assert digests(layers[:depth]) == digests(layers)[: depth + 1]


# ---- is it current?


@pytest.fixture
def prefix(layers):
    """A prefix whose digests were read."""
    prefix = make_prefix(layers, tk.Device("cpu", "fp32"))
    assert prefix.digests
    return prefix


def test_unchanged_layers_are_current(layers, prefix, data):
    """A prefix stays current while nothing changes, whatever is computed by its layers."""
    prefix(V1(data[0]))
    layers(V1(data[0]))
    assert prefix.is_current(layers, V1)


def in_place(layers):
    with torch.no_grad():
        layers[4].weight[0, 0, 0, 0] += 1


def through_data(layers):
    layers[4].weight.data[0, 0, 0, 0] += 1


def new_data(layers):
    layers[4].weight.data = layers[4].weight.data + 1


def permuted_through_data(layers):
    layers[4].weight.data.copy_(layers[4].weight.data.flip(0))


def two_swapped_through_numpy(layers):
    bias = layers[4].bias.detach().numpy()
    bias[[0, 1]] = bias[[1, 0]]


def two_negated_through_data(layers):
    layers[4].bias.data.copy_(torch.tensor([0.5, -0.25, 1.0, 2.0]).mul(torch.tensor([-1.0, -1.0, 1.0, 1.0])))


def loaded(layers):
    state = layers.state_dict()
    layers.load_state_dict({**state, "4.weight": state["4.weight"] * 2})


def replaced_by_equal_layer(layers):
    layers[4] = copy.deepcopy(layers[4])


def pool_replaced(layers):
    layers[6] = nn.AvgPool2d(1)


def statistics(layers):
    layers[5].running_var.mul_(2)


def epsilon(layers):
    layers[5].eps = 0.5


def stride(layers):
    layers[4].stride = (2, 2)


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        through_data,
        new_data,
        permuted_through_data,
        two_swapped_through_numpy,
        two_negated_through_data,
        loaded,
        replaced_by_equal_layer,
        pool_replaced,
        statistics,
        epsilon,
        stride,
    ],
    ids=lambda change: change.__name__,
)
def test_a_changed_layer_is_noticed(layers, change):
    """Every change of a frozen layer is noticed, whatever way it went: the next epoch makes the prefix anew."""
    layers[4].bias.data.copy_(torch.tensor([0.5, -0.25, 1.0, 2.0]))
    prefix = make_prefix(layers, tk.Device("cpu", "fp32"))
    assert prefix.digests
    assert prefix.is_current(layers, V1)
    change(layers)
    assert not prefix.is_current(layers, V1)


def test_a_prefix_whose_digests_nobody_read_is_not_current(layers):
    """Without digests there is nothing to compare, and the next epoch casts the weights anew."""
    assert not make_prefix(layers, tk.Device("cpu", "fp32")).is_current(layers, V1)


def test_a_batch_size_that_memory_allowed_is_kept(make_backbone):
    """A prefix that is made anew begins with the batch size that the one before it came down to."""
    cache, model = FeatureCache(tk.Device("cpu", "fp32")), make_model(make_backbone)
    first = cache.split(model)[0]
    assert first.batch_size > 3
    first.batch_size = 3
    second = cache.split(model)[0]
    assert second is not first
    assert second.batch_size == 3


@pytest.mark.parametrize("other", ["avg", "max", "flatten", "other layers"])
def test_another_head_is_noticed(make_backbone, other):
    """The same modules pooled otherwise are no longer current."""
    backbone, device = make_backbone(), tk.Device("cpu", "fp32")
    prefix = make_prefix(frozen_layers(backbone, device), device)
    assert prefix.digests
    assert prefix.is_current(frozen_layers(backbone, device), V1)
    layers = frozen_layers(backbone, device, **HEADS[other])
    assert [*layers] == [*backbone.features]
    assert not prefix.is_current(layers, V1)


def test_fewer_layers_are_noticed(layers, prefix):
    """A moved boundary is noticed."""
    assert not prefix.is_current(layers[:-1], V1)


def test_another_preprocessing_is_noticed(layers, prefix):
    """Another preprocessing, or another image size alone, is noticed."""
    assert not prefix.is_current(layers, CONVENTIONS["KERAS"].with_image_size(32))
    assert not prefix.is_current(layers, V1.with_image_size(64))


def test_the_mode_of_layers_without_one_does_not_count(data):
    """ReLUs and convolutions frozen by hand do the same in both modes: neither digests nor prefix depend on it."""
    layers = Layers([nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)]).requires_grad_(False)
    prefix = make_prefix(layers.train(), tk.Device("cpu", "fp32"))
    expected = prefix.digests
    assert prefix.is_current(layers.eval(), V1)
    assert digests(layers) == expected


# ---- what is frozen and pure


@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_frozen_vgg_layers_are_pure(make_backbone, boundary, batch_norm):
    """The frozen layers of a VGG are those of `split`, and may be cached."""
    model = make_model(make_backbone, boundary, batch_norm=batch_norm).train()
    layers, reason = pure_prefix(model)
    assert reason == ""
    assert list(layers) == list(model.split()[0])


def test_nothing_frozen_is_a_reason(make_backbone):
    """A model without frozen layers, or with a first layer in training mode, has no prefix."""
    assert pure_prefix(make_model(make_backbone, None))[1] == NOTHING_FROZEN
    model = make_model(make_backbone)
    model.backbone.features[0] = nn.BatchNorm2d(3).requires_grad_(False).train()
    assert pure_prefix(model)[1] == NOTHING_FROZEN


@pytest.mark.parametrize("kind", IMPURE)
def test_impure_layers_are_named(make_backbone, kind):
    """A layer or a part of the model that may do more than map its input to its output is named."""
    change, reason = IMPURE[kind]
    model = make_model(make_backbone)
    change(model)
    assert pure_prefix(model)[1].startswith(reason)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
def test_outputs_are_the_shapes_and_dtypes_that_come_out(make_backbone, data, precision, batch_norm):
    """`outputs` has, for each number of layers, shape and dtype of what those layers give for an image."""
    device = tk.Device("cpu", precision)
    layers = frozen_layers(make_backbone(batch_norm=batch_norm), device)
    outputs = make_prefix(layers, device).outputs
    assert len(outputs) == len(layers) + 1
    for depth in range(1, len(layers) + 1):
        features = make_prefix(layers[:depth], device)(V1(data[0]))
        assert outputs[depth] == (tuple(features.permute(0, 2, 3, 1).shape[1:]), features.dtype)
