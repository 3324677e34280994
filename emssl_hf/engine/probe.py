"""What frozen features tell: kNN, linear probe, and alarms for collapse."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import ViTModel

from emssl_hf.augment import to_unit
from emssl_hf.data.store import Store

Pool = Literal["cls", "mean"]


@torch.no_grad()
def extract(
    model: ViTModel,
    store: Store,
    *,
    mean: float,
    std: float,
    batch_size: int = 256,
    rows: range | None = None,
) -> dict[Pool, Tensor]:
    """Features of stored images that have the model's input size: CLS and the mean over patches, each (N, D) float32.

    `mean` and `std` normalise the pixels as in training. The model is left in the mode it was in.
    """
    device, was_training = model.device, model.training
    model.eval()
    rows = range(len(store)) if rows is None else rows
    parts: dict[Pool, list[Tensor]] = {"cls": [], "mean": []}
    for start in range(rows.start, rows.stop, batch_size):
        images, _ = store.gather(np.arange(start, min(start + batch_size, rows.stop)))
        pixels = (to_unit(images.to(device)) - mean) / std
        tokens = model(pixels.expand(-1, model.config.num_channels, -1, -1)).last_hidden_state
        parts["cls"].append(tokens[:, 0].float().cpu())
        parts["mean"].append(tokens[:, 1:].mean(1).float().cpu())
    model.train(was_training)
    empty = torch.zeros(0, model.config.hidden_size)
    return {pool: torch.cat(found) if found else empty for pool, found in parts.items()}


def knn(bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Weighted nearest neighbours by cosine similarity (Wu et al. 2018, section 3.4); predicted classes (Q,)."""
    bank, queries = (torch.nn.functional.normalize(features, dim=1) for features in (bank, queries))
    classes = int(bank_labels.max()) + 1
    predicted = []
    for chunk in queries.split(1024):
        similarity, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), classes).scatter_add_(
            1, bank_labels[nearest], torch.exp(similarity / temperature)
        )
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def feature_std(features: Tensor) -> float:
    """Mean standard deviation of L2-normalised features times sqrt(D): near 1 when healthy, 0 when collapsed."""
    normalised = torch.nn.functional.normalize(features, dim=1)
    return float(normalised.std(0).mean() * features.shape[1] ** 0.5)


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals(features - features.mean(0))
    shares = values / values.sum()
    return float(torch.exp(-(shares * torch.log(shares.clamp_min(1e-12))).sum()))


@dataclass(frozen=True)
class ProbeResult:
    """A linear probe chosen on validation images: which features, which regularisation, and what it predicts."""

    pool: Pool
    regularisation: float
    validation_accuracy: float
    predicted: NDArray[np.int64]


def linear_probe(
    train: dict[Pool, Tensor],
    train_labels: NDArray[np.int64],
    validation: dict[Pool, Tensor],
    validation_labels: NDArray[np.int64],
    test: dict[Pool, Tensor],
    *,
    grid: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0),
) -> ProbeResult:
    """Logistic regression on frozen features; CLS or mean, and the penalty, are chosen on the validation images."""
    best: ProbeResult | None = None
    for pool in ("cls", "mean"):
        for penalty in grid:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=500))
            probe.fit(train[pool].numpy(), train_labels)
            accuracy = float((probe.predict(validation[pool].numpy()) == validation_labels).mean())
            if best is None or accuracy > best.validation_accuracy:
                best = ProbeResult(pool, penalty, accuracy, probe.predict(test[pool].numpy()))
    assert best is not None
    return best
