"""Several processes are one run: the same curve, one voice, one end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2v_core import checkpoint, distributed, loop
from d2v_core.batching import StepLoader
from d2v_core.config import load_config
from d2v_core.distributed import LOST, Processes
from d2v_core.errors import UserError
from d2v_core.run import build_model
from d2v_core.trainer import Updater

from ..together import run_together, start

STEPS = 6
PLAIN = ["run", "modality=toy", "model.dropout=0", "model.attention_dropout=0", f"train.max_steps={STEPS}"]
UNEVEN = ["data.batch=144", "optim.clip_grad_norm=1"]  # three micro-batches a step, for two processes


def newest(run: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[-1])


def assert_close(read_run: Callable[..., Any], a: Path, b: Path) -> None:
    """The same lines of metrics and the same tensors of model, teacher and optimizer, but for rounding."""
    (lines_a, tensors_a), (lines_b, tensors_b) = read_run(a), read_run(b)
    assert [line.keys() for line in lines_a] == [line.keys() for line in lines_b]
    for one, other in zip(lines_a, lines_b, strict=True):
        assert one == pytest.approx(other, rel=1e-5), one["step"]
    assert tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        torch.testing.assert_close(
            tensor, tensors_b[name], rtol=1e-3, atol=2e-6, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["model.dropout=0.2", "model.attention_dropout=0.1", "model.layer_drop=0.3", "train.num_workers=1"],
        ["launch.strategy=fsdp2"],
        ["launch.strategy=fsdp2", "launch.activation_checkpointing=true", "encoder=own"],
    ],
    ids=["ddp", "ddp with dropout", "fsdp2", "fsdp2, recomputed, own embedding"],
)
def test_two_processes_are_the_run_of_one(d2v, read_run, tmp_path: Path, more: list[str]):
    """Also what is random: noise belongs to a micro-batch, not to a process."""
    words = list(dict(word.split("=") for word in [*PLAIN[1:], *UNEVEN, *more]).items())
    words = ["run", *(f"{key}={value}" for key, value in words)]
    assert d2v(*words, f"out={tmp_path}/one")[0] == 0
    done = run_together(2, [*words, f"out={tmp_path}/two"], tmp_path / "logs")
    assert [each.status for each in done] == [0, 0], done
    assert "step 6/6" in done[0].text and done[1].text == ""
    assert_close(read_run, tmp_path / "one", tmp_path / "two")


def stop_at(count: int, rank: int) -> Callable[[int], None]:
    """The process of that rank gets SIGTERM in its count-th update."""

    def prepare(own: int) -> None:
        update, seen = Updater.update, []

        def counted(self, *args):
            seen.append(None)
            if own == rank and len(seen) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(self, *args)

        Updater.update = counted

    return prepare


def test_all_stop_where_one_is_told_to_and_another_number_goes_on(d2v, read_run, tmp_path: Path):
    """Four sharded processes, of which one has no micro-batch, then two copies, then one."""
    words, out, straight = [*PLAIN, *UNEVEN, "train.max_steps=7"], tmp_path / "run", tmp_path / "straight"
    words.remove(f"train.max_steps={STEPS}")
    done = run_together(4, [*words, f"out={out}", "launch.strategy=fsdp2"], tmp_path / "a", stop_at(2, rank=3))
    assert [each.status for each in done] == [143] * 4, done
    assert "Stopped by SIGTERM after step 2 of 7" in done[0].text
    done = run_together(2, [*words, f"out={out}", "resume=auto"], tmp_path / "b", stop_at(3, rank=1))
    assert [each.status for each in done] == [143] * 2, done
    assert "this run used 4 processes, now there are 2" in done[0].text
    assert "Stopped by SIGTERM after step 5 of 7" in done[0].text
    assert d2v(*words, f"out={out}", "resume=auto")[0] == 0
    assert d2v(*words, f"out={straight}")[0] == 0
    assert_close(read_run, straight, out)


def test_unreadable_samples_are_named_once_and_change_nothing_else(d2v, read_run, tmp_path: Path):
    words = [*PLAIN, *UNEVEN, "data.bad=[3,8]"]
    assert d2v(*words, f"out={tmp_path}/one")[0] == 0
    done = run_together(2, [*words, f"out={tmp_path}/two"], tmp_path / "logs")
    assert [each.status for each in done] == [0, 0], done
    assert done[0].text.count("sample-3: sample 3 is broken on purpose") == 1
    assert_close(read_run, tmp_path / "one", tmp_path / "two")
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two")]
    assert summaries[0]["skipped"] == summaries[1]["skipped"] and len(summaries[0]["skipped"]) == 2
    assert summaries[0]["amount"] == summaries[1]["amount"]


def spoil(rank: int, *steps: int) -> Callable[[int], None]:
    """In one process the loss of these steps is not a number."""

    def prepare(own: int) -> None:
        update = Updater.update

        def spoiled(self, step, batches, teacher_inputs):
            forward = self.forward
            if own == rank and step in steps:
                self.forward = lambda *args: _spoiled(forward(*args))
            try:
                return update(self, step, batches, teacher_inputs)
            finally:
                self.forward = forward

        Updater.update = spoiled

    return prepare


def _spoiled(out: Any) -> Any:
    object.__setattr__(out, "loss_sum", out.loss_sum * float("nan"))
    return out


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(tmp_path: Path, strategy: str):
    out = tmp_path / "run"
    words = [*PLAIN, *UNEVEN, f"out={out}", f"launch.strategy={strategy}", "train.bad_steps_limit=2"]
    done = run_together(2, words, tmp_path / "logs", spoil(1, 2))
    assert [each.status for each in done] == [0, 0], done
    (line,) = (json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines())
    assert line["step"] == 3 and line["loss"] == "nan" and len(line["samples"]) > 3
    assert done[0].text.count("step 3: the loss is nan") == 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["bad_steps"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert all(t.isfinite().all() for t in newest(out).model.values())


def test_a_process_without_micro_batches_has_a_loss_scale(tmp_path: Path):
    """Scaling a first loss is what makes one, and here a step has one micro-batch for two processes."""

    def on_the_host(rank: int) -> None:
        del rank
        loop.pick_device = lambda config: torch.device("cpu")  # which refuses fp16 there, for it is slow

    words = [*PLAIN, "data.batch=48", "train.precision=fp16", "train.probe=false", f"out={tmp_path}/run"]
    done = run_together(2, words, tmp_path / "logs", on_the_host)
    assert [each.status for each in done] == [0, 0], done
    stored = newest(tmp_path / "run").state
    assert stored["scaler"]["scale"] > 0 and stored["progress"]["bad_steps"] == 0


def test_too_many_such_steps_end_all_with_one_message(tmp_path: Path):
    words = [*PLAIN, *UNEVEN, f"out={tmp_path}/run", "train.bad_steps_limit=2"]
    done = run_together(2, words, tmp_path / "logs", spoil(0, 2, 3))
    assert [each.status for each in done] == [2, 2], done
    assert sum(each.text.count("2 steps in a row were not finite") for each in done) == 1


def fail(rank: int, how: Callable[[], None]) -> Callable[[int], None]:
    def prepare(own: int) -> None:
        update = Updater.update

        def failing(self, step, *args):
            if own == rank and step == 2:
                how()
            return update(self, step, *args)

        Updater.update = failing

    return prepare


def refuse() -> None:
    raise UserError("this process alone cannot go on")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("how", "status"), [(refuse, 2), (die, -9)], ids=["error", "killed"])
def test_when_one_ends_the_others_end_with_a_message(tmp_path: Path, how, status: int, strategy: str):
    words = [*PLAIN, *UNEVEN, f"out={tmp_path}/run", f"launch.strategy={strategy}"]
    running, begun = start(2, words, tmp_path / "logs", fail(1, how)), time.monotonic()
    done = running.ended()
    assert [each.status for each in done] == [LOST, status], done
    assert "process 0 of 2 can no longer reach another one" in done[0].text
    if how is refuse:
        assert done[1].text == "d2v: this process alone cannot go on\n"
    assert time.monotonic() - begun < 120  # with everything before it: these machines are slow


def test_a_mistake_is_said_once(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("not to be overwritten")
    done = run_together(2, [*PLAIN, f"out={tmp_path}/run"], tmp_path / "logs")
    assert [each.status for each in done] == [2, 2]
    assert sum(each.text.count("is not empty and holds no run") for each in done) == 1


def test_fine_tuning_in_two_processes_is_that_of_one(d2v, tmp_path: Path):
    pre = tmp_path / "pre"
    assert d2v(*PLAIN, f"out={pre}")[0] == 0
    words = ["run", "stage=finetune", f"from={pre}", "train.max_steps=4", "train.log_every=1", "train.num_workers=0",
             "train.tensorboard=false", "finetune.batch=9", "finetune.micro_batch=3", "finetune.eval_every=2",
             "finetune.head_steps=3", "finetune.ema_decay=0.5", "model.dropout=0.1"]  # fmt: skip
    assert d2v(*words, f"out={tmp_path}/one")[0] == 0
    done = run_together(2, [*words, f"out={tmp_path}/two"], tmp_path / "logs")
    assert [each.status for each in done] == [0, 0], done
    assert done[1].text == ""
    for name in ("metrics.jsonl", "scores.jsonl"):
        one, two = ([json.loads(line) for line in (tmp_path / run / name).read_text().splitlines()]
                    for run in ("one", "two"))  # fmt: skip
        assert len(one) == len(two) > 1
        for a, b in zip(one, two, strict=True):
            for key in a.keys() - {"seconds", "throughput", "data_wait"}:
                assert a[key] == pytest.approx(b[key], rel=1e-5), key
    assert (tmp_path / "two" / "predictions-test.tsv").read_text() == (
        tmp_path / "one" / "predictions-test.tsv"
    ).read_text()


# ----------------------------------------------------------------------------------------------- without processes


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_micro_batch_falls_to_one_process(make, monkeypatch, count: int):
    modality = make("data.batch=144")

    def steps() -> list[tuple[int, int, list[tuple[int, tuple[str, ...]]]]]:
        taken = zip(range(5), StepLoader(modality, modality.dataset("train"), seed=0), strict=False)
        return [(epoch, step, [(b.part, b.ids) for b in batches]) for _, (epoch, step, batches) in taken]

    whole = steps()
    assert all([part for part, _ in batches] == [0, 1, 2] for _, _, batches in whole)
    shares = []
    for rank in range(count):
        monkeypatch.setattr("d2v_core.batching.current", lambda rank=rank: Processes(rank, count))
        shares.append(steps())
    for i, (epoch, step, batches) in enumerate(whole):
        assert {share[i][:2] for share in shares} == {(epoch, step)}
        assert sorted(one for share in shares for one in share[i][2]) == batches


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_of_a_whole_are_those_that_torch_deals_out(monkeypatch, rows: int, count: int):
    whole = torch.arange(rows * 3.0).view(rows, 3)
    chunks = list(whole.chunk(count)) + [whole[:0]] * count

    class Mesh:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def size(self) -> int:
            return count

        def get_local_rank(self) -> int:
            return self.rank

    class Like:
        def __init__(self, rank: int) -> None:
            self.device_mesh = Mesh(rank)

    monkeypatch.setattr(distributed, "as_sharded", lambda tensor: tensor)
    for rank in range(count):
        assert torch.equal(distributed.part_of_whole(whole, Like(rank)), chunks[rank])  # pyright: ignore


def test_buckets_hold_every_parameter_once_and_no_more_than_their_size(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 40)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 3, 3, 3, 20, 1)]
    buckets = distributed._buckets(parameters)
    assert [p for bucket in buckets for p in bucket] == parameters
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[3, 3, 3], [3], [20], [1]]


def test_recomputing_changes_no_gradient(make):
    """Not even with dropout, which is drawn twice."""

    def gradients(*words: str) -> dict[str, Tensor]:
        modality = make("model.dropout=0.3", *words)
        model = build_model(modality)
        distributed.prepare(model, modality.config, torch.device("cpu"))
        _, _, (batch, *_) = next(iter(StepLoader(modality, modality.dataset("train"), seed=0)))
        torch.manual_seed(1)
        assert batch.masks is not None
        model.train()(batch.inputs, batch.masks).loss_sum.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    kept, recomputed = gradients(), gradients("launch.activation_checkpointing=true")
    assert kept.keys() == recomputed.keys() and len(kept) > 20
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_recomputing_keeps_less(make):
    """Bytes that the forward pass keeps for the backward pass."""

    def kept(*words: str) -> int:
        modality = make("model.num_layers=6", "target.top_k_layers=2", *words)
        model = build_model(modality)
        distributed.prepare(model, modality.config, torch.device("cpu"))
        _, _, (batch, *_) = next(iter(StepLoader(modality, modality.dataset("train"), seed=0)))
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        assert batch.masks is not None
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model.train()(batch.inputs, batch.masks)
        del out
        return sum(sizes.values())

    assert kept("launch.activation_checkpointing=true") < kept() / 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["launch.processes=0"], "launch.processes=0 must be at least 1"),
        (["launch.timeout=0"], "launch.timeout=0.0 must be above 0"),
        (["launch.strategy=ddp2"], "Did you mean ddp?"),
        (
            ["launch.strategy=fsdp2", "train.compile=true"],
            "train.compile=true does not work with launch.strategy=fsdp2",
        ),
        (["launch.strategy=fsdp2", "train.precision=fp16"], "train.precision=fp16 does not work with"),
    ],
)
def test_configurations_that_cannot_work(words: Sequence[str], complaint: str):
    with pytest.raises(UserError, match=complaint):
        load_config(["modality=toy", *words])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["launch.strategy=fsdp2"], "stage=finetune keeps a whole copy of its best weights: take launch.strategy=ddp"),
        (["finetune.lrs=[1e-3,2e-3]"], "finetune.lrs makes several runs"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_they_start(d2v, tmp_path: Path, words, complaint: str):
    assert d2v(*PLAIN, f"out={tmp_path}/pre")[0] == 0
    status, text = d2v(
        "run", "stage=finetune", f"from={tmp_path}/pre", f"out={tmp_path}/run", "launch.processes=2", *words
    )
    assert status == 2 and complaint in text and "With 2 processes this cannot work" in text
    assert not (tmp_path / "run").exists()


def test_a_number_of_processes_that_is_not_torchruns_is_refused(tmp_path: Path):
    done = run_together(2, [*PLAIN, f"out={tmp_path}/run", "launch.processes=3"], tmp_path / "logs")
    assert [each.status for each in done] == [2, 2]
    assert done[0].text.startswith("d2v: launch.processes=3, but torchrun has started 2 processes here")
    assert done[1].text == ""


def test_the_processes_are_started_with_the_words_of_the_command_and_its_folder(d2v, monkeypatch, tmp_path: Path):
    """And with their own stage alone: what follows pre-training is for the process that started them."""
    started: list[Any] = []

    def launch(config, entry):
        started.append((config.nproc_per_node, config.max_restarts))
        return lambda *words: started.append(words)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    out = tmp_path / "run"
    assert d2v("run", "modality=toy", f"out={out}", "launch.processes=3", "launch.max_restarts=2")[0] == 0
    assert started == [
        (3, 2),
        ("-m", "d2v_core", "run", "modality=toy", "launch.processes=3", "launch.max_restarts=2", f"out={out}",
         "resume=auto", "stage=pretrain"),
    ]  # fmt: skip


def test_restarts_without_a_folder_are_refused(make, monkeypatch):
    config = make().config
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match="needs out=FOLDER"):
        distributed.restarted(config)
    named = make("out=somewhere").config
    assert distributed.restarted(named).resume == "never"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.restarted(named).resume == "auto"


# ------------------------------------------------------------------------------------- processes of one's own, slow


def wait_for(what: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(parent: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Generator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env={**environment, "TOY_DELAY": "0.01"}, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield process, log.read_text
    finally:
        for number in [*children_of(process.pid), process.pid] if process.poll() is None else []:
            os.kill(number, signal.SIGKILL)
        process.wait()


LONG = ["run", "modality=toy", "train.max_steps=40", "train.checkpoint_every=5", "train.keep_checkpoints=20", *UNEVEN]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_within_half_a_minute_and_is_named(environment, tmp_path: Path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "d2v_core", *LONG, f"out={out}", "launch.processes=2", "train.max_steps=100000"]
    command.remove("train.max_steps=40")
    with running(command, environment, tmp_path / "log.txt") as (process, text):
        wait_for(lambda: bool(checkpoint.list_checkpoints(out / "checkpoints")))
        (other, killed), begun = children_of(process.pid), time.monotonic()
        os.kill(killed, signal.SIGKILL)
        said = f"d2v: process 1 of 2 (number {killed} of the system) was killed by SIGKILL"
        wait_for(lambda: said in text() and not is_running(other), 30)
        print(f"all ended, and it was said, {time.monotonic() - begun:.1f} s after one process was killed")
        assert process.wait(timeout=120) == 128 + signal.SIGKILL  # torch's own end takes long on a busy machine
        print(f"the command ended {time.monotonic() - begun:.1f} s after")
        assert f"out={out} resume=auto" in text()


@pytest.mark.parametrize("by", [pytest.param("torchrun", marks=pytest.mark.slow), "d2v"])
def test_processes_that_are_started_again_go_on_to_the_same_end(d2v, read_run, environment, tmp_path: Path, by: str):
    straight, out = tmp_path / "straight", tmp_path / "run"
    own = ["launch.processes=2", "launch.max_restarts=1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    start = [*torchrun, "-m", "d2v_core", *LONG] if by == "torchrun" else ["-m", "d2v_core", *LONG, *own]
    with running([sys.executable, *start, f"out={out}"], environment, tmp_path / "log.txt") as (process, text):
        wait_for(lambda: len(checkpoint.list_checkpoints(out / "checkpoints")) > 1)
        os.kill(children_of(process.pid)[0], signal.SIGKILL)
        assert process.wait(timeout=300) == 0, text()
        assert "Going on from" in text()
    assert d2v(*LONG, f"out={straight}")[0] == 0
    assert_close(read_run, straight, out)
