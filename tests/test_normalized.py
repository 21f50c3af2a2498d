"""Float images normalized for these weights pass; those normalized otherwise are refused, in any batch."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as transforms

import transferkit as tk
from tiny import make_model, make_trainer
from transferkit.data.normalized import check_normalized
from transferkit.data.preprocessing import CONVENTIONS, Preprocessing
from transferkit.errors import ImageError

V1 = CONVENTIONS["IMAGENET1K_V1"]
CONVENTION = pytest.mark.parametrize("preprocess", CONVENTIONS.values(), ids=CONVENTIONS)


def photos(count: int = 8, size: int = 64) -> Tensor:
    """Return raw images with the light and the edges of photographs: bright discs on dark slopes, with some noise."""
    generator = torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    slopes = torch.rand(count, 3, 1, 1, generator=generator) * x + torch.rand(count, 3, 1, 1, generator=generator) * y
    disc = ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1).float()
    unit = 0.6 * slopes + disc * torch.rand(count, 3, 1, 1, generator=generator)
    unit[:, :, :6], unit[:, :, -6:] = 1.1, -0.1  # white and black, as most photographs have
    noise = 0.05 * torch.randn(count, 3, size, size, generator=generator)
    return ((unit + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def normalize(unit: Tensor, preprocess: Preprocessing) -> Tensor:
    return preprocess.normalize(unit * 255)


UNIT = photos() / 255
LARGER = transforms.resize(UNIT, [100, 100], antialias=True)

RIGHT = {
    "exact": UNIT,
    "resized as floats": LARGER,
    "resized by bicubic, which overshoots": transforms.resize(
        UNIT, [100, 100], interpolation=InterpolationMode.BICUBIC, antialias=True
    ),
    "white": torch.ones(2, 3, 32, 32),
    "black": torch.zeros(2, 3, 32, 32),
    "bright": torch.ones(2, 3, 64, 64) - (0.2 * UNIT[:2] * 255).round() / 255,
    "dark, resized": 0.1 * LARGER,
    "one": UNIT[:1],
    "one, resized": LARGER[:1],
    "16 levels": (UNIT * 15).round() / 15,
    "17 levels": (UNIT * 16).round() / 16,
    "12 bits": (LARGER * 4095).round() / 4095,
    "divided by 256": photos() / 256,
    "gray": UNIT.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1),
    "mixed up": 0.7 * UNIT + 0.3 * UNIT.flip(0),
}
AUGMENTED = {
    "brightness and contrast": v2.ColorJitter(0.4, 0.4),
    "saturation and hue": v2.ColorJitter(0, 0, 0.5, 0.2),
    "autocontrast": v2.RandomAutocontrast(1.0),
    "erased": v2.RandomErasing(1.0),
    "inverted": v2.RandomInvert(1.0),
    "solarized": v2.RandomSolarize(0.5, 1.0),
    "blurred": v2.GaussianBlur(5),
    "turned": v2.RandomRotation(30),
    "noise": v2.GaussianNoise(sigma=0.05),
}


@CONVENTION
@pytest.mark.parametrize("kind", RIGHT)
def test_right_images_pass_without_a_word(preprocess, kind):
    """Images normalized for the weights pass, however they were resized, quantized or lit."""
    check_normalized(normalize(RIGHT[kind], preprocess), preprocess)


@CONVENTION
@pytest.mark.parametrize("kind", AUGMENTED)
def test_right_images_pass_augmented(preprocess, kind):
    """Augmentation before or after the normalization is no other convention."""
    torch.manual_seed(0)
    check_normalized(normalize(torch.stack([AUGMENTED[kind](image) for image in UNIT]), preprocess), preprocess)
    if kind in ("erased", "turned"):
        changed = [AUGMENTED[kind](image) for image in normalize(UNIT, preprocess)]
        check_normalized(torch.stack(changed), preprocess)


@CONVENTION
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_right_images_pass_in_half_precision(preprocess, dtype):
    """Values that were rounded to 16 bits are no other convention."""
    check_normalized(normalize(UNIT, preprocess).to(dtype).float(), preprocess)


def test_noise_of_standard_deviation_one_passes():
    """Random numbers, which programs use to try a network, have the range of `IMAGENET1K_V1`."""
    check_normalized(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), V1)


def test_values_that_are_not_finite_are_ignored():
    """NaN and infinite pixels are the business of the step that meets them; the others are looked at."""
    images = normalize(UNIT, V1)
    images[:, :, 3] = torch.nan
    images[:, :, 5] = torch.inf
    check_normalized(images, V1)
    check_normalized(torch.full((2, 3, 32, 32), torch.nan), V1)
    wrong = UNIT.clone()
    wrong[:, :, 3] = torch.nan
    with pytest.raises(ImageError, match="not preprocessed"):
        check_normalized(wrong, V1)


def standardized(images: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (images - images.mean(dims, keepdim=True)) / images.std(dims, keepdim=True)


WRONG = {
    "scaled to 0..1": lambda unit: unit,
    "raw, as floats": lambda unit: unit * 255,
    "scaled to -1..1": lambda unit: unit * 2 - 1,
    "CIFAR-10's mean and std": lambda unit: transforms.normalize(unit, [0.491, 0.482, 0.447], [0.247, 0.243, 0.262]),
    "CIFAR-10's narrower std": lambda unit: transforms.normalize(unit, [0.491, 0.482, 0.447], [0.202, 0.199, 0.201]),
    "CLIP's": lambda unit: transforms.normalize(unit, [0.481, 0.458, 0.408], [0.269, 0.261, 0.276]),
    "MNIST's": lambda unit: transforms.normalize(unit, [0.1307] * 3, [0.3081] * 3),
    "each image standardized": lambda unit: standardized(unit, (1, 2, 3)),
    "the data set standardized": lambda unit: standardized(unit, (0, 2, 3)),
    "only the mean subtracted": lambda unit: unit - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
    "mean and std of 0..1 on 0..255": lambda unit: V1.normalize(unit * 255 * 255),
    **{name: (lambda unit, convention=convention: convention.normalize(unit * 255)) for name, convention in
       CONVENTIONS.items()},
    **{f"{name}, channels reversed": (lambda unit, convention=convention: convention.normalize(unit * 255).flip(1))
       for name, convention in CONVENTIONS.items()},
}  # fmt: skip


@CONVENTION
@pytest.mark.parametrize("kind", WRONG)
def test_images_normalized_otherwise_are_refused(preprocess, kind):
    """Eight-bit pixels normalized for anything else are refused, with their values and the remedy."""
    if kind == preprocess.name:
        return
    with pytest.raises(ImageError, match=rf"not preprocessed.*{preprocess.name} does not give.*Pass raw uint8 images"):
        check_normalized(WRONG[kind](UNIT), preprocess)


@CONVENTION
def test_images_divided_by_255_twice_are_refused(preprocess):
    """Normalized from 0..1 by means for 0..255 images are all but black."""
    with pytest.raises(ImageError, match="divided by 255 twice"):
        check_normalized(preprocess.normalize(UNIT), preprocess)


@CONVENTION
@pytest.mark.parametrize("kind", ["scaled to 0..1", "scaled to -1..1", "raw, as floats", "IMAGENET1K_V1", "KERAS"])
@pytest.mark.parametrize("count", [1, 8])
def test_resized_images_normalized_otherwise_are_told(preprocess, kind, count):
    """Resized as floats they lie on no levels: their range alone refuses them or is warned of."""
    if kind == preprocess.name:
        return
    with pytest.raises((ImageError, UserWarning), match=preprocess.name):
        check_normalized(WRONG[kind](LARGER[:count]), preprocess)


@pytest.mark.parametrize("kind", ["CIFAR-10's mean and std", "CLIP's", "IMAGENET1K_V1, channels reversed"])
def test_a_single_image_on_other_levels_is_warned_of(kind):
    """Autocontrast gives one image such levels, too, so one alone is no proof."""
    with pytest.warns(UserWarning, match="unusual after IMAGENET1K_V1"):
        check_normalized(WRONG[kind](UNIT[:1]), V1)


@pytest.mark.parametrize("images", [0.3 + 0.2 * LARGER, 0.5 * LARGER - 0.25, V1.normalize(LARGER)])
def test_what_may_be_right_is_warned_of(images):
    """Where values are unusual, but possible, a warning says what to look at, and the images are used."""
    with pytest.warns(UserWarning, match=r"values from .* unusual after IMAGENET1K_V1"):
        check_normalized(images, V1)


def test_a_convention_of_ones_own_is_what_counts():
    """Weights trained on 0..1 images take them, and refuse what other weights take."""
    own = Preprocessing("own", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
    check_normalized(UNIT, own)
    with pytest.raises(ImageError, match="own does not give"):
        check_normalized(normalize(UNIT, V1), own)


# ---- through the trainer


def data_with(right: Tensor, wrong: Tensor, form: str) -> object:
    targets = torch.arange(len(right) + len(wrong)) % 3
    if form == "arrays":
        return torch.cat([right, wrong]).numpy(), targets.numpy()
    parts = [TensorDataset(right, targets[: len(right)]), TensorDataset(wrong, targets[len(right) :])]
    return ConcatDataset(parts) if form == "data set" else DataLoader(ConcatDataset(parts), batch_size=4)


@pytest.mark.parametrize(
    ("call", "form"),
    [
        *((call, "arrays") for call in ("fit", "fit uncached", "evaluate", "predict", "assess", "solve", "validate")),
        *(("fit uncached", form) for form in ("data set", "loader")),
        *(("predict", form) for form in ("data set", "loader")),
    ],
)
def test_a_later_batch_is_refused_as_the_first_one_is(backbone, form, call):
    """Images after the first batch that were normalized otherwise end every call, and no step was made with them."""
    right = normalize(photos(8, 32) / 255, V1)
    data = data_with(right, photos(4, 32) / 255, form)
    trainer = make_trainer(make_model(backbone, "head"), cache="auto" if call == "fit" else False)
    calls = {
        "fit": lambda: trainer.fit(data, epochs=1, batch_size=4 if form != "loader" else None, verbose=0),
        "evaluate": lambda: trainer.evaluate(data, batch_size=4 if form != "loader" else None),
        "predict": lambda: trainer.predict(data, batch_size=4 if form != "loader" else None),
        "assess": lambda: trainer.assess(data, batch_size=4 if form != "loader" else None),
        "solve": lambda: tk.Trainer(trainer.model, device="cpu", precision="fp32").solve(data, verbose=0),
        "validate": lambda: trainer.fit(
            (right, torch.arange(8) % 3), validation_data=data, epochs=1, batch_size=4, verbose=0
        ),
    }
    with pytest.raises(ImageError, match="not preprocessed"):
        calls[call.split()[0]]()
    assert trainer.global_step == (2 if call == "validate" else 0)


def test_the_advice_about_preprocess_input_holds(backbone):
    """Keras's BGR images are refused channels last and, moved as the message says, again; the raw ones train."""
    backbone.preprocess = CONVENTIONS["IMAGENET1K_FEATURES"].with_image_size(32)
    raw, targets = photos(9, 32).permute(0, 2, 3, 1).numpy(), np.arange(9) % 3
    keras = raw[..., ::-1].astype("f4") - np.array([103.939, 116.779, 123.68], "f4")
    trainer = make_trainer(make_model(backbone, "head"))
    with pytest.raises(ImageError, match=r"Pass raw uint8 images without preprocess_input") as refused:
        trainer.fit((keras, targets), epochs=1, verbose=0)
    names = {"np": np, "images": keras}
    exec(str(refused.value).split("write: ")[1], names)
    with pytest.raises(ImageError, match=r"other order \(BGR\)|other mean"):
        trainer.fit((names["images"], targets), epochs=1, verbose=0)
    trainer.fit((raw, targets), epochs=1, verbose=0)
