"""Check that the installed torchvision was built for the installed torch."""

import re
from importlib.metadata import PackageNotFoundError, requires, version

from transferkit.errors import TorchvisionMismatchError


def check_torchvision() -> None:
    """Import torchvision; if it does not load into this torch, `TorchvisionMismatchError` says what to install."""
    try:
        import torchvision  # noqa: F401 - only to see whether it loads
    except (ImportError, RuntimeError, OSError) as error:
        # A mismatch raises "operator torchvision::nms does not exist" (RuntimeError) or an undefined symbol
        # (ImportError, OSError).
        raise TorchvisionMismatchError(
            f"torchvision does not load: {error}. Got torch {_installed('torch')} with torchvision "
            f"{_installed('torchvision')}; expected {_wanted()}. Install a matching pair: "
            "pip install --upgrade --force-reinstall torch torchvision"
        ) from error


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _wanted() -> str:
    try:
        needs = [need for need in requires("torchvision") or () if re.match(r"torch\b", need)]
    except PackageNotFoundError:
        needs = []
    return f"{needs[0]}, which this torchvision requires" if needs else "two built for each other"
