"""The loop that every kind of training shares: batch, update, log, watch, save, stop and go on.

What is learned, and from what, is a stage's own: pre-training (`trainer.py`) and fine-tuning (`finetune.py`).
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from d2v_core import checkpoint
from d2v_core.batching import Steps
from d2v_core.config import RunConfig
from d2v_core.contract import Batch, Modality
from d2v_core.distributed import current, leave, local, never_stuck, sharing_of
from d2v_core.errors import UserError
from d2v_core.faults import FAULTS_FILE, FaultWatch, Outcome, TooManyFaults, find_fault
from d2v_core.files import first
from d2v_core.keyed import seed_of
from d2v_core.memory import return_only_large_blocks
from d2v_core.metrics import Display, MetricsFile, TensorBoard
from d2v_core.optim import make_optimizer, set_step
from d2v_core.schedules import lr_at
from d2v_core.transformer import Block
from d2v_core.workers import WorkerPolicy

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
INTERRUPTED = 130
TERMINATED = 143


class OptimizerStep:
    """One optimizer update from a step's micro-batches. Owns the optimizer and the loss scaler.

    scale_of: factor of the learning rate by parameter name; 1 for all where it is None.
    """

    def __init__(
        self, model: nn.Module, config: RunConfig, device: torch.device, scale_of: Callable[[str], float] | None = None
    ) -> None:
        self.config, self.device = config, device
        self.processes, self.sharing = current(), sharing_of(model, config)
        self.parameters = self.sharing.parameters
        self.optimizer = make_optimizer(self.sharing, config.optim, scale_of)
        if device.type == "cpu":
            return_only_large_blocks()
        self.dtype = AUTOCAST[config.train.precision]
        self.scaler = torch.amp.grad_scaler.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.scaler.scale(torch.zeros((), device=device))  # makes the scale, also where no micro-batch will come by
        self.model = model
        self.outcome: Outcome

    def step(
        self, step: int, batches: Sequence[Batch], count: Callable[[Batch], int], forward: Callable[[Batch], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The update that follows `step` completed ones; returns mean loss and gradient norm, both ().

        Where one of them is not finite the weights stay as they are; `outcome` has it, on the device, which is not
        waited for.

        batches: those of this process. count: over how many things `forward` sums the loss of a micro-batch. The
        objective is the mean over all of them in all micro-batches of all processes.
        """
        config = self.config
        set_step(self.optimizer, lr_at(step, config.train.max_steps, config.optim), step, config.optim)
        self.optimizer.zero_grad(set_to_none=True)
        total = self.processes.total(sum(count(batch) for batch in batches))
        loss_sum = torch.zeros((), device=self.device)
        for batch, counts in self.sharing.rounds(step, batches):
            self._seed(step, batch)
            with self.autocast():
                loss = forward(batch.to(self.device))
            # What does not count runs for the sake of the other processes, which it has to meet in the network.
            self.scaler.scale(loss / total if counts else 0.0 * loss).backward()  # pyright: ignore[reportUnknownMemberType]
            if counts:
                loss_sum += loss.detach()
        loss_sum = self.sharing.collect(loss_sum)
        self.scaler.unscale_(self.optimizer)
        limit = config.optim.clip_grad_norm
        grad_norm = self.sharing.clip(math.inf if limit is None else limit)
        applied = (loss_sum.isfinite() & grad_norm.isfinite()).float()
        self.weigh(applied)
        if self.scaler.is_enabled():
            self._tell_scaler(applied)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # What a loss scaler gives a fused optimizer: where it is 1, the kernel moves nothing.
            self.optimizer.found_inf = 1.0 - applied  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()  # pyright: ignore[reportUnknownMemberType]

        def again(batch: Batch) -> Tensor:
            self._seed(step, batch)
            return forward(batch.to(self.device))

        def find() -> str:
            return self.sharing.diagnosis(lambda: find_fault(self.model, batches, again, self.autocast))

        self.outcome = Outcome(applied, loss_sum / total, grad_norm, self.scaler.is_enabled(), find)
        return self.outcome.loss, grad_norm

    def _tell_scaler(self, applied: Tensor) -> None:
        """It has looked at the gradients of this process alone, of which a sharded network has a part, and not at the
        loss, which may be infinite where they are finite."""
        for found in self.scaler._found_inf_per_device(self.optimizer).values():  # pyright: ignore[reportPrivateUsage]
            found.copy_(1.0 - applied)

    def weigh(self, applied: Tensor) -> None:
        """Called when the gradients are complete and clipped; may scale them. applied: () float32, 0 where the update
        will be skipped."""
        del applied

    def _seed(self, step: int, batch: Batch) -> None:
        """Dropout and the like: the same after a resume, and whichever process a micro-batch falls to."""
        place = (step, batch.part) if batch.part else (step,)
        seed = seed_of(self.config.seed, "step", *place)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)

    def autocast(self) -> torch.autocast:
        """A context in `train.precision`; does nothing for fp32."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)


@dataclass(frozen=True)
class Turn:
    """What a process tells the others before each step.

    place: (epoch, step) of its next batch. signal: what it was told to stop by. usable, amount: how many of its
    micro-batches can be learned from, and how much data they are. skipped: (id, reason) of samples that it cannot read.
    """

    place: tuple[int, int]
    signal: int | None
    usable: int
    amount: float
    skipped: tuple[tuple[str, str], ...]


@dataclass
class Progress:
    """Where a run stands. epoch, epoch_step: the next batch. All of it goes into a checkpoint.

    best_score, best_step: of a stage that scores itself while it trains; the latter 0 before the first score.
    bad_steps: skipped, because loss or gradient were not finite. went_back: to an older checkpoint, because of those.
    places: of a run that reads several sources, [epoch, next step of it] of each; amounts: what each has read.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    seconds: float = 0.0
    amount: float = 0.0
    skipped: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    best_score: float = 0.0
    best_step: int = 0
    bad_steps: int = 0
    went_back: bool = False
    places: dict[str, list[int]] = dataclasses.field(default_factory=dict[str, list[int]])
    amounts: dict[str, float] = dataclasses.field(default_factory=dict[str, float])


ModelT = TypeVar("ModelT", bound=nn.Module)


class Loop(ABC, Generic[ModelT]):
    """A run in a folder. `fit` returns the exit status. A stage gives the methods that are abstract here.

    build: model, optimizer and data, before anything is restored. `dataset_size` samples are what `steps` draws from.
    """

    model: ModelT
    optimizer_step: OptimizerStep
    dataset_size: int
    description: str = ""

    def __init__(self, modality: Modality[Any], out: Path, console: Console) -> None:
        self.modality, self.config, self.out, self.console = modality, modality.config, out, console
        self.unit = modality.unit
        self.processes = current()
        self.device = self.processes.device(pick_device(self.config))
        if str(self.device).startswith("cuda:"):
            torch.cuda.set_device(self.device)  # else what names no GPU, such as pinned memory, takes up the first one
        if self.config.train.num_threads:
            torch.set_num_threads(self.config.train.num_threads)
        self.progress = Progress()
        self._unread: set[str] = set()
        self._signal: int | None = None
        self._asked = 0.0

    @abstractmethod
    def build(self, fresh: bool) -> None:
        """Make `model` on its device in train mode, and `optimizer_step`. fresh: no checkpoint will be restored."""

    @abstractmethod
    def open_data(self) -> None:
        """Set `dataset_size` and `description`. Raises UserError where there is nothing to learn from."""

    @abstractmethod
    def steps(self) -> Steps:
        """Batches from where `progress` stands."""

    @abstractmethod
    def usable(self, batch: Batch) -> bool:
        """Whether there is anything in a batch to learn from."""

    @abstractmethod
    def update(self, batches: Sequence[Batch]) -> Callable[[], dict[str, float]]:
        """One update; the function returned reads its numbers, `loss` first, which waits for the device."""

    def worker_policy(self) -> WorkerPolicy:
        """What section `train` allows processes that read; what happens to them is said in the run's output."""
        train = self.config.train
        return WorkerPolicy(
            train.worker_failures, train.worker_timeout, lambda text: self.say(f"[yellow]fault[/yellow] {escape(text)}")
        )

    def schedules(self, step: int) -> dict[str, float]:
        """What follows from the number of completed updates and belongs into the metrics, `lr` first."""
        return {"lr": lr_at(step, self.config.train.max_steps, self.config.optim)}

    def shown(self, values: Mapping[str, float]) -> list[str]:
        """Which numbers of an update a person sees, `loss` among them."""
        return [name for name in values if name not in ("grad_norm", "masked")]

    def keep(self) -> None:
        """Put into the run folder what loading it needs beside configuration and weights."""
        self.modality.keep(self.out)

    def guard(self, metrics: Mapping[str, float]) -> None:
        """Raises UserError where going on is of no use."""
        del metrics

    def after_step(self) -> None:
        """Called after every update."""
        return

    @abstractmethod
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What model.safetensors and teacher.safetensors of a checkpoint hold."""

    @abstractmethod
    def load_tensors(self, stored: checkpoint.Checkpoint, source: str) -> None:
        """Put what `tensors` gave back in place. source: names the checkpoint in errors. Raises UserError."""

    @abstractmethod
    def finish(self) -> None:
        """Score the result, write summary.json and say what can be done next."""

    def fit(self) -> int:
        """Train to the end, or until a signal; returns the exit status: 0, or 130 and 143 after saving."""
        train = self.config.train
        found = self._checkpoints()
        self.build(not found)  # before the data, which may take long to look through
        if found:
            self.say(escape(f"Going on from {self.restore(found)}."))
        self.processes.first_then_others(self.open_data)
        self.processes.agree("their data", (self.dataset_size, self.description))
        self.say(escape(self.description))
        if train.compile:
            for module in self.model.modules():
                if isinstance(module, Block):
                    module.compile()  # pyright: ignore[reportUnknownMemberType]
        with self._signals():
            with Display(self.console, train.max_steps, self.progress.step, self.unit) as display:
                finished = self._going_back_once(display)
            if not finished:  # here, so that the same signal, passed on a second time, does not end the saving
                self.save()
        if not finished:
            name = signal.Signals(self._signal or signal.SIGINT).name
            self.say(
                f"\nStopped by {name} after step {self.progress.step} of {train.max_steps}; a checkpoint is saved. "
                f"Go on with the same command and [bold]out={escape(str(self.out))} resume=auto[/bold]."
            )
            return INTERRUPTED if name == "SIGINT" else TERMINATED
        self.save()
        leave()
        if self.processes.first:
            self.finish()
        return 0

    def _checkpoints(self) -> list[Path]:
        return self.processes.by_first(lambda: checkpoint.list_checkpoints(self.out / "checkpoints"))

    def _going_back_once(self, display: Display) -> bool:
        """`_loop`. Too many steps that are not finite: once, the run goes on from its newest checkpoint, with the data
        that come after those steps."""
        while True:
            try:
                return self._loop(display)
            except TooManyFaults as fault:
                progress, found = self.progress, self._checkpoints()
                if progress.went_back or not found:
                    raise UserError(
                        f"{fault.diagnosis} "
                        + ("The run had gone back to an older checkpoint before. " if progress.went_back else "")
                        + "Lower optim.lr, set optim.clip_grad_norm=1, lengthen the warm-up, or use "
                        "train.precision=fp32 if it is not; look at the samples if they are always the same "
                        f"({self.out / FAULTS_FILE}). "
                        + (f"Older checkpoints in {self.out / 'checkpoints'} are intact." if found else "")
                    ) from fault
                self.say(f"[yellow]going back[/yellow] {escape(fault.diagnosis)}")
                self.say(escape(f"Going on from {self.restore(found)}."))
                self.progress.went_back = True
                for name in ("epoch", "epoch_step", "places", "skipped", "bad_steps", "seconds"):
                    setattr(self.progress, name, getattr(progress, name))

    def say(self, text: str) -> None:
        """With rich's markup: names of files and folders, which may hold brackets, come escaped."""
        self.console.print(text, soft_wrap=True, highlight=False)

    def _loop(self, display: Display) -> bool:
        """True when max_steps is reached, False when a signal asked to stop."""
        train, progress = self.config.train, self.progress
        loader = self.steps()
        writers: list[MetricsFile | TensorBoard] = []
        if self.processes.first:
            writers.append(MetricsFile(self.out / "metrics.jsonl", progress.step))
            if train.tensorboard:
                writers.append(TensorBoard(self.out / "tensorboard", progress.step))
        base, started, first_step = progress.seconds, time.perf_counter(), progress.step
        since, amount, waited, idle = started, 0.0, 0.0, 0
        faults = FaultWatch(self.out / FAULTS_FILE, self._bad_step, train.bad_steps_limit, self.processes)
        batches = iter(loader)
        try:
            while progress.step < train.max_steps:
                if self._signal is not None and self.processes.count == 1:
                    return False
                asked = time.perf_counter()
                epoch, epoch_step, step_batches = next(batches)
                waited += time.perf_counter() - asked
                usable = [batch for batch in step_batches if self.usable(batch)]
                turns = self.processes.gather(
                    Turn(
                        (epoch, epoch_step), self._signal, len(usable), sum(batch.amount for batch in usable),
                        tuple(pair for batch in step_batches for pair in batch.skipped),
                    )
                )  # fmt: skip
                told = next((turn.signal for turn in turns if turn.signal is not None), None)
                if told is not None:  # one that came meanwhile is told in the next turn
                    self._signal = told
                    return False
                self.note_place(epoch, epoch_step)
                self._note_unread(turns)
                some = any(turn.usable for turn in turns)
                idle = 0 if some else idle + 1
                if idle > loader.steps_per_epoch:
                    raise UserError(
                        f"Nothing to learn from: {idle} steps in a row, a whole epoch, have no token to predict. "
                        "Either no sample can be read, or the options of the masks hide nothing."
                    )
                if not some:
                    continue
                read_numbers = self.update(usable)
                amount += sum(turn.amount for turn in turns)
                progress.step += 1
                progress.amount += sum(turn.amount for turn in turns)
                display.advance(progress.step)
                ids = tuple(name for batch in usable for name in batch.ids)
                faults.note(progress.step, ids, self.optimizer_step.outcome)
                if progress.step % train.log_every == 0 or progress.step == train.max_steps or progress.step == 1:
                    values = self.processes.mean(read_numbers(), len(usable))
                    now = time.perf_counter()
                    progress.seconds = base + now - started
                    metrics: dict[str, float] = {
                        "step": progress.step,
                        **values,
                        **self.schedules(progress.step - 1),
                        "epoch": progress.epoch,
                        "throughput": amount / (now - since),
                        "data_wait": waited / (now - since),
                        "skipped": len(progress.skipped),
                        "bad_steps": progress.bad_steps,
                        "seconds": progress.seconds,
                    }
                    since, amount, waited = now, 0.0, 0.0
                    for writer in writers:
                        writer.write(metrics)
                    rate = (progress.seconds - base) / (progress.step - first_step)
                    display.show(metrics, self.shown(values), rate * (train.max_steps - progress.step))
                    self.guard(metrics)
                self.after_step()
                if progress.step % train.checkpoint_every == 0 and progress.step < train.max_steps:
                    faults.settle()
                    if not faults.in_a_row:  # else these weights may be what is wrong
                        progress.seconds = base + time.perf_counter() - started
                        self.save()
            faults.settle()
            return True
        finally:
            progress.seconds = base + time.perf_counter() - started
            batches.close()  # ends the workers
            for writer in writers:
                writer.close()

    def _note_unread(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            self.note_skipped(turn.skipped)
            self._unread.update(name for name, _ in turn.skipped)
        if len(self._unread) == self.dataset_size:
            raise UserError(
                f"None of the {self.dataset_size} samples can be read; the first: {next(iter(self.progress.skipped))}"
            )

    def note_place(self, epoch: int, epoch_step: int) -> None:
        """The batches of this step are used now: a run that goes on begins with those behind them."""
        self.progress.epoch, self.progress.epoch_step = epoch, epoch_step + 1

    def note_skipped(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Count samples that could not be read, (id, reason) each, and say each of them once."""
        for name, reason in skipped:
            if name not in self.progress.skipped:
                self.progress.skipped[name] = reason
                self.say(f"[yellow]skipped[/yellow] {escape(f'{name}: {reason}')}")

    def _bad_step(self, text: str) -> None:
        self.progress.bad_steps += 1
        self.say(f"[yellow]fault[/yellow] {escape(text)}")

    def save(self) -> None:
        """Everything that going on takes. Raises UserError where it cannot be written or would be of no use."""
        train, root = self.config.train, self.out / "checkpoints"
        found = self.processes.gather([n for n, p in self.model.named_parameters() if not local(p).isfinite().all()])
        bad = sorted({name for names in found for name in names})
        if bad:
            raise UserError(
                f"By step {self.progress.step} weights are not finite ({first(bad, ', ', more='...')}), so no "
                "checkpoint is written. Lower optim.lr, set optim.clip_grad_norm=1, or use train.precision=fp32 if it "
                f"is not. Older checkpoints in {root} are intact."
            )
        state = {
            "optimizer": self.optimizer_step.sharing.optimizer_state(self.optimizer_step.optimizer),
            "scaler": self.optimizer_step.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "num_threads": torch.get_num_threads(),
            "num_processes": self.processes.count,
        }
        model, teacher = (self.optimizer_step.sharing.whole(tensors) for tensors in self.tensors())

        def write() -> None:
            try:
                self.keep()
                stored = checkpoint.Checkpoint(model, teacher, state)
                checkpoint.save(root, self.progress.step, stored, train.keep_checkpoints, train.keep_every)
            except OSError as error:
                raise UserError(
                    f"The checkpoint of step {self.progress.step} cannot be written to {root}: {error}."
                    " Older checkpoints are intact; make room and go on with resume=auto."
                ) from error

        self.processes.by_first(write)

    def restore(self, found: Sequence[Path]) -> Path:
        """Go on, after `build`, from the newest checkpoint that is not damaged, which is returned. Raises UserError
        where all are."""
        read: list[checkpoint.Checkpoint] = []

        def newest() -> Path:
            folder, stored = self._newest_whole(found)
            read.append(stored)
            return folder

        folder = self.processes.by_first(newest)  # which may rename those that are damaged
        contents = self.processes.share((read[0].model, read[0].teacher, read[0].state) if read else ({}, {}, {}))
        stored = checkpoint.Checkpoint(*contents)
        if "optimizer" not in stored.state:
            raise UserError(
                f"{folder} is one modality of a joint run, which alone can go on: in {self.out.parent}. Start a new "
                f"run from these weights with from={self.out} and another out=FOLDER."
            )
        self.load_tensors(stored, str(folder))
        self.optimizer_step.sharing.load_optimizer_state(self.optimizer_step.optimizer, stored.state["optimizer"])
        self.optimizer_step.scaler.load_state_dict(stored.state["scaler"])
        self.progress = Progress(**stored.state["progress"])
        for what, before, now in (
            ("CPU threads", stored.state["num_threads"], torch.get_num_threads()),
            ("processes", stored.state.get("num_processes", 1), self.processes.count),
        ):
            if before != now:
                self.say(
                    f"[yellow]note[/yellow] this run used {before} {what}, now there are {now}: results will differ in "
                    "their last bits."
                )
        return folder

    def _newest_whole(self, found: Sequence[Path]) -> tuple[Path, checkpoint.Checkpoint]:
        """Damaged ones that are newer get another name, so that their steps can be saved again."""
        damaged: list[Path] = []
        for folder in reversed(found):
            try:
                stored = checkpoint.load(folder, self.device if self.processes.count == 1 else None)
            except checkpoint.DamagedCheckpoint as error:
                if folder == found[0]:
                    raise
                self.say(f"[yellow]damaged[/yellow] {escape(str(error))}")
                damaged.append(folder)
                continue
            for one in damaged:
                self.say(escape(f"{one} is now called {checkpoint.set_aside(one).name}; the one before serves."))
            return folder, stored
        raise ValueError("no checkpoints")

    def summary(self) -> dict[str, Any]:
        """What summary.json holds for every stage."""
        progress = self.progress
        return {
            "modality": self.modality.name,
            "preset": self.config.preset,
            "stage": self.config.stage,
            "steps": progress.step,
            "wall_seconds": round(progress.seconds, 2),
            "amount": round(progress.amount, 1),
            "unit": self.unit,
            "epochs": progress.epoch,
            "data": self.description,
            "skipped": progress.skipped,
        }

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
            with never_stuck(lambda: self._signal is not None):
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
