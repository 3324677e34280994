"""Run folder -> model card: everything that it says comes from the run's own record."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from emssl_hf import __version__
from emssl_hf.engine.run_folder import read_summary
from emssl_hf.models import load_objective
from emssl_hf.recipes import shipped

NFFA_LIMITS = "NFFA-EUROPE is one instrument in one laboratory: results on it do not show how the model does elsewhere."
SYNTHETIC_LIMITS = (
    "SynthSEM is procedural. These weights show that the software works; they say nothing about real micrographs."
)
OTHER_LIMITS = "Trained on the images named above; nothing is known about other instruments, detectors or materials."


def write_card(run: Path) -> Path:
    """README.md of a finished run folder; returns its path."""
    recipe, summary = yaml.safe_load((run / "run.yaml").read_text()), read_summary(run)
    describe = _pretrained if summary["job"] == "pretrain" else _finetuned
    template = _environment().get_template("model.md.j2")
    card = template.render(version=__version__, limits=_limits(recipe), **describe(run, recipe, summary))
    file = run / "README.md"
    file.write_text(card, encoding="utf-8")
    return file


def _environment() -> Environment:
    loader = FileSystemLoader(shipped("templates", "model_cards"))
    return Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _pretrained(run: Path, recipe: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    objective = load_objective(recipe["method"])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        license=_licence(recipe),
        tags=["electron-microscopy", "self-supervised-learning", Path(recipe["method"]).stem],
    )
    transductive = " The images include validation and test images: figures made with it are transductive."
    return {
        "metadata": data.to_yaml(),
        "title": f"{run.name}: a vision transformer pretrained by {objective.title} on micrographs",
        "opening": f"A plain `ViTModel`, pretrained without labels by [{objective.title}]({objective.paper}) on "
        f"{summary['images']:,} images of {_data_name(recipe)}." + (transductive if summary["split"] == "all" else ""),
        "snippet": "from transformers import AutoImageProcessor, AutoModel\n\n"
        'model = AutoModel.from_pretrained("backbone")\n'
        'processor = AutoImageProcessor.from_pretrained("backbone")',
        "facts": _facts(run, recipe, summary, "backbone"),
        "results": "",
        "picture": "reconstructions.png" if (run / "reconstructions.png").exists() else "",
        "citation": objective.citation,
    }


def _finetuned(run: Path, recipe: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    test, budget = summary["test"], recipe["labels_per_class"]
    labels = "all labels" if budget is None else f"{budget} labelled images per class"
    results = (
        []
        if test is None
        else [
            EvalResult(
                "image-classification", "image-folder", _data_name(recipe), name, test[key], dataset_split="test"
            )
            for name, key in (("accuracy", "accuracy"), ("f1", "macro_f1"))
        ]
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license=_licence(recipe),
        model_name=run.name,
        eval_results=results or None,
        tags=["electron-microscopy"],
    )
    start = recipe["model"]["init"]
    return {
        "metadata": data.to_yaml(),
        "title": f"{run.name}: a classifier of micrographs",
        "opening": f"A plain `ViTForImageClassification` of {len(summary['classes'])} classes, trained on {labels} of "
        f"{_data_name(recipe)}, {'from pretrained weights' if start else 'from scratch'}.",
        "snippet": "from transformers import pipeline\n\n"
        'classify = pipeline("image-classification", "classifier")\n'
        'print(classify("micrograph.png"))',
        "facts": _facts(run, recipe, summary, "classifier"),
        "results": "" if test is None else _results(summary["classes"], test),
        "picture": "",
        "citation": "",
    }


def _results(classes: list[str], test: dict[str, Any]) -> str:
    rows = [f"| {name} | {100 * recall:.1f} |" for name, recall in zip(classes, test["recall"], strict=True)]
    head = f"accuracy {100 * test['accuracy']:.1f} %, macro-F1 {100 * test['macro_f1']:.1f} %"
    return f"Test split, scored once: {head}. One run, one seed.\n\n| class | recall, % |\n|---|---|\n" + "\n".join(
        rows
    )


def _licence(recipe: dict[str, Any]) -> str:
    """Ours for weights trained here; that of the weights they start from, as far as their card says, otherwise."""
    start = recipe["model"]["init"]
    if not start:
        return "apache-2.0"
    cards = [folder / "README.md" for folder in (Path(start), Path(start).parent)]
    known = [ModelCard.load(card).data.license for card in cards if card.is_file()]
    return next((licence for licence in known if licence), "other")


def _facts(run: Path, recipe: dict[str, Any], summary: dict[str, Any], product: str) -> list[tuple[str, str]]:
    weights = run / product / "model.safetensors"
    train, optim = recipe["train"], recipe["optim"]
    return [
        ("data", _data_name(recipe)),
        ("images", f"{summary['images']:,}"),
        ("epochs, effective batch", f"{train['epochs']}, {summary['batch_size']}"),
        ("learning rate (base), weight decay", f"{optim['base_lr']}, {optim['weight_decay']}"),
        ("time", f"{summary['seconds']:.0f} s"),
        ("pixel mean and standard deviation", f"{summary['mean']:.4f}, {summary['std']:.4f}"),
        ("SHA-256 of the weights", f"`{hashlib.sha256(weights.read_bytes()).hexdigest()}`"),
    ]


def _data_name(recipe: dict[str, Any]) -> str:
    """The data set by name; of a folder only the last part, so that no card tells a user's paths."""
    return Path(recipe["data"]["path"]).name


def _limits(recipe: dict[str, Any]) -> str:
    name = _data_name(recipe).lower()
    return SYNTHETIC_LIMITS if name == "synthsem" else NFFA_LIMITS if "nffa" in name else OTHER_LIMITS
