"""Images as sequences of patches, and random masks over them: pure tensor functions.

Shapes: B images, C channels, N patches of p x p pixels, K of them kept. A patch is a vector in (row, column,
channel) order, channel last, as in MAE and its descendants.
"""

from typing import NamedTuple

from torch import Tensor


class Masking(NamedTuple):
    """Which patches are kept: all index tensors are (B, N) or slices of that along N."""

    ids_keep: Tensor
    """(B, K) patches that the encoder sees, in shuffled order."""
    ids_masked: Tensor
    """(B, N - K) patches to be predicted, in shuffled order."""
    ids_restore: Tensor
    """(B, N) place of each patch in the shuffled sequence."""
    mask: Tensor
    """(B, N) float32, 0 kept and 1 removed."""


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """One number for a square, or (height, width), as (height, width)."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def grid_size(
    image_size: int | tuple[int, int] | list[int], patch_size: int | tuple[int, int] | list[int]
) -> tuple[int, int]:
    """Patches per column and per row; raises ValueError where the patches do not tile the image."""
    (height, width), (ph, pw) = pair(image_size), pair(patch_size)
    if height % ph or width % pw or height < ph or width < pw:
        raise ValueError(
            f"Patches of {ph} x {pw} pixels do not tile an image of {height} x {width}: "
            "choose an image_size that is a multiple of patch_size."
        )
    return height // ph, width // pw


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, p*p*C), patches row by row, channel last within a patch."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = grid_size((height, width), patch_size)
    x = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, p, p, C)
    return x.reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, p*p*C) -> (B, C, H, W): the inverse of `patchify` for a (rows, columns) grid."""
    rows, columns = grid
    batch = patches.shape[0]
    x = patches.reshape(batch, rows, columns, patch_size, patch_size, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, columns, p)
    return x.reshape(batch, x.shape[1], rows * patch_size, columns * patch_size)


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Keep the int(N * (1 - mask_ratio)) patches of an image that have the smallest noise (B, N)."""
    num_patches = noise.shape[1]
    num_keep = int(num_patches * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= num_keep).float()
    return Masking(ids_shuffle[:, :num_keep], ids_shuffle[:, num_keep:], ids_restore, mask)


def gather_patches(sequence: Tensor, ids: Tensor) -> Tensor:
    """(B, N, D) and indices (B, K) -> (B, K, D)."""
    return sequence.gather(1, ids.unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))
