"""A run that was stopped and went on is the run that was not: every number and every weight, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from d2v_core import checkpoint, load
from d2v_core.checkpoint import list_checkpoints
from d2v_core.config import read_yaml
from d2v_core.distributed import Processes
from d2v_core.loop import Turn
from d2v_core.trainer import Updater

STEPS = 12  # 5 epochs of 3 or fewer steps


def words(out: Path, *more: str) -> list[str]:
    return ["run", "modality=toy", f"out={out}", f"train.max_steps={STEPS}", "model.layer_drop=0.2", *more]


def assert_same(read_run, a: Path, b: Path) -> None:
    (lines_a, tensors_a), (lines_b, tensors_b) = read_run(a), read_run(b)
    assert lines_a == lines_b
    assert tensors_a.keys() == tensors_b.keys()
    for name in tensors_a:
        assert torch.equal(tensors_a[name], tensors_b[name]), name


@pytest.fixture
def straight(d2v, tmp_path: Path) -> Path:
    """The run that nobody stopped."""
    out = tmp_path / "straight"
    assert d2v(*words(out))[0] == 0
    return out


@contextmanager
def stopping_after(count: int) -> Generator[None]:
    """The process gets SIGINT while its count-th update from now is running."""
    update, seen = Updater.update, []

    def counted(self, *args):
        seen.append(None)
        if len(seen) == count:
            signal.raise_signal(signal.SIGINT)
        return update(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "update", counted)
        yield


def test_the_run_moves_at_all(straight: Path, read_run):
    """What the tests below compare is not constant: dropout, masks, weights and epochs all change."""
    lines, tensors = read_run(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["epoch"] == 0 and lines[-1]["epoch"] >= 3
    assert len({line["loss"] for line in lines}) == STEPS
    assert lines[-1].keys() >= {"loss", "target_std", "pred_std", "grad_norm", "masked", "ema_decay", "lr", "skipped"}
    first = {
        f"model.{n}": t for n, t in load(straight, untrained=True).state_dict().items() if n.startswith("student.")
    }
    assert not any(
        torch.equal(first[n], tensors[n]) for n in first if first[n].numel() and first[n].is_floating_point()
    )


@pytest.mark.parametrize("workers", [(0, 0), (0, 2), (2, 0)])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_stopped_and_resumed_is_the_same(d2v, read_run, straight, monkeypatch, tmp_path, stop, workers):
    out = tmp_path / "stopped"
    with stopping_after(stop):
        status, text = d2v(*words(out, f"train.num_workers={workers[0]}"))
    assert status == 130
    assert f"Stopped by SIGINT after step {stop} of {STEPS}; a checkpoint is saved." in text
    assert f"out={out} resume=auto" in text
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == [f"step-{stop:08d}"]
    assert not (out / "summary.json").exists()
    torch.manual_seed(99)  # nothing hangs on the global stream
    status, text = d2v(*words(out, f"train.num_workers={workers[1]}", "resume=auto"))
    assert status == 0 and f"Going on from {out}/checkpoints/step-{stop:08d}" in text
    assert_same(read_run, out, straight)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["amount"] == json.loads((straight / "summary.json").read_text())["amount"]


def test_a_signal_that_comes_while_the_processes_tell_their_turns_is_not_lost(d2v, monkeypatch, tmp_path):
    """There a process waits for the slowest of them, so that it is where most signals reach it."""
    gather, turns = Processes.gather, []

    def interrupted(self, value):
        given = gather(self, value)
        if isinstance(value, Turn):
            turns.append(value)
            if len(turns) == 3:
                signal.raise_signal(signal.SIGINT)
        return given

    monkeypatch.setattr(Processes, "gather", interrupted)
    status, text = d2v(*words(tmp_path / "run"))
    assert status == 130 and "Stopped by SIGINT after step 3" in text


def test_a_signal_passed_on_a_second_time_does_not_end_the_saving(d2v, monkeypatch, tmp_path):
    save, out = checkpoint.save, tmp_path / "run"

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with stopping_after(3):
        status, text = d2v(*words(out))
    assert status == 130 and "Stopped by SIGINT after step 3" in text
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == ["step-00000003"]


def test_the_time_since_the_last_line_of_metrics_counts(d2v, tmp_path):
    out = tmp_path / "run"
    with stopping_after(4):
        assert d2v(*words(out, "train.log_every=100"))[0] == 130
    (first,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    stored = checkpoint.load(list_checkpoints(out / "checkpoints")[-1]).state["progress"]
    assert first["step"] == 1 and stored["step"] == 4 and stored["seconds"] > first["seconds"]


def test_stopped_twice_with_other_options_of_logging(d2v, read_run, straight, monkeypatch, tmp_path):
    out = tmp_path / "stopped"
    for stop in (2, 5):
        with stopping_after(stop):
            more = ["train.checkpoint_every=2", "train.keep_checkpoints=5", "resume=auto"]
            assert d2v(*words(out, *more))[0] == 130
    assert d2v(*words(out, "resume=auto"))[0] == 0
    assert_same(read_run, out, straight)


def test_a_killed_run_goes_on_and_its_metrics_after_the_checkpoint_are_dropped(
    d2v, read_run, straight, monkeypatch, tmp_path
):
    out = tmp_path / "killed"
    update, seen = Updater.update, []

    def die(self, step, *args):
        if len(seen) == 7:
            raise MemoryError("as if killed")
        seen.append(step)
        return update(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "update", die)
        with pytest.raises(MemoryError):
            d2v(*words(out, "train.checkpoint_every=4"))
    metrics = out / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4, 5, 6, 7]
    with metrics.open("a") as file:
        file.write('{"step": 8, "lo')  # cut off in the middle of a line
    assert d2v(*words(out, "resume=auto"))[0] == 0
    assert_same(read_run, out, straight)


def test_a_run_without_a_checkpoint_yet_starts_again(d2v, read_run, straight, monkeypatch, tmp_path):
    out = tmp_path / "early"
    update = Updater.update

    def die(self, step, *args):
        if step == 2:
            raise MemoryError
        return update(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "update", die)
        with pytest.raises(MemoryError):
            d2v(*words(out))
    assert d2v(*words(out, "resume=auto"))[0] == 0
    assert_same(read_run, out, straight)


def test_unreadable_samples_and_padding_survive_a_resume(d2v, read_run, monkeypatch, tmp_path):
    more = ("data.bad=[2,9]", "data.crop=false", "train.tensorboard=true", "data.extra_tokens=1", "encoder=own")
    assert d2v(*words(tmp_path / "a", *more))[0] == 0
    with stopping_after(5):
        assert d2v(*words(tmp_path / "b", *more))[0] == 130
    assert d2v(*words(tmp_path / "b", *more, "resume=auto"))[0] == 0
    assert_same(read_run, tmp_path / "a", tmp_path / "b")
    skipped = json.loads((tmp_path / "b" / "summary.json").read_text())["skipped"]
    assert skipped == {f"sample-{i}": f"sample {i} is broken on purpose" for i in (2, 9)}


def start(environment: dict[str, str], arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "d2v_core", *arguments], env={**environment, "TOY_DELAY": "0.1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.is_file() else 0


def test_real_signals(d2v, read_run, straight, environment, tmp_path):
    """To the process, or to its whole group as a terminal and a cluster do: the workers must not die of it first."""

    def twice(pid: int, number: int) -> None:
        """As `timeout` does: the group has had it, and it is passed on once more."""
        os.killpg(pid, number)
        time.sleep(0.03)
        os.kill(pid, number)

    cases = {
        "alone": (signal.SIGINT, 130, 0, os.kill),
        "twice": (signal.SIGINT, 130, 2, twice),
        "group": (signal.SIGINT, 130, 2, os.killpg),
        "term": (signal.SIGTERM, 143, 2, os.killpg),
    }
    running = {
        name: start(environment, words(tmp_path / name, f"train.num_workers={workers}"))
        for name, (_, _, workers, _) in cases.items()
    }
    waiting, until = set(cases), time.monotonic() + 90
    while waiting and time.monotonic() < until:
        for name in [name for name in waiting if num_lines(tmp_path / name / "metrics.jsonl") >= 2]:
            number, _, _, send = cases[name]
            send(running[name].pid, number)
            waiting.remove(name)
        time.sleep(0.02)
    for name, process in running.items():
        number, status, _, _ = cases[name]
        out = tmp_path / name
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == status and stderr == "", stderr
        assert f"Stopped by {number.name} after step" in stdout
        (folder,) = list_checkpoints(out / "checkpoints")
        assert folder.name < f"step-{STEPS:08d}"
        assert d2v(*words(out, "resume=auto"))[0] == 0
        assert_same(read_run, out, straight)


def test_a_run_that_is_older_than_an_option_goes_on(d2v, straight, read_run, tmp_path):
    """Its config.yaml does not name the option; a value other than the default is still refused."""
    out = tmp_path / "old"
    with stopping_after(4):
        assert d2v(*words(out))[0] == 130
    stored = read_yaml(out / "config.yaml")
    del stored["method"], stored["labels"], stored["train"]["num_masks"], stored["data"]["extra_tokens"]
    OmegaConf.save(OmegaConf.create(stored), out / "config.yaml")
    status, text = d2v(*words(out, "resume=auto", "data.extra_tokens=1"))
    assert status == 2 and "data.extra_tokens: stored 0, now 1" in text
    assert d2v(*words(out, "resume=auto"))[0] == 0
    assert_same(read_run, straight, out)


def test_another_configuration_is_refused_and_its_keys_are_named(d2v, monkeypatch, tmp_path):
    out = tmp_path / "run"
    with stopping_after(2):
        assert d2v(*words(out))[0] == 130
    before = (out / "config.yaml").read_text()
    status, text = d2v(*words(out, "resume=auto", "optim.lr=0.5", "data.crop=false", "train.log_every=3"))
    assert status == 2
    assert "optim.lr: stored 0.001, now 0.5" in text and "data.crop: stored True, now False" in text
    assert "log_every" not in text and f"start a new run with from={out}" in text
    status, text = d2v(*words(out, "resume=auto")[:-1], "train.max_steps=3", "resume=auto")
    assert status == 2  # given twice: max_steps
    fewer = [w for w in words(out, "resume=auto") if not w.startswith("train.max_steps")]
    status, text = d2v(*fewer, "train.max_steps=3")
    assert status == 2 and f"train.max_steps: stored {STEPS}, now 3" in text
    assert (out / "config.yaml").read_text() == before


def test_a_complete_run_says_so_and_more_steps_prolong_it(d2v, read_run, straight):
    before = (straight / "checkpoints").stat().st_mtime_ns
    status, text = d2v(*words(straight, "resume=auto"))
    assert status == 0 and f"{straight} is already complete; nothing to do." in text
    assert (straight / "checkpoints").stat().st_mtime_ns == before
    longer = [w for w in words(straight, "resume=auto") if not w.startswith("train.max_steps")]
    assert d2v(*longer, "train.max_steps=15")[0] == 0
    assert [line["step"] for line in read_run(straight)[0]] == list(range(1, 16))
    assert json.loads((straight / "summary.json").read_text())["steps"] == 15
    assert read_yaml(straight / "config.yaml")["train"]["max_steps"] == 15


def test_a_folder_that_is_in_use_is_refused_and_nothing_in_it_is_overwritten(d2v, straight, tmp_path):
    def everything(folder: Path) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    before = everything(straight)
    status, text = d2v(*words(straight))
    assert status == 2 and "is not empty (it holds a run)" in text and "resume=auto" in text
    assert everything(straight) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for more in ((), ("resume=auto",)):
        status, text = d2v(*words(other, *more))
        assert status == 2 and "is not empty" in text and everything(other) == {str(other / "thesis.txt"): b"mine"}
    status, text = d2v(*words(other / "thesis.txt"))
    assert status == 2 and "is a file; give a folder" in text
    status, text = d2v(*words(other / "thesis.txt" / "deeper"))
    assert status == 2 and "cannot be written" in text
    (tmp_path / "empty").mkdir()
    assert d2v(*words(tmp_path / "empty"))[0] == 0


def test_from_starts_with_the_weights_and_a_teacher_equal_to_them(d2v, straight, tmp_path, monkeypatch):
    from d2v_core.trainer import Trainer

    seen = {}
    loop = Trainer._loop

    def look(self, *args):
        seen["student"] = {n: p.clone() for n, p in self.model.student.named_parameters()}
        seen["teacher"] = {n: p.clone() for n, p in self.model.teacher.module.named_parameters()}
        seen["predictor"] = {n: p.clone() for n, p in self.model.predictor.named_parameters()}
        seen["state"], seen["step"] = dict(self.updater.optimizer.state), self.progress.step
        return loop(self, *args)

    monkeypatch.setattr(Trainer, "_loop", look)
    out = tmp_path / "second"
    status, text = d2v(*words(out, f"from={straight}", "data.num_samples=20", "optim.lr=1e-4", "seed=4"))
    assert status == 0 and f"Weights from {straight}/checkpoints/step-{STEPS:08d}; teacher made anew" in text
    trained = dict(load(straight).student.named_parameters())
    for name, tensor in seen["student"].items():
        assert torch.equal(tensor, trained[name]), name
        assert torch.equal(seen["teacher"][name], tensor), name
    assert seen["step"] == 0 and seen["state"] == {} and read_yaml(out / "config.yaml")["from"] == str(straight)
    (tmp_path / "gone").mkdir()
    straight.rename(tmp_path / "gone" / "straight")  # what `from` named need not be there for a resume
    assert d2v(*words(out, f"from={straight}", "data.num_samples=20", "optim.lr=1e-4", "seed=4", "resume=auto"))[0] == 0


def test_from_what_does_not_fit(d2v, straight, tmp_path):
    status, text = d2v(*words(tmp_path / "a", f"from={tmp_path}"))
    assert status == 2 and "is not a run folder: it has no config.yaml" in text
    status, text = d2v(*words(tmp_path / "b", f"from={straight}", "model.embed_dim=32"))
    assert status == 2 and "do not fit this configuration" in text and "stored (" in text
    status, text = d2v(*words(tmp_path / "c", f"from={straight}", "model.num_layers=3"))
    assert status == 2 and "Missing: ['student.transformer.blocks.2" in text


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_of_an_older_format_goes_on(d2v, tmp_path, number):
    out = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "recorded" / f"format{number}", out)
    status, text = d2v("run", "modality=toy", f"out={out}", "model.embed_dim=8", "train.max_steps=9", "resume=auto",
                       "train.probe=false", "train.num_threads=1")  # fmt: skip
    assert status == 0 and "Going on from" in text and "step-00000004" in text
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == 9 and (list_checkpoints(out / "checkpoints")[-1] / "manifest.json").is_file()
    assert all(p.isfinite().all() for p in load(out).student.parameters())


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_serves(d2v, read_run, straight, monkeypatch, tmp_path):
    out = tmp_path / "damaged"
    assert d2v(*words(out, "train.checkpoint_every=4"))[0] == 0
    (out / "summary.json").unlink()
    _, newest = list_checkpoints(out / "checkpoints")
    data = bytearray((newest / "state.safetensors").read_bytes())
    data[-3] ^= 16  # one bit
    (newest / "state.safetensors").write_bytes(data)
    status, text = d2v(*words(out, "resume=auto"))
    assert status == 0 and f"The checkpoint {newest} cannot be read: state.safetensors: 1 of " in text
    assert f"{newest} is now called damaged-{newest.name}; the one before serves." in text
    assert_same(read_run, out, straight)


def test_load_gives_the_trained_encoder(straight, read_run):
    tensors = read_run(straight)[1]
    for teacher, part in ((False, "model.student."), (True, "teacher.")):
        run = load(straight, teacher=teacher)
        assert run.step == STEPS and not run.training
        for name, tensor in run.student.state_dict().items():
            if part + name in tensors:
                assert torch.equal(tensor, tensors[part + name]), name
    run = load(straight)
    layers = run.encode({"x": torch.randn(1, 9, 4)})
    assert [layer.shape for layer in layers] == [(9, 16)] * 3 and not layers[0].requires_grad


def test_another_number_of_threads_is_noted(d2v, monkeypatch, tmp_path):
    out = tmp_path / "threads"
    with stopping_after(2), monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        assert d2v(*words(out))[0] == 130
    status, text = d2v(*words(out, "resume=auto"))
    assert status == 0 and "this run used 7 CPU threads, now there are 1" in text
