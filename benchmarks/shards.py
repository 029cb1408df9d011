"""What it costs to read data from tars instead of files, and what a list of many samples costs.

Clips of FOLDER are written as FLAC, one file each, and as tars; then the loader of `preset=base` (read, decode,
normalise, crop, mask, collate) goes through both in turn, once with the files in the system's memory and once without.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from d2v_audio.data import AudioConfig, AudioFiles, inventory
from d2v_audio.files import SHARDS, read, scan
from d2v_core.batching import StepLoader, plan_epoch
from d2v_core.config import load_config
from d2v_core.contract import Batching
from d2v_core.sharding import write_shards
from d2v_core.shards import index_path, read_shards, write_index
from d2v_core.sources import Item, Source

RATE = 16000


def flac_copy(source: Path, folder: Path, seconds: float) -> float:
    """Seconds of audio written."""
    done = 0.0
    for clip in scan(source, max_bad_ratio=1.0, decode_hours=0.0).clips:
        target = (folder / clip.id).with_suffix(".flac")
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target, read(clip, RATE), RATE, subtype="PCM_16")
        done += clip.num_samples / RATE
        if done > seconds:
            break
    return done


def forget(folder: Path) -> None:
    """Have the system forget what it keeps of these files."""
    for path in folder.rglob("*"):
        if path.is_file():
            number = os.open(path, os.O_RDONLY)
            os.fsync(number)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(number)


def epoch(path: Path) -> dict[str, float]:
    """One epoch of the loader in this process: CPU and wall seconds, and the seconds of audio in its batches."""
    words = [
        "modality=audio", "preset=base", f"data.path={path}", "data.batch_s=60", "data.micro_batch_s=60",
        "data.verify=headers", "train.num_workers=0",
    ]  # fmt: skip
    config, kind = load_config(words)
    modality: Any = kind(config)
    began = time.perf_counter()
    dataset = modality.dataset("train")
    opened = time.perf_counter() - began
    loader = StepLoader(modality, dataset, seed=0)
    cpu, wall, amount = time.process_time(), time.perf_counter(), 0.0
    for number, (_, _, members) in enumerate(loader, 1):
        amount += sum(batch.amount for batch in members)
        if number == loader.steps_per_epoch:
            break
    return {
        "open_s": opened, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "amount": amount
    }  # fmt: skip


def raw(dataset: AudioFiles) -> float:
    """Seconds to read the bytes of every clip, in an order of chance, without decoding."""
    order = np.random.default_rng(0).permutation(len(dataset))
    began = time.perf_counter()
    for i in order:
        dataset.clips[int(i)].source.read()
    return time.perf_counter() - began


def compare(source: Path, seconds: float, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = flac_copy(source, folder / "files", seconds)
        write_shards(inventory(AudioConfig(path=str(folder / "files"))), folder / "tars", "audio", 50_000_000, print)
        num_bytes = sum(path.stat().st_size for path in (folder / "tars").glob("*.tar"))
        result: dict[str, Any] = {"audio_s": total, "MB": num_bytes / 1e6, "rounds": rounds}
        for state in ("warm", "cold"):
            rows: dict[str, list[dict[str, float]]] = {"files": [], "tars": []}
            for _ in range(rounds):
                for kind, each in rows.items():
                    if state == "cold":
                        forget(folder / kind)
                    else:
                        raw(AudioFiles(scan(folder / kind, decode_hours=0.0), RATE))
                    row = epoch(folder / kind)
                    if state == "cold":
                        forget(folder / kind)
                    each.append({**row, "raw_s": raw(AudioFiles(scan(folder / kind, decode_hours=0.0), RATE))})
            result[state] = {
                kind: {key: statistics.median(row[key] for row in each) for key in each[0]}
                for kind, each in rows.items()
            }
            for kind, row in result[state].items():
                print(
                    f"{state} {kind}: opened in {row['open_s']:.2f} s; {row['amount'] / row['cpu_s']:.0f} s of audio "
                    f"per CPU second, {row['amount'] / row['wall_s']:.0f} per second; bytes alone "
                    f"{num_bytes / 1e6 / row['raw_s']:.0f} MB/s"
                )
    return result


def resident() -> int:
    """Bytes of this process in memory, when nothing is left to be thrown away."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many(count: int) -> dict[str, float]:
    """What `count` samples in tars of 10,000 cost before the first batch: seconds and memory."""
    lengths = np.random.default_rng(0).normal(13.0, 3.0, count).clip(2, 20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths: list[Path] = []
        items: list[Item] = []
        for number, start in enumerate(range(0, count, 10_000)):
            tar = folder / f"audio-{number:06d}.tar"
            tar.touch()
            os.truncate(tar, 10_000 * 400_000)  # bytes that are not there, for their index to point at
            items = [
                Item(f"{i // 500}/{i // 20}/{i:09d}.flac", Source(tar, (i - start) * 400_000, 300_000),
                     {"frames": int(lengths[i] * RATE), "rate": RATE, "channels": 1, "format": "FLAC"})
                for i in range(start, min(start + 10_000, count))
            ]  # fmt: skip
            write_index(index_path(tar), tar.name, tar.stat().st_size, None, "audio", items)
            paths.append(tar)
        items = []
        index_bytes = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
        began = time.process_time()
        assert len(read_shards(paths, folder, SHARDS).items) == count
        read_s = time.process_time() - began
        before, began = resident(), time.process_time()
        dataset = AudioFiles(scan(folder, decode_hours=0.0), RATE)
        scan_s, began = time.process_time() - began, time.process_time()
        held, most = resident() - before, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        plan_epoch(dataset.sizes, Batching(3800 * RATE, 2_000_000, 20 * RATE, True), 0, 0)
        return {
            "samples": count, "index_bytes": index_bytes / count, "read_index_s": read_s, "scan_s": scan_s,
            "plan_s": time.process_time() - began, "bytes_held": held / count, "bytes_at_most": most / count,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600.0, help="of audio at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {"many": many(arguments.many)}
    print(json.dumps(result["many"], indent=1))
    result |= {"loader": compare(arguments.data, arguments.seconds, arguments.rounds)}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
