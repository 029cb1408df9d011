"""What goes on around a run: a disk that is full, a folder that turns read-only, a clock that jumps."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from d2v_core import checkpoint
from d2v_core.trainer import Trainer

WORDS = ("run", "modality=toy", "train.log_every=1", "train.checkpoint_every=2", "train.probe=false",
         "train.num_workers=0", "train.tensorboard=false", "train.num_threads=1")  # fmt: skip


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    """A disk of 1 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield folder  # weights that were read may still be mapped from its files: lazily
    subprocess.run(["umount", "-l", str(folder)], check=True)


def straight(d2v, read_run, tmp_path: Path):
    assert d2v(*WORDS, f"out={tmp_path / 'straight'}", "train.max_steps=8")[0] == 0
    return read_run(tmp_path / "straight")


def test_a_full_disk_keeps_the_older_checkpoints_and_the_run_goes_on_when_there_is_room(d2v, read_run, disk, tmp_path):
    words = (*WORDS, f"out={disk / 'run'}", "train.max_steps=8")
    ballast = disk / "ballast"

    save = Trainer.save

    def fill_and_save(self) -> None:
        if self.progress.step == 4:
            ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 16384)))  # a checkpoint takes more
        save(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", fill_and_save)
        status, text = d2v(*words)
    assert status == 2 and "The checkpoint of step 4 cannot be written" in text and "intact" in text, text
    assert "Traceback" not in text
    (left,) = checkpoint.list_checkpoints(disk / "run" / "checkpoints")
    assert checkpoint.step_of(left) == 2
    checkpoint.load(left)  # whole
    assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == [left.name]  # no half-written one
    ballast.unlink()
    assert d2v(*words, "resume=auto")[0] == 0
    lines, tensors = read_run(disk / "run")
    expected_lines, expected = straight(d2v, read_run, tmp_path)
    assert lines == expected_lines and all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_folder_that_turns_read_only(d2v, read_run, disk, tmp_path):
    words = (*WORDS, f"out={disk / 'run'}")
    assert d2v(*words, "train.max_steps=4")[0] == 0
    resumed, new = (*words, "train.max_steps=8", "resume=auto"), (*WORDS, f"out={disk / 'new'}", "train.max_steps=8")
    before = {path: path.read_bytes() for path in sorted(disk.rglob("*")) if path.is_file()}
    mount("-o", "remount,ro", str(disk))
    for given in (resumed, new):
        status, text = d2v(*given)
        assert status == 2 and "cannot be written: Read-only file system" in text and "Traceback" not in text, text
    assert {path: path.read_bytes() for path in sorted(disk.rglob("*")) if path.is_file()} == before
    mount("-o", "remount,rw", str(disk))
    assert d2v(*resumed)[0] == 0
    assert checkpoint.step_of(checkpoint.list_checkpoints(disk / "run" / "checkpoints")[-1]) == 8


def test_a_clock_that_jumps_changes_nothing(d2v, read_run, tmp_path, monkeypatch):
    expected_lines, expected = straight(d2v, read_run, tmp_path)
    rng = random.Random(0)
    now = time.time()
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + rng.uniform(-1e9, 1e9))  # thirty years either way
        patch.setattr(time, "strftime", lambda form, *_: "19700101-000000")
        status, text = d2v(*WORDS, f"out={out}", "train.max_steps=8")
        assert status == 0, text
    lines, tensors = read_run(out)
    assert lines == expected_lines and all(torch.equal(tensors[name], expected[name]) for name in expected)
    # The newest checkpoint is the one of the most steps, whatever its files' times say.
    _, new = checkpoint.list_checkpoints(out / "checkpoints")
    for path in (new, *new.iterdir()):
        os.utime(path, (0, 0))
    status, text = d2v(*WORDS, f"out={out}", "train.max_steps=9", "resume=auto")
    assert status == 0 and f"Going on from {new}" in text


def test_names_of_runs_do_not_collide_where_the_clock_stands_still(d2v, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form, *_: "19700101-000000")
    for _ in range(3):
        assert d2v(*WORDS, "train.max_steps=1")[0] == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"toy-tiny-19700101-000000{end}" for end in ("", "-2", "-3")]
