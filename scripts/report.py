"""Evaluate a saved model on a split of photos: metrics with intervals, predictions, and an HTML page.

python scripts/report.py runs/demo/model                         # writes report/report.html
python scripts/report.py user/name --data-dir my/photos --split validation --output-dir my/report
python scripts/report.py runs/demo/model --foreign other/photos  # how many of them are unknown
accelerate launch scripts/report.py runs/demo/model              # on all GPUs, same results
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from hotdog_hf.config import DataConfig
from hotdog_hf.errors import exit_on_user_error
from hotdog_hf.model.places import check_model


@dataclass(frozen=True)
class ReportConfig:
    """Evaluate a saved model on a split of photos, and write metrics.json, predictions.csv, report.html."""

    # Folder of a saved model (model/ of a run), or a Hub name (user/name, optionally with @revision).
    model: Annotated[str, Positional, tyro.conf.arg(metavar="MODEL")]
    # Folder with train/<class>/* and test/<class>/*, optionally validation/<class>/*, or hf://datasets/user/name.
    # Unset: the run's, if MODEL is in its run's folder.
    data_dir: str | None = None
    # Tables of labels (CSV or JSON lines) that override the folders: path,label[,split][,group].
    # Unset: the run's, if MODEL is in its run's folder and these are its photos.
    labels: tuple[str, ...] = ()
    # Split to evaluate. Validation is also used to choose a threshold; the model has learned train.
    split: Literal["test", "validation", "train"] = "test"
    # Share of train to split off for validation. Unset: the run's, if MODEL is in its run's folder and these
    # are its photos; else none.
    val_fraction: float | None = None
    # Seed of that split. Unset: the run's, or 0.
    seed: int | None = None
    # Photos that cannot be read: stop and name them, or skip them.
    bad_images: Literal["fail", "skip"] = "fail"
    # Mean of the probabilities of each photo and of its mirror image, as predict.py --tta has it. The page
    # then says nothing about the calibration, which was fitted without.
    tta: Literal["none", "flip"] = "none"
    # A folder of photos of other things, without labels: how many of them the model calls unknown, as
    # predict.py --reject does.
    foreign: str | None = None
    # Folder of the report; replaces an earlier one.
    output_dir: str = "report"
    # Class that precision, recall, F1 and the threshold are computed for. Unset: "hotdog" if it exists.
    positive_label: str | None = None
    # Images per forward pass, per process.
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        self.photos("")

    def photos(
        self, data_dir: str, usual_fraction: float = 0.0, usual_labels: tuple[str, ...] = ()
    ) -> DataConfig:
        """Return the photos as a training config."""
        return DataConfig(
            data_dir=data_dir,
            labels=self.labels or usual_labels,
            val_fraction=usual_fraction if self.val_fraction is None else self.val_fraction,
            bad_images=self.bad_images,
        )


def main(config: ReportConfig) -> None:
    """Load model and photos, predict, write."""
    # Imported below so that --help, a mistyped flag and a missing model respond before torch is loaded.
    check_model(config.model)
    import shlex
    import sys

    from hotdog_hf.report import page, runner
    from hotdog_hf.training import launch

    folder = page.check_output_dir(config.output_dir)
    accelerator = launch.build_accelerator("no")  # in float32, like scripts/predict.py and other loaders
    net = runner.load_model(accelerator, config.model)
    knobs = runner.run_knobs(config.model)
    data_dir, fraction, seed, labels = runner.photos_of_run(knobs, config.model, config.data_dir)
    if config.foreign:
        runner.check_can_reject(net, config.model, config.foreign)
    seed = seed if config.seed is None else config.seed
    photos = runner.load_photos(accelerator, config.photos(data_dir, fraction, labels), config.split, seed)
    if warning := runner.older_cut(config.model, photos):
        accelerator.print(warning)
    evaluation = runner.evaluate(
        accelerator, net, photos, config.split, config.positive_label, config.batch_size, config.tta
    )
    if accelerator.is_main_process:
        foreign = config.foreign and runner.foreign_distances(config.model, config.foreign, config.batch_size)
        summary = runner.summary_of(evaluation, config.model, foreign)
        page.write_report(
            folder,
            summary,
            evaluation.names,
            *evaluation.predicted[config.split],
            pictures=runner.draw_galleries(accelerator, evaluation),
            knobs=knobs,
            command=shlex.join(["python", *sys.argv]),
            distances=(evaluation.distances, foreign),
        )
        print(page.describe(summary), f"report: {folder / 'report.html'}", sep="\n")
    del net, evaluation  # a distributed network still alive at exit may abort the process
    launch.finish(accelerator)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(ReportConfig))
