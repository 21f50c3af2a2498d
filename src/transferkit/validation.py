"""Hold some of the training data back to validate on."""

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from transferkit.errors import ArgumentError, EmptyDataError
from transferkit.randomness import derive_seed, shuffled


def split_validation(data: object, share: float, seed: int) -> tuple[Any, Any]:
    """Divide data into a part to train on and a part to validate on, at random by `seed`.

    Raises:
        ArgumentError: `share` is not between 0 and 1, or the data is a `DataLoader`.
        EmptyDataError: One of the parts would be empty.
    """
    if not 0 < share < 1:
        raise ArgumentError(f"validation_split={share} is out of range: expected a share between 0 and 1, e.g. 0.2.")
    pair = isinstance(data, tuple | list) and len(data) == 2
    if not pair and (isinstance(data, DataLoader) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__")):
        raise ArgumentError(
            f"validation_split cannot divide a {type(data).__name__}: expected (images, targets) or a Dataset. Pass "
            "validation_data= instead."
        )
    sized: Any = data[0] if pair else data  # type: ignore[index]
    order = shuffled(len(sized), derive_seed(seed, "validation"))
    count = round(len(sized) * share)
    if count == 0 or count == len(sized):
        raise EmptyDataError(
            f"validation_split={share} of {len(sized)} images leaves {len(sized) - count} to train and {count} to validate: "
            "expected at least 1 each."
        )
    held_out, kept = order[:count].sort().values, order[count:].sort().values
    if pair:
        images, targets = data  # type: ignore[misc]
        return (_take(images, kept), _take(targets, kept)), (_take(images, held_out), _take(targets, held_out))
    dataset: Any = data
    return Subset(dataset, kept.tolist()), Subset(dataset, held_out.tolist())


def _take(values: Any, places: Tensor) -> Any:
    if isinstance(values, list | tuple):
        return [values[place] for place in places.tolist()]
    return values[places] if isinstance(values, Tensor) else values[places.numpy()]
