"""What a message advises, followed literally, works on the very array or tensor it was given for."""

import itertools

import numpy as np
import pytest
import torch

from transferkit.data.conversions import conversion
from transferkit.data.images import as_image, as_images
from transferkit.errors import ImageError

BATCHES = [
    (8, 9),
    (8, 9, 3),
    (5, 8, 9),
    (5, 8, 9, 1),
    (5, 1, 8, 9),
    (5, 8, 9, 2),
    (5, 8, 9, 4),
    (5, 4, 8, 9),
    (5, 8, 9, 6),
]
SINGLE = [(8, 9), (8, 9, 1), (1, 8, 9), (8, 9, 4), (4, 8, 9), (2, 8, 9), (6, 8, 9)]
DTYPES = {
    "uint8": 255,
    "bool": 1,
    "int16": 255,
    ">u2": 255,
    "uint16": 65535,
    "int32": 4095,
    "int64": 255,
    "f4": 1,
    "f8": 255,
}


def follow(message: str, name: str, given: object) -> object:
    """Run the statements of a message and return what they make of the images."""
    names = {"np": np, "torch": torch, name: given}
    exec(message.split("Write: ")[1], names)
    return names[name]


def numbers(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    white = DTYPES[dtype]
    values = np.random.default_rng(0).uniform(0, white, shape)
    values.flat[:1], values.flat[-1:] = 0, white
    return values > 0.5 if dtype == "bool" else values.astype(dtype)


def crossed(shapes: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], str]]:
    """Each shape in two dtypes, and each dtype in one shape."""
    return [*itertools.product(shapes, ("uint8", "f4")), *((shapes[-1], dtype) for dtype in DTYPES)]


@pytest.mark.parametrize(("shape", "dtype"), crossed([*BATCHES, (5, 8, 9, 3), (5, 3, 8, 9), (5, 8, 9, 1)]))
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_advice_for_a_batch_works(shape, dtype, library):
    """Whatever is wrong with shape, channels and dtype, the message's lines make raw images as bright as before."""
    right = {"uint8": ((8, 9, 3), (3, 8, 9)), "f4": ((3, 8, 9),), "f8": ((3, 8, 9),)}
    if shape[1:] in right.get(dtype, ()) or (library == "torch" and dtype == ">u2"):  # torch has no byte order
        return
    values = numbers(shape, dtype)
    given = values if library == "numpy" else torch.from_numpy(values)
    with pytest.raises(ImageError) as refused:
        as_images(given)
    images = as_images(follow(str(refused.value), "images", given))
    assert (images.dtype, images.shape[1], sorted(images.shape[2:])) == (torch.uint8, 3, [8, 9])
    if 4 not in shape and 2 not in shape:
        expected = float(values.astype("f8").mean()) / DTYPES[dtype] * 255
        assert abs(float(images.float().mean()) - expected) < (30 if 6 in shape else 1)


@pytest.mark.parametrize(("shape", "dtype"), crossed([*SINGLE, (8, 9, 1)]))
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_advice_for_one_image_works(shape, dtype, library):
    """The same for one image of a data set, in the words of one image."""
    if library == "torch" and dtype == ">u2":
        return
    values = numbers(shape, dtype)
    given = values if library == "numpy" else torch.from_numpy(values)
    with pytest.raises(ImageError, match=r"^image 7: image has shape") as refused:
        as_image(given, 7)
    image = as_image(follow(str(refused.value), "image", given), 7)
    assert (image.dtype, image.shape[0], sorted(image.shape[1:])) == (torch.uint8, 3, [8, 9])


def test_transparent_pixels_of_arrays_are_laid_on_white():
    """Where alpha is 0 the lines give white, where it is 255 the colour; an opaque alpha channel is dropped."""
    images = np.zeros((2, 4, 4, 4), np.uint8)
    images[:, :2, :, 3] = 255
    made = follow("Write: " + conversion(images, "images", ndim=4), "images", images)
    assert (made[:, :2] == 0).all()
    assert (made[:, 2:] == 255).all()
    images[..., 3] = 255
    assert conversion(images, "images", ndim=4) == "images = images[..., :3]"


@pytest.mark.parametrize("arrays", [True, False])
def test_object_arrays_are_made_one_array_of_numbers_first(*, arrays):
    """Advice for an object array, of arrays or of numbers, begins with making one array."""
    column = np.zeros((3, 8, 9), object)
    if arrays:
        column = np.empty(3, object)
        column[:] = [np.zeros((8, 9), np.uint8)] * 3
    with pytest.raises(ImageError) as refused:
        as_images(column)
    assert as_images(follow(str(refused.value), "images", column)).shape == (3, 3, 8, 9)


@pytest.mark.parametrize(
    "images", [-np.ones((2, 3, 8, 8), int), np.full((2, 3, 8, 8), 10**6), np.full((2, 8, 8), -1.0)]
)
def test_nothing_is_advised_where_nothing_is_known(images):
    """Negative numbers and those of no known depth are not made into pixels by a guess."""
    assert conversion(images, "images", ndim=4) == ""
    with pytest.raises(ImageError, match="Pass raw uint8 images"):
        as_images(images)
