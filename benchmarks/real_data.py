"""Label efficiency on small real data: pre-train, probe, fine-tune, against untrained twins and supervised baselines.

    python benchmarks/real_data.py cifar10_subset/ --kind vision --out runs/cifar --results benchmarks/results/cifar
    python benchmarks/real_data.py corpus/ --kind text --glue glue/ --out runs/text --results benchmarks/results/text
    python benchmarks/real_data.py --table benchmarks/results/cifar

vision: the folder with the CIFAR-10 files, unlabelled for pre-training. text: a folder of .txt files to pre-train on,
and GLUE's folder with SST-2 and CoLA. Every cell is one command of some minutes and leaves one JSON file; a cell whose
file is there is not run again, and one that was stopped goes on. Choices (best step, layer, penalty) are made on
held-out training data; the test part, for GLUE its dev part, is scored once.

Baselines by name: vision, ResNet-20 (He et al. 2016, arXiv:1512.03385, section 4.2) with the same labels, augmentation
and choice of the best step; text, TF-IDF of tokens and pairs of tokens with logistic regression (scikit-learn).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import d2v_core
from d2v_core.config import load_config
from d2v_core.contract import Corruption
from d2v_core.finetune import Finetuner
from d2v_core.labelled import open_task
from d2v_core.loop import OptimizerStep
from d2v_core.metrics import write_json
from d2v_core.scores import score_all


@dataclass(frozen=True)
class Cell:
    """One result. words: of `d2v run`; do: instead of the command, a function from those words and the run's folder.
    verb: what the words are of, where they are not quite the command's."""

    name: str
    seed: int
    words: tuple[str, ...]
    do: Callable[[Sequence[str], Path], Mapping[str, Any]] | None = None
    verb: str = "d2v run"


# ------------------------------------------------------------------------------------------------------- baselines


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions; the shortcut drops every other pixel and pads channels with zeros (the paper's A)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more)))


class ResNet20(nn.Module):
    """For 32 x 32 images: three groups of three blocks with 16, 32 and 64 channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        sizes = [(16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1),
                 (64, 64, 1)]  # fmt: skip
        self.blocks = nn.Sequential(*(BasicBlock(*size) for size in sizes))
        self.out = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(
        self, inputs: Mapping[str, Tensor], corruption: Corruption | None = None, frozen: bool = False
    ) -> Tensor:
        del corruption, frozen
        return self.out(self.blocks(self.stem(inputs["image"])).mean((2, 3))).float()


class Supervised(Finetuner):
    """A network of its own instead of a pre-trained one; everything else is fine-tuning's."""

    def build(self, fresh: bool) -> None:
        del fresh
        torch.manual_seed(self.config.seed)
        self.model = ResNet20(len(self.split.task.classes)).to(self.device).train()  # pyright: ignore[reportAttributeAccessIssue]
        self.averaged = None
        self.optimizer_step = OptimizerStep(self.model, self.config, self.device)


def resnet20(words: Sequence[str], out: Path) -> Mapping[str, Any]:
    from rich.console import Console

    from d2v_core.runfolder import open_run

    config, kind = load_config([*words, f"out={out}", "resume=auto"])
    if not open_run(config).done:
        Supervised(kind(config), out, Console()).fit()
    return json.loads((out / "summary.json").read_text())


def tfidf(words: Sequence[str], out: Path) -> Mapping[str, Any]:
    """Of the tokens that the network is given, each a word; the penalty is chosen on the dev part."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    config, kind = load_config([*words, f"out={out}"])
    split = open_task(kind(config))

    def part(part: Any) -> list[str]:
        return [" ".join(map(str, part.samples[n][1:-1])) for n in range(len(part.samples))]

    assert split.task.test is not None
    train, dev, test = part(split.train), part(split.dev), part(split.task.test)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
    x = vectorizer.fit_transform(train)
    best: dict[str, Any] = {}
    for c in (0.1, 1.0, 10.0, 100.0):
        model = LogisticRegression(C=c, max_iter=1000).fit(x, split.train.labels)
        score = score_all(split.task.metrics, model.predict(vectorizer.transform(dev)), split.dev.labels)
        if not best or score[split.task.metrics[0]] > best["dev"][split.task.metrics[0]]:
            predicted = model.predict(vectorizer.transform(test))
            best = {"dev": score, "test": score_all(split.task.metrics, predicted, split.task.test.labels), "C": c}
    return {"finetune": {"task": split.task.name, "labels": len(train), "metrics": list(split.task.metrics), **best}}


# ----------------------------------------------------------------------------------------------------------- cells


def vision_cells(data: Path, out: Path, seeds: Sequence[int], more: Sequence[str]) -> list[Cell]:
    cells: list[Cell] = []
    for seed in seeds:
        run = out / f"pretrain-{seed}"
        cells.append(Cell("pretrain", seed, ("modality=vision", "preset=cifar", f"data.path={data}", *more)))
        later = (f"from={run}", f"data.path={data}")
        cells.append(Cell("probe", seed, ("stage=probe", *later)))
        for labels in ("1%", "10%"):
            steps = {"1%": 400, "10%": 800}[labels]
            words = ("stage=finetune", "preset=cifar", *later, f"labels={labels}", f"train.max_steps={steps}")
            cells.append(Cell(f"pretrained, {labels}", seed, words))
            cells.append(Cell(f"untrained, {labels}", seed, (*words, "finetune.weights=untrained")))
            baseline = (*words, "optim.lr=2e-3", "finetune.ema_decay=null", "finetune.layer_decay=1")
            cells.append(Cell(f"ResNet-20, {labels}", seed, baseline, resnet20, "baseline"))
    return cells


def text_cells(corpus: Path, glue: Path, out: Path, seeds: Sequence[int], more: Sequence[str]) -> list[Cell]:
    cells: list[Cell] = []
    tokenizer = out / "tokenizer.json"
    for seed in seeds:
        run = out / f"pretrain-{seed}"
        words = ("modality=text", "preset=small", f"data.path={corpus}", f"data.tokenizer={tokenizer}", *more)
        cells.append(Cell("pretrain", seed, words))
        for task, labels, steps, held in (
            ("SST-2", "1000", 400, 0.02),
            ("SST-2", "", 2000, 0.02),
            ("CoLA", "", 1500, 0.1),
        ):
            words = ("stage=finetune", "preset=small", f"from={run}", f"data.path={glue / task}", "glue.dev_part=test")
            words += (
                f"train.max_steps={steps}",
                f"finetune.dev_ratio={held}",
                *((f"labels={labels}",) if labels else ()),
            )
            name = f"{task}, {labels or 'all'}"
            cells.append(Cell(f"pretrained, {name}", seed, words))
            cells.append(Cell(f"untrained, {name}", seed, (*words, "finetune.weights=untrained")))
            cells.append(Cell(f"TF-IDF, {name}", seed, words, tfidf, "baseline"))
    return cells


def without_places(content: Any, places: Mapping[str, str]) -> Any:
    """The same JSON, with the names of folders of one machine replaced."""
    text = json.dumps(content)
    for place, name in places.items():
        text = text.replace(json.dumps(place)[1:-1], name)
    return json.loads(text)


def run_cell(cell: Cell, out: Path, results: Path, places: Mapping[str, str]) -> None:
    name = f"{cell.name}-{cell.seed}".replace(", ", "-").replace("%", "pc").replace(" ", "-")
    path, folder = results / f"{name}.json", out / name
    if path.is_file():
        return
    words = [*cell.words, f"seed={cell.seed}"]
    print(f"--- {name}: {' '.join(words)}", flush=True)
    started, cpu = time.perf_counter(), _cpu_seconds()
    if cell.do is not None:
        summary = dict(cell.do(words, folder))
    else:
        command = [sys.executable, "-m", "d2v_core", "run", *words, f"out={folder}", "resume=auto"]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(f"{name} failed: {' '.join(command)}")
        summary = json.loads((folder / "summary.json").read_text())
    summary.pop("train", None)  # the list of ids, which stays in the run folder
    results.mkdir(parents=True, exist_ok=True)
    result = {
        "cell": cell.name, "seed": cell.seed, "command": " ".join([cell.verb, *words]),
        "cpu_seconds": round(_cpu_seconds() - cpu, 1), "wall_seconds": round(time.perf_counter() - started, 1),
        "date": time.strftime("%Y-%m-%d"), "machine": machine(), "summary": summary,
    }  # fmt: skip
    write_json(path, without_places(result, places))


def _cpu_seconds() -> float:
    """Of this process and the finished ones that it started, workers included."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def machine() -> dict[str, str]:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    return {"cpu": model, "cores": str(os.cpu_count()), "python": platform.python_version(),
            "torch": str(torch.__version__), "d2v": d2v_core.__version__}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- table


def table(results: Path) -> str:
    """Markdown: a row per cell, mean over seeds and the range in brackets."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):
        one = json.loads(path.read_text())
        if "finetune" in one["summary"]:
            scores = one["summary"]["finetune"]
            found.setdefault(one["cell"], []).append({**scores, "cpu": one["cpu_seconds"], "seed": one["seed"]})
        for row in one["summary"].get("table", []):
            name = f"{row['system']}, frozen, {row['classifier']}, all labels"
            row = {**row, "metrics": one["summary"]["metrics"], "cpu": one["cpu_seconds"], "seed": one["seed"]}
            found.setdefault(name, []).append(row)
        if one["cell"] == "pretrain":
            found.setdefault("(pre-training)", []).append({"cpu": one["cpu_seconds"], "seed": one["seed"]})
    lines = ["| system | seeds | metric | dev | test | CPU seconds |", "|---|---|---|---|---|---|"]
    for name, rows in found.items():
        cpu = f"{statistics.mean(row['cpu'] for row in rows):.0f}"
        if "test" not in rows[0]:
            lines.append(f"| {name} | {len(rows)} | | | | {cpu} |")
            continue
        metric = rows[0]["metrics"][0]
        cells = [_spread([row[part][metric] for row in rows]) for part in ("dev", "test")]
        lines.append(f"| {name} | {len(rows)} | {metric} | {cells[0]} | {cells[1]} | {cpu} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--kind", choices=("vision", "text"))
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="only cells of these names, such as pretrain")
    parser.add_argument("--more", nargs="*", default=[], help="key=value for pre-training")
    parser.add_argument("--table", type=Path, help="print the table of a folder of results")
    given = parser.parse_args()
    if given.table is not None:
        print(table(given.table))
        return
    if given.data is None or given.kind is None or given.out is None or given.results is None:
        parser.error("data, --kind, --out and --results are needed")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    places = {str(out): f"runs/{given.kind}", str(given.data.resolve()): given.data.resolve().name}
    places |= {str(given.glue.resolve()): "glue"} if given.glue else {}
    places[str(Path.home())] = "~"
    if given.kind == "vision":
        cells = vision_cells(given.data.resolve(), out, given.seeds, given.more)
    else:
        if given.glue is None:
            parser.error("--kind text needs --glue, the folder with SST-2 and CoLA")
        if not (out / "tokenizer.json").is_file():
            words = ["tokenizer", "train", str(given.data), "vocab_size=8000", f"out={out / 'tokenizer.json'}"]
            subprocess.run([sys.executable, "-m", "d2v_core", *words], check=True)
        cells = text_cells(given.data.resolve(), given.glue.resolve(), out, given.seeds, given.more)
    for cell in cells:
        if given.only is None or cell.name in given.only:
            run_cell(cell, out, given.results, places)
    print(table(given.results))


if __name__ == "__main__":
    main()
