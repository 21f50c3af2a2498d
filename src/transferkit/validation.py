"""Hold some of the training data back to validate on."""

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from transferkit.errors import ArgumentError, EmptyDataError
from transferkit.randomness import derive_seed, shuffled


def split_validation(data: object, share: float, seed: int, validation_data: object = None) -> tuple[Any, Any]:
    """Divide data into a part to train on and a part to validate on, at random by `seed`.

    Raises:
        ArgumentError: `share` is not between 0 and 1, the data is a `DataLoader`, or there is `validation_data`.
        EmptyDataError: One of the parts would be empty.
    """
    if validation_data is not None:
        raise ArgumentError("validation_data and validation_split are both given: expected one of them.")
    if not 0 < share < 1:
        raise ArgumentError(f"validation_split={share} is out of range: expected a share between 0 and 1, e.g. 0.2.")
    pair = isinstance(data, tuple) and len(data) == 2
    if not pair and (isinstance(data, DataLoader) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__")):
        raise ArgumentError(
            f"validation_split cannot divide a {type(data).__name__}: expected (images, targets) or a Dataset. Pass "
            "validation_data= instead."
        )
    whole: Any = data
    sized = whole[0] if pair else whole
    order = shuffled(len(sized), derive_seed(seed, "validation"))
    count = round(len(sized) * share)
    if count == 0 or count == len(sized):
        raise EmptyDataError(
            f"validation_split={share} of {len(sized)} images leaves {len(sized) - count} to train and {count} to "
            "validate: expected at least 1 each."
        )
    held_out, kept = order[:count].sort().values, order[count:].sort().values
    if pair:
        return tuple(_take(part, kept) for part in whole), tuple(_take(part, held_out) for part in whole)
    return Subset(whole, kept.tolist()), Subset(whole, held_out.tolist())


def _take(values: Any, places: Tensor) -> Any:
    if isinstance(values, list | tuple):
        return [values[place] for place in places.tolist()]
    return values[places] if isinstance(values, Tensor) else values[places.numpy()]
