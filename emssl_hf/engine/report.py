"""From the run folders of a study to report.json, report.md and its pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from emssl_hf.engine.config import StudyConfig, short_name
from emssl_hf.engine.frozen import FrozenProbe
from emssl_hf.engine.run_folder import read_metrics, read_summary
from emssl_hf.engine.statistics import first_epoch, interval
from emssl_hf.models import load_objective

#: Colours that stay apart for colour-blind readers (Okabe and Ito 2008); scratch is grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SCRATCH = "#555555"


def write_report(config: StudyConfig, facts: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Write report.json, report.md and the pictures into the study's folder; returns what report.json holds."""
    folder = config.output_dir
    report = {
        "dataset": facts["dataset"],
        "labels_per_class": config.labels_per_class,
        "seeds": list(config.seeds),
        "facts": facts,
        "scratch_recipe": recipe,
        "methods": {method: figures_of(config, method) for method in ["scratch", *config.methods]},
        "random_weights": _probe_figures(config, "random"),
    }
    if config.scratch_long:
        report["scratch_long"] = _long_run(folder / "finetune" / "scratch-long")
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    curves_picture(config, folder / "curves.png")
    confusion_picture(config, facts["classes"], folder / "confusion.png")
    for method in config.methods:
        sheet = folder / short_name(method) / "reconstructions.png"
        if sheet.exists():
            shutil.copy(sheet, folder / f"reconstructions_{short_name(method)}.png")
    (folder / "report.md").write_text(_markdown(config, report))
    return report


def figures_of(config: StudyConfig, method: str) -> dict[str, Any]:
    """The figures of one method over the seeds; gains are paired with scratch's run of the same seed."""
    runs = _runs(config, method)
    tests = [read_summary(run)["test"] for run in runs]
    scratch = [read_summary(run) for run in _runs(config, "scratch")]
    marks = [_curve(run)[-1][1] for run in _runs(config, "scratch")]
    reached = [first_epoch(_curve(run), mark) for run, mark in zip(runs, marks, strict=True)]
    gains = [test["accuracy"] - other["test"]["accuracy"] for test, other in zip(tests, scratch, strict=True)]
    figures: dict[str, Any] = {
        "validation_accuracy": float(np.mean([read_summary(run)["validation_accuracy"] for run in runs])),
        "accuracy": interval([test["accuracy"] for test in tests]),
        "macro_f1": interval([test["macro_f1"] for test in tests]),
        "gain": interval(gains),
        "epochs_to_scratch": None if None in reached else float(np.mean(reached)),  # type: ignore[arg-type]
        "epochs_to_scratch_values": reached,
        "confusion": np.sum([test["confusion"] for test in tests], axis=0).tolist(),
        "finetune_seconds": float(np.mean([read_summary(run)["seconds"] for run in runs])),
        "pretrain_images_per_s": None,
    }
    if method != "scratch":
        summary = read_summary(config.output_dir / short_name(method))
        figures |= _probe_figures(config, method)
        figures["title"] = summary["method"]
        figures["pretrain_seconds"] = summary["seconds"]
        rates = [
            line["images_per_s"]
            for line in read_metrics(config.output_dir / short_name(method))
            if line["kind"] == "train"
        ]
        figures["pretrain_images_per_s"] = float(np.median(rates))
        figures["pretrain_epochs"] = read_metrics(config.output_dir / short_name(method))[-1]["epoch"]
    return figures


def _probe_figures(config: StudyConfig, method: str) -> dict[str, Any]:
    probe = read_summary(FrozenProbe(config, method).output_dir)
    return {
        "linear_probe": interval(probe["linear"]),
        "linear_probe_all_labels": interval(probe["linear_all"] if method == "random" else probe["linear_all"][:1]),
        "knn": interval(probe["knn"]),
        "linear_probe_features": probe["linear_pool"],
        "knn_k": probe["k"],
    }


def _long_run(run: Path) -> dict[str, Any]:
    summary = read_summary(run)
    return {
        "epochs": _curve(run)[-1][0],
        "accuracy": summary["test"]["accuracy"],
        "macro_f1": summary["test"]["macro_f1"],
        "seconds": summary["seconds"],
    }


def _runs(config: StudyConfig, method: str) -> list[Path]:
    return [config.output_dir / "finetune" / f"{short_name(method)}-{seed}" for seed in config.seeds]


def _curve(run: Path) -> list[tuple[int, float]]:
    """(epoch, validation accuracy) of a fine-tuning run."""
    return [(line["epoch"], line["validation_accuracy"]) for line in read_metrics(run) if line["kind"] == "eval"]


def _title(method: str) -> str:
    return "scratch" if method == "scratch" else load_objective(method).title


def _colours(config: StudyConfig) -> dict[str, str]:
    return {"scratch": SCRATCH, **dict(zip(config.methods, PALETTE, strict=False))}


def curves_picture(config: StudyConfig, file: Path) -> None:
    """Validation accuracy over fine-tuning epochs: mean over the seeds, and the range as a band."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for method, colour in _colours(config).items():
        curves = [_curve(run) for run in _runs(config, method)]
        epochs = [epoch for epoch, _ in curves[0]]
        values = 100 * np.array([[value for _, value in curve] for curve in curves])
        axis.plot(epochs, values.mean(0), color=colour, label=_title(method), lw=2)
        axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
    if config.scratch_long:
        curve = np.array(_curve(config.output_dir / "finetune" / "scratch-long"))
        axis.axhline(100 * curve[:, 1].max(), color=SCRATCH, ls=":", lw=1.2)
        label = f"scratch, best of {int(curve[-1, 0])} epochs"
        across = axis.get_yaxis_transform()  # x in shares of the axis, y in %
        axis.text(0.01, 100 * curve[:, 1].max(), label, transform=across, fontsize=8, color=SCRATCH, va="bottom")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="fine-tuning epoch", ylabel="validation accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9")
    axis.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=140)
    plt.close(figure)


def confusion_picture(config: StudyConfig, classes: list[str], file: Path) -> None:
    """Confusion matrices of the test split, summed over the seeds, each row as shares of its true class."""
    methods = ["scratch", *config.methods]
    short = [" ".join(name.split("_")[:2]) for name in classes]
    figure, axes = plt.subplots(1, len(methods), figsize=(3.1 * len(methods) + 1.6, 4.6), sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        matrix = np.sum([read_summary(run)["test"]["confusion"] for run in _runs(config, method)], axis=0)
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(_title(method), fontsize=11)
        axis.set_xticks(range(len(classes)), short, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(classes)), short, fontsize=8)
        for row, column in np.argwhere(shares >= 0.05):
            dark = shares[row, column] > 0.5
            text = f"{100 * shares[row, column]:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if dark else "0.2")
    axes[0, 0].set_ylabel("true class")
    figure.supxlabel("predicted class; numbers are % of the true class", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=140, bbox_inches="tight")
    plt.close(figure)


def _percent(figure: dict[str, Any], sign: bool = False) -> str:
    mean = f"{100 * figure['mean']:+.1f}" if sign else f"{100 * figure['mean']:.1f}"
    return mean if figure["ci95"] is None else f"{mean} ± {100 * figure['ci95']:.1f}"


def _row(method: str, figures: dict[str, Any], transductive: bool) -> list[str]:
    reached = figures["epochs_to_scratch"]
    rate = figures["pretrain_images_per_s"]
    title = figures.get("title", method)
    return [
        f"{title}, transductive" if transductive and method != "scratch" else title,
        _percent(figures["accuracy"]),
        "" if method == "scratch" else _percent(figures["gain"], sign=True),
        _percent(figures["macro_f1"]),
        "not reached" if reached is None else f"{reached:.0f}",
        _percent(figures["linear_probe_all_labels"]) if "linear_probe" in figures else "",
        _percent(figures["linear_probe"]) if "linear_probe" in figures else "",
        _percent(figures["knn"]) if "knn" in figures else "",
        "" if rate is None else f"{rate:,.0f}",
        f"{figures['pretrain_seconds']:.0f} s" if "pretrain_seconds" in figures else "",
    ]


_HEAD = [
    "start", "accuracy, %", "gain over scratch", "macro-F1, %", "epochs to scratch's final accuracy",
    "linear probe, all labels, %", "linear probe, %", "kNN, %", "pretraining, images/s", "pretraining time",
]  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown(config: StudyConfig, report: dict[str, Any]) -> str:
    facts = report["facts"]
    rows = [_row(name, figures, facts["transductive"]) for name, figures in report["methods"].items()]
    random = report["random_weights"]
    probes = [_percent(random[name]) for name in ("linear_probe_all_labels", "linear_probe", "knn")]
    rows.append(["random weights", "", "", "", "", *probes, "", ""])
    if "scratch_long" in report:
        long = report["scratch_long"]
        rows.append([f"scratch, {long['epochs']} epochs (one seed)", f"{100 * long['accuracy']:.1f}", "",
                     f"{100 * long['macro_f1']:.1f}", "", "", "", "", "", ""])  # fmt: skip
    budget = config.labels_per_class
    labels = "all labels" if budget is None else f"{budget} labelled images per class"
    sections = [
        f"# Self-supervised pretraining on {facts['dataset']}, {labels}",
        _warning(facts),
        _table(_HEAD, rows),
        _reading(config, report),
        "## Convergence\n\n![Validation accuracy over fine-tuning epochs](curves.png)",
        "## Confusion\n\n![Confusion matrices of the test split](confusion.png)",
        *_reconstructions(config),
        _protocol(config, report),
        _next(config, report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _warning(facts: dict[str, Any]) -> str:
    lines = []
    if facts["dataset"] == "synthsem":
        lines.append(
            "> Synthetic images: these figures show that the software works and say nothing about your microscope."
        )
    if facts["transductive"]:
        lines.append("> Transductive: pretraining saw the validation and test images, without their labels.")
    return "\n>\n".join(lines)


def _reading(config: StudyConfig, report: dict[str, Any]) -> str:
    epochs = read_metrics(_runs(config, "scratch")[0])[-1]["epoch"]
    return (
        f"Test accuracy after {epochs} epochs of fine-tuning, mean ± 95 % interval (Student's t) over seeds "
        f"{', '.join(map(str, config.seeds))}; a seed draws the labels, the head, the order and the augmentation, and "
        "gains are paired by seed. There is one pretraining per method, so the intervals do not cover its seed. "
        "Epochs to scratch's final accuracy: when validation accuracy first reaches that of the scratch run with the "
        "same seed at its end. Linear probe and kNN use frozen features and the same labels; 'all labels' means every "
        "training label."
    )


def _reconstructions(config: StudyConfig) -> list[str]:
    found = [m for m in config.methods if (config.output_dir / f"reconstructions_{short_name(m)}.png").exists()]
    return [
        f"## Reconstructions, {_title(m)}\n\n![Reconstructions by {_title(m)}](reconstructions_{short_name(m)}.png)"
        for m in found
    ]


def _protocol(config: StudyConfig, report: dict[str, Any]) -> str:
    facts = report["facts"]
    counts = ", ".join(f"{name} {count:,}" for name, count in facts["counts"].items())
    return "\n".join(
        [
            "## Protocol",
            "",
            f"- Images: {counts}. Pretraining saw {facts['images']:,} images, without labels; images or specimens that "
            f"it shares with validation or test: {facts['overlap']}.",
            "- The model of each run is the one with the best validation accuracy; the test split is scored once, by "
            "it. Features and penalty of the linear probe, and k of kNN, are chosen on validation.",
            "- Every setting stands in `run.yaml` here and in each run's folder; `report.json` holds every figure.",
            "- All methods share one fine-tuning recipe. Scratch has its own, the best on validation of "
            f"{len(config.scratch)} candidate(s) with seed {config.seeds[0]}:",
            "",
            _candidates(config, report["scratch_recipe"]),
        ]
    )


def _candidates(config: StudyConfig, recipe: dict[str, Any]) -> str:
    reached = recipe["validation_accuracy"] or [None] * len(config.scratch)
    rows = [
        [
            f"{number}, chosen" if number == recipe["chosen"] else f"{number}",
            f"`{json.dumps(settings)}`",
            "not compared" if value is None else f"{100 * value:.1f}",
        ]
        for number, (settings, value) in enumerate(zip(config.scratch, reached, strict=True))
    ]
    return _table(["candidate", "differs in", "validation accuracy, %"], rows)


def _next(config: StudyConfig, report: dict[str, Any]) -> str:
    best = max(config.methods, key=lambda method: report["methods"][method]["validation_accuracy"])
    return (
        "## Next\n\n```\n"
        f"emssl predict {config.output_dir / short_name(best) / 'classifier'} FOLDER --output predictions.csv\n"
        f"emssl embed {config.output_dir / short_name(best) / 'backbone'} FOLDER --output features.parquet\n"
        "emssl study --config study_vit_tiny --data.path FOLDER_WITH_CLASSES --output_dir runs/mine\n```"
    )
