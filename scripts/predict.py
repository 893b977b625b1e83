"""Classify images: a label and the probability of every class.

python scripts/predict.py runs/demo/model photo.jpg my/photos 'more/**/*.png'   # files, folders, patterns
find . -name '*.jpg' | python scripts/predict.py runs/demo/model - --format csv > predictions.csv
python scripts/predict.py model.onnx my/photos --format jsonl --threshold 0.9   # an exported model, no torch
python scripts/predict.py runs/demo/model my/photos --reject   # unknown: unlike the training photos
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from hotdog_hf.errors import UserError, exit_on_user_error, message_of


@dataclass(frozen=True)
class PredictConfig:
    """Predict the class of images. Exit code 1: some could not be read; they are named on stderr."""

    # Folder of a saved model (model/ of a run), a name on the Hub, or a .onnx file made by scripts/export.py.
    model: Annotated[str, Positional, tyro.conf.arg(metavar="MODEL")]
    # Image files, folders (searched recursively), quoted patterns, or - for paths on stdin, one per line.
    paths: Annotated[list[str], Positional, tyro.conf.arg(metavar="PATH...")]
    # A table for people; one JSON object per line, or CSV with a header, for programs.
    format: Literal["table", "jsonl", "csv"] = "table"
    # Choose the positive class if its probability is at least this. Unset: choose the most probable class.
    threshold: float | None = None
    # Also print the classes that together hold the true one for this share of photos like the held-out ones,
    # such as 0.95 (split conformal prediction). Needs a model of a probe or of --recipe best, or one that was
    # trained with validation photos.
    coverage: float | None = None
    # Label a photo `unknown` if it is unlike all photos that the model was trained on, and print its distance
    # to them. Needs the features that a training keeps with its model.
    reject: bool = False
    # With --reject: the share of photos like the held-back ones that keep their answer. Lower catches more.
    keep: float = 0.95
    # Mean of the probabilities of each photo and of its mirror image (test-time augmentation), at twice the
    # time: often slightly better, unless photos mean something else in a mirror.
    tta: Literal["none", "flip"] = "none"
    # Class that --threshold applies to. Unset: "hotdog" if it is one of two classes.
    positive_label: str | None = None
    # Precision: float32 (no), or bf16, up to twice as fast on GPUs and CPUs that support it, with slightly
    # different probabilities.
    precision: Literal["no", "bf16"] = "no"
    # Images per forward pass.
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("PATH... is missing: give image files, folders, patterns, or -")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold must be from 0 to 1, got {self.threshold}")
        if self.coverage is not None and not 0 < self.coverage < 1:
            raise ValueError(f"--coverage must be between 0 and 1, got {self.coverage}")
        if self.coverage is not None and self.tta != "none":
            raise ValueError("--coverage does not go with --tta: its promise was fitted without")
        if not 0 < self.keep < 1:
            raise ValueError(f"--keep must be between 0 and 1, got {self.keep}")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")


def main(config: PredictConfig) -> int:
    """Load the model, predict, print; return the exit code."""
    # Imported here so that --help and a mistyped flag respond before numpy and torch are loaded.
    import signal
    import sys

    from tqdm import tqdm

    from hotdog_hf.model.calibration import set_limit
    from hotdog_hf.model.predictor import (
        decision_rule,
        format_header,
        format_prediction,
        load_predictor,
        predict_paths,
    )

    predictor = load_predictor(config.model, config.precision, config.tta)
    choose = decision_rule(predictor.label_names, config.positive_label, config.threshold)
    limit = config.coverage and set_limit(predictor.calibration, config.coverage, config.model)
    farthest = predictor.distance_limit(config.keep, config.model) if config.reject else None
    # Ctrl-C and `| head` end it at once, without a traceback.
    for name in {"SIGINT", "SIGPIPE"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    # File names in another encoding are written as the bytes they were read as.
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")

    exit_code = 0
    if header := format_header(config.format, predictor.label_names, limit is not None, config.reject):
        print(header, flush=True)
    results = predict_paths(predictor, config.paths, choose, config.batch_size, limit, farthest)
    # None lets tqdm decide: a bar on a terminal, unless the predictions themselves appear there.
    for result in tqdm(results, unit="img", leave=False, disable=sys.stdout.isatty() or None):
        if isinstance(result, UserError):
            tqdm.write(f"error: {message_of(result)}", file=sys.stderr)
            exit_code = 1
        else:
            print(format_prediction(config.format, result), flush=True)
    return exit_code


if __name__ == "__main__":
    with exit_on_user_error():
        raise SystemExit(main(tyro.cli(PredictConfig)))
