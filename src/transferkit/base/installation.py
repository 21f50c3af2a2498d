"""Check that the installed torchvision was built for the installed torch."""

import re
from importlib.metadata import PackageNotFoundError, requires, version

from transferkit.errors import TorchvisionMismatchError


def check_torchvision() -> None:
    """Import torchvision; if it does not load into this torch, `TorchvisionMismatchError` says what to install."""
    try:
        import torchvision  # noqa: F401 - only to see whether it loads
    except (ImportError, RuntimeError, OSError) as error:
        # a mismatch raises "operator torchvision::nms does not exist" (RuntimeError), or names an undefined symbol
        wanted = "two built for each other"
        try:
            got = f"torch {version('torch')} with torchvision {version('torchvision')}"
            needs = [need for need in requires("torchvision") or () if re.match(r"torch\b", need)]
            wanted = f"{needs[0]}, which this torchvision requires" if needs else wanted
        except PackageNotFoundError as missing:
            got = f"no installed package {missing.name}"
        raise TorchvisionMismatchError(
            f"torchvision does not load: {error}. Got {got}; expected {wanted}. Install a matching pair: "
            "pip install --upgrade --force-reinstall torch torchvision"
        ) from error
