import pytest
import timm
import torch

from hotdog_hf.data.transforms import MEMORY_FORMAT
from hotdog_hf.model import network
from hotdog_hf.training import optim


def groups_of(name, **knobs):
    return optim.parameter_groups(timm.create_model(name, num_classes=2), learning_rate=1.0, **knobs)


def test_resnet_groups_are_the_chapters_layers():
    groups = groups_of("resnet18", head_lr_mult=10, weight_decay=0.1)
    assert [group["name"] for group in groups] == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert [group["lr"] for group in groups] == [1, 1, 1, 1, 1, 10]
    assert {group["weight_decay"] for group in groups} == {0.1}


def test_layer_decay_counts_down_from_the_last_body_group():
    groups = groups_of("resnet18", head_lr_mult=3, layer_decay=0.5)
    assert [group["lr"] for group in groups] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 3]


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize(
    "name",
    ["resnet18", "test_vit", "test_convnext", "test_efficientnet", "mobilenetv3_small_050", "test_resnet"],
)
def test_groups_are_complete_disjoint_and_named_apart(name, decay_all):
    net = timm.create_model(name, num_classes=3)
    groups = optim.parameter_groups(
        net,
        learning_rate=1,
        head_lr_mult=10,
        layer_decay=0.7,
        weight_decay=0.1,
        decay_norm_and_bias=decay_all,
    )
    covered = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, covered)) == sorted(map(id, net.parameters()))
    names = [group["name"] for group in groups]
    assert len(names) == len(set(names)) and "stem" in names and "head" in names
    [head] = [group["params"] for group in groups if group["name"] == "head"]
    classifier = list(net.get_classifier().parameters())
    assert {id(p) for p in head} == {id(p) for p in classifier if decay_all or p.ndim > 1}
    for group in groups:
        assert group["weight_decay"] == (0.0 if "no decay" in group["name"] else 0.1)
        assert decay_all or all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_a_frozen_parameter_is_in_no_group():
    net = timm.create_model("test_resnet", num_classes=2)
    net.requires_grad_(False)
    net.get_classifier().requires_grad_(True)
    assert [group["name"] for group in optim.parameter_groups(net, learning_rate=1, head_lr_mult=10)] == [
        "head"
    ]


@pytest.mark.parametrize(
    ("share", "frozen"),
    [
        (0, []),
        (0.1, ["stem"]),
        (0.5, ["stem", "layer1", "layer2"]),
        (0.99, ["stem", *map("layer{}".format, range(1, 5))]),
    ],
)
def test_a_share_of_the_body_is_frozen_from_the_stem_on(share, frozen):
    net = timm.create_model("resnet18", num_classes=2)
    groups = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    network.freeze_lowest(net, share)
    trained = optim.parameter_groups(net, learning_rate=1, head_lr_mult=10)
    assert [group["name"] for group in trained] == groups[len(frozen) :]
    still = network.modules_in_eval_mode(net, body=False, batch_norm=False)
    norms = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    below = [layer for layer in norms if not layer.weight.requires_grad]
    assert list(map(id, still)) == list(map(id, below)) and (len(below) > 0) == bool(frozen)
    assert len(network.modules_in_eval_mode(net, body=False, batch_norm=True)) == len(norms)


def test_the_table_shows_names_counts_and_rates():
    net = timm.create_model("resnet18", num_classes=2)
    groups = optim.parameter_groups(net, learning_rate=1.0, head_lr_mult=10)
    table = optim.describe_groups(groups, net).splitlines()
    assert table[1].split() == ["stem", "9,536", "1", "0"]
    assert table[-1].split() == ["head", "1,026", "10", "0"]


def test_the_table_names_what_is_not_trained():
    net = timm.create_model("resnet18", num_classes=2)
    network.freeze_body(net)
    table = optim.describe_groups(optim.parameter_groups(net, learning_rate=1.0, head_lr_mult=10), net)
    assert table.splitlines()[1].split() == ["head", "1,026", "10", "0"]
    assert table.splitlines()[2].split() == ["frozen", "11,176,512"]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1, 0.8536, 0.5, 0.1464]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1, 0.5]),
    ],
)
def test_a_schedule_scales_every_group_alike(schedule, warmup, expected):
    optimizer = optim.build_optimizer(groups_of("test_resnet", head_lr_mult=10, layer_decay=0.5), "sgd")
    initial = [group["lr"] for group in optimizer.param_groups]
    scheduler = optim.build_schedule(optimizer, schedule, total_steps=4, warmup_fraction=warmup)
    factors = []
    for _ in range(4):
        ratios = [group["lr"] / rate for group, rate in zip(optimizer.param_groups, initial, strict=True)]
        assert max(ratios) - min(ratios) < 1e-12
        factors.append(ratios[0])
        optimizer.step()
        scheduler.step()
    assert factors == pytest.approx(expected, abs=1e-4)
    if schedule != "constant":
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_the_optimizer_is_the_one_asked_for():
    groups = groups_of("test_resnet", head_lr_mult=10)
    plain, nesterov = optim.build_optimizer(groups, "sgd"), optim.build_optimizer(groups, "sgd", momentum=0.9)
    assert (plain.defaults["momentum"], plain.defaults["nesterov"]) == (0, False)
    assert (nesterov.defaults["momentum"], nesterov.defaults["nesterov"]) == (0.9, True)
    assert isinstance(optim.build_optimizer(groups, "adamw"), torch.optim.AdamW)


@pytest.mark.parametrize(("kind", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adamw", 0.0)])
def test_a_fused_step_is_the_same_step(kind, momentum):
    nets = []
    for fused in (False, True):
        torch.manual_seed(0)
        net = timm.create_model("test_resnet", num_classes=2).to(memory_format=MEMORY_FORMAT)
        groups = optim.parameter_groups(net, learning_rate=0.1, head_lr_mult=10, weight_decay=0.01)
        optimizer = optim.build_optimizer(groups, kind, momentum, fused=fused)
        # Left open if not fused: torch then takes a few kernels for all weights together on a GPU (foreach).
        assert {(group["fused"], group["foreach"]) for group in optimizer.param_groups} == {
            (fused or None, None)
        }
        for _ in range(3):
            for parameter in net.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        nets.append(net)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
