"""The licence of the source travels to the model folder and the card, and what it forbids is said."""

import importlib.util
import json

import huggingface_hub
import pytest
import timm
from conftest import ROOT, TINY_MODEL
from test_hub import target
from test_resume import train_here

from hotdog_hf import hub
from hotdog_hf.model import licenses, saved
from hotdog_hf.model.source import load_source


@pytest.fixture
def lent(tmp_path):
    """A saved model that may not be used commercially."""
    return saved.save_model(target(), tmp_path / "lent", license="cc-by-nc-4.0")


def license_of(folder):
    """What config.json and the card say."""
    config = json.loads((folder / "config.json").read_text())
    return config["pretrained_cfg"]["license"], huggingface_hub.ModelCard.load(folder / "README.md")


def test_the_sources_licence_travels_and_is_said_before_training(lent, photos_dir, tmp_path, capsys):
    train_here(lent, photos_dir, tmp_path / "run", "--epochs", 1)
    said = capsys.readouterr().out
    line = "licence: cc-by-nc-4.0, as the source; not for commercial use\n"
    assert line in said and said.index(line) < said.index("epoch 1")
    name, card = license_of(tmp_path / "run/model")
    assert name == card.data.license == "cc-by-nc-4.0"
    assert "## Licence\n\ncc-by-nc-4.0: not for commercial use." in card.text


def test_another_licence_than_the_sources_is_said(lent, photos_dir, tmp_path, capsys):
    train_here(lent, photos_dir, tmp_path / "run", "--epochs", 1, "--license", "mit")
    assert (
        "licence: mit by --license, while the source's is cc-by-nc-4.0 (not for commercial use):"
        " be sure that you may\n"
    ) in capsys.readouterr().out
    name, card = license_of(tmp_path / "run/model")
    assert name == card.data.license == "mit"


@pytest.mark.parametrize(
    ("weights", "license"),
    [("none", None), ("bundled", "apache-2.0"), ("{file}", "unknown"), ("{lent}", "cc-by-nc-4.0")],
)
def test_each_kind_of_source_has_its_licence(tiny_weights, lent, weights, license):
    name = "tf_efficientnet_lite0" if weights == "bundled" else TINY_MODEL
    source = load_source(name, weights.format(file=tiny_weights, lent=lent))
    assert source.pretrained_cfg["license"] == license


def test_timms_own_weights_have_the_licence_that_timm_declares(tiny_weights, monkeypatch):
    monkeypatch.setattr("hotdog_hf.model.source._timm_weights_file", lambda _: tiny_weights)
    assert load_source(TINY_MODEL, "auto").pretrained_cfg["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("given", "source", "line"),
    [
        (None, None, "licence: apache-2.0"),
        (None, "mit", "licence: mit, as the source"),
        ("mit", "mit", "licence: mit"),
        ("mit", None, "licence: mit"),
        (None, "unknown", "licence: unknown, as the source does not say; --license NAME sets it"),
        ("mit", "unknown", "licence: mit by --license, while the source's is unknown"),
        (None, "apple-amlr", "licence: apple-amlr, as the source; not for commercial use"),
        (None, "fair-noncommercial-research-license", "not for commercial use"),
        (None, "dinov3-license", "it has terms of its own: read them before you publish the model"),
        (None, "CC-BY-NC-SA-4.0", "not for commercial use"),
    ],
)
def test_the_line_before_training(given, source, line):
    assert line in licenses.describe_license(given, source)
    assert ("commercial" in line) == ("commercial" in licenses.describe_license(given, source))


def test_every_licence_of_timms_models_is_known_to_the_hub_or_named():
    declared = {timm.get_pretrained_cfg(name).license for name in timm.list_pretrained()} - {None}
    assert {"apache-2.0", "cc-by-nc-4.0", "dinov3-license"} <= declared
    for name in declared:
        metadata = licenses.card_license(name)
        assert metadata["license"] in licenses.HUB_LICENSES and name in metadata.values()
    assert licenses.card_license("dinov3-license") == {"license": "other", "license_name": "dinov3-license"}


def test_a_push_says_the_licence_before_it_sends_anything(lent, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("push", ROOT / "scripts/push.py")
    push = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(push)
    said = []
    monkeypatch.setattr(hub, "check_can_push", lambda *_: None)
    monkeypatch.setattr(hub, "push_folder", lambda *_, **__: said.append(capsys.readouterr().out))
    push.main(push.PushConfig(names=(str(lent), "user/name")))
    assert said == ["licence: cc-by-nc-4.0; not for commercial use\n"]
