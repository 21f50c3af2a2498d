"""`cache_features`: features as an ordinary data set, for a plain PyTorch loop or scikit-learn."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset, random_split
from torchvision.transforms import v2

import transferkit as tk
from cached import make_trainer
from transferkit.errors import ArgumentError, CacheError, HeadMismatchError, ImageError, TargetError
from transferkit.features import cache as cache_module
from transferkit.features.prefix import Prefix

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture
def frozen(model):
    return tk.freeze_until(model, "head")


def end_to_end(model, images, precision="fp32", boundary="head"):
    """What the frozen layers give, by hand: before block 3 its input, and before the head what is pooled."""
    device = tk.Device("cpu", precision)
    backbone = model.backbone
    before = backbone.layer_names.index("block3_conv1")
    with torch.no_grad(), device.autocast():
        inputs = backbone.preprocess(images)
        return backbone.features[:before](inputs) if boundary == "block3" else backbone(inputs, model.pools)


def cached(model, data, **arguments):
    return tk.cache_features(model, data, **{"device": "cpu", "precision": "fp32", **arguments})


# ---- as a data set


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("boundary", ["head", "block3"])
def test_samples_are_features_and_targets_in_order(model, data, precision, boundary):
    """Sample i is, bit for bit, what the frozen layers make of image i, and its target."""
    features = cached(tk.freeze_until(model, boundary), data, precision=precision)
    expected = end_to_end(model, data[0], precision, boundary)
    assert isinstance(features, tk.FeatureDataset)
    assert isinstance(features, Dataset)
    assert len(features) == 24
    for index in (0, 1, 23, -1):
        assert torch.equal(features[index][0], expected[index])
        assert features[index][1] == data[1][index]
    assert torch.equal(features.features, expected)
    assert features.features.dtype == tk.Device("cpu", precision).dtype
    assert torch.equal(features.targets, data[1])


def test_it_ends(frozen, data):
    """It can be gone through like a sequence: behind the last sample there is an IndexError."""
    features = cached(frozen, data)
    with pytest.raises(IndexError):
        features[24]
    assert len(list(features)) == 24


def test_a_sample_is_a_copy(frozen, data):
    """Whoever overwrites a sample overwrites no cached features."""
    features = cached(frozen, data)
    before = features.features.clone()
    features[3][0].fill_(9)
    assert torch.equal(features.features, before)


@pytest.mark.parametrize("boundary", ["block3", "block4", "block5_relu1", "head"])
def test_a_data_loader_reads_it(frozen, data, boundary):
    """A `DataLoader` makes batches of it, shuffled as it likes, which the suffix takes, wherever it begins."""
    tk.freeze_until(frozen, boundary)
    features = cached(frozen, data)
    loader = DataLoader(features, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(0))
    batches = list(loader)
    assert [len(targets) for _, targets in batches] == [7, 7, 7, 3]
    assert sorted(torch.cat([targets for _, targets in batches]).tolist()) == sorted(data[1].tolist())
    assert frozen.split()[1](batches[0][0]).shape == (7, 3)


@pytest.mark.parametrize(("layers", "numbers"), [(["block2", "block1"], 4 + 4), (["block3_relu1"], 8)], ids=str)
@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax"])
def test_features_are_those_of_the_layers_that_the_head_takes(backbone, data, layers, numbers, pooling):
    """Behind a frozen backbone a sample is what is pooled of the head's layers, one column for each number."""
    model = tk.freeze_until(tk.attach_head(backbone, CLASSES, layers=layers, pooling=pooling), "head")
    numbers *= 2 if pooling == "avgmax" else 1
    features = cached(model, data)
    assert features[0][0].shape == (numbers, 1, 1)
    assert features.numpy()[0].shape == (24, numbers)
    assert torch.equal(features.features, model.backbone(model.backbone.preprocess(data[0]), model.pools))


@pytest.mark.slow
def test_workers_read_it(frozen, data, tmp_path):
    """Processes of a `DataLoader` read it, from memory and from a file."""
    for folder in (None, tmp_path):
        features = cached(frozen, data, cache=folder)
        batches = list(DataLoader(features, batch_size=10, num_workers=2))
        assert torch.equal(torch.cat([batch for batch, _ in batches]), end_to_end(frozen, data[0]))


def test_torchs_tools_take_it(frozen, data):
    """`random_split` and `ConcatDataset` work on it as on any data set."""
    features = cached(frozen, data)
    parts = random_split(features, [20, 4])
    assert [len(part) for part in parts] == [20, 4]
    assert len(ConcatDataset([features, features])) == 48


def test_soft_targets_stay_rows(frozen, data):
    """One-hot or soft targets come as rows."""
    soft = torch.softmax(torch.rand(24, 3), dim=1)
    features = cached(frozen, (data[0], soft))
    assert torch.equal(features.targets, soft)
    assert torch.equal(features[5][1], soft[5])


def test_a_plain_loop_trains_the_suffix_on_it(make_backbone, data):
    """A plain loop over the features trains the rest to, bit for bit, what a loop over the images trains it to."""
    results = []
    for on_features in (True, False):
        torch.manual_seed(1)
        model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES, hidden=(16,)), "block5")
        before = model.backbone.features[0].weight.clone()
        samples = cached(model, data)
        if not on_features:
            samples = TensorDataset(model.backbone.preprocess(data[0]), data[1])
        network = model.split()[1] if on_features else model
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        for _ in range(3):
            order = torch.Generator().manual_seed(3)
            for inputs, targets in DataLoader(samples, batch_size=7, shuffle=True, generator=order):
                logits = network(inputs.contiguous(memory_format=torch.channels_last))
                optimizer.zero_grad()
                functional.cross_entropy(logits, targets).backward()
                optimizer.step()
        assert torch.equal(model.backbone.features[0].weight, before)
        results.append(model.state_dict())
    assert [name for name, value in results[0].items() if not torch.equal(value, results[1][name])] == []


# ---- for scikit-learn


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("boundary", ["head", "block3"])
def test_numpy_gives_rows_in_the_heads_order(model, data, precision, boundary):
    """`numpy()` gives float32 rows whose columns lie as `nn.Flatten` puts them, and int64 targets."""
    features, targets = cached(tk.freeze_until(model, boundary), data, precision=precision).numpy()
    expected = end_to_end(model, data[0], precision, boundary).float().flatten(1).numpy()
    assert isinstance(features, np.ndarray)
    assert features.dtype == np.float32
    assert targets.dtype == np.int64
    assert features.shape == (24, 3 * (8 + 8 + 8) if boundary == "head" else 8 * 8 * 4)
    assert np.array_equal(features, expected)
    assert np.array_equal(targets, data[1].numpy())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_numpy_gives_copies_of_features(frozen, data, precision):
    """What is done to the arrays, as by scikit-learn's `copy=False`, changes no cached features."""
    features = cached(frozen, data, precision=precision)
    before = features.features.clone()
    features.numpy()[0][:] = 9
    assert torch.equal(features.features, before)


def test_numpy_gives_copies_of_targets(frozen, data):
    """What is done to the array of targets changes none of the user's own."""
    features = cached(frozen, data)
    features.numpy()[1][:] = 9
    assert torch.equal(features.targets, torch.arange(24) % 3)


def test_numpy_gives_arrays_that_can_be_written_from_a_file(frozen, data, tmp_path):
    """Where the features are a mapped file the arrays are no part of it."""
    features = cached(frozen, data, cache=tmp_path)
    before = features.features.clone()
    features.numpy()[0][:] = 9
    assert torch.equal(features.features, before)
    assert torch.equal(cached(frozen, data, cache=tmp_path).features, before)


def test_features_in_several_files_come_in_order(frozen, data, tmp_path, monkeypatch):
    """Features that lie in several files, in another order, are the same data set."""
    expected = cached(frozen, data)
    monkeypatch.setattr(cache_module, "CHUNK_IMAGES", 8)
    monkeypatch.setattr("transferkit.features.prefix._PIXELS_ON_CPU", 4 * 32 * 32)
    cached(frozen, (data[0].flip(0), data[1]), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    features = cached(frozen, data, cache=tmp_path)
    assert torch.equal(features.features, expected.features)
    assert torch.equal(features[-1][0], expected.features[23])
    assert torch.equal(torch.stack([sample for sample, _ in features]), expected.features)


# ---- views


def test_views_follow_one_another(frozen, data):
    """`n_views` gives all images in their first view, then all in their second, each with its target."""
    features = cached(frozen, data, augment=["flip", "crop"], n_views=3)
    assert len(features) == 3 * 24
    assert torch.equal(features.targets, data[1].repeat(3))
    views = features.features.split(24)
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[1], views[2])
    assert features.numpy()[0].shape == (72, 72)


def test_views_with_soft_targets(frozen, data):
    """Rows of targets repeat with the views too."""
    soft = torch.softmax(torch.rand(24, 3), dim=1)
    assert torch.equal(cached(frozen, (data[0], soft), n_views=2).targets, torch.cat([soft, soft]))


def test_views_follow_the_seed(frozen, data):
    """The same seed gives the same views bit for bit, another seed others."""
    first, second, third = (cached(frozen, data, augment="crop", n_views=2, seed=seed).features for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


# ---- files


def test_a_folder_serves_a_second_call(frozen, data, tmp_path, monkeypatch):
    """With `cache` a second call computes nothing, and a trainer in the same folder neither."""
    first = cached(frozen, data, cache=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".features"]
    monkeypatch.setattr(Prefix, "__call__", only_the_example)
    assert torch.equal(cached(frozen, data, cache=str(tmp_path)).features, first.features)
    make_trainer(frozen, precision="fp32", folder=tmp_path).fit(data, epochs=1, verbose=0)


compute = Prefix.__call__


def only_the_example(prefix, inputs, *, first=0):
    assert not inputs.any()
    return compute(prefix, inputs, first=first)


# ---- the model


def test_the_model_is_left_as_it_is(make_backbone, data):
    """Weights, statistics, modes and what trains stay as they are."""
    model = tk.freeze_until(tk.attach_head(make_backbone(batch_norm=True), CLASSES, hidden=(4,)), "block4").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    cached(model, data)
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_a_device_object_serves(frozen, data):
    """A `Device` decides place and dtype."""
    assert cached(frozen, data, device=tk.Device("cpu", "bf16"), precision="auto").features.dtype == torch.bfloat16


# ---- errors


def test_nothing_frozen_is_refused(model, data):
    """Without a frozen layer there is an error with the remedy."""
    with pytest.raises(CacheError, match="freeze_until"):
        cached(model, data)


def test_the_remedy_is_one_that_the_caller_has(frozen, data):
    """Messages name no argument that `cache_features` does not have."""
    with pytest.raises(CacheError) as caught:
        cached(frozen, data, augment="flip")
    assert "cache=" not in str(caught.value)


def test_augmentation_needs_views(frozen, data):
    """Random changes without `n_views` are refused: there would be no end of features."""
    with pytest.raises(CacheError, match="n_views"):
        cached(frozen, data, augment="flip")


class Flipped(Dataset):
    def __init__(self, data):
        self.data, self.flip = data, v2.RandomHorizontalFlip()

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, index):
        return self.flip(self.data[0][index]), int(self.data[1][index])


def test_a_random_data_set_needs_views(frozen, data):
    """A data set with a random transform of its own is refused without `n_views`, and gives views with it."""
    with pytest.raises(CacheError, match="drew random numbers for image 0"):
        cached(frozen, Flipped(data))
    features = cached(frozen, Flipped(data), n_views=2).features
    assert not torch.equal(features[:24], features[24:])


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda data: DataLoader(TensorDataset(*data)), CacheError),
        (lambda data: data[0], TargetError),
        (lambda data: (data[0], data[1] + 1), TargetError),
        (lambda data: (data[0].long(), data[1]), ImageError),
        (lambda data: "images", ArgumentError),
    ],
    ids=["DataLoader", "no targets", "target out of range", "int64 images", "path"],
)
def test_data_that_cannot_be_used_is_refused(frozen, data, make, error):
    """Data that cannot be used raises the same errors as in `fit`, and a `DataLoader` one that says what to pass."""
    with pytest.raises(error):
        cached(frozen, make(data))


def test_another_number_of_classes_is_refused(frozen, data):
    """A data set with other classes than the model's is refused."""
    dataset = Flipped(data)
    dataset.classes = ["cat", "dog"]
    with pytest.raises(HeadMismatchError):
        cached(frozen, dataset)


@pytest.mark.parametrize("arguments", [{"n_views": 0}, {"n_views": 1.5}, {"seed": -1}, {"num_workers": -1}], ids=str)
def test_numbers_out_of_range_are_refused(frozen, data, arguments):
    """Numbers out of range are refused."""
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        cached(frozen, data, **arguments)


def test_only_models_of_attach_head(backbone, data):
    """A backbone alone is refused with what to pass."""
    with pytest.raises(ArgumentError, match="attach_head"):
        cached(backbone, data)


def test_a_hook_is_refused(frozen, data):
    """A prefix with a hook is refused with the layer."""
    frozen.backbone.features[3].register_forward_hook(lambda *_: None)
    with pytest.raises(CacheError, match="layer 3"):
        cached(frozen, data)


def test_a_folder_that_cannot_be_used_is_refused(frozen, data, tmp_path):
    """`cache` that is a file is refused with its path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="file"):
        cached(frozen, data, cache=tmp_path / "file")
