"""The recipe "best": it decides on train alone, writes down why, and a resumed run keeps to it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
from conftest import TINY_MODEL, draw_photos
from PIL import Image
from test_resume import StopAfter, assert_same_run, train_here

from hotdog_hf.config import RECIPES, override, parse_train_config
from hotdog_hf.data.groups import stratified_folds
from hotdog_hf.errors import UserError
from hotdog_hf.model import regression, saved
from hotdog_hf.model.source import create_source
from hotdog_hf.training import budget, launch, search
from hotdog_hf.training.budget import Budget, Costs
from hotdog_hf.training.candidates import HEADER, Board, Candidate
from hotdog_hf.training.choice import decide
from hotdog_hf.training.search import Search, settle


def decide_here(weights, data_dir, *flags):
    """What the recipe would train, without training it."""
    words = ["--recipe", "best", "--data-dir", data_dir, "--model", TINY_MODEL, "--weights", weights]
    config = parse_train_config([str(word) for word in [*words, "--image-size", 64, *flags]])
    return decide(config, launch.build_accelerator("no", num_threads=1), SimpleNamespace(number=0), 0.0)


def one_epoch(monkeypatch):
    """Let a fine-tuning be tried for one epoch, and few photos take no more epochs than many."""
    monkeypatch.setattr(budget, "FEWEST_PASSED", 0)
    for recipe in ("full", "light"):
        monkeypatch.setitem(budget.TRIAL_EPOCHS, recipe, 1)


def prefer(monkeypatch, recipe):
    """Let a recipe be the best."""

    def best(board):
        return next((each for each in board.tried if each.candidate.recipe == recipe), board.tried[0]), "told"

    monkeypatch.setattr(Board, "best", best)


def test_a_photo_is_scored_by_layers_that_learned_nothing_of_its_fold(monkeypatch):
    monkeypatch.setattr(regression, "STRENGTHS", (1.0,))
    random = np.random.default_rng(0)
    features, labels, fold_of = random.normal(size=(40, 60)), np.arange(40) % 2, np.arange(40) // 2 % 4
    folds = [(np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)) for fold in range(4)]
    other = np.where(fold_of == 1, 1 - labels, labels)
    ours, layers = regression.cross_validate(features, labels, lambda *_: None, folds, [features])
    theirs, _ = regression.cross_validate(features, other, lambda *_: None, folds, [features])
    assert np.array_equal(ours[fold_of == 1], theirs[fold_of == 1])
    assert not np.array_equal(ours[fold_of == 0], theirs[fold_of == 0])
    np.testing.assert_allclose(np.exp(ours).sum(axis=1), 1)
    logits = layers[2].logits(features[fold_of == 2])
    np.testing.assert_allclose(
        logits - ours[fold_of == 2], np.log(np.exp(logits).sum(axis=1))[:, None] + [[0, 0]]
    )


def test_folds_keep_copies_together_and_every_class_in_every_rest():
    labels, groups = np.arange(24) % 2, np.arange(24) // 2 % 9
    folds = stratified_folds(labels, groups, 4, 0)
    assert sorted(np.concatenate([held_back for _, held_back in folds])) == list(range(24))
    for learned, held_back in folds:
        assert not {*groups[learned]} & {*groups[held_back]} and {*labels[learned]} == {0, 1}
    assert len(stratified_folds(np.array([0, 0, 0, 1, 1]), np.arange(5), 4, 0)) == 2
    assert stratified_folds(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 2]), 4, 0) == []


@pytest.mark.parametrize(("photos", "used"), [(1, 1), (75, 1), (125, 1), (126, 2), (375, 3), (1000, 4)])
def test_folds_are_used_until_they_hold_back_enough(photos, used):
    search = object.__new__(Search)
    search.folds = [(np.arange(0), np.arange(125))] * 4
    assert len(search.first_folds(photos)) == used


@pytest.mark.parametrize("mirrored", [False, True])
def test_photos_are_flipped_in_training_unless_their_mirror_images_are_others(
    tiny_weights, tmp_path, monkeypatch, mirrored
):
    """The second class is a picture and its mirror image, or the first is the mirror image of the second."""
    monkeypatch.setattr(Search, "try_training", lambda _: None)
    monkeypatch.setattr(search, "ENOUGH_MIRRORED", 9)
    ramp = np.linspace(0, 150, 64)[None, :, None] + np.linspace(0, 40, 64)[:, None, None]
    for name in ("left", "right"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(12):
            noise = np.random.default_rng([number, name == "left"]).integers(0, 40, (64, 64, 3))
            pixels = (ramp + noise).astype(np.uint8)
            if name == "left":
                pixels = pixels[:, ::-1] if mirrored else 255 - pixels
            if not mirrored and number % 2:
                pixels = pixels[:, ::-1]
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{number}.png")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    record = decide_here(tiny_weights, tmp_path).record
    assert record["mirrored"]["flip"] is not mirrored and record["mirrored"]["photos"] == 12
    crops = [row["knobs"] for row in record["tried"] if "probe_views" in row["knobs"]]
    assert [(knobs["min_crop_area"], knobs["flip"]) for knobs in crops] == [
        (0.5, False) if mirrored else (0.25, True)
    ]


@pytest.mark.parametrize(
    ("sharpness", "recipe", "geometry"),
    [
        ((1, 2, 9, 3), "probe", {"preprocessing": "chapter"}),
        ((1, 2, 1, 3), "source-probe", {"image_size": 96}),
    ],
)
def test_crops_are_tried_with_the_best_head(
    tiny_weights, photos_dir, monkeypatch, sharpness, recipe, geometry
):
    """Source-probes of three geometries, and a probe after the second."""
    monkeypatch.setattr(Search, "try_training", lambda _: None)
    sharpness, try_heads = iter([*sharpness, 4]), Search.try_heads

    def outputs(labels):
        return scipy.special.log_softmax(next(sharpness) * np.eye(2)[labels], axis=1)

    def cross_validate(features, labels, *rest):
        return outputs(labels), regression.cross_validate(features, labels, *rest)[1]

    def try_larger_too(search):
        search.budget.sizes = search.budget.sizes._replace(larger=96)
        try_heads(search)

    monkeypatch.setattr(Search, "try_heads", try_larger_too)
    monkeypatch.setattr(search, "cross_validate", cross_validate)
    monkeypatch.setattr(Search, "cross_validate_probe", lambda search, *_: outputs(search.labels))
    tried = decide_here(tiny_weights, photos_dir).record["tried"]
    [crops] = [row for row in tried if "probe_views" in row["knobs"]]
    assert crops["recipe"] == recipe and crops["knobs"]["probe_views"] == 1
    assert geometry.items() <= crops["knobs"].items()


def test_the_choice_depends_on_train_alone(tiny_weights, photos_dir, tmp_path, monkeypatch):
    one_epoch(monkeypatch)
    monkeypatch.setattr(search, "HOPELESS", np.inf)
    shutil.copytree(photos_dir / "train", tmp_path / "train")
    draw_photos(tmp_path / "test", {"hotdog": 1, "not-hotdog": 1})
    one, other = (decide_here(tiny_weights, folder) for folder in (photos_dir, tmp_path))
    tried = one.record["tried"]
    assert tried == other.record["tried"] and one.record["knobs"] == other.record["knobs"]
    recipes = [row["recipe"] for row in tried]
    assert recipes.count("source-probe") + recipes.count("probe") == 4  # three heads, the best with crops too
    assert sorted(recipe for recipe in recipes if "probe" not in recipe) == ["full", "light"]
    assert [row["log_loss"] for row in tried] == sorted(row["log_loss"] for row in tried)
    assert one.record["chosen"] == tried[0]["name"] and one.config.recipe == tried[0]["recipe"]
    for row in tried:
        on_part = row["recipe"] in ("full", "light")
        assert (
            row["how"].startswith("part held back") == on_part and row["photos"] == 25
        )  # too few for one fold


@pytest.mark.parametrize(("steps", "epochs"), [(6, 1), (7, 2)])
def test_a_hopeless_fine_tuning_is_given_up_once_that_can_be_told(
    tiny_weights, photos_dir, monkeypatch, steps, epochs
):
    one_epoch(monkeypatch)
    monkeypatch.setitem(budget.TRIAL_EPOCHS, "full", 2)
    monkeypatch.setattr(search, "HOPELESS", 0)
    monkeypatch.setattr(search, "TELLING_STEPS", steps)
    titles, train_steps = [], search.engine.train_steps
    monkeypatch.setattr(
        search.engine, "train_steps", lambda *args: titles.append(args[-1]) or train_steps(*args)
    )
    tried = decide_here(tiny_weights, photos_dir, "--batch-size", 3).record["tried"]
    assert {row["recipe"]: "given up" in row["how"] for row in tried if "part" in row["how"]} == {
        "full": True,
        "light": False,
    }
    # 18 or 19 photos are learned, so an epoch has 6 or 7 steps; no other fold is tried.
    assert [title for title in titles if title.startswith("full")] == [
        f"full fine-tuning on a part, epoch {epoch}/2" for epoch in range(1, epochs + 1)
    ]


def test_a_resumed_run_trains_what_was_chosen(tiny_weights, photos_dir, tmp_path, monkeypatch, capsys):
    flags = ("--recipe", "best", "--checkpoint-every", 1, "--resume", "auto")
    prefer(monkeypatch, "full")
    one_epoch(monkeypatch)
    monkeypatch.setattr(search, "ENOUGH_HELD_BACK", 1)
    run_dir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    train_here(tiny_weights, photos_dir, run_dir, *flags, stop=StopAfter(3))
    assert not run_dir.exists() and "stopped before anything was chosen" in capsys.readouterr().out
    train_here(tiny_weights, photos_dir, run_dir, *flags, stop=StopAfter(20))
    record = json.loads((run_dir / "choice.json").read_text())
    assert record["recipe"] == record["config"]["recipe"] == "full"
    assert (run_dir / "checkpoints").exists() and not (run_dir / "predictions.csv").exists()
    # The command of the record trains the same without choosing.
    config = parse_train_config(record["command"].split()[3:])
    assert config.optim == parse_train_config(["--recipe", "full", "--batch-size", "8"]).optim

    monkeypatch.delattr(Search, "run")
    with pytest.raises(UserError, match="cannot resume: --seed was 0, is 1"):
        train_here(tiny_weights, photos_dir, run_dir, *flags, "--seed", 1)
    train_here(tiny_weights, photos_dir, run_dir, *flags)
    # As if killed before its first checkpoint.
    undisturbed.mkdir()
    shutil.copy(run_dir / "choice.json", undisturbed)
    train_here(tiny_weights, photos_dir, undisturbed, *flags)
    assert_same_run(run_dir, undisturbed)
    assert saved.calibration_of(run_dir / "model") == record["calibration"]
    card = (run_dir / "model/README.md").read_text()
    assert "and chose full fine-tuning: told" in card and "| probe, squashed, 64 pixels |" in card
    assert "multiplied by the ratio of the two" in card
    with pytest.raises(UserError, match="already holds a run"):
        train_here(tiny_weights, photos_dir, run_dir, *flags[:-2])


def test_a_fine_tuning_is_chosen_only_if_it_is_clearly_better():
    labels, rows = np.zeros(8, int), np.arange(4)
    board = Board(labels, None, rescale=False)

    def add(name, losses, *where):
        log_probabilities = np.log(np.stack([np.exp(-losses), 1 - np.exp(-losses)], axis=1))
        return board.add(Candidate(name, "full", {}), log_probabilities, *where)

    head = add("head", np.repeat([0.2, 0.4], 4))
    assert board.best() == (head, "its log-loss, 0.300, is the lowest of the fitted heads")
    add("chance", np.array([0.01, 0.5, 0.01, 0.25]), rows)
    add("chance on all", np.array([0.01, 0.5, 0.01, 0.25, 0.3, 0.5, 0.2, 0.4]), np.arange(8))
    assert board.best()[0] is head and board.best()[1].endswith("by more than a standard error")
    add("given up", np.full(4, 0.05), rows, True)
    clear = add("clear", np.full(4, 0.1) + 0.01 * rows, rows)
    assert board.best()[0] is clear
    assert board.best()[1].endswith(
        "is lower than that of the best fitted head by more than a standard error"
    )
    # The second half, on which the head is worse, is not held against it.
    assert board.score(clear) == pytest.approx(0.3 * 0.115 / 0.2)
    assert [row["name"] for row in board.rows()] == ["given up", "clear", "chance on all", "chance", "head"]
    lines = [board.describe(each) for each in board.tried]
    assert lines[0].split() == ["0.300", "±", "0.038", "1.000", "±", "0.000", "8", "head"]
    place = HEADER.index("tried on parts of train")
    assert [line[place:] for line in lines] == [
        "head",
        "chance",
        "chance on all",
        "given up (given up)",
        "clear",
    ]


def test_a_fine_tuning_that_is_too_certain_is_compared_as_it_is_calibrated():
    random = np.random.default_rng(0)
    labels, rows = random.integers(0, 2, 400), np.arange(400)
    logits = random.normal(size=(400, 2)) + np.eye(2)[labels]  # calibrated
    scores = {}
    for rescale in (True, False):
        board = Board(labels, None, rescale)
        board.add(Candidate("head", "source-probe", {}), np.log(np.full((400, 2), 0.5)))
        for factor in (0.2, 1, 5):
            outputs = scipy.special.log_softmax(factor * logits, axis=1)
            tried = board.add(Candidate(str(factor), "full", {}), outputs, rows)
            scores[rescale, factor] = board.score(tried)
            expected = 5 if rescale and factor == 5 else 1
            assert tried.calibration["temperature"] == pytest.approx(expected, rel=0.15)
    assert scores[True, 5] == pytest.approx(scores[True, 1], rel=0.02)
    assert scores[True, 0.2] == scores[False, 0.2] and scores[False, 5] > 2 * scores[True, 5]


def test_what_the_recipe_chooses_cannot_be_given(tiny_weights, photos_dir):
    with pytest.raises(UserError, match="--epochs: --recipe best chooses it"):
        decide_here(tiny_weights, photos_dir, "--epochs", 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gradient-accumulation-steps", 20), "also tries full, for which .* --batch-size .16., got 20"),
        (("--momentum", 0.9), "--momentum: --recipe best chooses it"),
        (("--model", "deit_tiny_distilled_patch16_224", "--weights", "none"), "classifier is a tuple"),
    ],
)
def test_what_cannot_be_trained_ends_before_the_search(tiny_weights, photos_dir, flags, message, monkeypatch):
    monkeypatch.delattr(Search, "run")
    with pytest.raises(UserError, match=message):
        decide_here(tiny_weights, photos_dir, *flags)


@pytest.mark.parametrize("knobs", [{}, {"augmentation": "crop", "cache_features": False, "probe_views": 1}])
def test_a_chosen_head_takes_no_flags_of_training(knobs):
    config = parse_train_config(["--recipe", "best", "--crop-on-device", "--ema-decay", "0.9"])
    head, trained = settle(config, "source-probe", knobs), settle(config, "full", {})
    assert (head.data.crop_on_device, head.optim.ema_decay) == (False, 0.0)
    assert (trained.data.crop_on_device, trained.optim.ema_decay) == (True, 0.9)


def test_a_fine_tuning_that_diverges_is_given_up(tiny_weights, photos_dir, monkeypatch, capsys):
    one_epoch(monkeypatch)
    monkeypatch.setitem(RECIPES, "full", override(RECIPES["full"], learning_rate=1e30))
    decision = decide_here(tiny_weights, photos_dir)
    tried = {row["recipe"] for row in decision.record["tried"]}
    assert tried == {"source-probe", "probe", "light"}
    assert "full fine-tuning: given up, as its loss became NaN" in capsys.readouterr().out


def test_copies_of_a_photo_are_in_one_fold_of_a_probe_that_is_tried():
    """With copies of what was learned among the held-back photos, the weakest penalty looks best."""
    random = np.random.default_rng(0)
    labels, groups = np.tile(np.arange(40) % 2, 3), np.tile(np.arange(40), 3)
    features = np.tile(random.normal(size=(40, 60)), (3, 1)) + 0.3 * labels[:, None]
    search = object.__new__(Search)
    search.config, search.labels, search.weights = parse_train_config([]), labels, None
    search.folds = stratified_folds(labels, groups, 4, 0)
    losses = []
    for search.groups in (groups, np.arange(120)):
        outputs = search.cross_validate_probe(features, ())
        losses.append(-outputs[np.arange(120), labels].mean())
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize(
    ("name", "size", "times", "side"),
    [
        ("test_resnet", 224, 10 / 7, 320),
        ("test_resnet", 160, 10 / 7, 224),
        ("test_resnet", 33, 10 / 7, None),
        ("test_resnet", 224, 5 / 7, 160),
        ("test_resnet", 16, 5 / 7, None),
        ("test_vit3", 160, 10 / 7, None),
    ],
)
def test_another_size_is_one_that_the_network_takes(name, size, times, side):
    assert search.other_size(create_source(name, "none"), size, times) == side


def test_few_minutes_try_less_and_more_try_more(tiny_weights, photos_dir, monkeypatch):
    decision = decide_here(tiny_weights, photos_dir, "--minutes", 0.01)
    assert [row["recipe"] for row in decision.record["tried"]] == ["source-probe"]
    tried = []
    monkeypatch.setattr(Search, "left", lambda _: 1000.0)
    monkeypatch.setattr(Search, "try_way", lambda _, way, layers: tried.append(way.recipe))
    prefer(monkeypatch, "full")
    decide_here(tiny_weights, photos_dir, "--minutes", 100)
    assert tried == ["full", "light"]


def test_with_little_time_a_light_fine_tuning_learns_from_smaller_crops(
    tiny_weights, photos_dir, monkeypatch
):
    one_epoch(monkeypatch)
    prefer(monkeypatch, "light")
    monkeypatch.setattr(Budget, "epochs_in_time", lambda _, way: 9 * ("train_image_size" in way.knobs))
    chosen = decide_here(tiny_weights, photos_dir, "--minutes", 5).record
    assert chosen["knobs"]["train_image_size"] == 32 and "crops of 32" in chosen["chosen"]
    assert "full" not in [row["recipe"] for row in chosen["tried"]]


@pytest.mark.parametrize(("minutes", "epochs"), [(5, [6]), (1.95, [1, 4]), (1.8, [1]), (0.1, [])])
def test_a_trial_that_is_slower_than_expected_gets_fewer_epochs_or_none(
    tiny_weights, photos_dir, monkeypatch, minutes, epochs
):
    """An epoch is expected to take a quarter of a second, and takes 10."""
    clock, trained = SimpleNamespace(now=0.0), []
    clock.perf_counter = lambda: clock.now

    def train_steps(*_):
        clock.now, trained[-1] = clock.now + 10, trained[-1] + 1
        yield from ()

    def build_part(search, *part):
        trained.append(0)
        return built(search, *part)

    built = Search.build_part
    monkeypatch.setattr(Search, "build_part", build_part)
    monkeypatch.setattr(budget, "FEWEST_PASSED", 0)
    monkeypatch.setattr(search, "ENOUGH_HELD_BACK", 1)
    monkeypatch.setattr(search, "MUCH_BETTER", np.inf)
    monkeypatch.setattr(search.engine, "measure_speed", lambda *_: (0.01, 0.01))
    monkeypatch.setattr(search.engine, "train_steps", train_steps)
    monkeypatch.setattr(search, "time", clock)
    decide_here(tiny_weights, photos_dir, "--minutes", minutes)
    assert trained == epochs


def test_full_fine_tuning_takes_more_epochs_on_few_photos():
    assert [budget.enough_epochs("full", 8, photos) for photos in (1, 50, 150, 500)] == [40, 27, 9, 8]
    assert budget.enough_epochs("light", 6, 50) == 6


def test_costs_follow_what_was_measured():
    costs = Costs(224, 100, 50, {"full": 0.4, "light": 0.2}, 0.1)
    assert costs.features(448, views=2) == pytest.approx(80) and costs.evaluation(224) == pytest.approx(5)
    costs.correct(0.3)
    assert costs.features(224) == pytest.approx(30) and costs.training("full", 3) == pytest.approx(180)
    costs.correct(0.1)
    assert costs.features(224) == pytest.approx(10) and costs.training("full", 3) == pytest.approx(180)


def test_with_one_photo_of_a_class_there_is_nothing_to_choose_on(tiny_weights, tmp_path):
    draw_photos(tmp_path / "train", {"hotdog": 1, "not-hotdog": 3})
    draw_photos(tmp_path / "test", {"hotdog": 1, "not-hotdog": 1})
    decision = decide_here(tiny_weights, tmp_path)
    assert decision.config.recipe == "source-probe" and not decision.record["tried"]
    assert "a class has one photo" in decision.record["why"]
