"""Grains as small height maps, and how they are laid on a surface: Particles and Powder."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emssl_hf.data.scenes.stage import FloatArray, IntArray, Scene, View, scatter

#: Height of "nothing here" in a grain's map.
NOTHING = np.float32(-1e6)
SHAPES = ("sphere", "facet", "disc", "ring", "drop", "blob", "rod", "flake")


@dataclass(frozen=True)
class Grain:
    """One shape: radius in world units, length over width, orientation, and what makes it individual."""

    shape: str
    radius: float
    aspect: float
    turn: float
    traits: npt.NDArray[np.float64]  # (8, 3), unit-uniform

    @classmethod
    def draw(cls, rng: np.random.Generator, shape: str, radius: float) -> "Grain":
        """A random individual of `shape`."""
        aspect = {"rod": 2.2, "drop": 1.35, "disc": 1.05, "ring": 1.0}.get(shape, 1.15)
        return cls(
            shape,
            radius,
            1 + (aspect - 1) * rng.uniform(0.4, 1.6),
            rng.uniform(0, 2 * np.pi),
            rng.random((8, 3)),
        )

    def sprite(self, view: View) -> FloatArray:
        """Height map (2k+1, 2k+1) in pixels above the resting plane, `NOTHING` outside."""
        radius = max(self.radius * view.scale, 1.0)
        half = int(np.ceil(radius * self.aspect)) + 1
        axis = np.arange(-half, half + 1, dtype=np.float32) / np.float32(radius)
        c, s = np.cos(self.turn + view.angle), np.sin(self.turn + view.angle)
        x = np.float32(c) * axis[None, :] + np.float32(s) * axis[:, None]
        y = (np.float32(c) * axis[:, None] - np.float32(s) * axis[None, :]) / np.float32(self.aspect)
        inside, top = self._profile(x, np.asarray(y, np.float32))
        return np.where(inside, top * np.float32(radius), NOTHING).astype(np.float32)

    def _profile(self, x: FloatArray, y: FloatArray) -> tuple[npt.NDArray[np.bool_], FloatArray]:
        """Where the grain is, and its height in radii, over its own axes in radii."""
        if self.shape in ("facet", "flake"):
            return self._polyhedron(x, y)
        q = x * x + y * y
        if self.shape == "rod":
            q = x * x + (np.maximum(np.abs(y) - np.float32(1 - 1 / self.aspect), 0) * np.float32(self.aspect)) ** 2
        elif self.shape == "drop":
            q = (x / (np.float32(0.72) - np.float32(0.28) * y)) ** 2 * np.float32(0.6) + y * y
        elif self.shape == "blob":
            angle = np.arctan2(y, x)
            wobble = sum((0.2 / k) * np.sin(k * angle + 6.28 * self.traits[k, 0]) for k in (2, 3, 5))
            q = q * (1 + wobble)
        if self.shape == "ring":
            hole = np.float32(0.55 + 0.2 * self.traits[0, 0])
            return q < 1, np.asarray(
                0.6 * np.sqrt(np.maximum(1 - ((np.sqrt(q) - hole) / (1 - hole)) ** 2, 0)), np.float32
            )
        dome = np.sqrt(np.maximum(1 - q, 0))
        if self.shape == "disc":
            dome = np.float32(0.35) * np.sqrt(np.sqrt(dome))
        return q < 1, dome

    def _polyhedron(self, x: FloatArray, y: FloatArray) -> tuple[npt.NDArray[np.bool_], FloatArray]:
        """Upper hull of random planes ("facet"), or a thin tilted polygon ("flake")."""
        flat = self.shape == "flake"
        top = np.full(x.shape, 0.25 if flat else 0.9, np.float32)
        if flat:
            top += np.float32(0.5 * (self.traits[7, 0] - 0.5)) * x + np.float32(0.5 * (self.traits[7, 1] - 0.5)) * y
        inside = np.ones(x.shape, bool)
        sides = 4 + int(self.traits[6, 0] * 4)
        for k in range(sides):
            angle = 2 * np.pi * (k + 0.6 * self.traits[k, 0]) / sides
            reach = np.float32(0.72 + 0.25 * self.traits[k, 1])
            out = reach - (np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y)
            inside &= out > 0
            if not flat:
                top = np.minimum(top, out * np.float32(0.6 + 1.8 * self.traits[k, 2]) + np.float32(0.15))
        return inside, top


def stamp(
    relief: FloatArray, labels: IntArray, sprite: FloatArray, x: float, y: float, level: float, number: int
) -> None:
    """Lay `sprite`, centred on pixel (x, y) and raised to `level`, on `relief`; the higher stays in sight."""
    half = sprite.shape[0] // 2
    left, top = int(x) - half, int(y) - half
    rows = slice(max(top, 0), min(top + sprite.shape[0], relief.shape[0]))
    columns = slice(max(left, 0), min(left + sprite.shape[1], relief.shape[1]))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    piece = sprite[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] + np.float32(level)
    ground = relief[rows, columns]
    above = piece > ground
    np.copyto(ground, piece, where=above)
    np.copyto(labels[rows, columns], number, where=above)


def lay(
    relief: FloatArray,
    view: View,
    grains: list[Grain],
    places: npt.NDArray[np.float64],
    kinds: npt.NDArray[np.int64],
    levels: npt.NDArray[np.float64],
) -> IntArray:
    """Stamp grain `kinds[i]` at world point `places[i]`, `levels[i]` units high; (H, W) of i + 1 or 0."""
    labels = np.zeros(relief.shape, np.int32)
    spots = view.points(places)
    margin = max(grain.radius * grain.aspect for grain in grains) * view.scale + 2
    seen = np.all((spots > -margin) & (spots < (view.width + margin, view.height + margin)), axis=1)
    sprites = [grain.sprite(view) for grain in grains]
    for i in np.flatnonzero(seen):
        stamp(relief, labels, sprites[kinds[i]], spots[i, 0], spots[i, 1], levels[i] * view.scale, int(i) + 1)
    return labels


def particles(rng: np.random.Generator, view: View) -> Scene:
    """A few grains, or one cluster, on plain ground."""
    style = rng.choice(["single", "few", "many", "cluster"], p=[0.17, 0.43, 0.2, 0.2])
    shapes = rng.choice(SHAPES, 2, p=[0.32, 0.2, 0.08, 0.08, 0.12, 0.14, 0.03, 0.03])
    low, high = {
        "single": (0.12, 0.3),
        "few": (0.035, 0.12),
        "many": (0.025, 0.05),
        "cluster": (0.025, 0.07),
    }[style]
    radius = low * (high / low) ** rng.random()
    spread = rng.uniform(0.0, 0.35)
    grains = [
        Grain.draw(rng, shapes[int(rng.random() < 0.2)], radius * np.exp(spread * rng.uniform(-1, 1))) for _ in range(6)
    ]
    places, levels = _arrangement(rng, str(style), radius)
    kinds = rng.integers(0, len(grains), len(places))
    ground = view.texture("cloud", rng.uniform(0.3, 2.0), rng.random(2)) * np.float32(
        rng.uniform(0, 0.02) * view.scale * radius * 4
    )
    ground += view.texture("bands", rng.uniform(0.04, 0.1), rng.random(2)) * np.float32(rng.uniform(0.0, 0.12))
    relief = ground.copy()
    labels = lay(relief, view, grains, places, kinds, levels)
    yields = np.exp(rng.uniform(-0.25, 0.25, len(places) + 1) * (rng.random() < 0.4)).astype(np.float32)
    contrast = rng.uniform(1.15, 2.6) if rng.random() < 0.72 else rng.uniform(0.3, 0.75)
    yields[1:] *= np.float32(contrast)
    return Scene(relief, yields[labels], radius * view.scale, labels)


def _arrangement(
    rng: np.random.Generator, style: str, radius: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """World points (N, 2) and levels (N,) of the particles; at least one near the middle of the field."""
    if style == "cluster":
        count = int(rng.integers(6, 45))
        places = rng.standard_normal((count, 2)) * radius * np.sqrt(count) * 0.55 * rng.uniform(0.7, 1.3, 2)
        places += rng.uniform(-0.12, 0.12, 2)
        levels = (
            np.maximum(rng.uniform(-0.3, 1.2, count) - 0.5 * np.hypot(*places.T) / (radius * np.sqrt(count)), -0.4)
            * radius
        )
        strays = scatter(rng, rng.uniform(0, 4))
        return np.concatenate([places, strays]), np.concatenate([levels, np.zeros(len(strays))])
    per_field = {"single": rng.uniform(0.1, 1.2), "few": rng.uniform(3, 11), "many": rng.uniform(10, 40)}[style]
    places = scatter(rng, per_field)
    places[0] *= 0.12
    places = apart(places, 2.1 * radius)
    if rng.random() < 0.35:
        lean = rng.uniform(0, 2 * np.pi, len(places))
        partners = places + 1.9 * radius * np.stack([np.cos(lean), np.sin(lean)], axis=1)
        places = np.concatenate([places, partners[rng.random(len(places)) < 0.4]])
    return places, rng.uniform(-0.5, 0.15) * radius * np.ones(len(places))


def apart(places: npt.NDArray[np.float64], distance: float) -> npt.NDArray[np.float64]:
    """Those places that are not within `distance` of an earlier one."""
    gaps = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1)) < distance
    return places[~np.tril(gaps, -1).any(axis=1)]


def powder(rng: np.random.Generator, view: View) -> Scene:
    """Fine grains everywhere, several layers deep, on rolling ground."""
    across = rng.uniform(6.5, 13) * view.richness
    radius = 0.5 / across
    shape = rng.choice(["sphere", "blob", "facet", "flake", "rod", "ellipsoid"], p=[0.28, 0.26, 0.24, 0.08, 0.05, 0.09])
    spread = rng.uniform(0.1, 0.6)
    sizes = radius * np.exp(np.linspace(-spread, spread, 9))
    grains = [Grain.draw(rng, "sphere" if shape == "ellipsoid" else str(shape), size) for size in sizes]
    places = scatter(rng, across**2 * rng.uniform(1.5, 2.1))
    kinds = rng.integers(0, len(grains), len(places))
    terrain = 0.25 * rng.uniform(0.2, 1.0) * rng.uniform(0.3, 1.0)
    waves = rng.uniform(0, 2 * np.pi, (4, 2))
    pitch = rng.uniform(2.0, 9.0, (4, 2)) * rng.choice([-1, 1], (4, 2))
    hills = np.sin(places @ pitch.T + waves[:, 0]).sum(axis=1) * terrain / 4
    levels = hills + rng.uniform(-2.6, 0.0, len(places)) * radius
    floor = np.abs(view.texture("bands", radius * 2.6, rng.random(2))) * np.float32(radius * view.scale * 1.3)
    floor -= np.float32((0.6 * terrain + 2.8 * radius) * view.scale)
    labels = lay(floor, view, grains, places, kinds, levels)
    tint = (1 + rng.uniform(0, 0.25) * rng.standard_normal(64)).astype(np.float32)
    floor += view.texture("bands", radius * 0.8, rng.random(2)) * np.float32(rng.uniform(0, 0.06) * radius * view.scale)
    material = np.clip(tint, 0.5, 1.6)[labels % 64]
    material[labels == 0] *= np.float32(0.35)
    return Scene(floor, material, 1.6 * radius * view.scale, labels)
