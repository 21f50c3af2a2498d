"""How an image of any shape becomes a square, and that this goes wherever the model goes."""

import io
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import VGG16_Weights
from torchvision.transforms.v2 import functional as transforms

import transferkit as tk
from tiny import CLASSES, make_backbone, make_model
from transferkit.data.inputs import Inputs
from transferkit.data.open import open_data
from transferkit.data.preprocessing import CONVENTIONS, GEOMETRIES
from transferkit.data.resized import resized
from transferkit.errors import ArgumentError, CheckpointError
from transferkit.features.prefix import Prefix, pure_prefix

IMAGES = Path(__file__).parent.parent / "examples" / "assets" / "cifar10_subset.zip"
INTEGERS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # elsewhere torch resizes in floating point

# height and width: square, landscape, portrait, just off square, panoramas, small, the size itself
SHAPES = [
    (256, 256),
    (427, 640),
    (592, 333),
    (111, 113),
    (98, 48),
    (60, 700),
    (900, 40),
    (20, 24),
    (224, 224),
    (9, 200),
]


def preprocessing(geometry: str, image_size: int = 32, convention: str = "IMAGENET1K_V1") -> tk.Preprocessing:
    return replace(CONVENTIONS[convention], image_size=image_size, geometry=geometry)


def photographs(shapes: list[tuple[int, int]] = SHAPES) -> list[Tensor]:
    """Return pictures from examples/assets, uint8 `(1, 3, H, W)`, enlarged to other shapes."""
    with zipfile.ZipFile(IMAGES) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")][:: 1000 // len(shapes)]
        read = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    pictures = zip(read, shapes, strict=False)
    return [
        transforms.pil_to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC))[None]
        for picture, (height, width) in pictures
    ]


def grey_levels(pixels: Tensor, weights: VGG16_Weights) -> Tensor:
    own = weights.transforms()
    return ((pixels * torch.tensor(own.std).view(3, 1, 1) + torch.tensor(own.mean).view(3, 1, 1)) * 255).round()


# --- pixels


@pytest.mark.parametrize("image_size", [224, 112, 99, 64, 32])
@pytest.mark.parametrize("kind", ["photographs", "noise"])
def test_torchvisions_geometry_is_within_one_grey_level_of_torchvision(image_size: int, kind: str) -> None:
    """Whatever the shape: at 224 px what the weights' own transforms make of a PIL image, else in their proportion."""
    weights = VGG16_Weights.IMAGENET1K_V1
    own = weights.transforms(crop_size=image_size, resize_size=image_size * 256 // 224)
    for photo in photographs():
        image = photo if kind == "photographs" else torch.randint_like(photo, 256)
        ours = preprocessing("torchvision", image_size).resize(image)[0]
        theirs = grey_levels(own(transforms.to_pil_image(image[0])), weights)
        assert (ours - theirs).abs().max() <= 1, tuple(image.shape)


def test_torchvisions_geometry_at_224_needs_no_arguments() -> None:
    """The model input is that of `VGG16_Weights.IMAGENET1K_V1.transforms()` as it is, to one grey level."""
    preprocess = preprocessing("torchvision", 224)
    own = VGG16_Weights.IMAGENET1K_V1.transforms()
    for image in photographs():
        theirs = own(transforms.to_pil_image(image[0]))
        assert (preprocess(image)[0] - theirs).abs().max() < 1.01 / min(preprocess.std)


def test_crop_is_not_torchvisions_geometry() -> None:
    """The default keeps more of the image, which is why the two have names."""
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[..., 0:3] = 255
    assert preprocessing("crop").resize(image)[..., 0].float().mean() > 200
    assert preprocessing("torchvision").resize(image).max() == 0


@pytest.mark.parametrize("convention", sorted(CONVENTIONS))
@pytest.mark.parametrize(
    ("shape", "top", "left"), [((64, 96), 6, 0), ((96, 64), 0, 6), ((50, 80), 6, 0), ((31, 32), 0, 0)]
)
def test_letterbox_keeps_the_whole_image_between_bars(
    shape: tuple[int, int], top: int, left: int, convention: str
) -> None:
    """The whole image in its proportions, in the middle; the bars are 0 in the model input, to half a grey level."""
    preprocess = preprocessing("letterbox", convention=convention)
    image = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    high, wide = (round(side * 32 / max(shape)) for side in shape)
    bars = torch.ones(32, 32, dtype=torch.bool)
    bars[top : top + high, left : left + wide] = False

    made = preprocess.resize(image)

    expected = transforms.resize(image, [high, wide], antialias=True)
    assert torch.equal(made[..., top : top + high, left : left + wide], expected)
    assert int((~bars).sum()) == high * wide
    levels = preprocess.normalize(made) * torch.tensor(preprocess.std).view(3, 1, 1)
    assert (levels[..., bars].abs() <= 0.5).all()


def test_letterbox_leaves_one_row_of_the_longest_image() -> None:
    """An image 1,000 times as long as high is one row of pixels in the middle: not nothing, and no error."""
    image = torch.full((1, 3, 4, 4000), 250, dtype=torch.uint8)
    rows = (preprocessing("letterbox").resize(image) == 250).all(dim=3).all(dim=1)[0]
    assert rows.sum() == 1
    assert rows.nonzero().item() in (15, 16)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (20, 90), (33, 32)])
def test_squash_resizes_both_sides(shape: tuple[int, int]) -> None:
    """Nothing of the image is lost: it is torchvision's resize to a square."""
    image = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    assert torch.equal(preprocessing("squash").resize(image), transforms.resize(image, [32, 32], antialias=True))


@pytest.mark.parametrize("geometry", ["crop", "letterbox", "squash"])
def test_an_image_of_the_right_size_keeps_its_pixels(geometry: str) -> None:
    """A square of image_size is passed on as it is."""
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(preprocessing(geometry).resize(image), image)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pixels_do_not_depend_on_the_batch_or_the_memory_layout(geometry: str) -> None:
    """An image gives the same bits alone, in a batch, in a list, and with channels last in memory."""
    preprocess = preprocessing(geometry)
    images = torch.randint(0, 256, (4, 3, 47, 61), dtype=torch.uint8)
    together = preprocess(images)
    assert torch.equal(preprocess([*images, images[0, :, :20]])[:4], together)
    assert torch.equal(preprocess(images.contiguous(memory_format=torch.channels_last)), together)
    assert torch.equal(preprocess(images[2:3])[0], together[2])
    assert preprocess(images[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("geometry", ["cropp", "pad", "center_crop", "", None, 3, ["crop"]])
def test_an_unknown_geometry_is_refused(geometry: object) -> None:
    """What is none of the four is refused with their names, wherever it is passed."""
    with pytest.raises(ArgumentError, match=r"geometry=.* is not known.*crop"):
        replace(CONVENTIONS["KERAS"], geometry=geometry)
    if geometry is not None:
        with pytest.raises(ArgumentError, match=r"geometry=.* is not known.*crop"):
            tk.load_backbone("vgg11", weights=None, image_size=32, geometry=geometry)


@pytest.mark.parametrize("written", ["Letterbox", "LETTERBOX"])
def test_a_geometry_may_be_written_in_upper_case(written: str) -> None:
    """It is the geometry of that name, not the default, and equal to it in files and keys."""
    own = replace(CONVENTIONS["KERAS"], geometry=written)
    assert own == replace(CONVENTIONS["KERAS"], geometry="letterbox")
    backbone = tk.load_backbone("vgg11", weights=None, image_size=32, geometry=written)
    assert backbone.preprocess.geometry == "letterbox"


# --- one geometry wherever the model goes


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_load_backbone_takes_a_geometry(geometry: str) -> None:
    """It becomes the preprocessing's, at another image size too; without it a Preprocessing keeps its own."""
    backbone = tk.load_backbone("vgg11", weights=None, image_size=64, geometry=geometry)
    assert backbone.preprocess == preprocessing(geometry, 64)
    assert backbone.preprocess.with_image_size(96) == preprocessing(geometry, 96)
    own = tk.load_backbone("vgg11", weights=None, image_size=64, preprocessing=preprocessing(geometry))
    assert own.preprocess == preprocessing(geometry, 64)
    other = tk.load_backbone("vgg11", weights=None, preprocessing=preprocessing(geometry), geometry="squash")
    assert other.preprocess == preprocessing("squash", 224)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_saved_model_keeps_its_geometry(geometry: str, tmp_path: Path) -> None:
    """`load_model` builds a model that sees images as the saved one did."""
    model = make_real_model(geometry)
    tk.save_model(model, tmp_path / "model.pt")
    loaded = tk.load_model(tmp_path / "model.pt")
    images = torch.randint(0, 256, (2, 3, 40, 70), dtype=torch.uint8)
    assert loaded.backbone.preprocess == model.backbone.preprocess
    assert torch.equal(loaded.backbone.preprocess(images), model.backbone.preprocess(images))


def test_a_file_from_before_there_were_geometries_is_a_crop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that names no geometry is read as what it was made with, for a new model and for a live one."""
    model = make_real_model("crop")

    def without_geometry(preprocess: object) -> dict[str, object]:
        return {name: value for name, value in asdict(preprocess).items() if name != "geometry"}

    with monkeypatch.context() as patch:
        patch.setattr("transferkit.saving.model.asdict", without_geometry)
        tk.save_model(model, tmp_path / "old.pt")
        tk.Trainer(model, device="cpu").save(tmp_path / "old_trainer.pt")

    assert tk.load_model(tmp_path / "old.pt").backbone.preprocess == model.backbone.preprocess
    tk.Trainer(make_real_model("crop"), device="cpu").load(tmp_path / "old_trainer.pt")
    with pytest.raises(CheckpointError, match="preprocessing"):
        tk.Trainer(make_real_model("squash"), device="cpu").load(tmp_path / "old_trainer.pt")


def test_a_checkpoint_of_another_geometry_is_refused(tmp_path: Path) -> None:
    """Weights that were trained on other pixels are not loaded into a live model without a word."""
    tk.Trainer(make_real_model("letterbox"), device="cpu").save(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"preprocessing.*letterbox.*crop.*expected the same"):
        tk.Trainer(make_real_model("crop"), device="cpu").load(tmp_path / "model.pt")


def test_a_file_of_an_unknown_geometry_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file from a later version, or a damaged one, ends in an error that names the geometry."""
    model = make_real_model("crop")
    with monkeypatch.context() as patch:
        patch.setattr("transferkit.saving.model.asdict", lambda preprocess: asdict(preprocess) | {"geometry": "globe"})
        tk.save_model(model, tmp_path / "later.pt")
    with pytest.raises(CheckpointError, match="preprocessing that cannot be used: geometry='globe' is not known"):
        tk.load_model(tmp_path / "later.pt")


def test_the_geometry_is_part_of_the_cache_s_key() -> None:
    """Features of the same images and layers differ by geometry, and so do their digests and the fingerprint."""
    layers, _ = pure_prefix(make_model(make_backbone(), "head"))
    device = tk.Device("cpu", "fp32")
    digests = {Prefix(layers, preprocessing(geometry), device=device).digests[-1] for geometry in GEOMETRIES}
    assert len(digests) == len(GEOMETRIES)
    backbone, fingerprints = make_backbone(), set()
    for geometry in GEOMETRIES:
        backbone.preprocess = preprocessing(geometry)
        fingerprints.add(backbone.fingerprint)
    assert len(fingerprints) == len(GEOMETRIES)


def test_files_of_features_are_those_of_the_geometry(tmp_path: Path) -> None:
    """With one folder for all, each geometry's features are those computed without a cache."""
    images, targets = torch.randint(0, 256, (6, 3, 40, 70), dtype=torch.uint8), torch.arange(6) % 3
    for geometry in (*GEOMETRIES, *GEOMETRIES):
        model = make_model(make_backbone(), "head")
        model.backbone.preprocess = preprocessing(geometry)
        given = {"device": "cpu", "precision": "fp32"}
        cached = tk.cache_features(model, (images, targets), cache=tmp_path, **given)
        alone = tk.cache_features(model, (images, targets), **given)
        assert torch.equal(torch.stack([row for row, _ in cached]), torch.stack([row for row, _ in alone]))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_augmented_images_are_resized_once(geometry: str) -> None:
    """An augmentation that changes nothing gives the model input that there is without one."""
    data = (torch.randint(0, 256, (4, 3, 40, 70), dtype=torch.uint8), torch.arange(4) % 3)
    place = tk.Device("cpu", "fp32")
    plain, augmented = (
        Inputs(open_data(data, CLASSES), preprocessing(geometry), place, transform)
        for transform in (None, torch.nn.Identity())
    )
    for (expected, _), (got, _), (read, _) in zip(
        plain.batches(2), augmented.batches(2), augmented.read(2), strict=True
    ):
        assert torch.equal(got, expected)
        assert torch.equal(augmented.prepare(read), expected)


class Pictures(torch.utils.data.Dataset):
    """PIL images of two shapes, read from nowhere else than a data set."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (40 + index % 2, 70, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 3


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_search_sees_the_pixels_of_each_geometry(geometry: str) -> None:
    """Images that a search keeps in memory for its trials are those that the model sees without it."""
    preprocess, place = preprocessing(geometry), tk.Device("cpu", "fp32")
    data = Pictures()
    kept = resized(data, CLASSES, preprocess, device=place) or data
    seen = [
        torch.cat([images for images, _ in Inputs(open_data(given, CLASSES), preprocess, place).batches(5)])
        for given in (data, kept)
    ]
    assert torch.equal(*seen)


def test_trials_may_differ_in_geometry() -> None:
    """Each trial of a search over geometries trains on its own pixels: its result is that of a run alone."""

    def build(geometry: str) -> tk.TransferModel:
        model = make_model(make_backbone(), "head")
        model.backbone.preprocess = preprocessing(geometry)
        return model

    given = {"device": "cpu", "precision": "fp32", "verbose": 0}
    together = tk.search(
        build, {"geometry": list(GEOMETRIES), "epochs": [1]}, Pictures(), validation_data=Pictures(), **given
    )
    for trial in together.trials:
        space = {"geometry": [trial.params["geometry"]], "epochs": [1]}
        [alone] = tk.search(build, space, Pictures(), validation_data=Pictures(), **given).trials
        assert trial.history.history["val_loss"] == alone.history.history["val_loss"], trial.params


def make_real_model(geometry: str) -> tk.TransferModel:
    backbone = tk.load_backbone("vgg11", weights=None, image_size=32, geometry=geometry)
    return tk.freeze_until(tk.attach_head(backbone, CLASSES), "head")
