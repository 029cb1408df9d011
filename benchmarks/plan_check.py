"""What `d2v plan` predicts beside what is measured.

    python benchmarks/plan_check.py                      # all configurations; JSON in benchmarks/results/plan-*.json
    python benchmarks/plan_check.py audio-1.0            # those whose names begin so
    python benchmarks/plan_check.py --precision bf16
    python benchmarks/plan_check.py --device cuda        # the peak of torch's allocator instead of the process's

Each configuration is a real micro-batch of built-in data, the largest of the first epoch, and optimizer steps from it,
without layer drop, in a fresh process.
  FLOPs   counted on a real step with attention as plain products (the `MATH` kernel), where torch's table sees all of
          it, against the plan's count on tensors without values with the kernels that training takes.
  memory  on a CPU the peak of resident memory over two steps, less what is resident before the network is made: when a
          step of one sample is done and thrown away, for a process's first step loads code and keeps it. On a GPU the
          peak of torch's allocator.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2v_core import __version__, plan
from d2v_core.config import load_config
from d2v_core.contract import Batch, Modality
from d2v_core.counting import Counter
from d2v_core.run import build_model
from d2v_core.trainer import Updater

FIXED = ("model.layer_drop=0", "train.num_threads=1")
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "text-1.0-small": ("modality=text", "preset=small"),
    "audio-1.0-small": ("modality=audio", "preset=small"),
    "vision-2.0-tiny": ("modality=vision", "preset=tiny"),
    "audio-1.0-base": ("modality=audio", "preset=base", "data.batch_s=8", "data.micro_batch_s=8"),
    "vision-1.0-base": ("modality=vision", "preset=base", "data.batch=2", "data.micro_batch=2"),
    "text-1.0-base": ("modality=text", "preset=base", "data.batch_tokens=512", "data.micro_batch_tokens=512"),
    "audio-2.0-base": ("modality=audio", "preset=base2", "data.batch_s=2", "data.micro_batch_s=2"),
    "vision-2.0-base": ("modality=vision", "preset=base2", "data.batch=1", "data.micro_batch=1"),
}


def made(words: list[str]) -> Modality[Any]:
    config, kind = load_config([*words, *FIXED])
    return kind(config)


def resident(field: str) -> int:
    """Bytes of this process, now (`VmRSS`) or at most (`VmHWM`). Not ru_maxrss, which begins with the parent's."""
    return 1024 * int(Path("/proc/self/status").read_text(encoding="utf-8").split(f"{field}:")[1].split()[0])


def measure(words: list[str], batches: Path) -> dict[str, int]:
    """Of this process, which has done nothing else: the peak of two steps, and the FLOPs of a third."""
    modality = made(words)
    small, batch = torch.load(batches, weights_only=False)
    device = torch.device(modality.config.train.device)

    def steps(batch: Batch, count: int) -> Updater:
        updater = Updater(build_model(modality).to(device).train(), modality.config, device)
        for number in range(count):
            updater.update(number, [batch], modality.teacher_inputs)
        return updater

    steps(small, 1)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        updater = steps(batch, 2)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is there now
        updater = steps(batch, 2)
        peak = resident("VmHWM") - before
    with Counter() as counter, sdpa_kernel(SDPBackend.MATH):
        updater.update(2, [batch], modality.teacher_inputs)
    return {"bytes": peak, "flops": sum(counter.flops.values())}


def check(name: str, words: list[str]) -> dict[str, Any]:
    modality = made(words)
    batch = plan.planned_micro_batch(modality)
    small = plan.planned_micro_batch(modality, 1)
    config = modality.config.train
    device = torch.device(config.device)
    (cost,) = plan.costs(modality, [[batch]], device, config.precision, settled=True)
    peak = plan.peak_of(cost, device)
    with tempfile.TemporaryDirectory() as folder:
        batches = Path(folder) / "batches.pt"
        torch.save((small, batch), batches)
        command = [sys.executable, __file__, "--measure", str(batches), *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert batch.masks is not None
    result: dict[str, Any] = {
        "words": words, "d2v": __version__, "torch": torch.__version__, "load_average": os.getloadavg(),
        "rows_copies_tokens": list(batch.masks.hidden.shape), "tensors": cost.peak,
        "predicted": {"bytes": peak.predicted, "flops": sum(cost.flops.values())}, "measured": found,
    }  # fmt: skip
    result["error"] = {what: result["predicted"][what] / found[what] - 1.0 for what in found}
    print(
        f"{name:16} GFLOP {result['predicted']['flops'] / 1e9:8.2f} / {found['flops'] / 1e9:8.2f} "
        f"({result['error']['flops']:+.2%})   MiB {peak.predicted / 2**20:6.0f} / {found['bytes'] / 2**20:6.0f} "
        f"({result['error']['bytes']:+.1%}), of tensors {cost.peak / 2**20:6.0f}",
        flush=True,
    )
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names, or with --measure the configuration's words")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", type=Path, metavar="BATCHES", help="measure in this process and stop")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.measure is not None:
        print(json.dumps(measure(args.names, args.measure)))
        return 0
    worst = {"flops": 0.0, "bytes": 0.0}
    print(f"predicted / measured, train.precision={args.precision}, {args.device}")
    for name, words in CONFIGURATIONS.items():
        if args.names and not name.startswith(tuple(args.names)):
            continue
        result = check(name, [*words, f"train.precision={args.precision}", f"train.device={args.device}"])
        worst = {what: max(value, abs(result["error"][what])) for what, value in worst.items()}
        path = args.out / f"plan-{name}-{args.precision}-{args.device}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"largest error: FLOPs {worst['flops']:.2%}, memory {worst['bytes']:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
