"""Transfer learning with torchvision's VGG networks: freeze early layers, attach a head, fine-tune.

>>> import transferkit as tk
>>> backbone = tk.load_backbone("vgg16", weights=None, image_size=64)
>>> model = tk.attach_head(tk.freeze_until(backbone, "head"), ["cat", "dog"], hidden=(256,))
>>> trainer = tk.Trainer(model, optimizer="adam", lr=1e-3)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transferkit.api import *


def __getattr__(name: str) -> Any:
    """Load all public names when the first is used: until then the library imports nothing, and torch neither."""
    if name == "__version__":
        from importlib.metadata import version

        return version("transferkit")
    if name == "__all__" or not name.startswith("__"):
        public = {key: each for key, each in vars(import_module("transferkit.api")).items() if not key.startswith("_")}
        globals().update(public, __all__=sorted(public))
    if name not in globals():
        raise AttributeError(f"module 'transferkit' has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]
