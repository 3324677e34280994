"""SynthSEM against what it promises: reproducible images, whole specimens, true boxes, scales and masks."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier

from emssl_hf.data import synthsem as module
from emssl_hf.data.nffa import CLASS_COUNTS, CLASS_NAMES
from emssl_hf.data.scenes import SCENES
from emssl_hf.data.scenes.databar import draw_bar, length_text, scale_length
from emssl_hf.data.scenes.stage import View
from emssl_hf.data.synthsem import SynthSEM, contact_sheet, place, render, split_specimens, synthsem
from emssl_hf.errors import EmsslError

PARTICLES, POWDER = CLASS_NAMES.index("Particles"), CLASS_NAMES.index("Powder")


@pytest.fixture(scope="module")
def gallery() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1,500 balanced images at 48 pixels: images, labels, and whether each belongs to a test specimen."""
    shots = [render(i, size=48) for i in range(1500)]
    specimens = sorted({shot.specimen for shot in shots})
    chosen = set(np.random.default_rng(0).choice(specimens, len(specimens) // 4, replace=False).tolist())
    images = np.stack([shot.array for shot in shots])
    return images, np.array([s.label for s in shots]), np.array([s.specimen in chosen for s in shots])


def test_an_image_depends_on_seed_and_index_only() -> None:
    forward = {i: render(i, size=48).array for i in range(40)}
    for i in reversed(range(40)):
        np.testing.assert_array_equal(render(i, size=48).array, forward[i])
    assert len({image.tobytes() for image in forward.values()}) == 40
    assert not np.array_equal(render(3, size=48, seed=1).array, forward[3])


@pytest.mark.parametrize("size", [48, 131, (48, 96), (200, 150)])
def test_sizes(size: int | tuple[int, int]) -> None:
    shape = (size, size) if isinstance(size, int) else size
    for index in range(10):
        shot = render(index, size=size, masks=True)
        assert shot.array.shape == shape and shot.array.dtype == np.uint8
        assert shot.mask is not None and shot.mask.shape == shape
        assert shot.array.std() > 4


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_the_stage_moves_and_the_specimen_stays(name: str) -> None:
    for specimen in range(6):
        still = SCENES[name](np.random.default_rng(specimen), View(128, 128))
        moved = SCENES[name](np.random.default_rng(specimen), View(128, 128, shift=(0.125, 0.0625)))
        a, b = still.relief[8:, 16:], moved.relief[:-8, :-16]
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98
        inner, outer = still.material[8:, 16:], moved.material[:-8, :-16]
        assert np.abs(inner - outer).mean() < 0.02 * np.abs(inner).mean() + 0.05 * inner.std()


def test_balanced_and_nffa_counts() -> None:
    balanced = Counter(place(i).label for i in range(3000))
    assert set(balanced.values()) == {300}
    labels = [place(i, imbalance="nffa").label for i in range(21169)]
    assert Counter(labels) == dict(enumerate(CLASS_COUNTS.values()))
    early = Counter(labels[:2000])
    for label, count in enumerate(CLASS_COUNTS.values()):
        assert abs(early[label] - 2000 * count / 21169) <= 1


def test_series_are_three_to_six_images_long_with_singles() -> None:
    lengths = Counter(Counter(place(i) for i in range(6400)).values())
    total = sum(lengths.values())
    assert 3 <= 6400 / total <= 6
    assert lengths[1] > 0.1 * total and max(lengths) <= 8


@pytest.mark.parametrize("imbalance", ["balanced", "nffa"])
def test_splits_keep_specimens_whole(imbalance: module.Imbalance) -> None:
    places = [place(i, imbalance=imbalance) for i in range(3000)]
    parts = split_specimens(places, seed=0)
    assert sorted(i for indices in parts.values() for i in indices) == list(range(3000))
    homes: dict[module.Place, set[str]] = {}
    for split, indices in parts.items():
        for i in indices:
            homes.setdefault(places[i], set()).add(split)
    assert all(len(splits) == 1 for splits in homes.values())
    for split, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        counts = Counter(places[i].label for i in parts[split])
        assert len(counts) == 10
        for label, count in Counter(spot.label for spot in places).items():
            assert abs(counts[label] - share * count) <= 8


def test_the_data_bar_is_where_its_box_says_and_changes_nothing_else() -> None:
    found = 0
    for index in range(60):
        shot, bare = render(index, size=96), render(index, size=96, databar=False)
        assert bare.databar is None
        changed = shot.array != bare.array
        if shot.databar is None:
            assert not changed.any()
            continue
        found += 1
        top, left, bottom, right = shot.databar
        assert (left, right) == (0, 96) and 0.78 * 96 <= top < bottom <= 0.97 * 96
        assert shot.array[top:bottom].mean() > 190
        assert not changed[:top].any() and not changed[bottom:].any()
    assert 15 < found < 55


def test_bars_are_common_on_tips_and_rare_on_films() -> None:
    def rate(name: str) -> float:
        label = CLASS_NAMES.index(name)
        return float(np.mean([render(10 * k + label, size=32).databar is not None for k in range(60)]))

    assert rate("Tips") > 0.6 > 0.4 > rate("Films_Coated_Surface")


@pytest.mark.parametrize("pixel_size", [3.1e-10, 2.4e-8, 7.7e-7])
def test_the_scale_bar_is_as_long_as_it_says(pixel_size: float) -> None:
    bar = draw_bar(np.random.default_rng(0), 1024, 58, pixel_size)
    line = np.flatnonzero(bar[37, 10:220] < 128)
    length = (line[-1] - line[0]) * pixel_size
    assert length == pytest.approx(scale_length(1024 * pixel_size), rel=0.04)


def test_round_lengths() -> None:
    assert scale_length(1e-5) == pytest.approx(1e-6)
    assert scale_length(4.3e-6) == pytest.approx(5e-7)
    texts = [length_text(length) for length in (2e-6, 5e-7, 1e-3, 5e-10)]
    assert texts == ["2 µm", "500 nm", "1 mm", "0.5 nm"]


def test_masks_number_the_grains_and_leave_the_pixels_alone() -> None:
    for index in range(40):
        shot = render(index, size=96, masks=True)
        np.testing.assert_array_equal(shot.array, render(index, size=96).array)
        assert shot.mask is not None and shot.mask.dtype == np.uint16
        counted = len(np.unique(shot.mask)) - (0 in shot.mask)
        if shot.label not in (PARTICLES, POWDER):
            assert counted == 0
        else:
            assert counted >= (20 if shot.label == POWDER else 1)
        if shot.databar is not None:
            assert not shot.mask[shot.databar[0] : shot.databar[2]].any()


def test_particles_stand_out_from_the_ground_where_the_mask_says() -> None:
    gaps = []
    for k in range(40):
        shot = render(10 * k + PARTICLES, size=96, masks=True, databar=False)
        assert shot.mask is not None
        on = shot.mask > 0
        inside, outside = shot.array[on].astype(float), shot.array[~on].astype(float)
        gaps.append(abs(inside.mean() - outside.mean()) / shot.array.std())
    assert np.median(gaps) > 1.0


def test_a_grain_keeps_its_number_and_its_metric_size_within_a_series() -> None:
    """Grey levels know nothing of `pixel_size`; the masks of two views of one specimen check it."""
    ratios = []
    for first in range(PARTICLES, 600, 10):
        a, b = (render(i, size=192, masks=True, databar=False) for i in (first, first + 10))
        if a.specimen == b.specimen:
            sizes = [_metric_areas(shot) for shot in (a, b)]
            ratios += [sizes[0][n] / sizes[1][n] for n in sizes[0].keys() & sizes[1].keys()]
    assert len(ratios) > 50
    assert np.median(np.abs(np.log(ratios))) < 0.08


def _metric_areas(shot: module.SynthMicrograph) -> dict[int, float]:
    """Area in square metres of each grain of 150 pixels or more that does not touch the image's edge."""
    assert shot.mask is not None
    edge = np.concatenate([shot.mask[0], shot.mask[-1], shot.mask[:, 0], shot.mask[:, -1]])
    counts = Counter(shot.mask[shot.mask > 0].tolist())
    return {n: c * shot.pixel_size**2 for n, c in counts.items() if n not in edge and c >= 150}


def test_pixels_alone_do_not_tell_the_class(gallery: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    images, labels, test = gallery
    flat = images.reshape(len(images), -1).astype(np.float32)
    for k in (1, 5):
        score = KNeighborsClassifier(k).fit(flat[~test], labels[~test]).score(flat[test], labels[test])
        assert score < 0.3


def test_statistics_tell_little_and_structure_tells_more(
    gallery: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    images, labels, test = gallery
    shades = np.array([[*np.histogram(x, 16, (0, 256))[0], x.mean(), x.std()] for x in images])
    spectra = np.array([_spectrum(x) for x in images])
    scores = []
    for features in (shades, spectra):
        forest = RandomForestClassifier(100, random_state=0).fit(features[~test], labels[~test])
        scores.append(forest.score(features[test], labels[test]))
    assert scores[0] < 0.45
    assert scores[1] > max(0.3, scores[0] + 0.03)


def _spectrum(image: np.ndarray) -> np.ndarray:
    """Logarithm of the radially averaged power of the rows above any bar."""
    part = image[:38].astype(np.float64)
    power = np.abs(np.fft.fft2((part - part.mean()) / part.std())) ** 2
    radius = np.hypot(np.fft.fftfreq(38)[:, None], np.fft.fftfreq(48)[None, :])
    rings = np.linspace(0.0, 0.6, 13)
    return np.array([np.log(power[(radius >= a) & (radius < b)].mean()) for a, b in pairwise(rings)])


def test_images_of_one_class_differ(gallery: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    images, labels, _ = gallery
    for label in range(10):
        own = images[labels == label].reshape(-1, 48 * 48).astype(np.float32)
        own = (own - own.mean(1, keepdims=True)) / own.std(1, keepdims=True)
        likeness = own @ own.T / own.shape[1]
        assert np.median(likeness[np.triu_indices(len(own), 1)]) < 0.5


def test_the_dataset_does_not_depend_on_the_processes(tmp_path: Path) -> None:
    one = synthsem(images=240, size=48, masks=True, num_proc=1, cache_dir=tmp_path / "one")
    two = synthsem(images=240, size=48, masks=True, num_proc=2, cache_dir=tmp_path / "two")
    assert list(one) == ["train", "validation", "test"]
    assert sum(len(part) for part in one.values()) == 240
    for split in one:
        assert one[split]["id"][:] == two[split]["id"][:]
    groups = [set(part["group"][:]) for part in one.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    longer = synthsem(images=300, size=48, num_proc=1, cache_dir=tmp_path / "longer")
    ids = {key for part in longer.values() for key in part["id"][:]}
    assert {key for part in one.values() for key in part["id"][:]} <= ids


def test_columns_of_the_dataset(tmp_path: Path) -> None:
    builder = SynthSEM(images=120, size=64, masks=True, cache_dir=str(tmp_path))
    builder.download_and_prepare()
    part = builder.as_dataset()["train"]
    assert part.features["label"].names == list(CLASS_NAMES)
    for row in part:
        assert isinstance(row["image"], Image.Image) and row["image"].mode == "L"
        assert row["image"].size == (row["width"], row["height"]) == (64, 64)
        assert 1e-10 < row["pixel_size"] < 1e-4
        assert row["group"].startswith(CLASS_NAMES[row["label"]])
        assert np.asarray(row["mask"]).dtype == np.uint16
    shot = render(0, size=64)
    ids = {key for split in builder.as_dataset().values() for key in split["id"][:]}
    assert module.content_id(shot.array) in ids and len(ids) == 120


def test_a_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = synthsem(images=100, size=32, cache_dir=tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(module, "render", refuse)
    again = synthsem(images=100, size=32, cache_dir=tmp_path)
    assert again["test"]["id"][:] == first["test"]["id"][:]


def test_the_cache_knows_every_setting_and_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [{}, {"seed": 1}, {"size": 48}, {"imbalance": "nffa"}, {"masks": True}, {"databar": False}]
    folders = {SynthSEM(images=100, cache_dir=str(tmp_path), **change).cache_dir for change in changes}
    assert len(folders) == len(changes)
    monkeypatch.setattr(module, "CODE_VERSION", "9.9.9")
    assert SynthSEM(images=100, cache_dir=str(tmp_path)).cache_dir not in folders


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"size": 7}, "32 to 1024"),
        ({"size": (64, 64, 3)}, "32 to 1024"),
        ({"images": 0}, "at least 1 image"),
        ({"seed": -1}, "seed of at least 0"),
        ({"imbalance": "uneven"}, "'balanced' or 'nffa'"),
        ({"images": 3}, "ask for at least 100"),
    ],
)
def test_impossible_settings_are_named(setting: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(EmsslError, match=words):
        synthsem(cache_dir=tmp_path, **setting)  # type: ignore[arg-type]


def test_the_contact_sheet_has_a_row_for_each_class() -> None:
    sheet = np.asarray(contact_sheet(columns=3, size=48))
    rows = [sheet[k * 51 : k * 51 + 48, 108:] for k in range(10)]
    assert all(row.std() > 5 for row in rows)
    assert all((sheet[k * 51 : k * 51 + 48, :100] < 100).any() for k in range(10))
