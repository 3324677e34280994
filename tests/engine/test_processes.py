"""Two processes on the CPU against one with the same global batch."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emssl_hf.engine.run_folder import read_metrics, read_summary
from tests.engine import two_processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[int, Path]:
    """Folders of the same jobs by one process and by two."""
    homes = {count: tmp_path_factory.mktemp(f"processes{count}") for count in (1, 2)}
    two_processes_main(homes[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command += ["-m", "tests.engine.two_processes", str(homes[2])]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return homes


def two_processes_main(home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_processes.Accelerator, "end_training", two_processes.Accelerator.end_training)
        two_processes.main(home)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]


@pytest.mark.parametrize("job", ["mae", "mff", "whole"])
def test_two_processes_train_as_one(job: str, runs: dict[int, Path]) -> None:
    one, two = (losses(runs[count] / job) for count in (1, 2))
    assert len(one) == len(two) == 18
    np.testing.assert_allclose(two[:2], one[:2], rtol=1e-6)
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_mocov3_trains_in_two_processes(runs: dict[int, Path]) -> None:
    """BatchNorm is per process on the CPU, which has no synchronised form: losses are near, not equal."""
    one, two = (losses(runs[count] / "mocov3") for count in (1, 2))
    assert len(two) == 18 and np.isfinite(two).all()
    np.testing.assert_allclose(np.mean(two), np.mean(one), rtol=0.15)
    # Chance is ln 8 with keys of both processes, ln 4 with those of one (times 2 T for two directions).
    assert np.mean(two) > 1.2 * 0.8 * np.log(4)


def test_figures_of_held_out_images_are_those_of_all_processes(runs: dict[int, Path]) -> None:
    one, two = ([line for line in read_metrics(runs[count] / "mae") if line["kind"] == "eval"] for count in (1, 2))
    assert len(one) == len(two) == 2
    for first, second in zip(one, two, strict=True):
        for name in ("feature_std", "effective_rank"):
            assert first[name] == pytest.approx(second[name], rel=1e-3)
        assert abs(first["knn_cls"] - second["knn_cls"]) <= 2 / 33
    rows = [(runs[count] / "whole/predictions.csv").read_text().splitlines() for count in (1, 2)]
    assert [line.split(",")[:3] for line in rows[0]] == [line.split(",")[:3] for line in rows[1]]
    scores = [[[float(v) for v in line.split(",")[4:]] for line in lines[1:]] for lines in rows]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_run_of_two_processes_ends_as_one_that_was_not(count: int, runs: dict[int, Path]) -> None:
    whole, killed = runs[count] / "whole", runs[count] / "killed"
    assert losses(whole) == losses(killed)
    first, second = (load_file(run / "classifier_last" / "model.safetensors") for run in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_summary(whole)["test"] == read_summary(killed)["test"]
