"""Export a saved model: one ONNX file that predicts without torch, or a web page that needs no server.

python scripts/export.py runs/demo/model model.onnx
python scripts/export.py runs/demo/model model.onnx --input bytes   # takes photos of any size
python scripts/export.py runs/demo/model model.onnx --precision int8 --data-dir my/photos
python scripts/export.py runs/demo/model page --web --precision fp16   # a folder with index.html
python scripts/predict.py model.onnx my/photos
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from hotdog_hf.errors import exit_on_user_error
from hotdog_hf.model.places import check_model


@dataclass(frozen=True)
class ExportConfig:
    """Export a saved model to ONNX, checked against PyTorch before it is written."""

    # Folder of a saved model (model/ of a run).
    model: Annotated[str, Positional, tyro.conf.arg(metavar="MODEL")]
    # File to write, *.onnx; it holds the class names and the preprocessing too. With --web, a folder.
    out: Annotated[str, Positional, tyro.conf.arg(metavar="OUT")]
    # Write a folder with a page that runs the model in the browser: photos from files, drag-and-drop or the
    # camera, also offline. Any static host can serve it, and no photo leaves the device.
    web: bool = False
    # The folder dist/ of the npm package onnxruntime-web, for --web. Unset: npm downloads it once.
    ort_dir: str | None = None
    # Input of the file: a batch of resized and normalised pixels, float32 [batch, 3, height, width]; or one
    # photo of any size as RGB bytes, uint8 [H, W, 3], which it resizes, crops and normalises itself.
    input: Literal["pixels", "bytes"] = "pixels"
    # float32 (no); fp16: weights of half the size, computation in float32; int8: weights and activations in
    # 8-bit integers, which needs --data-dir.
    precision: Literal["no", "fp16", "int8"] = "no"
    # Photos for int8: train to calibrate, validation (or a fifth of train) to measure the loss of accuracy,
    # and the limit of unknown photos.
    data_dir: str | None = None
    # Percentage points of validation accuracy that int8 may lose; beyond that nothing is written.
    max_drop: float = 0.5
    # ONNX opset version.
    opset: int = 18

    def __post_init__(self) -> None:
        if self.web and self.out.endswith(".onnx"):
            raise ValueError(f"with --web, OUT is a folder; got {self.out!r}")
        if not self.web and not self.out.endswith(".onnx"):
            raise ValueError(f"OUT.onnx must end in .onnx, got {self.out!r}; for a folder, add --web")
        if self.ort_dir is not None and not self.web:
            raise ValueError("--ort-dir is for --web")
        if not 7 <= self.opset <= 20:  # what torch.onnx.export supports without onnxscript
            raise ValueError(f"--opset must be from 7 to 20, got {self.opset}")
        if self.precision == "int8" and self.data_dir is None:
            raise ValueError("--precision int8 needs photos: --data-dir DIR")
        if not 0 <= self.max_drop <= 100:
            raise ValueError(f"--max-drop must be from 0 to 100, got {self.max_drop}")


def main(config: ExportConfig) -> None:
    """Export, check, write."""
    # Imported below so that --help, a mistyped flag and a missing model respond before torch is loaded.
    check_model(config.model)

    import functools

    from hotdog_hf.deploy.export import export_onnx

    smaller = {}
    if config.precision != "no":
        from hotdog_hf.deploy import quantize

        options = {name: getattr(config, name) for name in ("precision", "data_dir", "max_drop")}
        smaller = {
            "shrink": functools.partial(quantize.shrink, **options),
            "tolerance": quantize.TOLERANCES[config.precision],
        }
    if config.web:
        from hotdog_hf.deploy import static_page

        static_page.export_page(config.model, config.out, config.ort_dir, opset=config.opset, **smaller)
        print(static_page.describe_page(config.out))
        return
    takes_photos = config.input == "bytes"
    difference = export_onnx(config.model, config.out, config.opset, takes_photos=takes_photos, **smaller)
    print(f"{config.out}: ONNX opset {config.opset}, outputs within {difference:.0e} of PyTorch's")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(ExportConfig))
