import importlib
import json
import os
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, TINY_MODEL, run
from test_hub import target

from hotdog_hf.deploy import quantize, static_page
from hotdog_hf.deploy.export import export_onnx
from hotdog_hf.errors import UserError
from hotdog_hf.model import network
from hotdog_hf.model.predictor import load_predictor
from hotdog_hf.model.saved import load_model, save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(target(), tmp_path_factory.mktemp("saved") / "model")


@pytest.mark.parametrize("name", [TINY_MODEL, "test_vit", "test_convnext"])
@pytest.mark.parametrize("opset", [17, 20])
def test_an_exported_model_says_what_the_saved_one_says(tmp_path, name, opset):
    torch.manual_seed(0)
    net = target(name, ("a b", "ü", "<img>"))
    saved, out = save_model(net, tmp_path / "model"), tmp_path / "new/model.onnx"
    assert 0 <= export_onnx(saved, out, opset) < 1e-4
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    assert onnx.load(out).opset_import[0].version == opset
    ours, theirs = load_predictor(out), load_predictor(saved)
    assert ours.label_names == theirs.label_names == ["a b", "ü", "<img>"]
    assert ours.data_config == json.loads(json.dumps(network.data_config_of(net)))
    for batch_size in (1, 2, 7):
        images = np.random.default_rng(batch_size).integers(0, 256, (batch_size, 64, 64, 3), np.uint8)
        actual = ours.probabilities(images)
        assert actual.shape == (batch_size, 3)
        np.testing.assert_allclose(actual, theirs.probabilities(images), rtol=0, atol=1e-5)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_file_is_readable_as_any_new_file_is(saved, tmp_path):
    export_onnx(saved, tmp_path / "model.onnx")
    (tmp_path / "other").touch()
    assert (tmp_path / "model.onnx").stat().st_mode == (tmp_path / "other").stat().st_mode


class LooksAtTheBatchSize(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.pretrained_cfg = net, net.pretrained_cfg

    def forward(self, images):
        return self.net(images) * (1.5 if len(images) == 2 else -1.5)  # a trace keeps one of the two


def test_a_model_that_comes_out_different_is_not_written(saved, tmp_path, monkeypatch):
    net = load_model(saved)
    data_config = network.data_config_of(net)
    monkeypatch.setattr("hotdog_hf.model.saved.load_model", lambda name: LooksAtTheBatchSize(net).eval())
    monkeypatch.setattr("hotdog_hf.model.network.data_config_of", lambda net: data_config)
    (tmp_path / "model.onnx").write_text("an earlier one")
    with pytest.raises(UserError, match=r"as ONNX is .* away from PyTorch"):
        export_onnx(saved, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an earlier one"


def test_nan_is_no_agreement(saved, tmp_path, monkeypatch):
    net = load_model(saved)
    net.get_classifier().bias.data.fill_(float("nan"))
    monkeypatch.setattr("hotdog_hf.model.saved.load_model", lambda name: net)
    with pytest.raises(UserError, match="nan away"):
        export_onnx(saved, tmp_path / "model.onnx")


def test_what_the_exporter_cannot_do_is_one_line(tmp_path):
    saved = save_model(target("test_vit"), tmp_path / "model")
    with pytest.raises(UserError, match=r"cannot export .* with opset 9: .*aten::") as caught:
        export_onnx(saved, tmp_path / "out/model.onnx", opset=9)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(saved, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx/in it").mkdir(parents=True)
    for out in (tmp_path / "file/model.onnx", tmp_path / "folder.onnx"):
        with pytest.raises(UserError, match=f"cannot write {out}"):
            export_onnx(saved, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.onnx"]


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_extra_it_says_what_to_install(saved, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(static_page, "find_runtime", lambda _: pytest.fail("downloads 33 MB before that"))
    for export in (export_onnx, static_page.export_page):
        with pytest.raises(UserError, match=r'pip install -e "\.\[onnx\]"'):
            export(saved, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
@pytest.mark.parametrize("module", ["quantize", "space"])
def test_what_needs_the_extra_says_so_when_it_is_imported(monkeypatch, missing, module):
    for name in ("quantize", "distance", "space"):
        monkeypatch.delitem(sys.modules, f"hotdog_hf.deploy.{name}", raising=False)
        monkeypatch.delattr(f"hotdog_hf.deploy.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[onnx\]"'):
        importlib.import_module(f"hotdog_hf.deploy.{module}")


def test_the_benchmark_runs_without_the_extra(monkeypatch):
    for name in ("hotdog_hf.bench.tasks", "hotdog_hf.deploy.quantize", "hotdog_hf.deploy.distance"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(name, raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert importlib.import_module("hotdog_hf.bench.tasks").prepare


def test_int8_needs_operators_with_a_scale_per_channel():
    graph = onnx.helper.make_graph([], "empty", [], [])
    older = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 12)])
    with pytest.raises(UserError, match="--precision int8 needs --opset 13 or higher, got 12"):
        quantize.to_int8(older, ["a", "b"], {}, "photos")


def test_the_script_says_what_it_wrote(tmp_path):
    saved = save_model(target("test_vit"), tmp_path / "model")  # of which the exporter warns much
    done = run("python", ROOT / "scripts/export.py", saved, tmp_path / "model.onnx", "--opset", 18)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/model.onnx: ONNX opset 18, outputs within ")
    assert done.stderr == ""
    assert load_predictor(tmp_path / "model.onnx").label_names == ["hotdog", "not-hotdog"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("model", "model.pt"), "OUT.onnx must end in .onnx, got 'model.pt'"),
        (("model", "model.onnx", "--opset", 99), "--opset must be from 7 to 20, got 99"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, flags, message):
    done = run("python", ROOT / "scripts/export.py", *flags, cwd=tmp_path)
    printed = done.stdout + done.stderr
    assert done.returncode == 2 and message in printed and "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []
