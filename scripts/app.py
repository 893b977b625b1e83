"""Try a model in the browser: photos from files, the clipboard or the camera.

python scripts/app.py runs/demo/model   # then open the address that it prints
python scripts/app.py model.onnx --data-dir my/photos --port 8080
"""

from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from hotdog_hf.errors import exit_on_user_error


@dataclass(frozen=True)
class AppConfig:
    """Serve a model as a web app, for this machine alone unless told otherwise. Ctrl-C ends it."""

    # Folder of a saved model (model/ of a run), a name on the Hub, or a .onnx file made by scripts/export.py,
    # which needs no torch.
    model: Annotated[str, Positional, tyro.conf.arg(metavar="MODEL")]
    # Data folder whose test photos are offered as examples. Unset: the one that the run trained on.
    data_dir: str | None = None
    # Where photos with a wrong answer are saved, as <class>/<photo>: the layout of train/.
    feedback_dir: str = "feedback"
    # Address to serve on. 127.0.0.1 is for this machine alone; 0.0.0.0 for everybody in the network.
    host: str = "127.0.0.1"
    # Port. Unset: the first free one from 7860 on.
    port: int | None = None
    # Also make a public address, through a server of gradio's: whoever has it can use the app for a week.
    share: bool = False
    # Largest photo that can be uploaded, in MB.
    max_megabytes: int = 30

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"--port must be from 1 to 65535, got {self.port}")
        if self.max_megabytes < 1:
            raise ValueError(f"--max-megabytes must be at least 1, got {self.max_megabytes}")


def main(config: AppConfig) -> None:
    """Load the model, build the app, serve it."""
    # Imported here so that --help and a mistyped flag respond before numpy and torch are loaded.
    from hotdog_hf.deploy.app import build_app, find_examples, launch_app
    from hotdog_hf.model.predictor import load_predictor

    predictor = load_predictor(config.model)
    examples = find_examples(config.model, config.data_dir)
    app = build_app(predictor, examples, config.feedback_dir)
    launch_app(app, config.host, config.port, config.share, config.max_megabytes)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(AppConfig))
