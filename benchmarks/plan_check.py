"""What `d2v plan` predicts beside what is measured.

    python benchmarks/plan_check.py                      # all configurations; JSON under benchmarks/results/plan/
    python benchmarks/plan_check.py audio-1.0            # those whose names begin so
    python benchmarks/plan_check.py --device cuda        # peaks of torch's allocator instead of the process's

Each configuration is a real micro-batch of built-in data, the largest of the first epoch, and one optimizer step from
it, without layer drop.
  FLOPs   counted on the real step with attention as plain products (the `MATH` kernel), where torch's own counting
          mode sees all of it, against the plan's count on tensors without values with the kernels that training takes.
  memory  on a CPU the peak resident memory of a fresh process after three steps, less that of a fresh process that
          does the same imports, reads the same micro-batch and trains nothing; on a GPU the peak of torch's allocator.
          Against the plan's peak of live storages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2v_core import __version__
from d2v_core.config import load_config
from d2v_core.plan import Counter, costs, planned_micro_batch
from d2v_core.run import build_model
from d2v_core.trainer import Updater

FIXED = ("model.layer_drop=0", "train.num_threads=1")
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "audio-1.0-tiny": ("modality=audio", "preset=tiny"),
    "audio-1.0-base": ("modality=audio", "preset=base", "data.batch_s=8", "data.micro_batch_s=8"),
    "audio-2.0-base": ("modality=audio", "preset=base2", "data.batch_s=4", "data.micro_batch_s=4"),
    "vision-1.0-base": ("modality=vision", "preset=base", "data.batch=4", "data.micro_batch=4"),
    "vision-2.0-tiny": ("modality=vision", "preset=tiny2"),
    "vision-2.0-base": ("modality=vision", "preset=base2", "data.batch=1", "data.micro_batch=1"),
    "text-1.0-small": ("modality=text", "preset=small"),
    "text-2.0-base": ("modality=text", "preset=base2", "data.batch_tokens=512", "data.micro_batch_tokens=512"),
}


def setup(words: list[str]) -> tuple[Any, Any]:
    """A modality and a micro-batch of it, which is then the whole step."""
    config, kind = load_config([*words, *FIXED])
    modality = kind(config)
    return modality, planned_micro_batch(modality)


def peak_memory(words: list[str], steps: int) -> int:
    """Bytes that this process has taken at most after so many steps."""
    modality, batch = setup(words)
    device = torch.device(modality.config.train.device)
    if steps:
        model = build_model(modality).to(device).train()
        updater = Updater(model, modality.config, device)
        for number in range(steps):
            updater.update(number, [batch], modality.teacher_inputs)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss, which on Linux begins with what the parent process had.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measured_peak(words: list[str]) -> int:
    found: list[int] = []
    for steps in ("0", "3"):
        command = [sys.executable, __file__, "--peak", steps, *words]
        found.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
    return found[1] - found[0]


def counted_flops(words: list[str]) -> int:
    """Of a real step, in the preset's precision, on which FLOPs do not depend."""
    modality, batch = setup([word for word in words if not word.startswith("train.precision=")])
    device = torch.device(modality.config.train.device)
    model = build_model(modality).to(device).train()
    updater = Updater(model, modality.config, device)
    with Counter(follow=False) as counter, sdpa_kernel(SDPBackend.MATH):
        updater.update(0, [batch], modality.teacher_inputs)
    return sum(counter.flops.values())


def check(name: str, words: list[str]) -> dict[str, Any]:
    modality, batch = setup(words)
    (cost,) = costs(modality, [[batch]], torch.device(modality.config.train.device), modality.config.train.precision)
    result: dict[str, Any] = {
        "words": words, "d2v": __version__, "torch": torch.__version__, "load_average": os.getloadavg(),
        "predicted_flops": sum(cost.flops.values()), "measured_flops": counted_flops(words),
        "predicted_bytes": cost.peak, "measured_bytes": measured_peak(words),
    }  # fmt: skip
    for what in ("flops", "bytes"):
        result[f"{what}_error"] = result[f"predicted_{what}"] / result[f"measured_{what}"] - 1.0
    print(
        f"{name:18} GFLOP {result['predicted_flops'] / 1e9:9.2f} / {result['measured_flops'] / 1e9:9.2f} "
        f"({result['flops_error']:+.2%})   MiB {result['predicted_bytes'] / 2**20:7.0f} / "
        f"{result['measured_bytes'] / 2**20:7.0f} ({result['bytes_error']:+.1%})",
        flush=True,
    )
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names, or with --peak the configuration's words")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan")
    parser.add_argument("--peak", type=int, metavar="STEPS", help="print this process's peak bytes and stop")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.peak is not None:
        print(peak_memory(args.names, args.peak))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    worst = {"flops": 0.0, "bytes": 0.0}
    print(f"predicted / measured, train.precision={args.precision}, {args.device}")
    for name, words in CONFIGURATIONS.items():
        if args.names and not name.startswith(tuple(args.names)):
            continue
        result = check(name, [*words, f"train.precision={args.precision}", f"train.device={args.device}"])
        worst = {what: max(value, abs(result[f"{what}_error"])) for what, value in worst.items()}
        path = args.out / f"{name}-{args.precision}-{args.device}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"largest error: FLOPs {worst['flops']:.2%}, memory {worst['bytes']:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
