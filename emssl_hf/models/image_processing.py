"""A grey micrograph of any depth -> pixel_values, and the stock processor that goes with published models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .patches import pair

_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in PIL


class MicrographImageProcessor(PilBackend):
    """Micrographs (PIL images, arrays (H, W) or (H, W, 3), of any depth) -> pixel_values (B, 1, H, W).

    8-bit values are kept; anything deeper is stretched once per image between two percentiles. PIL's own
    conversion to 8 bits would saturate a 16-bit micrograph without a warning.
    """

    resample = PILImageResampling.BILINEAR
    size: Any = {"height": 224, "width": 224}  # noqa: RUF012 - the convention of transformers
    image_mean: Any = (0.5,)
    image_std: Any = (0.5,)
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = False

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        """A list of images; unlike the base class, (H, W) arrays count as images."""
        images = self.fetch_images(images)
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            return list(images)
        return [images]

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        """One image -> float32 (1, H, W) on the scale 0 to 255."""
        return _stretch(_to_grey(_to_array(image)))[None]

    def resize(
        self, image: np.ndarray[Any, Any], size: SizeDict, resample: Any = None, *args: Any, **kwargs: Any
    ) -> np.ndarray[Any, Any]:
        """(1, H, W) float32 to (1, size.height, size.width), antialiased, without rounding to 8 bits."""
        if not (size.height and size.width):
            raise ValueError(f"size must give height and width, not {dict(size)}.")
        resample = PILImageResampling.BILINEAR if resample is None else resample
        picture = Image.fromarray(image[0].astype(np.float32))  # mode F
        return np.asarray(picture.resize((size.width, size.height), resample=resample))[None]


def stock_processor(
    size: int | tuple[int, int] | list[int], mean: float | Sequence[float], std: float | Sequence[float]
) -> ViTImageProcessorPil:
    """The processor beside a published model: RGB, bilinear to (height, width), / 255, normalised.

    One mean and std serve all three channels. On disk it is a plain ViTImageProcessor.
    """
    height, width = pair(size)
    return ViTImageProcessorPil(
        size={"height": height, "width": width},
        resample=PILImageResampling.BILINEAR,
        image_mean=_three(mean),
        image_std=_three(std),
        do_convert_rgb=True,
    )


def _three(value: float | Sequence[float]) -> list[float]:
    values = [float(value)] if isinstance(value, float | int) else [float(v) for v in value]
    return values * 3 if len(values) == 1 else values


def _to_array(image: Any) -> np.ndarray[Any, Any]:
    """(H, W) or (H, W, C) array of a PIL image, array or tensor; channels-first is recognised by its size."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "CMYK", "YCbCr", "HSV") else image)
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"A micrograph is (H, W) or (H, W, channels), not an array of shape {array.shape}.")
    return array


def _to_grey(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(H, W) at the array's own depth; equal colours give their exact value, an alpha channel is dropped."""
    if array.ndim == 2:
        return array
    if array.shape[2] in (2, 4):
        array = array[..., :-1]
    if array.shape[2] == 1 or (array == array[..., :1]).all():
        return array[..., 0]
    if array.shape[2] != 3:
        raise ValueError(f"A micrograph has 1, 2, 3 or 4 channels, not {array.shape[2]}.")
    grey = array @ _LUMINANCE
    return grey if array.dtype.kind == "f" else grey.round().astype(array.dtype)


def _stretch(grey: np.ndarray[Any, Any], percentiles: tuple[float, float] = (0.1, 99.9)) -> np.ndarray[Any, Any]:
    """Float32 from 0 to 255: 8-bit values as they are, anything deeper between its percentiles."""
    if grey.dtype == np.bool_:
        return grey.astype(np.float32) * 255
    if grey.dtype == np.uint8:
        return grey.astype(np.float32)
    values = grey.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("The micrograph holds values that are not finite numbers.")
    low, high = np.percentile(values, percentiles)
    if high <= low:
        return np.zeros(grey.shape, np.float32)
    return (np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.float32)
