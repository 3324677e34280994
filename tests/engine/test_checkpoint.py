"""Checkpoints: bit-exact round trips, pruning, leftovers, and refusals."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from emssl_hf.engine import checkpoint
from emssl_hf.engine.checkpoint import Progress
from emssl_hf.engine.config import OptimConfig
from emssl_hf.engine.optim import build_optimizer, set_lr
from emssl_hf.errors import EmsslError


def trained(seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = build_optimizer(model, OptimConfig(), 1)
    for _ in range(steps):
        one_step(model, optimizer)
    return model, optimizer


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    set_lr(optimizer, 0.01)
    model(torch.randn(6, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, keep: int = 2) -> Path:
    return checkpoint.save(run, model, optimizer, Progress(epoch, 10 * epoch), data="these", keep=keep)


def test_model_and_optimizer_come_back_bit_by_bit(tmp_path: Path) -> None:
    model, optimizer = trained(0, 3)
    checkpoint.save(tmp_path, model, optimizer, Progress(3, 27), data="these", keep=1, extra={"best": 0.1 + 0.2})
    other, other_optimizer = trained(1, 0)
    progress, state = checkpoint.restore(tmp_path, other, other_optimizer, data="these")
    assert progress == Progress(3, 27) and state["extra"] == {"best": 0.1 + 0.2}
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for (name, old), new in zip(model.named_parameters(), other.parameters(), strict=True):
        stored, loaded = optimizer.state[old], other_optimizer.state[new]
        assert set(stored) == set(loaded) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(stored[key], loaded[key]) for key in stored), name
    for pair in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(5)
        one_step(*pair)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_without_a_checkpoint_a_run_begins(tmp_path: Path) -> None:
    assert checkpoint.restore(tmp_path, *trained(0, 0), data="these") == (Progress(), {})


@pytest.mark.parametrize(("keep", "left"), [(1, ["epoch-00004"]), (2, ["epoch-00003", "epoch-00004"])])
def test_the_last_checkpoints_are_kept(tmp_path: Path, keep: int, left: list[str]) -> None:
    for epoch in range(1, 5):
        save(tmp_path, *trained(0, 0), epoch, keep)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == left


def test_what_a_kill_left_half_written_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, *trained(0, 0), 1)
    for name in (".epoch-00002.tmp", "epoch-00003"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "checkpoints" / ".epoch-00002.tmp" / "state.json").write_text("{")
    assert checkpoint.restore(tmp_path, *trained(1, 0), data="these")[0] == Progress(1, 10)
    save(tmp_path, *trained(0, 0), 2)
    assert checkpoint.restore(tmp_path, *trained(1, 0), data="these")[0] == Progress(2, 20)


def test_the_order_is_that_of_the_epochs(tmp_path: Path) -> None:
    for epoch in (9, 10, 100):
        save(tmp_path, *trained(0, 0), epoch, keep=5)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["epoch-00009", "epoch-00010", "epoch-00100"]


def test_other_images_are_refused(tmp_path: Path) -> None:
    save(tmp_path, *trained(0, 0), 1)
    with pytest.raises(EmsslError, match="trained on other images"):
        checkpoint.restore(tmp_path, *trained(0, 0), data="those")


def test_another_format_is_refused(tmp_path: Path) -> None:
    state = save(tmp_path, *trained(0, 0), 1) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    with pytest.raises(EmsslError, match="format 99; this version reads 1"):
        checkpoint.restore(tmp_path, *trained(0, 0), data="these")


def test_weights_of_another_shape_are_not_loaded_in_part(tmp_path: Path) -> None:
    save(tmp_path, *trained(0, 0), 1)
    other = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises((EmsslError, RuntimeError), match="size mismatch"):
        checkpoint.restore(tmp_path, other, build_optimizer(other, OptimConfig(), 1), data="these")
