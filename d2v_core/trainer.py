"""The loop: batch, forward, backward, clip, optimizer step, teacher step, log, save."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from d2v_core import checkpoint, probe, run
from d2v_core.batching import StepLoader
from d2v_core.config import RunConfig
from d2v_core.contract import Batch, Dataset, Modality
from d2v_core.data2vec import Data2Vec
from d2v_core.errors import UserError
from d2v_core.keyed import seed_of
from d2v_core.metrics import Display, MetricsFile, TensorBoard, write_json
from d2v_core.optim import make_optimizer, set_step
from d2v_core.schedules import decay_at, lr_at
from d2v_core.transformer import Block

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
INTERRUPTED = 130
TERMINATED = 143


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


class Updater:
    """One optimizer update from a step's micro-batches. Owns the optimizer, the loss scaler and the schedules."""

    def __init__(self, model: Data2Vec, config: RunConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.optimizer = make_optimizer(model, config.optim)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.dtype = AUTOCAST[config.train.precision]
        self.scaler = torch.amp.grad_scaler.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.forward: Callable[..., Any] = model
        self.num_bad = torch.zeros((), device=device)

    def update(self, step: int, batches: Sequence[Batch], teacher_inputs: Callable[[Batch], Any]) -> StepResult:
        """The update that follows `step` completed ones; the teacher has made its own step when this returns.

        The objective is the mean over all scored tokens of all micro-batches. Their number is known only at the end,
        so gradients are taken of sums over a first guess and corrected once.
        """
        config = self.config
        _seed(seed_of(config.seed, "step", step))  # dropout: the same after a resume
        set_step(self.optimizer, lr_at(step, config.train.max_steps, config.optim), step, config.optim)
        self.optimizer.zero_grad(set_to_none=True)
        guess = max(_num_scored(batches[0]) * len(batches), 1)
        total = sum(_num_scored(batch) for batch in batches)
        loss_sum = torch.zeros((), device=self.device)
        stds: list[Tensor] = []
        hidden = torch.zeros((), device=self.device)
        for batch in batches:
            batch = batch.to(self.device)
            assert batch.masks is not None
            with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
                out = self.forward(batch.inputs, batch.masks, teacher_inputs(batch))
            self.scaler.scale(out.loss_sum / guess).backward()  # pyright: ignore[reportUnknownMemberType]
            loss_sum += out.loss_sum.detach()
            stds.append(torch.stack([out.target_std, out.prediction_std.detach()]))
            hidden += batch.masks.hidden.float().mean() / len(batches)
        self.scaler.unscale_(self.optimizer)
        if total != guess:
            torch._foreach_mul_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
                [p.grad for p in self.parameters if p.grad is not None], guess / total
            )
        limit = config.optim.clip_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.update_teacher(decay_at(step + 1, config.train.max_steps, config.teacher))
        target_std, pred_std = torch.stack(stds).mean(0).unbind()
        finite = loss_sum.isfinite()
        if not self.scaler.is_enabled():  # a scaler meets infinite gradients as a matter of course
            finite = finite & grad_norm.isfinite()
        self.num_bad += ~finite
        return StepResult(loss_sum / total, target_std, pred_std, grad_norm, hidden)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def _num_scored(batch: Batch) -> int:
    return 0 if batch.masks is None else len(batch.masks.scored_rows)


@dataclass
class Progress:
    """Where a run stands. epoch, epoch_step: the next batch. All of it goes into a checkpoint."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    seconds: float = 0.0
    amount: float = 0.0
    skipped: dict[str, str] = dataclasses.field(default_factory=dict[str, str])


class Trainer:
    """A pre-training run in a folder. `fit` returns the exit status."""

    def __init__(self, modality: Modality[Any], out: Path, console: Console) -> None:
        self.modality, self.config, self.out, self.console = modality, modality.config, out, console
        self.device = pick_device(self.config)
        if self.config.train.num_threads:
            torch.set_num_threads(self.config.train.num_threads)
        self.progress = Progress()
        self.description = ""
        self._signal: int | None = None
        self._asked = 0.0

    def fit(self) -> int:
        config, train = self.config, self.config.train
        found = checkpoint.list_checkpoints(self.out / "checkpoints")
        self.model = run.build_model(self.modality)  # before the data, which may take long to look through
        if config.from_run is not None and not found:
            self._start_from(Path(config.from_run))
        self.model.to(self.device).train()
        self.updater = Updater(self.model, config, self.device)
        if found:
            self._restore(found[-1])
        dataset = self.modality.dataset("train")
        self.description = dataset.describe()
        self._say(escape(self.description))
        if train.compile:
            for module in self.model.modules():
                if isinstance(module, Block):
                    module.compile()  # pyright: ignore[reportUnknownMemberType]
        with self._signals(), Display(self.console, train.max_steps, self.progress.step, self.modality.unit) as display:
            finished = self._loop(dataset, display)
        if not finished:
            self._save()
            name = signal.Signals(self._signal or signal.SIGINT).name
            self._say(
                f"\nStopped by {name} after step {self.progress.step} of {train.max_steps}; a checkpoint is saved. "
                f"Go on with the same command and [bold]out={escape(str(self.out))} resume=auto[/bold]."
            )
            return INTERRUPTED if name == "SIGINT" else TERMINATED
        self._finish()
        return 0

    def _say(self, text: str) -> None:
        """With rich's markup: names of files and folders, which may hold brackets, come escaped."""
        self.console.print(text, soft_wrap=True, highlight=False)

    def _loop(self, dataset: Dataset[Any], display: Display) -> bool:
        """True when max_steps is reached, False when a signal asked to stop."""
        config, train, progress = self.config, self.config.train, self.progress
        loader = StepLoader(
            self.modality, dataset, seed=config.seed, num_copies=train.num_masks, num_workers=train.num_workers,
            epoch=progress.epoch, step=progress.epoch_step, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        metrics_file = MetricsFile(self.out / "metrics.jsonl", progress.step)
        writers = [metrics_file, *([TensorBoard(self.out / "tensorboard", progress.step)] if train.tensorboard else [])]
        base, started, first_step = progress.seconds, time.perf_counter(), progress.step
        since, amount, waited, idle = started, 0.0, 0.0, 0
        batches = iter(loader)
        try:
            while progress.step < train.max_steps:
                if self._signal is not None:
                    return False
                asked = time.perf_counter()
                epoch, epoch_step, step_batches = next(batches)
                waited += time.perf_counter() - asked
                progress.epoch, progress.epoch_step = epoch, epoch_step + 1
                usable = self._usable(step_batches, dataset)
                idle = 0 if usable else idle + 1
                if idle > loader.steps_per_epoch:
                    raise UserError(
                        f"Nothing to learn from: {idle} steps in a row, a whole epoch, have no token to predict. "
                        "Either no sample can be read, or the options of the masks hide nothing."
                    )
                if not usable:
                    continue
                result = self.updater.update(progress.step, usable, self.modality.teacher_inputs)
                amount += sum(batch.amount for batch in usable)
                progress.step += 1
                progress.amount += sum(batch.amount for batch in usable)
                display.advance(progress.step)
                if progress.step % train.log_every == 0 or progress.step == train.max_steps or progress.step == 1:
                    values = result.numbers()
                    now = time.perf_counter()
                    progress.seconds = base + now - started
                    metrics: dict[str, float] = {
                        "step": progress.step,
                        **values,
                        "ema_decay": decay_at(progress.step - 1, train.max_steps, config.teacher),
                        "lr": lr_at(progress.step - 1, train.max_steps, config.optim),
                        "epoch": progress.epoch,
                        "throughput": amount / (now - since),
                        "data_wait": waited / (now - since),
                        "skipped": len(progress.skipped),
                        "seconds": progress.seconds,
                    }
                    since, amount, waited = now, 0.0, 0.0
                    for writer in writers:
                        writer.write(metrics)
                    rate = (progress.seconds - base) / (progress.step - first_step)
                    display.show(metrics, rate * (train.max_steps - progress.step))
                    self._guard(metrics)
                if progress.step % train.checkpoint_every == 0 and progress.step < train.max_steps:
                    progress.seconds = base + time.perf_counter() - started
                    self._save()
            progress.seconds = base + time.perf_counter() - started
            return True
        finally:
            batches.close()  # ends the workers
            for writer in writers:
                writer.close()

    def _usable(self, batches: Sequence[Batch], dataset: Dataset[Any]) -> list[Batch]:
        for batch in batches:
            for name, reason in batch.skipped:
                if name not in self.progress.skipped:
                    self.progress.skipped[name] = reason
                    self._say(f"[yellow]skipped[/yellow] {escape(f'{name}: {reason}')}")
        if len(self.progress.skipped) == len(dataset):
            raise UserError(
                f"None of the {len(dataset)} samples can be read; the first: {next(iter(self.progress.skipped))}"
            )
        return [batch for batch in batches if _num_scored(batch)]

    def _guard(self, metrics: Mapping[str, float]) -> None:
        guard, step = self.config.guard, int(metrics["step"])
        if self.updater.num_bad > 0:
            raise UserError(
                f"At step {step} the loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']}"
                + (
                    ""
                    if math.isnan(metrics["loss"] + metrics["grad_norm"])
                    else ", and a step shortly before was not finite"
                )
                + ". Lower optim.lr, set optim.clip_grad_norm=1, or use train.precision=fp32 if it is not. "
                f"Older checkpoints in {self.out / 'checkpoints'} are intact."
            )
        if step <= guard.after_steps:
            return
        for key, least, name in (
            ("target_std", guard.min_target_std, "guard.min_target_std"),
            ("pred_std", guard.min_pred_std, "guard.min_pred_std"),
        ):
            if metrics[key] < least:
                raise UserError(
                    f"The representation has collapsed: at step {step} {key} is {metrics[key]:.4f}, below "
                    f"{name}={least}. What usually helps, in this order: target.layer_norms=[instance] (or [layer]) if "
                    "it is empty, a lower optim.lr, a longer warm-up (optim.warmup_ratio), a teacher that moves more "
                    "slowly (teacher.ema_decay closer to 1)."
                )

    def _start_from(self, source: Path) -> None:
        folder = run.newest_checkpoint(source)
        stored = checkpoint.load(folder)
        run.load_model_state(self.model, stored.model, str(folder))
        self.model.update_teacher(0.0)  # the teacher is made anew, equal to the student
        self._say(escape(f"Weights from {folder}; teacher made anew from them."))

    def _save(self) -> None:
        if self.updater.num_bad > 0:
            raise UserError(
                f"By step {self.progress.step} a loss or gradient was not finite, so no checkpoint is written. Lower "
                "optim.lr, set optim.clip_grad_norm=1, or use train.precision=fp32 if it is not. Older checkpoints in "
                f"{self.out / 'checkpoints'} are intact."
            )
        state = {
            "optimizer": self.updater.optimizer.state_dict(),
            "scaler": self.updater.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "num_threads": torch.get_num_threads(),
        }
        stored = checkpoint.Checkpoint(run.model_state(self.model), self.model.teacher.own_state(), state)
        try:
            self.modality.keep(self.out)
            checkpoint.save(self.out / "checkpoints", self.progress.step, stored, self.config.train.keep_checkpoints)
        except OSError as error:
            raise UserError(
                f"The checkpoint of step {self.progress.step} cannot be written to {self.out / 'checkpoints'}: {error}."
                " Older checkpoints are intact; make room and go on with resume=auto."
            ) from error

    def _restore(self, folder: Path) -> None:
        stored = checkpoint.load(folder, self.device)
        run.load_model_state(self.model, stored.model, str(folder))
        self.model.teacher.load_own_state(stored.teacher)
        self.updater.optimizer.load_state_dict(stored.state["optimizer"])
        self.updater.scaler.load_state_dict(stored.state["scaler"])
        self.progress = Progress(**stored.state["progress"])
        self._say(escape(f"Going on from {folder}."))
        if stored.state["num_threads"] != torch.get_num_threads():
            self._say(
                f"[yellow]note[/yellow] this run used {stored.state['num_threads']} CPU threads, now there are "
                f"{torch.get_num_threads()}: results will differ in their last bits."
            )

    def _finish(self) -> None:
        self._save()
        progress = self.progress
        summary: dict[str, Any] = {
            "modality": self.modality.name,
            "preset": self.config.preset,
            "steps": progress.step,
            "wall_seconds": round(progress.seconds, 2),
            "amount": round(progress.amount, 1),
            "unit": self.modality.unit,
            "epochs": progress.epoch,
            "data": self.description,
            "skipped": progress.skipped,
        }
        task = self.modality.probe() if self.config.train.probe else None
        if task is not None:
            untrained = run.build_model(self.modality).student
            student = self.model.student.cpu()
            rows = probe.run_probe(
                task,
                {
                    "pretrained": lambda inputs: probe.layers_of(student, inputs),
                    "untrained": lambda inputs: probe.layers_of(untrained, inputs),
                },
            )
            summary["probe"] = probe.summary(task, rows)
            self.console.print(_probe_table(task, rows))
        write_json(self.out / "summary.json", summary)
        place = escape(str(self.out))
        self._say(
            f"{progress.step} steps, {progress.amount:.0f} {self.modality.unit} in {progress.seconds:.0f} s. "
            f"The run lies in [bold]{place}[/bold].\nNext:\n"
            f"  tensorboard --logdir {place}\n"
            f"  d2v run modality={self.modality.name} preset={self.config.preset} from={place} data.path=YOUR_DATA\n"
            f"  python -c \"import d2v_core; print(d2v_core.load('{place}'))\""
        )

    @contextmanager
    def _signals(self) -> Generator[None]:
        """The first SIGINT or SIGTERM lets the step end and saves; one more, a second later or after, stops at once.

        Launchers such as `timeout` pass a signal on that the whole group has had already: that is still the first.
        """

        def ask(number: int, frame: object) -> None:
            del frame
            if self._signal is None:
                self._signal, self._asked = number, time.monotonic()
            elif time.monotonic() - self._asked > 1.0:
                raise KeyboardInterrupt

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def pick_device(config: RunConfig) -> torch.device:
    """Raises UserError where the device is not there or cannot do the precision."""
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"train.device={name}, but torch sees no CUDA device. Use train.device=cpu or auto.")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise UserError(
            f"train.device={name}, but there are {torch.cuda.device_count()} CUDA devices, counted from 0. Use a lower "
            "number or auto."
        )
    if name == "cpu" and config.train.precision == "fp16":
        raise UserError("train.precision=fp16 needs a GPU. On a CPU use bf16 or fp32.")
    return torch.device(name)


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
