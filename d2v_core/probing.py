"""`stage=probe`: how well frozen features tell the classes of a labelled task, untrained ones and raw input beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from d2v_core import run
from d2v_core.batching import labelled_batches
from d2v_core.contract import LabelledPart, Modality
from d2v_core.errors import UserError
from d2v_core.labelled import ids, open_task
from d2v_core.loop import pick_device
from d2v_core.metrics import write_json
from d2v_core.objectives import class_targets, objective_of
from d2v_core.probe import L2_GRID, fit_knn, fit_linear, pooled_layers
from d2v_core.scores import score_all

K_GRID = (5, 20, 100)
Encode = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""From the inputs of a batch to (B, F) per layer."""


class Prober:
    """Linear and nearest-neighbour classifiers on mean-pooled tokens of each layer.

    Layer, penalty and number of neighbours are chosen on the dev part, for every row alike; then the test part is
    scored once. `fit` returns the exit status and leaves summary.json.
    """

    def __init__(self, modality: Modality[Any], out: Path, console: Console) -> None:
        self.modality, self.config, self.out, self.console = modality, modality.config, out, console
        self.device = pick_device(self.config)
        if self.config.train.num_threads:
            torch.set_num_threads(self.config.train.num_threads)
        self.skipped: dict[str, str] = {}

    def fit(self) -> int:
        """Score every system on every layer and write summary.json. Returns the exit status."""
        started = time.perf_counter()
        split = open_task(self.modality)
        task = split.task
        if not task.classes:
            asked = objective_of(task).asks_for
            raise UserError(f"{task.name} asks for {asked}, and stage=probe tells classes apart. Use stage=finetune.")
        self.console.print(escape(split.description), soft_wrap=True, highlight=False)
        assert self.config.from_run is not None
        rows: list[dict[str, Any]] = []
        for name, encode in self.systems(task.input_name, task.input_features):
            parts = {"train": split.train, "dev": split.dev, **({} if task.test is None else {"test": task.test})}
            rows += self._score(name, {key: self._features(part, encode) for key, part in parts.items()}, task)
        write_json(self.out / "summary.json", {
            "modality": self.modality.name, "stage": "probe", "steps": self.config.train.max_steps, "task": task.name,
            "metrics": list(task.metrics), "labels": len(split.train.labels), "train": list(ids(split.train)),
            "data": split.description, "skipped": self.skipped, "wall_seconds": round(time.perf_counter() - started, 2),
            "table": rows,
        })  # fmt: skip
        self.console.print(_table(rows, task.metrics[0], f"{task.name}, {len(split.train.labels)} labels"))
        self.console.print(f"Written to {escape(str(self.out / 'summary.json'))}", soft_wrap=True, highlight=False)
        return 0

    def systems(self, input_name: str, input_features: Any) -> list[tuple[str, Encode]]:
        """What is scored, by the name of its rows; input_features None = no row for the raw input."""
        source = self.config.from_run
        assert source is not None
        systems: list[tuple[str, Encode]] = []
        for name, untrained in (("pretrained", False), ("untrained", True)):
            student = run.load(source, untrained=untrained).student.to(self.device)
            systems.append((name, lambda inputs, student=student: pooled_layers(student, inputs)))
        if input_features is not None:
            systems.append((input_name, lambda inputs: [input_features(inputs)]))
        return systems

    def _features(self, part: LabelledPart[Any], encode: Encode) -> tuple[list[Tensor], Tensor]:
        """((N, F) per layer, (N,) labels) on the host."""
        layers: list[list[Tensor]] = []
        labels: list[Tensor] = []
        batch, workers = self.config.finetune.batch, self.config.train.num_workers
        targets = class_targets(int(part.labels.max()) + 1)
        for one in labelled_batches(self.modality, part, targets, batch, workers):
            self.skipped.update(dict(one.skipped))
            if one.targets is not None:
                layers.append([layer.cpu() for layer in encode(one.to(self.device).inputs)])
                labels.append(one.targets.argmax(1))
        if not layers:
            raise UserError(f"None of {len(part.labels)} samples can be read: {next(iter(self.skipped.items()))}")
        return [torch.cat(list(column)) for column in zip(*layers, strict=True)], torch.cat(labels)

    def _score(self, system: str, parts: Mapping[str, tuple[list[Tensor], Tensor]], task: Any) -> list[dict[str, Any]]:
        (train, labels), classes = parts["train"], len(task.classes)
        rows: list[dict[str, Any]] = []
        for classifier, fit, grid in (("linear", fit_linear, L2_GRID), ("kNN", fit_knn, K_GRID)):
            best: dict[str, Any] | None = None
            chosen: Callable[[Tensor], Tensor] | None = None
            for layer, x in enumerate(train):
                for setting in grid:
                    classify = fit(x, labels, classes, setting)  # pyright: ignore[reportArgumentType]
                    dev = _scores(classify, parts["dev"], layer, task.metrics)
                    if best is None or dev[task.metrics[0]] > best["dev"][task.metrics[0]]:
                        best = {
                            "system": system,
                            "classifier": classifier,
                            "layer": layer,
                            "setting": setting,
                            "dev": dev,
                        }
                        chosen = classify
            assert best is not None and chosen is not None
            if "test" in parts:
                best["test"] = _scores(chosen, parts["test"], best["layer"], task.metrics)
            rows.append(best)
        return rows


def _scores(
    classify: Callable[[Tensor], Tensor], part: tuple[list[Tensor], Tensor], layer: int, metrics: tuple[str, ...]
) -> dict[str, float]:
    layers, labels = part
    return score_all(metrics, classify(layers[layer]).argmax(1).numpy(), labels.numpy())


def _table(rows: Sequence[Mapping[str, Any]], metric: str, title: str) -> Table:
    table = Table(title=f"{title}: {metric}, %", title_justify="left")
    for name in ("features", "classifier", "layer", "dev", "test"):
        table.add_column(name, justify="left" if name in ("features", "classifier") else "right")
    for row in rows:
        test = f"{row['test'][metric]:.1f}" if "test" in row else ""
        table.add_row(row["system"], row["classifier"], str(row["layer"]), f"{row['dev'][metric]:.1f}", test)
    return table
