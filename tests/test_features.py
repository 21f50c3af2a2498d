"""The feature cache: features are found again only where they would come out the same."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import transferkit as tk
from cached import CLASSES
from transferkit.base.display import QUIET
from transferkit.compute.host_memory import host_bytes
from transferkit.data.augmentation import build_augmentation
from transferkit.data.inputs import Inputs
from transferkit.data.open import open_data
from transferkit.data.preprocessing import CONVENTIONS
from transferkit.errors import CacheError
from transferkit.features import cache as cache_module
from transferkit.features.cache import FeatureCache, open_folder
from transferkit.features.chunks import CachedFeatures, Chunk, image_digests, together
from transferkit.features.file import FeatureFile
from transferkit.features.prefix import Prefix


class Setup:
    """A cache, and what it is asked about."""

    def __init__(self, backbone, precision="bf16", folder=None, **head):
        self.head = head
        self.device = tk.Device("cpu", precision)
        self.backbone = self.device.prepare(backbone)
        self.cache = FeatureCache(self.device, folder)
        self.said = []
        self.display = SimpleNamespace(say=self.said.append, bar=QUIET.bar)

    def prefix(self, boundary="head"):
        model = tk.freeze_until(tk.attach_head(self.backbone, CLASSES, **self.head), boundary)
        return Prefix(model.split()[0], self.backbone.preprocess, device=self.device)

    def inputs(self, data, **arguments):
        return Inputs(open_data(data, CLASSES), self.backbone.preprocess, self.device, **arguments)

    def fill(self, data, boundary="head", *, num_views=1, **arguments):
        """Return cached features and, in words, how they came about."""
        self.said.clear()
        cached = self.cache.fill(
            self.inputs(data, **arguments), self.prefix(boundary), num_views=num_views, display=self.display
        )
        return cached, re.search(r"images: (.*?)( already| from those behind .*)?(, cached in .*)?$", self.said[-1])[1]

    def by_hand(self, images, boundary="head"):
        """Features as they are cached, (N, h, w, C)."""
        return self.prefix(boundary)(self.backbone.preprocess(images)).permute(0, 2, 3, 1)


def features_of(cached, view=0):
    return cached.gather(cached.rows[view])


@pytest.fixture
def setup(backbone):
    return Setup(backbone)


# ---- digests of images


def test_equal_images_have_equal_digests_however_they_come(data):
    """A digest depends on the image alone: not on its batch, place, memory layout or whether it comes in a list."""
    digests = image_digests(data[0])
    assert len(set(digests)) == 24
    assert {len(digest) for digest in digests} == {16}
    strided = data[0].to(memory_format=torch.channels_last)
    assert image_digests(strided) == image_digests(list(data[0])) == digests
    assert image_digests(data[0][5:9]) == digests[5:9]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image ^ (torch.arange(image.numel()).view(image.shape) == 2000).byte(),
        lambda image: image.reshape(3, 16, 64),
        lambda image: image.view(torch.int8),
        lambda image: image.float(),
    ],
    ids=["one bit", "shape", "dtype of the same bytes", "dtype"],
)
def test_pixels_shape_and_dtype_count(data, change):
    """One bit, the shape or the dtype makes another image."""
    assert image_digests(change(data[0][0])[None]) != image_digests(data[0][:1])


# ---- batches


@pytest.mark.parametrize("parts", [1, 3, 24])
@pytest.mark.parametrize("order", [None, torch.arange(12), torch.randperm(24)], ids=["none", "half", "random"])
def test_batches_follow_the_order(parts, order):
    """Batches hold features and targets of the places asked for, channels-last, from one tensor or several."""
    features, rows, targets = torch.rand(24, 2, 2, 8), torch.randperm(24), torch.randperm(24)
    cached = CachedFeatures(features.chunk(parts), rows[None], targets, tk.Device("cpu"))
    batches = list(cached.batches(7, order=order))
    order = torch.arange(24) if order is None else order
    assert [len(batch) for batch, _ in batches] == [len(part) for part in order.split(7)]
    assert torch.equal(torch.cat([batch for batch, _ in batches]), features[rows][order].permute(0, 3, 1, 2))
    assert torch.equal(torch.cat([batch_targets for _, batch_targets in batches]), targets[order])
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch, _ in batches)


@pytest.mark.parametrize("parts", [1, 2, 24])
@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_batches_are_copies(parts, batch_size):
    """Whoever overwrites a batch overwrites no cached features and no targets."""
    features, targets = torch.rand(24, 2, 2, 8), torch.arange(24)
    before = features.clone()
    cached = CachedFeatures(features.chunk(parts), torch.arange(24)[None], targets, tk.Device("cpu"))
    for batch, batch_targets in cached.batches(batch_size):
        batch.fill_(7)
        batch_targets.fill_(7)
    assert torch.equal(features, before)
    assert torch.equal(targets, torch.arange(24))


@pytest.mark.parametrize("rows", [torch.arange(24), torch.tensor([0, 7, 8, 9, 23])], ids=["all", "some"])
def test_chunks_are_put_together(rows):
    """Rows of several chunks become one chunk of the same images, in order."""
    features, images = torch.rand(24, 1, 1, 8), [bytes([number]) * 16 for number in range(24)]
    chunks = [Chunk("layers", images[start:end], features[start:end]) for start, end in ((0, 8), (8, 9), (9, 24))]
    one = together(chunks, rows, torch.device("cpu"))
    assert one.layers == "layers"
    assert one.images == [images[row] for row in rows]
    assert torch.equal(one.features, features[rows])


@pytest.mark.parametrize("room", [20 * 8 * 4, 20 * 8 * 4 - 1], ids=["room", "no room"])
def test_an_accelerator_gets_one_tensor_if_it_has_room(monkeypatch, room):
    """There the features of a run are put together, and chunks used whole are dropped; else nothing moves."""
    device = tk.Device("cpu")
    device.torch_device = torch.device("meta")  # stands for an accelerator; holds shapes alone
    monkeypatch.setattr(cache_module, "ROOM_IF_UNKNOWN", room)
    features, images = torch.rand(24, 1, 1, 8), [bytes([number]) * 16 for number in range(24)]
    chunks = [Chunk("layers", images[start:end], features[start:end]) for start, end in ((0, 8), (8, 9), (9, 24))]
    found = [(chunk, row) for chunk in chunks for row in range(len(chunk.images))]
    found = [found[index] for index in torch.randperm(20) + 4]  # all but four of the first chunk
    cache = FeatureCache(device)
    cache.chunks += chunks
    _, parts, rows = cache._place(found)
    if room < 20 * 8 * 4:
        assert torch.equal(torch.cat(parts)[rows], torch.stack([chunk.features[row] for chunk, row in found]))
        assert cache.chunks == chunks
    else:
        (part,), (first, chunk) = parts, cache.chunks
        assert first is chunks[0]
        assert part is chunk.features
        assert (part.device.type, part.shape) == ("meta", (20, 1, 1, 8))
        assert [chunk.images[row] for row in rows] == [other.images[row] for other, row in found]


# ---- filling


def test_reading_looks_at_no_place_for_tensors(setup, data, monkeypatch):
    """A batch crosses to the device in a call for each of its parts, not in one for each of its images."""
    calls = []
    move = tk.Device.move
    monkeypatch.setattr(tk.Device, "move", lambda device, part: calls.append(part) or move(device, part))
    assert sum(len(targets) for _, targets in setup.inputs(data).batches(8)) == 24
    assert len(calls) == 3 * 3  # images and targets of each batch, and the images as they are prepared


# ---- filling


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("boundary", ["block3", "block5", "head"])
def test_features_of_every_image_in_order(backbone, data, precision, boundary):
    """Cached features are, bit for bit, what the prefix gives for the images in their order, channels last."""
    setup = Setup(backbone, precision)
    cached, how = setup.fill(data, boundary)
    assert how == "computed"
    assert cached.parts[0].dtype == setup.device.dtype
    assert torch.equal(features_of(cached), setup.by_hand(data[0], boundary))
    assert torch.equal(cached.targets, data[1])


@pytest.mark.parametrize("size", [1, 7, 24, 100])
def test_the_batch_size_of_the_prefix_does_not_count(setup, data, size, monkeypatch):
    """The batches that features are computed in change not one bit of them, and they are known afterwards."""
    cached, _ = setup.fill(data)
    monkeypatch.setattr("transferkit.features.prefix._PIXELS_ON_CPU", size * 32 * 32)
    again, how = Setup(setup.backbone).fill(data)
    assert how == "computed"
    assert torch.equal(features_of(again), features_of(cached))
    assert setup.fill(data)[1] == "known"


def test_images_of_differing_sizes(setup):
    """Images whose sizes differ are each resized; added to others, new ones are computed alone."""
    sizes = [(40, 33), (32, 32), (90, 50), (64, 64), (33, 70)]
    images = [Image.effect_noise(size, 60).convert("RGB") for size in sizes]
    setup.fill([(image, 0) for image in images[:3]])
    cached, how = setup.fill([(image, index % 3) for index, image in enumerate(images)])
    assert how == "3 known, 2 computed"
    inputs = [
        setup.backbone.preprocess(open_data([image], CLASSES, with_targets=False).samples.read(0, 0)[0][None])
        for image in images
    ]
    assert torch.equal(features_of(cached), setup.prefix()(torch.cat(inputs)).permute(0, 2, 3, 1))


def test_the_same_data_is_known(setup, data, images_seen):
    """Asked a second time, the cache computes nothing and gives the same memory."""
    cached, _ = setup.fill(data)
    computed = len(images_seen)
    again, how = setup.fill((data[0].clone(), data[1].clone()))
    assert how == "known"
    assert len(images_seen) == computed
    assert again.parts[0] is cached.parts[0]


def test_the_same_pixels_from_another_kind_of_data_are_known(setup, data):
    """A list of samples, or an array with channels last, is the same data."""
    setup.fill(data)
    assert setup.fill(list(zip(*data, strict=True)))[1] == "known"
    assert setup.fill((data[0].permute(0, 2, 3, 1).contiguous().numpy(), data[1].numpy()))[1] == "known"


def one_pixel(setup, images):
    images[17, 1, 3, 4] ^= 1  # in place
    return images


def floats(setup, images):
    return setup.backbone.preprocess(images)


def another_shape(setup, images):
    return images.reshape(24, 3, 16, 64)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(one_pixel, "23 known, 1 computed"), (floats, "computed"), (another_shape, "computed")],
    ids=["one pixel", "floats", "another shape"],
)
def test_other_images_are_computed(setup, data, change, expected):
    """A changed pixel, dtype or shape gives new features, of the images that changed alone."""
    images = data[0].clone()
    setup.fill((images, data[1]))
    images = change(setup, images)
    cached, how = setup.fill((images, data[1]))
    assert how == expected
    inputs = images if images.is_floating_point() else setup.backbone.preprocess(images)
    assert torch.equal(features_of(cached), setup.prefix()(inputs).permute(0, 2, 3, 1))


def test_targets_are_read_anew(setup, data):
    """Targets are those of the data at hand, whatever was cached; soft ones stay rows."""
    setup.fill(data)
    for targets in ((data[1] + 1) % 3, torch.softmax(torch.rand(24, 3), dim=1), data[1]):
        cached, how = setup.fill((data[0], targets))
        assert how == "known"
        assert torch.equal(cached.targets, targets)


def another_preprocessing(setup):
    setup.backbone.preprocess = CONVENTIONS["KERAS"].with_image_size(32)


def another_image_size(setup):
    setup.backbone.preprocess = setup.backbone.preprocess.with_image_size(64)


def another_weight(layer):
    def change(setup):
        with torch.no_grad():
            setup.backbone.features[layer].weight[0, 0, 0, 0] += 3

    return change


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize(
    "change",
    [another_preprocessing, another_image_size, another_weight(0), another_weight(6), another_weight(12)],
    ids=["preprocessing", "image size", "first layer", "middle layer", "last layer"],
)
def test_another_prefix_is_computed(backbone, data, tmp_path, change, in_folder):
    """Another preprocessing, image size or weight gives new features."""
    setup = Setup(backbone, folder=tmp_path if in_folder else None)
    setup.fill(data)
    change(setup)
    cached, how = setup.fill(data)
    assert how == "computed"
    assert torch.equal(features_of(cached), setup.by_hand(data[0]))


def test_another_precision_is_computed(backbone, data, tmp_path):
    """Features in a folder that were computed in bf16 do not serve an fp32 run."""
    Setup(backbone, "bf16", tmp_path).fill(data)
    cached, how = Setup(backbone, "fp32", tmp_path).fill(data)
    assert how == "computed"
    assert cached.parts[0].dtype == torch.float32


# ---- the boundary moves


@pytest.mark.parametrize(("shallow", "deep"), [("block2", "block3"), ("block3", "head"), ("block5", "head")])
def test_a_deeper_boundary_is_derived(make_backbone, data, images_seen, shallow, deep):
    """Behind a deeper boundary features are, bit for bit, what the images give, and fewer layers run."""
    setup = Setup(make_backbone(batch_norm=True))
    before = features_of(setup.fill(data, shallow)[0])
    images_seen.clear()
    cached, how = setup.fill(data, deep)
    assert how == "derived"
    assert images_seen == [(24, len(setup.prefix(shallow)))]
    assert torch.equal(features_of(cached), setup.by_hand(data[0], deep))
    again, how = setup.fill(data, shallow)
    assert how == "known"
    assert torch.equal(features_of(again), before)  # although VGG's ReLUs work in place


def test_features_are_derived_from_the_deepest_known(setup, data, images_seen):
    """Of several boundaries that are known the deepest serves."""
    for boundary in ("block2", "block4", "block3"):
        setup.fill(data, boundary)
    images_seen.clear()
    setup.fill(data, "head")
    assert {first for _, first in images_seen} == {len(setup.prefix("block4"))}


def test_a_shallower_boundary_is_computed(setup, data):
    """Features of a deeper boundary do not serve a shallower one."""
    setup.fill(data, "head")
    cached, how = setup.fill(data, "block3")
    assert how == "computed"
    assert torch.equal(features_of(cached), setup.by_hand(data[0], "block3"))


def test_another_weight_between_the_boundaries_still_derives(setup, data):
    """A changed weight behind the shallower boundary leaves that boundary's features in use."""
    setup.fill(data, "block3")
    setup.fill(data, "head")
    another_weight(9)(setup)
    cached, how = setup.fill(data, "head")
    assert how == "derived"
    assert torch.equal(features_of(cached), setup.by_hand(data[0]))


# ---- several heads, over several layers

HEADS = {
    "default": {},
    "avg": {"pooling": "avg"},
    "max": {"pooling": "max"},
    "flatten": {"pooling": "flatten"},
    "blocks 4 and 5": {"layers": ["block4", "block5"]},
    "block 4": {"layers": ["block4"]},
    "within blocks": {"layers": ["block2_relu1", "block5_conv1"]},
}


def contents(prefix):
    """What features hold besides the last activation: the layers pooled so far, or those alone if none is to come."""
    pools = {place: pool.name for place, pool in prefix._layers.pools.items() if place < len(prefix)}
    return len(prefix), pools, bool(pools) and len(pools) == len(prefix._layers.pools)


@pytest.mark.parametrize(
    ("first", "second", "in_folder"),
    [
        *((*pair, False) for pair in itertools.permutations(HEADS, 2)),
        *((*pair, True) for pair in itertools.pairwise(HEADS)),  # the same digests tell files apart
    ],
)
def test_a_head_gets_features_of_its_own_layers(backbone, data, tmp_path, first, second, in_folder):
    """Features cached for another head are known where they hold the same, and elsewhere are never mistaken for it."""
    data = data[0][:4], data[1][:4]
    for boundary in ("block3", "block4", "block5", "head"):
        if boundary == "block5" and "block 4" in (first, second):
            continue  # its backbone has no block 5
        folder = open_folder(tmp_path / boundary) if in_folder else None
        one, other = (Setup(backbone, folder=folder, **HEADS[head]) for head in (first, second))
        if not in_folder:
            other.cache.share(one.cache)
        one.fill(data, boundary)
        cached, how = other.fill(data, boundary)
        assert how == ("known" if contents(one.prefix(boundary)) == contents(other.prefix(boundary)) else "computed")
        assert torch.equal(features_of(cached), other.by_hand(data[0], boundary))
        again, how = one.fill(data, boundary)
        assert how == "known"
        assert torch.equal(features_of(again), one.by_hand(data[0], boundary))


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_pooled_features_are_carried_on_from_layer_to_layer(
    make_backbone, data, tmp_path, images_seen, precision, batch_norm, in_folder
):
    """From each layer to the next one, features are derived with what was pooled before, bit for bit."""
    folder = tmp_path if in_folder else None
    setup = Setup(make_backbone(batch_norm=batch_norm), precision, folder, layers=["block2", "block3_relu1", "block5"])
    boundaries = [*setup.backbone.layer_names, "head"]
    prefixes = {len(setup.prefix(boundary)): boundary for boundary in boundaries}
    known = 0
    for depth, boundary in prefixes.items():
        if depth == 0:
            continue
        images_seen.clear()
        cached, how = setup.fill(data, boundary)
        assert how == ("derived" if known else "computed")
        assert images_seen == [(24, known)]
        assert torch.equal(features_of(cached), setup.by_hand(data[0], boundary))
        known = depth
    assert known == len(setup.backbone.features)
    assert cached.parts[0].shape[1:] == (1, 1, 3 * (4 + 8 + 8))


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "files"])
def test_a_head_is_carried_on_from_what_another_has_in_common(backbone, data, tmp_path, images_seen, in_folder):
    """Features that hold nothing pooled serve every head, and are carried on by each in its own way."""
    setups = [Setup(backbone, folder=tmp_path if in_folder else None, **head) for head in HEADS.values()]
    for setup in setups[1:]:
        setup.cache.share(setups[0].cache)
    setups[0].fill(data, "block2")
    images_seen.clear()
    for setup in setups:
        cached, how = setup.fill(data, "head")
        assert how == "derived"
        assert torch.equal(features_of(cached), setup.by_hand(data[0]))
    assert {first for _, first in images_seen} == {0, 3}
    assert sum(count for count, first in images_seen if first == 0) == len(setups) * 24  # those by hand


# ---- views


def test_views_differ_and_are_what_an_epoch_draws(setup, data):
    """View k is, bit for bit, what epoch k's augmentation makes of the images; no two views are alike."""
    transform = build_augmentation(["flip", "crop"], 32)
    cached, _ = setup.fill(data, num_views=3, transform=transform, seed=5)
    for view in range(3):
        inputs, _ = next(setup.inputs(data, transform=transform, seed=5).batches(24, view=view))
        assert torch.equal(features_of(cached, view), setup.prefix()(inputs).permute(0, 2, 3, 1))
        assert torch.equal(next(cached.batches(24, view=view))[0], setup.prefix()(inputs))
    assert not torch.equal(features_of(cached, 0), features_of(cached, 1))
    assert not torch.equal(features_of(cached, 1), features_of(cached, 2))
    assert torch.equal(cached.targets, data[1])


def test_every_view_is_derived(setup, data):
    """The deeper features of each view are derived from its own."""
    transform = build_augmentation(["flip", "crop"], 32)
    setup.fill(data, "block3", num_views=3, transform=transform)
    derived, how = setup.fill(data, "head", num_views=3, transform=transform)
    assert how == "derived"
    fresh, how = Setup(setup.backbone).fill(data, "head", num_views=3, transform=transform)
    assert how == "computed"
    for view in range(3):
        assert torch.equal(features_of(derived, view), features_of(fresh, view))


def test_more_views_cost_the_new_ones(setup, data):
    """A fourth view of each image leaves the first three known; another seed has views of its own."""
    transform = build_augmentation("color", 32)
    setup.fill(data, num_views=3, transform=transform)
    assert setup.fill(data, num_views=4, transform=transform)[1] == "72 known, 24 computed"
    assert setup.fill(data, num_views=3, transform=transform, seed=1)[1] == "computed"


# ---- where features lie


def test_host_bytes_tells_free_and_total():
    """The memory that is free is some, and no more than all."""
    memory = host_bytes()
    if memory is None:
        pytest.skip("no /proc/meminfo here")
    assert 0 < memory["free"] <= memory["total"]


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        ("max\n", "5\n", {"free": 4096_000, "total": 8192_000}),
        ("1024000\n", "24000\n", {"free": 1000_000, "total": 1024_000}),
        ("1024000\n", "2000000\n", {"free": 0, "total": 1024_000}),
        ("99999999999\n", "0\n", {"free": 4096_000, "total": 8192_000}),
    ],
    ids=["no limit", "limit", "beyond the limit", "limit above the machine"],
)
def test_host_bytes_minds_a_containers_limit(monkeypatch, limit, used, expected):
    """A container's own limit counts where it is less than the machine has."""
    files = {
        "/proc/meminfo": "MemTotal:  8000 kB\nMemFree:  1 kB\nMemAvailable:  4000 kB\n",
        "/sys/fs/cgroup/memory.max": limit,
        "/sys/fs/cgroup/memory.current": used,
    }
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: str(path) in files)
        patch.setattr(Path, "read_text", lambda path: files[str(path)])
        found = host_bytes()
    assert found == expected


def test_host_bytes_is_none_where_nobody_tells(monkeypatch):
    """Where there is no /proc/meminfo there is no number."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: False)
        found = host_bytes()
    assert found is None


def size_of(data, boundary="head"):
    return len(data[0]) * {"head": 3 * (8 + 8 + 8), "block3": 8 * 8 * 4}[boundary] * 2


@pytest.mark.parametrize("spare", [0, -1])
def test_memory_is_taken_up_to_a_fraction_of_what_is_free(setup, data, monkeypatch, spare, images_seen):
    """Features may take half of the free memory, to the byte; with less, nothing is computed."""
    size = size_of(data)
    monkeypatch.setattr(cache_module, "host_bytes", lambda: {"free": 2 * (size + spare), "total": 10**9})
    if spare == 0:
        assert setup.fill(data)[1] == "computed"
    else:
        with pytest.raises(CacheError, match=r"they take \d.* MB, and may take 0 MB .*Trainer\(cache=folder\)"):
            setup.fill(data)
        assert images_seen == []


def test_where_free_memory_is_unknown_there_is_a_fixed_limit(setup, data, monkeypatch):
    """Where the system does not say how much is free, features may take a fixed number of bytes."""
    monkeypatch.setattr(cache_module, "host_bytes", lambda: None)
    assert setup.fill(data)[1] == "computed"
    monkeypatch.setattr(cache_module, "ROOM_IF_UNKNOWN", size_of(data, "block3") - 1)
    with pytest.raises(CacheError):
        setup.fill(data, "block3")


def test_known_features_need_no_memory(setup, data, monkeypatch):
    """Features that are known are used where they lie, however little memory is left."""
    setup.fill(data)
    monkeypatch.setattr(cache_module, "MEMORY_SHARE", 0)
    assert setup.fill((data[0][:12], data[1][:12]))[1] == "known"


def test_room_for_known_images_is_given_back(setup, data):
    """New features of few images do not hold the memory of all."""
    setup.fill(data)
    images = torch.cat([255 - data[0][:2], data[0]])
    cached, _ = setup.fill((images, torch.arange(26) % 3))
    assert [part.untyped_storage().nbytes() // (72 * 2) for part in sorted(cached.parts, key=len)] == [2, 24]
    assert torch.equal(features_of(cached), setup.by_hand(images))


def test_too_little_memory_lets_go_of_what_earlier_runs_left(setup, data, monkeypatch):
    """Features that no run uses any more are given up when memory runs short."""
    setup.fill(data)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "MEMORY_SHARE", 0)
        with pytest.raises(CacheError):
            setup.fill(data, "block3")
    assert setup.fill(data)[1] == "computed"


# ---- folders


def test_a_folder_needs_no_memory(backbone, data, tmp_path, monkeypatch):
    """With a folder features are mapped files, and free memory does not matter."""
    monkeypatch.setattr(cache_module, "MEMORY_SHARE", 0)
    setup = Setup(backbone, folder=tmp_path)
    cached, how = setup.fill(data)
    assert how == "computed"
    assert [path.suffix for path in tmp_path.iterdir()] == [".features"]
    assert f"cached in {tmp_path} (" in setup.said[-1]
    assert torch.equal(features_of(cached), setup.by_hand(data[0]))


@pytest.mark.parametrize(
    ("images", "bytes_", "batch", "expected"),
    [(1024, 2**26, 24, [24]), (7, 2**26, 3, [6, 6, 6, 6]), (7, 2**26, 24, [24]), (1024, 10 * 72 * 2, 2, [10, 10, 4])],
    ids=["all", "whole batches", "one batch at least", "bytes"],
)
def test_files_hold_whole_batches(backbone, data, tmp_path, monkeypatch, images, bytes_, batch, expected):
    """A file holds as many whole batches as its limits of images and bytes allow, in the data's order."""
    monkeypatch.setattr(cache_module, "CHUNK_IMAGES", images)
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", bytes_)
    monkeypatch.setattr("transferkit.features.prefix._PIXELS_ON_CPU", batch * 32 * 32)
    setup = Setup(backbone, folder=tmp_path)
    cached, _ = setup.fill(data)
    assert [len(part) for part in cached.parts] == expected
    assert len(list(tmp_path.iterdir())) == len(expected)
    assert torch.equal(torch.cat(list(cached.parts)), setup.by_hand(data[0]))


def test_an_interrupted_fill_is_carried_on(backbone, data, tmp_path, monkeypatch):
    """What was written before a fill was stopped is known to the next one, and the files are those of one fill."""
    monkeypatch.setattr(cache_module, "CHUNK_IMAGES", 8)
    monkeypatch.setattr("transferkit.features.prefix._PIXELS_ON_CPU", 4 * 32 * 32)
    setup, batches = Setup(backbone, folder=tmp_path), []

    def check():
        batches.append(None)
        if len(batches) == 5:
            raise KeyboardInterrupt

    setup.cache.check = check
    with pytest.raises(KeyboardInterrupt):
        setup.fill(data)
    assert len(list(tmp_path.iterdir())) == 2
    cached, how = setup.fill(data)
    assert how == "16 known, 8 computed"
    assert [len(part) for part in cached.parts] == [8, 8, 8]
    assert torch.equal(features_of(cached), setup.by_hand(data[0]))


@pytest.mark.parametrize("num_views", [1, 2])
def test_a_folder_serves_another_cache(backbone, data, tmp_path, images_seen, num_views):
    """Another cache over the same folder computes nothing and has the same bits and the targets."""
    arguments = {"num_views": num_views, "transform": build_augmentation("color", 32) if num_views > 1 else None}
    cached, _ = Setup(backbone, folder=tmp_path).fill(data, "block3", **arguments)
    images_seen.clear()
    again, how = Setup(backbone, folder=tmp_path).fill(data, "block3", **arguments)
    assert how == "known"
    assert images_seen == []
    for view in range(num_views):
        assert torch.equal(features_of(again, view), features_of(cached, view))
    assert torch.equal(again.targets, data[1])


def test_a_second_fill_maps_no_file_again(backbone, data, tmp_path, monkeypatch):
    """What a cache has mapped it does not verify again, and neither does a cache that shares it."""
    setup, other = (Setup(backbone, folder=tmp_path) for _ in range(2))
    setup.fill(data)
    other.cache.share(setup.cache)
    monkeypatch.setattr("transferkit.features.file.FeatureFile.read", None)
    assert setup.fill(data)[1] == other.fill(data)[1] == "known"


def test_shallower_files_are_mapped_once(backbone, data, tmp_path, monkeypatch):
    """Files that deeper features are derived from stay mapped for the next time."""
    Setup(backbone, folder=tmp_path).fill(data, "block3")
    setup, reads, read = Setup(backbone, folder=tmp_path), [], FeatureFile.read
    monkeypatch.setattr(FeatureFile, "read", lambda file: reads.append(file.shape) or read(file))
    for boundary in ("block5", "head"):
        assert setup.fill(data, boundary)[1] == "derived"
        another_weight(9)(setup)
    # before block 5 the 24 + 24 numbers pooled of blocks 3 and 4 lie in three rows of 2 x 8 below the activation
    assert sorted(reads) == [(24, 1, 1, 72), (24, 5, 2, 8), (24, 8, 8, 4)]


def test_files_that_nobody_asks_for_are_not_mapped(backbone, data, tmp_path):
    """Of the files for the same layers only those with features of the data at hand are verified and mapped."""
    Setup(backbone, folder=tmp_path).fill((255 - data[0], data[1]))
    (other,) = tmp_path.iterdir()
    content = bytearray(other.read_bytes())
    content[4096] ^= 1
    other.write_bytes(content)
    setup = Setup(backbone, folder=tmp_path)
    assert setup.fill(data)[1] == "computed"
    assert not any("skipped a feature file" in line for line in setup.said)
    setup.fill((255 - data[0], data[1]))
    assert "skipped a feature file" in setup.said[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda backbone: backbone.features[0].weight.data.mul_(2), "computed"),
        (lambda backbone: tk.freeze_until(backbone, None), "known"),
    ],
    ids=["weights", "frozen"],
)
def test_files_go_by_values_alone(make_backbone, data, tmp_path, change, expected):
    """Whether a file serves depends on the values of the layers, and on nothing that a process adds."""
    Setup(make_backbone(), folder=tmp_path).fill(data)
    other = make_backbone()
    change(other)
    assert Setup(other, folder=tmp_path).fill(data)[1] == expected


def test_no_folder_is_no_folder():
    """None is no folder."""
    assert open_folder(None) is None


def test_a_missing_folder_is_made(tmp_path):
    """A folder and its parents are made; one that exists serves; a string will do."""
    assert open_folder(tmp_path / "runs" / "a").is_dir()
    assert open_folder(str(tmp_path / "new")) == tmp_path / "new"
    assert (tmp_path / "new").is_dir()
    assert open_folder(tmp_path / "new") == tmp_path / "new"


@pytest.mark.parametrize("place", ["file", "file/folder", "a\0b", "x" * 300])
def test_what_can_be_no_folder_is_refused(tmp_path, place):
    """A file in the place, and a name that no folder can have, are refused with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cache=") as caught:
        open_folder(tmp_path / place)
    assert ascii(str(tmp_path / place))[1:-1] in str(caught.value)
