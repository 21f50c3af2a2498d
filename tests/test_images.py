"""The forms in which images may come in."""

import numpy as np
import pytest
import torch
from PIL import Image

from transferkit.data.images import as_image, as_images, check_image_size, check_normalized
from transferkit.errors import ImageError


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_raw_tensor_passes_without_a_copy():
    """uint8 `(N, 3, H, W)` comes back as the same memory."""
    images = pixels(2, 3, 5, 7)
    assert as_images(images).data_ptr() == images.data_ptr()


def test_channels_last_array_is_permuted():
    """A uint8 array `(N, H, W, 3)` becomes `(N, 3, H, W)` with the same pixels."""
    array = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    assert np.array_equal(as_images(array).numpy(), array.transpose(0, 3, 1, 2))


def test_channels_second_wins_where_both_readings_fit():
    """`(N, 3, H, 3)` is read as channels second."""
    images = pixels(2, 3, 5, 3)
    assert torch.equal(as_images(images), images)


def test_three_rows_of_pixels_are_told_from_channels():
    """`(N, H, W, 3)` is permuted and `(N, 3, H, W)` is not, whatever H and W are otherwise."""
    assert as_images(pixels(2, 5, 3, 3)).shape == (2, 3, 5, 3)
    assert as_images(pixels(2, 3, 3, 5)).shape == (2, 3, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_float_images_become_float32(dtype):
    """Preprocessed images of any float type become float32 of the same values."""
    images = torch.tensor([-1.5, 0.25, 2.0]).to(dtype).view(1, 3, 1, 1)
    result = as_images(images)
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == [-1.5, 0.25, 2.0]


@pytest.mark.usefixtures("every_warning")
def test_read_only_array_is_taken_without_a_warning():
    """A read-only array, as `np.asarray(pil_image)` gives, is used and nobody is warned."""
    array = np.zeros((2, 5, 7, 3), np.uint8)
    array.flags.writeable = False
    assert as_images(array).shape == (2, 3, 5, 7)


def test_array_with_a_negative_stride_is_taken():
    """`array[..., ::-1]`, OpenCV's BGR made RGB, is used with its channels in that order."""
    array = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)[..., ::-1]
    assert np.array_equal(as_images(array).numpy(), array.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (
            pixels(3, 5, 7),
            r"shape \(3, 5, 7\) and dtype torch.uint8: expected raw images.*batch dimension: image\[None\]",
        ),
        (pixels(2, 1, 5, 7), r"shape \(2, 1, 5, 7\).*without 3 channels: expected.*Repeat a gray channel three times"),
        (pixels(2, 5, 7, 1), r"shape \(2, 5, 7, 1\).*without 3 channels: expected.*Repeat a gray channel three times"),
        (pixels(2, 4, 5, 7), r"shape \(2, 4, 5, 7\).*without 3 channels: expected.*Drop an alpha channel"),
        (pixels(2, 5, 7, 4), r"shape \(2, 5, 7, 4\).*without 3 channels: expected.*Drop an alpha channel"),
        (pixels(2, 3, 0, 7), r"shape \(2, 3, 0, 7\).*without pixels: expected raw images"),
        (
            torch.zeros(2, 3, 5, 7, dtype=torch.int32),
            r"type torch.int32: expected raw images, uint8.*astype\('uint8'\)",
        ),
        (np.zeros((2, 5, 7, 3), np.int64), r"type torch.int64: expected raw images, uint8.*astype\('uint8'\)"),
        (np.zeros((2, 3, 5, 7), bool), r"type torch.bool: expected raw images, uint8"),
        ([np.zeros((5, 7, 3), np.uint8)], r"images are a list: expected raw images.*different sizes pass a Dataset"),
        (np.array([None, None]), r"images are a ndarray: expected raw images"),
        ("photos", r"images are a str: expected raw images"),
    ],
)
def test_other_images_are_refused(images, match):
    """Another shape, type or container is refused with what was got, what is expected and what to do."""
    with pytest.raises(ImageError, match=match):
        as_images(images)


def test_array_of_strings_is_refused():
    """An array that is no numbers is refused as images, not with torch's own error."""
    with pytest.raises(ImageError, match=r"expected raw images"):
        as_images(np.array(["a.png", "b.png"]))


def test_float_images_with_channels_last_are_refused_with_the_order_named():
    """Float `(N, H, W, 3)` does have 3 channels: the message says that they come second."""
    with pytest.raises(ImageError, match=r"shape \(2, 5, 7, 3\) and dtype torch.float32.*channels second.*permute"):
        as_images(torch.randn(2, 5, 7, 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pil_image_of_any_eight_bit_mode_is_converted_to_rgb(mode):
    """A PIL image of eight bits a channel gives the pixels of its RGB conversion."""
    colors = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(colors).convert(mode)
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(as_image(image, 0).numpy(), expected)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pil_image_of_more_bits_is_refused(mode):
    """A PIL image of 16 or 32 bits, which conversion to RGB would clip to white, is refused with its place."""
    with pytest.raises(ImageError, match=rf"image 7 has mode '{mode}': expected 8 bits per channel.*Scale it to 0"):
        as_image(Image.new(mode, (7, 5)), 7)


def test_single_tensor_and_array_are_taken():
    """One image as a tensor `(3, H, W)` or array `(H, W, 3)` becomes uint8 `(3, H, W)`."""
    image = pixels(3, 5, 7)
    assert torch.equal(as_image(image, 0), image)
    assert torch.equal(as_image(image.permute(1, 2, 0).numpy(), 0), image)


@pytest.mark.parametrize("image", [pixels(5, 7), pixels(4, 5, 7), torch.zeros(3, 5, 7, dtype=torch.int32), "cat.png"])
def test_single_image_that_cannot_be_used_is_refused_with_its_place(image):
    """The message about one bad image names its place in the data set."""
    with pytest.raises(ImageError, match=r"^image 12: images .*expected raw images"):
        as_image(image, 12)


def test_preprocessed_images_pass_the_check(backbone):
    """What a backbone's own preprocessing made passes."""
    images = backbone.preprocess(pixels(2, 3, 32, 32))
    check_image_size(images, 32)
    check_normalized(images, "KERAS")


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 200.0])
def test_float_images_without_a_negative_value_are_refused(value):
    """Float images in 0..1 or 0..255 are refused with the remedy."""
    images = torch.full((2, 3, 32, 32), value)
    with pytest.raises(ImageError, match=r"values from .* to .* not preprocessed: KERAS .*Pass raw uint8.*preprocess"):
        check_normalized(images, "KERAS")


def test_float_images_of_another_size_are_refused():
    """Preprocessed images of another size are refused with both sizes and the remedy."""
    with pytest.raises(ImageError, match=r"have 48x32 pixels: expected 32x32. Pass raw uint8.*image_size=48"):
        check_image_size(-torch.ones(2, 3, 48, 32), 32)
