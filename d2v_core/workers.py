"""The processes that read samples, and what happens when one of them dies or hangs.

torch's loader knows which process has died, not what it was doing, and waits for one that hangs for ever. Here each
writes into shared memory which sample it is at and since when. One that dies (a decoder that crashes, memory that runs
out) or is at one sample for too long is ended with the others, the sample is named and left out, and new processes go
on from the micro-batch that is missing: no other one is lost or changed.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from d2v_core.errors import UserError

PlaceT = TypeVar("PlaceT")
BatchT = TypeVar("BatchT")

LOOK_EVERY = 2.0  # seconds between looks at processes while a batch is waited for


@dataclass(frozen=True)
class WorkerPolicy:
    """limit: how many processes may die or hang before the run stops. timeout: seconds at one sample that count as
    hanging. say: where a report goes."""

    limit: int = 3
    timeout: float = 600.0
    say: Callable[[str], None] = print


DEFAULT_POLICY = WorkerPolicy()


class Desk:
    """What each process is reading, in memory that all see, and which samples are left out. A reader has one."""

    def __init__(self, num_workers: int = 0, left_out: Mapping[int, str] | None = None) -> None:
        # sample (-1 = none), since when in seconds of the monotonic clock, which processes share
        self._rows: Tensor = torch.full((num_workers, 2), -1.0, dtype=torch.float64)
        self._rows.share_memory_()  # pyright: ignore[reportUnknownMemberType]
        self.left_out = dict(left_out or {})

    def at(self, index: int) -> None:
        """Called where a sample is read: this process is at it from now on; -1 = at none."""
        worker = get_worker_info()
        if worker is not None and worker.id < len(self._rows):
            self._rows[worker.id] = torch.tensor([index, time.monotonic()], dtype=torch.float64)

    def sample_of(self, worker: int) -> int | None:
        """The number of the sample that a process is at; None = at none."""
        index = int(self._rows[worker, 0])
        return None if index < 0 else index

    def seconds(self) -> list[tuple[int, float]]:
        """(worker, how long it has been at its sample) of those that are at one."""
        now = time.monotonic()
        rows = cast("list[list[float]]", self._rows.tolist())  # pyright: ignore[reportUnknownMemberType]
        return [(worker, now - since) for worker, (index, since) in enumerate(rows) if index >= 0]


class Reader(TorchDataset[BatchT], Generic[PlaceT, BatchT]):
    """What a process does with one piece of work, `reader[place]`. Picklable. It keeps `desk` up to date."""

    def __init__(self) -> None:
        self.desk = Desk()

    def name_of(self, index: int) -> str:
        """What a sample is called in a report."""
        raise NotImplementedError


class Workers(Generic[PlaceT, BatchT]):
    """Iterates over what `reader` makes of each piece of `work`, in order, whatever the number of processes."""

    def __init__(
        self, reader: Reader[PlaceT, BatchT], work: Iterable[PlaceT], num_workers: int, pin_memory: bool,
        policy: WorkerPolicy,
    ) -> None:  # fmt: skip
        self.reader, self.work, self.num_workers, self.pin_memory = reader, work, num_workers, pin_memory
        self.policy = policy

    def __iter__(self) -> Generator[BatchT, None, None]:
        rest = iter(self.work)
        handed_out: deque[PlaceT] = deque()  # and not come back yet
        failures = 0
        while True:
            try:
                for batch in self._batches(_and_then(tuple(handed_out), rest, handed_out)):
                    handed_out.popleft()
                    yield batch
                return
            except _Fallen as fallen:
                failures += 1
                self._report(fallen, failures)

    def _report(self, fallen: _Fallen, failures: int) -> None:
        index, policy = fallen.sample, self.policy
        name = None if index is None else self.reader.name_of(index)
        what = f"A process that reads data {fallen.how}"
        what += f" while it read {name}." if name is not None else ", not while it read a sample."
        if failures > policy.limit:
            raise UserError(
                f"{what} That is number {failures}; train.worker_failures={policy.limit} allows {policy.limit}. "
                "Look at that file; look whether memory (also /dev/shm) runs out: fewer train.num_workers need less. "
                "With train.num_workers=0 the training process reads by itself and shows the error."
            )
        if index is not None:
            self.reader.desk.left_out[index] = f"a process that read it {fallen.how}"
        go_on = "New ones go on" if index is None else "New ones go on without it"
        policy.say(f"{what} {go_on} ({failures} of at most {policy.limit}).")

    def _batches(self, work: Iterator[PlaceT]) -> Generator[BatchT, None, None]:
        self.reader.desk = Desk(self.num_workers, self.reader.desk.left_out)
        # Each process takes every num_workers-th piece, so the order of the results does not depend on how many.
        loader: DataLoader[BatchT] = DataLoader(
            self.reader,
            sampler=work,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]
            num_workers=self.num_workers,
            worker_init_fn=_start if self.num_workers else None,
            prefetch_factor=4 if self.num_workers else None,
            pin_memory=self.pin_memory,
            timeout=LOOK_EVERY if self.num_workers else 0,
        )
        iterator = iter(loader)
        processes: list[Any] = getattr(iterator, "_workers", [])  # none where this process reads by itself
        # An error that nobody catches holds on to this frame until Python ends, which would then wait for ever for
        # processes that ignore its SIGTERM.
        end = functools.partial(_end, iterator, processes)
        atexit.register(end)
        with _no_raising_at_deaths():
            try:
                while True:
                    try:
                        batch = next(iterator)
                    except StopIteration:
                        return
                    except (RuntimeError, OSError, EOFError) as error:
                        # torch has one class for everything, but what a reader raises begins with "Caught"; the others
                        # are what is left of a batch whose process died after it was sent.
                        slow = str(error).startswith("DataLoader ")
                        if not slow:
                            if isinstance(error, RuntimeError) or str(error).startswith("Caught "):
                                raise
                            self._look(iterator, processes)
                            raise
                    else:
                        yield batch
                        continue
                    self._look(iterator, processes)  # nobody has fallen: the same batch is waited for again
            finally:
                self._end_those_that_hang(processes)
                end()
                atexit.unregister(end)

    def _look(self, iterator: Any, processes: Sequence[Any]) -> None:
        for worker, process in enumerate(processes):
            if not process.is_alive():
                raise _Fallen(_how(process.exitcode), self.reader.desk.sample_of(worker))
        # With a GPU batches pass through a thread of torch's, which dies of a batch that it cannot receive.
        pinning = getattr(iterator, "_pin_memory_thread", None)
        if pinning is not None and not pinning.is_alive():
            raise _Fallen("is heard no more, since the thread that pins its batches has ended", None)
        for worker, seconds in self.reader.desk.seconds():
            if seconds > self.policy.timeout:
                raise _Fallen(f"has hung for {seconds:.0f} s", self.reader.desk.sample_of(worker))

    def _end_those_that_hang(self, processes: Sequence[Any]) -> None:
        """They would not answer when torch asks them to end, nor to SIGTERM, which they ignore."""
        for worker, seconds in self.reader.desk.seconds():
            if seconds > self.policy.timeout:
                processes[worker].kill()
                processes[worker].join()


class _Fallen(Exception):
    def __init__(self, how: str, sample: int | None) -> None:
        super().__init__(how)
        self.how, self.sample = how, sample


def _how(status: int | None) -> str:
    if status is None or status >= 0:
        return f"has ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _and_then(first: tuple[PlaceT, ...], rest: Iterator[PlaceT], handed_out: deque[PlaceT]) -> Iterator[PlaceT]:
    """first, then `rest`, of which each is put down as handed out."""

    def noted() -> Iterator[PlaceT]:
        for place in rest:
            handed_out.append(place)
            yield place

    return itertools.chain(first, noted())


def _start(worker: int) -> None:
    """A signal to the whole process group is for the training process to answer; it ends the workers itself."""
    del worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end(iterator: Any, processes: Sequence[Any]) -> None:
    """As torch does where its iterator is deleted. An error on its way may hold on to that until Python ends, which
    would then wait for processes that ignore SIGTERM."""
    getattr(iterator, "_shutdown_workers", lambda: None)()
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


@contextmanager
def _no_raising_at_deaths() -> Generator[None]:
    """torch has a handler that, when a process of its loader dies, raises in whatever code is running, a training step
    for example. While batches are read there is none: `_look` finds out."""
    handler = signal.getsignal(signal.SIGCHLD)
    if not str(getattr(handler, "__module__", "")).startswith("torch."):
        yield
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _as_it_is(batch: BatchT) -> BatchT:
    return batch
