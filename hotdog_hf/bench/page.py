"""The benchmark's report: medians, ratios per round, targets met or not, a page and pictures."""

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hotdog_hf import templates
from hotdog_hf.bench.sections import LIMIT
from hotdog_hf.files import write_text

# Title of each section, and the unit of its `value`.
TITLES = {
    "training": ("Training, whole epochs", "photos/s"),
    "accuracy": ("Seconds to the chapter's accuracy", "s"),
    "cache": ("Epochs after the first, photos decoded in each or once", "photos/s"),
    "simulated": ("Training on a simulated device", "share of the time that it works"),
    "frozen": ("An epoch after the first, with a frozen body", "s"),
    "prediction": ("Prediction on a folder", "photos/s"),
    "memory": ("Peak memory by size of the data set", "MiB"),
    "processes": ("Processes on one machine", "photos/s"),
    "startup": ("Start-up", "s"),
    "profile": ("Where the time goes", "s"),
    "exact": ("The same results with every way of loading", ""),
}
# Sections that also measure exported models.
EXPORTING = ("prediction", "startup")
# Above this, other work was running when the benchmark started.
QUIET_LOAD = 0.5
ACTIVITIES = ("decode", "augment", "forward", "backward", "step", "evaluation", "waiting", "other")


@dataclass(frozen=True)
class Spread:
    """A median with the minimum, the maximum and the number of values."""

    median: float
    low: float
    high: float
    count: int

    def scaled(self, digits: Callable[[float], str]) -> str:
        """Return the text of a table cell."""
        if self.count == 1:
            return digits(self.median)
        return f"{digits(self.median)} ({digits(self.low)} to {digits(self.high)})"


def spread(values: list[float]) -> Spread | None:
    """Return the spread of some values, or None without values."""
    if not values:
        return None
    return Spread(float(np.median(values)), min(values), max(values), len(values))


class Measured:
    """The measurements of results.json by section, variant and round."""

    def __init__(self, rows: list[dict]) -> None:
        """Sorts the rows; those of failed measurements are kept separately."""
        self.failures = [row for row in rows if "error" in row]
        self.by: dict[str, dict[str, dict[int, dict]]] = {}
        for row in rows:
            variants = self.by.setdefault(row["section"], {}).setdefault(row["variant"], {})
            if "error" not in row:
                variants[row["round"]] = row

    def variants(self, section: str) -> list[str]:
        """Return the names of a section's variants that have a result."""
        return [name for name, rounds in self.by.get(section, {}).items() if rounds]

    def values(self, section: str, variant: str) -> dict[int, float]:
        """Return the value of each round."""
        rounds = self.by.get(section, {}).get(variant, {})
        if section == "accuracy":
            return _seconds_to_accuracy(self.by.get("accuracy", {}), variant)
        return {number: row["value"] for number, row in rounds.items()}

    def spread(self, section: str, variant: str) -> Spread | None:
        """Return the spread of a variant's values."""
        return spread(list(self.values(section, variant).values()))

    def ratio(self, section: str, one: str, other: str) -> Spread | None:
        """Return the spread of one / other, each pair from the same round."""
        ones, others = self.values(section, one), self.values(section, other)
        return spread([ones[number] / others[number] for number in ones if number in others])

    def rows(self, section: str, variant: str) -> list[dict]:
        """Return all measurements of a variant, one dict per round."""
        return list(self.by.get(section, {}).get(variant, {}).values())


def _seconds_to_accuracy(variants: dict[str, dict[int, dict]], variant: str) -> dict[int, float]:
    """Return by round the seconds until a recipe reached the final accuracy of the chapter's.

    That is the mean over the rounds, as a single seed may be far from it. The chapter's own seconds are those
    to its end, as nobody can know that a seed reaches its mean accuracy earlier.
    """
    rounds = variants.get(variant, {})
    if variant == "chapter":
        return {number: row["curve"][-1][0] for number, row in rounds.items()}
    goal = chapter_accuracy(variants)
    times = {
        number: [seconds for seconds, value in row["curve"] if goal is not None and value >= goal]
        for number, row in rounds.items()
    }
    return {number: reached[0] for number, reached in times.items() if reached}


def chapter_accuracy(variants: dict[str, dict[int, dict]]) -> float | None:
    """Return the mean final accuracy of the chapter's recipe, or None if it was not measured."""
    ends = [row["test_accuracy"] for row in variants.get("chapter", {}).values()]
    return float(np.mean(ends)) if ends else None


@dataclass(frozen=True)
class Target:
    """A measured ratio or value, and its target."""

    text: str
    found: Spread
    bound: float
    at_least: bool
    # Rounds that were measured: if one of them has no value, the target is missed.
    rounds: int = 0

    @property
    def met(self) -> bool:
        """Return whether the median meets the target."""
        if self.found.count < self.rounds:
            return False
        return self.found.median >= self.bound if self.at_least else self.found.median <= self.bound


def targets(measured: Measured) -> list[Target]:
    """Return the targets for which everything was measured."""
    found: list[tuple] = []

    def ratio(text: str, section: str, one: str, other: str, bound: float, at_least: bool = True) -> None:
        found.append((text, measured.ratio(section, one, other), bound, at_least))

    # On a GPU ours uses bf16 if it can, unlike the plain loop.
    ours = "ours, float32" if "ours, float32" in measured.variants("training") else "ours"
    for plain in dict.fromkeys(["plain loop", fastest(measured, "training", "plain loop")]):
        ratio(f"training, whole job: {ours} / {plain}", "training", ours, plain, 1.3)
    ratio("training: ours / limit in memory", "training", "ours", LIMIT, 0.95)
    ratio("photos decoded once, epochs after the first: ours / limit", "cache", "decoded once", LIMIT, 0.9)
    for name in measured.variants("simulated"):
        found.append((f"simulated, {name}: share", measured.spread("simulated", name), 0.9, True))
    rounds = len(measured.rows("accuracy", "chapter"))
    for name in ("probe", "light"):
        if reached := measured.ratio("accuracy", "chapter", name):
            text = (
                f"seconds to the chapter's accuracy: chapter / {name}, reached in {reached.count} of {rounds}"
            )
            found.append((text, reached, 30, True, rounds))
    ratio(
        "frozen body, epochs after the first: plain / ours",
        "frozen",
        "plain frozen loop",
        "ours, features cached",
        50,
    )
    if pipeline := fastest(measured, "prediction", "transformers"):
        for ours, least in (("ours, torch", 1.5), ("ours, ONNX", 1.5), ("ours, ONNX int8", 2.0)):
            ratio(f"prediction: {ours} / {pipeline}", "prediction", ours, pipeline, least)
    grown = [name for name in measured.variants("memory") if name != "1x"]
    largest = max(grown, key=lambda name: int(name[:-1]), default=None)
    if largest:
        ratio(f"peak memory: {largest} / 1x", "memory", largest, "1x", 1.1, at_least=False)
    helps = {
        name: measured.spread("startup", name)
        for name in measured.variants("startup")
        if name.endswith("--help")
    }
    if helps:
        slowest = max(helps, key=lambda name: helps[name].median)
        found.append((f"the slowest --help, of {slowest.split()[0]}, in seconds", helps[slowest], 1.0, False))
    for kind in ("chapter", "frozen"):
        if (difference := greatest_difference(measured, kind)) is not None:
            text = f"largest difference of a final metric, {EXACT_PAIRS[kind]}"
            found.append((text, Spread(difference, difference, difference, 1), 0.0, False))
    return [Target(*facts) for facts in found if facts[1] is not None]


EXACT_PAIRS = {"chapter": "0 or 2 loader processes", "frozen": "features cached or not"}


def fastest(measured: Measured, section: str, prefix: str) -> str | None:
    """Return the variant with that prefix with the most photos per second."""
    names = [name for name in measured.variants(section) if name.startswith(prefix)]
    return max(names, key=lambda name: measured.spread(section, name).median, default=None)


def greatest_difference(measured: Measured, kind: str) -> float | None:
    """Return the largest difference between the final metrics of a recipe's runs, if there are two."""
    runs = [
        row["metrics"]
        for name in measured.variants("exact")
        if name.startswith(kind)
        for row in measured.rows("exact", name)
    ]
    if len(runs) < 2:
        return None
    flat = [np.hstack([np.ravel(run[name]) for name in sorted(runs[0])]).astype(float) for run in runs]
    return float(np.max(np.ptp(np.stack(flat), axis=0)))


def digits(value: float) -> str:
    """Format a number with three significant digits."""
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:#.3g}".rstrip(".")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def table(measured: Measured, section: str, baseline: str | None) -> list[dict]:
    """Return a section's rows: the variant, its value, and its ratio to the baseline."""
    rows = []
    for name in measured.variants(section):
        found = measured.spread(section, name)
        compared = measured.ratio(section, name, baseline) if baseline else None
        accuracies = [row["test_accuracy"] for row in measured.rows(section, name) if "test_accuracy" in row]
        rows.append(
            {
                "name": name,
                "value": found.scaled(digits) if found else "not reached",
                "count": found.count if found else 0,
                "measured": len(measured.rows(section, name)),
                "ratio": compared.scaled(digits) if compared and name != baseline else "",
                "accuracy": f"{np.median(accuracies):.3f}" if accuracies else "",
                "in_all": _median_text(measured.rows(section, name), "seconds_in_all"),
            }
        )
    return rows


def _median_text(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows if key in row]
    return digits(float(np.median(values))) if values else ""


def baseline_of(measured: Measured, section: str) -> str | None:
    """Return the variant that the others of a section are compared with."""
    names = {
        "training": "plain loop",
        "accuracy": "chapter",
        "frozen": "plain frozen loop",
        "prediction": fastest(measured, "prediction", "transformers"),
        "cache": LIMIT,
        "memory": "1x",
        "processes": "1 process",
    }
    return names.get(section)


def activities(measured: Measured) -> dict[str, float]:
    """Return the median seconds of an epoch by activity of the main thread."""
    rows = measured.rows("profile", "an epoch")
    return {
        name: float(np.median([row["seconds_by"].get(name, 0.0) for row in rows]))
        for name in ACTIVITIES
        if rows
    }


def agreement(measured: Measured) -> dict[str, str]:
    """Return for each predictor on how many photos its label equals ours."""
    ours = measured.rows("prediction", "ours, torch")
    said = {}
    for name in measured.variants("prediction"):
        rows = measured.rows("prediction", name)
        if ours and rows:
            pairs = list(zip(ours[0]["labels"], rows[0]["labels"], strict=True))
            said[name] = f"{sum(one == other for one, other in pairs)} of {len(pairs)}"
    return said


def write_report(folder: Path, results: dict) -> str:
    """Write README.md and the pictures of results.json; return the targets as text."""
    measured, facts = Measured(results["measurements"]), results["facts"]
    sections = [name for name in TITLES if measured.variants(name)]
    pictures = {name: draw(folder, measured, name) for name in sections if name != "exact"}
    exports = [row for row in results["measurements"] if row["section"] in EXPORTING]
    text = templates.load("bench/page.md.j2").render(
        facts=facts,
        titles=TITLES,
        sections=sections,
        tables={name: table(measured, name, baseline_of(measured, name)) for name in sections},
        baselines={name: baseline_of(measured, name) for name in sections},
        pictures=pictures,
        targets=[
            dataclasses.asdict(target) | {"met": target.met, "value": target.found.scaled(digits)}
            for target in targets(measured)
        ],
        digits=digits,
        agreement=agreement(measured),
        activities=activities(measured),
        profile=next(iter(measured.rows("profile", "an epoch")), None),
        memory=next((measured.rows("memory", name)[0] for name in measured.variants("memory")), None),
        photos_in={name: measured.rows("memory", name)[0]["photos"] for name in measured.variants("memory")},
        differences={kind: greatest_difference(measured, kind) for kind in EXACT_PAIRS},
        exact_pairs=EXACT_PAIRS,
        first_epochs={
            name: _median_text(measured.rows("cache", name), "first_epoch")
            for name in ("decoded in every epoch", "decoded once")
        },
        goal=chapter_accuracy(measured.by.get("accuracy", {})),
        failures=measured.failures,
        not_exported=next((row["not_exported"] for row in exports if row.get("not_exported")), None),
        rounds=sorted({row["round"] for row in results["measurements"]}),
        runs=list(dict.fromkeys((row["by"], row["commit"]) for row in results["measurements"])),
        load=max((row["load"] for row in results["measurements"]), default=0.0),
        quiet_load=QUIET_LOAD,
        flame=(folder / "flame.svg").is_file(),
        date=datetime.date.today().isoformat(),
    )
    write_text(folder / "README.md", text)
    return describe(measured)


def describe(measured: Measured) -> str:
    """Return the targets as lines to print."""
    return "\n".join(
        f"{'met    ' if target.met else 'not met'}  {target.text}: {target.found.scaled(digits)}"
        f" ({'>=' if target.at_least else '<='} {target.bound:g})"
        for target in targets(measured)
    )


# Pictures.


def draw(folder: Path, measured: Measured, section: str) -> str:
    """Draw a section's picture into the folder; return its name."""
    import matplotlib

    matplotlib.use("Agg")  # no window, even if there is a display
    from matplotlib import pyplot as plt

    name = f"{section}.png"
    title, unit = TITLES[section]
    if section == "profile":
        figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
        if parts := activities(measured):
            _stacked_bar(axes, parts)
            figure.legend(ncols=4, fontsize=9, frameon=False, loc="outside lower center")
    else:
        variants = [name for name in measured.variants(section) if measured.spread(section, name)]
        figure, axes = plt.subplots(figsize=(8, 0.9 + 0.34 * len(variants)), layout="constrained")
        # Ratios of a hundred need a logarithmic axis, on which bars would have no origin.
        logarithmic = section in ("accuracy", "frozen")
        _spreads(axes, variants, [measured.spread(section, name) for name in variants], logarithmic)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(unit + (", logarithmic" if axes.get_xscale() == "log" else ""))
    figure.savefig(folder / name, dpi=130)
    plt.close(figure)
    return name


def _spreads(axes: object, names: list[str], spreads: list[Spread], logarithmic: bool) -> None:
    """Draw one bar (or dot) per variant, with its minimum and maximum, the first at the top."""
    medians = np.array([found.median for found in spreads])
    reach = np.array([[found.median - found.low, found.high - found.median] for found in spreads]).T
    colours = ["tab:orange" if name.startswith(("ours", "probe", "light")) else "tab:blue" for name in names]
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.errorbar(medians, names, xerr=reach, fmt="none", ecolor="gray", capsize=3)
        axes.scatter(medians, names, c=colours, s=50, zorder=3)
        axes.grid(axis="x", alpha=0.4)
    else:
        axes.barh(names, medians, xerr=reach, color=colours, capsize=3, height=0.65)
    for row, found in enumerate(spreads):
        text, place = digits(found.median), (found.high, row)
        axes.annotate(text, place, (7, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.15 if logarithmic else 0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _stacked_bar(axes: object, parts: dict[str, float]) -> None:
    """Draw one bar of parts, labelled with their shares."""
    total, left = sum(parts.values()), 0.0
    for number, (name, seconds) in enumerate(parts.items()):
        label = f"{name} {seconds / total:.0%}"
        axes.barh([0], [seconds], left=left, color=f"C{number}", label=label, height=0.6)
        left += seconds
    axes.set_yticks([])
    axes.margins(x=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
