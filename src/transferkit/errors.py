"""Every error transferkit raises: what failed, which value it got, what it expected and what to do.

Each is a `TransferKitError` and a builtin error, so other code can catch `ValueError` or `OSError` as usual.
"""

import difflib
from collections.abc import Iterable


class TransferKitError(Exception):
    """Base of every error the library raises: a message, and lines that follow it."""

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


class ArgumentError(TransferKitError, ValueError):
    """An argument has a value that cannot be used."""


class CacheError(TransferKitError, RuntimeError):
    """Features cannot be cached, or a file of cached features cannot be used."""


class CallError(TransferKitError, TypeError):
    """A function was called with an argument that it does not have, or without one that it needs."""


class CheckpointError(TransferKitError, ValueError):
    """A checkpoint cannot be read, or does not fit the live objects."""


class CheckpointTypeError(CheckpointError, TypeError):
    """A checkpoint would hold something other than plain types and tensors."""


class CheckpointWriteError(TransferKitError, OSError):
    """A checkpoint could not be written. An older one under the same name is intact."""


class DataChangedError(TransferKitError, ValueError):
    """The data differs from what the run started with."""


class DeviceError(TransferKitError, RuntimeError):
    """The requested device or precision is not available on this machine."""


class EmptyDataError(TransferKitError, ValueError):
    """The data holds no images or no batches."""


class HeadMismatchError(TransferKitError, ValueError):
    """A head does not match its backbone, its classes or its data."""


class ImageError(TransferKitError, ValueError):
    """An image cannot be read, or has an unsupported shape, dtype, channel count or size."""


class MissingPackageError(TransferKitError, ImportError):
    """An optional package is needed but not installed."""


class MissingMethodError(TransferKitError, AttributeError):
    """A model lacks a method that something else has."""


class ModelInUseError(TransferKitError, RuntimeError):
    """Another thread trains the model."""


class NonFiniteError(TransferKitError, ArithmeticError):
    """A loss, a gradient or a feature is infinite or NaN."""


class NothingToTrainError(TransferKitError, ValueError):
    """Every parameter is frozen."""


class OutOfMemoryError(TransferKitError, RuntimeError):
    """Memory does not suffice, even for one image at a time."""


class ProcessError(TransferKitError, RuntimeError):
    """Another of the processes that work together failed, ended, or does something else."""


class PreprocessingError(TransferKitError, ValueError):
    """The preprocessing that belongs to a weight file is unknown."""


class TargetError(TransferKitError, ValueError):
    """A target is out of range, or has an unsupported shape or dtype."""


class TorchvisionMismatchError(TransferKitError, ImportError):
    """torchvision is missing, or was built for another version of torch."""


class UnknownLayerError(TransferKitError, ValueError):
    """The model has no layer of that name."""


class WeightsError(TransferKitError, ValueError):
    """A weight file cannot be read or does not fit the network."""


class WeightsDownloadError(TransferKitError, OSError):
    """A weight file could not be downloaded completely."""


class WorkerError(TransferKitError, RuntimeError):
    """A worker process that reads images could not start, died or hangs."""


def printable(text: str) -> str:
    """Return text with control characters escaped: names and texts out of files could forge lines or wipe screens."""
    return "".join(c if c.isprintable() or c in "\xa0\u3000" else ascii(c)[1:-1] for c in text)


def close_matches(name: object, known: Iterable[str]) -> str:
    """Return a sentence with the names in `known` closest to a misspelled `name`, or with the first twelve."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=4, cutoff=0.55)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    rest = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"Known: {', '.join(map(repr, names[:12]))}{rest}."
