"""Layers in a row: cut anywhere they give the same bits, and what is pooled of several layers goes along."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

import tiny
import transferkit as tk
from transferkit.model.layers import POOLINGS, Layers, Pool

HEADS = {
    "default": {},
    "average": {"pooling": "avg"},
    "flatten": {"pooling": "flatten"},
    "one layer within a block": {"layers": ["block3_relu1"]},
    "first and last block": {"layers": ["block5", "block1"], "pooling": "max"},
    "every kind of layer": {"layers": ["block1_relu1", "block2_conv1", "block2_relu1", "block4"]},
    "every block": {"layers": [f"block{block}" for block in range(1, 6)]},
}


def with_statistics(model: tk.TransferModel) -> tk.TransferModel:
    """Give batch norm and the head statistics that are neither 0 nor 1."""
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "standardize.mean")):
            nn.init.uniform_(buffer, -0.5, 0.5)
        elif name.endswith(("running_var", "standardize.std")):
            nn.init.uniform_(buffer, 0.5, 2)
    return model


# ---- pooling


def test_pools_are_means_and_maxima_over_positions() -> None:
    """Each image and channel gives its mean, its maximum, or all means and then all maxima; or means of both halves."""
    activation = torch.randn(3, 4, 5, 6)
    avg, largest, both, halves = (Pool(name, 4) for name in ("avg", "max", "avgmax", "halves"))
    upper, lower = activation[:, :, :3], activation[:, :, 2:]  # the middle one of five rows is in both

    torch.testing.assert_close(avg(activation), activation.mean(dim=(2, 3), keepdim=True))
    assert torch.equal(largest(activation), activation.amax(dim=(2, 3), keepdim=True))
    assert torch.equal(both(activation), torch.cat([avg(activation), largest(activation)], dim=1))
    assert torch.equal(halves(activation), torch.cat([avg(upper), avg(lower), largest(activation)], dim=1))


def test_a_single_row_is_both_halves() -> None:
    """VGG16 leaves one row of a 32-pixel image: its mean stands for the upper and the lower half."""
    row = torch.randn(2, 4, 1, 3)
    assert torch.equal(Pool("halves", 4)(row)[:, :4], Pool("halves", 4)(row)[:, 4:8])


@pytest.mark.parametrize("name", POOLINGS)
def test_a_pool_says_how_many_numbers_it_gives(name: str) -> None:
    """`size` is the length of what comes out for an image, for every pooling."""
    pool = Pool(name, 4)

    assert tuple(pool(torch.randn(3, 4, 5, 6)).shape) == (3, pool.size, 1, 1)


# ---- layers alone

PLACES = {0: Pool("avg", 4), 2: Pool("max", 3), 3: Pool("avgmax", 3)}


def make_layers(pools: dict[int, Pool] | None = None) -> Layers:
    """Four layers, three of which are pooled: outputs of 4, 4, 3 and 3 channels, at 8x6 and then 4x3 positions."""
    torch.manual_seed(0)
    modules = [nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1), nn.ReLU(inplace=True)]
    return Layers(modules, PLACES if pools is None else pools)


def make_images(number: int = 2) -> Tensor:
    return torch.randn(number, 3, 8, 6, generator=torch.Generator().manual_seed(1))


def test_what_is_pooled_comes_in_forward_order() -> None:
    """Behind the last pooled layer lies all that was pooled, earlier layers first."""
    layers, activation, pooled = make_layers(), make_images(), []
    for index, layer in enumerate(layers):
        activation = layer(activation)
        pooled += [PLACES[index](activation)] if index in PLACES else []

    features = layers(make_images())

    assert tuple(features.shape) == (2, 4 + 3 + 6, 1, 1)
    assert torch.equal(features, torch.cat(pooled, dim=1))


def test_without_pools_layers_are_a_sequential() -> None:
    """Layers of which none is pooled give what `nn.Sequential` gives, cut or not, whatever the input's shape."""
    layers = make_layers({})

    expected = nn.Sequential(*layers)(make_images())

    assert torch.equal(layers(make_images()), expected)
    for cut in range(len(layers) + 1):
        assert torch.equal(layers[cut:](layers[:cut](make_images())), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("number", [1, 2])
def test_layers_cut_twice_give_the_same_bits(number: int, memory_format: torch.memory_format) -> None:
    """However layers are cut into three, one part after the other gives the bits of all, parts of parts too."""
    layers = make_layers().to(memory_format=memory_format)
    images = make_images(number).to(memory_format=memory_format)
    expected = layers(images)
    for first, second in itertools.combinations_with_replacement(range(len(layers) + 1), 2):
        assert torch.equal(layers[second:](layers[first:second](layers[:first](images))), expected)
        assert torch.equal(layers[first:][second - first :](layers[:second](images)), expected)
        assert torch.equal(layers[:second][first:](layers[:first](images)), layers[:second](images))


@pytest.mark.parametrize(
    ("channels", "size", "width", "rows"),
    [(4, 8, 2, 1), (4, 8, 3, 1), (4, 9, 2, 2), (1, 7, 3, 3), (16, 1, 1, 1)],
    ids=["full row", "part of a row", "two rows", "narrow", "one number"],
)
def test_pooled_numbers_lie_in_rows_below_the_activation(channels: int, size: int, width: int, rows: int) -> None:
    """As few rows as hold them lie below the activation, position by position as in channels-last memory, then 0."""
    layers = Layers(
        [nn.Identity(), nn.Conv2d(size, channels, 1), nn.Identity()], {0: Pool("avg", size), 2: Pool("avg", channels)}
    )
    images = torch.randn(2, size, 5, width)

    output = layers[:2](images)

    assert tuple(output.shape) == (2, channels, 5 + rows, width)
    assert torch.equal(output[:, :, :5], layers[1](images))
    below = output[:, :, 5:].permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(below[:, :size], Pool("avg", size)(images).flatten(1))
    assert not below[:, size:].any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_the_next_layer_sees_the_activation_as_it_was(memory_format: torch.memory_format) -> None:
    """The first layer behind a cut gets the activation without the rows, in the memory layout that it had."""
    layers, seen = make_layers().to(memory_format=memory_format), []
    layers[1].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))

    features = layers[:1](make_images().to(memory_format=memory_format))
    layers[1:](features.contiguous(memory_format=memory_format))

    assert torch.equal(seen[0], layers[0](make_images()))
    assert seen[0].is_contiguous(memory_format=memory_format)


def test_a_cut_keeps_gradients() -> None:
    """Through rows below the activation, weights and images get, bit for bit, the gradients they get without a cut."""
    gradients = []
    for cut in range(len(make_layers()) + 1):
        layers, images = make_layers(), make_images().requires_grad_()
        layers[cut:](layers[:cut](images)).pow(2).sum().backward()
        gradients.append([images.grad, *(parameter.grad for parameter in layers.parameters())])

    assert all(gradient.any() for gradient in gradients[0])
    for other in gradients[1:]:
        assert all(torch.equal(*pair) for pair in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("name", POOLINGS)
def test_an_output_that_the_next_layer_overwrites_is_pooled_before(name: str) -> None:
    """A convolution's output is pooled as it is, with its gradient, though the ReLU behind it works in place."""
    results = []
    for inplace in (True, False):
        torch.manual_seed(0)
        modules = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=inplace), nn.Conv2d(4, 5, 1)]
        layers = Layers(modules, {0: Pool(name, 4), 2: Pool(name, 5)})
        features = layers(make_images())
        features.pow(2).sum().backward()
        results.append([features, *(parameter.grad for parameter in layers.parameters())])

    same = torch.allclose if name == "halves" else torch.equal  # of halves, three gradients are added in another order
    assert (results[0][0] < 0).any()
    assert all(same(*pair) for pair in zip(*results, strict=True))


def test_an_output_that_stays_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an output that the very next layer overwrites is copied before it is pooled."""
    pooled, outputs = [], []
    pool = Pool.__call__
    monkeypatch.setattr(Pool, "__call__", lambda self, inputs: pooled.append(inputs.data_ptr()) or pool(self, inputs))
    modules = [nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.ReLU(inplace=False)]
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.data_ptr()))

    kept = Layers(modules, {place: Pool("max", 4) for place in range(5)})(make_images())

    assert tuple(kept.shape) == (2, 5 * 4, 1, 1)
    assert [ours == theirs for ours, theirs in zip(pooled, outputs, strict=True)] == [True, True, False, True, True]


def test_one_index_gives_a_module_and_a_slice_layers() -> None:
    """An index gives the module itself; slices share the modules, and know which of them are pooled."""
    layers = make_layers()

    assert layers[-1] is list(layers)[3]
    assert [*layers[1:]] == [*layers][1:]
    assert [*layers[-2:]] == [*layers][2:]
    assert layers[-2:].pools == {0: PLACES[2], 1: PLACES[3]}
    assert (layers[:2].pooled, layers[1:].pooled, layers[3:].pooled, layers[4:].pooled) == (0, 4, 4 + 3, 0)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda layers: pickle.loads(pickle.dumps(layers))], ids=["copy", "pickle"]
)
def test_copies_pool_as_well(again) -> None:
    """A deep copy and what comes out of a pickle are cut and pool like the original."""
    layers, images = make_layers(), make_images()

    other = again(layers[1:])

    assert torch.equal(other(layers[:1](images)), layers(images))
    assert (other.pools, other.pooled) == (layers[1:].pools, layers[1:].pooled)


# ---- layers of a model


@pytest.mark.parametrize(
    ("precision", "memory_format"), [("fp32", torch.contiguous_format), ("bf16", torch.channels_last)]
)
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("head", HEADS)
def test_suffix_after_prefix_is_the_model(
    head: str, precision: str, memory_format: torch.memory_format, *, batch_norm: bool
) -> None:
    """At every boundary, in both modes, suffix(prefix(x)) is model(x) bit for bit, and both spare their input."""
    backbone = tiny.make_backbone(batch_norm=batch_norm, image_size=36)
    model = with_statistics(tiny.make_model(backbone, hidden=(16,), **HEADS[head])).to(memory_format=memory_format)
    images = torch.randn(4, 3, 36, 36).to(memory_format=memory_format)
    before = images.clone()
    for boundary in [*model.backbone.layer_names, "head", "head.logits", None]:
        tk.freeze_until(model, boundary)
        for training in (False, True):
            prefix, suffix = model.train(training).split()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                expected, features = model(images), prefix(images)
                kept = features.clone()
                assert torch.equal(suffix(features), expected), boundary
            assert torch.equal(features, kept), boundary
            assert torch.equal(images, before), boundary
            assert len(prefix) == 0 or features.shape[1:] != images.shape[1:]
            assert not any(parameter.requires_grad for parameter in prefix.parameters())
            assert [*prefix, *suffix] == [*model.backbone.features, model.head]


@pytest.mark.parametrize("image_size", [32, 47, 96])
def test_images_of_any_size_are_cut(image_size: int) -> None:
    """Cutting changes no bit where the last activation has one position or many, or for one image."""
    model = with_statistics(tiny.make_model(tiny.make_backbone(image_size=image_size))).eval()
    for number, boundary in itertools.product((1, 3), model.backbone.layer_names):
        images = torch.randn(number, 3, image_size, image_size)
        prefix, suffix = tk.freeze_until(model, boundary).split()
        assert torch.equal(suffix(prefix(images)), model(images))


@pytest.mark.parametrize("head", ["default", "flatten", "every kind of layer"])
def test_a_plain_loop_on_the_suffix_is_one_on_the_model(head: str) -> None:
    """At every boundary, steps of SGD on features and on images leave the same weights, bit for bit."""
    names = tiny.make_model(tiny.make_backbone(), **HEADS[head]).backbone.layer_names
    images, targets = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    for boundary in [*names, "head"]:
        trained = []
        for cut in (True, False):
            model = tiny.make_model(tiny.make_backbone(batch_norm=True), boundary, **HEADS[head]).train()
            prefix, suffix = model.split()
            inputs = prefix(images).detach() if cut else images
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
            for _ in range(2):
                nn.functional.cross_entropy((suffix if cut else model)(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
            trained.append(model.state_dict())
        assert tiny.differences(*trained) == [], boundary
