"""Pictures that a program holds: of Pillow, arrays of numpy, tensors of torch."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from mmchat import limits
from mmchat.errors import ImageError
from mmchat.images.bounds import RefusedError, check_size

if TYPE_CHECKING:
    from PIL import Image as PILImage

_CHANNELS = ((1,), (3,), (4,))
_ROUNDING = 1e-3  # by which resizing may leave the range from 0 to 1


def upright_picture(source: Any) -> PILImage.Image | None:
    """What `source` shows, upright; None if it is no picture in memory. Raises ImageError.

    Arrays are [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels; where both fit, tensors have
    channels first and arrays last. Whole numbers go from 0 to 255, those of uint16 to 65,535 (the
    high byte counts), real ones from 0 to 1.
    """
    if _is(source, "PIL.Image", "Image"):
        return _of_pillow(source)
    if _is(source, "torch", "Tensor"):
        return _of_tensor(source)
    if _is(source, "numpy", "ndarray"):
        return _of_array(source, channels_first=False)
    return None


def pixel_count(source: Any) -> int | None:
    """About how many pixels `source` has; None if it is no picture in memory. Decodes nothing."""
    if _is(source, "PIL.Image", "Image"):
        return source.width * source.height
    if not (_is(source, "torch", "Tensor") or _is(source, "numpy", "ndarray")):
        return None
    shape = tuple(source.shape)
    channels = min(shape[0], shape[-1]) if len(shape) == 3 else 1
    return math.prod(shape) // max(channels, 1)


def _is(source: object, module: str, name: str) -> bool:
    """Whether `source` is of this class, without importing it: who has one has done so."""
    kind = getattr(sys.modules.get(module), name, None)  # None too while a thread imports it
    return kind is not None and isinstance(source, kind)


def _of_pillow(picture: PILImage.Image) -> PILImage.Image:
    from PIL import ImageOps

    _check_size(*picture.size)
    if picture.mode == "LAB":
        raise ImageError("a picture of mode LAB is not read; convert it to RGB first")
    try:
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Exception:  # Pillow raises almost anything; metadata alone makes nothing unreadable
        try:
            return picture.copy()
        except Exception as problem:
            raise ImageError(
                f"the picture of Pillow cannot be read ({type(problem).__name__}); is its file"
                " closed or cut short?"
            ) from None


def _of_tensor(tensor: Any) -> PILImage.Image:
    try:
        kept = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        values = kept.cpu().numpy()
    except Exception:  # it is sparse, quantised or on the meta device
        kind = f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
        raise ImageError(f"a tensor of {kind} is no picture") from None
    return _of_array(values, channels_first=True)


def _of_array(values: Any, *, channels_first: bool) -> PILImage.Image:
    import numpy as np
    from PIL import Image as PILImage

    shape = values.shape
    if values.ndim == 2:
        values = values[..., None]
    is_first, is_last = shape[:1] in _CHANNELS, values.shape[-1:] in _CHANNELS
    if values.ndim != 3 or not (is_first or is_last):
        raise ImageError(
            f"an array of shape {list(shape)} is no picture: it has [H, W], [H, W, C] or [C, H, W]"
            " with 1, 3 or 4 channels, and there is one for each picture"
        )
    if is_first and (channels_first or not is_last) and len(shape) == 3:
        values = np.moveaxis(values, 0, -1)
    _check_size(values.shape[1], values.shape[0])
    pixels = np.ascontiguousarray(_bytes(values))
    return PILImage.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _bytes(values: Any) -> Any:
    """[H, W, C] of any real numbers -> uint8."""
    import numpy as np

    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    if kind not in "iuf":
        raise ImageError(
            f"an array of {values.dtype} is no picture; give uint8, or float from 0 to 1"
        )
    low, high = values.min(), values.max()
    least, most, extra = (0, 1, _ROUNDING) if kind == "f" else (0, 255, 0)
    if not (np.isfinite(low) and np.isfinite(high)):
        what = "NaN" if np.isnan(low) else "infinite values"
        raise ImageError(f"an array of {values.dtype} with {what} in it is no picture")
    if not (least - extra <= low and high <= most + extra):
        is_bytes = kind == "f" and low >= 0 and high <= 255
        advice = "divide by 255 or give uint8" if is_bytes else "was it normalised? scale it back"
        raise ImageError(
            f"an array of {values.dtype} with values from {low:g} to {high:g} is no picture: they"
            f" go from {least} to {most}; {advice}"
        )
    scaled = values.astype(np.float32).clip(0, 1) * 255 if kind == "f" else values
    return np.rint(scaled).astype(np.uint8)


def _check_size(width: int, height: int) -> None:
    try:
        check_size((width, height), limits.IMAGE_PIXELS)
    except RefusedError as reason:
        raise ImageError(f"the picture {reason}") from None
