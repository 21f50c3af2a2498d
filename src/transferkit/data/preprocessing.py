"""Raw uint8 images to the input VGG was trained on, for its three conventions.

| convention            | channels | scale  | mean                   | standard deviation |
|-----------------------|----------|--------|------------------------|--------------------|
| `IMAGENET1K_V1`       | RGB      | 0..1   | .485 .456 .406         | .229 .224 .225     |
| `IMAGENET1K_FEATURES` | RGB      | 0..1   | .48235 .45882 .40784   | 1/255 each         |
| `KERAS`               | BGR      | 0..255 | 103.939 116.779 123.68 | 1                  |

The second and third describe the same network: only the channel order of the first convolution differs. (Their means
differ by up to 0.7 of 255 in the red channel; each belongs to the weights that go by its name.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from transferkit.base.arguments import one_of
from transferkit.errors import ImageError

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre-crop and normalise a batch of images.

    Attributes:
        name: The convention's name; checkpoints keep it.
        mean: Per channel, on the scale 0 to 255, in the order the network wants its channels.
        std: Likewise.
        channels: Which of the R, G, B channels comes first, second, third: (0, 1, 2) is RGB, (2, 1, 0) BGR.
        image_size: Height and width of the result, in pixels.

    Example:
        >>> images = torch.zeros(2, 3, 40, 50, dtype=torch.uint8)
        >>> CONVENTIONS["KERAS"].with_image_size(32)(images).shape
        torch.Size([2, 3, 32, 32])
    """

    name: str
    mean: Triple
    std: Triple
    channels: tuple[int, int, int] = (0, 1, 2)
    image_size: int = 224

    def __call__(self, images: Tensor | list[Tensor]) -> Tensor:
        """Return raw images as model input.

        Args:
            images: uint8, `(N, 3, H, W)`, RGB, 0 to 255, of any size, on any device; or a list of `(3, H, W)`
                whose sizes differ.

        Returns:
            float32 `(N, 3, image_size, image_size)` on the same device.

        Raises:
            ImageError: Another shape or number type.
        """
        return self.normalize(self.resize(images))

    def resize(self, images: Tensor | list[Tensor]) -> Tensor:
        """Return uint8 `(N, 3, image_size, image_size)`: the shorter side is resized, the longer one cropped.

        Bilinear with antialiasing, rounded to uint8, so an image gives the same pixels whatever batch it is in.
        """
        if isinstance(images, list):
            if not images:
                raise ImageError("cannot preprocess an empty list: expected 1 image, uint8 (3, H, W), or more.")
            return torch.cat([self.resize(image[None]) for image in images])
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ImageError(
                f"cannot preprocess images of shape {tuple(images.shape)} and type {images.dtype}: expected raw "
                "images, uint8 (N, 3, H, W). One image needs a batch dimension (image[None]); float images in "
                "0..1 go back to uint8 with (images * 255).round().to(torch.uint8)."
            )
        size = self.image_size
        height, width = images.shape[2:]
        if (height, width) == (size, size):
            return images
        from torchvision.transforms.v2 import functional as transforms  # takes 0.2 s: not at import

        shorter = min(height, width)
        new_height, new_width = round(height * size / shorter), round(width * size / shorter)
        resized = transforms.resize(images, [new_height, new_width], antialias=True)
        cropped: Tensor = transforms.center_crop(resized, [size, size])
        return cropped

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images `(N, 3, H, W)`, R first, as float32 in the order and scale the network wants."""
        parts = zip(self.channels, self.mean, self.std, strict=True)
        # Python numbers rather than tensors: nothing to move between devices, nothing to cast by accident.
        return torch.stack([(images[:, c].float() - mean) / std for c, mean, std in parts], dim=1)

    def with_image_size(self, image_size: int) -> "Preprocessing":
        """Return the same convention for another image size."""
        return Preprocessing(self.name, self.mean, self.std, self.channels, image_size)


def _on_255(*values: float) -> Triple:
    red, green, blue = (255 * value for value in values)
    return red, green, blue


CONVENTIONS: dict[str, Preprocessing] = {
    convention.name: convention
    for convention in (
        Preprocessing("IMAGENET1K_V1", _on_255(0.485, 0.456, 0.406), _on_255(0.229, 0.224, 0.225)),
        Preprocessing("IMAGENET1K_FEATURES", _on_255(0.48235, 0.45882, 0.40784), _on_255(1 / 255, 1 / 255, 1 / 255)),
        Preprocessing("KERAS", (103.939, 116.779, 123.68), (1.0, 1.0, 1.0), channels=(2, 1, 0)),
    )
}


def find_convention(name: str) -> Preprocessing:
    """Return the convention called `name`.

    Raises:
        ArgumentError: There is none of that name.

    Example:
        >>> find_convention("KERAS").mean
        (103.939, 116.779, 123.68)
    """
    return CONVENTIONS[one_of("preprocessing", name, CONVENTIONS, hint="Or pass your own transferkit.Preprocessing.")]
