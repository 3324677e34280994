"""Long things: Nanowires, Fibres and Tips."""

import numpy as np
import numpy.typing as npt

from emssl_hf.data.scenes.canvas import Canvas
from emssl_hf.data.scenes.grains import Grain, lay
from emssl_hf.data.scenes.stage import FloatArray, Scene, View, scatter


def nanowires(rng: np.random.Generator, view: View) -> Scene:
    """Many thin wires: strewn, combed, standing seen from the side, or curling."""
    style = rng.choice(["strewn", "combed", "standing", "curling"], p=[0.32, 0.36, 0.2, 0.12])
    width = rng.uniform(0.016, 0.04) / view.richness**0.6
    length = rng.uniform(0.35, 1.3)
    per_field = int(np.clip(rng.uniform(0.25, 1.1) / (width * length), 10, 150))
    starts = scatter(rng, per_field)
    count = len(starts)
    main = rng.uniform(0, np.pi) if style != "standing" else np.pi / 2 + rng.uniform(-0.35, 0.35)
    spread = {
        "strewn": 3.0,
        "combed": rng.uniform(0.05, 0.35),
        "standing": rng.uniform(0.03, 0.2),
        "curling": 1.2,
    }[str(style)]
    headings = main + spread * rng.standard_normal(count)
    lengths = length * np.exp(rng.uniform(-0.6, 0.3, count))
    widths = width * np.exp(rng.uniform(-0.35, 0.35, count))
    along = np.stack([np.cos(headings), np.sin(headings)], axis=1) * lengths[:, None] / 2
    curl = rng.uniform(-1, 1, count) * (rng.uniform(0.1, 0.5) if style == "curling" else rng.uniform(0, 0.02))
    middle = starts + curl[:, None] * along[:, ::-1] * (-1, 1)
    t = np.linspace(0, 1, 9 if style == "curling" else 3)[:, None]
    paths = (
        (1 - t) ** 2 * (starts - along)[:, None] + 2 * t * (1 - t) * middle[:, None] + t * t * (starts + along)[:, None]
    )
    if style == "standing":
        paths = paths[np.argsort(starts[:, 1])]
    ends = np.full(count, -1) if rng.random() < 0.3 else None
    floor = -rng.uniform(1.0, 5.0) * width * view.scale
    rise = np.linspace(0.0, 6.0, count) * width * view.scale
    canvas = Canvas(view, floor)
    canvas.rods(paths, widths, rise, ends)
    return _wire_scene(rng, view, canvas.array(), floor, rise[-1], width)


def _wire_scene(
    rng: np.random.Generator, view: View, relief: FloatArray, floor: float, top: float, width: float
) -> Scene:
    """Wires are brighter the higher they lie; the ground is dark, and rough now and then."""
    height = np.clip((relief - floor) / (top - floor + 1e-3), 0, 1)
    on_wire = np.clip((relief - floor) / np.float32(0.25 * width * view.scale + 0.05), 0, 1)
    ground = np.float32(rng.uniform(0.25, 0.75))
    fall = np.float32(rng.uniform(0.2, 0.6))
    material = ground * (1 - on_wire) + on_wire * (1 - fall + fall * height)
    rough = view.texture("bands", rng.uniform(0.03, 0.08), rng.random(2)) * (1 - on_wire)
    material = material * (1 + np.float32(rng.uniform(0, 0.12)) * rough)
    return Scene(relief, material.astype(np.float32), 2.5 * width * view.scale)


def fibres(rng: np.random.Generator, view: View) -> Scene:
    """Thick cylinders: a bundle, a few that cross, a bent strand, or one wide fibre alone."""
    style = rng.choice(["bundle", "crossing", "single"], p=[0.5, 0.33, 0.17])
    count = {
        "bundle": int(rng.integers(5, 10)),
        "crossing": int(rng.integers(3, 7)),
        "single": int(rng.integers(1, 3)),
    }[str(style)]
    radius = {
        "bundle": rng.uniform(0.06, 0.16),
        "crossing": rng.uniform(0.035, 0.1),
        "single": rng.uniform(0.18, 0.36),
    }[str(style)]
    main = rng.uniform(0, np.pi)
    spread = {"bundle": rng.uniform(0.0, 0.12), "crossing": 1.5, "single": 0.15}[str(style)]
    relief = np.full((view.height, view.width), -rng.uniform(1.2, 3) * radius * view.scale, np.float32)
    hills = np.float32(rng.uniform(0, 0.12) * radius * view.scale)
    relief += view.texture("cloud", 0.8, rng.random(2)) * hills
    owner = np.zeros(relief.shape, np.int32)
    bow, phase = rng.uniform(0, 0.3) * (style == "bundle") + rng.uniform(0, 0.05), rng.uniform(0, 6.28)
    pitch = radius * rng.uniform(1.7, 2.3)
    offsets = (np.arange(count) - (count - 1) / 2) * pitch + rng.uniform(-0.4, 0.4, count) * radius
    skin = _skin(rng, view, main) * np.float32(radius * view.scale)
    for i in range(count):
        bend = (bow * rng.uniform(0.85, 1.15), phase + rng.uniform(-0.15, 0.15))
        size = radius * np.exp(rng.uniform(-0.3, 0.3))
        shift = offsets[i] if style != "crossing" else rng.uniform(-0.4, 0.4)
        course = (main + spread * rng.standard_normal(), shift, size, *bend)
        _cylinder(relief, owner, view, course, skin, i + 1, rng.uniform(-1.2, 0.4))
    tints = (1 + rng.uniform(-0.18, 0.18, count + 1)).astype(np.float32)
    tints[0] = rng.uniform(0.15, 0.8)
    _debris(rng, view, relief, radius)
    return Scene(relief, tints[owner], radius * view.scale)


def _skin(rng: np.random.Generator, view: View, along: float) -> FloatArray:
    """Streaks and pits of a fibre's surface, in fibre radii."""
    fine, long = rng.uniform(0.025, 0.07), rng.uniform(4, 9)
    streaks = view.texture("bands", fine, rng.random(2), stretch=long, turn=along)
    pits = view.texture("bands", rng.uniform(0.03, 0.1), rng.random(2))
    return streaks * np.float32(rng.uniform(0, 0.05)) + pits * np.float32(rng.uniform(0, 0.025))


def _cylinder(
    relief: FloatArray,
    owner: npt.NDArray[np.int32],
    view: View,
    course: tuple[float, float, float, float, float],
    skin: FloatArray,
    number: int,
    level: float,
) -> None:
    """Lay a bent cylinder; `course` is its heading, offset, radius, bow and the bow's phase."""
    heading, offset, radius, bow, phase = course
    u, v = view.grid(heading)
    axis = np.float32(offset) + np.float32(bow) * np.sin(np.float32(2.6) * u + np.float32(phase))
    across = (v - axis) / np.float32(radius)
    height = np.sqrt(np.maximum(1 - across * across, 0)) * np.float32(radius * view.scale) + skin
    height += np.float32(level * radius * view.scale)
    cover = np.clip((1 - np.abs(across)) * np.float32(radius * view.scale) + np.float32(0.5), 0, 1)
    cover *= height > relief
    np.copyto(owner, number, where=cover > 0.5)
    relief += cover * (height - relief)


def _debris(rng: np.random.Generator, view: View, relief: FloatArray, radius: float) -> None:
    """Specks that stick to the fibres."""
    places = scatter(rng, rng.choice([0.0, 4.0, 14.0]))
    grains = [Grain.draw(rng, "blob", rng.uniform(0.008, 0.03)) for _ in range(4)]
    kinds = rng.integers(0, 4, len(places))
    if len(places) < 2:
        return
    spots = view.points(places).astype(int)
    inside = np.all((spots >= 0) & (spots < (view.width, view.height)), axis=1)
    levels = relief[spots[inside, 1], spots[inside, 0]] / view.scale
    lay(relief, view, grains, places[inside], kinds[inside], levels)


def tips(rng: np.random.Generator, view: View) -> Scene:
    """One needle or cone from the edge towards the middle, or a pyramid on a lever."""
    style = str(rng.choice(["needle", "cone", "pyramid"], p=[0.45, 0.35, 0.2]))
    heading = rng.uniform(0, 2 * np.pi)
    apex = rng.uniform(-0.16, 0.16, 2)
    ground = np.full((view.height, view.width), 1.0, np.float32)
    ground += np.float32(rng.uniform(0, 0.05)) * view.texture("cloud", 1.0, rng.random(2))
    u, v = _about(view, apex, heading)
    if style == "pyramid":
        return _pyramid(rng, view, u, v, ground)
    girth = _girth(rng, view, u, style == "needle")
    facet = rng.random() < 0.25
    body = girth - np.abs(v) if facet else np.sqrt(np.maximum(girth * girth - v * v, 0))
    spot, fine, long = rng.random(2), rng.uniform(0.03, 0.1), rng.uniform(1, 3)
    rough = view.texture("bands", fine, spot, stretch=long, turn=heading)
    body += rough * girth * np.float32(rng.uniform(0, 0.06))
    drop = np.float32(rng.uniform(0.05, 0.25))
    cover = np.clip((girth - np.abs(v)) * np.float32(view.scale) + np.float32(0.5), 0, 1) * (girth > 0)
    relief = (cover * (body + drop) - drop) * np.float32(view.scale)
    contrast = rng.uniform(1.2, 2.4) if rng.random() < 0.75 else rng.uniform(0.35, 0.8)
    skin = np.float32(contrast) * (1 + np.float32(rng.uniform(0, 0.15)) * rough)
    material = ground + cover * (skin - ground)
    return Scene(relief.astype(np.float32), material.astype(np.float32), 0.3 * view.scale)


def _girth(rng: np.random.Generator, view: View, u: FloatArray, needle: bool) -> FloatArray:
    """Half width of a tip at the distance `u` from its apex, in world units; 0 before the apex."""
    angle = rng.uniform(0.06, 0.22) if needle else rng.uniform(0.22, 0.75)
    power = rng.uniform(0.75, 1.15) if needle else rng.uniform(0.85, 1.0)
    blunt, shank = rng.uniform(0.004, 0.04), rng.uniform(0.1, 0.45)
    length = np.maximum(u + np.float32(blunt), 0)
    taper = np.minimum(np.float32(np.tan(angle)) * length ** np.float32(power), np.float32(shank))
    bulge = np.float32(2 * blunt) * np.minimum(length, np.float32(blunt))
    ragged = view.texture("bands", rng.uniform(0.06, 0.2), rng.random(2)) * np.float32(rng.uniform(0.0, 0.08))
    return np.asarray(np.sqrt(taper * taper + bulge) * (1 + ragged), dtype=np.float32)


def _about(view: View, apex: npt.NDArray[np.float64], heading: float) -> tuple[FloatArray, FloatArray]:
    """Distance from the apex along the axis (growing into the body) and across it, in world units."""
    u, v = view.grid(heading)
    c, s = np.cos(heading), np.sin(heading)
    return u - np.float32(c * apex[0] + s * apex[1]), v - np.float32(-s * apex[0] + c * apex[1])


def _pyramid(rng: np.random.Generator, view: View, u: FloatArray, v: FloatArray, ground: FloatArray) -> Scene:
    """A probe's pyramid near the end of its lever, seen from above or aslant."""
    base = rng.uniform(0.2, 0.42)
    lean = rng.uniform(-0.35, 0.35)
    sharp = rng.uniform(0.8, 2.2)
    square = (
        np.maximum(np.abs(u) * np.float32(1 + lean * 0.6), np.abs(v))
        if rng.random() < 0.6
        else np.maximum(np.abs(v) * np.float32(1.2) - u * np.float32(0.6), u)
    )
    body = np.maximum(base - square, 0) * np.float32(sharp)
    overhang = rng.uniform(1.1, 2.2) * base
    half_width = base * rng.uniform(1.15, 2.4)
    on_lever = (u > -overhang) & (
        np.abs(v) < half_width + np.float32(0.4) * np.minimum(u + np.float32(overhang) - np.float32(0.2), 0)
    )
    lever = np.where(on_lever, np.float32(0.08), np.float32(-0.1))
    relief = (np.where(on_lever, body, 0) + lever) * np.float32(view.scale)
    relief += view.texture("bands", 0.06, rng.random(2)) * np.float32(rng.uniform(0, 0.15))
    contrast = rng.uniform(1.2, 2.0) if rng.random() < 0.7 else rng.uniform(0.4, 0.8)
    apex = np.exp(-(u * u + v * v) / np.float32((0.05 * base) ** 2 + (0.5 / view.scale) ** 2))
    material = np.where(on_lever, np.float32(contrast), ground) + apex * np.float32(rng.uniform(0.2, 1.0))
    return Scene(relief.astype(np.float32), material.astype(np.float32), 0.3 * view.scale)
