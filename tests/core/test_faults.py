"""Steps that are not finite move nothing, are written down, and end a run only when there are too many of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from d2v_core.batching import StepLoader
from d2v_core.checkpoint import list_checkpoints, load
from d2v_core.contract import Batch
from d2v_core.faults import FaultWatch, Outcome, TooManyFaults, find_fault
from d2v_core.finetune import Finetuner
from d2v_core.run import build_model
from d2v_core.teacher import EMATeacher
from d2v_core.trainer import Updater

STEPS = 12


def words(out: Path, *more: str) -> list[str]:
    first = ["run", "modality=toy", f"out={out}", "train.log_every=1", "train.num_workers=0"]
    return [*first, *more, *([] if any("max_steps" in word for word in more) else [f"train.max_steps={STEPS}"])]


def lines_of(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@contextmanager
def poisoned(calls: Collection[int], kind: type = Updater, value: float = math.nan) -> Generator[list[tuple[str, ...]]]:
    """The inputs of these updates, counted from 1, hold a value that is not finite. Yields the ids of all updates."""
    update, seen = kind.update, []

    def with_poison(self, *args):
        batches = next(a for a in args if isinstance(a, list))
        seen.append(tuple(name for batch in batches for name in batch.ids))
        if len(seen) in calls:
            batches[-1].inputs["x"][-1, 0] = value
        return update(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "update", with_poison)
        yield seen


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("first", [False, True])
def test_a_bad_step_moves_nothing(make: Callable, precision: str, value: float, first: bool):
    made = make(f"train.precision={precision}")
    model = build_model(made).train()
    updater = Updater(model, made.config, torch.device("cpu"))
    loader = iter(StepLoader(made, made.dataset("train"), seed=0))
    if not first:  # at a step whose learning rate is not 0, so that the teacher has a way to go
        updater.update(2, next(loader)[2], made.teacher_inputs)
        student = dict(model.student.named_parameters())
        assert any(not torch.equal(p, student[name]) for name, p in model.teacher.module.named_parameters())
    before = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(updater.optimizer.state_dict()["state"])
    batches = next(loader)[2]
    batches[0].inputs["x"][0, 0] = value
    result = updater.update(2, batches, made.teacher_inputs)
    assert not updater.outcome.applied and not math.isfinite(float(result.loss))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for index, state in updater.optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, moments[index][name] if moments else torch.zeros_like(tensor)), name
    result = updater.update(2, next(loader)[2], made.teacher_inputs)
    assert updater.outcome.applied and math.isfinite(float(result.loss))
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any(name.startswith("teacher.") for name in moved) and any(name.startswith("student.") for name in moved)


def test_a_loss_scaler_skips_the_step_that_everybody_skips(make: Callable):
    """An infinite loss may have finite gradients, which are all that torch's scaler looks at; of a sharded network it
    looks at this process's part of them."""
    made = make("train.precision=fp16")
    model = build_model(made).train()
    updater = Updater(model, made.config, torch.device("cpu"))
    loader = iter(StepLoader(made, made.dataset("train"), seed=0))
    for step in range(8):  # until the scale is found
        updater.update(2 + step, next(loader)[2], made.teacher_inputs)
    assert updater.outcome.applied
    before, scale = copy.deepcopy(model.state_dict()), updater.scaler.get_scale()

    def infinite(*args):
        out = model(*args)
        return dataclasses.replace(out, loss_sum=out.loss_sum + math.inf)

    updater.forward = infinite
    updater.update(10, next(loader)[2], made.teacher_inputs)
    assert not updater.outcome.applied and updater.outcome.grad_norm.isfinite()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert updater.scaler.get_scale() == scale / 2


def test_a_single_bad_step_is_counted_and_written_down(d2v: Callable, tmp_path: Path):
    out = tmp_path / "run"
    with poisoned({4}) as seen:
        status, text = d2v(*words(out))
    assert status == 0 and "step 4: the loss is nan" in text and "skipped, the weights stay as they are" in text
    (fault,) = lines_of(out, "faults.jsonl")
    assert fault == {"step": 4, "loss": "nan", "grad_norm": "nan", "samples": list(seen[3])}
    lines = lines_of(out)
    assert [line["bad_steps"] for line in lines] == [0] * 3 + [1] * 9
    assert lines[3]["loss"] is None and all(line["loss"] > 0 for i, line in enumerate(lines) if i != 3)
    assert load(list_checkpoints(out / "checkpoints")[-1]).state["progress"]["bad_steps"] == 1


def test_the_count_survives_a_resume(d2v: Callable, tmp_path: Path):
    out = tmp_path / "run"
    with poisoned({4}):
        assert d2v(*words(out))[0] == 0
    with poisoned({2}):
        assert d2v(*words(out, f"train.max_steps={STEPS + 4}", "resume=auto"))[0] == 0
    assert lines_of(out)[-1]["bad_steps"] == 2 and [f["step"] for f in lines_of(out, "faults.jsonl")] == [4, 14]


def test_too_many_in_a_row_go_back_once_with_the_data_that_come_after(d2v: Callable, tmp_path: Path):
    out = tmp_path / "run"
    with poisoned(range(7, 12)) as seen:  # 5 steps; the checkpoint before is that of step 6
        status, text = d2v(*words(out, "train.checkpoint_every=3"))
    assert status == 0
    assert "going back 5 steps in a row were not finite; at step 11: the loss is nan, the gradient norm nan" in text
    assert "come out of student.encoder.embedding (Linear)" in text
    assert f"Going on from {out / 'checkpoints' / 'step-00000006'}" in text
    assert len(seen) == 11 + STEPS - 6
    with poisoned(()) as undisturbed:
        assert d2v(*words(tmp_path / "clean", "train.max_steps=17"))[0] == 0
    assert seen == undisturbed[: len(seen)]  # no batch a second time
    lines = lines_of(out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) and lines[-1]["bad_steps"] == 5
    assert all(line["loss"] is not None for line in lines)
    progress = load(list_checkpoints(out / "checkpoints")[-1]).state["progress"]
    assert progress["went_back"] and progress["bad_steps"] == 5


def test_a_second_time_it_stops(d2v: Callable, tmp_path: Path):
    out = tmp_path / "run"
    with poisoned([*range(5, 10), *range(11, 16)]):
        status, text = d2v(*words(out, "train.checkpoint_every=4"))
    assert status == 2 and "The run had gone back to an older checkpoint before" in text
    assert "Lower optim.lr" in text and str(out / "faults.jsonl") in text and "are intact" in text
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == ["step-00000004"]
    assert not (out / "summary.json").exists() and len(lines_of(out, "faults.jsonl")) == 10


def test_where_there_is_no_checkpoint_it_stops_at_once(d2v: Callable, tmp_path: Path):
    out = tmp_path / "run"
    with poisoned(range(1, 99)) as seen:
        status, text = d2v(*words(out, "train.bad_steps_limit=3"))
    assert status == 2 and len(seen) == 3 and "3 steps in a row were not finite" in text
    assert all(name in text for name in seen[-1][:3]) and "are intact" not in text
    assert list_checkpoints(out / "checkpoints") == []


def test_fewer_than_the_limit_between_good_steps_go_by(d2v: Callable, tmp_path: Path):
    with poisoned([2, 3, 5, 6, 8, 9]):
        assert d2v(*words(tmp_path / "run", "train.bad_steps_limit=3"))[0] == 0
    assert lines_of(tmp_path / "run")[-1]["bad_steps"] == 6


def test_weights_grown_beyond_all_bounds_are_never_saved(d2v: Callable, tmp_path: Path):
    """They are finite, what is computed with them is not."""
    out = tmp_path / "run"
    more = ("optim.lr=1e38", "optim.warmup_ratio=0", "train.checkpoint_every=3")
    status, text = d2v(*words(out, *more))
    assert status == 2 and "5 steps in a row were not finite" in text and "Lower optim.lr" in text
    assert list_checkpoints(out / "checkpoints") == [] and not (out / "summary.json").exists()


def test_weights_that_are_not_finite_are_never_saved(d2v: Callable, tmp_path: Path):
    out, update = tmp_path / "run", Updater.update

    def spoil(self, step, *args):
        result = update(self, step, *args)
        if step == 3:
            self.model.predictor.linear.bias.data[0] = math.inf
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "update", spoil)
        status, text = d2v(*words(out, "train.checkpoint_every=2"))
    assert status == 2 and "By step 4 weights are not finite (predictor.linear.bias)" in text
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == ["step-00000002"]


def test_fine_tuning_skips_too(d2v: Callable, tmp_path: Path):
    assert d2v(*words(tmp_path / "source"))[0] == 0
    out = tmp_path / "tuned"
    more = (f"from={tmp_path / 'source'}", "stage=finetune", "finetune.ema_decay=0.5", "finetune.eval_every=4")
    with poisoned({1, 3}, Finetuner):
        status, _ = d2v(*words(out, *more))
    assert status == 0 and [fault["step"] for fault in lines_of(out, "faults.jsonl")] == [1, 3]
    stored = load(list_checkpoints(out / "checkpoints")[-1])
    assert all(tensor.isfinite().all() for tensor in [*stored.model.values(), *stored.teacher.values()])


def test_the_best_weights_are_those_of_the_way_that_was_taken(d2v: Callable, tmp_path: Path):
    """The run scores step 4, goes back to step 3, and scores step 4 again, on other data."""
    assert d2v(*words(tmp_path / "source"))[0] == 0
    out, kept, keep = tmp_path / "tuned", [], Finetuner._keep_best

    def watched(self) -> None:
        kept.append((self.progress.step, {name: t.clone() for name, t in self.model.state_dict().items()}))
        keep(self)
        (folder,) = list_checkpoints(out / "best")
        stored = load(folder, state=False).model
        assert folder.name == f"step-{self.progress.step:08d}"
        assert all(torch.equal(stored[name], tensor) for name, tensor in kept[-1][1].items())

    more = ("stage=finetune", "finetune.eval_every=4", "train.checkpoint_every=3", "train.bad_steps_limit=2",
            "train.max_steps=8")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, poisoned(range(5, 7), Finetuner):
        patch.setattr(Finetuner, "_keep_best", watched)
        assert d2v(*words(out, f"from={tmp_path / 'source'}", *more))[0] == 0
    assert [step for step, _ in kept][:2] == [4, 4]
    assert any(not torch.equal(kept[0][1][name], tensor) for name, tensor in kept[1][1].items())


def test_the_step_of_the_best_weights_is_that_of_the_weights(d2v: Callable, monkeypatch, tmp_path: Path):
    """Step 4 scores best, the run goes back to step 3, and nothing is better afterwards."""
    assert d2v(*words(tmp_path / "source"))[0] == 0
    out, scores = tmp_path / "tuned", iter([50.0, 90.0, *[10.0] * 9])  # of steps 2, 4, 4 again, 6, 8
    monkeypatch.setattr(Finetuner, "score", lambda self, outputs: {"accuracy": next(scores)})
    more = ("stage=finetune", "finetune.eval_every=2", "train.checkpoint_every=3", "train.bad_steps_limit=2",
            "train.max_steps=8")  # fmt: skip
    with poisoned(range(5, 7), Finetuner):
        status, text = d2v(*words(out, f"from={tmp_path / 'source'}", *more))
    assert status == 0 and "going back" in text
    assert [folder.name for folder in list_checkpoints(out / "best")] == ["step-00000004"]
    assert json.loads((out / "summary.json").read_text())["finetune"]["best_step"] == 4
    assert "the weights of step 4 were best on dev" in text


# ---------------------------------------------------------------------------------------------------- in isolation


def outcome(applied: float, scaled: bool = False, loss: float = math.nan) -> Outcome:
    return Outcome(torch.tensor(applied), torch.tensor(loss), torch.tensor(math.inf), scaled, lambda: "found")


def test_a_loss_scaler_may_skip_as_often_as_it_likes_but_for_a_loss_that_is_not_finite(tmp_path: Path):
    said: list[str] = []
    watch = FaultWatch(tmp_path / "faults.jsonl", said.append, 2)
    for step in range(9):
        watch.note(step, ("a",), outcome(0.0, scaled=True, loss=1.0))
    assert said == [] and not (tmp_path / "faults.jsonl").exists()
    watch.note(9, ("a",), outcome(0.0, scaled=True))
    with pytest.raises(TooManyFaults, match=r"2 steps in a row .* step 10: .*samples a\). found"):
        watch.note(10, ("a",), outcome(0.0, scaled=True))


class _Elsewhere:
    """A tensor of which the device says that it is not the CPU."""

    def __init__(self, value: float) -> None:
        self.value, self.device = value, torch.device("meta")

    def __bool__(self) -> bool:
        return self.value != 0


def test_elsewhere_than_on_a_cpu_one_step_is_not_waited_for(tmp_path: Path):
    said: list[str] = []
    watch = FaultWatch(tmp_path / "faults.jsonl", said.append, 5)
    bad = Outcome(_Elsewhere(0.0), torch.tensor(math.nan), torch.tensor(1.0), False, str)  # type: ignore[arg-type]
    good = Outcome(_Elsewhere(1.0), torch.tensor(1.0), torch.tensor(1.0), False, str)  # type: ignore[arg-type]
    watch.note(1, ("a",), bad)
    assert said == []
    watch.note(2, ("b",), good)
    assert len(said) == 1 and said[0].startswith("step 1:")
    watch.note(3, ("c",), bad)
    watch.settle()
    watch.settle()
    assert len(said) == 2


class _Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0).sqrt()


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([1.0, 2.0], "The same step is finite when it is run again."),
        ([math.nan, 2.0], "The first values that are not finite come out of 0 (Linear)."),
        ([0.0, 0.0], "Outputs and loss are finite; the gradient of 0.weight is not."),
        ([1e30, 1e30], "The output of every module is finite; the loss is not."),
    ],
)
def test_where_a_fault_comes_from(x: list[float], expected: str):
    model = nn.Sequential(nn.Linear(2, 1, bias=False), _Root())
    nn.init.ones_(model[0].weight)
    batch = Batch({"x": torch.tensor([x])}, None)

    def forward(batch: Batch) -> Tensor:
        return (model(batch.inputs["x"]) ** 6).sum() + model(batch.inputs["x"]).sum()

    found = find_fault(model, [batch], forward, lambda: torch.autocast("cpu", enabled=False))
    assert found == expected and model[0].weight.grad is None and not model[0]._forward_hooks


@pytest.mark.parametrize("applied", [0.0, 1.0])
def test_the_teacher_stays_where_the_student_stayed(applied: float, monkeypatch: pytest.MonkeyPatch):
    """Both ways of it: known on the host, and known to the device alone."""
    torch.manual_seed(0)
    student = nn.Linear(4, 3)
    teachers = [EMATeacher(student, {"": "average"}) for _ in range(3)]
    before = copy.deepcopy(teachers[0].module.state_dict())
    with torch.no_grad():
        for p in student.parameters():
            p += 1.0
    teachers[0].update(student, 0.9, torch.tensor(applied))
    from d2v_core import teacher as module

    average = [p.data for p in teachers[1].module.parameters()]
    module._lerp(average, [p.data for p in student.parameters()], torch.tensor(0.1 * applied))
    if applied:
        teachers[2].update(student, 0.9)
    for name, tensor in teachers[2].module.state_dict().items():
        assert torch.equal(tensor, before[name]) != bool(applied)
        assert torch.equal(teachers[0].module.state_dict()[name], tensor)
        torch.testing.assert_close(teachers[1].module.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
