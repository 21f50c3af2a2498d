"""Raw images to model input: torchvision's and Keras's conventions, and independence of the batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import VGG16_Weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

import transferkit as tk
from tiny import make_backbone
from transferkit.data.preprocessing import CONVENTIONS, GEOMETRIES, find_convention
from transferkit.errors import ArgumentError, ImageError

INTEGERS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
ASSETS = Path(__file__).parent.parent / "examples" / "assets"


def raw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", list(VGG16_Weights))
def test_pixels_are_torchvisions(weights: VGG16_Weights) -> None:
    """An image of the right size gives what the weights' own torchvision transforms give."""
    images = raw(2, 3, 224, 224)

    ours = CONVENTIONS[weights.name](images)

    # torchvision divides by 255 first and so rounds elsewhere; values reach 2.6 (V1) and 155 (FEATURES).
    assert_close(ours, weights.transforms(resize_size=224)(images), rtol=1e-5, atol=1e-5)


def test_keras_pixels_are_its_formula() -> None:
    """The Keras convention is BGR, 0 to 255, minus the channel means: exactly the formula written out."""
    images = raw(2, 3, 32, 32)
    red, green, blue = images.float().unbind(dim=1)
    expected = torch.stack([blue - 103.939, green - 116.779, red - 123.68], dim=1)

    assert torch.equal(CONVENTIONS["KERAS"].with_image_size(32)(images), expected)


def test_keras_and_features_conventions_describe_one_network() -> None:
    """With the input channels of the first convolution flipped, the Keras convention gives the FEATURES network's."""
    layers, flipped_layers = make_backbone().features, make_backbone().features
    original = tk.Backbone("tiny", layers, CONVENTIONS["IMAGENET1K_FEATURES"].with_image_size(32))
    with torch.no_grad():
        flipped_layers[0].weight.copy_(layers[0].weight.flip(1))
    flipped = tk.Backbone("tiny", flipped_layers, CONVENTIONS["KERAS"].with_image_size(32))
    images = raw(4, 3, 32, 32)

    with torch.no_grad():
        expected, got = original(original.preprocess(images)), flipped(flipped.preprocess(images))
        unflipped = original(flipped.preprocess(images))

    # torchvision's and Keras's means differ by up to 0.7 of 255 levels (123.0 and 123.68 for red).
    assert (got - expected).norm() < 0.02 * expected.norm()
    assert (unflipped - expected).norm() > 0.2 * expected.norm()


@pytest.mark.parametrize("convention", sorted(CONVENTIONS))
def test_a_mean_coloured_image_is_zero(convention: str) -> None:
    """An image of each channel's mean colour is within half a level of zero in every convention."""
    preprocess = CONVENTIONS[convention].with_image_size(32)
    colour = torch.zeros(3, dtype=torch.uint8)
    for place, channel in enumerate(preprocess.channels):
        colour[channel] = round(preprocess.mean[place])

    pixels = preprocess(colour.view(1, 3, 1, 1).expand(1, 3, 32, 32))

    assert (pixels.abs() * torch.tensor(preprocess.std).view(3, 1, 1) <= 0.5).all()


# --- size


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (20, 32), (32, 20), (100, 100), (33, 32), (7, 500)])
def test_any_image_becomes_the_size_asked_for(size: tuple[int, int]) -> None:
    """Larger, smaller, high and wide images all become uint8 squares of image_size."""
    resized = CONVENTIONS["KERAS"].with_image_size(32).resize(raw(2, 3, *size))

    assert tuple(resized.shape) == (2, 3, 32, 32)
    assert resized.dtype == torch.uint8


@pytest.mark.parametrize("wide", [True, False])
def test_resizing_keeps_aspect_and_crops_the_centre(*, wide: bool) -> None:
    """Of an image of 2:1 the centre half is kept, in its own proportions: a centred square stays a centred square."""
    image = torch.zeros(1, 3, 64, 128, dtype=torch.uint8)
    image[..., 16:48, 48:80] = 200  # a square of half the height, in the middle
    image[..., :, :32] = 255  # outside the centre half
    image[..., :, 96:] = 255
    image = image if wide else image.transpose(2, 3)

    resized = CONVENTIONS["KERAS"].with_image_size(32).resize(image)

    expected = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    expected[..., 8:24, 8:24] = 200
    inner = torch.zeros(32, 32, dtype=torch.bool)
    inner[1:31, 1:31] = True  # the outermost pixels mix with what was cropped
    edges = torch.zeros(32, 32, dtype=torch.bool)
    edges[7:25, 7:25] = True
    edges[9:23, 9:23] = False  # antialiasing mixes across the square's edge
    assert torch.equal(resized[..., inner & ~edges], expected[..., inner & ~edges])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", [(1, 100_000), (100_001, 1), (2, 60_001), (3, 40_000)])
def test_the_memory_of_resizing_is_bounded(
    shape: tuple[int, int], geometry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an image that is all but a line only the middle is computed, or no more than eight times the result."""
    made, resize = [], transforms.resize

    def watched(images: Tensor, size: list[int], **options: object) -> Tensor:
        made.append(size[0] * size[1])
        return resize(images, size, **options)

    monkeypatch.setattr(transforms, "resize", watched)
    monkeypatch.setattr("PIL.Image.Image.resize", lambda *_, **__: pytest.fail("the whole image is resized"))
    line = torch.zeros(1, 3, *shape, dtype=torch.uint8)
    middle = shape.index(max(shape)) + 2
    line.narrow(middle, max(shape) // 2 - 4, 8 + max(shape) % 2).fill_(200)
    pixels = replace(CONVENTIONS["KERAS"], image_size=64, geometry=geometry).resize(line)
    assert pixels.shape == (1, 3, 64, 64)
    assert (pixels == 200).all() or geometry in ("letterbox", "squash")
    assert max(made, default=0) <= 8 * 64**2


@pytest.mark.skipif(not INTEGERS, reason="torch resizes in floating point on this CPU")
@pytest.mark.parametrize("size", [32, 50])
@pytest.mark.parametrize("shape", [(10, 81), (10, 90), (81, 10), (90, 11), (7, 500), (33, 400), (3, 2000), (900, 70)])
def test_the_middle_of_a_long_image_is_what_resizing_all_of_it_gives(shape: tuple[int, int], size: int) -> None:
    """An image so long that only its middle is computed gives the very pixels of the image resized whole."""
    images = raw(2, 3, *shape)
    whole = transforms.resize(images, [round(side * size / min(shape)) for side in shape], antialias=True)

    middle = CONVENTIONS["KERAS"].with_image_size(size).resize(images)

    assert torch.equal(middle, transforms.center_crop(whole, [size, size]))


def test_resizing_is_torchvisions_antialiased_bilinear() -> None:
    """A square image is resized exactly as torchvision resizes it, bilinear with antialiasing."""
    images = raw(2, 3, 96, 96)
    expected = transforms.resize(images, [32, 32], interpolation=InterpolationMode.BILINEAR, antialias=True)

    assert torch.equal(CONVENTIONS["KERAS"].with_image_size(32).resize(images), expected)


def test_an_image_of_the_right_size_is_not_touched() -> None:
    """At image_size resizing returns the very pixels."""
    images = raw(2, 3, 32, 32)

    assert torch.equal(CONVENTIONS["KERAS"].with_image_size(32).resize(images), images)


def test_raw_images_are_not_changed() -> None:
    """Preprocessing leaves the images it was given as they were."""
    images = raw(2, 3, 32, 32)
    before = images.clone()

    CONVENTIONS["IMAGENET1K_V1"].with_image_size(32)(images)

    assert torch.equal(images, before)


# --- batches


@pytest.mark.parametrize("convention", sorted(CONVENTIONS))
def test_pixels_do_not_depend_on_the_batch(convention: str) -> None:
    """An image gives the same bits alone, in a batch, and in a list with images of other sizes."""
    preprocess = CONVENTIONS[convention].with_image_size(32)
    images = raw(5, 3, 47, 61)

    together = preprocess(images)
    listed = preprocess([raw(3, 32, 32), *images, raw(3, 20, 90)])

    for index, image in enumerate(images):
        assert torch.equal(preprocess(image[None])[0], together[index])
    assert torch.equal(listed[1:-1], together)


def test_pixels_do_not_depend_on_the_memory_layout() -> None:
    """Images decoded as (N, H, W, 3) and permuted give the same bits as contiguous ones."""
    preprocess = CONVENTIONS["IMAGENET1K_V1"].with_image_size(32)
    images = raw(3, 3, 50, 40)

    assert torch.equal(preprocess(images.contiguous(memory_format=torch.channels_last)), preprocess(images))


def test_an_empty_batch_stays_empty() -> None:
    """A batch of no images gives a batch of none, in the right shape."""
    preprocess = CONVENTIONS["IMAGENET1K_V1"].with_image_size(32)

    assert tuple(preprocess(raw(0, 3, 32, 32)).shape) == (0, 3, 32, 32)


def test_an_empty_list_is_refused() -> None:
    """A list of no images is refused with what was expected."""
    with pytest.raises(ImageError, match=r"expected"):
        CONVENTIONS["KERAS"]([])


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 32, 32),
        torch.zeros(1, 3, 32, 32, dtype=torch.int64),
        raw(3, 32, 32),
        raw(1, 1, 32, 32),
        raw(1, 4, 32, 32),
        [torch.zeros(3, 32, 32)],
        [raw(3, 32, 32), raw(1, 3, 32, 32)],
    ],
    ids=["float", "int64", "no batch", "grey", "rgba", "float in list", "batch in list"],
)
def test_images_that_are_not_raw_are_refused(images: Tensor) -> None:
    """Floats, other integers, another number of channels or dimensions are refused with got, expected and the fix."""
    with pytest.raises(ImageError, match=r"shape \(.*type .*: expected raw images, uint8 \(N, 3, H, W\)"):
        CONVENTIONS["KERAS"].with_image_size(32)(images)


def test_arrays_and_channels_last_are_preprocessed_alike() -> None:
    """A batch gives the same model input as a tensor or an array, with its channels second or last."""
    preprocess, images = CONVENTIONS["KERAS"].with_image_size(32), raw(2, 3, 40, 36)
    for form in (images.numpy(), images.permute(0, 2, 3, 1), images.permute(0, 2, 3, 1).numpy()):
        assert torch.equal(preprocess(form), preprocess(images))


# --- conventions


def test_a_convention_is_found_by_name() -> None:
    """find_convention returns the convention of that name."""
    assert find_convention("KERAS") is CONVENTIONS["KERAS"]


def test_with_image_size_changes_the_size_only() -> None:
    """Another image size is the same convention otherwise, and leaves the first as it was."""
    own = tk.Preprocessing("mine", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (1, 2, 0), image_size=99)

    assert own.with_image_size(50) == tk.Preprocessing("mine", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (1, 2, 0), 50)
    assert own.image_size == 99


def test_an_unknown_convention_is_refused() -> None:
    """A name that is no convention is refused with the three there are and the way to one's own."""
    with pytest.raises(
        ArgumentError, match=r"'CAFFE' is not known.*'IMAGENET1K_V1', 'IMAGENET1K_FEATURES', 'KERAS'.*own"
    ):
        find_convention("CAFFE")


@pytest.mark.slow
def test_real_weights_are_those_of_the_v1_convention() -> None:
    """ImageNet's real first convolution sees the same edges through torchvision's transforms and through ours."""
    backbone = tk.load_backbone(
        weights=ASSETS / "vgg16_imagenet_features_bf16.pt", image_size=224, preprocessing="IMAGENET1K_V1"
    ).eval()
    images = raw(1, 3, 224, 224)
    first: nn.Module = backbone.features[0]

    with torch.no_grad():
        ours = first(backbone.preprocess(images))
        theirs = first(VGG16_Weights.IMAGENET1K_V1.transforms(resize_size=224)(images))

    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
