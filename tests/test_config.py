import dataclasses
import re
import sys

import pytest
from conftest import ROOT, run

from hotdog_hf.config import RECIPES, OptimConfig, TrainConfig, command_of, parse_train_config


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--learning-rate", "-1"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "inf"),
        ("--epochs", "0"),
        ("--batch-size", "0"),
        ("--gradient-accumulation-steps", "129"),
        ("--head-lr-mult", "0"),
        ("--layer-decay", "1.5"),
        ("--momentum", "1"),
        ("--weight-decay", "-0.1"),
        ("--warmup-fraction", "1"),
        ("--val-fraction", "1"),
        ("--image-size", "8"),
        ("--num-workers", "-1"),
        ("--seed", "-1"),
        ("--min-crop-area", "0"),
        ("--train-image-size", "8"),
        ("--label-smoothing", "1"),
        ("--ema-decay", "1"),
        ("--recipe", "pie"),
        ("--optimizer", "adam"),
        ("--no-such-flag", "1"),
    ],
)
def test_a_bad_flag_is_refused_by_name_with_exit_code_2(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        parse_train_config([f"{flag}={value}"])
    assert end.value.code == 2
    printed = "".join(capsys.readouterr())
    assert flag in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "--epochs needs --head-init probe or source-probe or class-vector, got 0"),
        (
            "--recipe frozen --epochs 0",
            "--epochs needs --head-init probe or source-probe or class-vector, got 0",
        ),
        ("--recipe light --epochs -1", "--epochs must be 0 or more"),
        ("--crop-on-device --augmentation none", "--crop-on-device needs --augmentation crop"),
        ("--crop-on-device --augmentation randaugment", "--crop-on-device needs --augmentation crop"),
        ("--crop-on-device --streaming", "--crop-on-device needs photos that are not streamed"),
        ("--augmentation none --cache-features", "--cache-features .* add --freeze-body"),
        ("--freeze-body --cache-features", "--augmentation must be none if features are cached"),
        ("--recipe probe --augmentation crop", "--augmentation must be none if features are cached"),
        ("--source-class hotdog=934", "--source-class needs --head-init class-vector"),
        (
            "--recipe class-vector --source-class cat=tabby 934",
            r"--source-class must be name=class, .*'934'\]",
        ),
        (
            "--probe-views 2",
            "--probe-views needs --head-init probe or source-probe, and another --augmentation .*, got 2",
        ),
        (
            "--recipe probe --probe-views 2",
            "--probe-views needs --head-init probe or source-probe, and another --augmentation",
        ),
        ("--recipe light --probe-views -1", "--probe-views must be 0 or more, got -1"),
        ("--frozen-share 1", "--frozen-share must be from 0 up to 1, got 1"),
        ("--freeze-body --frozen-share 0.5", "--frozen-share is less than --freeze-body freezes"),
        ("--keep best --evaluate end", "--evaluate does not tell which epoch is best: add --keep last"),
        ("--minutes 5", "--minutes needs --recipe best, got 5"),
        ("--recipe best --minutes 0", "--minutes must be above 0"),
        ("--recipe frozen --ema-decay 0.9", "--ema-decay does not work with --cache-features"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_with_the_reason(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_train_config(flags.split())
    printed = " ".join("".join(capsys.readouterr()).replace("│", " ").split())
    assert end.value.code == 2 and re.search(message, printed), printed


@pytest.mark.parametrize(
    "flags",
    [
        "--recipe class-vector --epochs 0 --source-class hotdog=934 cat=tabby",
        "--recipe frozen --no-cache-features --augmentation crop --ema-decay 0.9",
        "--head-init probe --epochs 0",
        "--recipe light --train-image-size None",
    ],
)
def test_what_goes_together_is_taken_and_its_command_line_means_the_same(flags):
    config = parse_train_config(flags.split())
    words = command_of(config).split()
    assert words[:3] == ["accelerate", "launch", "scripts/train.py"]
    assert parse_train_config(words[3:]) == config


def test_the_chapter_recipe_is_the_books():
    optim = parse_train_config([]).optim
    assert (optim.batch_size, optim.epochs, optim.learning_rate, optim.weight_decay) == (128, 5, 5e-5, 0.001)
    assert (optim.optimizer, optim.momentum, optim.loss_reduction, optim.schedule) == (
        "sgd",
        0,
        "sum",
        "constant",
    )
    assert (optim.head_lr_mult, optim.layer_decay) == (10, 1)


def test_a_flag_overrides_its_recipe_and_leaves_the_rest():
    config = parse_train_config(["--epochs", "7", "--recipe", "scratch"])
    assert config == dataclasses.replace(
        RECIPES["scratch"], optim=dataclasses.replace(RECIPES["scratch"].optim, epochs=7)
    )
    assert config.model.weights == "none" and config.optim.learning_rate == 5e-4


def test_every_recipe_is_found_by_its_own_name():
    assert all(config.recipe == name for name, config in RECIPES.items())


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match="--momentum is for --optimizer sgd"):
        OptimConfig(optimizer="adamw", momentum=0.9)


def test_every_knob_has_a_comment_in_help(capsys):
    with pytest.raises(SystemExit):
        parse_train_config(["--help"])
    help_text = capsys.readouterr().out
    for group in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(group.default_factory):
            for knob in dataclasses.fields(group.default_factory):
                assert f"--{knob.name.replace('_', '-')}" in help_text
    assert "(default: 5e-05)" in help_text


def test_help_does_not_wait_for_torch():
    probe = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('scripts/train.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'timm', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", probe, cwd=ROOT).stdout.endswith("[]\n")


def test_the_usual_short_names_mean_the_same():
    short = parse_train_config("--lr 0.01 --wd 0.1 --bs 64 --momentum 0.9".split())
    long = parse_train_config(
        "--learning-rate 0.01 --weight-decay 0.1 --batch-size 64 --momentum 0.9".split()
    )
    assert short == long and (short.optim.learning_rate, short.optim.batch_size) == (0.01, 64)
