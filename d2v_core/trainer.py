"""Pre-training: forward, backward, teacher step, and the guard against collapse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from d2v_core import checkpoint, plan, probe, run
from d2v_core.batching import StepLoader
from d2v_core.config import GuardConfig, RunConfig
from d2v_core.contract import Batch, Modality
from d2v_core.data2vec import Data2Vec, Student
from d2v_core.distributed import prepare
from d2v_core.errors import UserError
from d2v_core.loop import Loop, OptimizerStep
from d2v_core.metrics import write_json
from d2v_core.schedules import decay_at, lr_at


@dataclass
class StepResult:
    """Tensors of one update, still on the device: reading them waits for it."""

    loss: Tensor
    target_std: Tensor
    pred_std: Tensor
    grad_norm: Tensor
    masked: Tensor

    def numbers(self) -> dict[str, float]:
        """Everything at once, so that a device is waited for once."""
        names = [f.name for f in dataclasses.fields(self)]
        values = torch.stack([getattr(self, name) for name in names]).cpu()
        return {name: float(value) for name, value in zip(names, values, strict=True)}


class Updater(OptimizerStep):
    """One optimizer update of a Data2Vec, and the teacher's step after it."""

    def __init__(self, model: Data2Vec, config: RunConfig, device: torch.device) -> None:
        super().__init__(model, config, device)
        self.model = model
        self.forward: Callable[..., Any] = model

    def update(self, step: int, batches: Sequence[Batch], teacher_inputs: Callable[[Batch], Any]) -> StepResult:
        """The update that follows `step` completed ones; the teacher has made its own step when this returns."""
        stds: list[Tensor] = []
        shares: list[Tensor] = []

        def forward(batch: Batch) -> Tensor:
            assert batch.masks is not None
            out = self.forward(batch.inputs, batch.masks, teacher_inputs(batch))
            stds.append(torch.stack([out.target_std, out.prediction_std.detach()]))
            shares.append(batch.masks.hidden.float().mean())
            return out.loss_sum

        loss, grad_norm = self.step(step, batches, num_scored, forward)
        self.model.update_teacher(
            decay_at(step + 1, self.config.train.max_steps, self.config.teacher), self.outcome.applied
        )
        own = len(batches)  # without those that ran for the sake of other processes; 0 of them: means of nothing
        target_std, pred_std = torch.stack(stds[:own] or [loss.new_zeros(2)]).mean(0).unbind()
        masked = torch.stack(shares[:own] or [loss.new_zeros(())]).mean()
        return StepResult(loss, target_std, pred_std, grad_norm, masked)


def num_scored(batch: Batch) -> int:
    """Tokens that the loss counts; 0 of a batch without masks."""
    return 0 if batch.masks is None else len(batch.masks.scored_rows)


class Trainer(Loop[Data2Vec]):
    """A pre-training run."""

    updater: Updater

    def build(self, fresh: bool) -> None:
        plan.refuse_network(self.modality, self.device)
        self.model = run.build_model(self.modality)
        if self.config.from_run is not None and fresh:
            self._start_from(Path(self.config.from_run))
        prepare(self.model, self.config, self.device)
        self.model.to(self.device).train()
        self.updater = self.optimizer_step = Updater(self.model, self.config, self.device)

    def open_data(self) -> None:
        self.dataset = self.modality.dataset("train")
        self.dataset_size, self.description = len(self.dataset), self.dataset.describe()
        plan.refuse_micro_batch(self.modality, self.dataset, self.device)

    def steps(self) -> StepLoader:
        train = self.config.train
        return StepLoader(
            self.modality, self.dataset, seed=self.config.seed, num_copies=train.num_masks,
            num_workers=train.num_workers, epoch=self.progress.epoch, step=self.progress.epoch_step,
            pin_memory=self.device.type == "cuda", worker_policy=self.worker_policy(),
        )  # fmt: skip

    def usable(self, batch: Batch) -> bool:
        return num_scored(batch) > 0

    def update(self, batches: Sequence[Batch]) -> Callable[[], dict[str, float]]:
        return self.updater.update(self.progress.step, batches, self.modality.teacher_inputs).numbers

    def schedules(self, step: int) -> dict[str, float]:
        return {
            "lr": lr_at(step, self.config.train.max_steps, self.config.optim),
            "ema_decay": decay_at(step, self.config.train.max_steps, self.config.teacher),
        }

    def guard(self, metrics: Mapping[str, float]) -> None:
        refuse_collapse(self.config.guard, int(metrics["step"]), metrics)

    def _start_from(self, source: Path) -> None:
        folder = run.newest_checkpoint(source)
        stored = checkpoint.load(folder, state=False)
        run.load_model_state(self.model, stored.model, str(folder))
        self.model.update_teacher(0.0)  # the teacher is made anew, equal to the student
        self.say(escape(f"Weights from {folder}; teacher made anew from them."))

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return run.model_state(self.model), self.model.teacher.own_state()

    def load_tensors(self, stored: checkpoint.Checkpoint, source: str) -> None:
        run.load_model_state(self.model, stored.model, source)
        self.model.teacher.load_own_state(stored.teacher)

    def finish(self) -> None:
        progress = self.progress
        student = self.model.student if self.config.launch.strategy == "ddp" else run.load(self.out).student
        summary = self.summary() | probed(self.modality, student, self.console)
        write_json(self.out / "summary.json", summary)
        base: type[Modality[Any]] = Modality
        place, labelled = escape(str(self.out)), type(self.modality).task is not base.task
        self.say(
            f"{progress.step} steps, {progress.amount:.0f} {self.modality.unit} in {progress.seconds:.0f} s. "
            f"The run lies in [bold]{place}[/bold].\nNext:\n"
            f"  tensorboard --logdir {place}\n"
            f"  d2v run modality={self.modality.name} preset={self.config.preset} from={place} data.path=YOUR_DATA\n"
            + (f"  d2v run stage=finetune from={place} data.path=LABELLED\n" if labelled else "")
            + f"  d2v encode {place} YOUR_DATA"
        )


def refuse_collapse(guard: GuardConfig, step: int, metrics: Mapping[str, float], of: str = "") -> None:
    """Raises UserError where the standard deviations say that the representation has collapsed. step: completed
    updates. of: what stands before their names in the metrics, and before the options."""
    if step <= guard.after_steps:
        return
    for key, least in (("target_std", guard.min_target_std), ("pred_std", guard.min_pred_std)):
        found, option = metrics[f"{of}/{key}" if of else key], f"{of}." if of else ""
        if found < least:
            raise UserError(
                f"The representation{f' of {of}' if of else ''} has collapsed: at step {step} {key} is {found:.4f}, "
                f"below {option}guard.min_{key}={least}. What usually helps, in this order: "
                f"{option}target.layer_norms=[instance] (or [layer]) if it is empty, a lower {option}optim.lr, a "
                f"longer warm-up ({option}optim.warmup_ratio), a teacher that moves more slowly "
                f"({option}teacher.ema_decay closer to 1)."
            )


def probed(modality: Modality[Any], student: Student, console: Console) -> dict[str, Any]:
    """What summary.json says of a modality's probe, the untrained twin beside; empty where there is none, or
    train.probe=false. Moves the student to the host, and prints the table."""
    task = modality.probe() if modality.config.train.probe else None
    if task is None:
        return {}
    untrained, student = run.build_model(modality).student, student.cpu()
    rows = probe.run_probe(
        task,
        {
            "pretrained": lambda inputs: probe.layers_of(student, inputs),
            "untrained": lambda inputs: probe.layers_of(untrained, inputs),
        },
    )
    console.print(_probe_table(task, rows))
    return {"probe": probe.summary(task, rows)}


def _probe_table(task: probe.ProbeTask, rows: Sequence[probe.ProbeRow]) -> Table:
    table = Table(title=f"{task.name}, %", caption=task.description, title_justify="left", caption_justify="left")
    table.add_column("frozen features")
    for budget in task.budgets:
        table.add_column(f"{budget} labelled", justify="right")
        table.add_column("layer", justify="right")
    for row in rows:
        cells: list[str] = []
        for budget in task.budgets:
            cells += [f"{row.accuracy[budget]:.1f}", "" if row.system == task.input_name else str(row.layer[budget])]
        table.add_row(row.system, *cells)
    return table
