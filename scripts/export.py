"""Export a saved model to ONNX: one file that predicts without torch.

python scripts/export.py runs/demo/model model.onnx
python scripts/export.py runs/demo/model model.onnx --input bytes   # takes photos of any size as they are
python scripts/predict.py model.onnx my/photos
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from hotdog_hf.errors import exit_on_user_error


@dataclass(frozen=True)
class ExportConfig:
    """Export a saved model to ONNX, checked against PyTorch before it is written."""

    # Folder of a saved model.
    model: Annotated[str, Positional, tyro.conf.arg(metavar="MODEL")]
    # File to write; it holds the class names and the preprocessing too.
    out: Annotated[str, Positional, tyro.conf.arg(metavar="OUT.onnx")]
    # What the file takes: a batch of resized and normalised pixels, float32 [batch, 3, height, width]; or one
    # photo of any size as RGB bytes, uint8 [H, W, 3], which it resizes, crops and normalises itself.
    input: Literal["pixels", "bytes"] = "pixels"
    # ONNX opset version.
    opset: int = 18

    def __post_init__(self) -> None:
        if not self.out.endswith(".onnx"):
            raise ValueError(f"OUT.onnx must end in .onnx, got {self.out!r}")
        if not 7 <= self.opset <= 20:  # what torch.onnx.export supports without onnxscript
            raise ValueError(f"--opset must be from 7 to 20, got {self.opset}")


def main(config: ExportConfig) -> None:
    """Export, check, write."""
    # Imported here so that --help and a mistyped flag respond before torch is loaded.
    from hotdog_hf.deploy.export import export_onnx

    difference = export_onnx(config.model, config.out, config.opset, takes_photos=config.input == "bytes")
    print(f"{config.out}: ONNX opset {config.opset}, probabilities within {difference:.0e} of PyTorch's")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(ExportConfig))
