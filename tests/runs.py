"""Whole runs in tests: options that keep them tiny, the command line in this process, and what a run folder holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor, equal

from d2v_core import checkpoint, cli
from d2v_core.batching import StepLoader
from d2v_core.config import load_config
from d2v_core.contract import Batch, Modality
from d2v_core.data2vec import Data2Vec
from d2v_core.run import build_model
from d2v_core.trainer import Updater

SMALL = {"model.embed_dim": "32", "model.num_layers": "2", "model.num_heads": "2", "target.top_k_layers": "2"}
SHORT = {
    "train.max_steps": "5",
    "train.log_every": "1",
    "train.num_workers": "0",
    "train.tensorboard": "false",
    "train.probe": "false",
}
IMAGES = {
    **SHORT,
    "modality": "vision",
    "preset": "tiny1",
    "model.embed_dim": "16",
    "model.num_layers": "2",
    "model.num_heads": "2",
    "target.top_k_layers": "2",
    "features.patch_size": "8",
    "mask.num_patches": "9",
    "mask.min_block": "2",
    "data.batch": "8",
}
TIMES = ("throughput", "data_wait", "seconds")  # of a line of metrics.jsonl, which no two runs share


ModalityT = TypeVar("ModalityT", bound=Modality[Any])


def modality_of(kind: type[ModalityT], words: Sequence[str]) -> ModalityT:
    """A modality made from `key=value` words, of which the last of the same key counts."""
    chosen = [f"modality={kind.name}", *(f"{key}={value}" for key, value in options(tuple(words)).items())]
    return kind(load_config(chosen, lambda name: kind)[0])


def count(parameters: Iterable[Tensor]) -> int:
    """How many numbers they hold."""
    return sum(p.numel() for p in parameters)


def updated(made: Modality[Any], steps: int) -> tuple[Data2Vec, list[tuple[list[Batch], dict[str, float]]]]:
    """The model after some updates, and of each its micro-batches and numbers; these are finite."""
    model = build_model(made).train()
    updater = Updater(model, made.config, torch.device("cpu"))
    loader = iter(StepLoader(made, made.dataset("train"), seed=0, num_copies=made.config.train.num_masks))
    done: list[tuple[list[Batch], dict[str, float]]] = []
    for step in range(steps):
        _, _, batches = next(loader)
        numbers = updater.update(step, batches, made.teacher_inputs).numbers()
        assert all(math.isfinite(value) for value in numbers.values())
        done.append((batches, numbers))
    return model, done


def followed(model: Data2Vec) -> dict[str, float]:
    """By how much each of the teacher's parameters moves, on average, when all of the student's have grown by one and
    the decay is 0.9: 0.1 = averaged, 1 = copied or shared."""
    before = {name: p.clone() for name, p in model.teacher.module.named_parameters()}
    with torch.no_grad():
        for p in model.student.parameters():
            p += 1.0
    model.update_teacher(0.9)
    return {name: (p - before[name]).mean().item() for name, p in model.teacher.module.named_parameters()}


class Answer(NamedTuple):
    """Exit status, and what was printed."""

    status: int
    out: str
    error: str


def call_d2v(
    capsys: pytest.CaptureFixture[str], base: Mapping[str, str], words: Mapping[str, str], verb: str = "run"
) -> Answer:
    """`d2v VERB` with the options of `base`, of which `words` replace those of the same key."""
    status = cli.main([verb, *(f"{key}={value}" for key, value in {**base, **words}.items())])
    return Answer(status, *capsys.readouterr())


def options(words: tuple[str, ...]) -> dict[str, str]:
    """`key=value` words by key; the last of the same key counts."""
    return dict(word.split("=", 1) for word in words)


def lines(run: str | Path) -> list[dict[str, Any]]:
    """What a run logged."""
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """The same without what depends on the clock."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines(run)]


def weights(run: str | Path) -> dict[str, Tensor]:
    """Of student and predictor at the newest checkpoint."""
    return checkpoint.load(checkpoint.list_checkpoints(Path(run, "checkpoints"))[-1]).model


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
