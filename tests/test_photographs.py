"""JPEG files much larger than the network's input: decoded at a size that is enough, the same way everywhere."""

import io
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import ImageFolder

import transferkit as tk
from tiny import CLASSES, make_backbone, make_model
from transferkit.data import samples, workers
from transferkit.data.images import as_image, open_image
from transferkit.data.inputs import Inputs
from transferkit.data.open import open_data
from transferkit.data.preprocessing import CONVENTIONS, GEOMETRIES
from transferkit.data.resized import resized
from transferkit.errors import CheckpointError, ImageError
from transferkit.features.prefix import Prefix, pure_prefix

SIZE = 32
PREPROCESS = CONVENTIONS["IMAGENET1K_V1"].with_image_size(SIZE)
CPU = tk.Device("cpu", "fp32")


def photograph(number: int, width: int = 320, height: int = 256, turned: int = 1) -> bytes:
    """A JPEG file of shapes with a camera's grain."""
    draw = np.random.default_rng(number)
    small = Image.fromarray(draw.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + draw.normal(0, 8, (height, width, 1))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turned
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Twelve photographs of two shapes, in a folder for each class."""
    for number in range(12):
        path = tmp_path / "photos" / CLASSES[number % 3] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(number, *[(320, 256), (256, 320)][number % 2]))
    return ImageFolder(tmp_path / "photos")


def read(content: bytes, preprocess: tk.Preprocessing = PREPROCESS) -> Tensor:
    """What the model is given of a file, before normalizing."""
    pixels = open_data([content], CLASSES, with_targets=False).samples.for_input(preprocess).read(0, 0)[0]
    return preprocess.resize(pixels[None])[0]


def whole(content: bytes, preprocess: tk.Preprocessing = PREPROCESS) -> Tensor:
    """The same of all its pixels."""
    return preprocess.resize(as_image(content, 0)[None])[0]


def model_inputs(data: object, preprocess: tk.Preprocessing = PREPROCESS, **how: object) -> Tensor:
    batches = Inputs(open_data(data, CLASSES, **how), preprocess, CPU).batches(5)
    return torch.cat([images for images, _ in batches])


# ---- pixels


@pytest.mark.parametrize("turned", [1, 6], ids=["upright", "turned"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_scaled_decoding_changes_few_grey_levels(geometry: str, turned: int) -> None:
    """A photograph decoded at a quarter is within 12 levels of all its pixels resized, on average within one."""
    preprocess, content = replace(PREPROCESS, geometry=geometry), photograph(0, 320, 256, turned)
    apart = (read(content, preprocess).int() - whole(content, preprocess).int()).abs()
    decoded = open_image(content, 0, prepare=preprocess.request_size)
    if geometry == "torchvision":  # whose pixels are promised
        assert max(decoded.size) == 320
        assert apart.max() == 0
    else:
        assert max(decoded.size) == 80
        assert 0 < apart.max() <= 12
        assert apart.float().mean() < 1


@pytest.mark.parametrize(
    ("width", "height", "decoded"),
    [(320, 256, 80), (318, 256, 159), (321, 256, 321), (640, 512, 80), (120, 126, 120)],
)
def test_a_scale_divides_both_sides_and_leaves_twice_the_size(width: int, height: int, decoded: int) -> None:
    """Rounded sides would change what is cut out, and fewer pixels would be seen in the result."""
    assert open_image(photograph(0, width, height), 0, prepare=PREPROCESS.request_size).width == decoded


def test_without_scaled_decoding_all_pixels_count() -> None:
    """Switched off, a large photograph is what all of its pixels give; a PNG always is."""
    content, file = photograph(0), io.BytesIO()
    assert torch.equal(read(content, replace(PREPROCESS, scaled_decoding=False)), whole(content))
    Image.open(io.BytesIO(content)).save(file, "PNG")
    assert torch.equal(read(file.getvalue()), whole(file.getvalue()))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", [(100, 80), (80, 101), (32, 32), (20, 70), (300, 34), (31, 33)], ids=str)
def test_resizing_in_two_steps_is_resizing_at_once(geometry: str, shape: tuple[int, int]) -> None:
    """What a reader makes smaller gives the model the same bits, and no image grows before it is on the device."""
    preprocess = replace(PREPROCESS, geometry=geometry)
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    small = preprocess.shrink(image)
    assert small.numel() <= max(image.numel(), 3 * SIZE**2)
    assert torch.equal(preprocess.resize(small[None]), preprocess.resize(image[None]))


# ---- the same everywhere


def test_every_way_to_the_model_gives_the_same_pixels(folder: ImageFolder) -> None:
    """Training, search and prediction, a folder, parts of it, paths, contents and workers: the same bits."""
    paths = [path for path, _ in folder.samples]
    expected = model_inputs(folder)
    assert expected.shape == (12, 3, SIZE, SIZE)
    assert torch.equal(expected, PREPROCESS.normalize(torch.stack([read(Path(path).read_bytes()) for path in paths])))
    for data in (ConcatDataset([folder]), Subset(folder, range(12))):
        assert torch.equal(model_inputs(data), expected)
    assert torch.equal(model_inputs(folder, num_workers=2), expected)
    kept = resized(folder, CLASSES, PREPROCESS, device=CPU)
    assert torch.equal(model_inputs(kept), expected)
    for images in (paths, [Path(path).read_bytes() for path in paths]):
        assert torch.equal(model_inputs(images, with_targets=False), expected)
    trainer = tk.Trainer(make_model(make_backbone(), "head"), device="cpu", precision="fp32")
    with torch.no_grad():
        logits = trainer.model(expected)
    assert np.allclose(trainer.predict_proba(paths), logits.softmax(dim=1).numpy(), atol=1e-6)


def test_scaled_decoding_is_part_of_the_cache_s_key(folder: ImageFolder, tmp_path: Path) -> None:
    """With one folder of features for both, each way gets those of its own pixels."""
    model = make_model(make_backbone(), "head")
    layers, _ = pure_prefix(model)
    kinds = [PREPROCESS, replace(PREPROCESS, scaled_decoding=False)]
    assert len({Prefix(layers, kind, device=CPU).digests[-1] for kind in kinds}) == 2
    for kind in kinds * 2:
        model.backbone.preprocess = kind
        cached = tk.cache_features(model, folder, device=CPU, cache=tmp_path / "features")
        assert torch.allclose(cached.features, Prefix(layers, kind, device=CPU)(model_inputs(folder, kind)), atol=1e-4)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_model_file_keeps_how_files_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, scaled: bool
) -> None:
    """A saved model decodes as before; one from before there was scaled decoding sees all pixels."""
    backbone = tk.load_backbone("vgg11", weights=None, image_size=SIZE)
    backbone.preprocess = replace(backbone.preprocess, scaled_decoding=scaled)
    model = tk.freeze_until(tk.attach_head(backbone, CLASSES), "head")
    tk.save_model(model, tmp_path / "model.pt")
    assert tk.load_model(tmp_path / "model.pt").backbone.preprocess == backbone.preprocess

    def without(preprocess: tk.Preprocessing) -> dict[str, object]:
        return {name: value for name, value in asdict(preprocess).items() if name != "scaled_decoding"}

    monkeypatch.setattr("transferkit.saving.model.asdict", without)
    tk.save_model(model, tmp_path / "old.pt")
    tk.Trainer(model, device="cpu").save(tmp_path / "old_trainer.pt")
    monkeypatch.setattr("transferkit.saving.model.asdict", lambda kind: asdict(kind) | {"scaled_decoding": 2})
    tk.save_model(model, tmp_path / "odd.pt")
    monkeypatch.undo()
    old = tk.load_model(tmp_path / "old.pt")
    assert old.backbone.preprocess == replace(backbone.preprocess, scaled_decoding=False)
    if scaled:
        with pytest.raises(CheckpointError, match="preprocessing"):
            tk.Trainer(model, device="cpu").load(tmp_path / "old_trainer.pt")
    with pytest.raises(CheckpointError, match="for scaled_decoding, True or False"):
        tk.load_model(tmp_path / "odd.pt")


# ---- how much is read, and when


def test_files_are_read_once(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without code of the user's in between repeat: only the first is opened twice, before the run."""
    opened = []
    monkeypatch.setattr(samples, "open_image", lambda *args, **how: opened.append(args[1]) or open_image(*args, **how))
    tk.cache_features(make_model(make_backbone(), "head"), folder, device=CPU)
    assert sorted(opened) == [0, *range(12)]


def test_one_batch_is_read_ahead_and_resized(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is in use one more is read, resized; whoever leaves in the middle ends the threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    before, finished = threading.active_count(), []
    source = open_data(folder, CLASSES)
    try_read = samples.Samples.try_read
    monkeypatch.setattr(samples.Samples, "try_read", lambda *args: finished.append(args[1]) or try_read(*args))
    batches = source.batches(2, seed=0, order=None, preprocess=PREPROCESS)
    images, _, places = next(batches)
    assert images.shape == (2, 3, SIZE, SIZE)
    assert places == [0, 1]
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
    assert set(finished) <= {0, 1, 2, 3}


def test_threads_keep_the_order_and_name_a_broken_file(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images come in the order asked for, though some take longer; a file cut short is named with its path."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    path = Path(folder.samples[0][0])
    path.write_bytes(photograph(0, 2048, 2048))
    order = torch.tensor([0, 11, 3, 7, 5])
    source = open_data(folder, CLASSES)
    found = list(source.batches(3, seed=0, order=order, preprocess=PREPROCESS))
    assert [place for _, _, places in found for place in places] == order.tolist()
    pixels = [read(Path(folder.samples[index][0]).read_bytes()) for index in order.tolist()]
    assert torch.equal(torch.cat([images for images, _, _ in found]), torch.stack(pixels))
    path = Path(folder.samples[7][0])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImageError, match=f"cannot read image 7 .*{path.name}"):
        list(source.batches(3, seed=0, order=order, preprocess=PREPROCESS))


def test_photographs_are_looked_at_small(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for bad images decodes a quarter of each photograph here, and still finds the one cut short."""
    path, seen = Path(folder.samples[7][0]), []
    path.write_bytes(path.read_bytes()[:-2000])
    monkeypatch.setattr(samples, "as_image", lambda *args: seen.append(max(args[0].size)) or as_image(*args))
    failures = [why for found in open_data(folder, CLASSES).failures() for why in found]
    assert [index for index, why in enumerate(failures) if why] == [7]
    assert str(path) in failures[7]
    assert seen == [80] * 12  # the first once more, when the data was opened


def test_images_that_are_not_resized_are_not_read_ahead(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of whole photographs may take gigabytes: who asks for all pixels gets one batch at a time."""
    monkeypatch.setattr(workers, "_read_in_threads", lambda *_: pytest.fail("read ahead"))
    images, _, _ = next(open_data(folder, CLASSES).batches(2, seed=0, order=None))
    assert sorted(images[0].shape) == [3, 256, 320]
