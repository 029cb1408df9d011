"""What a pre-training run has learnt by when: data2vec 1.0 beside 2.0 on real data, against CPU seconds and FLOPs.

    python benchmarks/curve.py cifar10_subset/ --kind vision --out runs/curve --results benchmarks/results/curve/vision
    python benchmarks/curve.py librispeech_mini/train --kind audio --table an4/an4.tsv --out runs/curve \
        --results benchmarks/results/curve/audio
    python benchmarks/curve.py --report benchmarks/results/curve/vision --svg docs/curve-vision.svg

Same trunk, data and order of data for all; 1.0 in full, 2.0 with 1, 2, 4 and 8 masked copies in about the same time,
and 2.0 once more with a schedule made for a quarter of it. A run is one process with one thread and leaves checkpoints
on its way, which are scored afterwards, all in the same manner:
  vision   linear classifier on mean-pooled features (`d2v run stage=probe`), 7200 labels
  audio    linear CTC layer on ten minutes of labels (`d2v ctc-probe`), accuracy = 100 - letter error rate; and the
           phone probe on built-in speech
Layer and penalty are chosen on dev parts, test parts are scored for the choice alone. Every run with its scores is one
cell (real_data.py): one command, one JSON file, not run again where its file is there, taken up where it was stopped.

Seconds are CPU time of the process, which other users of the machine do not lengthen by waiting, though they do by
sharing caches and memory; with one thread on a free machine they are wall-clock time. Counted from the first step to
the checkpoint: reading, masking and updating, without the writing of checkpoints, which are many here. The whole
command with its scores stands in `cpu_seconds`. FLOPs are those that `d2v plan` counts for a step, times steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from real_data import Cell, run_cell
from rich.console import Console

import d2v_core
from d2v_core import checkpoint, kernels, probe
from d2v_core.config import load_config
from d2v_core.metrics import write_json
from d2v_core.probing import Encode, Prober
from d2v_core.runfolder import open_run
from d2v_core.trainer import Trainer

COPIES = 4  # of the 2.0 that has three seeds
PARTS = 8  # a run keeps this many checkpoints, evenly spaced, and the initial weights
ONE_PROCESS = ("train.num_threads=1", "train.num_workers=0", "train.tensorboard=false", "train.probe=false")
Score = Callable[[Path], Mapping[str, Any]]
"""From a run folder with one checkpoint to its dev and test accuracies by name of the probe."""


@dataclass(frozen=True)
class Run:
    """steps, and at which eighths of them it is scored."""

    name: str
    words: tuple[str, ...]
    steps: int
    scored: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)


OFTEN, SELDOM, HALF, END = (0, 1, 2, 3, 4, 6, 8), (0, 2, 4, 8), (4, 8), (8,)
# Steps of 1.0, and of 2.0 by number of copies in a quarter of 1.0's time, by the cost of a step measured beforehand.
STEPS = {"vision": (5000, {1: 1600, 2: 1200, 4: 800, 8: 480}), "audio": (2000, {1: 1080, 2: 984, 4: 792, 8: 464})}
PRESETS = {"vision": ("cifar", "cifar2"), "audio": ("small", "small2")}


def runs_of(kind: str) -> list[Run]:
    """1.0; 2.0 in a quarter of its time, by copies; 2.0 in half of it."""
    one, two = (f"preset={preset}" for preset in PRESETS[kind])
    full, quarters = STEPS[kind]
    runs = [Run("1.0", (one,), full, OFTEN), Run("1.0", (one,), full, END, (1, 2))]
    for m, steps in quarters.items():
        words = (two, f"train.num_masks={m}")
        runs.append(Run(f"2.0 M={m}, a quarter", words, steps, SELDOM if m == COPIES else HALF))
        if m == COPIES:
            runs.append(Run(f"2.0 M={m}, a quarter", words, steps, HALF, (1, 2)))
            runs.append(Run(f"2.0 M={m}, half", words, 2 * steps, HALF))
    return runs


def cells_of(kind: str, data: Path, score: Score, seeds: Sequence[int]) -> list[Cell]:
    cells: list[Cell] = []
    for run in runs_of(kind):
        words = (f"modality={kind}", *run.words, f"data.path={data}", f"train.max_steps={run.steps}")
        words += (f"train.checkpoint_every={run.steps // PARTS}", f"train.keep_checkpoints={PARTS + 1}", *ONE_PROCESS)
        steps = [part * (run.steps // PARTS) if part < PARTS else run.steps for part in run.scored]
        do = partial(train_and_score, steps=steps, score=score)
        cells += [Cell(run.name, seed, words, do) for seed in run.seeds if seed in seeds]
    return cells


class Timed(Trainer):
    """A pre-training run that keeps its initial weights and the CPU seconds of every checkpoint in cpu_seconds.json."""

    def open_data(self) -> None:
        super().open_data()
        self.record = self.out / "cpu_seconds.json"
        self.spent: dict[str, float] = json.loads(self.record.read_text()) if self.record.is_file() else {"0": 0.0}
        self.base, self.started = self.spent[str(self.progress.step)], time.process_time()
        if self.progress.step == 0:
            self.save()

    def save(self) -> None:
        seconds = self.base + time.process_time() - self.started
        self.spent[str(self.progress.step)] = round(seconds, 2)
        write_json(self.record, self.spent)
        super().save()
        self.base, self.started = seconds, time.process_time()


def train_and_score(words: Sequence[str], out: Path, steps: Sequence[int], score: Score) -> Mapping[str, Any]:
    """The run, and its scores at these steps."""
    config, kind = load_config([*words, f"out={out}", "resume=auto"])
    if not open_run(config).done and Timed(kind(config), out, Console()).fit() != 0:
        raise SystemExit(f"{out} was stopped")
    spent = json.loads((out / "cpu_seconds.json").read_text())
    by_step = {int(line["step"]): line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}
    curve: list[dict[str, Any]] = []
    for step in steps:
        kept = out / "scores" / f"{step}.json"
        if not kept.is_file():
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, dict(score(alone(out, step))))
        point = {"step": step, "train_cpu_seconds": spent[str(step)], "scores": json.loads(kept.read_text())}
        if step in by_step:
            point |= {name: round(by_step[step][name], 4) for name in ("loss", "target_std", "pred_std")}
        curve.append(point)
    return {**json.loads((out / "summary.json").read_text()), "curve": curve}


def alone(run: Path, step: int) -> Path:
    """A run folder with nothing but one checkpoint of another."""
    place = run / "scores" / f"at-{step}"
    name = f"step-{step:08d}"
    (place / "checkpoints").mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text((run / "config.yaml").read_text())
    if not (place / "checkpoints" / name).exists():
        (place / "checkpoints" / name).symlink_to((run / "checkpoints" / name).resolve())
    assert checkpoint.list_checkpoints(place / "checkpoints")
    return place


class OnlyPretrained(Prober):
    """`stage=probe` without the untrained network and the raw input, which are the same at every checkpoint."""

    def systems(self, input_name: str, input_features: Any) -> list[tuple[str, Encode]]:
        return super().systems(input_name, None)[:1]


def score_images(run: Path, data: Path) -> Mapping[str, Any]:
    out = run / "probe"
    words = ["stage=probe", f"from={run}", f"data.path={data}", f"out={out}", "resume=auto", *ONE_PROCESS[:2]]
    config, kind = load_config(words)
    if not open_run(config).done:
        OnlyPretrained(kind(config), out, Console()).fit()
    rows = json.loads((out / "summary.json").read_text())["table"]
    return {row["classifier"]: {"layer": row["layer"], "dev": row["dev"]["accuracy"], "test": row["test"]["accuracy"]}
            for row in rows}  # fmt: skip


def score_sound(run: Path, table: Path) -> Mapping[str, Any]:
    from d2v_audio.ctc_probe import CTCProbeConfig, ctc_probe

    row = ctc_probe(run, CTCProbeConfig(path=str(table), minutes=10.0, baselines=False))["rows"][0]
    loaded = d2v_core.load(run)
    task = loaded.modality.probe()
    assert task is not None
    (phones,) = probe.run_probe(replace(task, input_features=None), {"pretrained": loaded.encode})
    return {
        "CTC": {"layer": row["layer"], "dev": round(100 - row["dev"], 2), "test": round(100 - row["test"], 2)},
        **{f"phones, {n}": {"layer": phones.layer[n], "test": round(phones.accuracy[n], 2)} for n in task.budgets},
    }


# -------------------------------------------------------------------------------------------------------------- report


def count_flops(words: Sequence[str], out: Path) -> Mapping[str, Any]:
    """Of one optimizer step, by part. Plain kernels do the same arithmetic, and the counter knows all of them."""
    from d2v_core.plan import make_plan  # pyright: ignore[reportMissingImports]

    config, kind = load_config([*words, f"out={out}"])
    with kernels.plain():
        return {"flops": {name: int(count) for name, count in make_plan(kind(config)).flops.items()}}


def flops_cells(cells: Sequence[Cell]) -> list[Cell]:
    """One for each kind of run; the seed changes nothing that counts."""
    return [Cell(f"FLOPs, {cell.name}", 0, cell.words, count_flops, "d2v plan") for cell in cells if cell.seed == 0]


@dataclass(frozen=True)
class Curve:
    """A finished run: its points with their scores, and the FLOPs of a step (0 = not counted)."""

    name: str
    seed: int
    points: Sequence[Mapping[str, Any]]
    amount: float
    unit: str
    flops: float
    command_seconds: float

    @property
    def end(self) -> Mapping[str, Any]:
        return self.points[-1]


def read_curves(results: Path) -> list[Curve]:
    cells = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    flops = {c["cell"]: sum(c["summary"]["flops"].values()) for c in cells if "flops" in c["summary"]}
    found = [
        Curve(
            c["cell"], c["seed"], c["summary"]["curve"], c["summary"]["amount"], c["summary"]["unit"],
            flops.get(f"FLOPs, {c['cell']}", 0.0), c["cpu_seconds"],
        )
        for c in cells if "curve" in c["summary"]
    ]  # fmt: skip
    return sorted(found, key=lambda curve: (curve.name, curve.seed))


def report(curves: Sequence[Curve]) -> str:
    """Markdown: how each kind of run ended, mean over seeds with the range; then every scored point."""
    probes = list(curves[0].end["scores"])
    lines = [f"| run | seeds | steps | {curves[0].unit} | CPU seconds | 1e12 FLOPs | {' | '.join(probes)} |"]
    lines.append("|---" * (6 + len(probes)) + "|")
    for name in dict.fromkeys(curve.name for curve in curves):
        group = [curve for curve in curves if curve.name == name]
        end, seconds = group[0].end, [curve.end["train_cpu_seconds"] for curve in group]
        scores = [spread([curve.end["scores"][key]["test"] for curve in group]) for key in probes]
        lines.append(
            f"| {name} | {len(group)} | {end['step']} | {group[0].amount:.0f} | {spread(seconds, 0)} "
            f"| {group[0].flops * end['step'] / 1e12:.1f} | {' | '.join(scores)} |"
        )
    lines += [
        "",
        f"| run | seed | step | CPU seconds | 1e12 FLOPs | {' | '.join(probes)} |",
        "|---" * (5 + len(probes)) + "|",
    ]
    for curve in curves:
        for point in curve.points:
            scores = [f"{point['scores'][key]['test']:.1f}" for key in probes]
            lines.append(
                f"| {curve.name} | {curve.seed} | {point['step']} | {point['train_cpu_seconds']:.0f} "
                f"| {curve.flops * point['step'] / 1e12:.2f} | {' | '.join(scores)} |"
            )
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 1) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


DRAWN = ("linear", "CTC", "phones, 100")


def draw(curves: Sequence[Curve], path: Path) -> None:
    """One row of panels for each of DRAWN: accuracy against CPU seconds, and against FLOPs where they were counted."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "d2v", "font.size": 9}
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    probes = [key for key in curves[0].end["scores"] if key in DRAWN]
    names = list(dict.fromkeys(curve.name for curve in curves))
    counted = all(curve.flops for curve in curves)
    figure, rows = pyplot.subplots(len(probes), 1 + counted, figsize=(9, 3 * len(probes)), squeeze=False, sharey="row")
    for key, row in zip(probes, rows, strict=True):
        for curve in curves:
            style: dict[str, Any] = {"color": f"C{names.index(curve.name)}", "marker": "o", "markersize": 3}
            style |= {"label": curve.name if curve.seed == 0 else None, "alpha": 1.0 if curve.seed == 0 else 0.45}
            accuracy = [point["scores"][key]["test"] for point in curve.points]
            row[0].plot([point["train_cpu_seconds"] for point in curve.points], accuracy, **style)
            if counted:
                row[1].plot([curve.flops * point["step"] / 1e12 for point in curve.points], accuracy, **style)
        row[0].set_ylabel(f"{key}, test, %")
        for panel in row:
            panel.grid(alpha=0.3)
    rows[-1][0].set_xlabel("CPU seconds of training")
    if counted:
        rows[-1][1].set_xlabel("1e12 FLOPs of training")
    rows[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--kind", choices=("vision", "audio"))
    parser.add_argument("--table", type=Path, help="audio: AN4's table of transcripts")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="only cells of these names, such as 1.0")
    parser.add_argument("--report", type=Path, help="print the tables of a folder of results")
    parser.add_argument("--svg", type=Path, help="with --report: draw the curves into this file (needs matplotlib)")
    given = parser.parse_args()
    if given.report is not None:
        curves = read_curves(given.report)
        print(report(curves))
        if given.svg is not None:
            draw(curves, given.svg)
        return
    if given.data is None or given.kind is None or given.out is None or given.results is None:
        parser.error("data, --kind, --out and --results are needed")
    data, out = given.data.resolve(), given.out.resolve() / given.kind
    places = {str(out): f"runs/curve/{given.kind}", str(data): "/".join(data.parts[-2:]), str(Path.home()): "~"}
    if given.kind == "vision":
        score = partial(score_images, data=data)
    else:
        if given.table is None:
            parser.error("--kind audio needs --table")
        score = partial(score_sound, table=given.table.resolve())
        places[str(given.table.resolve())] = "an4/an4.tsv"
    cells = cells_of(given.kind, data, score, given.seeds)
    for cell in [*cells, *flops_cells(cells)]:
        if given.only is None or cell.name in given.only:
            run_cell(cell, out, given.results, places)


if __name__ == "__main__":
    main()
