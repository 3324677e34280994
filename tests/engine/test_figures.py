"""Metrics, intervals, probes and collapse alarms against hand-computed values and known limits."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from emssl_hf.engine import probe
from emssl_hf.engine.metrics import classification_figures
from emssl_hf.engine.statistics import first_epoch, interval


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_classification_figures_by_hand() -> None:
    truth, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    figures = classification_figures(predicted, truth, 4)
    assert figures["accuracy"] == pytest.approx(4 / 6)
    # F1 of class 0: precision 2/3, recall 2/3; class 1: 2/3 and 1; class 2: nothing found.
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert figures["confusion"] == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert figures["recall"] == [0.6667, 1.0, 0.0, 0.0]


def test_the_interval_is_students() -> None:
    values = [0.71, 0.74, 0.69, 0.75]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    figure = interval(values)
    assert figure["mean"] == pytest.approx(np.mean(values)) and figure["values"] == values
    assert figure["ci95"] == pytest.approx((high - low) / 2)
    assert interval([0.7]) == {"mean": 0.7, "ci95": None, "values": [0.7]}
    assert interval([0.5, 0.5])["ci95"] == 0


def test_the_first_epoch_that_reaches_the_mark() -> None:
    curve = [(1, 0.2), (2, 0.5), (3, 0.4), (4, 0.6)]
    assert [first_epoch(curve, mark) for mark in (0.1, 0.5, 0.55, 0.7)] == [1, 2, 4, None]


def test_the_collapse_alarm_is_one_for_isotropic_and_zero_for_collapsed_features() -> None:
    assert probe.feature_std(normal(4000, 64)) == pytest.approx(1, abs=0.02)
    assert probe.feature_std(normal(1, 64).expand(100, -1)) == pytest.approx(0, abs=1e-6)
    line = normal(4000, 1) * normal(1, 64, seed=1)  # two points once normalised: not collapsed, but of rank one
    assert probe.effective_rank(line) == pytest.approx(1, abs=1e-3)


def test_the_effective_rank_of_a_known_spectrum() -> None:
    basis = torch.linalg.qr(normal(200, 4) - normal(200, 4).mean(0))[0]
    spectrum = torch.tensor([4.0, 2.0, 1.0, 1.0])
    shares = spectrum / 8
    expected = math.exp(-float((shares * shares.log()).sum()))
    features = basis @ torch.diag(spectrum) @ torch.linalg.qr(normal(16, 4, seed=2))[0].T
    assert probe.effective_rank(features) == pytest.approx(expected, rel=1e-3)
    assert probe.effective_rank(normal(5000, 8)) == pytest.approx(8, rel=0.01)


def clusters(count: int, seed: int, spread: float = 0.15) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 3
    return torch.eye(3, 12)[labels] + spread * normal(count, 12, seed=seed), labels


def test_knn_and_linear_probe_separate_what_is_separable() -> None:
    (bank, labels), (queries, truth) = clusters(90, 0), clusters(60, 1)
    assert torch.equal(probe.knn(bank, labels, queries), truth)
    parts = dict.fromkeys(("cls", "mean"), (bank, queries))
    parts["mean"] = (normal(90, 12, seed=5), normal(60, 12, seed=6))  # tells nothing
    train, held = ({pool: parts[pool][i] for pool in parts} for i in (0, 1))
    found = probe.linear_probe(train, labels.numpy(), held, truth.numpy(), held)
    assert found.pool == "cls" and found.validation_accuracy == 1
    assert (found.predicted == truth.numpy()).all()


def test_knn_finds_nothing_where_there_is_nothing() -> None:
    truth = torch.arange(900) % 3
    predicted = probe.knn(normal(900, 12), truth, normal(900, 12, seed=1))
    assert abs(float((predicted == truth).float().mean()) - 1 / 3) < 5 * math.sqrt(2 / 9 / 900)


def test_knn_weighs_votes_by_similarity() -> None:
    """One neighbour at cosine 1 outvotes two at 0.9 when the temperature is low, and not when it is high."""
    side = math.sqrt(1 - 0.9**2)
    bank = torch.tensor([[1.0, 0.0], [0.9, side], [0.9, -side]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]])
    assert math.exp(1 / 0.07) > 2 * math.exp(0.9 / 0.07)
    assert probe.knn(bank, labels, query, k=3, temperature=0.07).item() == 0
    assert probe.knn(bank, labels, query, k=3, temperature=1.0).item() == 1
    assert probe.knn(bank, labels, query, k=1, temperature=1.0).item() == 0
