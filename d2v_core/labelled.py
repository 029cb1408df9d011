"""Which labelled samples a run trains on, chooses on and is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from d2v_core.config import num_labels, with_unit
from d2v_core.contract import Dataset, LabelledPart, Modality, Task
from d2v_core.errors import UserError
from d2v_core.keyed import generator

DEV_SEED = 0  # the part held back is the same for every seed of a run, so that runs can be compared on it


class Subset(Dataset[Any]):
    """Some samples of a data set, in the order of `indices`."""

    def __init__(self, dataset: Dataset[Any], indices: np.ndarray) -> None:
        self.dataset, self.indices = dataset, indices
        self.sizes = dataset.sizes[indices]

    def id(self, index: int) -> str:
        return self.dataset.id(int(self.indices[index]))

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def describe(self) -> str:
        return f"{len(self)} of: {self.dataset.describe()}"


def subset(part: LabelledPart[Any], indices: np.ndarray) -> LabelledPart[Any]:
    """The samples of these numbers, with their labels."""
    return LabelledPart(Subset(part.samples, indices), part.labels[indices])


@dataclass(frozen=True)
class Split:
    """A task whose dev part is there and whose training part has as many labels as asked for."""

    task: Task[Any]
    dev: LabelledPart[Any]
    description: str

    @property
    def train(self) -> LabelledPart[Any]:
        """The training part, of which `labels` may have left a share."""
        return self.task.train


def open_task(modality: Modality[Any]) -> Split:
    """The modality's labelled task, with `finetune.dev_ratio` and `labels` applied.

    The dev part is drawn first and does not depend on the run's seed; the labelled subset does. Both have every class
    in proportion, and at least one sample of each where there are enough. Raises UserError where there is too little.
    """
    config = modality.config
    task = modality.task()
    _check(task)
    train, dev = task.train, task.dev
    if dev is None:
        if not config.finetune.dev_ratio > 0:
            raise UserError(
                f"{task.name} has no dev part and finetune.dev_ratio=0 holds none back: set finetune.dev_ratio=0.1."
            )
        count = round(config.finetune.dev_ratio * len(train.labels))
        held, rest = draw(train.labels, bool(task.classes), count, DEV_SEED, "dev")
        if not len(held) or not len(rest):
            raise UserError(
                f"{task.name}: {len(train.labels)} labelled samples are too few to hold {count} of them back for "
                f"choosing (finetune.dev_ratio={config.finetune.dev_ratio:g}). Give more, or another ratio."
            )
        train, dev = subset(train, rest), subset(train, held)
    available = len(train.labels)
    if config.labels is not None:
        train = subset(train, _chosen(task, train, config.labels, config.seed))
    missing = sorted(set(range(len(task.classes))) - set(map(int, train.labels))) if task.classes else []
    tests = 0 if task.test is None else len(task.test.labels)
    kind = f"{len(task.classes)} classes" if task.classes else "one value each"
    if task.symbols:
        kind = f"sequences of {len(task.symbols)} symbols"
    text = (
        f"{task.name}: {len(train.labels)} of {available} labelled samples to train on, {len(dev.labels)} to choose "
        f"on, {tests} to test on; {kind}"
    )
    if missing:
        text += f"\nNo sample to train on of: {', '.join(task.classes[i] for i in missing[:9])}"
    return Split(replace(task, train=train, dev=dev), dev, f"{text}\n{task.train.samples.describe()}")


def _chosen(task: Task[Any], train: LabelledPart[Any], labels: str, seed: int) -> np.ndarray:
    available = len(train.labels)
    if with_unit(labels):
        if task.choose is None:
            raise UserError(f"labels={labels}: {task.name} counts samples. Give a number or a share such as 10%.")
        return task.choose(labels, train, seed)
    wanted = num_labels(labels, available)
    if wanted < 1:
        raise UserError(f"labels={labels} is less than one of the {available} labelled samples.")
    if not labels.endswith("%") and int(labels) > available:
        raise UserError(f"labels={labels}, but the training part of {task.name} has {available} samples.")
    return draw(train.labels, bool(task.classes), wanted, seed, "labels")[0]


def draw(labels: np.ndarray, classes: bool, count: int, seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """(chosen, others): `count` samples at random, ascending; of each class its share, rounded so that they add up.

    Where `count` reaches the number of classes, each has at least one.
    """
    rng = generator(seed, purpose)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)] if classes else [np.arange(len(labels))]
    shares = np.array([len(group) for group in groups]) * count / max(len(labels), 1)
    least = 1 if count >= len(groups) else 0
    counts = np.maximum(np.floor(shares).astype(int), least)
    by_remainder = np.argsort(counts - shares, kind="stable")  # first those that are furthest below their share
    for i in by_remainder[: max(count - int(counts.sum()), 0)]:
        counts[i] += 1
    while counts.sum() > count:
        counts[int(np.argmax(np.where(counts > least, counts - shares, -np.inf)))] -= 1
    chosen = np.concatenate([rng.permutation(group)[:n] for group, n in zip(groups, counts, strict=True)])
    chosen.sort()
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def ids(part: LabelledPart[Any]) -> Sequence[str]:
    """The ids of a part's samples, in its order."""
    return [part.samples.id(i) for i in range(len(part.samples))]


def _check(task: Task[Any]) -> None:
    for name, part in (("train", task.train), ("dev", task.dev), ("test", task.test)):
        if part is None:
            continue
        if not len(part.labels):
            raise UserError(f"{task.name}: its {name} part is empty.")
        if task.classes and not (part.labels.min() >= 0 and part.labels.max() < len(task.classes)):
            raise ValueError(f"{task.name}: labels of {name} outside the {len(task.classes)} classes")
        if task.symbols and any(len(one) and not 0 < min(one) <= max(one) < len(task.symbols) for one in part.labels):
            raise ValueError(
                f"{task.name}: labels of {name} outside the {len(task.symbols)} symbols, of which 0 is none"
            )
    if len(task.classes) == 1:
        raise UserError(f"{task.name} has one class only, {task.classes[0]!r}: there is nothing to tell apart.")
