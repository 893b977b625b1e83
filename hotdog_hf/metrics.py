"""The numbers of a classifier as an `evaluate.Metric` that needs no network."""

import datasets
import evaluate
import numpy as np
from sklearn import metrics as sk

# Names of the metrics as the Hub lists them, and as people read them.
CARD_METRICS = {
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "roc_auc": "ROC-AUC",
    "average_precision": "Average precision",
}


class ClassificationReport(evaluate.Metric):
    """Accuracy and friends from probabilities, for two classes or more.

    `compute(predictions=[N, classes] probabilities, references=[N] label indices)` returns accuracy, the mean
    log-loss and the confusion matrix (rows: true class). `positive_label`, chosen by name, adds that class's
    precision, recall, F1, ROC-AUC and average precision; with more than two classes, or without a positive
    class, their unweighted (macro) means over all classes stand there as `macro_...`. Values are
    scikit-learn's; a precision or recall with nothing to divide by is 0.
    """

    def __init__(self, label_names: list[str], positive_label: str | None = None, **kwargs: object):
        self.label_names, self.positive_label = list(label_names), positive_label
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        probabilities = datasets.Sequence(datasets.Value("float32"), length=len(self.label_names))
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=datasets.Features(predictions=probabilities, references=datasets.Value("int64")),
        )

    def _compute(self, predictions: list, references: list, **_: object) -> dict:
        scores, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        scores /= scores.sum(axis=1, keepdims=True)  # float32 rows sum to 1 only roughly
        chosen, every = scores.argmax(axis=1), range(len(self.label_names))
        values = {
            "accuracy": float(sk.accuracy_score(labels, chosen)),
            "loss": float(sk.log_loss(labels, scores, labels=every)),
        }
        columns = [_one_class(labels == index, chosen == index, scores[:, index]) for index in every]
        if self.positive_label is not None:
            values |= columns[self.label_names.index(self.positive_label)]
        if self.positive_label is None or len(columns) > 2:
            values |= {
                f"macro_{key}": float(np.mean([column[key] for column in columns])) for key in columns[0]
            }
        return values | {"confusion_matrix": sk.confusion_matrix(labels, chosen, labels=every).tolist()}


def quality(scores: dict, start: dict | None = None) -> list[float]:
    """Return what makes one epoch better than another: a lower log-loss.

    It tells epochs apart where accuracy, on a few photos, counts some by chance. No epoch is better than the
    `start`, a solved head's scores, that is less accurate.
    """
    return [float(start is None or scores["accuracy"] >= start["accuracy"]), -scores["loss"]]


def _one_class(truth: np.ndarray, chosen: np.ndarray, score: np.ndarray) -> dict[str, float]:
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        truth, chosen, average="binary", zero_division=0
    )
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "roc_auc": float(sk.roc_auc_score(truth, score)),
        "average_precision": float(sk.average_precision_score(truth, score)),
    }
