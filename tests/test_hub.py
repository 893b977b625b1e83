import json

import pytest
import timm
import torch
from conftest import TINY_MODEL

from hotdog_hf.errors import UserError
from hotdog_hf.model import network, saved
from hotdog_hf.model.source import create_source, source_data_config


def target(name=TINY_MODEL, label_names=("hotdog", "not-hotdog")):
    source = create_source(name, "none", image_size=64)
    net = network.replace_head(source, list(label_names), source_data_config(source, "chapter", 64))
    return net.to(memory_format=torch.channels_last).eval()


@pytest.mark.parametrize("name", [TINY_MODEL, "test_vit", "test_convnext"])
@pytest.mark.parametrize("label_names", [("hotdog", "not-hotdog"), ("a b", "ü", "<img>")])
def test_a_saved_model_comes_back_the_same(tmp_path, name, label_names):
    net = target(name, label_names)
    loaded = saved.load_model(saved.save_model(net, tmp_path / "model"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), net(images), rtol=0, atol=1e-6)
    assert network.label_names_of(loaded) == list(label_names)
    assert network.data_config_of(loaded) == network.data_config_of(net)
    assert not loaded.training


def test_the_folder_is_timms_own_without_pickle_or_the_sources_identity(tmp_path):
    folder = saved.save_model(target(), tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert "num_classes" not in config.get("model_args", {}) and config["num_classes"] == 2
    assert config["pretrained_cfg"]["tag"] == "hotdog_hf"
    assert config["pretrained_cfg"]["license"] == "apache-2.0"
    assert not {"url", "hf_hub_id", "file"} & set(config["pretrained_cfg"])
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 2


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
    saved.save_model(target(), tmp_path / "model")
    (tmp_path / "model.part").mkdir()  # of a run that was killed while it saved
    second = target()
    saved.save_model(second, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(
        saved.load_model(tmp_path / "model").state_dict()["fc.bias"], second.state_dict()["fc.bias"]
    )


def test_saving_leaves_the_model_in_training_alone(tmp_path):
    net = target().train()
    before = net.conv1[0].weight.stride()
    saved.save_model(net, tmp_path / "model")
    assert net.training and net.conv1[0].weight.stride() == before and "label_names" in net.pretrained_cfg


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "it has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "it has no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "cannot load the model"),
        (lambda f: (f / "config.json").write_text("{}"), "cannot load the model"),
        (
            lambda f: (f / "config.json").write_text(
                (f / "config.json").read_text().replace('"label_names"', '"other"')
            ),
            "names no classes",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model_is_one_line(tmp_path, harm, message):
    folder = saved.save_model(target(), tmp_path / "model")
    harm(folder)
    with pytest.raises(UserError, match=message):
        saved.load_model(folder)


def test_what_was_meant_instead_of_a_model_is_said(tmp_path, monkeypatch):
    folder = saved.save_model(target(), tmp_path / "run/model")
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(UserError, match=f"it has no model.safetensors; give {folder}$"):
        saved.load_model(tmp_path / "run")
    with pytest.raises(UserError, match="there is no such folder"):
        saved.load_model(tmp_path / "other/model")
    monkeypatch.chdir(tmp_path)  # a name that may be one on the Hub
    with pytest.raises(UserError, match=r"for run/nodel, .*; nor is there a folder run/nodel"):
        saved.load_model("run/nodel")
