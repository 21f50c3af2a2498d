"""What to write where an array or tensor of images has another form: lines for the very type at hand."""

from typing import Any

import numpy as np
from torch import Tensor

_WHITE = (255, 1023, 4095, 16383, 65535)  # largest values of 8, 10, 12, 14 and 16 bits


def conversion(images: Any, name: str, *, ndim: int) -> str:
    """Return statements that make raw images of three channels of an array or tensor, called `name`; "" if none do."""
    lines = []
    values: Any
    if isinstance(images, Tensor):
        values = images.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
        uint8, repeat = "{}.to(torch.uint8)", "{}.repeat_interleave(3, dim={})"
    else:
        values = images
        uint8, repeat = "{}.astype('uint8')", "{}.repeat(3, axis={})"
        if not isinstance(values, np.ndarray) or values.dtype == object:
            values = np.array(np.asarray(values).tolist())
            lines.append(f"np.array(np.asarray({name}).tolist())")
    if values.size == 0 or values.dtype.kind not in "buif" or values.ndim not in (ndim, ndim - 1, ndim - 2):
        return ""
    highest, kind = values.max(), values.dtype.kind
    white = 1 if kind == "b" or (kind == "f" and highest <= 1) else next((w for w in _WHITE if highest <= w), 0)
    if not white or not values.min() >= 0:
        return ""
    if values.dtype != np.uint8:
        number = f"{name}.float()" if kind != "f" and isinstance(images, Tensor) else name
        scaled = {1: f"({name} * 255)", 255: name}.get(white, f"({number} / {white} * 255)")
        rounded = "" if kind == "b" or (kind != "f" and white == 255) else ".round()"
        lines.append(f"{uint8.format(name)} * 255" if kind == "b" else uint8.format(scaled + rounded))
        values = (values / white * 255).round()
    lines += _three_channels(values, name, ndim, uint8=uint8, repeat=repeat)
    comment = f"  # {white} stands for white" if white > 255 else ""
    return "; ".join(f"{name} = {line}" for line in lines) + comment


def _three_channels(values: Any, name: str, ndim: int, *, uint8: str, repeat: str) -> list[str]:
    """Return the right sides of assignments that make three channels of those that there are."""
    if values.ndim == ndim - 1 == 3 and values.shape[2] == 3:
        return [f"{name}[None]"]
    if values.ndim < ndim:  # gray
        return [repeat.format(f"{name}[..., None]" if values.ndim == ndim - 1 else f"{name}[None, ..., None]", -1)]
    axis = -1 if values.shape[-1] <= values.shape[-3] else -3
    count, rest = values.shape[axis], "" if axis == -1 else ", :, :"
    if count > 4:
        return [f"{name}[..., [0, 1, 2]{rest}]"]
    lines = []
    if count in (2, 4):
        color, alpha = f"{name}[..., :{count - 1}{rest}]", f"{name}[..., {count - 1}:{rest}]"
        on_white = f"255 - {uint8.format(f'((255 - {color}) * ({alpha} / 255)).round()')}"
        lines.append(color if values.take(-1, axis=axis).min() == 255 else on_white)
    return [*lines, repeat.format(name, axis)] if count in (1, 2) else lines
