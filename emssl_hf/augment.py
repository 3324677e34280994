"""Batched augmentation on the device: stored micrographs in, normalised views out.

Every amount is drawn from the samples' keys (see randomness.py). Crop, flip, quarter turn and resize are one affine
sampling, so pixels are interpolated once; the photometric part is kornia's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import kornia.enhance
import kornia.filters
import torch
import torch.nn.functional as F
from torch import Tensor

from emssl_hf.models.objective import View
from emssl_hf.randomness import uniform

#: Quarter turns as 2x2 matrices on (x, y).
_TURNS = ((1.0, 0.0, 0.0, 1.0), (0.0, -1.0, 1.0, 0.0), (-1.0, 0.0, 0.0, -1.0), (0.0, 1.0, -1.0, 0.0))


@dataclass(frozen=True)
class Geometry:
    """Which symmetries of the plane are used, and how pixels are interpolated."""

    rotate: bool = True
    flip: bool = True
    interpolation: str = "bicubic"


class Augmenter:
    """Makes the views of a method from a batch of the store.

    Args:
        views: One entry per view, see `emssl_hf.models.objective.View`.
        mean, std: Of the training pixels, as a share of full range.
        channels: The grey channel is repeated this often (a view of the same memory).

    Calling it with images (B, H, W) of uint8 or uint16, their valid extents (B, 2) as (height, width) and the samples'
    keys (B,) gives pixel_values: (B, C, h, w) for one view, (B, V, C, h, w) for V views.
    """

    def __init__(
        self,
        views: Sequence[View],
        mean: float,
        std: float,
        *,
        channels: int = 1,
        geometry: Geometry | None = None,
    ) -> None:
        self.views = tuple(views)
        self.mean, self.std, self.channels = mean, std, channels
        self.geometry = geometry or Geometry()

    def __call__(self, images: Tensor, extents: Tensor, keys: Tensor) -> Tensor:
        reach = max(view.padding / min(view.size) for view in self.views)
        pixels = mirror_margins(to_unit(images), extents, reach)
        made = [self.one_view(pixels, extents, keys, number) for number in range(len(self.views))]
        return made[0] if len(made) == 1 else torch.stack(made, dim=1)

    def one_view(self, pixels: Tensor, extents: Tensor, keys: Tensor, number: int) -> Tensor:
        """View `number` of grey pixels (B, 1, H, W) in [0, 1], as (B, C, h, w)."""
        view, stream = self.views[number], f"view{number}"
        boxes = crop_boxes(view, extents, uniform(keys, 4, f"{stream}.crop"))
        turns = self.symmetries(uniform(keys, 3, f"{stream}.turn"), square=view.size[0] == view.size[1])
        cropped = resample(pixels, boxes, turns, view, self.geometry.interpolation)
        cropped = photometric(cropped, view, uniform(keys, 8, f"{stream}.photo"))
        return ((cropped - self.mean) / self.std).expand(-1, self.channels, -1, -1)

    def symmetries(self, draws: Tensor, square: bool) -> Tensor:
        """Random quarter turns (half turns where the view is not square) and flips, as (B, 2, 2) on (x, y)."""
        turns = torch.tensor(_TURNS if square else _TURNS[::2], device=draws.device)
        quarter = (draws[:, 0] * (len(turns) if self.geometry.rotate else 1)).long()
        mirror = torch.where(draws[:, 1:] < 0.5, -1.0, 1.0) if self.geometry.flip else torch.ones_like(draws[:, 1:])
        return turns[quarter].view(-1, 2, 2) * mirror[:, :, None]


def to_unit(images: Tensor) -> Tensor:
    """Stored integers (B, H, W) as a share of full range, (B, 1, H, W) float32."""
    full = 255.0 if images.dtype == torch.uint8 else 65535.0
    return images.to(torch.float32).unsqueeze(1) / full


def mirror_margins(pixels: Tensor, extents: Tensor, reach: float) -> Tensor:
    """Below and right of each image in a batch (B, 1, H, W) of unequal sizes stands its mirror image, not the padding.

    The batch grows by `reach`, the share of an edge by which crops look beyond it, so that none sees its end.
    """
    height, width = pixels.shape[-2:]
    if bool((extents == torch.tensor([height, width], device=extents.device)).all()):
        return pixels
    room = math.ceil(reach * max(height, width)) + 4
    rows, columns = _mirrored(extents[:, 0], height + room), _mirrored(extents[:, 1], width + room)
    pixels = pixels.gather(2, rows[:, None, :, None].expand(-1, 1, -1, width))
    return pixels.gather(3, columns[:, None, None, :].expand(-1, 1, height + room, -1))


def _mirrored(edges: Tensor, length: int) -> Tensor:
    """Positions 0, 1, ... along an axis (B, length), mirrored at each image's edge as often as it takes."""
    period = 2 * edges[:, None]
    places = torch.arange(length, device=edges.device)[None] % period
    return torch.minimum(places, period - 1 - places)


def crop_boxes(view: View, extents: Tensor, draws: Tensor) -> Tensor:
    """Boxes (B, 4) as (top, left, height, width) in pixels, from (B, 4) uniforms.

    `resized` is the random resized crop of Szegedy et al. (2015) with the box clamped to the image; `padded` is the
    short edge resized to the view, padded by `padding` view pixels and cropped at random; `whole` takes everything.
    """
    height, width = extents.to(torch.float32).unbind(1)
    if view.crop == "whole":
        return torch.stack([torch.zeros_like(height), torch.zeros_like(width), height, width], dim=1)
    if view.crop == "padded":
        step = torch.minimum(height / view.size[0], width / view.size[1])  # stored pixels per view pixel
        crop_height, crop_width, margin = step * view.size[0], step * view.size[1], step * view.padding
        top = draws[:, 2] * (height - crop_height + 2 * margin) - margin
        left = draws[:, 3] * (width - crop_width + 2 * margin) - margin
        return torch.stack([top, left, crop_height, crop_width], dim=1)
    area = height * width * (view.scale[0] + draws[:, 0] * (view.scale[1] - view.scale[0]))
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    ratio = torch.exp(low + draws[:, 1] * (high - low))
    crop_height = torch.minimum(torch.sqrt(area / ratio), height)
    crop_width = torch.minimum(torch.sqrt(area * ratio), width)
    top, left = draws[:, 2] * (height - crop_height), draws[:, 3] * (width - crop_width)
    return torch.stack([top, left, crop_height, crop_width], dim=1)


def resample(pixels: Tensor, boxes: Tensor, symmetry: Tensor, view: View, interpolation: str) -> Tensor:
    """Cut the boxes out of (B, 1, H, W), apply the symmetry and resize to the view, in one sampling.

    Where several pixels fall together they are averaged first, image by image, for sampling alone would alias.
    """
    shrink = (boxes[:, 2:].amin(1) / max(view.size)).long().clamp_min(1)
    if int(shrink.max()) == 1:
        return _sample(pixels, boxes, symmetry, view, interpolation)
    sampled = pixels.new_empty(len(pixels), 1, *view.size)
    for factor in shrink.unique().tolist():
        rows = torch.nonzero(shrink == factor)[:, 0]
        pooled = F.avg_pool2d(pixels[rows], factor, ceil_mode=True)
        sampled[rows] = _sample(pooled, boxes[rows] / factor, symmetry[rows], view, interpolation)
    return sampled


def _sample(pixels: Tensor, boxes: Tensor, symmetry: Tensor, view: View, interpolation: str) -> Tensor:
    height, width = pixels.shape[-2:]
    scale = torch.stack([boxes[:, 3] / width, boxes[:, 2] / height], dim=1)
    centre = torch.stack([boxes[:, 1] + boxes[:, 3] / 2, boxes[:, 0] + boxes[:, 2] / 2], dim=1)
    shift = centre * 2 / torch.tensor([width, height], device=pixels.device) - 1
    matrix = torch.cat([scale[:, :, None] * symmetry, shift[:, :, None]], dim=2)
    grid = F.affine_grid(matrix, [pixels.shape[0], 1, *view.size], align_corners=False)
    sampled = F.grid_sample(pixels, grid, mode=interpolation, padding_mode="reflection", align_corners=False)
    return sampled.clamp_(0, 1)


def photometric(pixels: Tensor, view: View, draws: Tensor) -> Tensor:
    """Brightness, contrast, blur and solarising of (B, 1, h, w) in [0, 1], from (B, 8) uniforms."""
    if view.brightness or view.contrast:
        chosen = draws[:, 0] < view.jitter_probability
        brightness = torch.where(chosen, 1 + view.brightness * (2 * draws[:, 1] - 1), 1.0)
        contrast = torch.where(chosen, 1 + view.contrast * (2 * draws[:, 2] - 1), 1.0)
        pixels = kornia.enhance.adjust_brightness_accumulative(pixels, brightness)
        pixels = kornia.enhance.adjust_contrast_with_mean_subtraction(pixels, contrast)
    if view.blur_probability:
        pixels = _blur(pixels, view, draws[:, 3], draws[:, 4])
    if view.solarize_probability:
        chosen = (draws[:, 5] < view.solarize_probability)[:, None, None, None]
        pixels = torch.where(chosen & (pixels >= 0.5), 1 - pixels, pixels)
    return pixels


def _blur(pixels: Tensor, view: View, lottery: Tensor, strength: Tensor) -> Tensor:
    """Gaussian blur of the chosen images; sigma is in pixels of a 224-pixel view and scales with the view."""
    rows = torch.nonzero(lottery < view.blur_probability)[:, 0]
    if len(rows) == 0:
        return pixels
    low, high = (sigma * min(view.size) / 224 for sigma in view.blur_sigma)
    sigma = (low + strength[rows] * (high - low)).clamp_min(0.05)
    radius = max(1, math.ceil(3 * high))
    blurred = kornia.filters.gaussian_blur2d(
        pixels[rows], (2 * radius + 1, 2 * radius + 1), sigma[:, None].expand(-1, 2)
    )
    return pixels.index_copy(0, rows, blurred.to(pixels.dtype))


def erase(pixels: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Random erasing with noise (Zhong et al. 2020): 2-33 % of the area of (B, C, h, w) becomes N(0, 1)."""
    draws = uniform(keys, 5, "erase")
    height, width = pixels.shape[-2:]
    area = height * width * (0.02 + draws[:, 1] * 0.31)
    ratio = torch.exp((2 * draws[:, 2] - 1) * math.log(3.3))
    tall, wide = torch.sqrt(area * ratio).clamp(max=height), torch.sqrt(area / ratio).clamp(max=width)
    top, left = draws[:, 3] * (height - tall), draws[:, 4] * (width - wide)
    rows = torch.arange(height, device=pixels.device)[None, :, None]
    columns = torch.arange(width, device=pixels.device)[None, None, :]
    inside = (rows >= top[:, None, None]) & (rows < (top + tall)[:, None, None])
    inside = inside & (columns >= left[:, None, None]) & (columns < (left + wide)[:, None, None])
    inside = inside & (draws[:, 0] < probability)[:, None, None]
    return torch.where(inside[:, None], _normal(keys, height * width).view(-1, 1, height, width), pixels)


def _normal(keys: Tensor, count: int) -> Tensor:
    """N(0, 1) by Box and Muller from the keys, (B, count)."""
    first, second = uniform(keys, count, "normal.radius"), uniform(keys, count, "normal.angle")
    return torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)


def mix(
    pixels: Tensor, targets: Tensor, *, mixup: float, cutmix: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), chosen evenly per batch where both are on.

    Takes pixels (B, C, h, w) and target distributions (B, K) on the CPU generator's word and returns both mixed; each
    image is mixed with its mirror in the batch.
    """
    if not mixup and not cutmix:
        return pixels, targets
    draws = torch.rand(4, generator=generator)
    cut = bool(cutmix) and (not mixup or draws[0] < 0.5)
    keep = float(_beta(cutmix if cut else mixup, generator))
    partner, partner_targets = pixels.flip(0), targets.flip(0)
    if not cut:
        return pixels * keep + partner * (1 - keep), targets * keep + partner_targets * (1 - keep)
    height, width = pixels.shape[-2:]
    half_height, half_width = (round(edge * math.sqrt(1 - keep) / 2) for edge in (height, width))
    row, column = int(draws[1] * height), int(draws[2] * width)
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    pixels = pixels.clone()
    pixels[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    keep = 1 - (bottom - top) * (right - left) / (height * width)
    return pixels, targets * keep + partner_targets * (1 - keep)


def _beta(alpha: float, generator: torch.Generator) -> Tensor:
    """One draw from Beta(alpha, alpha) as a ratio of gamma draws."""
    gamma = torch._standard_gamma(torch.full((2,), alpha), generator=generator)
    return gamma[0] / gamma.sum()
