"""The metrics of a classifier as an `evaluate.Metric` that needs no network."""

import sys
from collections.abc import Sequence

import datasets
import numpy as np

from hotdog_hf.metrics import balanced_scores, class_scores, log_loss

# evaluate's Evaluator, which is not used here, imports the pipelines of transformers if they are installed:
# 2 seconds and 250 MB in every process.
hidden = "transformers" not in sys.modules
if hidden:
    sys.modules["transformers"] = None
try:
    import evaluate
finally:
    if hidden:
        del sys.modules["transformers"]


class ClassificationReport(evaluate.Metric):
    """Accuracy and related metrics from probabilities, for two or more classes.

    `compute(predictions=[N, classes] probabilities, references=[N] label indices)` returns accuracy, the mean
    log-loss, both also as the mean over classes of each class's own (`balanced_...`; the accuracy is then the
    macro recall), and the confusion matrix (rows: true class). `positive_label`, chosen by name, adds that
    class's precision, recall, F1, ROC-AUC and average precision; with more than two classes, or without a
    positive class, their unweighted (macro) means over all classes stand there as `macro_...`. Values are
    scikit-learn's, areas up to rounding; a precision or recall with nothing to divide by is 0.
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

    def _build_data_dir(self) -> str:
        # Everything is in memory. evaluate would create a folder in the home, which may be read-only.
        return ""

    def compute(
        self, *, predictions: Sequence | None = None, references: Sequence | None = None, **kwargs: object
    ) -> dict:
        """Return the metrics of these predictions, or of all that `add_batch` has collected."""
        if predictions is None or references is None:
            return super().compute(predictions=predictions, references=references, **kwargs)
        # evaluate would turn every number into a Python object first: 14 s and 1.1 GB for 10,000 photos of
        # 1,000 classes.
        return self._compute(np.asarray(predictions, dtype=np.float32), references)

    def _compute(self, predictions: list, references: list, **_: object) -> dict:
        from sklearn import metrics as sk  # seconds to import, and not needed before the first step

        scores, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        scores /= scores.sum(axis=1, keepdims=True)  # float32 rows sum to 1 only roughly
        chosen, every = scores.argmax(axis=1), np.arange(len(self.label_names))
        values = {
            "accuracy": float(sk.accuracy_score(labels, chosen)),
            "loss": log_loss(scores, labels),
            **{name: float(value[0]) for name, value in balanced_scores(scores, labels).items()},
        }
        columns = class_scores(scores, labels)
        if self.positive_label is not None:
            index = self.label_names.index(self.positive_label)
            values |= {key: float(column[index, 0]) for key, column in columns.items()}
        if self.positive_label is None or len(every) > 2:
            values |= {f"macro_{key}": float(np.mean(column)) for key, column in columns.items()}
        return values | {"confusion_matrix": sk.confusion_matrix(labels, chosen, labels=every).tolist()}
