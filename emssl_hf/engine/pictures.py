"""Pictures that a run leaves behind."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from emssl_hf.augment import to_unit
from emssl_hf.data.store import Store
from emssl_hf.randomness import sample_keys, uniform


@torch.no_grad()
def reconstruction_sheet(
    model: Any, store: Store, mean: float, std: float, file: Path, *, images: int = 6, seed: int = 0
) -> None:
    """Original, masked input and reconstruction side by side, one micrograph per row."""
    rows = np.linspace(0, len(store) - 1, min(images, len(store))).astype(int)
    stored, _ = store.gather(rows)
    pixels = ((to_unit(stored) - mean) / std).expand(-1, model.config.num_channels, -1, -1)
    keys = sample_keys(seed, 0, torch.as_tensor(rows))
    draws = {name: uniform(keys, count, name) for name, count in model.draws(model.config).items()}
    painted, masked, mask = model.reconstruct(pixels, **draws)
    columns = [
        (pixels, "micrograph"),
        (torch.where(mask > 0, torch.nan, masked), "what the encoder sees"),
        (painted, "reconstruction"),
    ]
    figure, axes = plt.subplots(len(rows), 3, figsize=(6, 2.05 * len(rows)), squeeze=False)
    for column, (images_, title) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=9)
        for row in range(len(rows)):
            axis = axes[row, column]
            darkest, brightest = pixels[row, 0].quantile(torch.tensor([0.01, 0.99])).tolist()
            axis.imshow(images_[row, 0], cmap=_grey(), vmin=darkest, vmax=brightest)
            axis.axis("off")
    figure.text(0.5, 0.005, _caption(model), ha="center", fontsize=7, color="0.35")
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _grey() -> Any:
    return plt.get_cmap("gray").with_extremes(bad="#d9e2ec")


def _caption(model: Any) -> str:
    if getattr(model.config, "norm_pix_loss", False):
        return "Hidden patches are shown with their true mean and contrast, which the model does not predict."
    if getattr(model.config, "norm_image_loss", False):
        return "Shown with the image's true mean and contrast, which the model does not predict."
    return "Predicted as raw pixels."
