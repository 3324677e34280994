"""Drawing flat shapes and strokes into a height map, supersampled against jagged edges."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from emssl_hf.data.scenes.stage import FloatArray, View

Points = npt.NDArray[np.float64]


class Canvas:
    """A float image over a view on which later shapes cover earlier ones; all coordinates are the world's."""

    def __init__(self, view: View, ground: float = 0.0) -> None:
        """`ground` is the value where nothing is drawn."""
        self.view = view
        self.factor = 4 if view.pixels <= 96 else 2
        self.image = Image.new("F", (view.width * self.factor, view.height * self.factor), ground)
        self.pen = ImageDraw.Draw(self.image)

    def _flat(self, points: npt.ArrayLike) -> list[float]:
        return (self.view.points(points) * self.factor).ravel().tolist()

    def polygon(self, points: npt.ArrayLike, value: float) -> None:
        """Fill the polygon with the corners (N, 2)."""
        self.pen.polygon(self._flat(points), fill=value)

    def box(self, x: float, y: float, width: float, height: float, value: float, turn: float = 0.0) -> None:
        """Fill a rectangle centred on (x, y), then turned about the origin."""
        w, h = width / 2, height / 2
        corners = np.array([[x - w, y - h], [x + w, y - h], [x + w, y + h], [x - w, y + h]])
        self.polygon(turned(corners, turn), value)

    def stroke(self, points: npt.ArrayLike, width: float, value: float) -> None:
        """Draw a polyline (N, 2) of the given width."""
        self._line(self._flat(points), width * self.view.scale * self.factor, value)

    def rods(self, paths: Points, widths: Points, levels: Points, beads: npt.ArrayLike | None = None) -> None:
        """Draw round wires (N, P, 2), their axes `levels` pixels high, with beads at the points `beads`."""
        points = self.view.points(paths.reshape(-1, 2)).reshape(paths.shape) * self.factor
        pixels = widths * self.view.scale
        margin = pixels[:, None] * self.factor
        seen = np.all(points.max(axis=1) > -margin, axis=1) & np.all(
            points.min(axis=1) < self.image.size + margin, axis=1
        )
        at = np.asarray(beads) if beads is not None else None
        for i in np.flatnonzero(seen):
            self._rod(points[i].ravel().tolist(), float(pixels[i]), float(levels[i]))
            if at is not None:
                self._bead(points[i, at[i]], float(pixels[i]), float(levels[i]))

    def tapered(self, path: Points, widths: Points, level: float) -> None:
        """Draw a round arm along one path (P, 2) whose width changes, given at each point."""
        ahead = np.gradient(path, axis=0)
        side = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1) / (np.hypot(*ahead.T)[:, None] + 1e-9)
        for part, height in ((1.0, 0.0), (0.9, 0.43), (0.75, 0.66), (0.55, 0.84), (0.3, 0.95)):
            out = side * (0.5 * part * widths)[:, None]
            value = level + 0.5 * float(widths.mean()) * self.view.scale * height
            self.polygon(np.concatenate([path + out, (path - out)[::-1]]), value)

    def _rod(self, flat: list[float], pixels: float, level: float) -> None:
        """A wire of the given width in pixels, as strokes of falling width."""
        layers = ((1.0, 0.0), (0.86, 0.5), (0.6, 0.8), (0.28, 0.97))
        for part, height in layers if pixels > 5 else layers[::2]:
            self._line(flat, pixels * part * self.factor, level + 0.5 * pixels * height)

    def _bead(self, point: Points, pixels: float, level: float) -> None:
        for part, height in ((0.85, 0.6), (0.5, 0.85)):
            x, y, r = float(point[0]), float(point[1]), part * pixels * self.factor
            self.pen.ellipse([x - r, y - r, x + r, y + r], fill=level + pixels * height)

    def _line(self, flat: list[float], pixels: float, value: float) -> None:
        self.pen.line(flat, fill=value, width=max(round(pixels), 1))

    def array(self) -> FloatArray:
        """The height map (H, W)."""
        return np.asarray(self.image.reduce(self.factor), dtype=np.float32).copy()


def turned(points: npt.ArrayLike, angle: float) -> Points:
    """World points turned about the origin."""
    c, s = np.cos(angle), np.sin(angle)
    return np.asarray(points, dtype=np.float64) @ np.array([[c, s], [-s, c]])


def wander(rng: np.random.Generator, starts: Points, headings: Points, step: float, count: int, bend: float) -> Points:
    """Smoothly wandering paths (N, count + 1, 2): headings change by a slow random walk."""
    kicks = rng.standard_normal((2, len(starts), count)) * bend
    turning = headings[:, None] + np.cumsum(0.35 * np.cumsum(kicks[0], axis=1) + 0.5 * kicks[1], axis=1)
    paths = np.empty((len(starts), count + 1, 2))
    paths[:, 0] = starts
    paths[:, 1:, 0] = starts[:, :1] + step * np.cumsum(np.cos(turning), axis=1)
    paths[:, 1:, 1] = starts[:, 1:] + step * np.cumsum(np.sin(turning), axis=1)
    return paths


def joined(*pieces: Sequence[Sequence[float]]) -> Points:
    """Several lists of points as one polyline."""
    return np.concatenate([np.asarray(piece, dtype=np.float64) for piece in pieces])
