"""The recipes side by side on several folders of photos: which one wins where."""

import json
from pathlib import Path

import numpy as np
import scipy.stats
from accelerate import Accelerator

from hotdog_hf import files, templates
from hotdog_hf.config import command_of
from hotdog_hf.data.folder import describe_counts
from hotdog_hf.errors import UserError
from hotdog_hf.study.plan import COMPARED, ReproduceConfig
from hotdog_hf.study.results import write_results
from hotdog_hf.study.runner import Study, plan_study, train_missing
from hotdog_hf.training import launch
from hotdog_hf.training.run_dir import resume_command


def compare_folders(
    config: ReproduceConfig, accelerator: Accelerator, stop: launch.StopSignal
) -> UserError | None:
    """Train every recipe on every folder, and write the page; return the error of a run that failed."""
    # All folders are opened first, so that a mistake in the last one is found before any training.
    studies = [plan_study(config, accelerator, data_dir) for data_dir in config.data_dir]
    for study in studies:
        accelerator.print(f"\n{study.photos.data_dir}")
        failure = train_missing(study, accelerator, stop)
        if failure or stop.number:
            break
    if accelerator.is_main_process and studies[0].results:
        write(studies, accelerator)
    return failure


def compared(study: Study) -> list[dict]:
    """Return one row per recipe that has finished on a folder, the best first: scores, seconds, rank.

    Scores are means over the seeds. The interval is Wilson's over the test photos, not over seeds. The rank
    goes by accuracy, and by log-loss if that is equal.
    """
    rows = []
    for recipe in COMPARED:
        results = [result for result in study.results if result.run.name == recipe and not result.diverged]
        if not results:
            continue
        accuracy, loss, seconds = np.mean(
            [(r.test["accuracy"], r.test["loss"], r.rows[-1]["seconds"]) for r in results], axis=0
        )
        photos = sum(study.photos.counts()["test"].values())
        interval = scipy.stats.binomtest(round(accuracy * photos), photos).proportion_ci(method="wilson")
        rows.append(
            {
                "recipe": recipe,
                "seeds": len(results),
                "accuracy": accuracy,
                "low": interval.low,
                "high": interval.high,
                "loss": loss,
                "seconds": seconds,
                "command": command_of(results[0].run.config),
                "chosen": [chosen for result in results if (chosen := _chosen(result.folder))],
            }
        )
    rows.sort(key=lambda row: (-row["accuracy"], row["loss"]))
    return [row | {"rank": rank} for rank, row in enumerate(rows, start=1)]


def _chosen(folder: Path) -> str | None:
    """Return what the recipe "best" chose in a run's folder; None for another recipe."""
    file = folder / "choice.json"
    return json.loads(file.read_text(encoding="utf-8"))["chosen"] if file.exists() else None


def overall(tables: list[list[dict]]) -> list[dict]:
    """Return each recipe's mean rank over the folders, and its points behind the best at worst, best first.

    Of folders on which all recipes have finished.
    """
    whole = [table for table in tables if len(table) == len(COMPARED)]
    rows = []
    for recipe in COMPARED if whole else ():
        own = [next(row for row in table if row["recipe"] == recipe) for table in whole]
        behind = [table[0]["accuracy"] - row["accuracy"] for table, row in zip(whole, own, strict=True)]
        lowest = [row["loss"] <= min(r["loss"] for r in table) for table, row in zip(whole, own, strict=True)]
        rows.append(
            {
                "recipe": recipe,
                "rank": np.mean([row["rank"] for row in own]),
                "behind": max(behind),
                "best": sum(row["rank"] == 1 for row in own),
                "lowest_loss": sum(lowest),
            }
        )
    return sorted(rows, key=lambda row: (row["rank"], row["behind"]))


def write(studies: list[Study], accelerator: Accelerator) -> None:
    """Write the page, and one CSV line per run; print where they are."""
    folder, left = Path(studies[0].folder), sum(len(study.queue) for study in studies)
    tables = [compared(study) for study in studies]
    page = templates.load("study/comparison.md.j2").render(
        command=resume_command(folder),
        folders=[
            {"name": study.photos.data_dir, "counts": describe_counts(study.photos.counts()), "rows": table}
            for study, table in zip(studies, tables, strict=True)
        ],
        overall=overall(tables),
        seeds=studies[0].config.seeds,
        hardware=launch.describe_hardware(accelerator),
        versions=launch.describe_versions(),
        missing=left,
    )
    results = [result for study in studies for result in study.results]
    with files.writing_to(folder):
        files.write_text(folder / "README.md", page)
        write_results(folder / "results.csv", results)
    print(f"\n{folder}/README.md: {len(results)} runs{f', {left} still to come' if left else ''}")
