"""The benchmark runs and writes its contract; how fast it is, is no test's business."""

import json
from pathlib import Path

import pytest

from emssl_hf.engine.bench import bench


def test_the_benchmark_runs_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emssl_hf.engine.bench.BATCH", 4)
    bench(tmp_path / "bench.json", files=4, steps=1, rounds=1)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert all({"work", "against", "device", "ratio", "goal"} <= set(row) for row in rows)
    assert rows[0]["ratio"] == pytest.approx(rows[0]["images_per_s"] / rows[0]["peer_images_per_s"], rel=0.05)
