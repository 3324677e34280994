"""A fourth method is one file of the user's: it trains, resumes, saves, loads and fine-tunes with no other edit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from emssl_hf.engine.finetune import finetune
from emssl_hf.engine.pretrain import Pretraining, pretrain
from emssl_hf.engine.run_folder import read_metrics, read_summary
from emssl_hf.models import load_objective
from emssl_hf.models.backbone import load_backbone
from tests.engine.tiny import Killed, finetune_config, kill_at, pretrain_config

FILE = Path(__file__).with_name("simmim.py")


def test_simmim_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pretrain_config(str(FILE), tmp_path / "run", model={"options": {"mask_ratio": 0.5}})
    with monkeypatch.context() as patch:
        kill_at(14, patch, Pretraining)
        with pytest.raises(Killed):
            pretrain(config)
    run = pretrain(config)
    values = [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]
    assert len(values) == 27 and np.mean(values[-6:]) < 0.97 * np.mean(values[:3])
    assert abs(np.mean([m["share"] for m in read_metrics(run) if m["kind"] == "train"]) - 0.5) < 0.05
    assert read_summary(run)["method"] == "SimMIM"
    model = load_objective(FILE).from_pretrained(run / "pretraining")
    assert model.config.mask_ratio == 0.5 and (run / "pretraining/preprocessor_config.json").exists()
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = model.backbone.eval()(grey).last_hidden_state
        for product in ("pretraining", "backbone"):
            backbone, _ = load_backbone(run / product, channels=1)
            torch.testing.assert_close(backbone.eval()(grey).last_hidden_state, expected, atol=2e-5, rtol=1e-5)
    done = finetune(
        finetune_config(tmp_path / "finetune", model={"init": str(run / "pretraining")}, train={"epochs": 1})
    )
    assert (done / "classifier/model.safetensors").exists()
