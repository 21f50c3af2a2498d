"""The forms in which images may come in."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from transferkit.data.images import as_image, as_images, check_image_size
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
        (pixels(2, 3, 0, 7), r"shape \(2, 3, 0, 7\) and dtype torch.uint8: expected raw images"),
        (np.zeros((2, 5, 7, 3), np.complex64), r"dtype torch.complex64: expected raw images, uint8.*Pass raw uint8"),
        (-torch.ones(2, 3, 5, 7, dtype=torch.int32), r"type torch.int32: expected raw images.*Pass raw uint8"),
        ([np.zeros((5, 7, 3), np.uint8)], r"images are a list: expected raw images.*different sizes pass a Dataset"),
        (np.array([None, None]), r"images are a ndarray: expected raw images"),
        ("photos", r"images are a str: expected raw images"),
    ],
)
def test_other_images_are_refused(images, match):
    """Another shape, type or container is refused with what was got, what is expected and what to do."""
    with pytest.raises(ImageError, match=match):
        as_images(images)


class Column:
    """What a table's column looks like to numpy, without the library."""

    def __init__(self, entries):
        self.entries = entries

    def __array__(self, dtype=None, copy=None):
        column = np.empty(len(self.entries), object)
        column[:] = self.entries
        return column


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
FLOATS = np.linspace(-2, 2, 2 * 3 * 5 * 7).reshape(2, 3, 5, 7)


@pytest.mark.parametrize("images", [
    Column(list(IMAGES)), np.asarray(Column(list(IMAGES))), np.ma.array(IMAGES, mask=False),
])  # fmt: skip
def test_object_arrays_and_columns_of_a_table_are_taken(images):
    """Arrays in an object array, or in what numpy makes one of, are the images of one array."""
    assert np.array_equal(as_images(images), IMAGES.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">f8", ">f2", np.longdouble])
def test_floats_of_any_byte_order_and_length_are_taken(dtype):
    """Arrays that files of other programs give have the values of native ones."""
    assert torch.allclose(as_images(FLOATS.astype(dtype)).double(), torch.from_numpy(FLOATS), atol=1e-3)


@pytest.mark.parametrize("images", [
    np.asarray(Column([np.zeros((5, 7, 3)), np.zeros((6, 7, 3))])), np.ma.array(IMAGES, mask=IMAGES > 3),
    np.zeros(3, "M8[D]"), np.zeros(3, [("a", int)]),
])  # fmt: skip
def test_arrays_of_no_one_image_batch_are_refused(images):
    """Images of different sizes in one array, masked pixels and what is no number get an error of this library."""
    with pytest.raises(ImageError, match="expected raw images"):
        as_images(images)


def test_array_of_strings_is_refused():
    """An array that is no numbers is refused as images, not with torch's own error."""
    with pytest.raises(ImageError, match=r"expected raw images"):
        as_images(np.array(["a.png", "b.png"]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_pil_image_of_any_eight_bit_mode_is_converted_to_rgb(mode):
    """An opaque PIL image of eight bits a channel gives the pixels of its RGB conversion."""
    colors = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    image = colors.convert("P").convert("PA") if mode == "PA" else colors.convert(mode)
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(as_image(image, 0).numpy(), expected)


def test_a_lab_image_keeps_its_colours():
    """LAB goes through its colour space: `convert("RGB")` alone would take lightness for red."""
    spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.new("RGB", (4, 4), (200, 30, 60)), *spaces, outputMode="LAB")
    assert (as_image(lab, 0)[:, 0, 0] - torch.tensor([200, 30, 60])).abs().max() <= 2


def transparent(mode):
    """A black square in the middle of black, transparent ground."""
    rgba = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    rgba.paste((0, 0, 0, 255), (2, 2, 6, 6))
    if mode in ("RGBA", "LA", "RGBa"):
        return rgba.convert(mode)
    if mode == "La":
        return rgba.convert("LA").convert("La")
    if mode == "PA":
        image = Image.new("PA", (8, 8))
        image.putpalette([0] * 768)
        image.putalpha(rgba.getchannel("A"))
        return image
    image = Image.new(mode, (8, 8), {"P": 1, "L": 7, "RGB": (7, 7, 7)}[mode])  # a colour that stands for transparent
    image.paste({"P": 0, "L": 0, "RGB": (0, 0, 0)}[mode], (2, 2, 6, 6))
    if mode == "P":
        image.putpalette([0, 0, 0, 0, 0, 0])
    image.info["transparency"] = {"P": 1, "L": 7, "RGB": (7, 7, 7)}[mode]
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA", "P", "L", "RGB"])
@pytest.mark.parametrize("form", ["image", "file"])
def test_transparent_pixels_are_laid_on_white_and_a_warning_says_so(mode, form):
    """Whatever hides behind transparent pixels is not seen, in every mode that has them, in memory and in a file."""
    image = transparent(mode)
    if form == "file":
        if mode in ("RGBa", "La", "PA"):
            return  # PNG has no such modes
        file = io.BytesIO()
        image.save(file, "PNG")
        image = Image.open(file)
    with pytest.warns(UserWarning, match="transparent pixels of images are laid on white"):
        read = as_image(image, 0)
    expected = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    expected[:, 2:6, 2:6] = 0
    assert torch.equal(read, expected)


def turned_by_exif(orientation=6):
    """A PNG file's bytes with an EXIF orientation, and its pixels as they are stored."""
    stored = np.zeros((4, 6, 3), np.uint8)
    stored[:, :2] = (255, 0, 0)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(file, "PNG", exif=exif)
    return file.getvalue(), stored


def test_what_pillow_made_of_a_file_is_not_turned_again():
    """`Image.transpose` keeps the old orientation: the image is used as it is, and a warning says so."""
    content, stored = turned_by_exif()
    turned = Image.open(io.BytesIO(content)).transpose(Image.Transpose.ROTATE_270).convert("RGB")
    with pytest.warns(UserWarning, match=r"carry the EXIF orientation.*exif_transpose"):
        read = as_image(turned, 0)
    assert np.array_equal(read.permute(1, 2, 0), np.rot90(stored, -1))
    assert np.array_equal(read, as_image(np.asarray(turned), 0))


def test_a_file_and_an_image_turned_as_the_warning_says_are_upright():
    """A file is turned once, in each form, and what `ImageOps.exif_transpose` turned stays, without a warning."""
    content, stored = turned_by_exif()
    ours = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    for image in (content, bytearray(content), io.BytesIO(content), Image.open(io.BytesIO(content)), ours):
        assert np.array_equal(as_image(image, 0).permute(1, 2, 0), np.rot90(stored, -1))


EXIF = [b"", b"Exif\0\0" + b"garbage!" * 4, b"Exif\0\0II*\0", b"MM\0*\0\0\0\x08\xff\xff", b"\0" * 40, "text"]


@pytest.mark.parametrize("exif", [*EXIF, *range(12)], ids=lambda exif: str(exif)[:12])
@pytest.mark.filterwarnings("ignore")
def test_unreadable_exif_is_no_orientation(exif):
    """Whatever a camera wrote into the EXIF block, the pixels are used as they are stored."""
    stored = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    if isinstance(exif, int):  # a sound block with bytes changed
        generator, block = np.random.default_rng(exif), Image.Exif()
        block.update({0x0112: 6, 0x010F: "camera"})
        content = bytearray(block.tobytes())
        for place in generator.integers(6, len(content), 4):
            content[place] = generator.integers(256)
        exif = bytes(content)
    image = Image.fromarray(stored)
    image.info["exif"] = exif
    assert np.array_equal(as_image(image, 0).permute(1, 2, 0), stored)


def test_a_damaged_file_is_not_read_as_one_with_unreadable_exif():
    """Looking for the orientation of a PNG reads its pixels: an error there is one of the file."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (34, 40, 3), dtype=np.uint8)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(OSError, match="broken"):
        as_image(bytes(content), 0)


@pytest.mark.parametrize(("values", "mode"), [
    (np.full((5, 7), 65535, np.uint16), "I;16"), (np.full((5, 7), 4095, np.int32), "I"),
    (np.full((5, 7), 1.0, np.float32), "F"), (np.full((5, 7), 255.0, np.float32), "F"),
])  # fmt: skip
def test_the_advice_for_pil_images_of_more_bits_works(values, mode):
    """The lines of the message make an image of eight bits that is as bright."""
    image = Image.fromarray(values)
    assert image.mode == mode
    with pytest.raises(ImageError, match="transform: ") as refused:
        as_image(image, 0)
    names = {"np": np, "Image": Image, "image": image}
    exec(str(refused.value).split("transform: ")[1], names)
    assert (as_image(names["image"], 0) == 255).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_pil_image_of_more_bits_is_refused(mode):
    """A PIL image of 16 or 32 bits, which conversion to RGB would clip to white, is refused with its place."""
    with pytest.raises(ImageError, match=rf"image 7 has mode '{mode}': expected 8 bits per channel.*Convert it in"):
        as_image(Image.new(mode, (7, 5)), 7)


def test_single_tensor_and_array_are_taken():
    """One image as a tensor `(3, H, W)` or array `(H, W, 3)` becomes uint8 `(3, H, W)`."""
    image = pixels(3, 5, 7)
    assert torch.equal(as_image(image, 0), image)
    assert torch.equal(as_image(image.permute(1, 2, 0).numpy(), 0), image)


@pytest.mark.parametrize("image", [pixels(5, 7), pixels(4, 5, 7), torch.zeros(3, 5, 7, dtype=torch.int32), "cat.png"])
def test_single_image_that_cannot_be_used_is_refused_with_its_place(image):
    """The message about one bad image names its place in the data set."""
    with pytest.raises(ImageError, match=r"^image 12: image .*expected raw image"):
        as_image(image, 12)


def test_preprocessed_images_pass_the_check(backbone):
    """What a backbone's own preprocessing made passes."""
    images = backbone.preprocess(pixels(2, 3, 32, 32))
    check_image_size(images, 32)


def test_float_images_of_another_size_are_refused():
    """Preprocessed images of another size are refused with both sizes and the remedy."""
    with pytest.raises(ImageError, match=r"have 48x32 pixels: expected 32x32. Pass raw uint8.*image_size=48"):
        check_image_size(-torch.ones(2, 3, 48, 32), 32)
