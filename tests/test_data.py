import shutil
import time
import types

import datasets
import numpy as np
import pytest
import torch
import torchvision
from accelerate import Accelerator
from conftest import draw_photos
from PIL import Image

from hotdog_hf.config import OptimConfig
from hotdog_hf.data import images, loaders, transforms
from hotdog_hf.data.folder import SHOWN_CLASSES, describe_counts
from hotdog_hf.data.splits import Photos, load_photos, resolve_positive, sample_photos
from hotdog_hf.errors import UserError
from hotdog_hf.training import engine

CHAPTER_CONFIG = {
    "input_size": (3, 224, 224),
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "squash",
}


@pytest.fixture
def folder(tmp_path):
    draw_photos(tmp_path / "train", {"b": 4, "a": 3})
    draw_photos(tmp_path / "test", {"b": 2, "a": 2})
    return tmp_path


def count_lists(photos):
    return {split: list(by_class.values()) for split, by_class in Photos(photos, "").counts().items()}


def test_a_plain_folder_is_what_imagefolder_makes_of_it(folder, tmp_path):
    ours = load_photos(folder)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "test"):
        assert ours[split].features["label"] == theirs[split].features["label"]
        paths = [
            row["image"]["path"] for row in theirs[split].cast_column("image", datasets.Image(decode=False))
        ]
        assert sorted(zip(paths, theirs[split]["label"], strict=True)) == sorted(
            zip((row["image"]["path"] for row in ours[split]), ours[split]["label"], strict=True)
        )


def test_file_names_change_neither_split_nor_count(folder):
    odd = ["test.png", "train-1.png", "validation test.png", "img[1].png", "a*b?.png", "-x.png", "x::y.png"]
    odd += ["ü ß 热狗.png", "UPPER.PNG", "deeper/nested.png"]
    source = folder / "train/a/000.png"
    for name in odd:
        (folder / "train/a" / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, folder / "train/a" / name)
    (folder / "train/a/notes.txt").write_text("no image")
    (folder / "train/a/._000.png").write_bytes(b"Mac metadata")
    photos = load_photos(folder)
    assert count_lists(photos) == {"train": [3 + len(odd), 4], "test": [2, 2]}
    assert all(images.open_photo(row).decode().mode == "RGB" for row in photos["train"])
    table = describe_counts(Photos(photos, folder).counts()).splitlines()
    rows = [["class", "train", "test"], ["a", "13", "2"], ["b", "4", "2"], ["all", "17", "4"]]
    assert [line.split() for line in table] == rows


def test_the_table_of_counts_fits_on_a_screen_whatever_the_classes_are():
    many = {f"class {number} {'x' * 20}": number for number in range(1000)}
    table = describe_counts({"train": many, "test": {"class 0 \x1b[2J": 7}}).splitlines()
    assert len(table) == SHOWN_CLASSES + 3 and len({len(line) for line in table}) == 1
    assert table[-2].split()[:3] == ["951", "more", "classes"]
    assert table[-1].split() == ["all", str(sum(many.values())), "7"]
    assert sum(int(line.split()[-2]) for line in table[1:-1]) == sum(many.values())
    assert all(line.isprintable() for line in table)


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_a_validation_folder_goes_by_three_names(folder, name):
    draw_photos(folder / name, {"a": 1, "b": 2})
    assert count_lists(load_photos(folder)) == {"train": [3, 4], "validation": [1, 2], "test": [2, 2]}


def test_three_classes_and_sorted_names(tmp_path):
    draw_photos(tmp_path / "train", {"taco": 2, "Burger": 3, "hotdog": 4})
    draw_photos(tmp_path / "test", {"taco": 1, "Burger": 1, "hotdog": 1})
    photos = load_photos(tmp_path)
    assert photos["test"].features["label"].names == ["Burger", "hotdog", "taco"]
    assert count_lists(photos)["train"] == [3, 4, 2]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such data folder"),
        (lambda f: shutil.rmtree(f / "test"), "no test/ in"),
        (lambda f: (f / "train").rename(f / "training"), "no train/ in .*found: test, training"),
        (lambda f: (f / "train/a/000.png").rename(f / "train/a/\udce9.png"), "is not UTF-8; rename it"),
        (lambda f: shutil.rmtree(f / "test/b"), "class 'b' is in .*/train but not in test/"),
        (lambda f: (f / "test/c").mkdir(), "class 'c' is in .*/test but not in train/"),
        (lambda f: [p.unlink() for p in (f / "train/a").iterdir()], "no image in .*/train/a"),
        (lambda f: [shutil.rmtree(f / s / "b") for s in ("train", "test")], "two class folders.* only 'a'"),
        (lambda f: [(f / n).mkdir() for n in ("val", "valid")], "several validation folders: val, valid"),
    ],
)  # fmt: skip
def test_a_malformed_folder_is_one_clear_error(folder, harm, message):
    harm(folder)
    with pytest.raises(UserError, match=message):
        load_photos(folder)


def test_the_validation_cut_is_stratified_and_follows_the_seed(tmp_path):
    draw_photos(tmp_path / "train", {"a": 20, "b": 40}, size=(8, 8))
    draw_photos(tmp_path / "test", {"a": 1, "b": 1}, size=(8, 8))
    paths = [
        sorted(row["image"]["path"] for row in load_photos(tmp_path, 0.2, seed)["validation"])
        for seed in (1, 1, 2)
    ]
    assert count_lists(load_photos(tmp_path, 0.2, 1)) == {
        "train": [16, 32],
        "validation": [4, 8],
        "test": [1, 1],
    }
    assert paths[0] == paths[1] != paths[2]
    with pytest.raises(UserError, match=r"--val-fraction 0\.01"):
        load_photos(tmp_path, 0.01)


def test_the_positive_class_is_chosen_by_name():
    assert resolve_positive(["hotdog", "not-hotdog"], None) == "hotdog"
    assert resolve_positive(["cat", "dog"], None) is None
    assert resolve_positive(["cat", "dog"], "dog") == "dog"
    with pytest.raises(UserError, match="'bird' is none of the classes: cat, dog"):
        resolve_positive(["cat", "dog"], "bird")


def test_the_eval_transform_is_the_chapters():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 417, 3), dtype=np.uint8))
    chapter = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize([256, 256]),
            torchvision.transforms.CenterCrop(224),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(CHAPTER_CONFIG["mean"], CHAPTER_CONFIG["std"]),
        ]
    )
    assert torch.equal(transforms.eval_transform(CHAPTER_CONFIG)(image), chapter(image))


def test_the_train_transform_is_the_chapters():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 417, 3), dtype=np.uint8))
    chapter = torchvision.transforms.Compose(
        [
            torchvision.transforms.RandomResizedCrop(224),
            torchvision.transforms.RandomHorizontalFlip(),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(CHAPTER_CONFIG["mean"], CHAPTER_CONFIG["std"]),
        ]
    )
    ours = transforms.train_transform(CHAPTER_CONFIG)
    for seed in range(5):
        torch.manual_seed(transforms.derive_seed(7, seed))
        expected = chapter(image)
        pixels = ours.pixels(image, 7, seed)
        assert pixels.dtype == torch.uint8
        assert torch.equal(ours.normalize(pixels[None])[0], expected)


def test_without_flips_a_crop_is_never_mirrored():
    image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
    mirrored = {
        flip: [
            pixels[0, 0, -1] < pixels[0, 0, 0]
            for seed in range(12)
            for pixels in [transforms.train_transform(CHAPTER_CONFIG, 32, 0.5, flip).pixels(image, seed)]
        ]
        for flip in (True, False)
    }
    assert any(mirrored[True]) and not any(mirrored[False])


def test_randaugment_changes_a_crop_by_more_than_crop_and_flip():
    """Each of 8 crops of a grey photo: plain ones stay grey and whole, of the others at most a few do."""
    image = Image.fromarray(np.full((64, 64, 3), 120, np.uint8))
    changed = {
        augmentation: sum(
            bool((transform.pixels(image, number) != 120).any())
            for transform in [transforms.train_transform(CHAPTER_CONFIG, 32, augmentation=augmentation)]
            for number in range(8)
        )
        for augmentation in ("crop", "randaugment")
    }
    assert changed["crop"] == 0 and changed["randaugment"] >= 4


@pytest.fixture(params=["crop", "randaugment"])
def dataset(folder, request):
    config = CHAPTER_CONFIG | {"input_size": (3, 32, 32)}
    transform = transforms.train_transform(config, augmentation=request.param)
    return loaders.PhotoDataset(load_photos(folder)["train"], transform, seed=3)


def test_augmentation_depends_on_seed_epoch_and_photo_alone(dataset):
    first = dataset[1, 2]["pixel_values"]
    torch.rand(7)
    assert torch.equal(dataset[1, 2]["pixel_values"], first)
    assert not torch.equal(dataset[2, 2]["pixel_values"], first)
    other_seed = loaders.PhotoDataset(dataset.rows, dataset.transform, seed=4)
    assert not torch.equal(other_seed[1, 2]["pixel_values"], first)


def test_loading_a_photo_leaves_the_global_generator_alone(dataset):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    dataset[1, 2]
    assert torch.rand(1) == expected


def test_threads_change_nothing(dataset):
    keys = [(epoch, index) for epoch in (1, 2) for index in range(len(dataset))] * 5
    one_by_one = [dataset[key] for key in keys]
    dataset.threads = 8
    for together, alone in zip(dataset.__getitems__(keys), one_by_one, strict=True):
        assert torch.equal(together["pixel_values"], alone["pixel_values"])
        assert (together["index"], together["labels"]) == (alone["index"], alone["labels"])


@pytest.mark.parametrize(("workers", "last_epoch"), [(2, 0), (0, 3), (2, 3)])
def test_workers_and_reading_ahead_change_nothing(dataset, workers, last_epoch):
    batches = {}
    for ahead in (False, True):
        loader = loaders.train_loader(
            dataset, 3, num_workers=ahead and workers, last_epoch=ahead and last_epoch
        )
        for place in [(1, 0), (2, 0), (2, 1), (1, 0), (3, 0), (4, 0)]:  # also back, and beyond the last
            loader.batch_sampler.seek(*place)
            batches[ahead, place] = [batch["pixel_values"] for batch in loader]
            same = zip(batches[ahead, place], batches[False, place], strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in same)
    assert not torch.equal(batches[True, (1, 0)][0], batches[True, (2, 0)][0])


class ReadsLogged(torch.utils.data.Dataset):
    """Its items are their keys, and a file has a line for each that was read, in whatever process."""

    def __init__(self, file):
        self.file = file

    def __getitem__(self, key):
        with self.file.open("a") as log:
            log.write(f"{key}\n")
        return key


def test_loader_processes_begin_the_next_epoch_while_nobody_asks_for_it(tmp_path):
    sampler = loaders.StepSampler(6, 3, seed=1, last_epoch=2)
    loader = loaders.step_loader(ReadsLogged(tmp_path / "log"), sampler, 1, loaders.StepLoader)
    sampler.seek(1)
    assert len(list(loader)) == 2
    deadline = time.monotonic() + 30
    while "(2, " not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline, "the second epoch was not begun"
        time.sleep(0.01)
    sampler.seek(2)
    assert [epochs.tolist() for epochs, _ in loader] == [[2, 2, 2]] * 2
    assert len((tmp_path / "log").read_text().splitlines()) == 12, "every photo is read once an epoch"


@pytest.mark.parametrize(("most", "reads"), [(8 * 3 * 32 * 32, 1), (8 * 3 * 32 * 32 - 1, 3)])
def test_photos_for_evaluation_are_read_once_if_they_fit(dataset, monkeypatch, most, reads):
    read, pixel_values = [], dataset.pixel_values
    dataset.pixel_values = lambda epoch, index: read.append(index) or pixel_values(epoch, index)
    monkeypatch.setattr(loaders, "MOST_KEPT", most)
    loader = loaders.KeptLoader(Accelerator(cpu=True).prepare(loaders.eval_loader(dataset, 4)))
    next(iter(loader))  # ended early, as by a stop signal: nothing is kept
    read.clear()
    passes = [list(loader) for _ in range(3)]
    assert sorted(read) == sorted(list(range(7)) * reads) and len(loader) == 2
    for batches in passes:
        for ours, theirs in zip(batches, passes[0], strict=True):
            assert ours.keys() == {"pixel_values", "labels", "index"}
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (9, 4), (7, 7), (5, 8)])
def test_processes_share_out_the_batches_of_one(size, batch_size, world_size):
    whole = list(loaders.StepSampler(size, batch_size, seed=1))
    shares = [list(loaders.StepSampler(size, batch_size, 1, rank, world_size)) for rank in range(world_size)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert all(parts), "a process without a photo would leave the others waiting"
        real = [key for part in parts for key in part if key[1] != loaders.PhotoDataset.PADDING]
        assert sorted(real) == sorted(batch)
    assert sorted(index for batch in whole for _, index in batch) == list(range(size))
    assert loaders.StepSampler(size, batch_size, 1).step_sizes() == [len(batch) for batch in whole]


def test_every_epoch_has_an_order_of_its_own():
    sampler = loaders.StepSampler(50, 50, seed=1)
    orders = []
    for epoch in (1, 2, 1):
        sampler.seek(epoch)
        orders.append([index for _, index in next(iter(sampler))])
    assert orders[0] == orders[2] != orders[1]


def test_the_padding_photo_changes_no_gradient_and_is_not_counted(dataset):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    accelerator, config = Accelerator(cpu=True), OptimConfig(label_smoothing=0.1)
    found = []
    for indices in ([2, 3], [2, 3, loaders.PhotoDataset.PADDING]):
        batch = torch.utils.data.default_collate([dataset[1, index] for index in indices])
        state = types.SimpleNamespace(model=net, totals=torch.zeros(3), class_weights=None)
        loss = engine.forward_backward(accelerator, state, dataset, batch, 2, config)
        found.append([loss, state.totals, *(parameter.grad.clone() for parameter in net.parameters())])
        net.zero_grad()
    for ours, padded in zip(*found, strict=True):
        torch.testing.assert_close(ours, padded)
    assert found[1][1][2] == 2


def test_the_showcase_is_the_chapters(folder):
    first, last, titles = sample_photos(load_photos(folder)["train"], "b", count=2)
    assert titles == ("b", "a")
    assert [image.tobytes() for image in first] == [
        images.decode_image(folder / "train/b" / name).tobytes() for name in ("000.png", "001.png")
    ]
    assert [image.tobytes() for image in last] == [
        images.decode_image(folder / "train/a" / name).tobytes() for name in ("002.png", "001.png")
    ]


def test_a_photo_to_be_looked_at_is_small_and_a_jpeg_is_not_decoded_whole(tmp_path):
    noise = Image.effect_noise((1200, 900), 80).convert("RGB")
    for kind in ("jpg", "png"):
        noise.save(tmp_path / f"photo.{kind}")
        image = images.thumbnail({"image": {"path": str(tmp_path / f"photo.{kind}"), "bytes": None}}, 100)
        assert image.size == (100, 75)
