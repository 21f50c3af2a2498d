"""One number that makes a model's probabilities honest."""

import math

import torch
from torch import Tensor

from transferkit.errors import EmptyDataError, NonFiniteError
from transferkit.linear.logistic import Loss

LOWEST, HIGHEST = 1e-4, 1e4


def fit_temperature(logits: Tensor, targets: Tensor, loss: Loss) -> float:
    """Return the temperature `T`, 1e-4 to 1e4, at which `logits / T` have the least mean loss.

    Above 1 the model was too sure of itself. Dividing by it changes no prediction of a class. Logits `(N, K)` are of
    images that the model was not trained on, targets int64 `(N,)` or float32 `(N, K)`. The loss is taken without
    smoothing and weights. One image with a random label is added: if all the others are right, the model may be sure
    of itself, but no surer than their number allows.

    Raises:
        EmptyDataError: When there are no rows.
        NonFiniteError: When a logit is infinite or NaN, or the slope of the loss is.

    Example:
        >>> from transferkit.training.loss import CrossEntropy
        >>> logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
        >>> temperature = fit_temperature(logits, torch.tensor([0, 0, 0, 1]), CrossEntropy())
        >>> (logits / temperature).softmax(dim=1)[0, 0]  # three of four are right, but they are few
        tensor(0.6500)

    References:
        Guo et al., 2017, "On Calibration of Modern Neural Networks". Platt, 1999, "Probabilistic Outputs for Support
        Vector Machines": the added image.
    """
    if len(logits) == 0:
        raise EmptyDataError("a temperature cannot be fitted to 0 images: expected at least one.")
    if not bool(logits.isfinite().all()):
        row = int((~logits.isfinite().all(dim=1)).nonzero()[0])
        raise NonFiniteError(f"the logits of row {row} are not finite: expected numbers.")
    count, classes = logits.shape
    if targets.ndim == 1:
        any_label = (targets + torch.arange(1, count + 1, device=targets.device)) % classes  # right in one of K rows
    else:
        any_label = targets.mean(dim=0).expand_as(targets)
    low, high = math.log(LOWEST), math.log(HIGHEST)
    while high - low > 1e-6:  # the loss falls, then rises, because it is convex in 1 / T
        middle = (low + high) / 2
        with torch.enable_grad():
            variable = torch.tensor(middle, device=logits.device, requires_grad=True)
            scaled = logits.detach().float() * torch.exp(-variable)
            total = loss.each(scaled, targets).sum() + loss.each(scaled, any_label).mean()
            slope = float(torch.autograd.grad(total / count, variable)[0])
        if not math.isfinite(slope):
            raise NonFiniteError("the gradient of the loss is not finite: expected a loss finite for every logit.")
        if slope == 0:  # no logit prefers a class
            return math.exp(middle)
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp((low + high) / 2)
