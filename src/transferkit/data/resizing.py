"""Resizing as Pillow and torch do it for uint8 images, as tensor arithmetic that computes only what is kept."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PILLOW_BITS = 22  # of the fraction in Pillow's integer weights, and at most in torch's
_MAX_WEIGHT = 2**15 - 0.5  # beyond it a weight would not round to an int16


def resize_as_pillow(images: Tensor, height: int, width: int) -> Tensor:
    """Return images, uint8 `(N, 3, H, W)` on the CPU, resized by Pillow to `(N, 3, height, width)`."""
    resized = np.empty((len(images), height, width, 3), np.uint8)
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        # one dimension after the other: which comes first, and so what is rounded first, depends on Pillow's version
        wide = Image.fromarray(image).resize((width, len(image)), Image.Resampling.BILINEAR)
        resized[number] = np.asarray(wide.resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


def resize_to_middle(images: Tensor, new: tuple[int, int], size: int, *, bits: int | None = None) -> Tensor:
    """Return the middle, uint8 `(N, 3, size, size)`, of images resized to `new`, height and width of `size` or more.

    It takes little memory however long and narrow they are. The result is what torchvision's `resize` and `center_crop`
    give, bit for bit for a PIL image if `bits` is `PILLOW_BITS`, and for a tensor if it is None and the CPU has AVX2.
    """
    rows, columns = (_reach(old, side, size) for old, side in zip(images.shape[2:], new, strict=True))
    place = torch.device("cpu") if images.device.type == "mps" else images.device  # MPS has no float64
    pixels = images[..., rows, columns].to(place, torch.float64)
    for old, side, first in ((images.shape[3], new[1], columns.start), (images.shape[2], new[0], rows.start)):
        new_side = pixels.new_full((), side)
        num_centres = 1 if side > old else old
        pixels = resize_last(pixels, old, new_side, size, num_centres=num_centres, first=first, bits=bits)
        pixels = pixels.transpose(2, 3)
    return pixels.to(images.device, torch.uint8)


def _reach(old: int, new: int, size: int) -> slice:
    """Return the old pixels that the middle `size` of the new ones depend on."""
    scale, start = old / new, round((new - size) / 2)
    margin = max(scale, 1.0) + 1
    return slice(max(0, math.floor(start * scale - margin)), math.ceil((start + size) * scale + margin))


def resize_last(
    pixels: Tensor, old: int, new: Tensor, size: int, *, num_centres: int, first: int = 0, bits: int | None = None
) -> Tensor:
    """Resize the last dimension from `old` to `new`, keep `size` in the middle, and round, as is done for uint8.

    Antialiased bilinear resizing is a matrix product along each dimension, for all sizes alike: `torch.export` sees no
    branch. An image that has the size already is multiplied by the identity. Where `new` is under `size`, the outermost
    pixels are repeated.

    Pillow and torch round the weights to integers, and the pixels after each of both dimensions. Pillow's weights have
    a fraction of 22 bits; torch's have as many as let the largest of all `new * old` weights fit into 16
    (`upsample_avx_bilinear_bicubic_uint8`).

    Args:
        pixels: float64, whole numbers from 0 to 255: float32 does not hold the products below, up to 255 * 2**22.
        old: Length of the dimension in the images.
        new: Its length after resizing: float64, without dimensions.
        size: How many of the new pixels are kept.
        num_centres: How many of the new pixels, from the first, have weights as large as any: `old` is enough.
        first: Place of `pixels[..., 0]` in the images.
        bits: Of the weights' fraction: `PILLOW_BITS`, or None for torch's.
    """
    positions = torch.arange(pixels.shape[-1], dtype=pixels.dtype, device=pixels.device) + first
    kept = torch.arange(size, dtype=pixels.dtype, device=pixels.device) + ((new - size) / 2).round()
    scale = old / new
    reach = scale.clamp(min=1.0)  # how far from its centre a new pixel looks, in old pixels
    centres = (torch.minimum(kept.clamp(min=0), new - 1) + 0.5) * scale
    weights = (1 - (positions + 0.5 - centres[:, None]).abs() / reach).clamp(min=0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    one: Tensor | float = 2.0 ** (bits or 0)
    if bits is None:
        # if the image shrinks it has as many new pixels or fewer; if it grows, the first has weight 1
        every = torch.arange(num_centres, dtype=pixels.dtype, device=pixels.device)
        largest = _largest_weight((torch.minimum(every, new - 1) + 0.5) * scale, old, reach)
        one = torch.pow(2.0, ((_MAX_WEIGHT / largest).log2().ceil() - 1).clamp(max=PILLOW_BITS))
    products = pixels @ (weights * one + 0.5).floor().T
    return (products / one + 0.5).floor()  # 255 at most: errors of the weights add up to less than half a level


def _largest_weight(centres: Tensor, old: int, reach: Tensor) -> Tensor:
    """Return the largest weight of the new pixels at `centres`, in closed form: a table of them all may not fit."""
    before = (centres - 0.5).floor()  # the last old pixel that lies before the centre
    left, right = centres - 0.5 - before, before + 1.5 - centres  # distances of that one and of the next
    num_left = torch.minimum((reach - left).ceil(), before + 1).clamp(min=0)
    num_right = torch.minimum((reach - right).ceil(), old - 1 - before).clamp(min=0)
    sums = [n - n * (distance + (n - 1) / 2) / reach for n, distance in ((num_left, left), (num_right, right))]
    nearest = torch.minimum(torch.where(num_left > 0, left, 1.0), torch.where(num_right > 0, right, 1.0))
    return ((1 - nearest / reach) / (sums[0] + sums[1])).max()
