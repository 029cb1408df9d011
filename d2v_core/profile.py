"""Where the time of a step goes: a few real steps, part by part.

The clock is stopped at every passage from one part to the next, where a GPU is waited for; a run without a profile
waits nowhere, so its steps are a little shorter than the sum of these.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from d2v_core import parts, run
from d2v_core.batching import StepLoader
from d2v_core.contract import Modality
from d2v_core.errors import UserError
from d2v_core.loop import pick_device
from d2v_core.trainer import Updater
from d2v_core.transformer import Block

LOADING, BACKWARD = "loading", "backward"
WARM_UP = 2
"""Steps before the clock starts: they make the optimizer's state and fill the caches of kernels."""
ORDER: tuple[str, ...] = (
    LOADING, parts.FEATURES, parts.TEACHER, parts.STUDENT, parts.PREDICTOR, parts.LOSS, BACKWARD, parts.OPTIMIZER,
    parts.TEACHER_UPDATE,
)  # fmt: skip


class Clock:
    """Seconds by part. `switch` ends one part and begins the next; each stretch is a range in torch's profiler."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(ORDER, 0.0)
        self._part: str | None = None
        self._since = 0.0
        self._range: Any = None

    def switch(self, part: str | None) -> None:
        """None stops the clock."""
        part = BACKWARD if part in parts.BACKWARD.values() else part
        if part == self._part:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._part is not None:
            self.seconds[self._part] += now - self._since
            self._range.__exit__(None, None, None)
        self._part, self._since = part, now
        if part is not None:
            self._range = record_function(part)
            self._range.__enter__()


def measure(modality: Modality[Any], steps: int, trace: Path) -> tuple[dict[str, float], float]:
    """Seconds by part over `steps` steps, and how much data they had, in the modality's unit. Writes a Chrome trace.

    Raises UserError where a step has nothing to learn from.
    """
    config = modality.config
    device = pick_device(config)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    model = run.build_model(modality).to(device).train()
    updater = Updater(model, config, device)
    if config.train.compile:  # as d2v_core.loop.Loop.fit does
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()  # pyright: ignore[reportUnknownMemberType]
    loader = StepLoader(
        modality, modality.dataset("train"), seed=config.seed, num_copies=config.train.num_masks,
        num_workers=config.train.num_workers, pin_memory=device.type == "cuda",
    )  # fmt: skip
    clock, amount = Clock(device), 0.0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profiler = torch.profiler.profile(activities=activities, acc_events=True)
    batches = iter(loader)
    try:
        with parts.watched(model, updater, clock.switch):
            for number in range(WARM_UP + steps):
                if number == WARM_UP:
                    clock.switch(None)
                    clock.seconds = dict.fromkeys(ORDER, 0.0)
                    profiler.start()
                clock.switch(LOADING)
                _, _, members = next(batches)
                usable = [batch for batch in members if batch.masks is not None and len(batch.masks.scored_rows)]
                if not usable:
                    raise UserError(f"Step {number + 1} has no token to predict: {members[0].skipped[:1]}")
                amount += sum(batch.amount for batch in usable) if number >= WARM_UP else 0.0
                clock.switch(parts.OPTIMIZER)
                updater.update(number, usable, modality.teacher_inputs)
            clock.switch(None)
            profiler.stop()
    finally:
        batches.close()
    profiler.export_chrome_trace(str(trace))
    return clock.seconds, amount


def profile(modality: Modality[Any], steps: int) -> str:
    """The table of `d2v profile`; the trace goes into `out`, by default a folder under runs/.

    Raises UserError where the stage is another than pre-training or the folder cannot be written.
    """
    config = modality.config
    if config.stage != "pretrain":
        raise UserError(f"stage={config.stage}: a profile is made of pre-training only.")
    out = Path(config.out or f"runs/profile-{config.modality}-{config.preset}")
    trace = out / "trace.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        seconds, amount = measure(modality, steps, trace)
    except OSError as error:
        raise UserError(f"The trace cannot be written to {out}: {error}.") from error
    total = sum(seconds.values())
    lines = [f"{modality.name}, preset {config.preset}, {config.method}: {steps} steps after {WARM_UP} to warm up", ""]
    lines.append(f"{'part':<20}{'ms a step':>12}{'share':>8}")
    lines += [f"{part:<20}{1000 * value / steps:>12.1f}{value / total:>8.1%}" for part, value in seconds.items()]
    lines.append(f"{'all':<20}{1000 * total / steps:>12.1f}{1:>8.1%}")
    lines += [
        "",
        f"{amount / total:.3g} {modality.unit} per second. Trace: {trace} (chrome://tracing, ui.perfetto.dev)",
    ]
    return "\n".join(lines) + "\n"
