"""Audit photos before any training: accuracy to expect, wrong labels, how many more photos, odd ones out.

python scripts/audit.py my/photos                                    # writes audit/audit.html
python scripts/audit.py my/photos --split test --write-fixes fixes.csv
python scripts/audit.py my/photos --weights runs/mine/model          # by the features of a trained model
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from hotdog_hf.config import DEFAULT_DATA_DIR, DataConfig
from hotdog_hf.data.folder import check_data_dir
from hotdog_hf.data.labels import check_tables
from hotdog_hf.errors import exit_on_user_error
from hotdog_hf.model.places import check_weights


@dataclass(frozen=True)
class AuditConfig:
    """Audit photos by the features of a pretrained network, and write audit.html and audit.json."""

    # Folder with train/<class>/* and test/<class>/*, optionally validation/<class>/*, or hf://datasets/user/name.
    data_dir: Annotated[str, Positional, tyro.conf.arg(metavar="DATA")] = DEFAULT_DATA_DIR
    # Tables of labels (CSV or JSON lines) that override the folders: path,label[,split][,group].
    # What --write-fixes wrote is one.
    labels: tuple[str, ...] = ()
    # Photos to audit.
    split: Literal["train", "validation", "test", "all"] = "train"
    # Any timm model name; its features stand for the photos.
    model: str = "resnet18"
    # Pretrained weights as in scripts/train.py: "auto", "bundled", a file, or a trained model (its folder, or
    # hf-hub:user/name), which says its own --model.
    weights: str = "auto"
    # Geometry of the photos: the chapter's, or the one that the pretrained model declares.
    preprocessing: Literal["chapter", "model"] = "chapter"
    # Side of the square input in pixels. Unset: the model's own.
    image_size: int | None = None
    # Photos that cannot be read: end with their names, or leave them out.
    bad_images: Literal["fail", "skip"] = "fail"
    # CSV file for the photos whose label looks wrong, most suspicious first: path,label,suggested,confidence.
    write_fixes: str | None = None
    # Where the audit goes; an earlier one there is replaced.
    output_dir: str = "audit"
    # Seed of the folds and draws.
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}")
        self.photos()

    def photos(self) -> DataConfig:
        """Return which photos are meant, as a training would say it."""
        return DataConfig(
            data_dir=self.data_dir,
            labels=self.labels,
            bad_images=self.bad_images,
            preprocessing=self.preprocessing,
            image_size=self.image_size,
        )


def main(config: AuditConfig) -> None:
    """Audit, write the page, print the table."""
    # Imported below so that --help, a mistyped flag and a missing file respond before torch is loaded.
    check_data_dir(config.data_dir)
    check_tables(config.labels)
    check_weights(config.weights)

    import shlex
    import sys

    from hotdog_hf.audit import page, runner
    from hotdog_hf.model.source import describe_source
    from hotdog_hf.training import launch

    folder = page.check_output_dir(config.output_dir)
    accelerator = launch.build_accelerator("no")
    photos = runner.load_photos(accelerator, config.photos(), config.split, config.seed)
    extractor = runner.load_extractor(accelerator, photos, config.photos(), config.model, config.weights)
    audit = runner.audit_photos(extractor, config.split, config.seed, config.labels)
    if accelerator.is_main_process:
        network = describe_source(config.model, config.weights)
        trained_here = runner.is_trained_on(config.weights, config.data_dir)
        page.write_audit(folder, audit, network, trained_here, shlex.join(["python", *sys.argv]))
        print(page.describe(audit, trained_here))
        if config.write_fixes:
            count = page.write_fixes(config.write_fixes, audit)
            print(f"{count} labels to look through, most suspicious first: {config.write_fixes}")
        print(f"audit: {folder / page.FILES[1]}")
    launch.finish(accelerator)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(AuditConfig))
