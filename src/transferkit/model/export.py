"""A trained model with its preprocessing as one module, to be exported: raw images in, probabilities out."""

import copy

import torch
from torch import Tensor, nn

from transferkit.base.calls import explained
from transferkit.errors import ArgumentError, ImageError
from transferkit.model.head import TransferModel

_MAX_BITS = 22  # of the fraction in torch's integer weights
_MAX_WEIGHT = 2**15 - 0.5  # beyond it a weight would not round to an int16


@explained
class WithPreprocessing(nn.Module):
    """A model that takes raw images of any size: resize, centre crop and normalise are part of it.

    It computes what `Trainer.predict_proba` does in fp32, from the same pixels bit for bit: those of
    `model.backbone.preprocess` on a CPU. All of it is plain tensor arithmetic on sizes known only when it runs, so
    `torch.export.export` and `torch.onnx.export` take it with a dynamic batch, height and width.

    It holds a copy of the model, in float32 on the CPU and in eval mode: what becomes of the original changes nothing
    here.

    Args:
        model: From `attach_head` or `load_model`.
        unknown: Return also how unlike the training images each image is; see `Trainer.learn_known`.

    Attributes:
        model: The copy.
        classes: The class names, in the order of the probabilities.
        threshold: Probability from which a label counts, where an image may have several; None where it has one.
        temperature: What logits are divided by, above 0.
        image_size: Height and width, in pixels, that images are resized to.

    Raises:
        ArgumentError: `model` is no `TransferModel`, or `unknown` is asked for and the model has not learnt it.

    Example:
        >>> from transferkit import attach_head, load_backbone
        >>> model = attach_head(load_backbone("vgg11", weights=None, image_size=32), ["cat", "dog"])
        >>> WithPreprocessing(model)(torch.zeros(5, 3, 48, 64, dtype=torch.uint8)).shape
        torch.Size([5, 2])
    """

    def __init__(self, model: TransferModel, *, unknown: bool = False) -> None:
        super().__init__()
        if not isinstance(model, TransferModel):
            raise ArgumentError(
                f"model is a {type(model).__name__}: expected a TransferModel from attach_head or load_model. "
                "A Trainer has it as trainer.model."
            )
        # plain strides: torch.export.save warns of channels-last weights as if they were parts of others
        self.model: TransferModel = copy.deepcopy(model)
        self.model.to("cpu", torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if unknown and model.novelty is None:
            raise ArgumentError(
                "the model has not learnt which images are known: call trainer.learn_known(training_images) first, or "
                "leave unknown out."
            )
        self.novelty = self.model.novelty if unknown else None
        self.classes = model.classes
        self.threshold = model.threshold
        self.temperature = model.temperature
        self.image_size = model.backbone.image_size
        self.eval().requires_grad_(requires_grad=False)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the probability of each class, float32 `(N, K)`, for raw images, uint8 `(N, 3, H, W)`.

        With `unknown`, return also how unlike the training images each is, float32 `(N,)`: above 0 it is unknown.

        Raises:
            ImageError: Another shape or number type.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ImageError(
                f"cannot classify images of shape {tuple(images.shape)} and type {images.dtype}: expected raw images, "
                "uint8 (N, 3, H, W). One image needs a batch dimension (image[None])."
            )
        inputs = self.model.backbone.preprocess.normalize(self._resize(images))
        backbone, pools = self.model.backbone, self.model.pools
        inputs = inputs.to(memory_format=torch.channels_last)  # quicker, and as Trainer does
        features = backbone(inputs, pools) if pools else backbone(inputs)
        logits: Tensor = self.model.head(features) / self.temperature
        probabilities = logits.softmax(dim=1) if self.threshold is None else logits.sigmoid()
        return (probabilities, self.novelty(features)) if self.novelty is not None else probabilities

    def _resize(self, images: Tensor) -> Tensor:
        """Return what `Preprocessing.resize` does, `(N, 3, image_size, image_size)`, without one branch on the size.

        Antialiased bilinear resizing is a matrix product along the width and one along the height. An image that has
        the size already is multiplied by identity matrices.
        """
        height, width = images.shape[2:]
        pixels = images.double()  # not float32: the products of integers below reach 255 * 2**22
        high, wide = pixels.new_full((), height), pixels.new_full((), width)
        shorter = torch.minimum(high, wide)
        pixels = _along_last(pixels, wide, (wide * self.image_size / shorter).round(), self.image_size)
        pixels = pixels.transpose(2, 3)
        pixels = _along_last(pixels, high, (high * self.image_size / shorter).round(), self.image_size)
        return pixels.transpose(2, 3)


def _along_last(pixels: Tensor, old: Tensor, new: Tensor, size: int) -> Tensor:
    """Resize the last dimension from `old` to `new`, keep `size` in the middle, and round, as torch does for uint8.

    torch rounds the weights to integers, with as many bits as let the largest of all `new * old` fit into 16, and the
    pixels after each of both dimensions (`upsample_avx_bilinear_bicubic_uint8`).
    """
    positions = torch.arange(pixels.shape[-1], dtype=pixels.dtype, device=pixels.device)
    kept = torch.arange(size, dtype=pixels.dtype, device=pixels.device) + ((new - size) / 2).round()
    scale = old / new
    reach = scale.clamp(min=1.0)  # how far from its centre a new pixel looks, in old pixels
    centres = (kept + 0.5) * scale
    weights = (1 - (positions + 0.5 - centres[:, None]).abs() / reach).clamp(min=0)
    weights = weights / weights.sum(dim=1, keepdim=True)

    # if the image shrinks it has as many new pixels or fewer; if it grows, the first has weight 1
    every_centre = (torch.minimum(positions, new - 1) + 0.5) * scale
    largest = _largest_weight(every_centre, old, reach)
    bits = ((_MAX_WEIGHT / largest).log2().ceil() - 1).clamp(max=_MAX_BITS)
    one = torch.pow(2.0, bits)
    products = pixels @ (weights * one + 0.5).floor().T
    return (products / one + 0.5).floor()  # 255 at most: errors of the weights add up to less than half a level


def _largest_weight(centres: Tensor, old: Tensor, reach: Tensor) -> Tensor:
    """Return the largest weight of the new pixels at `centres`, in closed form: a table of them all may not fit."""
    before = (centres - 0.5).floor()  # the last old pixel that lies before the centre
    left, right = centres - 0.5 - before, before + 1.5 - centres  # distances of that one and of the next
    num_left = torch.minimum((reach - left).ceil(), before + 1).clamp(min=0)
    num_right = torch.minimum((reach - right).ceil(), old - 1 - before).clamp(min=0)
    sums = [n - n * (distance + (n - 1) / 2) / reach for n, distance in ((num_left, left), (num_right, right))]
    nearest = torch.minimum(torch.where(num_left > 0, left, 1.0), torch.where(num_right > 0, right, 1.0))
    return ((1 - nearest / reach) / (sums[0] + sums[1])).max()
