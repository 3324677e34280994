"""What users get wrong ends in one sentence; what can be survived is survived and told."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emssl_hf.engine.config import OptimConfig, PretrainConfig, parse
from emssl_hf.engine.finetune import finetune
from emssl_hf.engine.pretrain import Pretraining, pretrain
from emssl_hf.engine.run_folder import read_metrics, read_summary
from emssl_hf.errors import EmsslError
from tests.conftest import write_micrographs
from tests.engine.tiny import finetune_config, pretrain_config


def refused(folder: Path, **changes: Any) -> str:
    """The message with which pretraining refuses."""
    with pytest.raises(EmsslError) as caught:
        pretrain(pretrain_config(changes.pop("method", "mae"), folder / "run", **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no micrograph in this folder" in refused(tmp_path, data={"path": str(tmp_path / "empty")})


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no such folder" in refused(tmp_path, data={"path": str(tmp_path / "nowhere")})


def test_a_cut_jpeg_among_good_images_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_micrographs(tmp_path / "set")
    picture = folder / "dark/0.png"
    Image.open(picture).save(folder / "dark/cut.jpg")
    content = (folder / "dark/cut.jpg").read_bytes()
    (folder / "dark/cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "dark/words.jpg").write_text("no image")
    run = pretrain(pretrain_config("mae", tmp_path / "run", data={"path": str(folder)}, train={"epochs": 1}))
    assert read_summary(run)["images"] == 24
    said = "".join(capsys.readouterr())
    assert "1 files left out, the first: dark/words.jpg" in said
    assert "1 images left out, the first:" in said and "cut.jpg" in said


def test_a_batch_larger_than_the_data_becomes_smaller_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(pretrain_config("mae", tmp_path / "run", train={"batch_size": 80, "accumulation": 2, "epochs": 2}))
    assert "75 training images are fewer than a batch of 80: the batch is 74" in capsys.readouterr().out
    lines = [line for line in read_metrics(run) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["lr"] == pytest.approx(0.1 * 74 / 256)


@pytest.mark.parametrize("batch", [0, -8, 9])
def test_a_batch_that_cannot_be_divided(batch: int, tmp_path: Path) -> None:
    assert "multiple of 2" in refused(tmp_path, train={"batch_size": batch, "accumulation": 2})


def test_a_method_that_does_not_exist(tmp_path: Path) -> None:
    message = refused(tmp_path, method="simclr")
    assert "'simclr'" in message and "mae, mff, mocov3" in message


def test_a_file_that_defines_no_method(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    assert "must define exactly one" in refused(tmp_path, method=str(tmp_path / "mine.py"))
    assert "There is no file" in refused(tmp_path, method=str(tmp_path / "missing.py"))


def test_a_misspelt_setting_of_the_model_names_the_nearest(tmp_path: Path) -> None:
    message = refused(tmp_path, model={"options": {"mask_ration": 0.5}})
    assert "'mask_ration'" in message and "'mask_ratio'" in message


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mask_ratio": "much"}, "mask_ratio"),
        ({"hidden_size": 33}, "multiple"),
        ({"mask_ratio": 1.0}, "nothing to see"),
    ],
)
def test_settings_of_the_model_that_cannot_be(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    assert word in refused(tmp_path, model={"options": options})


def test_an_image_size_that_patches_do_not_tile(tmp_path: Path) -> None:
    assert "do not tile" in refused(tmp_path, model={"image_size": 30})


def test_a_misspelt_option_of_the_data(tmp_path: Path) -> None:
    message = refused(tmp_path, data={"options": {"imges": 10}})
    assert "'imges'" in message and "images" in message


def test_a_setting_that_does_not_exist() -> None:
    with pytest.raises(EmsslError, match="epoch"):
        parse(PretrainConfig, {"train": {"epoch": 3}})
    with pytest.raises(EmsslError, match="batch_size"):
        parse(PretrainConfig, {"train": {"batch_size": "many"}})
    with pytest.raises(EmsslError, match=r"optim\.lr"):
        parse(PretrainConfig, {"optim": {"lr": 1.0}})


def test_rates_that_yaml_reads_as_words_are_numbers() -> None:
    config = parse(PretrainConfig, {"optim": {"base_lr": "3e-4", "betas": [0.9, 0.99]}})
    assert config.optim == OptimConfig(base_lr=3e-4, betas=(0.9, 0.99))


def test_half_precision_on_the_cpu(tmp_path: Path) -> None:
    assert "fp16 needs a GPU" in refused(tmp_path, train={"precision": "fp16"})


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(log_every: int, tmp_path: Path) -> None:
    original, steps = Pretraining.loss, 0

    def loss(self: Any, model: Any, batch: Any, epoch: int) -> Any:
        nonlocal steps
        steps += 1
        value, figures = original(self, model, batch, epoch)
        return value * float("nan") if steps == 12 else value, figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, "loss", loss)
        message = refused(tmp_path, train={"log_every": log_every})
    assert "--optim.base_lr" in message
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["epoch-00001"]
    assert not (tmp_path / "run/backbone").exists()


def test_weights_that_the_last_update_ruined_are_not_saved(tmp_path: Path) -> None:
    def ruin(self: Any, progress: float) -> None:
        if progress == pytest.approx(18 / 27):
            self.model.mask_token.data.fill_(float("inf"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, "after_step", ruin)
        refused(tmp_path)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["epoch-00001"]


def test_too_few_images_for_one_micro_step_each(tmp_path: Path) -> None:
    with pytest.raises(EmsslError, match="10 training images for 16"):
        train = {"batch_size": 32, "accumulation": 16}
        finetune(finetune_config(tmp_path / "run", labels_per_class=1, train=train))
