"""The feature cache: features are taken again only where they would come out the same."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import transferkit as tk
from transferkit.base.display import QUIET
from transferkit.compute.host_memory import host_bytes
from transferkit.data.augmentation import build_augmentation
from transferkit.data.inputs import Inputs
from transferkit.data.open import open_data
from transferkit.data.preprocessing import CONVENTIONS
from transferkit.errors import CacheError
from transferkit.features import cache as features_module
from transferkit.features.cache import FeatureCache, open_folder
from transferkit.features.prefix import Prefix

CLASSES = ["cat", "dog", "owl"]


class Setup:
    """A cache, and what it is asked about."""

    def __init__(self, backbone, precision="bf16", folder=None):
        self.device = tk.Device("cpu", precision)
        self.backbone = self.device.prepare(backbone)
        self.cache = FeatureCache(self.device, folder)
        self.said = []
        self.display = SimpleNamespace(say=self.said.append, bar=QUIET.bar)

    def prefix(self, boundary="head"):
        model = tk.freeze_until(tk.attach_head(self.backbone, CLASSES), boundary)
        return Prefix(model.split()[0], self.backbone.preprocess, device=self.device)

    def inputs(self, data, **arguments):
        return Inputs(open_data(data, CLASSES), self.backbone.preprocess, self.device, **arguments)

    def keep(self, data, boundary="head", *, num_views=1, **arguments):
        """Return what is kept and one word for how it came about."""
        self.said.clear()
        kept = self.cache.keep(
            self.inputs(data, **arguments), self.prefix(boundary), num_views=num_views, display=self.display
        )
        return kept, next(word for word in ("known", "derived", "computed") if word in self.said[-1])

    def by_hand(self, images, boundary="head"):
        """Features as they are kept, (N, h, w, C)."""
        return self.prefix(boundary)(self.backbone.preprocess(images)).permute(0, 2, 3, 1)


@pytest.fixture
def setup(backbone):
    return Setup(backbone)


# ---- what is kept


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("boundary", ["block3", "block5", "head"])
def test_features_of_every_image_in_order(backbone, data, precision, boundary):
    """What is kept is, bit for bit, what the prefix makes of the images in their order, channels last."""
    setup = Setup(backbone, precision)
    kept, how = setup.keep(data, boundary)
    assert how == "computed"
    assert kept.features.dtype == setup.device.dtype
    assert torch.equal(kept.features[0], setup.by_hand(data[0], boundary))
    assert torch.equal(kept.targets, data[1])


@pytest.mark.parametrize("size", [1, 7, 24, 100])
def test_features_do_not_depend_on_the_batches_they_are_computed_in(setup, data, size, monkeypatch):
    """The batch size of the computation changes nothing, a ragged last batch neither: not one bit and not the key."""
    kept, _ = setup.keep(data)
    monkeypatch.setattr(features_module, "_Scan", lambda inputs, _, *rest: scan(inputs, size, *rest))
    again = Setup(setup.backbone).keep(data)[0]
    assert torch.equal(again.features, kept.features)
    assert (again.pixels, again.layers) == (kept.pixels, kept.layers)


scan = features_module._Scan


def test_batches_follow_the_order(setup, data):
    """Batches hold the features and targets of the places asked for, `(N, C, h, w)` and channels-last."""
    kept, _ = setup.keep(data, "block3")
    order = torch.randperm(24)
    batches = list(kept.batches(7, order=order))
    assert [len(targets) for _, targets in batches] == [7, 7, 7, 3]
    expected = setup.by_hand(data[0], "block3").permute(0, 3, 1, 2)
    assert torch.equal(torch.cat([batch for batch, _ in batches]), expected[order])
    assert torch.equal(torch.cat([targets for _, targets in batches]), data[1][order])
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch, _ in batches)


@pytest.mark.parametrize("order", [None, torch.arange(24), torch.arange(12)])
def test_batches_are_copies(setup, data, order):
    """Whoever overwrites a batch overwrites nothing that is kept, in order, without one, and with all in one batch."""
    kept, _ = setup.keep(data)
    before = kept.features.clone()
    for size in (5, 24):
        for batch, targets in kept.batches(size, order=order):
            batch.fill_(7)
            targets.fill_(7)
    assert torch.equal(kept.features, before)
    assert torch.equal(kept.targets, data[1])


def test_soft_targets_are_kept(setup, data):
    """One-hot and soft targets are kept as rows."""
    soft = torch.softmax(torch.rand(24, 3), dim=1)
    assert torch.equal(setup.keep((data[0], soft))[0].targets, soft)


def test_images_of_differing_sizes(setup):
    """Images whose sizes differ are each resized, and kept in order."""
    sizes = [(40, 33), (32, 32), (90, 50), (64, 64), (33, 70)]
    images = [Image.effect_noise(size, 60).convert("RGB") for size in sizes]
    kept, _ = setup.keep([(image, index % 3) for index, image in enumerate(images)])
    inputs = [
        setup.backbone.preprocess(open_data([image], CLASSES, with_targets=False).samples.read(0, 0)[0][None])
        for image in images
    ]
    assert torch.equal(kept.features[0], setup.prefix()(torch.cat(inputs)).permute(0, 2, 3, 1))


# ---- when it is known


def test_the_same_data_is_known(setup, data, images_seen):
    """Asked a second time for the same, the cache computes nothing and gives the same."""
    kept, _ = setup.keep(data)
    computed = len(images_seen)
    again, how = setup.keep((data[0].clone(), data[1].clone()))
    assert how == "known"
    assert len(images_seen) == computed
    assert again.features is kept.features


def test_the_same_pixels_from_another_kind_of_data_are_known(setup, data):
    """What counts is the pixels: a list of samples, or channels last, is the same data."""
    setup.keep(data)
    assert setup.keep(list(zip(*data, strict=True)))[1] == "known"
    assert setup.keep((data[0].permute(0, 2, 3, 1).contiguous().numpy(), data[1].numpy()))[1] == "known"


def one_pixel(setup, images):
    images[17, 1, 3, 4] ^= 1
    return images


def another_order(setup, images):
    return images[torch.arange(24).roll(1)]


def two_exchanged(setup, images):
    images[[3, 4]] = images[[4, 3]]
    return images


def one_less(setup, images):
    return images[:-1]


def floats(setup, images):
    return setup.backbone.preprocess(images)


def another_shape(setup, images):
    return images.reshape(24, 3, 16, 64)


@pytest.mark.parametrize("change", [one_pixel, another_order, two_exchanged, one_less, floats, another_shape])
def test_other_images_are_computed_anew(setup, data, change):
    """One changed pixel, in place even, another order, number, format or shape gives new features."""
    images, targets = data[0].clone(), data[1]
    setup.keep((images, targets))
    images = change(setup, images)
    kept, how = setup.keep((images, targets[: len(images)]))
    assert how == "computed"
    expected = setup.by_hand(images) if images.dtype == torch.uint8 else setup.by_hand(data[0])
    assert torch.equal(kept.features[0], expected)


def test_other_targets_alone_need_no_new_features(setup, data, images_seen):
    """Where only targets changed the features are known, and the targets are the new ones."""
    setup.keep(data)
    computed = len(images_seen)
    kept, how = setup.keep((data[0], (data[1] + 1) % 3))
    assert how == "known"
    assert len(images_seen) == computed
    assert torch.equal(kept.targets, (data[1] + 1) % 3)
    assert torch.equal(setup.keep(data)[0].targets, data[1])


def test_another_preprocessing_is_computed_anew(setup, data):
    """Another preprocessing of the same pixels gives new features."""
    setup.keep(data)
    setup.backbone.preprocess = CONVENTIONS["KERAS"].with_image_size(32)
    kept, how = setup.keep(data)
    assert how == "computed"
    assert torch.equal(kept.features[0], setup.by_hand(data[0]))


def test_another_image_size_is_computed_anew(setup, data):
    """Another image size gives new features, of another shape."""
    setup.keep(data)
    setup.backbone.preprocess = setup.backbone.preprocess.with_image_size(64)
    kept, how = setup.keep(data)
    assert how == "computed"
    assert kept.features.shape == (1, 24, 2, 2, 8)


def test_another_number_format_is_computed_anew(backbone, data, tmp_path):
    """Features in a folder that were computed in bf16 do not serve an fp32 run."""
    Setup(backbone, "bf16", tmp_path).keep(data)
    kept, how = Setup(backbone, "fp32", tmp_path).keep(data)
    assert how == "computed"
    assert kept.features.dtype == torch.float32


@pytest.mark.parametrize("layer", [0, 6, 12])
def test_another_weight_is_computed_anew(setup, data, layer):
    """One changed weight of any convolution gives new features."""
    setup.keep(data)
    with torch.no_grad():
        setup.backbone.features[layer].weight[0, 0, 0, 0] += 3
    kept, how = setup.keep(data)
    assert how in ("computed", "derived")
    assert torch.equal(kept.features[0], setup.by_hand(data[0]))


# ---- the boundary moves


@pytest.mark.parametrize(("shallow", "deep"), [("block2", "block3"), ("block3", "head"), ("block5", "head")])
def test_a_deeper_boundary_is_derived(make_backbone, data, images_seen, shallow, deep):
    """Behind a boundary moved deeper features are, bit for bit, what the images give, and fewer layers run."""
    setup = Setup(make_backbone(batch_norm=True))
    setup.keep(data, shallow)
    images_seen.clear()
    kept, how = setup.keep(data, deep)
    assert how == "derived"
    assert images_seen
    assert {first for _, first in images_seen} == {len(setup.prefix(shallow))}
    assert torch.equal(kept.features[0], setup.by_hand(data[0], deep))


def test_features_are_derived_from_the_deepest_known(setup, data, images_seen):
    """Of several boundaries that are known the deepest serves."""
    for boundary in ("block2", "block4", "block3"):
        setup.keep(data, boundary)
    images_seen.clear()
    setup.keep(data, "head")
    assert {first for _, first in images_seen} == {len(setup.prefix("block4"))}


def test_deriving_leaves_what_is_known(setup, data):
    """The features that others are derived from stay as they were, although VGG's ReLUs work in place."""
    kept, _ = setup.keep(data, "block2")
    before = kept.features.clone()
    setup.keep(data, "head")
    assert torch.equal(kept.features, before)
    assert setup.keep(data, "block2")[0].features is kept.features


def test_a_shallower_boundary_is_computed_anew(setup, data, images_seen):
    """Features of a deeper boundary do not serve a shallower one."""
    setup.keep(data, "head")
    images_seen.clear()
    kept, how = setup.keep(data, "block3")
    assert how == "computed"
    assert sum(count for count, first in images_seen if first == 0) == 24
    assert torch.equal(kept.features[0], setup.by_hand(data[0], "block3"))


def test_another_weight_between_the_boundaries_still_derives(setup, data):
    """A changed weight behind the shallower boundary leaves that boundary's features in use."""
    setup.keep(data, "block3")
    setup.keep(data, "head")
    with torch.no_grad():
        setup.backbone.features[9].weight.mul_(2)
    kept, how = setup.keep(data, "head")
    assert how == "derived"
    assert torch.equal(kept.features[0], setup.by_hand(data[0]))


def test_every_view_is_derived(setup, data):
    """Where several views are kept the deeper features of each are derived from its own."""
    transform = build_augmentation(["flip", "crop"], 32)
    setup.keep(data, "block3", num_views=3, transform=transform)
    derived, how = setup.keep(data, "head", num_views=3, transform=transform)
    assert how == "derived"
    fresh, how = Setup(setup.backbone).keep(data, "head", num_views=3, transform=transform)
    assert how == "computed"
    assert torch.equal(derived.features, fresh.features)


# ---- views


def test_views_differ_and_are_what_an_epoch_draws(setup, data):
    """View k is, bit for bit, what epoch k's augmentation makes of the images; no two views are alike."""
    transform = build_augmentation(["flip", "crop"], 32)
    kept, _ = setup.keep(data, num_views=3, transform=transform, seed=5)
    for view in range(3):
        inputs, _ = next(setup.inputs(data, transform=transform, seed=5).batches(24, view=view))
        assert torch.equal(kept.features[view], setup.prefix()(inputs).permute(0, 2, 3, 1))
        assert torch.equal(next(kept.batches(24, view=view))[0], setup.prefix()(inputs))
    assert not torch.equal(kept.features[0], kept.features[1])
    assert not torch.equal(kept.features[1], kept.features[2])
    assert torch.equal(kept.targets, data[1])


@pytest.mark.parametrize("other", [{"num_views": 2}, {"seed": 1}, {"transform": build_augmentation("color", 32)}])
def test_other_views_are_computed_anew(setup, data, other):
    """Another number of views, seed or augmentation gives new features."""
    arguments = {"num_views": 3, "seed": 0, "transform": build_augmentation("crop", 32)}
    setup.keep(data, **arguments)
    assert setup.keep(data, **{**arguments, **other})[1] == "computed"


@pytest.mark.parametrize("in_folder", [False, True])
def test_two_views_are_not_twice_as_many_images(backbone, data, tmp_path, in_folder):
    """Two equal views of 24 images hold the same pixels as 48 images, but not the same number of images."""
    setup = Setup(backbone, folder=tmp_path if in_folder else None)
    twice = torch.cat([data[0], data[0]]), torch.cat([data[1], data[1]])
    setup.keep(data)
    setup.keep(data, num_views=2)
    assert setup.keep(twice)[0].features.shape[:2] == (1, 48)
    assert setup.keep(data, num_views=2)[0].features.shape[:2] == (2, 24)


def test_two_views_do_not_pass_for_twice_as_many_images(setup, data):
    """So it is where features of the asked-for number of images are known beside them."""
    twice = torch.cat([data[0], data[0]]), torch.cat([data[1], data[1]])
    other = torch.cat([data[0], 255 - data[0]]), twice[1]
    setup.keep(data, num_views=2)
    setup.keep(other)
    assert setup.keep(twice)[0].features.shape[:2] == (1, 48)


# ---- where it is kept


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
    return len(data[0]) * {"head": 8, "block3": 8 * 8 * 4}[boundary] * 2


@pytest.mark.parametrize("spare", [0, -1])
def test_memory_is_taken_up_to_the_share_of_what_is_free(setup, data, monkeypatch, spare):
    """Features may take `MEMORY_SHARE` of the free memory, to the byte, and no more."""
    size = size_of(data)
    monkeypatch.setattr(features_module, "host_bytes", lambda: {"free": 2 * (size + spare), "total": 10**9})
    monkeypatch.setattr(features_module, "MEMORY_SHARE", 0.5)
    if spare == 0:
        assert setup.keep(data)[1] == "computed"
    else:
        with pytest.raises(CacheError, match="cache"):
            setup.keep(data)


def test_where_free_memory_is_unknown_there_is_a_fixed_limit(setup, data, monkeypatch):
    """Where the system does not tell, features may take a fixed number of bytes."""
    monkeypatch.setattr(features_module, "host_bytes", lambda: None)
    assert setup.keep(data)[1] == "computed"
    monkeypatch.setattr(features_module, "ROOM_IF_UNKNOWN", size_of(data, "block3") - 1)
    with pytest.raises(CacheError):
        setup.keep(data, "block3")


def test_the_message_says_how_much_and_what_to_do(setup, data, monkeypatch):
    """Too little memory is an error with both sizes and the remedy, before any image is computed."""
    monkeypatch.setattr(features_module, "MEMORY_SHARE", 0)
    with pytest.raises(CacheError, match=r"they take \d.* MB, and may take 0 MB .*Trainer\(cache=\.\.\.\)"):
        setup.keep(data)


def test_too_little_memory_computes_nothing(setup, data, monkeypatch, images_seen):
    """Whether there is room is known before the first image is computed."""
    monkeypatch.setattr(features_module, "MEMORY_SHARE", 0)
    with pytest.raises(CacheError):
        setup.keep(data)
    assert images_seen == []


def test_too_little_memory_lets_go_of_what_earlier_runs_left(setup, data, monkeypatch):
    """Features that no run uses any more are given up when memory runs short."""
    setup.keep(data)
    with monkeypatch.context() as patch:
        patch.setattr(features_module, "MEMORY_SHARE", 0)
        with pytest.raises(CacheError):
            setup.keep(data, "block3")
    assert setup.keep(data)[1] == "computed"


def test_a_folder_needs_no_memory(backbone, data, tmp_path, monkeypatch):
    """With a folder features are a mapped file, and free memory does not matter."""
    monkeypatch.setattr(features_module, "MEMORY_SHARE", 0)
    setup = Setup(backbone, folder=tmp_path)
    kept, how = setup.keep(data)
    assert how == "computed"
    assert [path.suffix for path in tmp_path.iterdir()] == [".features"]
    assert str(next(tmp_path.iterdir())) in setup.said[-1]
    assert torch.equal(kept.features[0], setup.by_hand(data[0]))


# ---- folders


@pytest.mark.parametrize("num_views", [1, 2])
def test_a_file_serves_another_cache(backbone, data, tmp_path, images_seen, num_views):
    """Another cache over the same folder computes nothing and has the same bits and the targets."""
    kept, _ = Setup(backbone, folder=tmp_path).keep(data, "block3", num_views=num_views)
    images_seen.clear()
    again, how = Setup(backbone, folder=tmp_path).keep(data, "block3", num_views=num_views)
    assert how == "known"
    assert images_seen == []
    assert torch.equal(again.features, kept.features)
    assert torch.equal(again.targets, data[1])


def test_a_file_of_a_shallower_boundary_serves_a_deeper_one(backbone, data, tmp_path, images_seen):
    """From a file of a shallower boundary the deeper features are derived, bit for bit, and get a file too."""
    Setup(backbone, folder=tmp_path).keep(data, "block3")
    images_seen.clear()
    setup = Setup(backbone, folder=tmp_path)
    kept, how = setup.keep(data, "head")
    assert how == "derived"
    assert {first for _, first in images_seen} == {len(setup.prefix("block3"))}
    assert torch.equal(kept.features[0], setup.by_hand(data[0]))
    assert len(list(tmp_path.glob("*.features"))) == 2


@pytest.mark.parametrize(
    "change",
    [lambda backbone: backbone.features[0].weight.data.mul_(2), lambda backbone: tk.freeze_until(backbone, None)],
)
def test_files_go_by_values_alone(make_backbone, data, tmp_path, change):
    """Whether a file serves depends on the values of the layers, and on nothing that a process adds."""
    Setup(make_backbone(), folder=tmp_path).keep(data)
    other = make_backbone()
    change(other)
    _, how = Setup(other, folder=tmp_path).keep(data)
    same = torch.equal(other.features[0].weight, make_backbone().features[0].weight)
    assert how == ("known" if same else "computed")


def test_no_folder_is_no_folder():
    """Without `cache_dir` there is none."""
    assert open_folder(None) is None


def test_a_missing_folder_is_made(tmp_path):
    """A folder whose parent is there is made; one that is there serves; a string will do."""
    assert open_folder(str(tmp_path / "new")) == tmp_path / "new"
    assert (tmp_path / "new").is_dir()
    assert open_folder(tmp_path / "new") == tmp_path / "new"


@pytest.mark.parametrize("place", ["file", "missing/folder", "file/folder"])
def test_what_can_be_no_folder_is_refused(tmp_path, place):
    """A file, or a folder whose parent is missing, is refused with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cache=") as caught:
        open_folder(tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)


def test_kept_features_cannot_be_reassigned(setup, data):
    """What is kept is a frozen record."""
    kept, _ = setup.keep(data)
    with pytest.raises(dataclasses.FrozenInstanceError):
        kept.features = nn.Parameter(torch.zeros(1))
