"""Views against NumPy and Pillow: geometry pixel by pixel, photometry by formula, amounts by their promises."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from emssl_hf.augment import Augmenter, Geometry, crop_boxes, erase, mix, photometric, resample
from emssl_hf.models import View, load_objective
from emssl_hf.randomness import sample_keys, uniform

STILL = Geometry(rotate=False, flip=False)
IDENTITY = torch.eye(2)


def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width), dtype=torch.uint8, generator=generator)


def smooth(count: int, height: int, width: int) -> torch.Tensor:
    """Structures of several pixels, so that interpolation is nearly exact."""
    fields = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(count, height, width)), (0, 3, 3))
    fields = (fields - fields.min()) / (fields.max() - fields.min())
    return torch.from_numpy((255 * fields).round().astype(np.uint8))


def extents(images: torch.Tensor) -> torch.Tensor:
    return torch.tensor([images.shape[1:]]).repeat(len(images), 1)


def keys(count: int, epoch: int = 0) -> torch.Tensor:
    return sample_keys(0, epoch, torch.arange(count))


def augmenter(*views: View, geometry: Geometry = STILL) -> Augmenter:
    return Augmenter(views, 0.0, 1.0, geometry=geometry)


# Geometry


def test_the_whole_view_of_an_image_of_its_size_is_the_image() -> None:
    for dtype, full in ((torch.uint8, 255), (torch.int32, 65535)):
        images = noise(4, 24, 24).to(dtype) * (1 if full == 255 else 257)
        made = augmenter(View((24, 24), crop="whole"))(images, extents(images), keys(4))
        torch.testing.assert_close(made[:, 0], images.float() / full, atol=2e-6, rtol=0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_whole_view_enlarges_and_shrinks_as_torch_does(interpolation: str) -> None:
    images = noise(3, 30, 40)
    for size in ((60, 80), (20, 36)):
        geometry = Geometry(False, False, interpolation)
        made = augmenter(View(size, crop="whole"), geometry=geometry)(images, extents(images), keys(3))
        expected = torch.nn.functional.interpolate(images[:, None] / 255.0, size, mode=interpolation)
        inner = (slice(None), slice(None), slice(5, -5), slice(5, -5))  # torch repeats the edge, we mirror it
        torch.testing.assert_close(made[inner], expected.clamp(0, 1)[inner], atol=2e-5, rtol=0)


def test_pixels_are_averaged_where_several_fall_together() -> None:
    images = noise(2, 64, 64)
    made = augmenter(View((16, 16), crop="whole"))(images, extents(images), keys(2))
    expected = (images.float() / 255).view(2, 16, 4, 16, 4).mean((2, 4))
    torch.testing.assert_close(made[:, 0], expected, atol=2e-6, rtol=0)


def test_one_small_crop_in_a_batch_does_not_undo_the_averaging_of_the_others() -> None:
    images, count = noise(24, 128, 128), 24
    view = View((16, 16), scale=(0.02, 1.0))
    edges = crop_boxes(view, extents(images), uniform(keys(count), 4, "view0.crop"))[:, 2:].amin(1)
    assert edges.min() < 48 and edges.max() > 96  # the batch holds both kinds
    together = augmenter(view)(images, extents(images), keys(count))
    for row in range(count):
        alone = augmenter(view)(images[[row]], extents(images)[[row]], keys(count)[[row]])
        assert torch.equal(alone[0], together[row])


def test_boxes_stay_inside_and_keep_their_promises() -> None:
    view = View((32, 32), scale=(0.2, 0.7), ratio=(3 / 4, 4 / 3))
    sizes = torch.tensor([[96, 128], [100, 100]]).repeat(2000, 1)
    top, left, height, width = crop_boxes(view, sizes, uniform(keys(4000), 4, "crop")).double().unbind(1)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= sizes[:, 0] + 1e-3).all() and (left + width <= sizes[:, 1] + 1e-3).all()
    share, ratio = height * width / sizes.prod(1), width / height
    assert share.min() > 0.2 - 1e-5 and share.max() < 0.7 + 1e-5 and abs(share.mean() - 0.45) < 0.01
    assert ratio.min() > 0.75 - 1e-5 and ratio.max() < 4 / 3 + 1e-5 and abs(ratio.log().mean()) < 0.01
    middle = (top + height / 2) / sizes[:, 0]
    assert abs(middle.mean() - 0.5) < 0.01


def test_a_box_that_does_not_fit_is_cut_at_the_image() -> None:
    view = View((32, 32), scale=(1.0, 1.0))
    sizes = torch.tensor([[40, 80]]).repeat(500, 1)
    _, _, height, width = crop_boxes(view, sizes, uniform(keys(500), 4, "crop")).unbind(1)
    assert (height <= 40).all() and (width <= 80).all() and (height == 40).any()


SYMMETRIES = [(turn, up, left) for turn in range(4) for up in (False, True) for left in (False, True)]


def symmetric(array: NDArray[np.float32], turn: int, up: bool, left: bool) -> NDArray[np.float32]:
    array = np.rot90(array, turn)
    array = array[::-1] if up else array
    return array[:, ::-1] if left else array


def test_the_symmetries_are_exactly_the_eight_of_the_square() -> None:
    image = noise(1, 16, 16)
    wanted = {symmetric(image[0].numpy(), *s).tobytes(): s for s in SYMMETRIES}
    assert len(wanted) == 8
    made = augmenter(View((16, 16), crop="whole"), geometry=Geometry())
    views = made(image.repeat(400, 1, 1), extents(image).repeat(400, 1), keys(400))[:, 0]
    exact = (views * 255).round().to(torch.uint8)
    assert (views * 255 - exact).abs().max() < 1e-3
    found = [picture.numpy().tobytes() for picture in exact]
    assert set(found) == set(wanted)
    counts = [found.count(key) for key in wanted]
    assert min(counts) > 25 and max(counts) < 80  # 50 each on average, 6.6 the standard deviation


def test_each_draw_makes_the_turn_and_the_flips_that_numpy_makes() -> None:
    image = noise(1, 12, 12)
    pixels, boxes = image[:, None] / 255.0, torch.tensor([[0.0, 0.0, 12.0, 12.0]])
    made = augmenter(View((12, 12)), geometry=Geometry())
    for draws, expected in (
        ((0.0, 0.9, 0.9), image[0].numpy()),
        ((0.0, 0.1, 0.9), image[0].numpy()[:, ::-1]),
        ((0.0, 0.9, 0.1), image[0].numpy()[::-1]),
        ((0.6, 0.9, 0.9), np.rot90(image[0].numpy(), 2)),
    ):
        symmetry = made.symmetries(torch.tensor([draws]), square=True)
        view = resample(pixels, boxes, symmetry, View((12, 12)), "bicubic")[0, 0]
        np.testing.assert_allclose(view.numpy() * 255, expected, atol=1e-3)
    quarters = {
        resample(pixels, boxes, made.symmetries(torch.tensor([[q, 0.9, 0.9]]), True), View((12, 12)), "bilinear")
        .mul(255)
        .round()
        .numpy()
        .astype(np.uint8)
        .tobytes()
        for q in (0.3, 0.8)
    }
    assert quarters == {np.rot90(image[0].numpy(), k).tobytes() for k in (1, 3)}


def test_views_that_are_not_square_are_never_turned_on_their_side() -> None:
    image = noise(1, 12, 20)
    made = augmenter(View((12, 20), crop="whole"), geometry=Geometry())
    views = made(image.repeat(100, 1, 1), extents(image).repeat(100, 1), keys(100))[:, 0]
    found = {picture.numpy().tobytes() for picture in (views * 255).round().to(torch.uint8)}
    array = image[0].numpy()
    assert found == {a.tobytes() for a in (array, array[::-1], array[:, ::-1], array[::-1, ::-1])}


def test_without_rotation_and_flips_nothing_is_turned() -> None:
    symmetry = augmenter(View((8, 8))).symmetries(torch.rand(50, 3), square=True)
    assert torch.equal(symmetry, IDENTITY.expand(50, 2, 2))


def test_padded_crops_equal_numpy_padding_and_slicing() -> None:
    images = noise(40, 16, 24)
    view = View((16, 16), crop="padded", padding=4)
    made = augmenter(view)(images, extents(images), keys(40))[:, 0].numpy()
    boxes = crop_boxes(view, extents(images), uniform(keys(40), 4, "view0.crop")).numpy()
    assert boxes[:, 0].min() < -2 and boxes[:, 0].max() > 2 and boxes[:, 1].max() > 10  # beyond every edge
    assert (boxes[:, 0] >= -4).all() and (boxes[:, 0] <= 4).all()
    assert (boxes[:, 1] >= -4).all() and (boxes[:, 1] <= 12).all()
    for row in range(40):
        padded = np.pad(images[row].numpy() / 255.0, 8, mode="symmetric")
        top, left = boxes[row, 0] + 8, boxes[row, 1] + 8
        expected = cubic_slice(cubic_slice(padded, top).T, left).T
        np.testing.assert_allclose(made[row], np.clip(expected, 0, 1), atol=2e-4)


def cubic_slice(array: NDArray[np.float64], start: float, length: int = 16) -> NDArray[np.float64]:
    """Rows start, start + 1, ... by Keys' cubic convolution with a = -0.75."""
    whole = math.floor(start)
    offsets = np.abs(np.arange(-1, 3) - (start - whole))
    near = 1.25 * offsets**3 - 2.25 * offsets**2 + 1
    far = -0.75 * (offsets**3 - 5 * offsets**2 + 8 * offsets - 4)
    weights = np.where(offsets <= 1, near, far)
    return sum(w * array[whole + tap : whole + tap + length] for w, tap in zip(weights, range(-1, 3), strict=True))


# Batches


@pytest.mark.parametrize(
    "view", [View((16, 16), crop="padded", padding=4), View((16, 16)), View((16, 16), crop="whole")]
)
def test_ragged_batches_never_show_their_padding(view: View) -> None:
    sizes = torch.tensor([[20, 34], [20, 20], [33, 20], [20, 21]])
    images = torch.zeros(4, 33, 34, dtype=torch.uint8)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:height, :width] = 200
    for epoch in range(20):
        made = augmenter(view, geometry=Geometry())(images, sizes, keys(4, epoch))
        torch.testing.assert_close(made, torch.full_like(made, 200 / 255), atol=1e-5, rtol=0)


@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_an_image_looks_the_same_in_a_ragged_batch_and_alone(crop: str) -> None:
    view = View((16, 16), crop=crop, padding=4 if crop == "padded" else 0)
    sizes = torch.tensor([[20, 30], [24, 20], [20, 20]])
    images = torch.zeros(3, 24, 30, dtype=torch.uint8)
    contents = [smooth(1, *size)[0] for size in sizes.tolist()]
    for image, content in zip(images, contents, strict=True):
        image[: content.shape[0], : content.shape[1]] = content
    for epoch in range(10):
        together = augmenter(view, geometry=Geometry())(images, sizes, keys(3, epoch))
        for row, content in enumerate(contents):
            alone = augmenter(view, geometry=Geometry())(content[None], sizes[[row]], keys(3, epoch)[[row]])
            torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["mae", "mff", "mocov3"])
def test_the_same_keys_give_the_same_views_in_any_batch_and_order(method: str) -> None:
    objective = load_objective(method)
    views = objective.views(objective.config_class(image_size=32, patch_size=8))
    images = noise(8, 36, 48)
    made = augmenter(*views, geometry=Geometry())
    whole = made(images, extents(images), keys(8))
    order = torch.tensor([5, 2, 7, 0])
    torch.testing.assert_close(
        made(images[order], extents(images)[order], keys(8)[order]), whole[order], atol=1e-6, rtol=0
    )
    assert not torch.allclose(made(images, extents(images), keys(8, epoch=1)), whole, atol=0.05)


def test_moco_gets_two_different_views_of_every_image() -> None:
    objective = load_objective("mocov3")
    views = objective.views(objective.config_class(image_size=32, patch_size=8))
    images = smooth(16, 40, 40)
    made = augmenter(*views, geometry=Geometry())(images, extents(images), keys(16))
    assert made.shape == (16, 2, 1, 32, 32)
    assert ((made[:, 0] - made[:, 1]).abs().amax((1, 2, 3)) > 0.05).all()


def test_pixels_are_normalised_and_channels_repeated() -> None:
    images = noise(2, 16, 16)
    made = Augmenter([View((16, 16), crop="whole")], 0.4, 0.2, channels=3, geometry=STILL)
    views = made(images, extents(images), keys(2))
    assert views.shape == (2, 3, 16, 16)
    torch.testing.assert_close(views[:, 1], (images / 255.0 - 0.4) / 0.2, atol=1e-5, rtol=0)
    assert torch.equal(views[:, 0], views[:, 2])


# Photometry


def photo_draws(count: int = 6, **chosen: float) -> torch.Tensor:
    places = {"jitter": 0, "brightness": 1, "contrast": 2, "blur": 3, "sigma": 4, "solarize": 5}
    draws = torch.full((count, 8), 0.999)
    for name, value in chosen.items():
        draws[:, places[name]] = value
    return draws


def test_brightness_and_contrast_follow_their_formulas() -> None:
    pixels = noise(6, 16, 16)[:, None] / 255.0
    view = View((16, 16), brightness=0.4, contrast=0.3, jitter_probability=0.8)
    draws = photo_draws(jitter=0.1)
    draws[:, 1:3] = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    made = photometric(pixels, view, draws).numpy()
    for row in range(6):
        bright = np.clip(pixels[row].numpy() * (1 + 0.4 * (2 * float(draws[row, 1]) - 1)), 0, 1)
        factor = 1 + 0.3 * (2 * float(draws[row, 2]) - 1)
        expected = np.clip(factor * bright + (1 - factor) * bright.mean(), 0, 1)
        np.testing.assert_allclose(made[row], expected, atol=2e-5)
    untouched = photometric(pixels, view, photo_draws(jitter=0.81, brightness=0.1))
    torch.testing.assert_close(untouched, pixels, atol=1e-6, rtol=0)


def test_solarising_inverts_the_bright_half_of_chosen_images() -> None:
    pixels = noise(2, 16, 16)[:, None] / 255.0
    draws = photo_draws(2)
    draws[0, 5] = 0.1
    made = photometric(pixels, View((16, 16), solarize_probability=0.2), draws)
    array = pixels[0].numpy()
    np.testing.assert_array_equal(made[0].numpy(), np.where(array >= 0.5, 1 - array, array))
    assert torch.equal(made[1], pixels[1])


def test_blur_touches_the_chosen_rows_alone_and_is_gaussian() -> None:
    pixels = noise(3, 48, 48)[:, None] / 255.0
    view = View((48, 48), blur_probability=0.5, blur_sigma=(0.1, 8.0))
    draws = photo_draws(3)
    draws[1, 3], draws[1, 4] = 0.2, 0.75
    made = photometric(pixels, view, draws)
    assert torch.equal(made[[0, 2]], pixels[[0, 2]])
    sigma = (0.1 + 0.75 * 7.9) * 48 / 224
    expected = ndimage.gaussian_filter(pixels[1, 0].numpy(), sigma, mode="mirror", radius=6)
    np.testing.assert_allclose(made[1, 0].numpy(), expected, atol=1e-5)


def test_probabilities_are_kept() -> None:
    count, pixels = 4000, torch.full((4000, 1, 2, 2), 0.75)
    draws = uniform(keys(count), 8, "view0.photo")
    solarised = photometric(pixels, View((2, 2), solarize_probability=0.2), draws)[:, 0, 0, 0] < 0.5
    assert abs(solarised.float().mean() - 0.2) < 5 * math.sqrt(0.16 / count)
    jittered = photometric(pixels, View((2, 2), brightness=0.2, jitter_probability=0.8), draws)[:, 0, 0, 0] != 0.75
    assert abs(jittered.float().mean() - 0.8) < 5 * math.sqrt(0.16 / count)


# Erasing and mixing


def test_erasing_hits_its_share_of_the_images_and_of_the_area() -> None:
    pixels = torch.full((2000, 1, 24, 24), 9.0)  # noise never gets there
    made = erase(pixels, keys(2000), 0.25)
    share = (made != 9).float().mean((1, 2, 3))
    hit = share > 0
    assert abs(hit.float().mean() - 0.25) < 5 * math.sqrt(0.1875 / 2000)
    assert share[hit].max() < 0.4 and share[hit].min() > 0.005 and 0.1 < share[hit].mean() < 0.22
    filling = made[made != 9]
    assert abs(filling.mean()) < 0.02 and abs(filling.std() - 1) < 0.02
    box = (made[hit][0, 0] != 9).nonzero()
    height, width = (box.amax(0) - box.amin(0) + 1).tolist()
    assert height * width == len(box)  # a rectangle
    assert torch.equal(erase(pixels[:5], keys(5), 0.0), pixels[:5])


def mixed(seed: int, **amounts: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pixels = torch.arange(4.0)[:, None, None, None].expand(4, 1, 20, 20)
    targets = torch.eye(4) * 0.9 + 0.025
    generator = torch.Generator().manual_seed(seed)
    return pixels, targets, *mix(pixels, targets, **{"mixup": 0.0, "cutmix": 0.0, **amounts}, generator=generator)


def test_mixup_blends_pixels_and_targets_with_one_weight() -> None:
    for seed in range(20):
        pixels, _, made, targets = mixed(seed, mixup=0.8)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        keep = (targets[0, 0] - 0.025) / 0.9
        torch.testing.assert_close(made, pixels * keep + pixels.flip(0) * (1 - keep), atol=1e-5, rtol=0)


def test_cutmix_pastes_a_box_of_the_weight_it_gives_to_the_targets() -> None:
    weights = []
    for seed in range(40):
        pixels, _, made, targets = mixed(seed, cutmix=1.0)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        keep = float((targets[0, 0] - 0.025) / 0.9)
        assert abs(float((made[0] == 0).float().mean()) - keep) < 1e-5
        assert abs(float((made[1] == 1).float().mean()) - keep) < 1e-5
        assert ((made == pixels) | (made == pixels.flip(0))).all()
        weights.append(keep)
    assert min(weights) < 0.5 and max(weights) > 0.9


def test_with_both_on_each_batch_gets_one_of_the_two() -> None:
    kinds = []
    for seed in range(200):
        pixels, _, made, _ = mixed(seed, mixup=0.8, cutmix=1.0)
        kinds.append(bool(((made == pixels) | (made == pixels.flip(0))).all()))
    assert 70 < sum(kinds) < 130


def test_mixing_can_be_off_and_repeats_with_its_generator() -> None:
    pixels, targets, made, mixed_targets = mixed(0)
    assert made is pixels and mixed_targets is targets
    assert torch.equal(mixed(3, cutmix=1.0)[2], mixed(3, cutmix=1.0)[2])
