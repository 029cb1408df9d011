"""Which samples make up which optimizer step, and the workers that read and mask them.

The plan of an epoch is a function of (sizes, batching, seed, epoch). A step's batch is a list of micro-batches; how
far a micro-batch is cropped and how many tokens it hides is decided inside it, so processes and gradient accumulation
may share out whole micro-batches and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from d2v_core.contract import (
    BadSample,
    Batch,
    Batching,
    Dataset,
    LabelledPart,
    MaskingPolicy,
    Masks,
    Modality,
    Targets,
)
from d2v_core.distributed import current
from d2v_core.errors import UserError
from d2v_core.keyed import generator
from d2v_core.masking import FinetuneMasking
from d2v_core.workers import DEFAULT_POLICY, Reader, WorkerPolicy, Workers

# Sorting by length with this much noise lets a sample meet others of its length in each epoch; cropping to the
# shortest of a micro-batch then costs at most this share. Where there are more than MANY samples, less noise brings it
# as many others: of 100,000 clips 5 % would cost 2.1 % of an epoch, this costs 0.13 % (benchmarks/data_path.py).
LENGTH_NOISE = 0.05
MANY = 5000
# Labelled samples are sorted by length within this many batches, so that little is padded and an epoch is well mixed.
POOL_BATCHES = 50


@dataclass(frozen=True)
class MicroBatch:
    """Samples that run together. size: the length they are cropped to, or that of the longest where they are padded."""

    epoch: int
    step: int
    part: int
    num_parts: int
    indices: tuple[int, ...]
    size: int


Plan = Callable[[int], list[list[MicroBatch]]]
"""From the number of an epoch to its steps."""


def plan_epoch(sizes: np.ndarray, batching: Batching, seed: int, epoch: int) -> list[list[MicroBatch]]:
    """One list of micro-batches per optimizer step.

    Samples of like length are put together until count * longest would pass `micro_batch`; the groups are shuffled and
    dealt out to steps of round(batch / micro_batch). A last, incomplete step is dropped unless it is the only one.
    """
    capped = np.minimum(sizes, batching.max_size)
    shuffled = _shuffled_groups(capped, batching.micro_batch, generator(seed, "order", epoch))
    parts = _num_parts(batching)
    steps = [shuffled[i : i + parts] for i in range(0, len(shuffled), parts)]
    if len(steps) > 1 and len(steps[-1]) < parts:
        steps.pop()
    return _micro_batches(steps, capped, batching.crop, epoch)


def plan_shards(
    sizes: np.ndarray, shards: np.ndarray, batching: Batching, seed: int, epoch: int
) -> list[list[MicroBatch]]:
    """As `plan_epoch`, for data that come shard by shard, `shards` (N,) being the number of the one that each lies in.

    Shards are shuffled and dealt to as many streams as a step has micro-batches, the next one always to the stream with
    the least so far; micro-batch p of every step comes from stream p. A process that has the micro-batches r, r + n,
    r + 2n of each step thus reads the shards of its own streams alone. In a stream, `batching.open_shards` are gone
    through at a time, and their samples put together and shuffled as an epoch's are. The epoch ends with its shortest
    stream. Like any plan it follows from its arguments, so that a run goes on in the middle of a shard.

    Raises UserError where there are fewer shards than streams.
    """
    capped = np.minimum(sizes, batching.max_size)
    members: dict[int, np.ndarray] = {int(i): np.flatnonzero(shards == i) for i in np.unique(shards)}
    parts = _num_parts(batching)
    if len(members) < parts:
        raise UserError(
            f"data.order=shards deals tars to the {parts} micro-batches of a step, but there are {len(members)} tars. "
            "Write smaller tars, take larger micro-batches, or data.order=samples."
        )
    order = [list(members)[int(i)] for i in generator(seed, "order of shards", epoch).permutation(len(members))]
    streams: list[list[int]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for shard in order:
        least = filled.index(min(filled))
        streams[least].append(shard)
        filled[least] += int(capped[members[shard]].sum())
    at_once = batching.open_shards or len(members)
    lanes: list[list[list[int]]] = []
    for stream in streams:
        lane: list[list[int]] = []
        for start in range(0, len(stream), at_once):
            here = np.concatenate([members[shard] for shard in stream[start : start + at_once]])
            rng = generator(seed, "order", epoch, stream[start])
            lane += [
                [int(here[i]) for i in group] for group in _shuffled_groups(capped[here], batching.micro_batch, rng)
            ]
        lanes.append(lane)
    return _micro_batches([list(step) for step in zip(*lanes, strict=False)], capped, batching.crop, epoch)


def plan_of(dataset: Dataset[Any], batching: Batching, seed: int) -> Plan:
    """The plan of pre-training on a data set. Raises UserError where one by shards cannot be made."""
    if batching.open_shards is None:
        return partial(plan_epoch, dataset.sizes, batching, seed)
    if dataset.shards is None:
        raise UserError("data.order=shards is for tars: write them by `d2v data shard`, or leave data.order out.")
    return partial(plan_shards, dataset.sizes, dataset.shards, batching, seed)


def _num_parts(batching: Batching) -> int:
    """Micro-batches in a step."""
    return max(1, round(batching.batch / batching.micro_batch))


def _shuffled_groups(capped: np.ndarray, limit: int, rng: np.random.Generator) -> list[list[int]]:
    """Micro-batches of like length, in an order of chance."""
    noise = LENGTH_NOISE * min(1.0, MANY / max(len(capped), 1))
    order = np.argsort(capped * (1.0 + noise * rng.random(len(capped))), kind="stable")[::-1]
    groups = _groups(order, capped, limit)
    return [groups[int(i)] for i in rng.permutation(len(groups))]


def _micro_batches(
    steps: Sequence[Sequence[Sequence[int]]], capped: np.ndarray, crop: bool, epoch: int
) -> list[list[MicroBatch]]:
    pick = min if crop else max
    return [
        [
            MicroBatch(epoch, step, part, len(members), tuple(group), int(pick(capped[i] for i in group)))
            for part, group in enumerate(members)
        ]
        for step, members in enumerate(steps)
    ]


def _groups(order: np.ndarray, sizes: np.ndarray, limit: int) -> list[list[int]]:
    """Neighbours put together until count * longest would pass `limit`."""
    groups: list[list[int]] = []
    longest = 0
    for i in map(int, order):
        longest = max(longest, int(sizes[i]))
        if groups and (len(groups[-1]) + 1) * longest <= limit:
            groups[-1].append(i)
        else:
            groups.append([i])
            longest = int(sizes[i])
    return groups


def plan_labelled_epoch(
    sizes: np.ndarray, batch: int, micro_batch: int, seed: int, epoch: int
) -> list[list[MicroBatch]]:
    """As `plan_epoch`, but batches are counted in samples, `batch` of them a step, and each sample keeps its length.

    A last, incomplete batch is dropped unless it is the only one.
    """
    order = generator(seed, "order", epoch).permutation(len(sizes))
    pool = batch * POOL_BATCHES
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        chosen = order[start : start + pool]
        chosen = chosen[np.argsort(sizes[chosen], kind="stable")]
        batches += [chosen[i : i + batch] for i in range(0, len(chosen), batch)]
    full = [chosen for chosen in batches if len(chosen) == batch] or batches[:1]
    shuffled = [full[int(i)] for i in generator(seed, "order of batches", epoch).permutation(len(full))]
    return [_split(epoch, step, chosen, micro_batch, sizes) for step, chosen in enumerate(shuffled)]


def _split(epoch: int, step: int, chosen: np.ndarray, micro_batch: int, sizes: np.ndarray) -> list[MicroBatch]:
    parts = [chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch)]
    return [
        MicroBatch(epoch, step, part, len(parts), tuple(map(int, members)), int(sizes[members].max()))
        for part, members in enumerate(parts)
    ]


class _Endless(torch.utils.data.Sampler[MicroBatch]):
    """Micro-batches of one process from (epoch, step) on, for ever."""

    def __init__(self, plan: Plan, epoch: int, step: int, rank: int, count: int) -> None:
        self.plan, self.epoch, self.step, self.rank, self.count = plan, epoch, step, rank, count

    def steps(self) -> Iterator[tuple[int, int, list[MicroBatch]]]:
        """(epoch, step within the epoch, this process's micro-batches of it, of which there may be none)."""
        epoch, first = self.epoch, self.step
        while True:
            for step, members in enumerate(self.plan(epoch)[first:], first):
                yield epoch, step, members[self.rank :: self.count]
            epoch, first = epoch + 1, 0

    def __iter__(self) -> Iterator[MicroBatch]:
        for _, _, members in self.steps():
            yield from members


class _Reader(Reader[MicroBatch, Batch]):
    """What a worker does with a MicroBatch. Picklable."""

    def __init__(self, modality: Modality[Any], dataset: Dataset[Any], seed: int) -> None:
        super().__init__()
        self.modality, self.dataset, self.seed = modality, dataset, seed

    def name_of(self, index: int) -> str:
        return self.dataset.id(index)

    def read(
        self, micro: MicroBatch, prepare: Callable[[Any, str], Any]
    ) -> tuple[list[Any], list[int], tuple[str, ...], tuple[tuple[str, str], ...]]:
        """(prepared samples, their numbers, their ids, (id, reason) of those that cannot be read)."""
        samples: list[Any] = []
        indices: list[int] = []
        ids: list[str] = []
        skipped: list[tuple[str, str]] = []
        for index in micro.indices:
            name = self.dataset.id(index)
            if index in self.desk.left_out:
                skipped.append((name, self.desk.left_out[index]))
                continue
            self.desk.at(index)
            try:
                sample = self.dataset[index]
            except BadSample as error:
                skipped.append((name, str(error)))
                continue
            samples.append(prepare(sample, name))
            indices.append(index)
            ids.append(name)
        self.desk.at(-1)
        return samples, indices, tuple(ids), tuple(skipped)


class _MicroBatches(_Reader):
    """For pre-training: read, crop, mask, collate."""

    def __init__(
        self, modality: Modality[Any], dataset: Dataset[Any], policy: MaskingPolicy, num_copies: int, seed: int
    ) -> None:
        super().__init__(modality, dataset, seed)
        self.policy, self.num_copies = policy, num_copies

    def __getitem__(self, micro: Any) -> Batch:
        assert isinstance(micro, MicroBatch)

        def prepare(sample: Any, name: str) -> Any:
            return self.modality.prepare(sample, micro.size, generator(self.seed, "prepare", micro.epoch, name))

        samples, _, ids, skipped = self.read(micro, prepare)
        if not samples:
            return Batch({}, None, skipped=skipped)
        inputs = self.modality.collate(samples)
        masks = self._masks(samples, ids, micro.epoch)
        return Batch(inputs, masks, ids, self.modality.amount(inputs), skipped, part=micro.part)

    def _masks(self, samples: Sequence[Any], ids: Sequence[str], epoch: int) -> Masks:
        layouts = [self.modality.layout(sample) for sample in samples]
        return self.policy(layouts, self.num_copies, [generator(self.seed, "mask", epoch, name) for name in ids])


def read_micro_batch(
    modality: Modality[Any], dataset: Dataset[Any], micro: MicroBatch, num_copies: int, seed: int
) -> Batch:
    """What a worker makes of one micro-batch, made here. Without masks where no sample of it can be read."""
    return _MicroBatches(modality, dataset, checked_masking(modality, dataset), num_copies, seed)[micro]


def checked_masking(modality: Modality[Any], dataset: Dataset[Any]) -> MaskingPolicy:
    """Raises UserError where there is no sample, or batches or masks cannot be made."""
    batching = modality.batching()
    if len(dataset) == 0:
        raise UserError("The data set is empty: nothing to train on.")
    if batching.micro_batch < 1 or batching.batch < 1:
        raise UserError(f"The batch must hold something, but its sizes are {batching}.")
    try:
        return modality.masking()
    except ValueError as error:
        raise UserError(f"This configuration cannot work: {error}") from error


class _LabelledMicroBatches(_Reader):
    """For fine-tuning and scoring: read, augment and withhold while training, collate, add targets."""

    def __init__(
        self, modality: Modality[Any], part: LabelledPart[Any], targets: Targets, seed: int, training: bool
    ) -> None:
        super().__init__(modality, part.samples, seed)
        self.labels, self.targets, self.training = part.labels, targets, training
        config = modality.config
        self.masking = FinetuneMasking(config.finetune, config.model.embed_dim) if training else None

    def __getitem__(self, micro: Any) -> Batch:
        assert isinstance(micro, MicroBatch)

        def prepare(sample: Any, name: str) -> Any:
            rng = generator(self.seed, "prepare", micro.epoch, name) if self.training else None
            return self.modality.prepare_labelled(sample, rng)

        samples, indices, ids, skipped = self.read(micro, prepare)
        if not samples:
            return Batch({}, None, skipped=skipped)
        inputs = self.modality.collate(samples)
        targets = self.targets(self.labels[indices])
        amount = self.modality.amount(inputs)
        corruption = None
        if self.training:
            rng = generator(self.seed, "mix", micro.epoch, micro.step, micro.part)
            inputs, targets = self.modality.mix(inputs, targets, rng)
        if self.masking is not None:
            rngs = [generator(self.seed, "withhold", micro.epoch, name) for name in ids]
            corruption = self.masking([self.modality.layout(sample) for sample in samples], rngs)
        return Batch(inputs, None, ids, amount, skipped, targets, corruption, micro.part)


class _Whole(_Reader):
    """For features: read, show as a labelled sample is scored, collate."""

    def __getitem__(self, micro: Any) -> Batch:
        assert isinstance(micro, MicroBatch)
        samples, _, ids, skipped = self.read(micro, lambda sample, _: self.modality.prepare_labelled(sample, None))
        if not samples:
            return Batch({}, None, skipped=skipped)
        inputs = self.modality.collate(samples)
        return Batch(inputs, None, ids, self.modality.amount(inputs), skipped)


class Steps:
    """Iterates over (epoch, step within the epoch, micro-batches of that step), endlessly.

    epoch, step: where to begin; a resumed run gives what it had stored. Of several processes each iterates over the
    same steps, and has its own micro-batches of them.
    """

    def __init__(
        self, reader: _Reader, plan: Plan, *, num_workers: int, epoch: int, step: int, pin_memory: bool,
        worker_policy: WorkerPolicy,
    ) -> None:  # fmt: skip
        processes = current()
        self.steps_per_epoch = len(plan(epoch))
        self._plan = _Endless(plan, epoch, step, processes.rank, processes.count)
        self._loader = Workers(reader, self._plan, num_workers, pin_memory, worker_policy)

    def __iter__(self) -> Generator[tuple[int, int, list[Batch]], None, None]:
        batches = iter(self._loader)
        for epoch, step, members in self._plan.steps():
            yield epoch, step, [next(batches) for _ in members]


class StepLoader(Steps):
    """The steps of a pre-training run: batches with masks."""

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
        worker_policy: WorkerPolicy = DEFAULT_POLICY,
    ) -> None:
        policy, batching = checked_masking(modality, dataset), modality.batching()
        super().__init__(
            _MicroBatches(modality, dataset, policy, num_copies, seed),
            plan_of(dataset, batching, seed),
            num_workers=num_workers, epoch=epoch, step=step, pin_memory=pin_memory,
            worker_policy=worker_policy,
        )  # fmt: skip


class LabelledSteps(Steps):
    """The steps of a fine-tuning run: batches with targets, of `batch` samples, or of the size of pre-training's."""

    def __init__(
        self,
        modality: Modality[Any],
        part: LabelledPart[Any],
        targets: Targets,
        *,
        batch: int | None,
        micro_batch: int | None = None,
        seed: int,
        num_workers: int = 0,
        epoch: int = 0,
        step: int = 0,
        pin_memory: bool = False,
        worker_policy: WorkerPolicy = DEFAULT_POLICY,
    ) -> None:
        sizes = part.samples.sizes
        plan = (
            partial(plan_epoch, sizes, _uncropped(modality, sizes), seed)
            if batch is None
            else partial(plan_labelled_epoch, sizes, batch, micro_batch or batch, seed)
        )
        super().__init__(
            _LabelledMicroBatches(modality, part, targets, seed, training=True),
            plan,
            num_workers=num_workers, epoch=epoch, step=step, pin_memory=pin_memory,
            worker_policy=worker_policy,
        )  # fmt: skip


def _uncropped(modality: Modality[Any], sizes: np.ndarray) -> Batching:
    """Batches of the size of pre-training's, in which each sample keeps its length."""
    return replace(modality.batching(), max_size=int(sizes.max()), crop=False, open_shards=None)


def labelled_batches(
    modality: Modality[Any],
    part: LabelledPart[Any],
    targets: Targets,
    batch: int | None,
    num_workers: int = 0,
    worker_policy: WorkerPolicy = DEFAULT_POLICY,
) -> Iterator[Batch]:
    """All of a labelled part once, without augmentation, in an order that pads little.

    batch: samples; None = of the size of pre-training's micro-batches.
    """
    reader = _LabelledMicroBatches(modality, part, targets, 0, training=False)
    plan = _by_size(modality, part.samples.sizes, range(len(part.labels)), batch)
    yield from Workers(reader, plan, num_workers, False, worker_policy)


def whole_batches(
    modality: Modality[Any],
    dataset: Dataset[Any],
    indices: Sequence[int],
    batch: int | None,
    num_workers: int = 0,
    worker_policy: WorkerPolicy = DEFAULT_POLICY,
) -> Iterator[Batch]:
    """The samples of these numbers once, whole and without augmentation, in an order that pads little.

    batch: samples; None = of the size of pre-training's micro-batches.
    """
    plan = _by_size(modality, dataset.sizes, indices, batch)
    yield from Workers(_Whole(modality, dataset, 0), plan, num_workers, False, worker_policy)


def _by_size(modality: Modality[Any], sizes: np.ndarray, indices: Sequence[int], batch: int | None) -> list[MicroBatch]:
    """Samples of like length together."""
    chosen = np.asarray(indices, dtype=np.int64)
    order = chosen[np.argsort(sizes[chosen], kind="stable")]
    if batch is None:
        groups = [np.array(group) for group in _groups(order, sizes, _uncropped(modality, sizes).micro_batch)]
    else:
        groups = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [MicroBatch(0, 0, i, len(groups), tuple(map(int, g)), int(sizes[g].max())) for i, g in enumerate(groups)]
