"""How far the pixels of each geometry are from those of torchvision's own transforms, on photographs.

    python benchmarks/geometry.py photos/*.jpg
    python benchmarks/geometry.py photos/*.jpg --image-size 64 --shapes

torchvision resizes what Pillow has decoded, as `VGG16_Weights.IMAGENET1K_V1.transforms()` does in everybody's scripts.
The figures are grey levels of 255: the largest difference in a photograph (its median and maximum over the
photographs) and the mean difference. `--shapes` also makes photographs of other shapes from each.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torchvision.models import VGG16_Weights
from torchvision.transforms.v2.functional import pil_to_tensor

from transferkit.data.preprocessing import CONVENTIONS, GEOMETRIES

SHAPES = ((4, 3), (3, 4), (16, 9), (9, 16), (2, 1), (1, 2), (5, 1), (1, 5), (12, 1))
MEAN = torch.tensor(VGG16_Weights.IMAGENET1K_V1.transforms().mean).view(3, 1, 1)
DEVIATION = torch.tensor(VGG16_Weights.IMAGENET1K_V1.transforms().std).view(3, 1, 1)


def photographs(paths: list[Path], *, shapes: bool) -> list[Image.Image]:
    photos = []
    for path in paths:
        with Image.open(path) as file:
            photos.append(file.convert("RGB"))
    if shapes:
        photos += [photo.resize((37 * wide, 37 * high)) for photo in photos for wide, high in SHAPES]
    return photos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--shapes", action="store_true")
    options = parser.parse_args()
    photos, size = photographs(options.photos, shapes=options.shapes), options.image_size
    own = VGG16_Weights.IMAGENET1K_V1.transforms(crop_size=size, resize_size=size * 256 // 224)
    print("| geometry | largest, median | largest | mean |\n|---|--:|--:|--:|")
    for geometry in GEOMETRIES:
        preprocess = replace(CONVENTIONS["IMAGENET1K_V1"], image_size=size, geometry=geometry)
        largest, means = [], []
        for photo in photos:
            theirs = ((own(photo) * DEVIATION + MEAN) * 255).round()
            apart = (preprocess.resize(pil_to_tensor(photo)[None])[0] - theirs).abs()
            largest.append(apart.max())
            means.append(apart.mean())
        levels = torch.stack(largest)
        print(f"| {geometry} | {levels.median():.0f} | {levels.max():.0f} | {torch.stack(means).mean():.3f} |")


if __name__ == "__main__":
    main()
