"""Everything the tests write goes to one temporary home: stores, Hugging Face caches, matplotlib's settings.

The environment is set before torch and datasets are imported; workers of pytest-xdist inherit it.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

if "EMSSL_TEST_HOME" not in os.environ:
    _home = tempfile.mkdtemp(prefix="emssl_hf_tests_")
    atexit.register(shutil.rmtree, _home, ignore_errors=True)
    os.environ.update(
        EMSSL_TEST_HOME=_home,
        EMSSL_STORE=f"{_home}/stores",
        EMSSL_QUIET="1",
        HF_HOME=f"{_home}/huggingface",
        HF_DATASETS_CACHE=f"{_home}/huggingface/datasets",
        HF_HUB_CACHE=f"{_home}/huggingface/hub",
        HF_MODULES_CACHE=f"{_home}/huggingface/modules",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        MPLCONFIGDIR=f"{_home}/matplotlib",
        MPLBACKEND="Agg",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )

#: Settings of the procedural set that every training test shares: 75 train, 33 validation, 12 test images.
TINY_SET: dict[str, Any] = {"path": "synthsem", "options": {"images": 120, "size": 32}}


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def micrograph_folder(tmp_path: Path) -> Path:
    """Three classes of eight PNG micrographs, 40 x 52 pixels: bright, dark and striped."""
    return write_micrographs(tmp_path / "micrographs")


def write_micrographs(folder: Path, per_class: int = 8, shape: tuple[int, int] = (40, 52)) -> Path:
    """Class folders of noise that a small network tells apart, written as 8-bit PNG."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    base = {"bright": np.full(shape, 190.0), "dark": np.full(shape, 60.0)}
    base["striped"] = np.broadcast_to(125 + 90 * np.sin(np.arange(shape[1]) / 2), shape)
    for name, picture in base.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            noisy = np.clip(picture + rng.normal(0, 12, shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{number}.png")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """Tests of one file stay on one worker: their runs and processes are made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
