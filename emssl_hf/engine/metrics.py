"""Classification figures as `evaluate` metrics that work without a network."""

from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

_FEATURES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
_CITATION = "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12 (2011)"


class Accuracy(evaluate.Metric):
    """Share of images whose class is right."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation=_CITATION, features=_FEATURES)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(evaluate.Metric):
    """Mean of the classes' F1 scores, each class counting the same however rare it is."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation=_CITATION, features=_FEATURES)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0))}


def classification_figures(predicted: NDArray[np.int64], truth: NDArray[np.int64], classes: int) -> dict[str, Any]:
    """Accuracy, macro-F1, recall per class and the confusion matrix (rows: truth) as plain numbers."""
    both = evaluate.combine([Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)])
    matrix = confusion_matrix(truth, predicted, labels=range(classes))
    recall = matrix.diagonal() / np.maximum(matrix.sum(1), 1)
    return {
        **both.compute(predictions=predicted, references=truth),
        "recall": recall.round(4).tolist(),
        "confusion": matrix.tolist(),
    }
