"""Is the installed torchvision the one built for the installed torch?"""

import re
from importlib.metadata import PackageNotFoundError, requires, version

from transferkit.errors import TorchvisionMismatchError


def check_torchvision() -> None:
    """Import torchvision, and explain the failure if it was built for another torch.

    Raises:
        TorchvisionMismatchError: torchvision is missing, or its compiled operators do not load into this torch.

    Example:
        >>> check_torchvision()
    """
    try:
        import torchvision  # noqa: F401 - the import itself is what is tested
    except (ImportError, RuntimeError, OSError) as error:
        # A mismatch shows itself as "operator torchvision::nms does not exist" (RuntimeError) or as an
        # undefined symbol (ImportError, OSError).
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
    return f"{needs[0]}, which this torchvision asks for" if needs else "two built for each other"
