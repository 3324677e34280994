"""Patches, masks and positions against formulas in NumPy and against inverses."""

import numpy as np
import pytest
import torch

from emssl_hf.models.patches import gather_patches, grid_size, patchify, random_masking, unpatchify
from emssl_hf.models.positions import interpolate_positions, sincos_positions

shapes = pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 16, 48), (1, 2, 24, 8)])


@shapes
def test_unpatchify_inverts_patchify(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape)
    grid = grid_size((shape[2], shape[3]), 8)
    assert torch.equal(unpatchify(patchify(images, 8), 8, grid), images)


@shapes
def test_patch_vectors_are_row_column_channel(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape)
    patches = patchify(images, 8).numpy()
    columns = shape[3] // 8
    for number in range(patches.shape[1]):
        top, left = 8 * (number // columns), 8 * (number % columns)
        window = images.numpy()[:, :, top : top + 8, left : left + 8]
        expected = np.moveaxis(window, 1, -1).reshape(shape[0], -1)
        np.testing.assert_array_equal(patches[:, number], expected)


def test_patches_that_do_not_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="do not tile an image of 30 x 32"):
        patchify(torch.zeros(1, 1, 30, 32), 8)


@pytest.mark.parametrize(("num_patches", "ratio", "kept"), [(16, 0.75, 4), (10, 0.6, 4), (7, 0.5, 3)])
def test_masking_keeps_the_smallest_noise(num_patches: int, ratio: float, kept: int) -> None:
    noise = torch.rand(3, num_patches)
    masking = random_masking(noise, ratio)
    for row in range(3):
        smallest = set(np.argsort(noise[row].numpy())[:kept].tolist())
        assert set(masking.ids_keep[row].tolist()) == smallest
        assert {i for i in range(num_patches) if masking.mask[row, i] == 0} == smallest
    shuffled = torch.cat([masking.ids_keep, masking.ids_masked], dim=1)
    assert torch.equal(shuffled.gather(1, masking.ids_restore), torch.arange(num_patches).expand(3, -1))


def test_gather_patches() -> None:
    sequence, ids = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    expected = np.stack([sequence[i].numpy()[ids[i].numpy()] for i in range(2)])
    np.testing.assert_array_equal(gather_patches(sequence, ids).numpy(), expected)


@pytest.mark.parametrize("row_first", [False, True])
@pytest.mark.parametrize("temperature", [10000.0, 100.0])
def test_sincos_positions(row_first: bool, temperature: float) -> None:
    rows, columns, width = 3, 5, 16
    table = sincos_positions(width, (rows, columns), temperature=temperature, row_first=row_first)[0].numpy()
    assert table.shape == (1 + rows * columns, width) and not table[0].any()
    for row in range(rows):
        for column in range(columns):
            expected = []
            for place in (row, column) if row_first else (column, row):
                angles = [place / temperature ** (k / 4) for k in range(4)]
                expected += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
            np.testing.assert_allclose(table[1 + row * columns + column], expected, atol=1e-6)


def test_sincos_positions_need_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(18, (2, 2))


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' convolution kernel."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampling(old: int, new: int) -> np.ndarray:
    """(new, old) weights of bicubic interpolation with repeated edges, pixel centres aligned."""
    weights = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        for neighbour in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(neighbour, 0), old - 1)] += cubic(place - neighbour)
    return weights


@pytest.mark.parametrize(("old", "new"), [((4, 4), (4, 4)), ((4, 4), (6, 3)), ((2, 5), (4, 7)), ((6, 3), (3, 3))])
def test_interpolated_positions(old: tuple[int, int], new: tuple[int, int]) -> None:
    positions = torch.randn(1, 1 + old[0] * old[1], 8)
    table = positions[0, 1:].numpy().reshape(*old, 8)
    expected = np.einsum("ir,jc,rcd->ijd", resampling(old[0], new[0]), resampling(old[1], new[1]), table)
    result = interpolate_positions(positions, old, new)
    assert torch.equal(result[:, 0], positions[:, 0])
    np.testing.assert_allclose(result[0, 1:].numpy(), expected.reshape(-1, 8), atol=1e-5)
    if old == new:
        assert torch.equal(result, positions)
