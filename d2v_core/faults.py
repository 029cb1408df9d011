"""Steps whose loss or gradient is not finite: skipped, counted, written down, and when to give up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2v_core.contract import Batch
from d2v_core.distributed import ALONE, Processes

FAULTS_FILE = "faults.jsonl"


class TooManyFaults(Exception):
    """So many skipped steps in a row that going on as before is of no use. diagnosis: what is known of the last one."""

    def __init__(self, diagnosis: str) -> None:
        super().__init__(diagnosis)
        self.diagnosis = diagnosis


@dataclass(frozen=True)
class Outcome:
    """What is known of an update before the device has computed it.

    applied: () float32, 1 where the weights moved, 0 where the step was skipped. scaled: by a loss scaler, which tries
    large scales on purpose and is expected to skip steps. find: runs the step again and says where the first value that
    is not finite comes from.
    """

    applied: Tensor
    loss: Tensor
    grad_norm: Tensor
    scaled: bool
    find: Callable[[], str]


class FaultWatch:
    """Looks at each update, on a GPU one step late so that it is not waited for.

    path: faults.jsonl gets a line per skipped step. bad: is given a sentence on each. limit: that many in a row raise
    TooManyFaults. processes: those of the run, which all see the same and of which the first writes.
    """

    def __init__(self, path: Path, bad: Callable[[str], None], limit: int, processes: Processes = ALONE) -> None:
        self.path, self.bad, self.limit, self.processes = path, bad, limit, processes
        self.in_a_row = 0
        self._waiting: tuple[int, tuple[str, ...], Outcome] | None = None

    def note(self, step: int, ids: tuple[str, ...], outcome: Outcome) -> None:
        """Raises TooManyFaults."""
        self.settle()
        self._waiting = step, ids, outcome
        if outcome.applied.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Look at what has not been looked at. Raises TooManyFaults."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._look_at(*waiting)

    def _look_at(self, step: int, ids: tuple[str, ...], outcome: Outcome) -> None:
        if outcome.applied:
            self.in_a_row = 0
            return
        loss, grad_norm = float(outcome.loss), float(outcome.grad_norm)
        if outcome.scaled and math.isfinite(loss):
            return
        self.in_a_row += 1
        ids = tuple(name for each in self.processes.gather(ids) for name in each)
        line = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "samples": list(ids)}
        if self.processes.first:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        what = f"step {step}: the loss is {loss:g}, the gradient norm {grad_norm:g}"
        self.bad(f"{what}; skipped, the weights stay as they are. Its samples are listed in {self.path}.")
        if self.in_a_row >= self.limit:
            few = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
            raise TooManyFaults(
                f"{self.in_a_row} {'steps in a row were' if self.in_a_row > 1 else 'step was'} not finite; at {what} "
                f"(samples {few}). {outcome.find()}"
            )


def find_fault(
    model: nn.Module,
    batches: Sequence[Batch],
    forward: Callable[[Batch], Tensor],
    context: Callable[[], torch.autocast],
) -> str:
    """Forward and backward again, looking at every module's output on the way. A sentence on the first bad one.

    Gradients are dropped, those from before too.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, given: object, output: object) -> None:
            del given
            tensors = cast("Sequence[object]", output) if isinstance(output, (tuple, list)) else (output,)
            if any(isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors):
                found.append(f"The first values that are not finite come out of {name} ({type(module).__name__}).")

        return look

    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    hooks: list[RemovableHandle] = [module.register_forward_hook(watch(name)) for name, module in modules if name]
    model.zero_grad(set_to_none=True)
    try:
        for batch in batches:
            with context():
                loss = forward(batch)
            if found:
                return found[0]
            if not loss.isfinite():
                return "The output of every module is finite; the loss is not."
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            for name, parameter in reversed(list(model.named_parameters())):
                if parameter.grad is not None and not parameter.grad.isfinite().all():
                    return f"Outputs and loss are finite; the gradient of {name} is not."
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return "The same step is finite when it is run again."
