"""Checkpoints to the bit: the order in memory, and a kill or a full disk before every change of the disk.

The network is tiny, and a run is a few steps on drawn numbers, so that hundreds of faults take seconds. What
a whole run of scripts/train.py does about a kill is in test_resume.py.
"""

import contextlib
import json
import os
import random
import shutil
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from faults import Faults, Killed, exit_code_in_fork

from hotdog_hf.config import OptimConfig, parse_train_config
from hotdog_hf.data import loaders
from hotdog_hf.data.transforms import MEMORY_FORMAT
from hotdog_hf.errors import UserError
from hotdog_hf.model import saved
from hotdog_hf.training import checkpoint, engine, launch, loop, optim, records
from hotdog_hf.training.state import Progress, TrainState

STEPS = 3


@pytest.fixture
def accelerator():
    return launch.build_accelerator("no", num_threads=1)


@pytest.fixture
def faults(monkeypatch):
    return Faults(monkeypatch)


class Run:
    """A run over `STEPS` steps with a checkpoint after each, resumed from the newest one if there is any."""

    def __init__(self, accelerator, run_dir, keep=2):
        self.accelerator, self.run_dir, self.keep, self.saves = accelerator, run_dir, keep, 0
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        optimizer = optim.build_optimizer([{"params": list(net.parameters()), "lr": 0.1}], "adamw")
        schedule = optim.build_schedule(optimizer, "cosine", STEPS)
        self.state = TrainState(net, optimizer, schedule, None, Progress(), torch.zeros(3))
        self.found = checkpoint.find("auto", str(run_dir))
        if self.found:
            checkpoint.load(checkpoint.read(self.found), accelerator, self.state)

    def step(self):
        state = self.state
        loss = state.model(torch.rand(5, 4) + random.random() + np.random.rand()).square().sum()
        loss.backward()
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad()
        state.totals += torch.stack([loss.detach(), torch.tensor(1), torch.tensor(5)])
        state.progress.total_steps += 1
        state.progress.rows.append({"loss": loss.item()})

    def save(self):
        folder = checkpoint.save(self.run_dir, self.accelerator, self.state, self.keep)
        self.saves += 1
        return folder

    def finish(self):
        while self.state.progress.total_steps < STEPS:
            self.step()
            records.write_metrics(self.run_dir, self.state.progress.rows)
            self.save()
            if self.state.progress.total_steps == 2:
                self.save()  # the same step again, as when a run was stopped after the last step of an epoch


def ended(run_dir):
    """What a run has come to."""
    folder = checkpoint.latest(run_dir)
    content = json.loads((folder / "state.json").read_text())
    del content["progress"]["run_seconds"]
    return [content, (folder / "state.safetensors").read_bytes(), (run_dir / "metrics.jsonl").read_bytes()]


@pytest.mark.parametrize(
    ("kind", "keep", "every"), [("kill", 1, 1), ("kill", 2, 1), ("fill_disk", 1, 1), ("exit", 1, 8)]
)
def test_a_fault_before_any_change_of_the_disk_changes_nothing_in_the_end(
    accelerator, faults, tmp_path, capsys, kind, keep, every
):
    (tmp_path / "whole").mkdir()
    with faults.before(None) as changes:
        Run(accelerator, tmp_path / "whole", keep).finish()
    expected, total = ended(tmp_path / "whole"), len(changes)
    assert total > 60, changes
    for number in range(1, total + 1, every):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()

        def run_into_it(run_dir=run_dir, number=number):
            run = Run(accelerator, run_dir, keep)  # in the fork, which has random numbers of its own
            with faults.before(number, getattr(faults, kind)):
                run.finish()

        if kind == "exit":
            assert exit_code_in_fork(run_into_it) == 77
        elif kind == "kill":
            with pytest.raises(Killed):
                run_into_it()
        else:
            with contextlib.suppress(UserError, OSError):  # it ends well if only the clearing up was hindered
                run_into_it()
        resumed = Run(accelerator, run_dir, keep)
        # Only the step that was being saved is lost.
        saved_before = sum(change.startswith("os.rename step-") for change in changes[: number - 1])
        assert resumed.found or saved_before == 0, changes[number - 1]
        resumed.finish()
        assert ended(run_dir) == expected, (number, changes[number - 1])
        if resumed.saves:
            assert len(list((run_dir / "checkpoints").iterdir())) == keep, "nothing half written is left"
        shutil.rmtree(run_dir)
    print(f"{len(range(1, total + 1, every))} faults, as many identical ends")
    assert "warning" not in capsys.readouterr().err, "no checkpoint was ever found damaged"


def network(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=2, drop_rate=0.1)
    return net.to(memory_format=MEMORY_FORMAT)


def train(state, steps):
    """Train on images drawn from torch's random state, which a checkpoint holds."""
    state.model.train()
    for _ in range(steps):
        images = torch.randn(4, 3, 64, 64).to(memory_format=MEMORY_FORMAT)
        torch.nn.functional.cross_entropy(state.model(images), torch.tensor([0, 1, 1, 0])).backward()
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad()
        state.progress.total_steps += 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("kind", "momentum"), [("sgd", 0.9), ("adamw", 0.0)])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_a_channels_last_network_resumes_to_the_bit(accelerator, tmp_path, name, kind, momentum, fused):
    """A fused kernel takes weight and state in the order of the memory, so that both must have one order."""

    def start():
        net = network(name)
        groups = optim.parameter_groups(net, learning_rate=1e-2, head_lr_mult=10, weight_decay=0.01)
        optimizer = optim.build_optimizer(groups, kind, momentum, fused=fused)
        schedule = optim.build_schedule(optimizer, "cosine", 6)
        return TrainState(net, optimizer, schedule, None, Progress(), torch.zeros(3))

    undisturbed = start()
    train(undisturbed, 2)
    folder = checkpoint.save(tmp_path, accelerator, undisturbed, keep=1)
    train(undisturbed, 3)

    resumed = start()
    checkpoint.load(checkpoint.read(folder), accelerator, resumed)
    for parameter, values in resumed.optimizer.state.items():
        for key, value in values.items():
            assert key == "step" or value.stride() == parameter.stride(), key
    train(resumed, 3)
    ours, theirs = resumed.model.state_dict(), undisturbed.model.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert any(value.ndim == 4 and not value.is_contiguous() for value in ours.values())


def saved_steps(accelerator, run_dir, steps):
    """Save a checkpoint at each of the steps of one run; return their folders."""
    run, folders = Run(accelerator, run_dir, keep=10), []
    for total in steps:
        run.state.progress.total_steps = total
        folders.append(run.save())
    return folders


def cut_short(folder):
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text('{"progress": '),
        lambda folder: (folder / "state.safetensors").write_bytes(b""),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_the_older_one_named(accelerator, tmp_path, capsys, damage):
    first, second, third = saved_steps(accelerator, tmp_path, [1, 2, 3])
    damage(third)
    for resume, output_dir in (("auto", str(tmp_path)), (str(tmp_path), None)):
        assert checkpoint.find(resume, output_dir) == second
        said = capsys.readouterr().err
        assert f"the checkpoint {third} cannot be read" in said and f"an older one, {second}" in said
    damage(second)
    damage(first)
    with pytest.raises(UserError, match=r"cannot be read.*start a new run"):
        checkpoint.find("auto", str(tmp_path))


def test_a_resume_from_an_older_checkpoint_drops_the_newer_ones(accelerator, tmp_path):
    saved_steps(accelerator, tmp_path, [1, 2, 3, 4])
    run = Run(accelerator, tmp_path, keep=2)
    run.state.progress.total_steps = 2
    run.save()
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["0.weight", "1.running_var", "exp_avg", "the loss"])
def test_what_is_not_finite_becomes_no_checkpoint(accelerator, tmp_path, place, value):
    [before] = saved_steps(accelerator, tmp_path, [1])
    run = Run(accelerator, tmp_path, keep=1)
    run.step()
    values = next(iter(run.state.optimizer.state.values())) | run.state.model.state_dict()
    with torch.no_grad():
        (values | {"the loss": run.state.totals})[place].view(-1)[0] = value
    with pytest.raises(UserError, match=rf"{place} is not finite, so no checkpoint is written"):
        run.save()
    assert list(before.parent.iterdir()) == [before] == [checkpoint.find("auto", str(tmp_path))]


class Numbers(torch.utils.data.Dataset):
    """Inputs [1] of a network, all finite but that of the photo `broken`."""

    def __init__(self, broken=None):
        self.broken = broken

    def __len__(self):
        return 12

    def __getitem__(self, key):
        _, index = key
        value = float("nan") if index == self.broken else index / 12
        return {"pixel_values": torch.tensor([value]), "labels": index % 2, "index": index}

    def network_input(self, pixel_values):
        return pixel_values

    def name_of(self, index):
        return f"<{index}>"


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_loss_that_is_not_finite_in_any_micro_batch_is_told_with_its_photos(
    accelerator, tmp_path, accumulation, saves
):
    """And at once if a checkpoint is to be saved, though a loss is otherwise checked one step late."""
    sampler = loaders.StepSampler(12, 4, seed=3)
    batches = [[index for _, index in batch] for batch in sampler]
    for place in range(4):
        dataset = Numbers(broken=batches[1][place])
        loader = loaders.step_loader(dataset, loaders.StepSampler(12, 4, seed=3), num_workers=0)
        net = torch.nn.Linear(1, 2)
        optimizer = optim.build_optimizer([{"params": list(net.parameters()), "lr": 0.25}], "sgd")
        state = TrainState(net, optimizer, optim.build_schedule(optimizer, "constant", 3))
        config = OptimConfig(gradient_accumulation_steps=accumulation)
        names = ", ".join(f"<{index}>" for index in batches[1])
        with pytest.raises(
            engine.NonFiniteLossError, match=rf"nan at .* from 0.25 to 0.25, on 4 .*: {names};"
        ):
            for _ in engine.train_steps(accelerator, state, loader, config):
                state.progress.total_steps += 1
                if saves:
                    checkpoint.save(tmp_path, accelerator, state, keep=2)
        assert state.progress.total_steps == 2
        assert not saves or checkpoint.steps_of(checkpoint.latest(tmp_path)) == 1


def test_weights_that_a_step_breaks_are_told_with_its_photos(accelerator, tmp_path):
    """A finite loss, and an infinite weight after the step."""
    loader = loaders.step_loader(Numbers(), loaders.StepSampler(12, 4, seed=3), num_workers=0)
    net = torch.nn.Linear(1, 2)
    optimizer = optim.build_optimizer([{"params": list(net.parameters()), "lr": 0.25}], "sgd")
    state = TrainState(net, optimizer, optim.build_schedule(optimizer, "constant", 3))
    steps = engine.train_steps(accelerator, state, loader, OptimConfig())
    next(steps)
    torch.nn.init.constant_(net.weight, float("inf"))  # as an overflow leaves it
    with pytest.raises(
        engine.NonFiniteLossError, match=r"model.weight became .* rates from 0.25 .* on 4 photos"
    ):
        checkpoint.save(tmp_path, accelerator, state, keep=2)
    assert not (tmp_path / "checkpoints").exists()


def test_the_last_good_checkpoint_is_older_than_the_weights_that_gave_no_number(accelerator, tmp_path):
    """A checkpoint may be of weights that are finite and too large, as the next step's loss then tells."""
    [first, second, third] = saved_steps(accelerator, tmp_path, [1, 2, 3])
    job = SimpleNamespace(
        state=SimpleNamespace(progress=Progress(total_steps=4)),
        config=parse_train_config([]),
        accelerator=accelerator,
    )
    for error, good in (
        (engine.NonFiniteLossError("loss", steps_since=1), second),
        (engine.NonFiniteLossError("answer"), third),
        (UserError("full disk"), third),
    ):
        told = pytest.raises(UserError, match=f"after 4 steps: .*Last good checkpoint: {good}")
        with told, loop.add_progress_to_errors(job, tmp_path):
            raise error
    shutil.rmtree(third)
    shutil.rmtree(second)
    job.state.progress.total_steps = 2
    told = pytest.raises(UserError, match="Last good checkpoint: none")
    with told, loop.add_progress_to_errors(job, tmp_path):
        raise engine.NonFiniteLossError("loss", steps_since=1)
    assert first.exists()


def test_a_bound_that_is_infinite_on_purpose_is_saved(accelerator, tmp_path):
    run = Run(accelerator, tmp_path)
    run.state.model.register_buffer("bound", torch.tensor(float("inf")))
    assert checkpoint.find("auto", str(tmp_path)) is None and run.save() == checkpoint.latest(tmp_path)


def test_what_is_saved_can_be_read_by_whom_the_umask_lets(accelerator, tmp_path):
    before = os.umask(0o022)
    try:
        [folder] = saved_steps(accelerator, tmp_path, [1])
        saved.save_model(labelled(network("test_resnet")), tmp_path / "model")
    finally:
        os.umask(before)
    for file in (*folder.iterdir(), *(tmp_path / "model").iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file


def labelled(net):
    """As `replace_head` leaves a network: with the names of its classes."""
    net.pretrained_cfg = {**net.pretrained_cfg, "label_names": ["hotdog", "not-hotdog"]}
    return net


@pytest.mark.parametrize(("kind", "killed_before"), [("kill", False), ("kill", True), ("fill_disk", False)])
def test_a_fault_while_a_model_is_saved_leaves_the_earlier_or_the_new_one(
    faults, tmp_path, kind, killed_before
):
    """Between two renames it is `model.replaced`; the next save, of a resumed run, puts all right."""
    nets = [labelled(network("test_resnet")) for _ in range(2)]
    torch.nn.init.ones_(nets[1].get_classifier().weight)
    [earlier, later] = [net.get_classifier().weight for net in nets]
    folder, old = tmp_path / "model", tmp_path / "model.replaced"

    def save_earlier():
        saved.save_model(nets[0], folder)
        if killed_before:
            folder.rename(old)  # as a kill between the renames leaves it

    def saved_weight(place):
        return safetensors.torch.load_file(place / "model.safetensors")["fc.weight"]

    save_earlier()
    with faults.before(None) as changes:
        saved.save_model(nets[1], folder)
    total, found = len(changes), []
    assert total > 15, changes
    for number in range(1, total + 1):
        save_earlier()
        with faults.before(number, getattr(faults, kind)), contextlib.suppress(Killed, OSError):
            saved.save_model(nets[1], folder)
        place = folder if folder.exists() else old
        weight = saved_weight(place)
        found.append("later" if torch.equal(weight, later) else "earlier")
        assert found[-1] == "later" or torch.equal(weight, earlier), changes[number - 1]
        saved.load_model(place)
        saved.save_model(nets[1], folder)
        assert torch.equal(saved_weight(folder), later)
        assert list(tmp_path.iterdir()) == [folder], changes[number - 1]
    assert set(found) == {"earlier", "later"}
    assert kind == "fill_disk" or found == sorted(found), "a full disk may hinder the clearing up alone"
    print(f"{total} faults, as many whole models")
