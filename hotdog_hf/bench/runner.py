"""The benchmark's measurements: interleaved, repeated, saved after each one."""

import contextlib
import datetime
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from hotdog_hf.bench.page import QUIET_LOAD, write_report
from hotdog_hf.bench.processes import MeasurementError
from hotdog_hf.bench.sections import SECTIONS, Variant
from hotdog_hf.bench.setup import Setup, commit_of
from hotdog_hf.errors import UserError, message_of
from hotdog_hf.files import write_json


class Results:
    """All results so far, in a file that is written atomically after each one."""

    def __init__(self, file: Path, facts: dict, sections: list[str]) -> None:
        """Starts the `sections` again; others are kept if the file has the same `facts`.

        A file with other facts is renamed to `before-<name>`.
        """
        self.file, self.content = file, {"facts": json.loads(json.dumps(facts)), "measurements": []}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads(file.read_text(encoding="utf-8"))
            if before["facts"] == self.content["facts"]:
                kept = [row for row in before["measurements"] if row["section"] not in sections]
                self.content["measurements"] = kept
            elif before["measurements"]:
                old = file.replace(file.with_name(f"before-{file.name}"))
                print(f"{file} was of another machine or other flags: it is now {old}")
        write_json(self.file, self.content)

    def add(self, variant: Variant, number: int, by: dict, numbers: dict) -> None:
        """Save the results of one measurement, and its origin."""
        row = {"section": variant.section, "variant": variant.name, "round": number, **by, **numbers}
        self.content["measurements"].append(row)
        write_json(self.file, self.content)


def plan(setup: Setup, sections: list[str], repeats: int) -> dict[str, list[tuple[Variant, int]]]:
    """Return each section's variants and rounds, interleaved: A B C A B C."""
    planned = {}
    for name in sections:
        variants = SECTIONS[name](setup)
        turns = [(variant, number) for number in range(repeats) for variant in variants]
        planned[name] = [(variant, number) for variant, number in turns if number == 0 or not variant.once]
    return planned


def measure(setup: Setup, variant: Variant, number: int) -> dict:
    """Measure once, in a temporary folder; return its results, or an `error` if it failed."""
    name = re.sub(r"\W+", "-", f"{variant.section}-{variant.name}-{number}")
    folder = setup.work / name
    folder.mkdir()
    try:
        return variant.measure(folder, number)
    except MeasurementError as error:
        return {"error": message_of(UserError(str(error)))}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # Caches of the recipes stay, for the variants of the same round that use them.
        shutil.rmtree(setup.work / "cache" / name, ignore_errors=True)


def measure_load() -> float:
    """Return the load average, with a warning if other work runs on this machine."""
    if (load := os.getloadavg()[0]) > QUIET_LOAD:
        print(f"warning: the load average is {load:.2f}: other work on this machine distorts the results")
    return load


def facts_of(setup: Setup, machine: dict, knobs: dict) -> dict:
    """Return what results in one table must have in common: knobs, machine, photos, size."""
    photos = {"train": setup.train, "test": setup.test}
    return knobs | {"machine": machine, **photos, "image_size": setup.image_size}


def measure_all(
    setup: Setup, results: Results, sections: Sequence[str], repeats: int, load: float
) -> tuple[list[str], bool]:
    """Measure the sections in turns, and write the page after each one; Ctrl-C ends it.

    Returns one line per failed measurement, and whether it was interrupted.
    """
    folder, failed = results.file.parent, []
    origin = {"by": shlex.join(["python", *sys.argv]), "commit": commit_of(setup.root), "load": load}
    origin |= {"not_exported": setup.not_exported} if setup.not_exported else {}
    turns = plan(setup, [name for name in SECTIONS if name in sections], repeats)
    try:
        with tqdm(total=sum(map(len, turns.values())), unit="measurement", disable=None) as bar:
            for section, variants in turns.items():
                for variant, number in variants:
                    bar.write(f"{section} {number + 1}/{repeats}: {variant.name}")
                    numbers = measure(setup, variant, number)
                    at = datetime.datetime.now().isoformat(timespec="seconds")
                    results.add(variant, number, origin | {"at": at}, numbers)
                    bar.update()
                    if "error" in numbers:
                        failed.append(f"{section}, {variant.name}: {numbers['error']}")
                        bar.write(f"failed: {failed[-1]}")
                write_report(folder, results.content)
    except KeyboardInterrupt:
        return failed, True
    return failed, False
