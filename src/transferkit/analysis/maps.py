"""Where in an image a model sees a class."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from transferkit.model.head import TransferModel


def activation_maps(model: TransferModel, inputs: Tensor, classes: Tensor) -> Tensor:
    """Return how much each place of an image adds to a logit, float32 `(N, S, S)`, positive and negative.

    Each output that the head takes is multiplied by the slope of the logit there and summed over channels. What then
    is missing from the logit, such as the bias, is the same at all places, so that a map sums to the logit. Where the
    head is linear each place has exactly its part (class activation maps). Where it has hidden layers that holds for
    small changes (Grad-CAM, without its mean over places).

    The model is in eval mode. Inputs are preprocessed images, float `(N, 3, S, S)`, and classes int64 `(N,)`, both on
    its device.

    References:
        Zhou et al., 2016, "Learning Deep Features for Discriminative Localization", arXiv:1512.04150.
        Selvaraju et al., 2017, "Grad-CAM", arXiv:1610.02391.
        Draelos and Carin, 2020, "Use HiResCAM instead of Grad-CAM", arXiv:2011.08891.
    """
    outputs: list[Tensor] = []
    activation, last = inputs, len(model.backbone.features) - 1
    with torch.no_grad():
        for index, layer in enumerate(model.backbone.features):
            activation = layer(activation)
            if index in model.pools or (not model.pools and index == last):
                outputs.append(activation.detach().clone())  # the next layer may work in place
    with torch.enable_grad():
        outputs = [output.requires_grad_() for output in outputs]
        pooled = outputs
        if model.pools:
            pooled = [pool(output) for pool, output in zip(model.pools.values(), outputs, strict=True)]
        logits = model.head(torch.cat(pooled, dim=1))
        own = logits[torch.arange(len(classes)), classes]
        slopes = torch.autograd.grad(own.sum(), outputs)
    size = inputs.shape[2:]
    places = size[0] * size[1]
    maps = torch.zeros(len(inputs), *size, device=inputs.device)
    for output, slope in zip(outputs, slopes, strict=True):
        small = (output.detach() * slope).sum(dim=1, keepdim=True).float()
        maps += interpolate(small, size=size, mode="bilinear").squeeze(1) * (small[0, 0].numel() / places)
    rest = own.detach().float() - maps.sum(dim=(1, 2))
    return maps.add_(rest[:, None, None] / places)
