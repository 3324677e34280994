"""Made structures: Patterned_surface and MEMS_devices_and_electrodes."""

import numpy as np
import numpy.typing as npt

from emssl_hf.data.scenes.canvas import Canvas, joined, turned
from emssl_hf.data.scenes.stage import REACH, FloatArray, Scene, View, scatter, smoothstep


def patterned(rng: np.random.Generator, view: View) -> Scene:
    """Lattices of dots, holes, pyramids or lines, over the whole field or in separate blocks."""
    turn = rng.choice([0.0, np.pi / 4, rng.uniform(0, np.pi)], p=[0.5, 0.15, 0.35]) + rng.uniform(-0.04, 0.04)
    pitch = rng.uniform(0.07, 0.2) / view.richness**0.75
    u, v = view.grid(turn)
    motif, period = _motif(rng, u, v, pitch)
    if rng.random() < 0.4:
        motif = _blocks(rng, u, v, motif, pitch)
    rough = view.texture("bands", pitch * rng.uniform(0.3, 0.8), rng.random(2))
    sign = 1.0 if rng.random() < 0.6 else -1.0
    step = np.float32(sign * pitch * view.scale * rng.uniform(0.08, 0.5) * period)
    relief = motif * step + rough * np.float32(rng.uniform(0, 0.012) * pitch * view.scale)
    relief += view.texture("cloud", 1.0, rng.random(2)) * np.float32(rng.uniform(0, 0.15) * pitch * view.scale)
    contrast = np.float32(np.exp(sign * rng.uniform(-0.1, 0.9)))
    material = 1 + (contrast - 1) * motif + np.float32(rng.uniform(0, 0.06)) * rough
    return Scene(relief.astype(np.float32), np.maximum(material, 0.15).astype(np.float32), 0.3 * pitch * view.scale)


def _motif(rng: np.random.Generator, u: FloatArray, v: FloatArray, pitch: float) -> tuple[FloatArray, float]:
    """A lattice motif in [0, 1] per pixel, and a factor on its height."""
    kind = str(
        rng.choice(
            ["dots", "squares", "lines", "rings", "pyramids", "chevrons"],
            p=[0.4, 0.14, 0.24, 0.07, 0.08, 0.07],
        )
    )
    duty = np.float32(rng.uniform(0.22, 0.4))
    soft = np.float32(rng.uniform(0.06, 0.16))
    ratio, hexagonal, missing = rng.uniform(0.8, 1.5), rng.random() < 0.4, rng.random((61, 67))
    gone = rng.choice([0.0, 0.02, 0.12], p=[0.6, 0.25, 0.15])
    wobble = rng.uniform(0, 0.03)
    b = v / np.float32(pitch * (0.866 if hexagonal else ratio))
    if kind in ("lines", "chevrons"):
        bent = (
            np.abs(((u / np.float32(pitch * 3.5)) % 1) - 0.5) * 3.5
            if kind == "chevrons"
            else np.float32(wobble) * np.sin(u * 40)
        )
        across = np.abs(((b + bent) % 1) - 0.5)
        return 1 - smoothstep(across, float(duty - soft * 0.7), float(duty + soft * 0.3)), 0.8
    row = np.floor(b)
    a = u / np.float32(pitch) + (np.float32(0.5) * (row % 2) if hexagonal else 0)
    column = np.floor(a)
    chance = missing[row.astype(np.int32) % 61, column.astype(np.int32) % 67].astype(np.float32)
    x, y = a - column - np.float32(0.5), b - row - np.float32(0.5)
    square = kind in ("squares", "pyramids")
    distance = np.maximum(np.abs(x), np.abs(y)) if square else np.sqrt(x * x + y * y)
    if kind == "rings":
        distance = np.abs(distance - np.float32(0.27)) + np.float32(0.2)
    size = duty * (1 + np.float32(wobble * 3) * (chance - np.float32(0.5)))
    top = np.clip((size - distance) / (np.float32(0.36) if kind == "pyramids" else soft), 0, 1)
    return np.asarray(top * (chance >= gone), np.float32), 1.2


def _blocks(rng: np.random.Generator, u: FloatArray, v: FloatArray, motif: FloatArray, pitch: float) -> FloatArray:
    """Keep the motif inside rectangular blocks that themselves repeat, cut at whole periods."""
    across, down = rng.integers(4, 8), rng.integers(4, 8)
    gap = rng.uniform(1.3, 1.8)
    start = rng.uniform(0, 1, 2)
    x = (u / np.float32(pitch * across * gap) + np.float32(start[0])) % 1
    y = (v / np.float32(pitch * down * gap) + np.float32(start[1])) % 1
    keep = (x < 1 / gap) & (y < 1 / gap)
    if rng.random() < 0.4:
        keep |= (x > 0.5 * (1 + 1 / gap)) & (x < 0.5 * (1 + 1 / gap) + 0.04)
    return np.asarray(motif * keep, np.float32)


def mems(rng: np.random.Generator, view: View) -> Scene:
    """Electrodes: pads fanning out, interdigitated combs, beams over a pit, meanders, Hall crosses."""
    style = str(rng.choice(["fanout", "comb", "beams", "meander", "cross"], p=[0.36, 0.18, 0.16, 0.12, 0.18]))
    turn = rng.choice([0.0, np.pi / 2, np.pi / 4, rng.uniform(0, 2 * np.pi)], p=[0.4, 0.3, 0.08, 0.22]) + rng.uniform(
        -0.05, 0.05
    )
    canvas = Canvas(view, 0.0)
    draw = {"fanout": _fanout, "comb": _comb, "beams": _beams, "meander": _meander, "cross": _cross}[style]
    draw(rng, canvas, float(turn), rng.uniform(0.75, 1.5))
    if rng.random() < 0.5:
        _marks(rng, canvas, float(turn))
    metal = canvas.array()
    height = rng.uniform(0.004, 0.02) if style != "beams" else rng.uniform(0.03, 0.1)
    fine = view.texture("bands", rng.uniform(0.03, 0.05), rng.random(2))
    rough = np.float32(rng.uniform(0, 0.1)) * np.clip(metal, 0, 1) + np.float32(rng.uniform(0, 0.04))
    relief = metal * np.float32(height * view.scale) + fine * rough
    contrast = rng.uniform(1.3, 3.0) if rng.random() < 0.7 else rng.uniform(0.3, 0.75)
    material = (
        1
        + np.float32(contrast - 1) * metal
        + np.float32(rng.uniform(0, 0.05)) * view.texture("cloud", 0.7, rng.random(2))
    )
    return Scene(relief.astype(np.float32), np.maximum(material, 0.12).astype(np.float32), height * view.scale * 1.5)


def _fanout(rng: np.random.Generator, canvas: Canvas, turn: float, size: float) -> None:
    """Pads on two to four sides, each led by a bent trace to the middle."""
    pads, sides = int(rng.integers(2, 6)), rng.permutation(4)[: int(rng.integers(2, 5))]
    inner, gap = 0.26 * size, rng.uniform(0.03, 0.1) * size
    pitch = 2 * inner / pads
    wide, thin = pitch * rng.uniform(0.45, 0.7), rng.uniform(0.015, 0.035)
    bent = rng.random() < 0.6
    for side in sides:
        angle = turn + side * np.pi / 2
        for k in range(pads):
            y = (k - (pads - 1) / 2) * pitch
            far = y * (2.2 if bent else 1.0)
            pad = [[inner, y - wide / 2], [inner + abs(far - y), far - wide / 2], [2.0, far - wide / 2]]
            pad += [[2.0, far + wide / 2], [inner + abs(far - y), far + wide / 2], [inner, y + wide / 2]]
            canvas.polygon(turned(np.array(pad), angle), 1.0)
            end = [gap, y * gap / inner]
            canvas.stroke(turned(np.array([[inner, y], [0.6 * inner, y * 0.6], end]), angle), thin, 1.0)


def _comb(rng: np.random.Generator, canvas: Canvas, turn: float, size: float) -> None:
    """Two rails with fingers that reach between each other, and their leads."""
    fingers = int(rng.integers(5, 11))
    half, length = 0.32 * size, rng.uniform(0.35, 0.6) * size
    pitch = 2 * half / fingers
    width, rail = pitch * rng.uniform(0.35, 0.6), rng.uniform(0.05, 0.14) * size
    overlap = rng.uniform(0.6, 0.9) * length
    for k in range(fingers):
        sign = 1 if k % 2 else -1
        x = (k - (fingers - 1) / 2) * pitch
        canvas.box(x, sign * (length - overlap) / 2, width, length, 1.0, turn)
    edge = length - overlap / 2
    for sign in (-1, 1):
        canvas.box(0, sign * (edge + rail / 2), 2 * half, rail, 1.0, turn)
        lead = sign * rng.uniform(-0.6, 0.6) * half
        canvas.box(lead, sign * (edge + 1.0), rng.uniform(0.06, 0.25), 2.0, 1.0, turn)


def _beams(rng: np.random.Generator, canvas: Canvas, turn: float, size: float) -> None:
    """A frame with cantilevers or bridges over an etched pit."""
    half_x, half_y = rng.uniform(0.3, 0.45) * size, rng.uniform(0.2, 0.4) * size
    canvas.box(0, 0, 4, 4, 1.0, turn)
    canvas.box(0, 0, 2 * half_x, 2 * half_y, rng.uniform(-0.5, 0.1), turn)
    count, bridge = int(rng.integers(1, 5)), rng.random() < 0.4
    pitch = 2 * half_x / count
    for k in range(count):
        x, reach = (k - (count - 1) / 2) * pitch, 2 * half_y * (1.0 if bridge else rng.uniform(0.5, 0.9))
        width = pitch * rng.uniform(0.2, 0.5)
        canvas.box(x, -half_y + reach / 2, width, reach + 0.02, 1.1, turn)
        if not bridge and rng.random() < 0.4:
            canvas.box(x, -half_y + reach, width * 1.7, width * 1.2, 1.1, turn)


def _meander(rng: np.random.Generator, canvas: Canvas, turn: float, size: float) -> None:
    """A serpentine heater line between two pads."""
    folds = int(rng.integers(4, 9))
    half, tall = 0.33 * size, rng.uniform(0.15, 0.3) * size
    x = np.repeat(np.linspace(-half, half, folds + 1), 2)
    y = tall * np.where((np.arange(len(x)) // 2 + np.arange(len(x))) % 2 == 0, 1, -1)
    width = 2 * half / folds * rng.uniform(0.3, 0.55)
    path = joined([[-2.0, y[0]]], np.stack([x, y], axis=1).tolist(), [[2.0, y[-1]]])
    canvas.stroke(turned(path, turn), width, 1.0)
    pad = rng.uniform(0.15, 0.35) * size
    for sign, level in ((-1, y[0]), (1, y[-1])):
        canvas.box(sign * (half + 0.12 + pad / 2), level, pad, pad, 1.0, turn)


def _cross(rng: np.random.Generator, canvas: Canvas, turn: float, size: float) -> None:
    """A Hall bar: a channel with pairs of side arms, each ending in a wide contact."""
    width = rng.uniform(0.03, 0.09) * size
    arms = int(rng.integers(1, 4))
    canvas.box(0, 0, 0.7 * size, width, 1.0, turn)
    for sign in (-1, 1):
        canvas.box(sign * (0.33 * size + 0.5), 0, 1.0, rng.uniform(0.15, 0.4) * size, 1.0, turn)
        for k in range(arms):
            x = (k - (arms - 1) / 2) * 0.24 * size
            reach, wide = rng.uniform(0.16, 0.24) * size, rng.uniform(0.1, 0.19) * size
            canvas.box(x, sign * reach / 2, width * 0.7, reach, 1.0, turn)
            canvas.box(x * 1.15, sign * (reach + 0.5), wide, 1.0, 1.0, turn)


def _marks(rng: np.random.Generator, canvas: Canvas, turn: float) -> None:
    """Alignment crosses and small squares here and there."""
    places: npt.NDArray[np.float64] = scatter(rng, 3.0)
    sizes = rng.uniform(0.03, 0.07, len(places))
    for (x, y), size in zip(places * (0.9 / REACH), sizes, strict=True):
        canvas.box(x, y, size, size * 0.25, 1.0, turn)
        canvas.box(x, y, size * 0.25, size, 1.0, turn)
