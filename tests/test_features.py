"""What a frozen body sees: the features, their cache, and training on them instead of on the photos."""

import contextlib
import copy
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import TINY_MODEL, network_inputs
from faults import Faults, Killed
from test_engine import TWO_PROCESSES
from test_resume import numbers_of, train_here
from test_scripts import metrics_of

from hotdog_hf import machine
from hotdog_hf.data import loaders, transforms
from hotdog_hf.data.splits import load_photos
from hotdog_hf.errors import UserError
from hotdog_hf.model import network
from hotdog_hf.model.source import create_source, source_data_config
from hotdog_hf.training import engine, features, launch


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The folder of cached features: a new and empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return machine.cache_dir() / "features"


@pytest.fixture
def computed(monkeypatch):
    """Titles of the features that did not come from the cache, in order."""
    titles, compute = [], engine.pooled_features

    def compute_and_note(accelerator, net, loader, title="", **options):
        titles.append(title)
        return compute(accelerator, net, loader, title, **options)

    monkeypatch.setattr(engine, "pooled_features", compute_and_note)
    return titles


@pytest.fixture
def net(tiny_weights):
    torch.manual_seed(0)
    source = create_source(TINY_MODEL, str(tiny_weights))
    return network.replace_head(source, ["hotdog", "not-hotdog"], source_data_config(source, "chapter", 64))


@pytest.fixture
def photo_set(net, photos_dir):
    photos = load_photos(photos_dir)["train"]
    return loaders.PhotoDataset(photos, transforms.eval_transform(network.data_config_of(net)), seed=3)


def features_of(net, photo_set, facts="these photos", batch_size=8):
    accelerator = launch.build_accelerator("no", num_threads=1)
    loader = loaders.eval_loader(photo_set, batch_size)
    return features.pooled_features(accelerator, net, loader, facts, str(facts))


@torch.no_grad()
def test_features_are_what_the_output_layer_gets_photo_by_photo(net, photo_set):
    seen, got = features_of(net, photo_set), []
    net.get_classifier().register_forward_pre_hook(lambda _, inputs: got.append(inputs[0]))
    logits = torch.cat([net.eval()(images[None]) for images in network_inputs(photo_set)])
    assert seen.features.shape == (25, 96) and seen.features.dtype == torch.float32
    torch.testing.assert_close(seen.features, torch.cat(got), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.get_classifier()(seen.features), logits, rtol=1e-5, atol=1e-5)


def test_features_stand_for_their_photos_in_every_epoch(net, photo_set):
    seen = features_of(net, photo_set)
    assert len(seen) == 25 and seen.labels.tolist() == photo_set.labels.tolist()
    for key in (7, (1, 7), (2, 7), (1, photo_set.PADDING)):
        row, photo = seen[key], photo_set[key]
        assert (row["labels"], row["index"]) == (photo["labels"], photo["index"])
        assert torch.equal(row["pixel_values"], seen.features[row["index"]])
    assert seen.name_of(7) == photo_set.name_of(7)


def test_a_second_call_reads_the_cache_whatever_the_output_layer(net, photo_set, computed):
    first = features_of(net, photo_set)
    assert computed == ["these photos"]
    assert torch.equal(features_of(net, photo_set).features, first.features)
    with torch.no_grad():
        net.get_classifier().weight.add_(1)
    assert torch.equal(features_of(net, photo_set).features, first.features)
    net.reset_classifier(5)
    assert torch.equal(features_of(net, photo_set).features, first.features)
    assert computed == ["these photos"]


@pytest.mark.parametrize(
    "tensor", ["conv1.0.weight", "bn1.running_mean", "bn1.running_var", "layer4.0.bn2.bias"]
)
def test_another_body_has_other_features(net, photo_set, computed, tensor):
    first = features_of(net, photo_set)
    with torch.no_grad():
        net.state_dict()[tensor].view(-1)[0] += 0.5
    second = features_of(net, photo_set)
    assert len(computed) == 2 and not torch.equal(second.features, first.features)


def test_another_network_of_the_same_tensors_has_other_features():
    plain, other = (
        timm.create_model(name, num_classes=2) for name in ("efficientnet_lite0", "tf_efficientnet_lite0")
    )
    other.load_state_dict(plain.state_dict())
    assert features._key(other, []) != features._key(plain, []) == features._key(copy.deepcopy(plain), [])


def test_other_facts_fewer_photos_or_another_batch_size_are_computed(net, photo_set, photos_dir, computed):
    for facts in (["a", [1, 2]], ["a", [1, 3]], {"a": [1, 2]}):
        features_of(net, photo_set, facts)
    assert len(computed) == 3
    features_of(net, photo_set, {"a": [1, 2]}, batch_size=5)
    fewer = loaders.PhotoDataset(photo_set.rows.select(range(24)), photo_set.transform)
    features_of(net, fewer, {"a": [1, 2]})
    assert len(computed) == 5


def test_a_signal_while_features_are_computed_ends_the_run_before_anything_is_written(
    tiny_weights, photos_dir, tmp_path, cache, computed, capsys
):
    flags, stop = ("--recipe", "frozen", "--epochs", 1), SimpleNamespace(number=15)
    train_here(tiny_weights, photos_dir, tmp_path / "run", *flags, stop=stop)
    assert computed == ["train"] and not cache.exists() and not (tmp_path / "run").exists()
    assert capsys.readouterr().out.endswith("stopped before the first epoch; the same command starts again\n")


def test_a_run_computes_again_what_has_changed_and_no_more(tiny_weights, photos_dir, tmp_path, computed):
    folder, flags, numbers = (
        shutil.copytree(photos_dir, tmp_path / "photos"),
        ("--recipe", "probe"),
        iter("123456"),
    )

    def computed_by(*more):
        computed.clear()
        train_here(tiny_weights, folder, tmp_path / next(numbers), *flags, *more)
        return sorted(computed)

    assert computed_by() == ["test", "train"]
    assert computed_by() == []
    os.utime(folder / "test/hotdog/003.png", (1, 1))
    assert computed_by() == ["test"]
    assert computed_by("--preprocessing", "model") == ["test", "train"]
    assert computed_by("--val-fraction", 0.2) == ["train", "validation"]
    assert computed_by("--seed", 1) == []


@pytest.mark.parametrize("content", [b"", b"no features", {"others": torch.ones(25, 96)}, "the half"])
def test_a_damaged_file_in_the_cache_is_computed_again_and_mended(net, photo_set, cache, computed, content):
    first = features_of(net, photo_set)
    [file] = cache.iterdir()
    whole = file.read_bytes()
    if isinstance(content, dict):
        safetensors.torch.save_file(content, file)
    else:
        file.write_bytes(whole[: len(whole) // 2] if content == "the half" else content)
    assert torch.equal(features_of(net, photo_set).features, first.features)
    assert len(computed) == 2 and [path.read_bytes() for path in cache.iterdir()] == [whole]


def test_the_cache_drops_what_was_not_used_for_longest(net, photo_set, cache, computed, monkeypatch):
    features_of(net, photo_set, "a")
    [file] = cache.iterdir()
    monkeypatch.setattr(features, "MAX_CACHE_BYTES", 2 * file.stat().st_size)
    os.utime(file, (1, 1))
    features_of(net, photo_set, "b")
    [second] = set(cache.iterdir()) - {file}
    os.utime(second, (2, 2))
    features_of(net, photo_set, "a")  # used again, so that "b" is the oldest
    features_of(net, photo_set, "c")
    assert len(list(cache.iterdir())) == 2 and file.exists() and not second.exists()
    features_of(net, photo_set, "a")
    assert computed == ["a", "b", "c"]


def test_features_larger_than_the_cache_are_not_kept(net, photo_set, cache, computed, monkeypatch):
    monkeypatch.setattr(features, "MAX_CACHE_BYTES", 25 * 96 * 4 - 1)
    assert torch.equal(features_of(net, photo_set).features, features_of(net, photo_set).features)
    assert len(computed) == 2 and not cache.exists()


@pytest.mark.parametrize("kind", ["kill", "fill_disk"])
def test_a_fault_while_features_are_cached_costs_their_computation_at_most(
    net, photo_set, cache, computed, monkeypatch, kind
):
    faults = Faults(monkeypatch)
    with faults.before(None) as changes:
        expected = features_of(net, photo_set).features
    total = len(changes)
    assert total >= 5, changes
    for number in range(1, total + 1):
        shutil.rmtree(cache)
        with faults.before(number, getattr(faults, kind)), contextlib.suppress(Killed):
            assert torch.equal(features_of(net, photo_set).features, expected)
        assert torch.equal(features_of(net, photo_set).features, expected)
        computed.clear()
        assert torch.equal(features_of(net, photo_set).features, expected) and computed == []
    print(f"{total} faults, as many equal features")


def test_what_a_killed_process_left_in_the_cache_is_cleared_away_after_an_hour(net, photo_set, cache):
    cache.mkdir(parents=True)
    new, old, download = (cache / f"{name}.part" for name in (f"a.{'0' * 16}", f"b.{'f' * 16}", "photo.zip"))
    for file in (new, old, download):
        file.touch()
    for file in (old, download):
        os.utime(file, (1, 1))
    features_of(net, photo_set)
    assert new.exists() and not old.exists() and download.exists()


@pytest.mark.parametrize("library", ["PIL", "torchvision", "timm", "torch"])
def test_another_version_computes_features_again(net, photo_set, computed, monkeypatch, library):
    features_of(net, photo_set)
    monkeypatch.setattr(f"{library}.__version__", "0.0")
    features_of(net, photo_set)
    assert len(computed) == 2


def test_without_a_place_for_the_cache_all_goes_on(net, photo_set, cache, computed):
    cache.parent.parent.write_text("a file where the folder should be")
    assert torch.equal(features_of(net, photo_set).features, features_of(net, photo_set).features)
    assert len(computed) == 2


def test_a_network_that_ends_in_more_than_one_linear_layer_is_refused(net, photo_set, cache, monkeypatch):
    plain = net.forward_head
    monkeypatch.setattr(
        net, "forward_head", lambda x, pre_logits=False: plain(x, pre_logits) * (1 if pre_logits else 2)
    )
    with pytest.raises(UserError, match="more than one linear layer"):
        features_of(net, photo_set)
    assert not cache.exists()


@pytest.fixture(scope="module")
def frozen_run(tiny_weights, photos_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("frozen") / "run"
    train_here(tiny_weights, photos_dir, run_dir, "--recipe", "frozen", "--epochs", 3)
    return run_dir


def test_a_frozen_body_stays_as_it_was_to_the_bit(frozen_run, tiny_weights):
    source = safetensors.torch.load_file(tiny_weights)
    saved = safetensors.torch.load_file(frozen_run / "model/model.safetensors")
    body = source.keys() - {"fc.weight", "fc.bias"}
    assert saved.keys() == source.keys() and "bn1.running_mean" in body and "bn1.num_batches_tracked" in body
    assert all(torch.equal(saved[name], source[name]) for name in body)
    first, *_, last, _ = numbers_of(frozen_run)
    assert last["train_loss"] < first["train_loss"], "the head learns"


def test_cached_features_change_numbers_by_rounding_alone(
    frozen_run, tiny_weights, photos_dir, tmp_path, computed
):
    """Features come 32 photos at a time, a network trains on 8 and a last 1: other kernels, other sums.

    For a single photo torch takes its own matrix product in the place of oneDNN's convolution; on an Intel
    processor the two differ in the last digits, so that equal bits can't be promised.
    """
    run_dir = tmp_path / "run"
    train_here(tiny_weights, photos_dir, run_dir, "--recipe", "frozen", "--epochs", 3, "--no-cache-features")
    assert computed == ["features of train"]  # of the finished run, for its neighbours
    for row, expected in zip(numbers_of(run_dir), numbers_of(frozen_run), strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=0, atol=1e-5, err_msg=name)
    ours, theirs = (
        safetensors.torch.load_file(folder / "model/model.safetensors") for folder in (run_dir, frozen_run)
    )
    for name, value in theirs.items():
        if name.startswith("fc."):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)
        else:
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("flags", "epochs"), [((), [1, 2, 3, None]), (("--head-init", "probe"), [0, 1, 2, 3, None])]
)
def test_two_processes_solve_and_train_on_features_as_one(
    tiny_weights, train, photos_dir, tmp_path, flags, epochs
):
    flags = ("--recipe", "frozen", "--epochs", 3, *flags)
    train_here(tiny_weights, photos_dir, tmp_path / "one", *flags)
    own_cache = {"XDG_CACHE_HOME": str(tmp_path / "cache of two")}
    done = train(photos_dir, tmp_path / "two", *flags, launcher=TWO_PROCESSES, **own_cache)
    assert done.returncode == 0, done.stderr
    assert [row.get("epoch") for row in metrics_of(tmp_path / "two")] == epochs
    for row, expected in zip(numbers_of(tmp_path / "two"), numbers_of(tmp_path / "one"), strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=0, atol=1e-5, err_msg=name)
    for *rows, _ in map(metrics_of, (tmp_path / "one", tmp_path / "two")):
        photos = [row["examples_per_second"] * row["train_seconds"] for row in rows]
        assert photos == pytest.approx([25] * len(rows))
