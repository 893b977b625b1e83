"""Upload a trained model, a Space around it, or a folder of photos as a data set, to the Hugging Face Hub.

    python scripts/push.py runs/demo/model user/name
    python scripts/push.py runs/demo/model user/name --private --revision try-2
    python scripts/push.py runs/demo/model user/name --space static   # a web page around the model
    python scripts/push.py --dataset my/photos user/name

Log in once with `hf auth login`, or set HF_TOKEN.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from hotdog_hf.data.folder import check_data_dir
from hotdog_hf.errors import UserError, exit_on_user_error
from hotdog_hf.model.places import check_model_folder


@dataclass(frozen=True)
class PushConfig:
    """Upload a trained model, or with --dataset a folder of photos, to the Hugging Face Hub."""

    # Folder to upload (a run's model/), then the Hub name user/name; with --dataset only the name.
    names: Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="MODEL user/name")]
    # Data folder to upload as an image-classification data set instead.
    dataset: str | None = None
    # Upload a Space around the model: the web app of scripts/app.py, which the Hub runs (gradio), or the page
    # of scripts/export.py --web, which runs in the visitor's browser (static).
    space: Literal["gradio", "static"] | None = None
    # Make the repository private if it is new.
    private: bool = False
    # Branch to upload a model to, created if needed. Unset: main.
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.space and (self.dataset or self.revision):
            raise ValueError("--space goes with neither --dataset nor --revision")
        if self.dataset and self.revision:
            raise ValueError("--revision is for models: a data set goes to its main branch")


def main(config: PushConfig) -> None:
    """Check the permission, then upload."""
    # Imported below so that --help, a mistyped flag and a missing folder respond before torch is loaded.
    if len(config.names) != (1 if config.dataset else 2):
        raise UserError("give a model folder and a Hub name: MODEL user/name, or --dataset DIR user/name")

    folder, repo = config.names[0], config.names[-1]
    if config.dataset:
        check_data_dir(config.dataset)
    else:
        check_model_folder(folder, folder)

    from hotdog_hf import hub
    from hotdog_hf.data.folder import describe_counts
    from hotdog_hf.data.splits import Photos, load_photos, push_photos
    from hotdog_hf.model import saved
    from hotdog_hf.model.licenses import describe_upload

    if config.dataset:
        photos = load_photos(config.dataset)
        print(describe_counts(Photos(photos, config.dataset).counts()))
        hub.check_can_push(repo, repo_type="dataset")
        print("pushed to", push_photos(photos, repo, private=config.private))
    else:
        saved.load_model(folder)  # raises if it cannot be loaded
        hub.check_can_push(repo, "space" if config.space else "model")
        print(describe_upload(folder))
        if config.space:
            from hotdog_hf.deploy.space import push_space

            print("pushed to", push_space(folder, repo, config.space, private=config.private))
            return
        print("pushed to", hub.push_folder(folder, repo, private=config.private, revision=config.revision))


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(PushConfig))
