"""How far a model's probabilities are from how often it is right."""

from typing import Any

import numpy as np
import numpy.typing as npt


def expected_calibration_error(
    probabilities: npt.NDArray[np.floating[Any]], targets: npt.NDArray[Any], *, bins: int = 15
) -> float:
    """Return the mean distance between confidence and accuracy, 0 to 1, over bins of equal width (Guo et al., 2017).

    Targets are class indices `(N,)`, and the confidence of an image is the largest of its probabilities `(N, K)`. Or
    they are labels `(N, K)`, 0 and 1: each label is a case of its own, and right where the image has it.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if targets.ndim == 2:
        confidence, right = probabilities.ravel(), (targets >= 0.5).ravel()
    else:
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (0, 1/bins], (1/bins, 2/bins], ...
    distances = np.abs(np.bincount(bin_of, right - confidence, minlength=bins))  # in each bin, times its size
    return float(distances.sum() / len(confidence))
