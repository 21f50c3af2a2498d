"""How far a model's probabilities are from how often it is right."""

from typing import Any

import numpy as np
import numpy.typing as npt


def expected_calibration_error(
    probabilities: npt.NDArray[np.floating[Any]], targets: npt.NDArray[Any], *, bins: int = 15
) -> float:
    """Return the mean distance between confidence and accuracy, 0 to 1, over bins of equal width.

    Args:
        probabilities: Of each class, `(N, K)`.
        targets: True class indices `(N,)`: the confidence of an image is its largest probability. Or true labels
            `(N, K)`, 0 and 1: each label is a case of its own, and right where the image has it.
        bins: Number of bins between 0 and 1.

    Example:
        >>> round(expected_calibration_error(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1])), 4)
        0.4

    References:
        Naeini et al., 2015, "Obtaining well calibrated probabilities using Bayesian binning"; Guo et al., 2017.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if targets.ndim == 2:
        confidence, right = probabilities.ravel(), (targets >= 0.5).ravel()
    else:
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (0, 1/bins], (1/bins, 2/bins], ...
    distances = np.abs(np.bincount(bin_of, right - confidence, minlength=bins))  # in each bin, times its size
    return float(distances.sum() / len(confidence))
