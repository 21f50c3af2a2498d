"""Images that are copies of each other: the same pixels, or nearly the same, possibly mirrored."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transferkit.data.inputs import Images

SIDE = 8  # of a thumbnail: small enough that compression does not show, large enough to tell images apart
SAME = 0.2  # two images are copies if their thumbnails differ by less than this fraction of their contrast

_BLOCK_NUMBERS = 2**24  # of distances that are held at a time


@dataclass(frozen=True, slots=True)
class Copy:
    """An image that is a copy of another."""

    index: int  # of the image
    of: int  # index of the first image that it is a copy of
    difference: float  # of the thumbnails, as a fraction of the lower contrast, 0 to `SAME`
    mirrored: bool  # whether it is the other's mirror image


def thumbnails(images: Images) -> Tensor:
    """Return images as float32 `(N, 3, 8, 8)`, each stretched to a square; raw or preprocessed ones, on their scale."""
    if isinstance(images, list):
        return torch.cat([thumbnails(image[None]) for image in images])
    from torchvision.transforms.v2 import functional as transforms  # takes 0.2 s: not at import

    small: Tensor = transforms.resize(images, [SIDE, SIDE], antialias=True)
    return small.float()


def find_copies(small: Tensor, reference: Tensor | None = None) -> list[Copy]:
    """Find the images that are copies of an earlier one, or of one in `reference`, by their `thumbnails`.

    Compression, resizing and mirroring do not hide a copy; cropping and other colors do. All pairs are compared, in
    about `200 N^2` operations.

    Example:
        >>> small = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
        >>> small[2] = small[0].flip(2)
        >>> find_copies(small)
        [Copy(index=2, of=0, difference=0.0, mirrored=True)]
    """
    others = small if reference is None else reference
    first, same_as = _distinct(small)
    firsts, _ = _distinct(others)
    found: dict[int, Copy] = {}
    for rows, columns in _near(small[first], others[firsts], within=reference is None):
        indices, of = first[rows], firsts[columns]
        differences, mirrored = _differences(small[indices], others[of])
        same = differences < SAME
        for pair in zip(*(each[same].tolist() for each in (indices, of, differences, mirrored)), strict=True):
            copy = Copy(*pair)
            found[copy.index] = min(copy, found.get(copy.index, copy), key=lambda each: each.of)
    for index, earlier in enumerate(same_as):  # an image with the same thumbnail, or itself
        if earlier != index and reference is None:
            found[index] = Copy(index, earlier, 0.0, mirrored=False)
        elif earlier in found:
            found[index] = replace(found[earlier], index=index)
    return [found[index] for index in sorted(found)]


def _distinct(small: Tensor) -> tuple[Tensor, list[int]]:
    """Return the first image with each thumbnail, int64, and for every image the first with its thumbnail."""
    seen: dict[bytes, int] = {}
    same_as = [seen.setdefault(row.tobytes(), index) for index, row in enumerate(small.numpy())]
    return torch.tensor(sorted(seen.values())), same_as


def _near(small: Tensor, others: Tensor, *, within: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of places that may be copies: no copy is missing, and few others are there."""
    # Half the sum with the mirror image: two of them are at most as far apart as the thumbnails, mirrored or not.
    left, right = (((each + each.flip(3))[..., : SIDE // 2] / math.sqrt(2)).flatten(1) for each in (small, others))
    reach, their_reach = ((SAME * _contrast(each)).square() * small[0].numel() for each in (small, others))
    for rows in torch.split(torch.arange(len(small)), max(1, _BLOCK_NUMBERS // len(others))):
        stop = int(rows[-1]) + 1 if within else len(others)  # an image is compared with earlier ones
        squares = left[rows].square().sum(dim=1)[:, None] + right[:stop].square().sum(dim=1)
        squares.addmm_(left[rows], right[:stop].T, alpha=-2)
        limit = torch.minimum(reach[rows, None], their_reach[:stop])
        near, of = (squares <= limit.mul_(1.01).add_(1)).nonzero(as_tuple=True)  # rounding of squares of up to 10^7
        pairs = torch.stack([rows[near], of], dim=1)
        pairs = pairs[pairs[:, 1] < pairs[:, 0]] if within else pairs
        yield from ((part[:, 0], part[:, 1]) for part in torch.split(pairs, 2**16) if len(part))


def _contrast(small: Tensor) -> Tensor:
    """Return how much each thumbnail varies over its positions, `(N,)`, at least 1 gray level: no cast counts."""
    return small.flatten(2).var(dim=2).mean(dim=1).sqrt().clamp_min(1.0)


def _differences(small: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much thumbnails differ, as a fraction of the lower contrast, and whether they do so mirrored."""
    straight, mirrored = ((small - each).square().mean(dim=(1, 2, 3)).sqrt() for each in (others, others.flip(3)))
    lower = torch.minimum(_contrast(small), _contrast(others))
    return torch.minimum(straight, mirrored) / lower, mirrored < straight
