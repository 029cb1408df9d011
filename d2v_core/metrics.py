"""What a run writes down and what a person sees: metrics.jsonl, TensorBoard events, a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class MetricsFile:
    """metrics.jsonl: one object per logged step. Opened at a step, it drops the lines from later ones.

    Those lines describe steps after the checkpoint that the run goes on from; they are about to be made again.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        kept: list[str] = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= after_step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by an interruption
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, float]) -> None:
        """One line, on the disk at once; numbers that are not finite become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No more lines follow."""
        self._file.close()


class TensorBoard:
    """Events under `folder`; imports TensorBoard on first use, which takes a second."""

    def __init__(self, folder: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1)

    def write(self, metrics: Mapping[str, float]) -> None:
        """A point of each number but `step`, at that step."""
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(  # pyright: ignore[reportUnknownMemberType]
                    name, value, int(metrics["step"])
                )

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()


class Display:
    """A progress bar on a terminal, a line at every tenth of the run and every half minute elsewhere."""

    def __init__(self, console: Console, max_steps: int, start: int, unit: str) -> None:
        self.console, self.max_steps, self.unit = console, max_steps, unit
        self._progress: Progress | None = None
        self._last_line = time.monotonic()
        self._next_share = 0.0
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self._task = self._progress.add_task("train", total=max_steps, completed=start, text="")

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`; elsewhere nothing."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def show(self, metrics: Mapping[str, float], names: Sequence[str], seconds_left: float) -> None:
        """names: which of the metrics to show, the loss among them."""
        text = "  ".join(f"{name} {metrics[name]:{'.4f' if name == 'loss' else '.2f'}}" for name in names)
        text += f"  lr {metrics['lr']:.1e}  {metrics['throughput']:.0f} {self.unit}/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics["step"], text=text)
            return
        share = metrics["step"] / self.max_steps
        if share >= self._next_share or time.monotonic() - self._last_line > 30 or share == 1.0:
            self._next_share, self._last_line = share + 0.1, time.monotonic()
            self.console.print(
                f"step {metrics['step']:.0f}/{self.max_steps}  {text}  {seconds_left:.0f} s left",
                soft_wrap=True, highlight=False,
            )  # fmt: skip


def finite(content: Any) -> Any:
    """The same mappings and lists with null for numbers that are not finite, which JSON has not."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in cast("Mapping[str, Any]", content).items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in cast("Sequence[Any]", content)]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
