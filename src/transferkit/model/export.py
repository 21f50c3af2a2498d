"""A trained model with its preprocessing as one module, to be exported: raw images in, probabilities out."""

import copy

import torch
from torch import Tensor, nn

from transferkit.base.calls import explained
from transferkit.data.resizing import resize_last
from transferkit.errors import ArgumentError, ImageError
from transferkit.model.head import TransferModel


@explained
class WithPreprocessing(nn.Module):
    """A model that takes raw images of any size: geometry and normalization are part of it.

    It computes what `Trainer.predict_proba` does in fp32, from the same pixels bit for bit: those of
    `model.backbone.preprocess` on a CPU. All of it is plain tensor arithmetic on sizes known only when it runs, so
    `torch.export.export` and `torch.onnx.export` take it with a dynamic batch, height and width.

    It holds a copy of the model, in float32 on the CPU and in eval mode, so later changes of the original do not
    matter.

    Args:
        model: From `attach_head` or `load_model`.
        unknown: Also return how unlike the training images each image is; see `Trainer.learn_known`.

    Attributes:
        model: The copy.
        classes: The class names, in the order of the probabilities.
        threshold: Probability from which a label counts, if an image may have several; None if it has one.
        temperature: What logits are divided by, above 0.
        image_size: Height and width, in pixels, that images are resized to.

    Raises:
        ArgumentError: `model` is not a `TransferModel`, or `unknown=True` before `Trainer.learn_known`.

    Example:
        >>> from transferkit import attach_head, load_backbone
        >>> model = attach_head(load_backbone("vgg11", weights=None, image_size=32), ["cat", "dog"])
        >>> WithPreprocessing(model)(torch.zeros(5, 3, 48, 64, dtype=torch.uint8)).shape
        torch.Size([5, 2])
    """

    def __init__(self, model: TransferModel, *, unknown: bool = False) -> None:
        super().__init__()
        if not isinstance(model, TransferModel):
            expected = "expected a TransferModel from attach_head or load_model; a Trainer has it as trainer.model."
            raise ArgumentError(f"model is a {type(model).__name__}: {expected}")
        # plain strides: torch.export.save warns of channels-last weights as if they were parts of others
        self.model: TransferModel = copy.deepcopy(model)
        self.model.to("cpu", torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload] # not in stubs
        if unknown and model.novelty is None:
            raise ArgumentError("the model has not learned which images are known: call trainer.learn_known first.")
        self.novelty = self.model.novelty if unknown else None
        self.classes = model.classes
        self.threshold = model.threshold
        self.temperature = model.temperature
        self.image_size = model.backbone.image_size
        self.eval().requires_grad_(requires_grad=False)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the probability of each class, float32 `(N, K)`, for raw images, uint8 `(N, 3, H, W)`.

        With `unknown`, return also how unlike the training images each is, float32 `(N,)`: above 0 it is unknown. Any
        other shape or number type is an `ImageError`.
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
        """Return what `Preprocessing.resize` does, `(N, 3, image_size, image_size)`, without one branch on the size."""
        preprocess, size = self.model.backbone.preprocess, self.image_size
        height, width = images.shape[2:]
        pixels = images.double()
        old = torch.stack([pixels.new_full((), height), pixels.new_full((), width)])
        high, wide = preprocess.resized_sides(old).unbind()
        for before, after in ((width, wide), (height, high)):
            pixels = resize_last(pixels, before, after, size, num_centres=before, bits=preprocess.weight_bits)
            pixels = pixels.transpose(2, 3)
        if preprocess.geometry != "letterbox":
            return pixels
        places = torch.arange(size, dtype=pixels.dtype, device=pixels.device)
        rows, columns = (places + ((side - size) / 2).round() for side in (high, wide))
        inside = ((rows >= 0) & (rows < high))[:, None] & (columns >= 0) & (columns < wide)
        planes = [torch.where(inside, pixels[:, c], float(color)) for c, color in enumerate(preprocess.bar_color)]
        return torch.stack(planes, dim=1)
