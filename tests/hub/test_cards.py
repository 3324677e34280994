"""Model cards: made from the record of a run, valid on the Hub, and silent about a user's paths."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from emssl_hf import api

NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
TRAIN = {"epochs": 1, "batch_size": 8, "save_every": 0}


@pytest.fixture
def runs(micrograph_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    model = {"size": "tiny", "image_size": 32, "patch_size": 8}
    pretrained = api.pretrain(
        micrograph_folder,
        tmp_path / "mae",
        method="mae",
        train=TRAIN,
        model={**model, "options": {**NARROW, **DECODER}},
    )
    tuned = api.finetune(
        micrograph_folder, tmp_path / "classes", init=pretrained / "backbone", train=TRAIN, model=model
    )
    return pretrained, tuned


def test_cards_tell_what_the_run_recorded(runs: tuple[Path, Path], tmp_path: Path) -> None:
    pretrained, tuned = (ModelCard.load(run / "README.md") for run in runs)
    assert pretrained.data.pipeline_tag == "image-feature-extraction"
    assert (
        "He, Kaiming" in pretrained.text and "reconstructions.png" in pretrained.text and "24 images" in pretrained.text
    )
    assert tuned.data.pipeline_tag == "image-classification"
    metrics = {result.metric_type: result.metric_value for result in tuned.data.eval_results}
    assert set(metrics) == {"accuracy", "f1"} and f"accuracy {100 * metrics['accuracy']:.1f} %" in tuned.text
    assert all(name in tuned.text for name in ("bright", "dark", "striped"))
    for run in runs:
        text = (run / "README.md").read_text()
        assert str(tmp_path) not in text and "{{" not in text


def test_snippets_of_the_cards_run(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for run in runs:
        code = (run / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        monkeypatch.chdir(run)
        image = next((run.parent / "micrographs" / "bright").glob("*.png"))
        exec(compile(code.replace("micrograph.png", str(image)), str(run), "exec"), {})
