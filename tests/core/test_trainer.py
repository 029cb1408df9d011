"""The loop's guards, precisions and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from d2v_core import loop
from d2v_core.batching import StepLoader
from d2v_core.checkpoint import list_checkpoints
from d2v_core.config import load_config
from d2v_core.counting import Fakes, traceless
from d2v_core.errors import UserError
from d2v_core.loop import pick_device
from d2v_core.run import build_model
from d2v_core.schedules import lr_at
from d2v_core.trainer import Trainer, Updater


def words(out: Path, *more: str) -> list[str]:
    return ["run", "modality=toy", f"out={out}", *more]


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(d2v, tmp_path: Path):
    out = tmp_path / "run"
    status, text = d2v(*words(out, "train.max_steps=25", "train.log_every=10", "train.checkpoint_every=10"))
    assert status == 0 and "25 steps" in text and f"The run lies in {out}" in text
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl", "summary.json"]
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == ["step-00000020", "step-00000025"]
    lines = lines_of(out)
    assert [line["step"] for line in lines] == [1, 10, 20, 25]
    names = load_file(list_checkpoints(out / "checkpoints")[-1] / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"student", "predictor"}
    config = load_config(["modality=toy", "train.max_steps=25"])[0]
    for line in lines:
        assert line["lr"] == pytest.approx(lr_at(line["step"] - 1, 25, config.optim))
        assert 0 < line["masked"] < 0.6 and line["target_std"] > 0.1 and line["skipped"] == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 25 and summary["modality"] == "toy" and summary["unit"] == "tokens"
    assert summary["wall_seconds"] > 0 and summary["skipped"] == {} and summary["amount"] > 25 * 40


def test_the_loss_falls(d2v, tmp_path: Path):
    out = tmp_path / "run"
    more = ("model.dropout=0", "model.attention_dropout=0", "teacher.ema_decay=0.999", "teacher.ema_end_decay=0.999")
    assert d2v(*words(out, "train.max_steps=120", "train.log_every=5", "optim.lr=3e-3", *more))[0] == 0
    lines = lines_of(out)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and lines[-1]["target_std"] > 0.3


@pytest.mark.parametrize(
    ("option", "name"), [("guard.min_target_std=50", "target_std"), ("guard.min_pred_std=50", "pred_std")]
)
def test_collapse_stops_the_run_and_says_what_helps(d2v, tmp_path: Path, option: str, name: str):
    out = tmp_path / "run"
    status, text = d2v(*words(out, option, "guard.after_steps=2", "train.checkpoint_every=1"))
    assert status == 2
    assert f"The representation has collapsed: at step 3 {name} is " in text and f"{option.split('=')[0]}=50.0" in text
    assert all(hint in text for hint in ("target.layer_norms", "optim.lr", "optim.warmup_ratio", "teacher.ema_decay"))
    assert lines_of(out)[-1]["step"] == 3 and list_checkpoints(out / "checkpoints")[-1].name == "step-00000002"
    assert not (out / "summary.json").exists()


def test_the_guard_sleeps_at_first(d2v, tmp_path: Path):
    assert d2v(*words(tmp_path / "run", "guard.min_target_std=50", "guard.after_steps=6"))[0] == 0


def test_fp16_on_a_cpu_is_refused_before_there_is_a_folder(d2v, tmp_path: Path):
    status, text = d2v(*words(tmp_path / "run", "train.precision=fp16"))
    assert status == 2 and "train.precision=fp16 needs a GPU. On a CPU use bf16 or fp32." in text
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")
def test_cuda_where_there_is_none(d2v, tmp_path: Path):
    for device in ("cuda", "cuda:1"):
        status, text = d2v(*words(tmp_path / "run", f"train.device={device}"))
        assert status == 2 and f"train.device={device}, but torch sees no CUDA device" in text
    config = load_config(["modality=toy", "train.device=auto"])[0]
    assert pick_device(config) == torch.device("cpu")


def test_a_gpu_that_is_named_is_the_current_one(make, monkeypatch, tmp_path: Path):
    """What names none, such as the thread that pins batches, would else take up memory of the first one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(loop, "pick_device", lambda config: torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    Trainer(make(), tmp_path, Console(quiet=True))
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_on_a_gpu_waits_for_no_value_and_mixes_no_devices(make, monkeypatch, precision: str):
    """With tensors of which only shape, type and device are known: to ask one for its value is an error, and so is to
    put those of two devices together. The backward pass needs a device that is there."""
    made = make(f"train.precision={precision}")
    model, device = build_model(made).train(), torch.device("cuda:0")
    fakes = Fakes(device)
    fakes.model(model)
    _, _, batches = next(iter(StepLoader(made, made.dataset("train"), seed=0)))

    def backward(loss: Tensor) -> None:
        assert loss.device == device
        for parameter in updater.parameters:
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(Tensor, "backward", backward)
    with traceless(), fakes.mode:
        updater = Updater(model, made.config, device)
        for step in range(2):
            result = updater.update(step, [fakes.batch(batch) for batch in batches], made.teacher_inputs)
            assert {result.loss.device, result.grad_norm.device, updater.outcome.applied.device} == {device}
        with pytest.raises(DataDependentOutputException):
            float(result.loss)


def test_bf16_runs_near_fp32_and_keeps_float32_weights(d2v, read_run, tmp_path: Path):
    for precision in ("fp32", "bf16"):
        more = ("model.dropout=0", "model.attention_dropout=0", f"train.precision={precision}")
        assert d2v(*words(tmp_path / precision, *more))[0] == 0
    (full, _), (half, tensors) = read_run(tmp_path / "fp32"), read_run(tmp_path / "bf16")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    for a, b in zip(full, half, strict=True):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.03)


def test_unreadable_samples_are_named_once_and_counted(d2v, tmp_path: Path):
    out = tmp_path / "run"
    status, text = d2v(*words(out, "data.bad=[1,2]", "train.max_steps=15"))
    assert status == 0 and text.count("skipped sample-1: sample 1 is broken on purpose") == 1
    assert lines_of(out)[-1]["skipped"] == 2


def test_nothing_readable_at_all(d2v, tmp_path: Path):
    status, text = d2v(*words(tmp_path / "run", "data.num_samples=9", f"data.bad={list(range(9))}".replace(" ", "")))
    assert status == 2 and ("None of the 9 samples can be read" in text or "no sample can be read" in text)


def test_an_empty_data_set(d2v, tmp_path: Path):
    status, text = d2v(*words(tmp_path / "run", "data.num_samples=0"))
    assert status == 2 and "The data set is empty" in text


def test_a_full_disk_is_told_and_older_checkpoints_stay(d2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from d2v_core import checkpoint

    save, out = checkpoint.save_file, tmp_path / "run"

    def full(tensors, path):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    status, text = d2v(*words(out, "train.checkpoint_every=2"))
    assert status == 2 and "The checkpoint of step 4 cannot be written" in text and "No space left on device" in text
    assert "make room and go on with resume=auto" in text
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]


def test_tensorboard_has_every_number(d2v, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert d2v(*words(out, "train.tensorboard=true"))[0] == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    lines = lines_of(out)
    assert set(events.Tags()["scalars"]) == lines[0].keys() - {"step"}
    losses = events.Scalars("loss")
    assert [e.step for e in losses] == [line["step"] for line in lines]
    assert [e.value for e in losses] == pytest.approx([line["loss"] for line in lines])


def test_without_out_the_run_goes_under_runs(d2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert d2v("run", "modality=toy")[0] == 0
    found = sorted((tmp_path / "runs").iterdir())
    assert len(found) == 2 and all(p.name.startswith("toy-tiny-") for p in found)


def test_num_threads_is_set_where_it_is_given(d2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    assert d2v(*words(tmp_path / "a", "train.num_threads=5"))[0] == 0
    assert d2v(*words(tmp_path / "b", "train.num_threads=0"))[0] == 0
    assert seen == [5]


def test_a_configuration_that_the_parts_refuse_is_an_error_of_the_users(d2v, tmp_path: Path):
    status, text = d2v(*words(tmp_path / "run", "mask.mask_prob=2"))
    assert status == 2 and "mask.mask_prob=2.0" in text and "Traceback" not in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler uses what torch has deprecated
def test_compile_takes_two_steps(d2v, read_run, tmp_path: Path):
    for value in ("false", "true"):
        more = ("train.max_steps=2", f"train.compile={value}", "model.dropout=0", "model.attention_dropout=0",
                "model.num_layers=1", "target.top_k_layers=1", "data.min_size=12", "data.max_size=12")  # fmt: skip
        assert d2v(*words(tmp_path / value, *more))[0] == 0
    (plain, _), (compiled, tensors) = read_run(tmp_path / "false"), read_run(tmp_path / "true")
    for a, b in zip(plain, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert not any("_orig_mod" in name for name in tensors)


def test_errors_of_the_user_are_one_kind():
    assert issubclass(UserError, Exception) and not issubclass(UserError, ValueError)
