"""Fixed sine-cosine positions, and positions of one grid of patches for another: pure tensor functions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(
    hidden_size: int, grid: tuple[int, int], *, temperature: float = 10000.0, row_first: bool = False
) -> Tensor:
    """Fixed positions (1, 1 + rows*columns, D): half of D for each axis, [sin | cos], a zero row for CLS.

    MAE puts the column first, MoCo v3 the row. Raises ValueError where D is not a multiple of four.
    """
    if hidden_size % 4:
        raise ValueError(f"Sine-cosine positions need a hidden_size that is a multiple of 4, not {hidden_size}.")
    rows, columns = grid
    quarter = hidden_size // 4
    frequencies = temperature ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(places: Tensor) -> Tensor:
        angles = places.flatten().unsqueeze(1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    axes = (row, column) if row_first else (column, row)
    patches = torch.cat([encode(axis) for axis in axes], dim=1)
    return F.pad(patches, (0, 0, 1, 0)).unsqueeze(0).float()


def interpolate_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Positions (1, 1 + N, D) of one (rows, columns) grid for another, bicubic in 2-D; CLS is kept."""
    if old_grid == new_grid:
        return positions.clone()
    cls_position, patches = positions[:, :1], positions[:, 1:]
    image = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False)
    patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([cls_position, patches], dim=1)
