"""Runs in several processes, as torchrun starts them, but forked from the test: torch is imported once."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed import TCPStore

from d2v_core import cli


class Ended(NamedTuple):
    """Exit status and output of one process."""

    status: int
    text: str


def fork(call: Callable[[], int], log: Path, environment: Mapping[str, str]) -> int:
    """The number of a process that calls this, its output in a file, and ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where threads run: none of them are in torch
        child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.environ.update(environment)
        stream = log.open("w", buffering=1)
        sys.stdout = sys.stderr = stream
        torch.set_num_threads(1)
        warnings.simplefilter("error")
        status = call()
    except BaseException:
        traceback.print_exc()
    finally:
        stream.flush()
        os._exit(status)


@dataclass(frozen=True)
class Started:
    """Processes that run. store: by which they find one another; it lives here, as torchrun's does in torchrun."""

    children: list[int]
    logs: Path
    store: TCPStore

    def ended(self) -> list[Ended]:
        """All of them, waited for."""
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]
        return [Ended(status, (self.logs / f"{rank}.txt").read_text()) for rank, status in enumerate(statuses)]


def start(count: int, words: Sequence[str], logs: Path, before: Callable[[int], None] | None = None) -> Started:
    """`d2v WORDS` in `count` processes. before: called in each of them with its rank."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    logs.mkdir(parents=True, exist_ok=True)

    def work(rank: int) -> int:
        if before is not None:
            before(rank)
        return cli.main(list(words))

    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
              "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
              "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    children = [
        fork(lambda rank=rank: work(rank), logs / f"{rank}.txt", {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    return Started(children, logs, store)


def run_together(
    count: int, words: Sequence[str], logs: Path, before: Callable[[int], None] | None = None
) -> list[Ended]:
    """The same, waited for."""
    return start(count, words, logs, before).ended()


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def worst(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest relative difference of two curves of the same length."""
    assert len(a) == len(b) > 0
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))
