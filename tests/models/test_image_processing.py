"""Grey micrographs of any depth to pixel_values, and the stock processor beside published models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from emssl_hf.models import MicrographImageProcessor, register_auto_classes
from emssl_hf.models.image_processing import stock_processor

MEAN, STD = 0.4, 0.2


@pytest.fixture
def grey() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)


@pytest.fixture
def processor() -> MicrographImageProcessor:
    return MicrographImageProcessor(size={"height": 16, "width": 24}, image_mean=[MEAN], image_std=[STD])


def pixels(processor: Any, image: Any) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"]


def test_eight_bits_are_kept(processor: MicrographImageProcessor, grey: np.ndarray[Any, Any]) -> None:
    small = np.asarray(Image.fromarray(grey.astype(np.float32)).resize((24, 16), Image.Resampling.BILINEAR))
    result = pixels(processor, grey)
    assert result.shape == (1, 1, 16, 24) and result.dtype == torch.float32
    np.testing.assert_allclose(result[0, 0].numpy(), (small / 255 - MEAN) / STD, atol=1e-5)


def test_every_way_to_pass_the_same_image(processor: MicrographImageProcessor, grey: np.ndarray[Any, Any]) -> None:
    colour = np.repeat(grey[..., None], 3, axis=2)
    same = [
        Image.fromarray(grey),
        Image.fromarray(colour),
        colour,
        np.moveaxis(colour, -1, 0),
        grey[None],
        torch.from_numpy(grey),
        np.dstack([colour, np.full_like(grey, 255)]),
    ]
    expected = pixels(processor, grey)
    for image in same:
        assert torch.equal(pixels(processor, image), expected)
    assert torch.equal(pixels(processor, [grey, grey]), expected.expand(2, -1, -1, -1))


def test_sixteen_bits_are_stretched_not_clipped(
    processor: MicrographImageProcessor, grey: np.ndarray[Any, Any]
) -> None:
    deep = np.linspace(33069, 36863, grey.size).reshape(grey.shape).astype(np.uint16)
    low, high = np.percentile(deep, (0.1, 99.9))
    whole = MicrographImageProcessor(do_resize=False, do_normalize=False)
    expected = np.clip((deep - low) / (high - low), 0, 1)
    for image in (deep, Image.fromarray(deep), deep.astype(np.int32), deep.astype(np.float32)):
        result = pixels(whole, image)[0, 0].numpy()
        np.testing.assert_allclose(result, expected, atol=1e-5)
        assert len(np.unique(result)) > 2000


def test_constant_images_and_colour(processor: MicrographImageProcessor) -> None:
    assert pixels(processor, np.full((20, 20), 40000, np.uint16)).isfinite().all()
    red = np.zeros((20, 20, 3), np.uint8)
    red[..., 0] = 200
    expected = (round(0.299 * 200) / 255 - MEAN) / STD
    assert pixels(processor, red).unique().tolist() == pytest.approx([expected], abs=1e-5)


def test_values_that_are_no_numbers_are_refused(processor: MicrographImageProcessor) -> None:
    with pytest.raises(ValueError, match="not finite"):
        processor(np.full((20, 20), np.nan, np.float32))


def test_saved_processor_loads(processor: MicrographImageProcessor, grey: np.ndarray[Any, Any], tmp_path: Path) -> None:
    register_auto_classes()
    processor.save_pretrained(tmp_path)
    for loaded in (
        MicrographImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded, MicrographImageProcessor)
        assert torch.equal(pixels(loaded, grey), pixels(processor, grey))


def test_stock_processor_is_stock_and_gives_the_same_pixels(
    grey: np.ndarray[Any, Any], processor: MicrographImageProcessor, tmp_path: Path
) -> None:
    stock_processor((16, 24), MEAN, STD).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    result = pixels(loaded, Image.fromarray(grey))
    assert saved["image_processor_type"] == "ViTImageProcessor" and "auto_map" not in saved
    assert result.shape == (1, 3, 16, 24)
    assert torch.equal(result[:, 0], result[:, 1]) and torch.equal(result[:, 0], result[:, 2])
    # The stock one rounds to whole grey values twice while it resizes.
    torch.testing.assert_close(result[:, :1], pixels(processor, grey), rtol=0, atol=1.01 / 255 / STD)
