"""Training, pushing and loading against a Hub on this machine, with the real clients."""

import json
import re
import runpy
import shutil
import textwrap
import types

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY_MODEL, draw_photos, run
from huggingface_hub.errors import GatedRepoError
from loopback_hub import LoopbackHub
from test_hub import target

from hotdog_hf.errors import UserError
from hotdog_hf.hub import hub_errors
from hotdog_hf.model.saved import load_model, save_model

PHOTOS = ("test/hotdog/000.png", "test/hotdog/001.png", "test/not-hotdog/000.png")


@pytest.fixture(scope="module")
def server():
    with LoopbackHub(
        {"hf_test_token": "tester", "hf_read_token": "tester"}, read_only=["hf_read_token"]
    ) as running:
        yield running


@pytest.fixture
def env(server, tmp_path):
    return server.environment(tmp_path / "home")


@pytest.fixture(scope="module")
def pushed(server, train, photos_dir, tmp_path_factory):
    """A run that was pushed as tester/dogs by the training script."""
    folder = tmp_path_factory.mktemp("pushed")
    env = server.environment(folder / "home")
    done = train(photos_dir, folder / "run", "--epochs", 1, "--push-to-hub", "tester/dogs", **env)
    assert done.returncode == 0, done.stderr
    return done, folder / "run"


def answers_of(name, kind, photos_dir, **env):
    photos = [photos_dir / photo for photo in PHOTOS]
    done = run("python", ROOT / "tests/every_loader.py", name, kind, *photos, **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_all_agree(answers, label_names):
    assert len(answers) == 4
    for answer in answers.values():
        assert answer["label_names"] == list(label_names)
        np.testing.assert_allclose(
            answer["probabilities"], answers["with_hotdog_hf"]["probabilities"], rtol=0, atol=1e-5
        )


def test_training_pushes_the_folder_in_one_commit_and_says_where(pushed, server):
    done, run_dir = pushed
    assert f"pushed to {server.url}/tester/dogs" in done.stdout
    repo = server.repos["model", "tester/dogs"]
    assert len(repo.history()) == 2, "the Hub's own first commit, and one of ours"
    files = {name: file for name, file in repo.at("main").files.items() if name != ".gitattributes"}
    weights = {"model.safetensors", "neighbors.safetensors"}
    assert set(files) == {"README.md", "config.json", *weights, "curves.png", "samples.png"}
    assert {path.name for path in (run_dir / "model").iterdir()} == set(files)
    assert all((run_dir / "model" / name).stat().st_size == file.size for name, file in files.items())


def test_the_token_is_written_nowhere(pushed):
    done, run_dir = pushed
    written = [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    assert not any(b"hf_test_token" in content for content in written)
    assert "hf_test_token" not in done.stdout + done.stderr


def test_every_loader_says_the_same_from_the_hub_and_from_the_folder(pushed, photos_dir, env):
    from_hub = answers_of("tester/dogs", "hub", photos_dir, **env)
    assert_all_agree(from_hub, ["hotdog", "not-hotdog"])
    local = answers_of(pushed[1] / "model", "local", photos_dir)
    assert_all_agree(local, ["hotdog", "not-hotdog"])
    assert local["with_timm"] == from_hub["with_timm"]
    photo = photos_dir / PHOTOS[0]
    done = run("python", ROOT / "scripts/predict.py", "tester/dogs", photo, "--reject", **env)
    assert done.returncode == 0 and " distance " in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_other_families_and_three_classes_load_everywhere_too(name, photos_dir, tmp_path):
    label_names = ("a b", "hotdog", "ü")
    save_model(target(name, label_names), tmp_path / "model")
    assert_all_agree(answers_of(tmp_path / "model", "local", photos_dir), label_names)


def test_the_card_has_valid_metadata_with_the_positive_class_named(pushed):
    _, run_dir = pushed
    card = huggingface_hub.ModelCard.load(run_dir / "model/README.md")
    final = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["Accuracy"].metric_value == pytest.approx(final["test_accuracy"], abs=1e-4)
    assert results["F1 (hotdog)"].metric_value == pytest.approx(final["test_f1"], abs=1e-4)
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert "| train | 13 | 12 |" in card.text and "curves.png" in card.text


def test_the_snippets_of_the_card_run(pushed, photos_dir, tmp_path):
    _, run_dir = pushed
    text = (run_dir / "model/README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 3
    program = "\n".join(f"def snippet{number}():\n{textwrap.indent(code, '    ')}\nsnippet{number}()"
                        for number, code in enumerate(snippets))  # fmt: skip
    program = program.replace("MODEL", str(run_dir / "model"))
    (tmp_path / "program.py").write_text(program.replace("photo.jpg", str(photos_dir / PHOTOS[0])))
    done = run("python", tmp_path / "program.py")
    assert done.returncode == 0, done.stderr
    in_transformers, in_timm, in_hotdog_hf = map(eval, done.stdout.splitlines()[-3:])
    assert in_timm == pytest.approx(in_hotdog_hf, abs=1e-5)
    assert {row["label"]: row["score"] for row in in_transformers} == pytest.approx(in_timm, abs=1e-5)


def test_a_hostile_class_name_stays_text_in_the_card(train, tmp_path):
    evil = "<img src=x onerror=alert(1)>|`"
    for split in ("train", "test"):
        draw_photos(tmp_path / "photos" / split, {evil: 3, "ok": 3})
    done = train(tmp_path / "photos", tmp_path / "run", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    text = huggingface_hub.ModelCard.load(tmp_path / "run/model/README.md").text
    assert "<img" not in text and "&lt;img src=x onerror=alert(1)&gt;&#124;&#96;" in text


def test_pushing_again_sends_nothing_and_a_branch_is_made(pushed, server, env):
    folder = pushed[1] / "model"
    before = len(server.repos["model", "tester/dogs"].history()), server.count("PUT", "")
    done = run("python", ROOT / "scripts/push.py", folder, "tester/dogs", **env)
    assert done.returncode == 0, done.stderr
    assert (len(server.repos["model", "tester/dogs"].history()), server.count("PUT", "")) == before
    done = run("python", ROOT / "scripts/push.py", folder, "tester/dogs", "--revision", "try-2", **env)
    assert f"pushed to {server.url}/tester/dogs/tree/try-2" in done.stdout, done.stderr
    assert "model.safetensors" in server.repos["model", "tester/dogs"].at("try-2").files


def test_a_private_model_is_for_its_owner(pushed, server, env, tmp_path):
    folder = pushed[1] / "model"
    assert (
        run("python", ROOT / "scripts/push.py", folder, "tester/secret", "--private", **env).returncode == 0
    )
    load = tmp_path / "load.py"
    load.write_text("import hotdog_hf; print(hotdog_hf.load_model('tester/secret').num_classes)")
    assert run("python", load, **env).stdout == "2\n"
    stranger = server.environment(tmp_path / "stranger", token=None)
    done = run("python", load, HF_TOKEN="", **stranger)
    assert "has no tester/secret, or it is private and you are not logged in" in done.stderr


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("tester/new", None, "not logged in to the Hub: run `hf auth login`"),
        ("tester/new", "hf_wrong_token", "the token is not valid"),
        ("tester/new", "hf_read_token", "the token of tester may only read"),
        ("stranger/new", "hf_test_token", "no permission to create stranger/new: you are tester"),
        ("bad name!", "hf_test_token", "'bad name!' is not a Hub name"),
        ("name", "hf_test_token", "'name' is not a Hub name"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_training(
    train, photos_dir, server, tmp_path, repo, token, message
):
    env = server.environment(tmp_path / "home", token=token) | ({} if token else {"HF_TOKEN": ""})
    done = train(photos_dir, tmp_path / "run", "--push-to-hub", repo, **env)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert message in done.stderr and "Traceback" not in done.stderr and "epoch" not in done.stdout


def test_without_a_network_pushing_is_refused_before_training(train, photos_dir, env, tmp_path):
    nobody = env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = train(photos_dir, tmp_path / "run", "--push-to-hub", "tester/x", **nobody)
    assert done.returncode == 2 and "cannot reach http://127.0.0.1:9 for tester/x" in done.stderr
    assert not (tmp_path / "run").exists()


GATED = GatedRepoError("gated", response=types.SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GATED, "user/x is gated: ask for access on http"),
        (
            ValueError("Invalid metadata in README.md.\n- no such license"),
            r"user/x: .*README\.md\. - no such",
        ),
        (PermissionError(13, "Permission denied", "cache/x"), "user/x: cache/x: Permission denied"),
        (FileNotFoundError("Dataset 'user/x' doesn't exist"), "user/x: Dataset 'user/x' doesn't exist"),
        (TimeoutError("timed out"), r"cannot reach http.* for user/x \(TimeoutError: timed out\)"),
    ],
)
def test_an_error_of_the_hub_says_what_is_wrong(error, message):
    with pytest.raises(UserError, match=message), hub_errors("user/x"):
        raise error


def test_a_branch_of_a_data_set_is_refused():
    config = runpy.run_path(str(ROOT / "scripts/push.py"))["PushConfig"]
    with pytest.raises(ValueError, match="--revision is for models"):
        config(("user/name",), dataset="photos", revision="try-2")


def test_a_failed_upload_keeps_the_model_and_says_how_to_push_later(train, photos_dir, server, env, tmp_path):
    server.fail_next("POST", "tester/late/commit", status=500)
    done = train(photos_dir, tmp_path / "run", "--epochs", 1, "--push-to-hub", "tester/late", **env)
    folder = tmp_path / "run/model"
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"push it later with `python scripts/push.py {folder} tester/late`" in done.stderr
    assert "test acc" in done.stdout and load_model(folder).num_classes == 2
    done = run("python", ROOT / "scripts/push.py", folder, "tester/late", **env)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in server.repos["model", "tester/late"].at("main").files


def test_pushing_later_stays_private_and_on_its_branch(server, env, pushed):
    saved = pushed[1] / "model"
    server.fail_next("POST", "repos/create", status=500)
    flags = ("--private", "--revision", "try-2")
    done = run("python", ROOT / "scripts/push.py", saved, "tester/secret", *flags, **env)
    assert f"`python scripts/push.py {saved} tester/secret --private --revision try-2`" in done.stderr


def test_what_is_no_model_is_not_pushed(tmp_path, env):
    done = run("python", ROOT / "scripts/push.py", tmp_path, "tester/nothing", **env)
    assert done.returncode == 2 and "is not a saved model" in done.stderr
    done = run("python", ROOT / "scripts/push.py", "tester/nothing", **env)
    assert done.returncode == 2 and "give a model folder and a Hub name" in done.stderr


def test_training_goes_on_from_a_pushed_model_with_its_head(pushed, train, photos_dir, env, tmp_path):
    first = safetensors.torch.load_file(pushed[1] / "model/model.safetensors")
    flags = ("--epochs", 1, "--learning-rate", 1e-12, "--weights")
    done = train(photos_dir, tmp_path / "run", *flags, "hf-hub:tester/dogs", **env)
    assert done.returncode == 0, done.stderr
    again = safetensors.torch.load_file(tmp_path / "run/model/model.safetensors")
    torch.testing.assert_close(again["fc.weight"], first["fc.weight"])
    draw_photos(tmp_path / "other/train", {"a": 3, "b": 3, "c": 3})
    draw_photos(tmp_path / "other/test", {"a": 1, "b": 1, "c": 1})
    done = train(tmp_path / "other", tmp_path / "three", *flags, pushed[1] / "model")
    assert done.returncode == 0, done.stderr
    three = safetensors.torch.load_file(tmp_path / "three/model/model.safetensors")
    assert three["fc.weight"].shape == (3, 96)
    torch.testing.assert_close(three["conv1.0.weight"], first["conv1.0.weight"])


def test_photos_pushed_as_a_data_set_train_the_same_model(pushed, train, photos_dir, server, env, tmp_path):
    done = run("python", ROOT / "scripts/push.py", "--dataset", photos_dir, "tester/photos", **env)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {server.url}/datasets/tester/photos" in done.stdout
    done = train("hf://datasets/tester/photos", tmp_path / "run", "--epochs", 1, **env)
    assert done.returncode == 0, done.stderr
    assert "\nall                25         11\n" in done.stdout
    first = safetensors.torch.load_file(pushed[1] / "model/model.safetensors")
    again = safetensors.torch.load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize(
    ("repo", "message"),
    [("tester/no-such-photos", "tester/no-such-photos"), ("tester/only-train", "missing: test")],
)
def test_a_data_set_that_cannot_be_used_is_one_line(train, photos_dir, env, tmp_path, repo, message):
    if repo == "tester/only-train":
        program = tmp_path / "program.py"
        text = f"""
            import datasets
            from hotdog_hf.data.splits import load_photos
            load_photos({str(photos_dir)!r})["train"].push_to_hub({repo!r})
            """
        program.write_text(textwrap.dedent(text))
        done = run("python", program, **env)
        assert done.returncode == 0, done.stderr
    done = train(f"hf://datasets/{repo}", tmp_path / "run", **env)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_models_own_folder_wins_over_a_hub_name_of_the_same_spelling(tmp_path, monkeypatch):
    save_model(target(TINY_MODEL), tmp_path / "user/name")
    monkeypatch.chdir(tmp_path)
    assert load_model("user/name").num_classes == 2
    shutil.rmtree(tmp_path / "user")
