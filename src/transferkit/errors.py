"""Every error transferkit raises.

Each is a `TransferKitError` and also a builtin, so that code which knows nothing of transferkit can
catch `ValueError` or `OSError` as usual. A message says what failed, what was got, what was expected
and what to do.
"""

import difflib
from collections.abc import Iterable


class TransferKitError(Exception):
    """Base of every error the library raises."""


class ArgumentError(TransferKitError, ValueError):
    """An argument has a value that cannot be used."""


class CacheError(TransferKitError, RuntimeError):
    """Features cannot be cached, or a file of features cannot be used."""


class CheckpointError(TransferKitError, ValueError):
    """A checkpoint cannot be read, or does not fit the live objects."""


class CheckpointTypeError(CheckpointError, TypeError):
    """A checkpoint would hold something else than plain types and tensors."""


class CheckpointWriteError(TransferKitError, OSError):
    """A checkpoint could not be written; what was there before still is."""


class DataChangedError(TransferKitError, ValueError):
    """The data is not what the run began with."""


class DeviceError(TransferKitError, RuntimeError):
    """The device or number format asked for is not to be had on this machine."""


class EmptyDataError(TransferKitError, ValueError):
    """There is not one image, or not one batch, to work on."""


class HeadMismatchError(TransferKitError, ValueError):
    """A head does not fit its backbone, its classes or its data."""


class ImageError(TransferKitError, ValueError):
    """An image has a shape, number type, channel count or size that cannot be used."""


class MissingPackageError(TransferKitError, ImportError):
    """An optional package that a part of the library needs is not installed."""


class NonFiniteError(TransferKitError, ArithmeticError):
    """A loss or a gradient is infinite or not a number."""


class NothingToTrainError(TransferKitError, ValueError):
    """Every parameter is frozen."""


class OutOfMemoryError(TransferKitError, RuntimeError):
    """One image at a time is more than the memory holds."""


class PreprocessingError(TransferKitError, ValueError):
    """It is not known which preprocessing a weight file was trained with."""


class TargetError(TransferKitError, ValueError):
    """A target is out of range or of a form that cannot be used."""


class TorchvisionMismatchError(TransferKitError, ImportError):
    """The installed torchvision was built for another torch."""


class UnknownLayerError(TransferKitError, ValueError):
    """A layer name is not a layer of the model."""


class WeightsError(TransferKitError, ValueError):
    """A weight file cannot be read or does not fit the network."""


class WeightsDownloadError(TransferKitError, OSError):
    """A weight file could not be downloaded whole."""


class WorkerError(TransferKitError, RuntimeError):
    """A process that reads images died or hangs."""


def close_matches(name: object, known: Iterable[str]) -> str:
    """Say which of `known` lie closest to a misspelt `name`, else the first twelve of them.

    Example:
        >>> close_matches("addam", ["adam", "sgd"])
        "Did you mean 'adam'?"
        >>> close_matches("xyz", ["adam", "sgd"])
        "Known: 'adam', 'sgd'."
    """
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=4, cutoff=0.55)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    rest = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"Known: {', '.join(map(repr, names[:12]))}{rest}."
