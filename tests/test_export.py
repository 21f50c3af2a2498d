"""A model exported with its preprocessing gives the probabilities that it gives here, from raw images of any size."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import transferkit as tk
from transferkit.data.preprocessing import CONVENTIONS, GEOMETRIES
from transferkit.errors import ArgumentError, ImageError

ASSETS = Path(__file__).parent.parent / "examples" / "assets"
DYNAMIC = {"images": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
# torchvision resizes uint8 images in integers here, elsewhere in floating point
INTEGERS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

# shapes of batches for image_size=32: the size itself, high, wide, smaller, larger, off by one, cropped a lot
SHAPES = [(1, 32, 32), (3, 48, 60), (2, 70, 33), (2, 20, 25), (1, 240, 320), (2, 33, 31), (2, 32, 40), (1, 12, 200)]

RELOAD = """
import sys
import numpy, torch
program = torch.export.load(sys.argv[1]).module()
images = numpy.load(sys.argv[2])
made = {name: program(torch.from_numpy(images[name])) for name in images}
numpy.savez(sys.argv[3], **{
    f"{name}{place or ''}": part.numpy()
    for name, parts in made.items()
    for place, part in enumerate(parts if isinstance(parts, tuple) else [parts])
})
assert "transferkit" not in sys.modules
"""

RELOAD_ONNX = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = numpy.load(sys.argv[2])
made = {name: session.run(None, {"images": images[name]}) for name in images}
numpy.savez(sys.argv[3], **{f"{name}{place or ''}": part for name in made for place, part in enumerate(made[name])})
assert "torch" not in sys.modules
print(session.get_modelmeta().custom_metadata_map["classes"])
"""


def raw(number: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8)


def vgg16(image_size: int) -> tk.TransferModel:
    weights = ASSETS / "vgg16_imagenet_features_bf16.pt"
    backbone = tk.load_backbone(weights=weights, preprocessing="IMAGENET1K_FEATURES", image_size=image_size)
    return tk.attach_head(backbone, ["cat", "dog", "owl"], hidden=(64,), dropout=0.5)


@pytest.fixture
def real() -> Iterator[tuple[tk.Trainer, dict[str, Tensor]]]:
    """A trainer of the real network, and raw images that need resizing and some that do not."""
    images = {"as they are": raw(2, 64, 64), "large": raw(3, 375, 500), "small": raw(1, 32, 32), "high": raw(5, 90, 65)}
    trainer = tk.Trainer(tk.freeze_until(vgg16(64), "head"), device="cpu", precision="fp32")
    trainer.learn_known((raw(12, 64, 64), torch.arange(12) % 3))
    trainer.model.temperature = 0.3
    return trainer, images


def run_elsewhere(program: str, exported: Path, images: dict[str, Tensor]) -> tuple[dict[str, Any], str]:
    """Return what a fresh process that gets nothing but the files makes of the images, and what it printed."""
    inputs, outputs = exported.parent / "images.npz", exported.parent / "probabilities.npz"
    np.savez(inputs, **{name: value.numpy() for name, value in images.items()})
    command = [sys.executable, "-c", program, str(exported), str(inputs), str(outputs)]
    result = subprocess.run(command, cwd=exported.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with np.load(outputs) as probabilities:
        return dict(probabilities), result.stdout


def compare_novelty(novelty: Any, trainer: tk.Trainer, images: Tensor) -> None:
    """Check scores of a program against the trainer's: distances of thousands, to a part in a thousand."""
    ours = trainer.novelty(images)
    assert np.abs(ours).max() > 0
    np.testing.assert_allclose(novelty, ours, rtol=1e-3 if INTEGERS else 1e-1, atol=1e-3 * np.abs(ours).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("geometry", "convention"),
    [*((geometry, "KERAS") for geometry in GEOMETRIES), ("crop", "IMAGENET1K_V1"), ("crop", "IMAGENET1K_FEATURES")],
)
def test_pixels_are_those_of_preprocess(
    shape: tuple[int, int, int],
    geometry: str,
    convention: str,
    model: tk.TransferModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What reaches the network is what backbone.preprocess makes of the images, bit for bit."""
    model.backbone.preprocess = replace(CONVENTIONS[convention], image_size=32, geometry=geometry)
    exportable = tk.WithPreprocessing(model)
    images, seen = raw(*shape), []
    features = torch.zeros(1, 72)
    monkeypatch.setattr(exportable.model.backbone, "forward", lambda inputs, pools: seen.append(inputs) or features)

    exportable(images)

    expected = model.backbone.preprocess(images)
    if INTEGERS:
        assert torch.equal(seen[0], expected)
    std = torch.tensor(model.backbone.preprocess.std).view(3, 1, 1)
    assert ((seen[0] - expected).abs() * std).max() <= 1.01  # one of 255 levels


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("image_size", [2, 32, 33, 64, 100, 224])
def test_pixels_agree_for_whatever_sizes(image_size: int, geometry: str, model: tk.TransferModel) -> None:
    """Pixels are the same to the last bit for random sizes, also where torch's integer weights change precision."""
    model.backbone.preprocess = replace(CONVENTIONS["KERAS"], image_size=image_size, geometry=geometry)
    exportable = tk.WithPreprocessing(model)
    generator = torch.Generator().manual_seed(image_size)
    sides = torch.randint(max(2, image_size // 4), 3 * image_size, (20, 2), generator=generator).tolist()
    # about two to one the largest weight lies beside one half, and 15 or 16 bits are a matter of the exact largest
    sides += [(5, 41), (40, 5), (300, 7), (1, 200), (3, 1000), (9, 72), (9, 73)]  # all but lines
    sides += [(2 * image_size - 1, image_size), (2 * image_size, image_size + 1), (3 * image_size // 2, 500)]
    sides += [(700, 1100)]  # to 2 pixels: integer weights have 22 bits at most
    sides += [(3, 900), (1000, 90), (1, 50), (50, 1)]  # so long that only the middle is computed
    for height, width in sides:
        images = raw(1, height, width)
        difference = (exportable._resize(images) - model.backbone.preprocess.resize(images)).abs().max()
        assert difference <= (0 if INTEGERS or geometry == "torchvision" else 1), (height, width)


def test_probabilities_are_the_trainers(backbone: tk.Backbone) -> None:
    """It gives what Trainer.predict_proba gives in fp32, bit for bit, though the model is in training mode."""
    model = tk.attach_head(backbone, 3, hidden=(16,), dropout=0.5)
    trainer = tk.Trainer(tk.freeze_until(model, "head"), device="cpu", precision="fp32")
    exportable = tk.WithPreprocessing(model.train())
    for shape in SHAPES:
        images = raw(*shape)
        probabilities = exportable(images)
        torch.testing.assert_close(
            probabilities.numpy(), trainer.predict_proba(images), rtol=0, atol=0 if INTEGERS else 1e-3
        )
        assert not probabilities.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(
    "head",
    [
        {},
        {"hidden": (16,), "dropout": 0.5, "pooling": "avg"},
        {"pooling": "flatten"},
        {"layers": ["block5", "block2"], "pooling": "max"},
        {"layers": ["block3_relu1"]},
    ],
    ids=["default", "average", "flatten", "several layers", "within a block"],
)
@pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])
def test_heads_of_any_layers_give_the_trainers_probabilities(
    backbone: tk.Backbone, head: dict[str, Any], temperature: float, *, several: bool
) -> None:
    """Whatever layers the head takes, probabilities are the trainer's: the logits over the temperature, bit for bit."""
    model = tk.freeze_until(tk.attach_head(backbone, 3, **head), "head")
    trainer = tk.Trainer(model, device="cpu", precision="fp32", loss=tk.BinaryCrossEntropy() if several else None)
    images = raw(6, 32, 32)
    targets = torch.eye(3)[torch.arange(6) % 3] if several else torch.arange(6) % 3
    trainer.fit((images, targets), epochs=1, verbose=0)  # what the features are standardized by is exported
    model.temperature = temperature

    probabilities = tk.WithPreprocessing(model)(images)

    inputs = model.backbone.preprocess(images).to(memory_format=torch.channels_last)
    logits = model.eval()(inputs).detach() / temperature
    expected = logits.sigmoid() if several else logits.softmax(dim=1)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=0 if INTEGERS else 1e-3)
    torch.testing.assert_close(
        probabilities.numpy(), trainer.predict_proba(images), rtol=0, atol=0 if INTEGERS else 1e-3
    )


def test_the_temperature_is_that_of_the_export(model: tk.TransferModel) -> None:
    """A higher temperature makes an export less certain; one that the model gets later does not change it."""
    images = raw(2, 32, 32)
    exportable = tk.WithPreprocessing(model)
    before = exportable(images)

    model.temperature = 4.0

    assert torch.equal(exportable(images), before)
    warm = tk.WithPreprocessing(model)(images)
    assert (warm.amax(dim=1) < before.amax(dim=1)).all()
    assert torch.equal(warm.argmax(dim=1), before.argmax(dim=1))


def test_the_model_is_left_alone(model: tk.TransferModel) -> None:
    """What is exported is a copy: the model keeps its mode and freezing, and training it changes no probability."""
    tk.freeze_until(model, "head").train()
    exportable, images = tk.WithPreprocessing(model), raw(2, 40, 40)
    before = exportable(images)

    assert model.training
    assert [parameter.requires_grad for parameter in model.head.parameters()] == [True] * 4
    with torch.no_grad():
        model.head.logits.weight.mul_(2)
    assert torch.equal(exportable(images), before)


def test_half_precision_is_exported_in_fp32(model: tk.TransferModel) -> None:
    """A model in another number format still gives float32 probabilities."""
    assert tk.WithPreprocessing(model.double())(raw(1, 40, 40)).dtype == torch.float32


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 40, 40), torch.zeros(3, 40, 40, dtype=torch.uint8), torch.zeros(1, 1, 40, 40).byte()]
)
def test_what_is_no_raw_image_is_refused(images: Tensor, model: tk.TransferModel) -> None:
    """Floats, one image without a batch dimension and gray images end in a sentence that says what is expected."""
    with pytest.raises(ImageError, match=r"expected raw images, uint8 \(N, 3, H, W\)"):
        tk.WithPreprocessing(model)(images)


def test_only_a_model_can_be_exported(model: tk.TransferModel) -> None:
    """A trainer or a bare backbone is refused, and the message says where the model is."""
    for wrong in (tk.Trainer(model, device="cpu"), model.backbone):
        with pytest.raises(ArgumentError, match=r"expected a TransferModel.*trainer\.model"):
            tk.WithPreprocessing(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("head", [{}, {"pooling": "flatten"}, {"layers": ["block4", "block2_relu1"], "pooling": "avg"}])
def test_exported_program_takes_any_batch_and_any_size(backbone: tk.Backbone, head: dict[str, Any]) -> None:
    """torch.export with batch, height and width dynamic gives one program, right for images of every shape."""
    model = tk.attach_head(backbone, 3, hidden=(16,), **head)
    model.temperature = 1.7
    exportable = tk.WithPreprocessing(tk.freeze_until(model, "head"))

    program = torch.export.export(exportable, (raw(2, 48, 60),), dynamic_shapes=DYNAMIC).module()

    for shape in SHAPES:
        images = raw(*shape)
        assert torch.equal(program(images), exportable(images))


class Resized(nn.Module):
    """The pixels that reach the network in each geometry, before they are normalised: `(4, N, 3, S, S)`."""

    def __init__(self, model: tk.TransferModel) -> None:
        super().__init__()
        preprocess = model.backbone.preprocess
        self.exportables = nn.ModuleList()
        for geometry in GEOMETRIES:
            model.backbone.preprocess = replace(preprocess, geometry=geometry)
            self.exportables.append(tk.WithPreprocessing(model))

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([exportable._resize(images) for exportable in self.exportables])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch.export", "ONNX"])
def test_exported_pixels_are_those_of_preprocess_in_another_process(
    form: str, model: tk.TransferModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every geometry gives the pixels of Preprocessing.resize bit for bit, of raw images of any shape."""
    preprocess = CONVENTIONS["KERAS"].with_image_size(64)
    model.backbone.preprocess = preprocess
    resize, example = Resized(model).eval(), (raw(2, 48, 60),)
    shapes = [(1, 64, 64), (3, 48, 60), (2, 333, 257), (1, 20, 25), (1, 375, 500), (2, 12, 200), (1, 700, 40)]
    images = {f"images {place}": raw(*shape) for place, shape in enumerate(shapes)}
    if form == "ONNX":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # or the exporter's bars leave a thread behind
        dynamic = {"images": {0: "batch", 2: "height", 3: "width"}}
        names = {"input_names": ["images"], "output_names": ["pixels"]}
        program = torch.onnx.export(resize, example, dynamic_shapes=dynamic, dynamo=True, verbose=False, **names)
        assert program is not None
        program.model.metadata_props["classes"] = "[]"
        program.save(tmp_path / "model.onnx")
        pixels, _ = run_elsewhere(RELOAD_ONNX, tmp_path / "model.onnx", images)
    else:
        torch.export.save(torch.export.export(resize, example, dynamic_shapes=DYNAMIC), tmp_path / "model.pt2")
        pixels, _ = run_elsewhere(RELOAD, tmp_path / "model.pt2", images)

    for name, given in images.items():
        for geometry, got in zip(GEOMETRIES, pixels[name], strict=True):
            expected = replace(preprocess, geometry=geometry).resize(given).numpy()
            exact = INTEGERS or geometry == "torchvision"
            assert np.abs(got - expected).max() <= (0 if exact else 1), (geometry, given.shape)


@pytest.mark.slow
def test_saved_program_gives_the_same_in_another_process(
    real: tuple[tk.Trainer, dict[str, Tensor]], tmp_path: Path
) -> None:
    """VGG16 through torch.export, in a fresh process without transferkit: the trainer's probabilities, bit for bit."""
    trainer, images = real
    exportable = tk.WithPreprocessing(trainer.model, unknown=True)
    program = torch.export.export(exportable, (raw(2, 48, 60),), dynamic_shapes=DYNAMIC)
    extra = {"classes.json": json.dumps(trainer.model.classes)}
    torch.export.save(program, tmp_path / "model.pt2", extra_files=extra)

    probabilities, _ = run_elsewhere(RELOAD, tmp_path / "model.pt2", images)

    for name, given in images.items():
        ours = trainer.predict_proba(given)
        logits = trainer.model.eval()(trainer.model.backbone.preprocess(given))
        if INTEGERS:
            assert torch.equal(exportable(given)[0], torch.from_numpy(ours))
        # the other process may take another number of threads, and sums then come in another order
        np.testing.assert_allclose(probabilities[name], ours, rtol=0, atol=1e-5 if INTEGERS else 1e-2)
        np.testing.assert_allclose(probabilities[name], (logits / 0.3).softmax(1).detach(), rtol=0, atol=1e-2)
        compare_novelty(probabilities[f"{name}1"], trainer, given)
    read = {"classes.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=read)
    assert json.loads(read["classes.json"]) == ["cat", "dog", "owl"]


@pytest.mark.slow
def test_onnx_gives_the_same_in_another_process(
    real: tuple[tk.Trainer, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VGG16 through ONNX, run by onnxruntime in a process without torch, gives the trainer's probabilities to 1e-5."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # or the exporter's bars leave a thread behind
    trainer, images = real
    shapes = {"images": {0: "batch", 2: "height", 3: "width"}}
    program = torch.onnx.export(
        tk.WithPreprocessing(trainer.model, unknown=True),
        (raw(2, 48, 60),),
        input_names=["images"],
        output_names=["probabilities", "novelty"],
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["classes"] = json.dumps(trainer.model.classes)
    program.save(tmp_path / "model.onnx")

    probabilities, printed = run_elsewhere(RELOAD_ONNX, tmp_path / "model.onnx", images)

    for name, given in images.items():
        ours = trainer.predict_proba(given)
        np.testing.assert_allclose(probabilities[name], ours, rtol=0, atol=1e-5 if INTEGERS else 1e-2)
        compare_novelty(probabilities[f"{name}1"], trainer, given)
    assert json.loads(printed) == ["cat", "dog", "owl"]
