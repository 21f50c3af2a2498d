"""Whether float images were normalized as the weights expect, seen in their values.

Pixels of 8 bits that were normalized lie on evenly spaced levels, 1/std apart and shifted by mean/std, unless they were
resized or changed as floats; then the range is all there is to see. A right image is never refused; where the values
leave it open, a warning says so.
"""

import warnings

import torch
from torch import Tensor

from transferkit.data.preprocessing import Preprocessing
from transferkit.errors import ImageError

_SAMPLED = 1024  # pixels of each image
_EXAMINED = 4  # images of a batch whose levels are measured, 0.3 ms each
_OVERSHOOT = 32.0  # levels by which bicubic resizing or noise may leave 0 to 255
_ALIKE = 0.002  # conventions differ by more in the proportions of their standard deviations


def check_normalized(images: Tensor, preprocess: Preprocessing) -> None:
    """Refuse float32 images `(N, 3, H, W)`, on the host, that cannot come from preprocessing; warn of unlikely ones."""
    pixels = images.flatten(2)
    pixels = pixels[:, :, :: max(1, pixels.shape[2] // _SAMPLED)]
    mean, std = (torch.tensor(values).view(3, 1) for values in (preprocess.mean, preprocess.std))
    levels = (pixels * std + mean).nan_to_num(0, 0, 0)  # 0 to 255
    is_level = (levels - levels.round()).abs() < 0.1
    is_inside = (levels > -0.5) & (levels < 255.5)
    right = (_share(is_level) > 0.99) & (_share(is_inside) > 0.999)
    if bool(right.all()):
        return
    odd, odd_levels = pixels[~right].nan_to_num(0, 0, 0), levels[~right]
    low, high = (float(value) for value in torch.aminmax(odd))
    if (found := _why_wrong(odd, odd_levels, std)) is not None:
        raise ImageError(
            f"float images with values from {low:.4g} to {high:.4g} are not preprocessed for the weights: {found}, "
            f"which {preprocess.name} does not give. {_ADVICE}"
        )
    if _is_unusual(odd, odd_levels, std):
        warnings.warn(
            f"float images with values from {low:.4g} to {high:.4g} are unusual after {preprocess.name}. {_ADVICE}",
            stacklevel=2,
        )


_ADVICE = (
    "Pass raw uint8 images, without ToTensor, Normalize, preprocess_input or a division by 255, or apply "
    "backbone.preprocess to them. If the weights were trained on such images, pass load_backbone(preprocessing=...)."
)


def _share(values: Tensor) -> Tensor:
    return values.float().mean(dim=(1, 2))


def _why_wrong(pixels: Tensor, levels: Tensor, std: Tensor) -> str | None:
    """Return what is impossible about images, given their pixels and the levels, 0 to 255, they stand for."""
    if bool((_share((levels < -_OVERSHOOT) | (levels > 255 + _OVERSHOOT)) > 0.05).any()):
        return f"they stand for pixels from {float(levels.min()):.0f} to {float(levels.max()):.0f}"
    lows, highs = pixels.amin(dim=(0, 2)), pixels.amax(dim=(0, 2))
    for end in (0.0, -1.0):
        if bool(((lows - end).abs() < 0.02).all() & ((highs - 1).abs() < 0.02).all()):
            return f"they fill the range {end:.0f} to 1"
    largest, spread = pixels.abs().amax(dim=(1, 2)), pixels.amax(dim=(1, 2)) - pixels.amin(dim=(1, 2))
    if float(std.max()) < 5 and bool(((largest < 8) & (spread > 0.5)).any()):
        return "their contrast is too small"
    return _why_other_levels(pixels[:_EXAMINED], levels, std)


def _why_other_levels(pixels: Tensor, levels: Tensor, std: Tensor) -> str | None:
    """Return what cannot be right about the levels on which the values of images lie, if they lie on levels."""
    before = None
    for image, level in zip(pixels, levels, strict=False):
        steps = torch.tensor([_spacing(channel) for channel in image])
        ratios = steps * std.flatten()  # 1 each, or alike where brightness or contrast was changed
        if not bool(steps.all()):
            continue
        if not _alike(ratios):  # autocontrast does that, too, but to each image in another way
            if _close(steps, steps[0]) or (before is not None and _close(steps, before)):
                return "they were divided by standard deviations of " + ", ".join(f"{1 / (255 * s):.3f}" for s in steps)
            before = steps
        elif _close(ratios * 255, 1.0):
            return "they were divided by 255 twice"
        elif _close(ratios, 1.0):
            shifts = level[:, 0] - level[0, 0]
            if bool(((shifts - shifts.round()).abs() > 0.1).any()):
                return "another mean was subtracted, or the channels have another order (BGR)"
            if bool(((level < -0.5) | (level > 255.5)).any()):
                return f"they stand for pixels from {float(level.min()):.0f} to {float(level.max()):.0f}"
    return None


def _is_unusual(pixels: Tensor, levels: Tensor, std: Tensor) -> bool:
    low, high = (float(value) for value in torch.aminmax(pixels))
    if low >= 0 or (low >= -1 and high <= 1) or float(levels.amax() - levels.amin()) < 2:  # or hardly any contrast
        return True
    outside = ((levels < -12) | (levels > 267)).float().mean(dim=(0, 2))
    if float(outside.max()) > (0.01 if float(std.max()) < 5 else 0.06):  # V1: random erasing draws noise
        return True
    steps = torch.tensor([_spacing(channel) for channel in pixels[0]])
    return len(pixels) == 1 and bool(steps.all()) and not _alike(steps * std.flatten())  # other standard deviations


def _spacing(values: Tensor) -> float:
    """Return the distance of evenly spaced values, 8 to 256 different ones; 0 if they are not."""
    levels = torch.unique(values[values.isfinite()].double())
    if not 8 <= len(levels) <= 256:
        return 0.0
    gaps = levels.diff() / levels.diff().min()
    count = float(gaps.round().sum())
    spacing = float(levels[-1] - levels[0]) / count
    places = (levels - levels[0]) / spacing
    even = count <= 255 and bool(((places - places.round()).abs() < 0.05).all())
    return spacing if even else 0.0


def _close(values: Tensor, to: Tensor | float) -> bool:
    return bool(((values / to - 1).abs() < _ALIKE).all())


def _alike(ratios: Tensor) -> bool:
    """Return whether three numbers are in the ratio of small whole ones: an image may use every second level only."""
    wholes = torch.arange(1.0, 5)
    simple = (wholes[:, None] / wholes).flatten()
    return all(bool(((ratio / simple - 1).abs() < _ALIKE).any()) for ratio in (ratios[1:] / ratios[0]))
