"""Finished runs, made once and only read by the tests."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from emssl_hf.data.opening import open_dataset
from emssl_hf.data.store import build_store
from emssl_hf.engine.finetune import finetune
from emssl_hf.engine.pretrain import pretrain
from tests.conftest import TINY_SET
from tests.engine.tiny import METHODS, finetune_config, pretrain_config

Finished = Callable[[str], Path]


@pytest.fixture(scope="package", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Bit-exact promises are tested on the CPU, also where there is a GPU; children inherit the empty list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`finished("mae")`: the folder of a pretraining that came to its end."""
    home, made = tmp_path_factory.mktemp("runs"), dict[str, Path]()

    def run(method: str) -> Path:
        if method not in made:
            made[method] = pretrain(pretrain_config(method, home / method))
        return made[method]

    return run


@pytest.fixture(scope="package")
def finetuned(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fine-tuning from MAE's pretraining."""
    folder = tmp_path_factory.mktemp("runs") / "finetune"
    return finetune(finetune_config(folder, model={"init": str(finished("mae") / "pretraining")}))


@pytest.fixture(scope="package")
def test_images() -> NDArray[np.uint8]:
    """The twelve images of the test split at 32 x 32, as the classifier sees them."""
    opened = open_dataset("synthsem", options=TINY_SET["options"])
    store = build_store(opened.splits["test"], size=(32, 32), progress=False)
    return store.gather(range(len(store)))[0].numpy()


@pytest.fixture(scope="package")
def stock(
    finished: Finished, finetuned: Path, test_images: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the published models of all methods, and the classifier, give in a Python without emssl_hf."""
    home = tmp_path_factory.mktemp("stock")
    np.save(home / "pixels.npy", test_images)
    folders = {method: finished(method) / "backbone" for method in METHODS} | {"classifier": finetuned / "classifier"}
    script = Path(__file__).with_name("stock.py")
    command = [sys.executable, "-I", str(script), str(home / "pixels.npy"), str(home), *map(str, folders.values())]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name: dict(np.load(home / f"{number}.npz")) for number, name in enumerate(folders)}
