"""A process that reads data and dies or hangs: it is named, its sample is left out, nothing else changes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from d2v_core import workers
from d2v_core.batching import StepLoader, labelled_batches
from d2v_core.errors import UserError
from d2v_core.objectives import class_targets
from d2v_core.workers import WorkerPolicy

STEPS = 12


def read(toy, policy: WorkerPolicy | None = None, **arguments) -> list:
    """STEPS steps as (place, ids, skipped, tensors)."""
    arguments |= {} if policy is None else {"worker_policy": policy}
    loader = iter(StepLoader(toy, toy.dataset("train"), seed=3, **arguments))
    steps = []
    for epoch, step, batches in loader:
        tensors = [t for b in batches for t in ([*b.inputs.values(), b.masks.hidden] if b.masks else [])]
        steps.append(((epoch, step), [b.ids for b in batches], [b.skipped for b in batches], tensors))
        if len(steps) == STEPS:
            break
    loader.close()
    return steps


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK_EVERY", 0.1)


@pytest.mark.parametrize(("fall", "how"), [("die-5", "was ended by SIGKILL"), ("hang-5", "has hung for")])
@pytest.mark.parametrize("count", [1, 2])
def test_the_sample_is_left_out_and_nothing_else_changes(make, monkeypatch, quick, fall, how, count):
    toy = make("data.num_samples=14")
    bad = make("data.num_samples=14", "data.bad=[5]")  # the same sample cannot be read in a quiet way
    expected = read(bad)
    monkeypatch.setenv("TOY_FALL", fall)
    said: list[str] = []
    found = read(toy, WorkerPolicy(3, 0.5, said.append), num_workers=count)
    assert len(said) == 1 and how in said[0] and "while it read sample-5" in said[0] and "1 of at most 3" in said[0]
    for (place, ids, skipped, tensors), (place2, ids2, skipped2, tensors2) in zip(found, expected, strict=True):
        assert (place, ids) == (place2, ids2)
        assert [[name for name, _ in part] for part in skipped] == [[name for name, _ in part] for part in skipped2]
        assert len(tensors) == len(tensors2) and all(map(torch.equal, tensors, tensors2))
    reasons = {reason for _, _, skipped, _ in found for part in skipped for _, reason in part}
    assert len(reasons) == 1 and how in reasons.pop()


def test_more_than_the_limit_stops_and_says_what_to_look_at(make, monkeypatch, quick):
    monkeypatch.setenv("TOY_FALL", "die-2 die-5 die-7")
    toy = make("data.num_samples=14")
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"while it read sample-\d\. That is number 3; train\.worker_failures=2"
    ) as error:
        read(toy, WorkerPolicy(2, 60.0, said.append), num_workers=1)
    assert len(said) == 2 and "/dev/shm" in str(error.value)
    with pytest.raises(UserError, match=r"number 1; train\.worker_failures=0"):
        read(toy, WorkerPolicy(0, 60.0, said.append), num_workers=1)


def test_one_killed_by_hand_between_samples(make, quick):
    toy = make("data.num_samples=14")
    expected = read(toy)
    said: list[str] = []
    whole = StepLoader(
        toy, toy.dataset("train"), seed=3, num_workers=2, worker_policy=WorkerPolicy(3, 60.0, said.append)
    )
    loader = iter(whole)
    steps = [next(loader)]
    quiet = 0
    while quiet < 5:  # until they have read ahead as far as they may, and wait
        time.sleep(0.2)
        quiet = 0 if whole._loader.reader.desk.seconds() else quiet + 1
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    time.sleep(0.1)  # torch's own handler would raise here
    steps += [next(loader) for _ in range(STEPS - 1)]
    loader.close()
    assert [place for place, *_ in expected] == [(epoch, step) for epoch, step, _ in steps]
    assert [ids for _, ids, *_ in expected] == [[b.ids for b in batches] for *_, batches in steps]
    assert len(said) == 1 and "not while it read a sample" in said[0]


def test_slow_is_not_hanging(make, monkeypatch, quick):
    monkeypatch.setenv("TOY_DELAY", "0.05")  # a batch takes longer than a look, no sample as long as the timeout
    said: list[str] = []
    toy = make("data.num_samples=6")
    assert len(read(toy, WorkerPolicy(3, 5.0, said.append), num_workers=1)) == STEPS and not said


def test_what_a_reader_raises_is_raised(make, monkeypatch, quick):
    toy = make("data.num_samples=14")
    monkeypatch.setattr(type(toy), "collate", lambda self, samples: 1 // 0)
    with pytest.raises(ZeroDivisionError, match="Caught ZeroDivisionError in DataLoader worker"):
        read(toy, num_workers=1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_the_thread_that_pins_batches_dies_new_processes_go_on(make, monkeypatch, quick):
    """It dies of what it cannot receive, such as "received 0 items of ancdata"; torch then waits for ever, if it has a
    timeout, as here."""
    toy = make("data.num_samples=14")
    expected = [ids for _, ids, *_ in read(toy)]
    threads: list[threading.Thread] = []

    def pin(data, device=None):
        threads.append(threading.current_thread())
        if len(threads) == 3:
            raise SystemExit  # no Exception, which torch would hand on
        return data

    for name, value in (("is_available", True), ("current_device_index", 0), ("set_device_index", None),
                        ("current_accelerator", torch.device("cpu"))):  # fmt: skip
        monkeypatch.setattr(torch.accelerator, name, lambda *given, value=value: value)
    monkeypatch.setattr(torch.utils.data._utils.pin_memory, "pin_memory", pin)
    said: list[str] = []
    found = read(toy, WorkerPolicy(3, 60.0, said.append), num_workers=1, pin_memory=True)
    assert [ids for _, ids, *_ in found] == expected
    assert len(said) == 1 and "the thread that pins its batches has ended" in said[0]
    assert len(set(threads)) == 2 and not any(thread.is_alive() for thread in threads)


def test_an_error_that_nobody_catches_ends_the_program_and_its_processes(environment):
    """Its traceback holds on to the loader until Python ends."""
    code = """
        from d2v_core.batching import whole_batches
        from d2v_core.config import load_config

        config, kind = load_config(["modality=toy"])
        toy = kind(config)

        def use(batches):
            for batch in batches:
                raise RuntimeError("CUDA out of memory")

        use(whole_batches(toy, toy.dataset("train"), range(14), 2, num_workers=2))
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as program:  # fmt: skip
        try:
            _, said = program.communicate(timeout=60)  # which waits for the processes too: they have its stderr
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 1 and said.endswith("RuntimeError: CUDA out of memory\n")


def test_torch_s_handler_is_there_again_afterwards(make, quick):
    toy = make("data.num_samples=14")
    read(toy, num_workers=1)
    assert getattr(signal.getsignal(signal.SIGCHLD), "__module__", "").startswith("torch.")


def test_labelled_samples_too(d2v, make, monkeypatch, quick, tmp_path):
    source = tmp_path / "source"
    assert d2v("run", "modality=toy", f"out={source}", "train.max_steps=1", "train.probe=false")[0] == 0
    toy = make("stage=finetune", f"from={source}")
    part = toy.task().train
    whole = [name for batch in labelled_batches(toy, part, class_targets(3), 8) for name in batch.ids]
    read_one = type(part.samples).__getitem__

    def fall(self, index):
        if index == 4 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_one(self, index)

    monkeypatch.setattr(type(part.samples), "__getitem__", fall)
    said: list[str] = []
    batches = labelled_batches(toy, part, class_targets(3), 8, 1, WorkerPolicy(3, 60.0, said.append))
    left = [name for batch in batches for name in batch.ids]
    assert left == [name for name in whole if name != part.samples.id(4)] and len(said) == 1


def test_a_run_goes_on_without_the_sample_and_a_hanging_process_does_not_outlive_it(environment, tmp_path):
    words = ["run", "modality=toy", "train.max_steps=8", "train.log_every=1", "train.probe=false",
             "train.num_workers=1", "train.tensorboard=false", "train.num_threads=1", "data.num_samples=14",
             "train.worker_timeout=1", f"out={tmp_path / 'run'}"]  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "d2v_core", *words], env={**environment, "TOY_FALL": "die-3 hang-9"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "fault A process that reads data was ended by SIGKILL while it read sample-3" in text
    assert "has hung for" in text and "while it read sample-9" in text
    assert "skipped sample-3: a process that read it was ended by SIGKILL" in text
    assert time.monotonic() - start < 100
