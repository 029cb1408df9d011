"""Which samples make up which optimizer step, and the workers that read and mask them.

The plan of an epoch is a function of (sizes, batching, seed, epoch). A step's batch is a list of micro-batches; how
far a micro-batch is cropped and how many tokens it hides is decided inside it, so processes and gradient accumulation
may share out whole micro-batches and change nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from d2v_core.contract import BadSample, Batch, Batching, Dataset, MaskingPolicy, Masks, Modality
from d2v_core.errors import UserError
from d2v_core.keyed import generator

# Sorting by length with this much noise lets a sample meet others of its length in each epoch; cropping to the
# shortest of a micro-batch then costs at most this share.
LENGTH_NOISE = 0.05


@dataclass(frozen=True)
class MicroBatch:
    """Samples that run together. size: the length they are cropped to, or that of the longest where they are padded."""

    epoch: int
    step: int
    part: int
    num_parts: int
    indices: tuple[int, ...]
    size: int


def plan_epoch(sizes: np.ndarray, batching: Batching, seed: int, epoch: int) -> list[list[MicroBatch]]:
    """One list of micro-batches per optimizer step.

    Samples of like length are put together until count * longest would pass `micro_batch`; the groups are shuffled and
    dealt out to steps of round(batch / micro_batch). A last, incomplete step is dropped unless it is the only one.
    """
    capped = np.minimum(sizes, batching.max_size)
    rng = generator(seed, "order", epoch)
    order = np.argsort(capped * (1.0 + LENGTH_NOISE * rng.random(len(capped))), kind="stable")[::-1]
    groups: list[list[int]] = []
    longest = 0
    for i in map(int, order):
        longest = max(longest, int(capped[i]))
        if groups and groups[-1] and (len(groups[-1]) + 1) * longest <= batching.micro_batch:
            groups[-1].append(i)
        else:
            groups.append([i])
            longest = int(capped[i])
    parts = max(1, round(batching.batch / batching.micro_batch))
    shuffled = [groups[int(i)] for i in rng.permutation(len(groups))]
    steps = [shuffled[i : i + parts] for i in range(0, len(shuffled), parts)]
    if len(steps) > 1 and len(steps[-1]) < parts:
        steps.pop()
    pick = min if batching.crop else max
    return [
        [
            MicroBatch(epoch, step, part, len(members), tuple(group), int(pick(capped[i] for i in group)))
            for part, group in enumerate(members)
        ]
        for step, members in enumerate(steps)
    ]


class _Endless(torch.utils.data.Sampler[MicroBatch]):
    """Micro-batches from (epoch, step) on, for ever."""

    def __init__(self, sizes: np.ndarray, batching: Batching, seed: int, epoch: int, step: int) -> None:
        self.sizes, self.batching, self.seed = sizes, batching, seed
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[MicroBatch]:
        epoch, first = self.epoch, self.step
        while True:
            for members in plan_epoch(self.sizes, self.batching, self.seed, epoch)[first:]:
                yield from members
            epoch, first = epoch + 1, 0


class _MicroBatches(TorchDataset[Batch]):
    """What a worker does with a MicroBatch: read, crop, mask, collate. Picklable."""

    def __init__(
        self, modality: Modality[Any], dataset: Dataset[Any], policy: MaskingPolicy, num_copies: int, seed: int
    ) -> None:
        self.modality, self.dataset, self.policy = modality, dataset, policy
        self.num_copies, self.seed = num_copies, seed

    def __getitem__(self, micro: Any) -> Batch:
        assert isinstance(micro, MicroBatch)
        samples: list[Any] = []
        ids: list[str] = []
        skipped: list[tuple[str, str]] = []
        for index in micro.indices:
            name = self.dataset.id(index)
            try:
                sample = self.dataset[index]
            except BadSample as error:
                skipped.append((name, str(error)))
                continue
            samples.append(
                self.modality.prepare(sample, micro.size, generator(self.seed, "prepare", micro.epoch, name))
            )
            ids.append(name)
        if not samples:
            return Batch({}, None, skipped=tuple(skipped))
        inputs = self.modality.collate(samples)
        return Batch(
            inputs, self._masks(samples, ids, micro.epoch), tuple(ids), self.modality.amount(inputs), tuple(skipped)
        )

    def _masks(self, samples: Sequence[Any], ids: Sequence[str], epoch: int) -> Masks:
        layouts = [self.modality.layout(sample) for sample in samples]
        return self.policy(layouts, self.num_copies, [generator(self.seed, "mask", epoch, name) for name in ids])


def _start_worker(worker: int) -> None:
    """A signal to the whole process group is for the training process to answer; it ends the workers itself."""
    del worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Batch) -> Batch:
    return batch


class StepLoader:
    """Iterates over (epoch, step within the epoch, micro-batches of that step), endlessly.

    epoch, step: where to begin; a resumed run gives what it had stored.
    """

    def __init__(
        self,
        modality: Modality[Any],
        dataset: Dataset[Any],
        *,
        seed: int,
        num_copies: int = 1,
        num_workers: int = 0,
        epoch: int = 0,
        step: int = 0,
        pin_memory: bool = False,
    ) -> None:
        batching = modality.batching()
        if len(dataset) == 0:
            raise UserError("The data set is empty: nothing to train on.")
        if batching.micro_batch < 1 or batching.batch < 1:
            raise UserError(f"The batch must hold something, but its sizes are {batching}.")
        try:
            policy = modality.masking()
        except ValueError as error:
            raise UserError(f"This configuration cannot work: {error}") from error
        first = plan_epoch(dataset.sizes, batching, seed, epoch)
        self.steps_per_epoch = len(first)
        # Each worker takes every num_workers-th micro-batch, so the order of the results does not depend on how many.
        self._loader = DataLoader(
            _MicroBatches(modality, dataset, policy, num_copies, seed),
            sampler=_Endless(dataset.sizes, batching, seed, epoch, step),
            batch_size=None,
            collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]
            num_workers=num_workers,
            worker_init_fn=_start_worker if num_workers else None,
            prefetch_factor=4 if num_workers else None,
            pin_memory=pin_memory,
        )
        self._plan = _Endless(dataset.sizes, batching, seed, epoch, step)

    def __iter__(self) -> Generator[tuple[int, int, list[Batch]], None, None]:
        pending: list[Batch] = []
        for micro, batch in zip(self._plan, self._loader, strict=True):
            pending.append(batch)
            if micro.part == micro.num_parts - 1:
                yield micro.epoch, micro.step, pending
                pending = []
