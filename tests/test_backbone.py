"""VGG's convolutions: names, shapes, weights and what they refuse."""

import hashlib
import os
import pickle
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, VGG11_Weights, VGG16_Weights

import transferkit as tk
from transferkit.data.preprocessing import CONVENTIONS
from transferkit.errors import ArgumentError, ImageError, PreprocessingError, WeightsDownloadError, WeightsError
from transferkit.model import weights as weights_module
from transferkit.model.backbone import MODELS

ASSETS = Path(__file__).parent.parent / "examples" / "assets"
IMAGENET_BF16 = ASSETS / "vgg16_imagenet_features_bf16.pt"

Maker = Callable[..., tk.Backbone]


def random_vgg11(**options: object) -> tk.Backbone:
    return tk.load_backbone("vgg11", weights=None, image_size=32, **options)  # type: ignore[arg-type]


@pytest.fixture
def vgg11_state() -> dict[str, Tensor]:
    """The state dict of a whole torchvision VGG11, its classifier cut down to one small tensor."""
    state = dict(random_vgg11().state_dict())
    state["classifier.0.weight"] = torch.full((2, 2), torch.nan)
    return state


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open an address fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"network used: {args}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


# --- names and shapes


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_torchvisions_layers_and_keys(name: str) -> None:
    """Each of the eight networks has the modules and state-dict keys of torchvision's convolution part."""
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).features
    ours = tk.load_backbone(name, weights=None, image_size=32)

    assert [repr(module) for module in ours.features] == [repr(module) for module in theirs]
    assert list(ours.state_dict()) == [f"features.{key}" for key in theirs.state_dict()]


@pytest.mark.parametrize("name", MODELS)
def test_layer_names_say_what_each_module_is(name: str) -> None:
    """Layer names follow the modules one for one, and the kind in a name is the module's type."""
    backbone = tk.load_backbone(name, weights=None, image_size=32)
    kinds = {"conv": nn.Conv2d, "bn": nn.BatchNorm2d, "relu": nn.ReLU, "pool": nn.MaxPool2d}

    assert len(backbone.layer_names) == len(set(backbone.layer_names)) == len(backbone.features)
    for layer, module in zip(backbone.layer_names, backbone.features, strict=True):
        assert type(module) is kinds[layer.split("_")[1].rstrip("0123456789")]


def test_vgg16_has_keras_names_at_torchvisions_places() -> None:
    """VGG16's convolutions and pools have Keras's names, and its blocks begin at 0, 5, 10, 17 and 24."""
    names = tk.load_backbone("vgg16", weights=None, image_size=32).layer_names
    convolutions = [(1, 2), (2, 2), (3, 3), (4, 3), (5, 3)]  # block, convolutions in it
    keras = [
        name for block, count in convolutions for name in [*(f"block{block}_conv{n + 1}" for n in range(count)), block]
    ]
    keras = [f"block{name}_pool" if isinstance(name, int) else name for name in keras]

    assert [name for name in names if "_relu" not in name] == keras
    assert [names.index(f"block{block}_conv1") for block in range(1, 6)] == [0, 5, 10, 17, 24]


def test_batch_norm_layers_are_named_after_their_convolution() -> None:
    """In the _bn variants each convolution is followed by a bn and a relu of the same block and number."""
    names = tk.load_backbone("vgg11_bn", weights=None, image_size=32).layer_names

    assert names[:8] == (
        *("block1_conv1", "block1_bn1", "block1_relu1", "block1_pool"),
        *("block2_conv1", "block2_bn1", "block2_relu1", "block2_pool"),
    )
    assert names[-4:] == ("block5_conv2", "block5_bn2", "block5_relu2", "block5_pool")


def test_vgg16_has_only_its_convolutions_parameters() -> None:
    """VGG16's backbone has 14,714,688 parameters: the 124 million of the classifier are left behind."""
    backbone = tk.load_backbone("vgg16", weights=None)

    assert sum(parameter.numel() for parameter in backbone.parameters()) == 14_714_688


@pytest.mark.parametrize("image_size", [32, 63, 64, 97, 224])
def test_feature_shape_is_the_outputs_shape(make_backbone: Maker, image_size: int) -> None:
    """feature_shape is the shape of the real output for any image size, one that 32 does not divide included."""
    backbone = make_backbone(image_size=image_size)
    images = torch.zeros(2, 3, image_size, image_size)

    assert tuple(backbone(images).shape) == (2, *backbone.feature_shape)


def test_feature_shape_of_vgg16_at_its_own_size() -> None:
    """At 224 pixels VGG16 gives 512 channels of 7x7."""
    backbone = tk.load_backbone("vgg16", weights=None)

    assert backbone.feature_shape == (512, 7, 7)
    assert backbone.image_size == 224


# --- forward


@pytest.mark.parametrize("name", ["vgg16", "vgg11_bn"])
def test_features_are_torchvisions_bit_for_bit(name: str) -> None:
    """With the same weights the features are torchvision's own, bit for bit."""
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).features
    ours = tk.load_backbone(name, weights=None, image_size=64).eval()
    for buffer in (module.running_mean for module in ours.features if isinstance(module, nn.BatchNorm2d)):
        buffer.normal_()
    theirs = theirs.to_empty(device="cpu").eval()
    theirs.load_state_dict(ours.features.state_dict())
    images = torch.randn(2, 3, 64, 64)

    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_layers_of_another_network_are_refused() -> None:
    """A `Backbone` of layers that are not VGG's is refused with the layer's index and type and the types expected."""
    resnet = torchvision.models.resnet18(weights=None)
    layers = nn.Sequential(resnet.conv1, resnet.relu, resnet.maxpool, resnet.layer1)
    with pytest.raises(
        ArgumentError, match=r"features\[3\] is a Sequential: expected .*Conv2d, BatchNorm2d, ReLU and Max"
    ):
        tk.Backbone("resnet18", layers, CONVENTIONS["IMAGENET1K_V1"])


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"\(1, 3, 32, 32\) and dtype torch.uint8"),
        (torch.zeros(1, 1, 32, 32), r"\(1, 1, 32, 32\)"),
        (torch.zeros(1, 4, 32, 32), r"\(1, 4, 32, 32\)"),
        (torch.zeros(1, 32, 32, 3), r"\(1, 32, 32, 3\)"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
    ],
)
def test_images_of_another_form_are_refused(backbone: tk.Backbone, images: Tensor, fault: str) -> None:
    """Raw, grey, RGBA, channels-last and unbatched images are refused with got, expected and the fix."""
    with pytest.raises(ImageError, match=rf"{fault}.*expected.*float \(N, 3, H, W\).*backbone\.preprocess"):
        backbone(images)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (31, 64), (64, 31)])
def test_images_too_small_to_pool_are_refused(backbone: tk.Backbone, height: int, width: int) -> None:
    """An image with a side under 32 pixels is refused with the reason, not by a pooling deep inside."""
    with pytest.raises(ImageError, match=rf"{height}x{width} pixels: expected 32x32 or more.*preprocess resizes"):
        backbone(torch.zeros(1, 3, height, width))


# --- arguments


def test_misspelt_network_is_refused_with_close_names() -> None:
    """A misspelt network name is refused with the names it resembles."""
    with pytest.raises(ArgumentError, match=r"name='vgg_16'.*Did you mean.*'vgg16'"):
        tk.load_backbone("vgg_16", weights=None)


def test_other_network_is_refused_with_all_names() -> None:
    """A name that resembles none is refused with the names there are."""
    with pytest.raises(ArgumentError, match=r"name='alex'.*'vgg11'.*'vgg19_bn'"):
        tk.load_backbone("alex", weights=None)


@pytest.mark.parametrize("image_size", [31, 0, -224, 224.0, "224", True, None])
def test_unusable_image_size_is_refused(image_size: object) -> None:
    """An image size under 32, or that is no whole number, is refused with the limit and its reason."""
    with pytest.raises(ArgumentError, match=r"image_size=.*whole number of 32 pixels or more.*pooling.*image_size=32"):
        tk.load_backbone("vgg11", weights=None, image_size=image_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("IMAGENET1K_FEATURE", "IMAGENET1K_FEATURES"), ("IMAGENET1K_V2", "IMAGENET1K_V1"), ("DEFALT", "DEFAULT")],
)
def test_misspelt_weights_are_refused_with_close_names(misspelt: str, meant: str) -> None:
    """A misspelt weights name is refused with the names it resembles, whatever the preprocessing."""
    with pytest.raises(ArgumentError, match=rf"weights='{misspelt}'.*Did you mean.*'{meant}'.*path"):
        tk.load_backbone("vgg16", weights=misspelt)


def test_misspelt_weights_are_refused_with_a_convention_too() -> None:
    """A misspelt weights name is refused with close matches when a convention is given."""
    with pytest.raises(ArgumentError, match=r"weights='imagenet1k_feature' is neither"):
        tk.load_backbone("vgg16", weights="imagenet1k_feature", preprocessing="KERAS")


def test_weights_of_another_vgg_are_refused() -> None:
    """The enum of another VGG is refused with the one expected."""
    with pytest.raises(ArgumentError, match=r"VGG16_Weights.*another network.*VGG11_Weights.*name='vgg11'"):
        tk.load_backbone("vgg11", weights=VGG16_Weights.IMAGENET1K_V1)


@pytest.mark.parametrize("weights", [VGG16_Weights.IMAGENET1K_FEATURES, ResNet50_Weights.IMAGENET1K_V2])
def test_weights_of_another_family_are_refused(weights: object) -> None:
    """An enum whose member names this network does not have is refused in the same way."""
    with pytest.raises(ArgumentError, match=r"another network.*VGG19_Weights.*name='vgg19'"):
        tk.load_backbone("vgg19", weights=weights)  # type: ignore[arg-type]


def test_weights_of_no_known_kind_are_refused() -> None:
    """A value that is neither name, path, state dict nor None is refused with what it is."""
    with pytest.raises(WeightsError, match=r"the int given.*int.*expected a state dict"):
        tk.load_backbone("vgg11", weights=3, preprocessing="KERAS")  # type: ignore[arg-type]


def test_misspelt_preprocessing_is_refused_with_the_conventions() -> None:
    """A misspelt convention is refused with the three there are."""
    with pytest.raises(ArgumentError, match=r"preprocessing='tf'.*'IMAGENET1K_V1', 'IMAGENET1K_FEATURES', 'KERAS'"):
        random_vgg11(preprocessing="tf")


# --- preprocessing that belongs to weights


def test_unknown_preprocessing_of_a_path_is_refused(tmp_path: Path, vgg11_state: dict[str, Tensor]) -> None:
    """A path whose preprocessing is not known is refused with the three conventions to choose from."""
    torch.save(vgg11_state, tmp_path / "mine.pt")

    with pytest.raises(
        PreprocessingError, match=r"mine\.pt.*unknown.*preprocessing=.*IMAGENET1K_V1.*IMAGENET1K_FEATURES.*KERAS"
    ):
        tk.load_backbone("vgg11", weights=tmp_path / "mine.pt")


def test_unknown_preprocessing_of_a_mapping_is_refused(vgg11_state: dict[str, Tensor]) -> None:
    """A state dict without a convention is refused with the three conventions to choose from."""
    with pytest.raises(
        PreprocessingError, match=r"mapping given.*preprocessing=.*IMAGENET1K_V1.*IMAGENET1K_FEATURES.*KERAS"
    ):
        tk.load_backbone("vgg11", weights=vgg11_state)


@pytest.mark.parametrize("convention", sorted(CONVENTIONS))
def test_convention_given_is_the_backbones(vgg11_state: dict[str, Tensor], convention: str) -> None:
    """The convention named for a state dict is the one the backbone preprocesses with, at its image size."""
    backbone = tk.load_backbone("vgg11", weights=vgg11_state, preprocessing=convention, image_size=48)

    assert backbone.preprocess == CONVENTIONS[convention].with_image_size(48)


def test_own_preprocessing_is_the_backbones_at_its_image_size() -> None:
    """A Preprocessing of the user's own is taken over, for the image size asked for."""
    own = tk.Preprocessing("mine", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (1, 2, 0), image_size=99)

    assert random_vgg11(preprocessing=own).preprocess == own.with_image_size(32)


def published_vgg11(folder: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write `state` under the name of torchvision's VGG11 file, as if it were the one published."""
    path = folder / VGG11_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(weights_module, "_FULL_SHA256", {path.name: digest})
    return path


@pytest.mark.usefixtures("no_network")
def test_a_published_file_tells_its_preprocessing(
    tmp_path: Path, vgg11_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path with the name and the content of a published file needs no convention and no network."""
    path = published_vgg11(tmp_path, vgg11_state, monkeypatch)

    backbone = tk.load_backbone("vgg11", weights=path, image_size=32)

    assert backbone.preprocess.name == "IMAGENET1K_V1"


def test_a_file_with_only_the_name_of_a_published_one_tells_nothing(
    tmp_path: Path, vgg11_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that has the name of a published one but another content must say its convention."""
    path = published_vgg11(tmp_path, vgg11_state, monkeypatch)
    torch.save({**vgg11_state, "features.0.bias": torch.ones(64)}, path)

    with pytest.raises(PreprocessingError, match=r"unknown.*preprocessing="):
        tk.load_backbone("vgg11", weights=path)


# --- weights


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("form", ["mapping", "str", "Path", "ordered"])
def test_weights_of_every_form_are_loaded(tmp_path: Path, vgg11_state: dict[str, Tensor], form: str) -> None:
    """A mapping, a path as str or Path load every weight bit for bit without the network; a classifier is ignored."""
    path = tmp_path / "vgg11.pt"
    torch.save(vgg11_state, path)
    weights = {"mapping": vgg11_state, "str": str(path), "Path": path, "ordered": OrderedDict(vgg11_state)}[form]

    backbone = tk.load_backbone("vgg11", weights=weights, image_size=32, preprocessing="IMAGENET1K_V1")  # type: ignore[arg-type]

    assert set(backbone.state_dict()) == {key for key in vgg11_state if key.startswith("features.")}
    assert all(torch.equal(value, vgg11_state[key]) for key, value in backbone.state_dict().items())


def test_a_file_in_torchs_old_format_is_loaded_with_a_warning(tmp_path: Path, vgg11_state: dict[str, Tensor]) -> None:
    """A file in the format before torch 1.6 loads like any other; a warning says that nothing would show damage."""
    torch.save(vgg11_state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)

    with pytest.warns(UserWarning, match=r"old\.pth has the format of torch before 1\.6, which has no checksums"):
        backbone = tk.load_backbone("vgg11", weights=tmp_path / "old.pth", image_size=32, preprocessing="IMAGENET1K_V1")

    assert all(torch.equal(value, vgg11_state[key]) for key, value in backbone.state_dict().items())


def test_a_published_file_in_torchs_old_format_needs_no_warning(
    tmp_path: Path, vgg11_state: dict[str, Tensor], every_warning: None
) -> None:
    """Where the name holds the SHA-256 of the content, as with torchvision's own files, the whole file is verified."""
    torch.save(vgg11_state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    sha256 = hashlib.sha256((tmp_path / "old.pth").read_bytes()).hexdigest()
    path = (tmp_path / "old.pth").rename(tmp_path / f"vgg11-{sha256[:8]}.pth")

    tk.load_backbone("vgg11", weights=path, image_size=32, preprocessing="IMAGENET1K_V1")


def test_batch_norm_weights_without_batch_counts_are_loaded() -> None:
    """A state dict from before torch 0.4.1, as torchvision's _bn files, lacks num_batches_tracked and still loads."""
    state = tk.load_backbone("vgg11_bn", weights=None, image_size=32).state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}

    backbone = tk.load_backbone("vgg11_bn", weights=old, image_size=32, preprocessing="IMAGENET1K_V1")

    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())


def test_short_floats_are_converted(tmp_path: Path, vgg11_state: dict[str, Tensor]) -> None:
    """A bfloat16 file gives float32 parameters with exactly its values."""
    short = {key: value.bfloat16() for key, value in vgg11_state.items()}
    torch.save(short, tmp_path / "bf16.pt")

    backbone = tk.load_backbone("vgg11", weights=tmp_path / "bf16.pt", image_size=32, preprocessing="IMAGENET1K_V1")

    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert all(torch.equal(value, short[key].float()) for key, value in backbone.state_dict().items())


def test_loaded_weights_are_copies(vgg11_state: dict[str, Tensor]) -> None:
    """Changing the backbone does not change the state dict it was loaded from."""
    backbone = tk.load_backbone("vgg11", weights=vgg11_state, image_size=32, preprocessing="IMAGENET1K_V1")
    before = vgg11_state["features.0.weight"].clone()

    with torch.no_grad():
        backbone.features[0].weight.add_(1)

    assert torch.equal(vgg11_state["features.0.weight"], before)


def test_random_weights_follow_the_seed() -> None:
    """weights=None gives the same weights for the same seed and others for another, in every convolution."""
    torch.manual_seed(1)
    first = random_vgg11().state_dict()
    torch.manual_seed(1)
    again = random_vgg11().state_dict()
    torch.manual_seed(2)
    other = random_vgg11().state_dict()

    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if key.endswith("weight"))


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_random_weights_are_he_initialised(name: str) -> None:
    """Random convolutions have He's standard deviation, sqrt(2 / (9 * outputs)); biases are 0, batch norms neutral."""
    for module in tk.load_backbone(name, weights=None, image_size=32).features:
        if isinstance(module, nn.Conv2d):
            expected = (2 / (9 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)  # 1,728 numbers in the smallest
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.running_var == 1).all()
            assert not torch.stack([module.bias, module.running_mean]).any()


def test_a_new_backbone_trains_all_its_parameters() -> None:
    """Nothing is frozen before freeze_until is called."""
    assert all(parameter.requires_grad for parameter in random_vgg11().parameters())


@pytest.mark.slow
def test_real_imagenet_weights_tell_images_apart() -> None:
    """The real ImageNet weights load from their bfloat16 file and give sparse, finite features."""
    backbone = tk.load_backbone("vgg16", weights=IMAGENET_BF16, image_size=64, preprocessing="IMAGENET1K_V1").eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)

    with torch.no_grad():
        features = backbone(backbone.preprocess(images))

    assert features.isfinite().all()
    assert 0.3 < (features == 0).float().mean() < 0.99
    assert not torch.equal(features[0], features[1])


# --- weights that do not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("features.0.weight"), r"missing features\.0\.weight\. Expected exactly the 16 tensors"),
        (lambda s: s.update({"extra.0": torch.zeros(1)}), r"unexpected extra\.0\. Expected exactly the 16 tensors"),
        (
            lambda s: s.update({"features.0.bias": torch.zeros(7)}),
            r"other shapes: features\.0\.bias \(7,\) instead of \(64,\).*file of another network\?",
        ),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_weights_that_do_not_fit_are_refused(
    vgg11_state: dict[str, Tensor], change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    """Missing, unexpected and misshapen tensors are refused by name, with what was expected."""
    change(vgg11_state)

    with pytest.raises(WeightsError, match=message):
        tk.load_backbone("vgg11", weights=vgg11_state, preprocessing="IMAGENET1K_V1")


def test_weights_of_another_network_list_five_names(vgg11_state: dict[str, Tensor]) -> None:
    """Of many names that do not fit, five are listed and the rest counted."""
    with pytest.raises(
        WeightsError,
        match=r"missing (features\.\d+\.\w+, ){4}features\.\d+\.\w+ and 19 more.*unexpected.*and 9 more.*another",
    ):
        tk.load_backbone("vgg16", weights=vgg11_state, preprocessing="IMAGENET1K_V1")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone."])
def test_a_prefix_to_all_names_is_named(vgg11_state: dict[str, Tensor], prefix: str) -> None:
    """Weights saved from inside a wrapper are refused with the prefix to remove."""
    wrapped = {f"{prefix}{key}": value for key, value in vgg11_state.items()}

    with pytest.raises(WeightsError, match=rf"begin with '{prefix}': remove that"):
        tk.load_backbone("vgg11", weights=wrapped, preprocessing="IMAGENET1K_V1")


def test_integer_weights_are_refused(vgg11_state: dict[str, Tensor]) -> None:
    """Integers (quantised weights) in place of floating-point weights are refused: as numbers they mean nothing."""
    quantised = {key: (value * 127).to(torch.int8) for key, value in vgg11_state.items()}

    with pytest.raises(WeightsError, match=r"int8"):
        tk.load_backbone("vgg11", weights=quantised, preprocessing="IMAGENET1K_V1")


def test_weights_nested_in_a_file_are_refused(tmp_path: Path, vgg11_state: dict[str, Tensor]) -> None:
    """A training checkpoint with the state dict deeper inside is refused with the keys it has."""
    torch.save({"state_dict": vgg11_state, "epoch": 3}, tmp_path / "nested.pt")

    with pytest.raises(
        WeightsError, match=r"dict under 'state_dict': expected tensors only.*keys here: state_dict, ep"
    ):
        tk.load_backbone("vgg11", weights=tmp_path / "nested.pt", preprocessing="KERAS")


def test_a_module_given_as_weights_is_refused(backbone: tk.Backbone) -> None:
    """A whole module given in place of a state dict is refused with the call that gives one."""
    with pytest.raises(WeightsError, match=r"whole module: pass its state_dict\(\)"):
        tk.load_backbone("vgg11", weights=backbone, preprocessing="KERAS")  # type: ignore[arg-type]


# --- files that are no weights


def load_file(path: Path) -> tk.Backbone:
    return tk.load_backbone("vgg11", weights=path, preprocessing="KERAS")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A path where nothing is is refused with the path and what belongs there."""
    with pytest.raises(WeightsError, match=r"no weight file at .*none\.pt: got nothing, expected.*torch\.save"):
        load_file(tmp_path / "none.pt")


def test_a_missing_file_is_refused_before_its_preprocessing_is_asked_for(tmp_path: Path) -> None:
    """Without a convention too, a path where nothing is is what the message is about."""
    with pytest.raises(WeightsError, match=r"no weight file at .*none\.pt: got nothing"):
        tk.load_backbone("vgg11", weights=str(tmp_path / "none.pt"))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A folder is refused as one."""
    with pytest.raises(WeightsError, match=r"got a folder, expected a file written by torch\.save"):
        load_file(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>Please log in</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        b"{}",
        b".",
        b"a plain text",
        b"Goodbye",
        b"h text",
        b"PK\x03\x04 no zip",
        bytes(range(256)),
    ],
    ids=["empty", "html", "lfs", "json", "stop", "append", "float", "get", "zip", "bytes"],
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file of other content, whatever its first byte means to a pickle, is refused with size and remedy."""
    (tmp_path / "bad.pt").write_bytes(content)

    with pytest.raises(
        WeightsError, match=rf"bad\.pt \({len(content)} bytes\).*Expected a file written by torch\.save"
    ):
        load_file(tmp_path / "bad.pt")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, *, new_format: bool, kept: float) -> None:
    """A file cut short at its start, middle or end is refused with the remedy, in both of torch's formats."""
    path = tmp_path / "short.pt"
    torch.save({"features.0.weight": torch.randn(500)}, path, _use_new_zipfile_serialization=new_format)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])

    with pytest.raises(WeightsError, match=r"short\.pt \(\d+ bytes\).*download it again"):
        load_file(path)


@pytest.mark.parametrize("writer", ["pickle", "torch", "torch, old format"])
def test_code_in_a_weight_file_does_not_run(tmp_path: Path, writer: str) -> None:
    """A file with code in it is refused, and the code does not run."""
    path, canary = tmp_path / "evil.pt", tmp_path / "canary"
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"features.0.weight": Payload(canary)}, protocol=2))
    else:
        torch.save({"features.0.weight": Payload(canary)}, path, _use_new_zipfile_serialization=writer == "torch")

    with pytest.raises(WeightsError, match=r"evil\.pt.*Expected a file written by torch\.save"):
        load_file(path)
    assert not canary.exists()


def test_a_whole_module_in_a_file_is_refused(tmp_path: Path) -> None:
    """A file written by torch.save(model) is refused with the call that writes a state dict."""
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")

    with pytest.raises(WeightsError, match=r"whole\.pt.*torch\.save\(model\.state_dict\(\), path\)"):
        load_file(tmp_path / "whole.pt")


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], 5])
def test_a_file_of_something_else_than_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    """A file of a single tensor, a list or a number is refused with what it holds."""
    torch.save(content, tmp_path / "other.pt")

    with pytest.raises(WeightsError, match=rf"are a {type(content).__name__}: expected a state dict"):
        load_file(tmp_path / "other.pt")


def test_a_failed_load_changes_nothing(backbone: tk.Backbone) -> None:
    """Weights of which one does not fit leave every weight of the module as it was."""
    state = {key: value + 1 for key, value in backbone.state_dict().items()}
    state["features.12.bias"] = torch.zeros(3)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}

    with pytest.raises(WeightsError, match=r"features\.12\.bias \(3,\) instead of \(8,\)"):
        weights_module.load_exactly(backbone, state, origin="here")
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


# --- named weights


def test_named_weights_come_from_torch_hubs_cache_without_network(
    tmp_path: Path, vgg11_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    """Named weights that torchvision downloaded before load from its folder, with their convention, offline."""
    (tmp_path / "checkpoints").mkdir()
    published_vgg11(tmp_path / "checkpoints", vgg11_state, monkeypatch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    for weights in ("DEFAULT", "IMAGENET1K_V1", VGG11_Weights.DEFAULT):
        backbone = tk.load_backbone("vgg11", weights=weights, image_size=32)
        assert torch.equal(backbone.features[0].weight, vgg11_state["features.0.weight"])
        assert backbone.preprocess.name == "IMAGENET1K_V1"


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "IMAGENET1K_FEATURES", VGG16_Weights.DEFAULT])
def test_named_weights_without_network_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: object
) -> None:
    """Offline, named weights fail with address, folder and what to do, and leave no file."""

    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)

    with pytest.raises(
        WeightsDownloadError,
        match=r"https://download.pytorch.org/\S*vgg16\S* to .*checkpoints.*not known.*pass its path",
    ):
        tk.load_backbone("vgg16", weights=weights)  # type: ignore[arg-type]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- fingerprint


def test_equal_backbones_have_equal_fingerprints(make_backbone: Maker) -> None:
    """Two backbones with the same weights and preprocessing have one fingerprint; it is a SHA-256."""
    fingerprint = make_backbone(batch_norm=True).fingerprint

    assert fingerprint == make_backbone(batch_norm=True).fingerprint
    assert len(bytes.fromhex(fingerprint)) == 32


@pytest.mark.parametrize("key", ["features.0.weight", "features.0.bias", "features.17.running_var"])
def test_one_bit_of_a_weight_changes_the_fingerprint(make_backbone: Maker, key: str) -> None:
    """One flipped bit in the first, or in the last tensor, buffers included, changes the fingerprint."""
    backbone = make_backbone(batch_norm=True)
    before = backbone.fingerprint

    backbone.state_dict()[key].view(torch.int32).view(-1)[-1] ^= 1

    assert backbone.fingerprint != before


def test_the_preprocessing_changes_the_fingerprint(make_backbone: Maker) -> None:
    """The same weights behind another convention or image size have another fingerprint."""
    backbone = make_backbone()
    fingerprints = {backbone.fingerprint, make_backbone(image_size=64).fingerprint}
    backbone.preprocess = CONVENTIONS["KERAS"].with_image_size(32)

    assert len({*fingerprints, backbone.fingerprint}) == 3


def test_memory_layout_training_mode_and_freezing_leave_the_fingerprint(make_backbone: Maker) -> None:
    """Channels-last layout, eval mode and freezing change no feature and not the fingerprint."""
    backbone = make_backbone()
    before = backbone.fingerprint

    tk.freeze_until(backbone.to(memory_format=torch.channels_last).eval(), "block3")

    assert backbone.fingerprint == before


def test_weights_saved_from_a_backbone_load_into_another(tmp_path: Path) -> None:
    """torch.save(backbone.state_dict()) and load_backbone(weights=path) give the same fingerprint."""
    backbone = random_vgg11()
    torch.save(backbone.state_dict(), tmp_path / "saved.pt")

    again = tk.load_backbone("vgg11", weights=tmp_path / "saved.pt", image_size=32, preprocessing="IMAGENET1K_V1")

    assert again.fingerprint == backbone.fingerprint
