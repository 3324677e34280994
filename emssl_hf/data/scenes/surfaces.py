"""Continuous surfaces: Films_Coated_Surface and Porous_Sponge."""

import numpy as np
import numpy.typing as npt

from emssl_hf.data.scenes.grains import Grain, lay
from emssl_hf.data.scenes.stage import FloatArray, Scene, View, jittered_lattice, scatter, smoothstep


def cells(
    view: View,
    seeds: npt.NDArray[np.float64],
    spacing: float,
    warp: tuple[FloatArray, FloatArray],
    weights: npt.NDArray[np.float64],
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int32]]:
    """Distances (pixels) to the nearest two seeds of a warped Voronoi mosaic, and the nearest's index.

    `warp` displaces pixels by (x, y) pixels, which bends the borders; `weights` enlarge single cells.
    """
    reach = int(1.75 * spacing * view.scale) + 2
    first = np.full((view.height, view.width), np.float32(reach), np.float32)
    second, owner = first.copy(), np.zeros(first.shape, np.int32)
    column = np.arange(view.width, dtype=np.float32)[None, :] + warp[0]
    row = np.arange(view.height, dtype=np.float32)[:, None] + warp[1]
    for i, (x, y) in enumerate(view.points(seeds)):
        rows = slice(max(int(y) - reach, 0), max(min(int(y) + reach, view.height), 0))
        columns = slice(max(int(x) - reach, 0), max(min(int(x) + reach, view.width), 0))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        dx, dy = column[rows, columns] - np.float32(x), row[rows, columns] - np.float32(y)
        distance = np.sqrt(dx * dx + dy * dy) * np.float32(weights[i])
        near, next_near = first[rows, columns], second[rows, columns]
        np.minimum(next_near, np.maximum(near, distance), out=next_near)
        np.copyto(owner[rows, columns], i, where=distance < near)
        np.minimum(near, distance, out=near)
    return first, second, owner


def films(rng: np.random.Generator, view: View) -> Scene:
    """A film: grains with dark boundaries, cracked plates, a nodular coat, or wrinkles."""
    style = rng.choice(["grains", "cracks", "nodules", "wrinkles"], p=[0.5, 0.22, 0.16, 0.12])
    if style == "wrinkles":
        return _wrinkled(rng, view)
    across = {"grains": rng.uniform(4.5, 9), "cracks": rng.uniform(2.2, 4.5), "nodules": rng.uniform(5, 9)}[str(style)]
    spacing = 1.0 / (across * view.richness**0.9)
    seeds = jittered_lattice(rng, spacing, rng.uniform(0.3, 0.6))
    weights = np.exp(rng.uniform(-0.12, 0.12, len(seeds)) * rng.uniform(0.2, 1.6))
    sway = np.float32(spacing * view.scale * rng.uniform(0.02, 0.11))
    warp = (
        view.texture("bands", spacing * rng.uniform(1.0, 1.8), rng.random(2)) * sway,
        view.texture("bands", spacing * rng.uniform(1.0, 1.8), rng.random(2)) * sway,
    )
    first, second, owner = cells(view, seeds, spacing, warp, weights)
    border = (second - first) / np.float32(spacing * view.scale)
    return _coat(rng, view, str(style), spacing, border, first, owner)


def _coat(
    rng: np.random.Generator,
    view: View,
    style: str,
    spacing: float,
    border: FloatArray,
    first: FloatArray,
    owner: npt.NDArray[np.int32],
) -> Scene:
    """Relief and yield of a mosaic film from its border distance (in spacings)."""
    step = spacing * view.scale
    gap_low, gap_high = {"grains": (0.03, 0.16), "cracks": (0.02, 0.1), "nodules": (0.0, 0.05)}[style]
    gap = gap_low + (gap_high - gap_low) * rng.random()
    opening = gap * (1 + np.float32(rng.uniform(0.1, 0.7)) * view.texture("bands", spacing * 2.2, rng.random(2)))
    plate = smoothstep(border - opening, 0.0, rng.uniform(0.1, 0.3) if style == "grains" else 0.07)
    levels = rng.standard_normal(256).astype(np.float32)[owner % 256]
    bulge = {
        "grains": rng.uniform(0.02, 0.16),
        "cracks": rng.uniform(-0.06, 0.03),
        "nodules": rng.uniform(0.35, 0.7),
    }[style]
    dome = np.sqrt(np.clip(1 - (first / np.float32(0.75 * step)) ** 2, 0, 1))
    relief = step * (0.3 * plate + np.float32(bulge) * dome + np.float32(rng.uniform(0, 0.06)) * levels * plate)
    fine = view.texture("bands", spacing * rng.uniform(0.2, 0.6), rng.random(2))
    relief += fine * np.float32(step * rng.uniform(0.0, 0.02)) + np.float32(rng.uniform(0, 0.02) * step) * view.texture(
        "cloud", 1.0, rng.random(2)
    )
    dark = np.float32(rng.uniform(0.2, 0.6) if style != "nodules" else rng.uniform(0.6, 0.9))
    if style == "cracks" and rng.random() < 0.2:
        dark = np.float32(rng.uniform(1.5, 2.2))
    material = (dark + (1 - dark) * plate) * (1 + np.float32(rng.uniform(0, 0.12)) * levels)
    return Scene(relief.astype(np.float32), np.maximum(material, 0.1).astype(np.float32), 0.35 * step)


def _wrinkled(rng: np.random.Generator, view: View) -> Scene:
    """Ridges where a film has buckled off its ground, with pinholes."""
    wavelength = rng.uniform(0.16, 0.34) / view.richness**0.8
    field = view.texture("bands", wavelength, rng.random(2), stretch=rng.uniform(1, 2.5), turn=rng.uniform(0, np.pi))
    ridge = np.exp(-np.abs(field) * np.float32(rng.uniform(3.5, 7)))
    relief = ridge * np.float32(wavelength * view.scale * rng.uniform(0.15, 0.4))
    relief += view.texture("bands", wavelength * 0.3, rng.random(2)) * np.float32(0.1)
    holes = scatter(rng, rng.uniform(0, 6))
    pits = np.zeros_like(relief)
    grains = [Grain.draw(rng, "blob", wavelength * factor) for factor in (0.1, 0.16, 0.24)]
    labels = lay(pits, view, grains, holes, rng.integers(0, 3, len(holes)), np.zeros(len(holes)))
    material = 1 + np.float32(rng.uniform(0, 0.35)) * ridge
    material[labels > 0] = np.float32(rng.uniform(0.15, 0.5))
    return Scene((relief - pits).astype(np.float32), material.astype(np.float32), wavelength * view.scale * 0.25)


def porous(rng: np.random.Generator, view: View) -> Scene:
    """Dark pores in rough ground, a sponge of branching walls, or an open foam of struts."""
    style = rng.choice(["pores", "sponge", "foam"], p=[0.45, 0.3, 0.25])
    if style == "foam":
        return _foam(rng, view)
    wavelength = rng.uniform(0.16, 0.36) / view.richness**0.75
    field = view.texture("bands", wavelength, rng.random(2), stretch=rng.uniform(0.8, 1.4), turn=rng.uniform(0, np.pi))
    field = field + np.float32(rng.uniform(0, 0.5)) * view.texture("bands", wavelength * 0.5, rng.random(2))
    rough = view.texture("bands", wavelength * rng.uniform(0.14, 0.26), rng.random(2))
    cloud = view.texture("cloud", wavelength * 2, rng.random(2))
    level = rng.uniform(0.35, 0.95) if style == "pores" else rng.uniform(-0.25, 0.35)
    lip = np.float32(rng.uniform(0.05, 0.35))
    inside = smoothstep(field + lip * rough - np.float32(level), 0.0, rng.uniform(0.12, 0.5))
    reach = wavelength * view.scale
    grit = inside * np.float32(rng.uniform(0.01, 0.12)) + inside * (1 - inside) * np.float32(rng.uniform(0.1, 0.4))
    walls = np.float32(rng.uniform(0.0, 0.05)) + grit
    relief = reach * (
        -0.5 * inside
        - 0.25 * np.maximum(field - np.float32(level), 0)
        + walls * rough
        + np.float32(rng.uniform(0, 0.05)) * cloud
    )
    if style == "sponge":
        relief += reach * np.float32(rng.uniform(0.05, 0.16)) * np.abs(rough) * (1 - inside) - reach * 0.12 * field * (
            1 - inside
        )
    dark = np.float32(rng.uniform(0.15, 0.5))
    sunk = np.clip(field - np.float32(level), 0, 1.6)
    material = (1 - (1 - dark) * inside) * np.exp(-sunk * np.float32(rng.uniform(0.3, 1.2)))
    material += np.float32(rng.uniform(0.02, 0.4)) * inside * np.maximum(rough, 0)
    return Scene(relief.astype(np.float32), np.maximum(material, 0.05).astype(np.float32), 0.4 * reach)


def _foam(rng: np.random.Generator, view: View) -> Scene:
    """Rounded struts around cells, two storeys deep."""
    spacing = rng.uniform(0.18, 0.4) / view.richness**0.75
    relief = np.full((view.height, view.width), -1.2 * spacing * view.scale, np.float32)
    material = np.full(relief.shape, rng.uniform(0.1, 0.3), np.float32)
    thickness = rng.uniform(0.12, 0.3)
    for storey, yields in ((1, 0.55), (0, 1.0)):
        seeds = jittered_lattice(rng, spacing, 0.42)
        sway = np.float32(spacing * view.scale * 0.07)
        bend = view.texture("bands", spacing * 0.8, rng.random(2)) * sway
        first, second, _ = cells(view, seeds, spacing, (bend, -bend), np.ones(len(seeds)))
        across = (second - first) / np.float32(2 * spacing * view.scale * thickness * 0.5)
        strut = np.sqrt(np.maximum(1 - across * across, 0)) * np.float32(thickness * 0.5 * spacing * view.scale)
        height = strut - np.float32(storey * 0.6 * spacing * view.scale)
        above = (across < 1) & (height > relief)
        np.copyto(relief, height, where=above)
        np.copyto(material, np.float32(yields), where=above)
    relief += view.texture("bands", spacing * 0.25, rng.random(2)) * np.float32(
        rng.uniform(0.0, 0.03) * spacing * view.scale
    )
    return Scene(relief, material, 0.5 * spacing * view.scale)
