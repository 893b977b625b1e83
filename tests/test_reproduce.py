"""The study: every arm on a tiny model, stopping and going on, and its statistics."""

import contextlib
import csv
import dataclasses
import importlib
import io
import re
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, TINY_MODEL, begin, draw_photos, run

from hotdog_hf.config import RECIPES, override, parse_train_config
from hotdog_hf.data.loaders import FeatureDataset
from hotdog_hf.study import comparison, plan
from hotdog_hf.study.page import PICTURES, answers, write_study
from hotdog_hf.study.plan import ARMS, VARIANTS, runs_of
from hotdog_hf.study.results import (
    Result,
    interval,
    mcnemar,
    rates_table,
    read_result,
    summarise,
    tuned,
    write_diverged,
    zero_shot,
)
from hotdog_hf.training import launch, loop


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study-photos")
    draw_photos(folder / "train", {"hotdog": 11, "not-hotdog": 12})
    draw_photos(folder / "test", {"hotdog": 6, "not-hotdog": 5})
    return folder


@pytest.fixture(scope="module")
def command(photos, tiny_weights):
    """The words of a small study; more flags are added."""
    model = ("--model", TINY_MODEL, "--weights", tiny_weights, "--image-size", 64, "--num-threads", 1)
    return (ROOT / "scripts/reproduce.py", "--data-dir", photos, *model, "--epochs", 1)


@pytest.fixture(scope="module")
def studied(photos, tiny_weights, tmp_path_factory):
    """All experiments with two seeds, the long ones cut short, in this process; and what was printed."""
    study_dir, said = tmp_path_factory.mktemp("study") / "reproduce", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.syspath_prepend(ROOT / "scripts")
        patch.setattr(sys, "argv", ["scripts/reproduce.py"])
        patch.setattr(loop, "draw_figures", lambda *_: None)  # of each run: they take half of the time
        patch.setattr(plan, "RATE_FACTORS", (1.0, 30.0))
        patch.setattr(plan, "GRID_FACTORS", (1.0,))
        patch.setattr(plan, "GRID_DECAYS", (0.001, 0.01))
        patch.setattr(plan, "VARIANTS", {name: VARIANTS[name] for name in ("light", "SGD")})
        reproduce = importlib.import_module("reproduce")
        knobs = {"model": TINY_MODEL, "weights": str(tiny_weights), "image_size": 64, "num_threads": 1}
        where = {"data_dir": (str(photos),), "output_dir": str(study_dir)}
        only = tuple(name for name in plan.EXPERIMENTS if name != "compare")
        everything = reproduce.ReproduceConfig(**where, **knobs, epochs=1, seeds=2, only=only)
        reproduce.main(everything)
    return said.getvalue(), study_dir


def results_of(study_dir):
    with (study_dir / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_arm_stands_in_the_table_and_in_the_answers(studied):
    said, study_dir = studied
    assert re.search(r"== finetune, seed 0; \d+ to go, about \d+ minutes", said)
    text = (study_dir / "README.md").read_text()
    for _, title in ARMS.values():
        assert re.search(rf"^\| {re.escape(title)} \| 2 \| \d+\.\d% \|", text, re.MULTILINE), title
    for question in ("Does fine-tuning beat", "Exercise 1", "Exercise 2", "Exercise 3", "Exercise 4"):
        assert f"**{question}" in text
    for name in ("light", "SGD"):
        assert f"| {name} | 2 | " in text
    for picture in PICTURES:
        assert (study_dir / picture).stat().st_size > 5000 and f"({picture})" in text
    assert "nan" not in text and "None" not in text


def test_a_line_of_the_csv_tells_how_to_train_that_run_alone(studied):
    _, study_dir = studied
    lines = results_of(study_dir)
    assert len(lines) == 6 * 2 + 2 + 4 + 2 + 4
    line = next(line for line in lines if line["run"] == "scratch" and line["seed"] == "1")
    config = parse_train_config(line["command"].split()[3:])
    assert (config.recipe, config.run.seed, config.model.weights) == ("scratch", 1, "none")
    assert float(line["test_accuracy"]) == read_result(None, study_dir / line["folder"]).test["accuracy"]


def test_a_run_of_the_study_ends_as_the_same_run_alone(studied, tmp_path):
    _, study_dir = studied
    line = next(line for line in results_of(study_dir) if line["run"] == "light" and line["seed"] == "1")
    words = line["command"].split()[2:]
    assert run("python", *words, "--output-dir", tmp_path / "alone").returncode == 0
    model = "model/model.safetensors"
    assert (tmp_path / "alone" / model).read_bytes() == (study_dir / line["folder"] / model).read_bytes()


def test_finished_runs_are_not_run_again_and_a_broken_one_is(studied, command):
    _, study_dir = studied
    lines = results_of(study_dir)
    times = {path: path.stat().st_mtime_ns for path in study_dir.glob("*/model/model.safetensors")}
    broken = study_dir / next(line["folder"] for line in lines if line["run"] == "probe")
    (broken / "metrics.jsonl").unlink()
    done = run("python", *command, "--only", "finetune", "probe", "--seeds", 2, "--output-dir", study_dir)
    assert done.returncode == 0, done.stderr
    changed = [path for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed in ([], [broken / "model/model.safetensors"]) and (broken / "metrics.jsonl").is_file()
    assert done.stdout.count("== ") == 1


def test_other_photos_or_knobs_are_another_run(studied, photos):
    run_ = runs_of("finetune", 1, {"data_dir": str(photos)})[0]
    folder = run_.folder(ROOT, {"a.png": [1, 2]}, 1)
    assert folder != run_.folder(ROOT, {"a.png": [1, 3]}, 1) != run_.folder(ROOT, {"a.png": [1, 3]}, 2)
    other = dataclasses.replace(run_, config=override(run_.config, epochs=6))
    assert folder != other.folder(ROOT, {"a.png": [1, 2]}, 1)
    moved = dataclasses.replace(run_, config=override(run_.config, data_dir="elsewhere"))
    assert folder == moved.folder(ROOT, {"a.png": [1, 2]}, 1)


def test_a_stopped_study_says_so_and_resumes(command, tmp_path):
    words = [*command, "--only", "finetune", "--seeds", 1, "--epochs", 15, "--output-dir", tmp_path / "study"]
    process, end = begin("python", *words), time.monotonic() + 120
    while not list(tmp_path.glob("study/*/metrics.jsonl")):  # the first epoch
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "stopped in epoch" in out and "Traceback" not in err
    resumed = run("python", *words)
    assert resumed.returncode == 0, resumed.stderr
    [line] = results_of(tmp_path / "study")
    assert f"resumed from {tmp_path}/study/{line['folder']}" in resumed.stdout
    assert "epoch 1:" not in resumed.stdout and "epoch 15:" in resumed.stdout


def test_a_study_survives_runs_that_diverged(tmp_path):
    same = predictions(tmp_path / "a", [1, 0]).folder
    finetune, scratch = (runs_of(arm, 2, {}) for arm in ("finetune", "scratch"))
    results = [Result(finetune[0], tmp_path / "diverged", []), fake(finetune[1], 0.8, folder=same)]
    results += [fake(run_, 0.7, folder=same) for run_ in scratch]
    row = summarise(results, "scratch")
    assert row["difference"] == pytest.approx(-0.1) and row["mcnemar"]["p"] == 1
    grid = runs_of("grid", 1, {})
    whole = [fake(run_, 0.5, validation=0.5, folder=same) for run_ in grid if "grid-scratch" in run_.name]
    broken = [Result(run_, tmp_path / "diverged", []) for run_ in grid if "grid-finetune" in run_.name]
    assert tuned(broken + whole, "finetune") is None
    chosen = tuned(broken + whole, "scratch")
    for diverged in (Result(chosen, tmp_path / "tuned", []), fake(chosen, 0.6, folder=same)):
        facts = dict.fromkeys(("command", "counts_table", "hardware", "versions"), "") | {"missing": 0}
        write_study(tmp_path, [*broken, *whole, diverged], None, facts)
        assert "## Exercise 2" in (tmp_path / "README.md").read_text()


def test_a_rate_at_which_the_loss_breaks_is_an_answer(tmp_path):
    folder = tmp_path / "rate"
    folder.mkdir()
    write_diverged(folder, "the loss became nan")
    runs = runs_of("rates", 1, {})
    diverged = read_result(runs[-1], folder)
    assert diverged.diverged
    accuracies = (0.8, 0.85, 0.9, 0.92, 0.7, 0.6)
    whole = [fake(run, accuracy) for run, accuracy in zip(runs[:-1], accuracies, strict=True)]
    assert rates_table([*whole, diverged])[-1] == (100.0, None)
    [(_, answer)] = answers({}, [*whole, diverged], None)
    assert (
        "sweep: 3 times the book's gives 92.0%. Beyond it, 10 times the book's gives 70.0%, 30 times"
        in answer
    )
    assert "30 times the book's gives 60.0%, from 100 times the book's rate on the loss diverges" in answer
    [(_, answer)] = answers({}, whole[:3], None)
    assert "the book's own rate gives 90.0%. No higher rate was tried." in answer
    [(_, answer)] = answers({}, [diverged], None)
    assert answer == "From 100 times the book's rate on the loss diverges."


def fake(run_, accuracy, validation=None, loss=0.5, folder=None):
    """A finished run with these scores."""
    row = {"epoch": 1, "test_accuracy": accuracy}
    if validation is not None:
        row |= {"validation_accuracy": validation, "validation_loss": loss}
    return Result(run_, folder, [row, {"final": True, "test_accuracy": accuracy, "seconds": 10.0}])


def test_the_grid_chooses_by_validation_alone():
    runs = runs_of("grid", 1, {})
    results = [fake(run_, accuracy=index / 100, validation=0.5) for index, run_ in enumerate(runs)]
    results[4] = fake(runs[4], accuracy=0.0, validation=0.9, loss=0.4)
    results[5] = fake(runs[5], accuracy=1.0, validation=0.9, loss=0.6)
    chosen = tuned(results, "finetune")
    assert chosen.config.optim == runs[4].config.optim and chosen.config.data.val_fraction == 0
    assert chosen.experiment == "tuned"


def test_the_interval_is_students():
    values = [0.9, 0.92, 0.95]
    expected = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert interval(values) == pytest.approx(expected)
    assert interval([0.9]) is None


def predictions(folder, right):
    folder.mkdir()
    lines = [f"{index},a,{'a' if hit else 'b'},0.5,0.5" for index, hit in enumerate(right)]
    (folder / "predictions.csv").write_text("\n".join(["file,true_label,predicted_label,a,b", *lines]))
    return Result(None, folder, [{}])


def test_mcnemar_counts_where_one_alone_is_right(tmp_path):
    ours = predictions(tmp_path / "a", [1] * 10 + [0] * 2 + [1] * 8)
    theirs = predictions(tmp_path / "b", [0] * 10 + [1] * 2 + [1] * 8)
    test = mcnemar(ours, theirs)
    assert (test["only_this"], test["only_finetune"]) == (10, 2)
    assert test["p"] == pytest.approx(scipy.stats.binomtest(2, 12).pvalue)
    assert mcnemar(ours, ours)["p"] == 1


def test_differences_are_taken_seed_by_seed(tmp_path):
    same = predictions(tmp_path / "a", [1, 0]).folder
    finetune, scratch = (runs_of(arm, 3, {}) for arm in ("finetune", "scratch"))
    results = [fake(run_, 0.7 + 0.1 * run_.seed, folder=same) for run_ in finetune]
    results += [fake(run_, 0.6 + 0.1 * run_.seed, folder=same) for run_ in scratch]
    row = summarise(results, "scratch")
    assert row["difference"] == pytest.approx(-0.1)
    assert row["difference_interval"] == pytest.approx((-0.1, -0.1))
    assert row["mean"] == pytest.approx(0.7) and row["deviation"] == pytest.approx(0.1)


def test_the_source_alone_is_judged_by_a_threshold_from_train():
    head = torch.nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.bias.zero_()

    class Seen(FeatureDataset):
        def __init__(self, values, labels):
            self.features, self.labels = torch.tensor(values)[:, None], np.array(labels)

    seen = {
        "train": Seen([2.0, 1.0, 0.5, -1.0], [0, 0, 1, 1]),
        "test": Seen([1.5, 0.8, 0.9, -2.0], [0, 0, 1, 1]),
    }
    answer = zero_shot(seen, head, source_classes=(0,), positive=0)
    assert answer["threshold"] == pytest.approx(1 / (1 + np.exp(-1.0)))
    assert answer["accuracy"] == 0.75 and answer["roc_auc"] == 0.75
    # As many thresholds as photos: tried one by one they would take a minute.
    many = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    seen["train"] = Seen(many, (many < 0.3).astype(int))
    assert zero_shot(seen, head, source_classes=(0,), positive=0)["threshold"] == pytest.approx(
        1 / (1 + np.exp(-many[many >= 0.3].min())), abs=1e-4
    )


def test_what_is_no_experiment_is_refused():
    done = run("python", ROOT / "scripts/reproduce.py", "--only", "finetune", "pie")
    assert done.returncode == 2 and "'pie'" in done.stdout + done.stderr


def test_every_variant_is_a_config():
    assert all(override(RECIPES["light"], **knobs) for knobs in VARIANTS.values())


def test_recipes_are_compared_on_several_folders(photos, tiny_weights, tmp_path, monkeypatch):
    draw_photos(tmp_path / "two/train", {"hotdog": 9, "not-hotdog": 8})
    draw_photos(tmp_path / "two/test", {"hotdog": 4, "not-hotdog": 4})
    monkeypatch.setattr(comparison, "COMPARED", ("chapter", "probe"))
    monkeypatch.setattr(plan, "COMPARED", ("chapter", "probe"))
    knobs = {"model": TINY_MODEL, "weights": str(tiny_weights), "image_size": 64, "num_threads": 1}
    folders = (str(photos), str(tmp_path / "two"))
    config = plan.ReproduceConfig(
        folders, **knobs, epochs=1, seeds=1, only=("compare",), output_dir=str(tmp_path / "study")
    )
    accelerator, stop = launch.build_accelerator("no", num_threads=1), SimpleNamespace(number=0)
    assert comparison.compare_folders(config, accelerator, stop) is None
    lines = results_of(tmp_path / "study")
    assert [line["run"] for line in lines] == ["chapter", "probe"] * 2
    text = (tmp_path / "study/README.md").read_text()
    for number, folder in enumerate(folders):
        part = text.partition(f"## {folder}\n")[2].partition("\n## ")[0]
        for line in lines[2 * number : 2 * number + 2]:
            accuracy, loss = float(line["test_accuracy"]), float(line["test_loss"])
            row = (
                rf"\| [12] \| `{line['run']}` \| {accuracy:.3f} \([\d.]+ to [\d.]+\) \| {loss:.3f} \| \d+ \|"
            )
            assert re.search(row, part) and f"`{line['command']}`" in part
    (tmp_path / "study" / lines[3]["folder"] / "choice.json").write_text('{"chosen": "a head"}')
    assert comparison.compare_folders(config, accelerator, stop) is None
    text = (tmp_path / "study/README.md").read_text()
    assert text.count(" chose, by seed: ") == 1 and "`probe` chose, by seed: a head." in text


def test_the_overall_table_counts_ranks_wins_and_points_behind(monkeypatch):
    names = ("chapter", "probe", "source-probe", "best")
    monkeypatch.setattr(comparison, "COMPARED", names)

    def table(**accuracies):
        rows = [{"recipe": name, "accuracy": value, "loss": 1 - value} for name, value in accuracies.items()]
        rows.sort(key=lambda row: -row["accuracy"])
        return [row | {"rank": rank} for rank, row in enumerate(rows, start=1)]

    unfinished = table(probe=0.75, best=1.0)
    one = table(**dict(zip(names, (0.5, 0.75, 0.625, 1.0), strict=True)))
    two = table(**dict(zip(names, (0.25, 0.875, 0.5, 0.75), strict=True)))
    rows = {row["recipe"]: row for row in comparison.overall([one, two, unfinished])}
    assert [row["recipe"] for row in comparison.overall([one, two])][:2] == ["best", "probe"]
    assert (rows["best"]["rank"], rows["best"]["best"], rows["best"]["behind"]) == (1.5, 1, 0.125)
    assert rows["chapter"]["rank"] == 4 and rows["chapter"]["behind"] == 0.625
    assert [rows[name]["lowest_loss"] for name in ("chapter", "best")] == [0, 1]
    assert comparison.overall([unfinished]) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data-dir", "a", "b"), "2 --data-dir need --only compare"),
        (("--only", "compare", "light"), "--only compare stands alone"),
        (("--only", "compare", "--data-dir", "a", "a"), "needs folders that differ, got a a"),
    ],
)
def test_folders_that_cannot_be_compared_are_one_line(flags, message):
    done = run("python", ROOT / "scripts/reproduce.py", *flags)
    assert done.returncode == 2 and message in " ".join(done.stderr.replace("│", " ").split())
