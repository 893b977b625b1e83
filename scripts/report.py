"""Judge a saved model on a split of photos: numbers with intervals, a table, and one page to look at.

python scripts/report.py runs/demo/model --data-dir data/sample            # writes report/report.html
python scripts/report.py user/name --data-dir my/photos --split validation --output-dir my/report
accelerate launch scripts/report.py runs/demo/model --data-dir data/sample # on every GPU, the same numbers
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from hotdog_hf.config import DEFAULT_DATA_DIR, DataConfig
from hotdog_hf.errors import UserError, exit_on_user_error


@dataclass(frozen=True)
class ReportConfig:
    """Judge a saved model on a split of photos, and write metrics.json, predictions.csv and report.html."""

    # Folder of a saved model, or a Hub name (user/name, with @revision where wanted).
    model: Annotated[str, Positional, tyro.conf.arg(metavar="MODEL")]
    # Folder with train/<class>/* and test/<class>/*, optionally validation/<class>/*, or hf://datasets/user/name.
    data_dir: str = DEFAULT_DATA_DIR
    # Photos to judge by. Those of validation also choose a threshold, those of train were learned.
    split: Literal["test", "validation", "train"] = "test"
    # Share of train to cut off as the validation split. Unset: what the training cut off, where MODEL lies in
    # its run's folder and these are its photos; else none.
    val_fraction: float | None = None
    # Seed of that cut. Unset: the training's, or 0.
    seed: int | None = None
    # Photos that cannot be read: end with their names, or go on without.
    bad_images: Literal["fail", "skip"] = "fail"
    # Where the report goes; an earlier one there is replaced.
    output_dir: str = "report"
    # Class that precision, recall, F1 and the threshold speak of. Unset: "hotdog" where that class exists.
    positive_label: str | None = None
    # Images that go through the network together, per process.
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        self.photos(0.0)

    def photos(self, usual_fraction: float) -> DataConfig:
        """Return which photos are meant, as a training would say it."""
        fraction = usual_fraction if self.val_fraction is None else self.val_fraction
        return DataConfig(data_dir=self.data_dir, val_fraction=fraction, bad_images=self.bad_images)


def main(config: ReportConfig) -> None:
    """Load model and photos, predict, write."""
    # Imported here so that --help and a mistyped flag answer before torch is loaded.
    import shlex
    import sys

    from tqdm import tqdm

    from hotdog_hf.data import images, loaders, transforms
    from hotdog_hf.data.prepare import open_photos
    from hotdog_hf.data.splits import names_of, resolve_positive
    from hotdog_hf.data.transforms import MEMORY_FORMAT
    from hotdog_hf.model import network, saved
    from hotdog_hf.report import gradcam
    from hotdog_hf.report.page import check_output_dir, describe, image_uri, write_report
    from hotdog_hf.report.runner import galleries, run_knobs, validation_cut
    from hotdog_hf.report.scores import choose_threshold, label_order, summarise
    from hotdog_hf.training import engine, launch

    folder = check_output_dir(config.output_dir)
    # In float32, as scripts/predict.py and every other loader of the folder compute.
    accelerator = launch.build_accelerator("no")
    with accelerator.local_main_process_first():
        net = saved.load_model(config.model)
    knobs = run_knobs(config.model)
    fraction, seed = validation_cut(knobs, config.data_dir)
    seed = seed if config.seed is None else config.seed
    splits, _ = open_photos(config.photos(fraction), seed, accelerator)
    if config.split not in splits:
        found = ", ".join(splits)
        raise UserError(
            f"{config.data_dir} has no {config.split} split, only {found}: --val-fraction cuts one"
        )
    label_names, data_config = network.label_names_of(net), network.data_config_of(net)
    order = label_order(splits["train"].features["label"].names, label_names)
    positive_label = resolve_positive(label_names, config.positive_label)

    # Predictions. A threshold is chosen on validation alone.
    eval_splits = [config.split]
    if positive_label and "validation" in splits and config.split != "validation":
        eval_splits.append("validation")
    eval_sets = {
        split: loaders.PhotoDataset(splits[split], transforms.eval_transform(data_config))
        for split in eval_splits
    }
    net, predicted = accelerator.prepare(net.to(memory_format=MEMORY_FORMAT)), {}
    for split, photo_set in eval_sets.items():
        loader = loaders.eval_loader(
            photo_set, config.batch_size, num_workers=launch.default_workers(accelerator)
        )
        probabilities, labels = engine.predict(accelerator, net, accelerator.prepare(loader), title=split)
        predicted[split] = probabilities.numpy(), order[labels.numpy()]
    probabilities, labels = predicted[config.split]

    if accelerator.is_main_process:
        # Looked at one by one, so by the bare network.
        bare, photo_set, pictures = accelerator.unwrap_model(net), eval_sets[config.split], {}
        for name, indices in galleries(probabilities, labels).items():
            pictures[name] = []
            for index in tqdm(indices, desc=name, unit="img", leave=False, disable=None):
                bytes_of_one = photo_set[index]["pixel_values"][None].to(accelerator.device)
                pixels = photo_set.network_input(bytes_of_one)[0]
                heat = gradcam.grad_cam(bare, pixels, int(probabilities[index].argmax()))
                seen = None if heat is None else image_uri(gradcam.overlay(pixels, heat, data_config))
                photo = image_uri(images.read_photo(photo_set.rows[index]))
                pictures[name].append({"index": index, "photo": photo, "overlay": seen})
        summary = {
            "model": config.model,
            "data_dir": config.data_dir,
            "split": config.split,
            "label_names": label_names,
            "positive_label": positive_label,
            "threshold": None,
            **summarise(probabilities, labels, label_names, positive_label),
        }
        if positive_label and "validation" in predicted:
            summary["threshold"] = choose_threshold(predicted, label_names.index(positive_label))
        write_report(
            folder,
            summary,
            files=names_of(photo_set.rows, config.data_dir),
            probabilities=probabilities,
            labels=labels,
            pictures=pictures,
            knobs=knobs,
            command=shlex.join(["python", *sys.argv]),
        )
        print(describe(summary), f"report: {folder / 'report.html'}", sep="\n")
    net, *_ = launch.finish(accelerator, net)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(ReportConfig))
