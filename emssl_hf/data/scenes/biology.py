"""Biological: cells with processes, meshes of filaments, and colonies."""

import numpy as np
import numpy.typing as npt

from emssl_hf.data.scenes.canvas import Canvas, wander
from emssl_hf.data.scenes.grains import Grain, lay
from emssl_hf.data.scenes.stage import REACH, FloatArray, Scene, View, scatter

Pose = tuple[float, float, float, float]


def biological(rng: np.random.Generator, view: View) -> Scene:
    """A neuron-like cell in its network, a spread cell, a colony in slime, or a mesh alone."""
    style = str(rng.choice(["neuron", "spread", "colony", "mesh"], p=[0.38, 0.24, 0.2, 0.18]))
    radius = rng.uniform(0.1, 0.2)
    width = rng.uniform(0.012, 0.03) / view.richness**0.6
    canvas = Canvas(view, 0.0)
    mesh = {
        "neuron": rng.uniform(8, 30),
        "spread": rng.uniform(0, 8),
        "colony": rng.uniform(2, 10),
        "mesh": rng.uniform(25, 50),
    }[style]
    _mesh(rng, canvas, mesh * view.richness**0.7, width)
    bodies = _bodies(rng, style, radius)
    for pose in bodies:
        _processes(rng, canvas, pose, style, width)
    relief = canvas.array() + view.texture("cloud", 0.4, rng.random(2)) * np.float32(
        rng.uniform(0, 0.6) * width * view.scale
    )
    fine = view.texture("bands", rng.uniform(0.03, 0.06) / view.richness**0.5, rng.random(2))
    relief += fine * np.float32(rng.uniform(0.02, 0.2) * width * view.scale)
    soft = _cell_heights(rng, view, bodies, style)
    skin = 1 + np.float32(rng.uniform(0, 0.06)) * fine
    relief = np.maximum(relief, soft * skin)
    if style == "colony":
        _colony(rng, view, relief)
    on = np.clip(relief / np.float32(width * view.scale), -0.5, 2.5)
    material = np.float32(rng.uniform(0.45, 0.9)) + np.float32(rng.uniform(0.1, 0.4)) * on
    return Scene(relief.astype(np.float32), np.maximum(material, 0.15).astype(np.float32), 2.0 * width * view.scale)


def _bodies(rng: np.random.Generator, style: str, radius: float) -> list[Pose]:
    """Cell bodies as (x, y, radius, orientation); the first lies near the middle."""
    count = {"neuron": int(rng.integers(1, 4)), "spread": int(rng.integers(1, 3))}.get(style, 0)
    size = 1.0 if style == "neuron" else 1.7
    bodies = [(*rng.uniform(-0.15, 0.15, 2), radius * size, rng.uniform(0, 6.28))]
    bodies += [
        (*rng.uniform(-REACH, REACH, 2), radius * size * rng.uniform(0.6, 1.1), rng.uniform(0, 6.28)) for _ in range(4)
    ]
    return bodies[:count]


def _mesh(rng: np.random.Generator, canvas: Canvas, count: float, width: float) -> None:
    """Curving filaments with knots, many thin and a few thick."""
    starts = scatter(rng, count)
    thick = width * np.exp(rng.uniform(-0.7, 0.6, len(starts)))
    headings = rng.uniform(0, 6.28) + rng.uniform(0.4, 3.0) * rng.standard_normal(len(starts))
    paths = wander(rng, starts, headings, 0.04, 30, rng.uniform(0.03, 0.16))
    levels = rng.uniform(0, 1.5, len(starts)) * width * canvas.view.scale
    knots = rng.integers(1, 30, len(starts))
    canvas.rods(paths, thick, levels, knots if rng.random() < 0.6 else None)


def _processes(rng: np.random.Generator, canvas: Canvas, pose: Pose, style: str, width: float) -> None:
    """Tapering arms from a cell body; short and many on a spread cell."""
    x, y, radius, _ = pose
    neuron = style == "neuron"
    arms = int(rng.integers(3, 7)) if neuron else int(rng.integers(8, 20))
    headings = 2 * np.pi * (np.arange(arms) + rng.uniform(-0.3, 0.3, arms)) / arms
    starts = np.array([x, y]) + 0.6 * radius * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    paths = wander(rng, starts, headings, radius * (0.2 if neuron else 0.12), 20 if neuron else 8, 0.06)
    thick = radius * rng.uniform(0.3, 0.6, arms) if neuron else width * rng.uniform(0.8, 1.4, arms)
    taper = np.maximum(np.linspace(1, 0, paths.shape[1]) ** 3, 0.12 if neuron else 0.7)
    for path, base in zip(paths, thick, strict=True):
        canvas.tapered(path, np.maximum(base * taper, 0.7 * width), width * canvas.view.scale)


def _cell_heights(rng: np.random.Generator, view: View, bodies: list[Pose], style: str) -> FloatArray:
    """Soft domes over the cell bodies: round for neurons, flat with a raised nucleus for spread cells."""
    u, v = view.grid()
    height = np.full(u.shape, -1e3, np.float32)
    for x, y, radius, turn in bodies:
        dx, dy = u - np.float32(x), v - np.float32(y)
        angle = np.arctan2(dy, dx)
        lobes = sum(
            np.float32(rng.uniform(0, 0.4 / k)) * np.sin(np.float32(k) * angle + np.float32(turn * k))
            for k in (1, 2, 3, 5)
        )
        distance = np.sqrt(dx * dx + dy * dy) / (np.float32(radius) * (1 + lobes))
        dome = np.sqrt(np.maximum(1 - distance * distance, 0))
        if style == "spread":
            dome = np.float32(0.12) * np.sqrt(dome) + np.float32(0.35) * np.exp(-((distance * 2.6) ** 2))
        body = dome * np.float32(radius * view.scale * 0.9)
        height = np.maximum(height, np.where(distance < 1, body, np.float32(-1e3)))
    return height


def _colony(rng: np.random.Generator, view: View, relief: FloatArray) -> None:
    """Rods or cocci in patches, or discs with a dimple."""
    shape = str(rng.choice(["rod", "sphere", "ring"], p=[0.55, 0.2, 0.25]))
    radius = rng.uniform(0.03, 0.055) * (1.7 if shape == "ring" else 1.0)
    grains = [Grain.draw(rng, shape, radius * rng.uniform(0.85, 1.15)) for _ in range(10)]
    centres = scatter(rng, rng.uniform(2, 5))
    centres[0] *= 0.1
    members: npt.NDArray[np.float64] = np.repeat(centres, 9, axis=0)
    members = members + rng.standard_normal(members.shape) * radius * 3.2
    levels = rng.uniform(-0.3, 0.9, len(members)) * radius
    lay(relief, view, grains, members, rng.integers(0, 10, len(members)), levels)
