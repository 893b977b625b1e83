"""A report from start to end: load, predict, score, write."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

GALLERY_SIZE = 12


def galleries(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, list[int]]:
    """Return which photos are looked at: the most confident mistakes, and the least certain answers."""
    chosen, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    mistakes = [int(i) for i in np.argsort(-sure, kind="stable") if chosen[i] != labels[i]]
    unsure = np.argsort(sure, kind="stable")[:GALLERY_SIZE].tolist()
    return {"mistakes": mistakes[:GALLERY_SIZE], "unsure": unsure}


def run_knobs(model: str) -> list[tuple[str, str, object]]:
    """Return group, name and value of every knob of the run that a model folder lies in; none elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((Path(model).resolve().parent / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and "recipe" in config:  # else it is something else's config.json
            groups = {name: value for name, value in config.items() if isinstance(value, dict)}
            return [("", "recipe", config["recipe"])] + [
                (group, *knob) for group, knobs in groups.items() for knob in knobs.items()
            ]
    return []


def validation_cut(knobs: Sequence[tuple[str, str, object]], data_dir: str) -> tuple[float, int]:
    """Return the share of train that a run of these knobs held back, and its seed; none of other photos."""
    knob = {name: value for _, name, value in knobs}
    if "data_dir" in knob and Path(knob["data_dir"]).resolve() == Path(data_dir).resolve():
        return knob["val_fraction"], knob["seed"]
    return 0.0, 0
