import re
import shutil
import threading

import datasets
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, draw_photos, run
from loopback_hub import LoopbackHub
from test_scripts import metrics_of

from hotdog_hf.config import DataConfig, ModelConfig, TrainConfig
from hotdog_hf.data import stream, transforms
from hotdog_hf.data.prepare import _read
from hotdog_hf.data.splits import Photos, StreamedSplit, load_photos, select_image_and_label
from hotdog_hf.errors import UserError

CONFIG = {"input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture(autouse=True)
def short_sleep(monkeypatch):
    """After each pass over shuffled shards, `datasets` sleeps 5 seconds while threads that read them end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.5)


@pytest.fixture(scope="module")
def shards(photos_dir, tmp_path_factory):
    """The photos of `photos_dir` in 3 shards of train, of 9, 8 and 8, and 2 of test."""
    folder = tmp_path_factory.mktemp("stream") / "shards"
    done = run("python", ROOT / "scripts/shard.py", photos_dir, folder, "--photos-a-shard", 9)
    assert done.returncode == 0, done.stderr
    assert f"{folder}: 3 shards of train, 2 shards of test" in done.stdout
    return folder


def of_numbers(count, num_shards):
    """A stream whose photos are numbers."""
    columns = {"image": list(range(count)), "label": [number % 2 for number in range(count)]}
    rows = datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=num_shards)
    return StreamedSplit("numbers", rows, [count - count // 2, count // 2], "numbers")


def batches_of(split, world_size, batch_size=8, epoch=1, first_step=0, seed=0):
    """The batches of every process, and the sizes they agree on, with the processes in step as threads."""
    barrier, numbers = threading.Barrier(world_size, timeout=20), [0] * world_size
    found = [None] * world_size

    def process(rank):
        def total(number):
            numbers[rank] = number
            barrier.wait()
            answer = sum(numbers)
            barrier.wait()
            return answer

        sampler = stream.StreamSampler(split, batch_size, seed, 5, total, rank, world_size)
        sampler.seek(epoch, first_step)
        found[rank] = [
            ([(index, row and row["image"]) for _, index, row in batch], size)
            for batch, size in zip(sampler, sampler.step_sizes(), strict=True)
        ]

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("renamed", [{}, {"image": "photo", "label": "class"}])
def test_a_stream_decodes_no_photo_before_it_is_needed(shards, renamed, monkeypatch):
    """`datasets` would decode each, and encode it again as PNG: reading took 500 times as long."""
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    rows = datasets.load_dataset(str(shards), split="train", streaming=True)
    if renamed:
        rows = rows.cast_column("image", datasets.Image(decode=False)).rename_columns(renamed)
        rows = rows.cast_column("photo", datasets.Image())
    assert len(list(select_image_and_label("photos", rows))) == 25


@pytest.mark.parametrize(
    ("num_shards", "world_size"), [(1, 1), (3, 1), (3, 2), (4, 2), (3, 3), (5, 3), (2, 2)]
)
def test_no_photo_is_lost_or_doubled(num_shards, world_size):
    found = batches_of(of_numbers(26, num_shards), world_size)
    read = [number for batches in found for batch, _ in batches for _, number in batch if number is not None]
    assert sorted(read) == list(range(26)) and read != sorted(read)
    indices = [index for batches in found for batch, _ in batches for index, row in batch if row is not None]
    assert len(set(indices)) == 26  # another augmentation each
    steps = list(zip(*found, strict=True))  # every process makes as many
    for step in steps:
        agreed = {size for _, size in step}
        assert agreed == {sum(row is not None for batch, _ in step for _, row in batch)}
        assert all(batch for batch, _ in step)


def test_the_order_follows_from_seed_and_epoch_and_goes_on_where_it_was():
    split = of_numbers(26, 3)
    whole = batches_of(split, 2)
    assert whole == batches_of(split, 2)
    assert whole != batches_of(split, 2, epoch=2) and whole != batches_of(split, 2, seed=1)
    assert batches_of(split, 2, first_step=2) == [batches[2:] for batches in whole]


def test_shards_that_change_while_they_are_read_end_the_run():
    split = of_numbers(26, 1)
    split.counts[0] += 1
    sampler = stream.StreamSampler(split, 8, 0, 5, lambda number: number)
    with pytest.raises(UserError, match="numbers yielded 26 photos of train, but its shards had 27"):
        list(sampler)


def test_a_shard_that_breaks_while_it_is_read_ends_the_run_with_one_line(shards, train, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    path = next((tmp_path / "shards/data").glob("train-00001*"))
    content = path.read_bytes()
    path.write_bytes(content[:600] + bytes(2000) + content[2600:])  # in a photo: the rest is whole
    done = train(tmp_path / "shards", tmp_path / "run", "--streaming", "--epochs", 1)
    assert done.returncode == 2 and "epoch 1, after" in done.stderr, done.stderr
    assert re.search(
        r"cannot read \d+\.png as an image: .* Last good checkpoint: .*step-00000000", done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(UserError, match="--streaming needs --batch-size 3 or more for 3 processes"):
        stream.StreamSampler(of_numbers(4, 1), 2, 0, 5, int, rank=0, world_size=3)


def test_shards_hold_the_files_as_they_are(shards, photos_dir):
    rows = stream.open_stream(str(shards), progress=False)
    on_disk = load_photos(photos_dir)
    assert Photos(rows, "").counts() == Photos(on_disk, "").counts()
    for split, read in (("train", rows["train"].stream), ("test", rows["test"])):
        files = {row["image"]["path"]: row["label"] for row in on_disk[split]}
        contents = sorted((open(path, "rb").read(), label) for path, label in files.items())  # noqa: PTH123, SIM115
        found = [(row["image"]["bytes"], row["label"]) for row in read]
        assert sorted(found) == contents and [label for _, label in found] != sorted(files.values())


def test_workers_change_nothing(shards):
    transform = transforms.train_transform(CONFIG)

    def batches(num_workers):
        split = stream.open_stream(str(shards), progress=False)["train"]
        sampler = stream.StreamSampler(split, 8, seed=3, buffer_size=6, sum_processes=int)
        loader = stream.train_loader(sampler, transform, num_workers=num_workers)
        loader.batch_sampler.seek(2)
        return list(loader)

    for one, other in zip(batches(0), batches(2), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_streamed_run_resumes_to_the_bit(shards, train, tmp_path):
    flags = (
        "--streaming",
        "--epochs",
        1,
        "--batch-size",
        8,
        "--checkpoint-every",
        1,
        "--keep-checkpoints",
        9,
    )
    done = train(shards, tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    assert "train is streamed in 3 shards; photos are not checked" in done.stdout
    assert re.search(r"\nall +25 +11\n", done.stdout)
    before = metrics_of(tmp_path / "run")
    weights = (tmp_path / "run/model/model.safetensors").read_bytes()
    for checkpoint in ("step-00000003", "step-00000004"):
        shutil.rmtree(tmp_path / "run/checkpoints" / checkpoint)
    (tmp_path / "run/model/model.safetensors").unlink()
    done = train(shards, tmp_path / "run", *flags, "--resume", "auto")
    assert done.returncode == 0 and "epoch 1, step 2" in done.stdout, done.stderr
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == weights
    after = metrics_of(tmp_path / "run")
    same = [name for name in before[-1] if "second" not in name and name != "share_of_limit"]
    assert [[row.get(name) for name in same] for row in before] == [
        [row.get(name) for name in same] for row in after
    ]


def test_two_processes_share_a_stream(shards, train, tmp_path):
    launcher = (
        "accelerate",
        "launch",
        "--config_file",
        ROOT / "accelerate_config.yaml",
        "--num_processes",
        2,
    )
    done = train(shards, tmp_path / "run", "--streaming", "--epochs", 1, launcher=launcher)
    assert done.returncode == 0, done.stderr
    accuracy = metrics_of(tmp_path / "run")[0]["train_accuracy"]
    assert accuracy * 25 == pytest.approx(round(accuracy * 25))


def test_a_data_set_of_the_hub_is_streamed(photos_dir, train, tmp_path):
    with LoopbackHub() as server:
        env = server.environment(tmp_path / "home")
        done = run("python", ROOT / "scripts/push.py", "--dataset", photos_dir, "tester/photos", **env)
        assert done.returncode == 0, done.stderr
        done = train("hf://datasets/tester/photos", tmp_path / "run", "--streaming", "--epochs", 1, **env)
        assert done.returncode == 0, done.stderr
        assert re.search(r"\nall +25 +11\n", done.stdout) and "is streamed in 1 shards" in done.stdout
        assert "warning: the shards are sorted by class" not in done.stdout  # the buffer holds them all
        done = train("hf://datasets/tester/none", tmp_path / "none", "--streaming", **env)
        assert done.returncode == 2 and "tester/none" in done.stderr and "Traceback" not in done.stderr


def unlabelled(folder):
    path = folder / "data/train-00000-of-00003.parquet"
    table = pyarrow.parquet.read_table(path)
    labels = pyarrow.array([-1] * len(table), table.schema.field("label").type)
    pyarrow.parquet.write_table(table.set_column(1, table.schema.field("label"), labels), path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "no such data folder"),
        (lambda folder: shutil.rmtree(folder / "data"), "--streaming cannot read"),
        (lambda folder: [path.unlink() for path in (folder / "data").glob("test*")], "no shards of test"),
        (
            lambda folder: (folder / "data/train-00001-of-00003.parquet").write_bytes(b"PAR1 cut off"),
            "a shard cannot be read",
        ),
        (unlabelled, "train-00000-of-00003.parquet: 9 photos have no label"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(shards, tmp_path, harm, message):
    shutil.copytree(shards, tmp_path / "shards")
    harm(tmp_path / "shards")
    with pytest.raises(UserError, match=message):
        stream.open_stream(str(tmp_path / "shards"), progress=False)


def test_shards_sorted_by_class_are_warned_of(photos_dir, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.Dataset, "shuffle", lambda rows, seed: rows)
    stream.write_shards(load_photos(photos_dir), tmp_path / "sorted", 9, 0)
    for folder, buffer, warned in (
        (tmp_path / "sorted", 24, 1),
        (tmp_path / "sorted", 25, 0),
        (shards, 9, 0),
    ):
        config = DataConfig(data_dir=str(folder), streaming=True, shuffle_buffer=buffer)
        _, found = _read(config, 0, progress=False, found=None)
        assert ("warning: the shards are sorted by class" in found.summary) == warned


def test_a_folder_of_photos_says_how_to_make_shards(photos_dir):
    with pytest.raises(UserError, match=r"reads Parquet shards, and .*png is not one: scripts/shard.py"):
        stream.open_stream(str(photos_dir), progress=False)


def test_other_classes_in_test_are_refused(tmp_path):
    for split, names in (("train", "ab"), ("test", "ac")):
        draw_photos(tmp_path / split / "train", dict.fromkeys(names, 2))
        draw_photos(tmp_path / split / "test", dict.fromkeys(names, 2))
        stream.write_shards(load_photos(tmp_path / split), tmp_path / f"{split}-shards", 10, 0)
    for path in (tmp_path / "train-shards/data").glob("test*"):
        shutil.copy(tmp_path / "test-shards/data" / path.name, path)
    with pytest.raises(UserError, match=r"test-.*parquet has the classes \['a', 'c'\], the first"):
        stream.open_stream(str(tmp_path / "train-shards"), progress=False)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"data": DataConfig(streaming=True), "model": ModelConfig(head_init="probe")},
            "features of all photos",
        ),
        ({"data": lambda: DataConfig(streaming=True, val_fraction=0.1)}, "cannot be cut from a stream"),
        ({"data": lambda: DataConfig(streaming=True, bad_images="skip")}, "needs a check of all photos"),
        ({"data": lambda: DataConfig(shuffle_buffer=0)}, "--shuffle-buffer must be 1 or more, got 0"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_at_once(groups, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{name: group() if callable(group) else group for name, group in groups.items()})


def test_unreadable_photos_are_left_out_of_shards_where_asked(photos_dir, tmp_path):
    shutil.copytree(photos_dir, tmp_path / "photos")
    next((tmp_path / "photos/train/hotdog").iterdir()).write_bytes(b"no image")
    words = ("python", ROOT / "scripts/shard.py", tmp_path / "photos", tmp_path / "shards")
    assert run(*words).returncode == 2
    assert run(*words, "--bad-images", "skip").returncode == 0
    assert len(stream.open_stream(str(tmp_path / "shards"), progress=False)["train"]) == 24


def test_an_existing_folder_is_not_written_to(shards, photos_dir):
    done = run("python", ROOT / "scripts/shard.py", photos_dir, shards)
    assert done.returncode == 2 and "already exists" in done.stderr and "Traceback" not in done.stderr
