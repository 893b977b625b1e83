"""Photos unlike those a model was trained on: what is kept to tell them, and who says unknown."""

import csv
import functools
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from test_deploy import smooth
from test_hub import target
from test_resume import train_here

from hotdog_hf.data.images import Photo, normalize, resize_and_crop
from hotdog_hf.data.splits import load_photos
from hotdog_hf.deploy import quantize
from hotdog_hf.deploy.export import export_onnx
from hotdog_hf.errors import UserError
from hotdog_hf.model import neighbors, network, saved
from hotdog_hf.model.predictor import load_predictor
from hotdog_hf.training import engine

PREDICT = ROOT / "scripts/predict.py"


def features_of(net, images):
    """Return the unit roots of the features of images, uint8 [H, W, 3] each."""
    config = network.data_config_of(net)
    pixels = torch.from_numpy(normalize(np.stack(images), config))
    with torch.inference_mode():
        return neighbors.unit_roots(network.forward_with_features(net, pixels)[1].numpy())


def keep_for(folder, photos):
    """Keep the features of PIL images with a saved model, as if it had learned them; return its folder."""
    net = saved.load_model(folder)
    features = features_of(net, [resize_and_crop(photo, network.data_config_of(net)) for photo in photos])
    kept = features.astype(np.float16)
    found = np.sort(neighbors.distances(features, kept, np.arange(len(features))))
    neighbors.save(neighbors.Neighbors(kept, found, "train"), folder / neighbors.FILE)
    return folder


def foreign(seed=0):
    """A photo unlike the smooth ones."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 2, (64, 64, 3), np.uint8) * 255)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model that has kept 40 smooth photos."""
    torch.manual_seed(0)
    folder = saved.save_model(target(), tmp_path_factory.mktemp("saved") / "model")
    return keep_for(folder, [smooth(64, 64, seed) for seed in range(40)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with a photo like those kept, and one that is not."""
    folder = tmp_path_factory.mktemp("photos")
    smooth(64, 64, 100).save(folder / "like.png")
    foreign().save(folder / "unlike.png")
    return folder


def test_as_many_photos_are_kept_as_fit_and_rare_classes_whole(monkeypatch):
    labels = np.repeat([0, 1, 2], [500, 30, 4])
    assert neighbors.photos_to_keep(labels, 512, 0).tolist() == list(range(534))
    monkeypatch.setattr(neighbors, "MAX_BYTES", 100 * 2 * 512)
    chosen = neighbors.photos_to_keep(labels, 512, 0)
    assert np.bincount(labels[chosen]).tolist() == [66, 30, 4]
    assert (np.diff(chosen) > 0).all() and neighbors.photos_to_keep(labels, 256, 0).size == 200
    assert chosen.tolist() == neighbors.photos_to_keep(labels, 512, 0).tolist()
    assert chosen.tolist() != neighbors.photos_to_keep(labels, 512, 1).tolist()


def test_distances_are_of_photos_with_the_shares_of_train(monkeypatch):
    """Of 900 and 100 photos as many are kept of each: the rare class must not count for nine."""
    monkeypatch.setattr(neighbors, "MAX_PHOTOS", 160)
    labels = np.repeat([0, 1], [900, 100])
    chosen = neighbors.photos_to_keep(labels, 512, 0)
    places = neighbors.with_usual_shares(labels, chosen, 0)
    assert np.bincount(labels[chosen]).tolist() == [80, 80]
    assert np.bincount(labels[chosen][places]).tolist() == [80, 9]
    everything = np.arange(len(labels))
    assert np.array_equal(neighbors.with_usual_shares(labels, everything, 0), everything)
    without_some = np.arange(300), np.arange(0, 300, 2)
    assert neighbors.with_usual_shares(*without_some, 0).size == 150


def test_the_distance_is_that_to_the_nearest_photos_of_other_groups(monkeypatch):
    monkeypatch.setattr(neighbors, "CHUNK", 7)
    features = neighbors.unit_roots(np.random.default_rng(0).normal(size=(30, 8)))
    groups = np.arange(30) // 3
    found = neighbors.distances(features, features, groups)
    for index in range(30):
        others = np.sort(features[groups != groups[index]] @ features[index])
        assert found[index] == pytest.approx(1 - others[-5:].mean(), abs=1e-6)
    assert neighbors.distances(features[:2], features[:1])[0] == pytest.approx(0, abs=1e-6)
    assert np.isinf(neighbors.distances(features, features, np.zeros(30))).all()
    assert np.isfinite(neighbors.unit_roots(np.zeros((1, 4)))).all()
    assert neighbors.unit_roots(np.array([[-9, 16]])) == pytest.approx(np.array([[-0.6, 0.8]]))


def test_the_share_that_is_promised_is_kept():
    kept = []
    for seed in range(60):
        features = neighbors.unit_roots(np.random.default_rng(seed).normal(1, 1, (300, 8)))
        train, others = features[:120], features[120:]
        limit = neighbors.distance_limit(
            np.sort(neighbors.distances(train, train, np.arange(120))), 0.9, "it"
        )
        kept.append((neighbors.distances(others, train) <= limit).mean())
    assert 0.88 < np.mean(kept) < 0.93
    with pytest.raises(UserError, match=r"--keep 0\.99 needs 99 held-back photos or more; it has 20"):
        neighbors.distance_limit([0.1] * 20, 0.99, "it")


def test_a_run_keeps_its_photos_but_no_copy_is_its_own_neighbour(
    photos_dir, tiny_weights, tmp_path, monkeypatch
):
    shutil.copytree(photos_dir, tmp_path / "photos")
    for path in list((tmp_path / "photos/train").rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    measure, groups = neighbors.distances, []
    monkeypatch.setattr(neighbors, "distances", lambda *given: groups.extend(given[2]) or measure(*given))
    train_here(tiny_weights, tmp_path / "photos", tmp_path / "run", "--epochs", 1)
    kept = neighbors.load(tmp_path / "run/model" / neighbors.FILE)
    assert kept.features.shape == (50, 96) and kept.features.dtype == np.float16 and kept.held_out == "train"
    assert len(kept.held_out_distances) == 50 and (np.diff(kept.held_out_distances) >= 0).all()
    contents = [Path(row["path"]).read_bytes() for row in load_photos(tmp_path / "photos")["train"]["image"]]
    same = np.array(contents)[:, None] == np.array(contents)
    assert (np.array(groups)[:, None] == groups).tolist() == same.tolist() and same.sum() == 100
    predictor = load_predictor(tmp_path / "run/model")
    found = features_of(predictor.net, [predictor.prepare(Photo(content)) for content in contents])
    assert found == pytest.approx(kept.features, abs=1e-3)


def test_a_probe_keeps_what_it_was_fitted_to_and_a_resumed_run_adds_it(
    photos_dir, tiny_weights, tmp_path, monkeypatch
):
    flags = tiny_weights, photos_dir, tmp_path / "run", "--recipe", "probe", "--val-fraction", 0.2
    train_here(*flags, "--no-neighbors")
    file = tmp_path / "run/model" / neighbors.FILE
    assert not file.exists()
    weights = (tmp_path / "run/model/model.safetensors").read_bytes()
    train_here(*flags, "--resume", "auto")
    few = neighbors.load(file)
    assert few.held_out == "train" and len(few.held_out_distances) == 20
    file.unlink()
    monkeypatch.setattr(neighbors, "MIN_VALIDATION", 5)
    train_here(*flags, "--resume", "auto")
    kept = neighbors.load(file)
    assert kept.held_out == "validation" and len(kept.held_out_distances) == 5 and len(kept.features) == 20
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == weights
    # The features from the cache are those that the saved network has.
    predictor = load_predictor(tmp_path / "run/model")
    images = [predictor.prepare(Image.open(path)) for path in sorted((photos_dir / "train").rglob("*.png"))]
    found = features_of(predictor.net, images)
    apart = np.abs(found[:, None] - kept.features.astype(np.float32)).max(axis=2)
    assert (apart.min(axis=0) < 2e-4).all() and np.median(apart) > 1e-3


def test_a_network_without_features_is_trained_all_the_same(
    photos_dir, tiny_weights, tmp_path, monkeypatch, capsys
):
    def none(*_, **__):
        raise network.NoFeaturesError("two layers")

    monkeypatch.setattr(engine, "pooled_features", none)
    train_here(tiny_weights, photos_dir, tmp_path / "run", "--epochs", 1)
    assert (
        "no neighbours are kept, so that predict.py --reject is not possible: two layers"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "run/model" / neighbors.FILE).exists()
    assert (tmp_path / "run/predictions.csv").exists()


def test_every_loader_reads_the_folder(model):
    import timm
    from transformers import AutoModelForImageClassification

    pixels = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = saved.load_model(model)(pixels)
        theirs = timm.create_model(f"local-dir:{model}", pretrained=True).eval()(pixels)
        assert torch.allclose(theirs, expected, atol=1e-5)
        theirs = AutoModelForImageClassification.from_pretrained(model).eval()(pixel_values=pixels).logits
        assert torch.allclose(theirs, expected, atol=1e-5)


def test_predict_says_unknown_with_the_distance(model, photos):
    like, unlike = photos / "like.png", photos / "unlike.png"
    rows = [json.loads(line) for line in predicted(model, photos, "--reject", "--format", "jsonl")]
    assert [row["label"] for row in rows] == [
        max(rows[0]["probabilities"], key=rows[0]["probabilities"].get),
        "unknown",
    ]
    assert rows[1]["probability"] is None and sum(rows[1]["probabilities"].values()) == pytest.approx(
        1, abs=1e-3
    )
    predictor = load_predictor(model)
    limit = predictor.distance_limit()
    assert rows[0]["distance"] <= limit < rows[1]["distance"]
    table = predicted(model, photos, "--reject")
    assert (
        table[2].startswith("unknown ")
        and table[0].index("distance") + 8 == table[2].index(f"{rows[1]['distance']:.4f}") + 6
    )
    sheet = "\n".join(predicted(model, photos, "--reject", "--format", "csv"))
    first, second = csv.DictReader(io.StringIO(sheet))
    assert (second["label"], second["probability"]) == ("unknown", "")
    assert float(first["distance"]) == rows[0]["distance"] and first["probability"]
    # A higher share keeps more: here no limit that 40 photos can tell.
    done = run("python", PREDICT, model, photos, "--reject", "--keep", "0.99")
    assert done.returncode == 2 and "--keep 0.99 needs 99 held-back photos or more" in done.stderr
    assert "distance" not in predicted(model, photos)[0]
    assert predictor(like, reject=True) == predictor(like) and predictor(unlike, reject=True) is None
    assert predictor([like, unlike], reject=True, keep=0.5)[1] is None


def predicted(*words):
    done = run("python", PREDICT, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_kept_features_the_error_says_what_to_do(tmp_path, photos):
    folder = saved.save_model(target(), tmp_path / "model")
    done = run("python", PREDICT, folder, photos, "--reject")
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    assert (
        "saved without features of its training photos; train it again, or add them by resuming"
        in done.stderr
    )
    (folder / neighbors.FILE).write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"cannot read .*neighbors\.safetensors: .*; train the model again"):
        load_predictor(folder)


@pytest.mark.parametrize("options", [{}, {"takes_photos": True}, {"opset": 12}])
def test_the_onnx_file_measures_the_same_distances(model, photos, tmp_path, options):
    difference = export_onnx(model, tmp_path / "model.onnx", **options)
    assert difference < 1e-4
    ours, theirs = load_predictor(tmp_path / "model.onnx"), load_predictor(model)
    assert ours.distance_limit() == pytest.approx(theirs.distance_limit(), abs=1e-6)
    for name in ("like.png", "unlike.png"):
        one = [predictor.prepare(Image.open(photos / name).convert("RGB")) for predictor in (ours, theirs)]
        (rows, found), (expected_rows, expected) = (
            predictor.with_distances(np.stack([image]))
            for predictor, image in zip((ours, theirs), one, strict=True)
        )
        assert found == pytest.approx(expected, abs=1e-3) and rows == pytest.approx(expected_rows, abs=1e-3)
        assert ours.probabilities(np.stack([one[0]])) == pytest.approx(rows)
    assert ours(photos / "unlike.png", reject=True) is None
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["probabilities", "distance"]
    limit = float(session.get_modelmeta().custom_metadata_map["distance_limit"])
    assert limit == pytest.approx(theirs.distance_limit(), abs=1e-6)
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)


def test_an_int8_file_keeps_the_promised_share_too(model, tmp_path, monkeypatch):
    for seed in range(42):  # calibrated on the photos that the model has kept
        split, label = "train" if seed < 40 else "test", ("hotdog", "not-hotdog")[seed % 2]
        (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
        smooth(64, 64, seed).save(tmp_path / split / label / f"{seed}.png")
    # So few layers hardly differ in int8, unless it cuts off 5 % of the activations.
    coarse = quantize.CANDIDATES["per channel without outliers"] | {"extra_options": {"CalibPercentile": 95}}
    monkeypatch.setattr(quantize, "CANDIDATES", {"coarse": coarse})
    options = {"precision": "int8", "data_dir": tmp_path, "max_drop": 100}
    shrink = functools.partial(quantize.shrink, **options)
    export_onnx(model, tmp_path / "model.onnx", shrink=shrink, tolerance=math.inf)

    exported, whole = load_predictor(tmp_path / "model.onnx"), load_predictor(model)
    images = np.stack([whole.prepare(smooth(64, 64, seed)) for seed in range(100, 200)])
    found, distances = exported.with_distances(images)[1], whole.with_distances(images)[1]
    assert 0.9 < (distances <= whole.distance_limit()).mean() < 1
    assert (found <= whole.distance_limit()).mean() < 0.6
    assert 0.9 < (found <= exported.distance_limit()).mean() < 1
    assert exported(foreign(), reject=True) is None


def test_a_distance_that_comes_out_different_is_not_written(model, tmp_path, monkeypatch):
    distances = neighbors.distances
    monkeypatch.setattr(neighbors, "distances", lambda *given: distances(*given) + 0.01)
    with pytest.raises(UserError, match="as ONNX is 1e-02 away from PyTorch; nothing was written"):
        export_onnx(model, tmp_path / "model.onnx")
    with pytest.raises(
        UserError, match="the distance to the training photos needs --opset 10 or higher, got 9"
    ):
        export_onnx(model, tmp_path / "model.onnx", opset=9)


def test_the_report_says_how_many_photos_are_unknown(model, photos_dir, tmp_path):
    (tmp_path / "foreign").mkdir()
    for seed in range(4):
        foreign(seed).save(tmp_path / f"foreign/{seed}.png")
    (tmp_path / "foreign/broken.jpg").write_text("no image")
    report = ["python", ROOT / "scripts/report.py", model, "--data-dir", photos_dir]
    done = run(*report, "--output-dir", tmp_path / "report", "--foreign", tmp_path / "foreign")
    assert done.returncode == 0, done.stderr
    assert "not used: " in done.stderr and "broken.jpg" in done.stderr
    found = json.loads((tmp_path / "report/metrics.json").read_text())["rejection"]
    predictor = load_predictor(model)
    tests = sorted((photos_dir / "test").rglob("*.png"))
    own, others = (
        predictor.with_distances(np.stack([predictor.prepare(Photo(path)) for path in paths]))[1]
        for paths in (tests, sorted((tmp_path / "foreign").glob("*.png")))
    )
    assert (found["training_photos"], found["photos"], found["foreign_photos"]) == (40, 40, 4)
    assert [level["promised"] for level in found["levels"]] == [0.9, 0.95]  # 40 photos cannot tell 0.99
    for level in found["levels"]:
        assert level["limit"] == predictor.distance_limit(level["promised"])
        assert level["kept"] == (own <= level["limit"]).mean()
        assert level["caught"] == (others > level["limit"]).mean()
    assert found["roc_auc"] == np.mean(others[:, None] > own)
    page = (tmp_path / "report/report.html").read_text()
    assert "Unknown photos" in page and f"{found['roc_auc']:.3f}</strong>" in page and page.count("<svg") == 5
    assert "predict.py --reject --keep 0.95: unknown are " in done.stdout
    for wrong, message in ((tmp_path / "none", "no such folder"), (tmp_path / "report", "no photo that can")):
        done = run(*report, "--output-dir", tmp_path / "again", "--foreign", wrong)
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "again").exists()
