"""What an audit found: one self-contained page, a table for the terminal, a list of labels to check."""

import csv
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib import pyplot as plt

import hotdog_hf
from hotdog_hf import templates, webpage
from hotdog_hf.audit import appearance, scores
from hotdog_hf.audit.runner import Audit, copies, differing, suggestions, with_fault
from hotdog_hf.data.check import KINDS
from hotdog_hf.data.images import thumbnail
from hotdog_hf.errors import UserError, printable
from hotdog_hf.files import replacing_file, replacing_folder, writing_to
from hotdog_hf.metrics import MAX_TABLE_CLASSES, most_confused

FILES = ("audit.json", "audit.html")
# Photos shown in a part of the page, and neighbours beside each.
SHOWN = 24
SHOWN_ODD = 12
SHOWN_NEIGHBOURS = 3
SHOWN_FINDINGS = 10
PICTURE, SMALL = 256, 112
TRAINED_HERE = (
    "This network was trained on photos of this folder. On photos that it has learned, the numbers below are"
    " better than they will be on others, and wrong labels may look right."
)
check_output_dir = functools.partial(webpage.check_output_dir, files=FILES, what="an audit")


def write_audit(folder: Path, audit: Audit, network: str, trained_here: bool, command: str) -> None:
    """Write audit.json and audit.html beside `folder` and move them there whole.

    `network` says whose features these are; `trained_here` that it was trained on photos of this folder,
    which makes its numbers too good.
    """
    about = {"network": network, "trained_here": trained_here}
    with writing_to(folder), replacing_folder(folder) as part:
        text = json.dumps(
            {"hotdog_hf": hotdog_hf.__version__, **about, **_summary(audit)}, indent=2, allow_nan=False
        )
        (part / FILES[0]).write_text(text + "\n", encoding="utf-8")
        (part / FILES[1]).write_text(_page(audit, about, command), encoding="utf-8")


def write_fixes(path: str, audit: Audit) -> int:
    """Write photos whose label looks wrong as CSV `path,label,suggested,confidence`; return their number.

    The most suspicious comes first, paths are within the data folder. Raises `UserError` if it cannot be
    written.
    """
    rows = suggestions(audit)
    try:
        # File names in another encoding leave as the bytes they came as.
        with (
            replacing_file(Path(path)) as part,
            part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["path", "label", "suggested", "confidence"])
            writer.writerows([*row[:3], f"{row[3]:.4f}"] for row in rows)
    except OSError as error:
        raise UserError(f"--write-fixes {path} cannot be written: {error.strerror}") from error
    return len(rows)


def describe(audit: Audit, trained_here: bool = False) -> str:
    """Return the table for the terminal: every number with its interval, and what was counted."""
    rows = [TRAINED_HERE] if trained_here else []
    rows += [f"{'with the 95 % interval from low to high':<44}{'value':>8}{'low':>8}{'high':>8}"]
    curve = audit.curve
    for name, entry in (
        ("accuracy to expect (cross-validated probe)", audit.accuracy),
        ("log-loss", audit.loss),
        (f"learning curve: accuracy with {curve.sizes[-1]} photos", curve.accuracies[-1]),
        (f"learning curve: forecast for {2 * curve.sizes[-1]} photos", curve.forecast),
        ("learning curve: gain from twice the photos", curve.gain),
    ):
        rows.append(f"{name:<44}" + "".join(f"{value:8.3f}" for value in entry.values()))
    counts = {
        "photos": len(audit.labels),
        "labels that look wrong": int(audit.suspicious.sum()),
        "photos with copies or near duplicates": sum(map(len, copies(audit.groups))),
        **{f"{fault} photos": len(with_fault(audit, fault)) for fault in ("tiny", "dark", "blurred")},
        "findings of the check": len(audit.findings),
    }
    rows += [f"{name:<44}{count:8}" for name, count in counts.items()]
    rows.append(advice(audit))
    if found := suggestions(audit):
        rows.append(f"photos whose predicted class is not their label: {len(found)}, first:")
    for path, label, suggested, confidence in found[:5]:
        path, label, suggested = map(printable, (path, label, suggested))
        rows.append(f"  {path}: labelled {label}, looks like {suggested} ({confidence:.2f})")
    return "\n".join(rows)


def advice(audit: Audit) -> str:
    """Return what the learning curve means in one sentence."""
    gain = 100 * audit.curve.gain["value"]
    if audit.curve.is_flat:
        return (
            f"Twice the photos would gain {gain:.1f} points of accuracy: more photos will hardly help;"
            " other photos or a better network will."
        )
    return f"Twice the photos would gain about {gain:.1f} points of accuracy."


def _summary(audit: Audit) -> dict:
    curve = audit.curve
    return {
        "data_dir": audit.data_dir,
        "split": audit.split,
        "photos": len(audit.labels),
        "label_names": audit.label_names,
        "accuracy": audit.accuracy,
        "loss": audit.loss,
        "confusion_matrix": audit.confusion,
        "suspicious_labels": [audit.files[i] for i in audit.order if audit.suspicious[i]],
        "learning_curve": {
            **{"sizes": curve.sizes, "accuracies": curve.accuracies, "scale": curve.scale},
            **{"power": curve.power, "floor": curve.floor, "forecast": curve.forecast, "gain": curve.gain},
        },
        "copies": [[audit.files[i] for i in group] for group in copies(audit.groups)],
        "farthest": [audit.files[i] for i in np.argsort(-audit.distances, kind="stable")[:SHOWN_ODD]],
        **{
            fault: [audit.files[i] for i in with_fault(audit, fault)] for fault in ("tiny", "dark", "blurred")
        },
    }


def _page(audit: Audit, about: dict, command: str) -> str:
    wrong = differing(audit)
    groups = copies(audit.groups)
    measures = [
        ("tiny", f"shorter side below {appearance.MIN_SIDE} pixels", "{0.side} pixels"),
        (
            "dark",
            f"95 % of the pixels are at most {appearance.MIN_BRIGHTNESS} of full brightness",
            "brightness {0.brightness:.2f}",
        ),
        (
            "blurred",
            f"variance of the Laplacian below {appearance.MIN_SHARPNESS:g}",
            "sharpness {0.sharpness:.0f}",
        ),
    ]
    faults = []
    for fault, rule, shown in measures:
        found = with_fault(audit, fault)
        pictures = [
            _picture(audit, i) | {"note": shown.format(audit.appearances[i])} for i in found[:SHOWN_ODD]
        ]
        faults.append({"name": fault, "rule": rule, "count": len(found), "pictures": pictures})
    far = np.argsort(-audit.distances, kind="stable")[:SHOWN_ODD]
    return templates.load("audit/page.html.j2", autoescape=True).render(
        about,
        audit=audit,
        title=printable(audit.data_dir),
        names=[printable(name) for name in audit.label_names],
        max_table=MAX_TABLE_CLASSES,
        confused=most_confused(audit.confusion, MAX_TABLE_CLASSES),
        command=printable(command),
        version=hotdog_hf.__version__,
        warning=TRAINED_HERE,
        advice=advice(audit),
        plot=_plot(audit.curve),
        wrong=[_suspect(audit, i) for i in wrong[:SHOWN]],
        wrong_count=len(wrong),
        confident_count=int(audit.suspicious.sum()),
        groups=[[_picture(audit, i) for i in group[:4]] for group in groups[:SHOWN_ODD]],
        group_count=len(groups),
        far=[_picture(audit, i) | {"note": f"distance {audit.distances[i]:.2f}"} for i in far],
        median_distance=float(np.median(audit.distances)),
        faults=faults,
        findings=_findings(audit),
        folds=scores.FOLDS,
        draws=scores.DRAWS,
    )


def _picture(audit: Audit, index: int, size: int = PICTURE) -> dict:
    return {
        "photo": webpage.image_uri(thumbnail(audit.rows[int(index)], size), size),
        "file": printable(audit.files[index]),
        "label": printable(audit.label_names[audit.labels[index]]),
    }


def _suspect(audit: Audit, index: int) -> dict:
    """Return a photo whose label looks wrong, what it looks like, and its nearest neighbours."""
    best = int(audit.probabilities[index].argmax())
    return _picture(audit, index) | {
        "looks_like": printable(audit.label_names[best]),
        "probability": float(audit.probabilities[index, best]),
        "confident": bool(audit.suspicious[index]),
        "given": float(audit.probabilities[index, audit.labels[index]]),
        "neighbours": [_picture(audit, i, SMALL) for i in audit.neighbours[index][:SHOWN_NEIGHBOURS]],
    }


def _findings(audit: Audit) -> list[dict]:
    """Return every kind of the check's findings with its number and first messages."""
    found = []
    for kind, (severity, title) in KINDS.items():
        messages = [printable(finding.message) for finding in audit.findings if finding.kind == kind]
        if messages:
            shown = messages[:SHOWN_FINDINGS]
            found.append({"severity": severity, "title": title, "count": len(messages), "messages": shown})
    return found


def _plot(curve: scores.LearningCurve) -> Markup:
    """Draw the learning curve: measured points with intervals, the fit, and the forecast."""

    def learning_curve(axes: plt.Axes) -> None:
        x = np.geomspace(curve.sizes[0], 2 * curve.sizes[-1], 100)
        axes.plot(x, curve.accuracy(x), color=webpage.SERIES[0], linewidth=1.2)
        _points(axes, curve.sizes, curve.accuracies, webpage.SERIES[0])
        _points(axes, [2 * curve.sizes[-1]], [curve.forecast], webpage.SERIES[1])
        axes.set(xscale="log", xlabel="Training photos", ylabel="Accuracy on held-out photos")
        ticks = [*curve.sizes, 2 * curve.sizes[-1]]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)

    return webpage.svg(learning_curve)


def _points(axes: plt.Axes, sizes: Iterable[int], entries: Iterable[dict], colour: str) -> None:
    for size, entry in zip(sizes, entries, strict=True):
        axes.plot([size, size], [entry["low"], entry["high"]], color=colour, linewidth=3, alpha=0.5)
        axes.plot(size, entry["value"], "o", color=colour, markersize=5)
