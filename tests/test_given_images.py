"""Images to predict from: files, PIL images, arrays, and lists of these."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import transferkit as tk
from transferkit.errors import EmptyDataError, ImageError


@pytest.fixture
def trainer(model) -> tk.Trainer:
    return tk.Trainer(model, device="cpu")


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)


@pytest.fixture
def path(pixels, tmp_path) -> Path:
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_one_image_in_every_form_is_predicted_alike(trainer, pixels, path):
    """A path, its name, a PIL image, an array, a tensor in both layouts: the same probabilities, one row."""
    expected = trainer.predict_proba(pixels[None])
    tensor, content = torch.from_numpy(pixels), path.read_bytes()
    encoded = [content, bytearray(content), memoryview(content), io.BytesIO(content)]
    for image in (path, str(path), Image.open(path), pixels, tensor, tensor.permute(2, 0, 1), *encoded, [content]):
        assert np.array_equal(trainer.predict_proba(image), expected)
    with path.open("rb") as file:
        assert np.array_equal(trainer.predict_proba(file), expected)
        assert np.array_equal(trainer.predict_proba([file, path])[:1], trainer.predict_proba([path, path])[:1])
    assert expected.shape == (1, 3)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_gray_images_are_not_taken_for_one_image(trainer, count, library):
    """Some of many gray images, `(N, H, W)`, are refused whatever their number, and the advice gives N predictions.

    Three in a tensor are one image with its channels first, as torchvision reads it and the documentation says.
    """
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    images = images if library == "numpy" else torch.from_numpy(images)
    if library == "torch" and count == 3:
        assert len(trainer.predict(images)) == 1
        return
    with pytest.raises(ImageError, match="Write: ") as refused:
        trainer.predict(images)
    names = {"np": np, "torch": torch, "images": images}
    exec(str(refused.value).split("Write: ")[1], names)
    assert len(trainer.predict(names["images"])) == count


def test_a_list_may_mix_forms_and_sizes(trainer, pixels, path):
    """Each element of a list is one image, whatever its form and size."""
    small = pixels[:32, :32]
    both = trainer.predict_proba([path, small, Image.fromarray(pixels)])
    assert np.allclose(both[0], both[2])
    assert np.allclose(both[1], trainer.predict_proba(small)[0], atol=1e-5)


def test_class_names_are_those_of_the_indices(trainer, pixels, path):
    """`predict_classes` gives the names of what `predict` gives."""
    indices = trainer.predict([path, pixels[:32]])
    assert trainer.predict_classes([path, pixels[:32]]) == [trainer.model.classes[index] for index in indices]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pil_modes_of_eight_bits_are_converted(trainer, pixels, mode, tmp_path):
    """Gray, alpha, palette and CMYK images are read from files of theirs as RGB."""
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / ("image.tiff" if mode == "CMYK" else "image.png"))
    path = next(tmp_path.glob("image.*"))
    assert np.array_equal(trainer.predict_proba(path), trainer.predict_proba(image.convert("RGB")))


def test_a_photograph_is_turned_as_its_exif_says(trainer, pixels, tmp_path):
    """A file whose EXIF orientation says so is turned before it is predicted."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = np.ascontiguousarray(np.rot90(pixels, k=-1))
    assert np.array_equal(trainer.predict_proba(tmp_path / "turned.png"), trainer.predict_proba(upright))


def test_sixteen_bits_are_refused_with_the_path(trainer, tmp_path):
    """An image of 16 bits a channel is refused, not cut off."""
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match=r"image 0 has mode 'I;16'.*deep\.png"):
        trainer.predict(tmp_path / "deep.png")


def test_a_missing_file_and_a_folder_are_refused_before_anything_is_read(trainer, path, tmp_path):
    """The message has the place and the path; for a folder, how to predict what is in it."""
    with pytest.raises(ImageError, match=r"image 1: file .*gone\.jpg does not exist"):
        trainer.predict([path, tmp_path / "gone.jpg"])
    with pytest.raises(ImageError, match=r"image 0 is the folder .*iterdir\(\)\) if file.suffix in \('.png',\)"):
        trainer.predict(tmp_path)


def test_a_file_of_something_else_is_refused_with_its_path(trainer, path, tmp_path):
    """A file that is no image is named, and no hint speaks of training."""
    (tmp_path / "notes.jpg").write_text("not an image")
    with pytest.raises(ImageError, match=r"cannot read image 1 \(.*notes\.jpg\)") as caught:
        trainer.predict([path, tmp_path / "notes.jpg"])
    assert "fit(" not in str(caught.value)


def test_an_empty_list_is_refused(trainer):
    """There is nothing to predict."""
    with pytest.raises(EmptyDataError):
        trainer.predict([])


def test_a_path_does_not_train(trainer, path):
    """What `predict` takes without targets `fit` refuses."""
    with pytest.raises(ValueError, match="expected images, not a path"):
        trainer.fit(path, epochs=1)
