"""The study's page: the chapter's questions, answered from the results."""

import math
from pathlib import Path

from hotdog_hf import templates
from hotdog_hf.files import write_text
from hotdog_hf.study.plan import CHOICE_FRACTION
from hotdog_hf.study.results import (
    Result,
    choices_table,
    mcnemar,
    rate_factor,
    rates_table,
    summaries,
    write_results,
)

PICTURES = ("curves.png", "intervals.png", "rates.png")


def answers(rows: dict[str, dict], results: list[Result], zero: dict | None) -> list[tuple[str, str]]:
    """Return the chapter's questions that the runs can answer, each with its answer."""
    said = []
    if {"finetune", "scratch"} <= rows.keys():
        tuned_row, scratch = rows["finetune"], rows["scratch"]
        said.append(
            (
                "Does fine-tuning beat training from scratch for the same epochs?",
                f"Fine-tuned, the network classifies {_percent(tuned_row)} of the test photos correctly; from"
                f" scratch, {_percent(scratch)}. {_verdict(scratch, 'training from scratch')}",
            )
        )
    rates = [result for result in results if result.run.experiment == "rates"]
    if rates:
        said.append(("Exercise 1: what if the learning rate keeps rising?", _rates_answer(rates)))
    chosen = {result.run.name: result for result in _tuned(results)}
    if len(chosen) == 2:
        pretrained, scratch = chosen["tuned-finetune"], chosen["tuned-scratch"]
        said.append(
            (
                "Exercise 2: does the comparison hold when both are tuned?",
                f"With the rate and the weight decay that validation chose for each ({_knobs(pretrained)};"
                f" {_knobs(scratch)}), fine-tuning reaches {pretrained.test['accuracy']:.1%} on the test"
                f" photos and training from scratch {scratch.test['accuracy']:.1%}."
                f" {_paired_sentence(mcnemar(pretrained, scratch), 'fine-tuned', 'from scratch')}",
            )
        )
    if "frozen" in rows:
        said.append(
            (
                "Exercise 3: what if the body is not trained?",
                f"With the body frozen and only the output layer trained, without augmentation, the accuracy"
                f" is {_percent(rows['frozen'])}. {_verdict(rows['frozen'], 'that')}",
            )
        )
    if "class-vector" in rows:
        vector = rows["class-vector"]
        before = "" if vector["before"] is None else f"{vector['before']:.1%} before any training and "
        shot = (
            ""
            if zero is None
            else f" The source alone, by the probability of its class, reaches {zero['accuracy']:.1%}"
            f" (ROC-AUC {zero['roc_auc']:.3f}), with a threshold from train."
        )
        said.append(
            (
                "Exercise 4: how well does ImageNet's own weight vector do?",
                f"An output layer made of the source classifier's rows reaches {before}"
                f"{_percent(vector)} after it.{shot} {_verdict(vector, 'starting from the class vector')}",
            )
        )
    return said


def _tuned(results: list[Result]) -> list[Result]:
    """Return the runs that a grid chose, without those that diverged on all of train."""
    return [result for result in results if result.run.name.startswith("tuned-") and not result.diverged]


def _percent(row: dict) -> str:
    return f"{row['mean']:.1%}" + (f" (mean of {row['seeds']} seeds)" if row["seeds"] > 1 else " (one seed)")


def _verdict(row: dict, what: str) -> str:
    """Return the paired difference from fine-tuning in words."""
    difference, bounds = row["difference"], row["difference_interval"]
    if difference is None:
        return "There is no fine-tuned run of the same seed to compare with."
    points = f"{abs(difference) * 100:.1f} points {'better' if difference > 0 else 'worse'} than fine-tuning"
    if bounds is None:
        return f"Here {what} was {points}, with one seed ({_mcnemar_text(row['mcnemar'])})."
    low, high = (value * 100 for value in bounds)
    shown = "more than the seeds vary" if low > 0 or high < 0 else "which may be chance"
    return f"Here {what} is {points} (95 % interval {low:+.1f} to {high:+.1f}), {shown}."


def _mcnemar_text(test: dict) -> str:
    return (
        f"alone correct on {test['only_this']} and {test['only_finetune']} photos,"
        f" McNemar p = {test['p']:.2g}"
    )


def _paired_sentence(test: dict, ours: str, theirs: str) -> str:
    return (
        f"Only {ours} was correct on {test['only_this']} photos and only {theirs} on {test['only_finetune']}"
        f" (McNemar p = {test['p']:.2g})."
    )


def _knobs(result: Result) -> str:
    return f"rate {result.run.config.optim.learning_rate:g}, decay {result.run.config.optim.weight_decay:g}"


def _rates_answer(rates: list[Result]) -> str:
    whole = sorted((result for result in rates if not result.diverged), key=rate_factor)
    broken = sorted(rate_factor(result) for result in rates if result.diverged)
    breaks = [f"from {broken[0]:g} times the book's rate on the loss diverges"] if broken else []
    if not whole:
        return f"{breaks[0].capitalize()}."

    def say(result: Result) -> str:
        factor = rate_factor(result)
        rate = "the book's own rate" if math.isclose(factor, 1) else f"{factor:g} times the book's"
        return f"{rate} gives {result.test['accuracy']:.1%}"

    best = max(range(len(whole)), key=lambda index: whole[index].test["accuracy"])
    # Of the rates above the best one: the next, and the highest.
    told = [say(result) for result in (whole[best + 1 : best + 2] + whole[best + 2 :][-1:])] + breaks
    end = f"Beyond it, {', '.join(told)}" if told else "No higher rate was tried"
    return f"The best test accuracy of the sweep: {say(whole[best])}. {end}."


def write_study(study_dir: Path, results: list[Result], zero: dict | None, facts: dict) -> None:
    """Write `README.md` and `results.csv` of the study; `facts` holds the rest of the template's values."""
    rows = summaries(results)
    template = templates.load(
        "study/page.md.j2",
        percent=lambda value: "" if value is None else f"{value:.1%}",
        points=lambda pair: "" if pair is None else f"{pair[0] * 100:.1f} to {pair[1] * 100:.1f}",
    )
    text = template.render(
        rows=rows.values(),
        answers=answers(rows, results, zero),
        zero=zero,
        rates=rates_table(results),
        grid=choices_table(results, "grid"),
        tuned=_tuned(results),
        variants=choices_table(results, "variants"),
        choice_fraction=CHOICE_FRACTION,
        minutes=round(sum(result.rows[-1]["seconds"] for result in results if result.rows) / 60),
        pictures=[name for name in PICTURES if (study_dir / name).is_file()],
        **facts,
    )
    write_text(study_dir / "README.md", text)
    write_results(study_dir / "results.csv", results)
