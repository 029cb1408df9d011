"""`d2v encode`: what a trained network makes of every sample of a folder or a file, kept in files.

    OUT/features.json      what made them: run, checkpoint and its digest, layers, options
        index.jsonl        a line for each sample: id, file, shape, grid
        left_out.jsonl     a line for each sample that cannot be read: id, reason
        samples/ID.npy     (layers, tokens, width), or (layers, width) where tokens are pooled

A sample's file appears whole or not at all, so the same command goes on where it was stopped. A folder that something
else has made is never written to. Nothing here knows what kind of data a sample is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from d2v_core import __version__, checkpoint
from d2v_core.batching import whole_batches
from d2v_core.config import DATA_OF_RUN, opt, options, parse_arguments, read_yaml
from d2v_core.contract import Batch, Dataset
from d2v_core.errors import UserError
from d2v_core.files import existing, first
from d2v_core.loop import pick_device
from d2v_core.metrics import write_json
from d2v_core.probe import all_layers
from d2v_core.run import LoadedRun, load
from d2v_core.verbs import print_help
from d2v_core.workers import WorkerPolicy

FORMAT = 1
ABOUT, INDEX, LEFT_OUT, SAMPLES = "features.json", "index.jsonl", "left_out.jsonl", "samples"
TRAINED_ON = "trained-on"  # the folder of features of the run's own data
LONGEST_NAME = 180  # bytes of a file's name, which most file systems end at 255
FREE = ("d2v", "run", "layers_of_run")  # of features.json: says something, decides nothing
EVERY_S = 10.0  # seconds between lines on how far it is
HELP = """d2v encode RUN [PATH] [key=value ...]

Writes what the network of a run makes of every sample at PATH, which is whatever data.path of its modality may be;
without PATH, of the data that it was trained on. The same command again goes on where it was stopped. Options of the
run's section `data` may be given too, such as data.split=dev, and train.device, train.num_threads, train.num_workers.

Options, with their defaults:
"""


@dataclass
class EncodeConfig:
    """What to keep of each sample, and where."""

    out: str | None = opt(None, "Folder to write; null = features/NAME in the run folder, NAME of PATH.")
    layers: str = opt(
        "all",
        "all, last, or numbers such as [0,4]: 0 is what the first block is given, i what comes out of block i; where a "
        "norm follows the blocks, it has the number after them.",
    )
    pool: Literal["mean", "first"] | None = opt(
        None, "mean = one vector a layer, the mean of its tokens; first = the first token; null = every token."
    )
    teacher: bool = opt(False, "The averaged weights instead of the student's.")
    untrained: bool = opt(False, "The same network with its initial weights, for comparison.")
    batch: int | None = opt(
        None, "Samples that run at once; null = as much as a micro-batch of the run. Changes rounding at most."
    )
    format: Literal["npy", "safetensors"] = opt("npy", "Of the files: one array, or one tensor by name for each layer.")
    dtype: Literal["float32", "float16"] = opt("float32", "Of the numbers in the files; they are computed in float32.")


@dataclass(frozen=True)
class Encoded:
    """What `encode_files` did. out: the folder. num_new, num_kept: samples encoded now, and found there already.

    left_out: ids of samples that cannot be read, and why.
    """

    out: Path
    num_new: int
    num_kept: int
    left_out: Mapping[str, str]


def main(argv: Sequence[str]) -> int:
    """`d2v encode RUN [PATH] key=value`: the exit status, 0 where every sample that can be read is encoded."""
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        print_help(HELP, EncodeConfig)
        return 0
    places = [word for word in words if "=" not in word or Path(word).exists()]
    if not 1 <= len(places) <= 2:
        raise UserError(f"d2v encode takes a run folder and the data to encode: d2v encode RUN PATH, not {places}.")
    values = parse_arguments([word for word in words if word not in places])
    given = {key: value for key, value in values.items() if "." in key}
    config = options(EncodeConfig, [f"{key}={value}" for key, value in values.items() if key not in given], "encode")
    done = encode_files(places[0], places[1] if len(places) == 2 else None, config, given, say=_say)
    _say(
        f"{done.num_new + done.num_kept} samples in {done.out}"
        + (f", {done.num_kept} of them from before" if done.num_kept else "")
        + "."
    )
    if done.left_out:
        named = first([f"{name}: {reason}" for name, reason in done.left_out.items()], "\n  ")
        _say(f"{len(done.left_out)} cannot be encoded ({done.out / LEFT_OUT} has them all):\n  {named}")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def encode_files(
    run: str | Path,
    path: str | Path | None = None,
    config: EncodeConfig | None = None,
    given: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Encoded:
    """Features of every sample at `path`, in a folder of their own; what is there already is not made again.

    run: a run folder. path: what data.path of its modality may be; None = the data that the run was trained on.
    config: what to keep, everything by default. given: options of the run by key that count in place of its own.
    say: is given lines about how it goes.
    Raises UserError for options that cannot work, data without a sample that can be read, a folder that holds something
    else, or a disk that is full; the same call then goes on.
    """
    config, given, run = config or EncodeConfig(), dict(given or {}), Path(run)
    wrong = [key for key in given if not key.startswith("data.") and key not in _TRAIN]
    if wrong:
        raise UserError(f"{wrong[0]} is part of the run and cannot be changed. Options of `data` can, and {_TRAIN}.")
    if config.teacher and config.untrained:
        raise UserError("teacher=true and untrained=true are two networks: give one of them.")
    if config.batch is not None and config.batch < 1:
        raise UserError(f"batch={config.batch} must be at least 1; null = as much as a micro-batch of the run.")
    where = None if path is None else existing(path, "a file or a folder", "PATH")
    loaded = load(run, teacher=config.teacher, untrained=config.untrained, given=_of_data(run, where, given))
    chosen = chosen_layers(config.layers, len(loaded.layer_names))
    out = (
        Path(config.out).expanduser()
        if config.out
        else run / "features" / (TRAINED_ON if where is None else where.name)
    )
    about = _about(loaded, config, chosen, where, {key: given[key] for key in given if key.startswith("data.")})
    about["run"] = str(run.resolve())
    _check_folder(out, about)
    dataset = loaded.modality.all_samples()
    say(dataset.describe())
    try:
        (out / SAMPLES).mkdir(parents=True, exist_ok=True)
        if not (out / ABOUT).is_file():
            write_json(out / ABOUT, about)
        return _encode(loaded, dataset, config, chosen, out, say)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}. Make room, or choose another folder with out=FOLDER; "
            "the same command goes on."
        ) from error


_TRAIN = ("train.device", "train.num_threads", "train.num_workers")


def chosen_layers(text: str, count: int) -> list[int]:
    """The numbers of the layers that `layers=text` names, of `count`, ascending. Raises UserError."""
    if text == "all":
        return list(range(count))
    if text == "last":
        return [count - 1]
    words = re.split(r"[,\s]+", text.strip("[]( )"))
    numbers = [int(word) for word in words if re.fullmatch(r"\d{1,6}", word)]
    if not numbers or len(numbers) < len(words) or max(numbers) >= count or len(set(numbers)) < len(numbers):
        raise UserError(f"layers={text} must be all, last, or numbers from 0 to {count - 1}, each once, such as [0,1].")
    return sorted(numbers)


def _of_data(run: Path, path: Path | None, given: Mapping[str, str]) -> dict[str, str]:
    """`given`, and the path in place of what the run was trained on."""
    if path is None or not (run / "config.yaml").is_file():
        return dict(given)
    data = read_yaml(run / "config.yaml").get("data")
    stored = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    own = {f"data.{key}": "[]" if isinstance(stored[key], list) else "null" for key in DATA_OF_RUN if key in stored}
    return {**own, "data.path": str(path), **given}


def _about(
    loaded: LoadedRun, config: EncodeConfig, chosen: Sequence[int], path: Path | None, given: Mapping[str, str]
) -> dict[str, Any]:
    """What decides about the numbers in the files, and whose they are."""
    names = loaded.layer_names
    if loaded.checkpoint is None:
        digest = hashlib.sha256(loaded.config.to_yaml().encode()).hexdigest()
    else:
        digest = checkpoint.digest_of(loaded.checkpoint)
    return {
        "format": FORMAT,
        "d2v": __version__,
        "modality": loaded.config.modality,
        "run": "",
        "weights": "untrained" if config.untrained else "teacher" if config.teacher else "student",
        "checkpoint": None if loaded.checkpoint is None else loaded.checkpoint.name,
        "sha256": digest,
        "data": None if path is None else str(path),
        "options": dict(sorted(given.items())),
        "layers": [names[i] for i in chosen],
        "layers_of_run": list(names),
        "pool": config.pool,
        "files": config.format,
        "dtype": config.dtype,
    }


def _check_folder(out: Path, about: Mapping[str, Any]) -> None:
    """That `out` is new, empty, or holds features of the same making. Raises UserError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / ABOUT).is_file():
        raise UserError(f"out={out} is there and holds no features. Nothing is overwritten: give another folder.")
    try:
        stored: dict[str, Any] = json.loads((out / ABOUT).read_text(encoding="utf-8"))
        changed = [key for key in about if key not in FREE and stored.get(key) != about[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{out / ABOUT} cannot be read: {error}. Give another folder with out=FOLDER.") from error
    if changed:
        lines = "\n  ".join(f"{key}: there {stored.get(key)!r}, now {about[key]!r}" for key in changed)
        raise UserError(
            f"out={out} holds features that were made otherwise, and nothing is overwritten:\n  {lines}\n"
            "Give another folder with out=FOLDER, or remove that one."
        )


def _encode(
    loaded: LoadedRun,
    dataset: Dataset[Any],
    config: EncodeConfig,
    chosen: Sequence[int],
    out: Path,
    say: Callable[[str], None],
) -> Encoded:
    train = loaded.config.train
    device = pick_device(replace(loaded.config, train=replace(train, precision="fp32")))
    if train.num_threads:
        torch.set_num_threads(train.num_threads)
    loaded.to(device)
    rows = dict(_rows_there(out, config))
    _write_lines(out / INDEX, list(rows.values()))  # without a last line that was cut short
    num_kept = len(rows)
    todo = [i for i in range(len(dataset)) if dataset.id(i) not in rows]
    left_out = dict(dataset.left_out)
    said = time.monotonic()
    with (out / INDEX).open("a", encoding="utf-8") as index:
        policy = WorkerPolicy(train.worker_failures, train.worker_timeout, say)
        for batch in whole_batches(loaded.modality, dataset, todo, config.batch, train.num_workers, policy):
            left_out.update(batch.skipped)
            for name, grid, features in _features(loaded, batch.to(device), config, chosen) if batch.ids else ():
                rows[name] = _write(out, name, grid, features, [loaded.layer_names[i] for i in chosen], config)
                index.write(json.dumps(rows[name]) + "\n")
            index.flush()
            if time.monotonic() - said > EVERY_S:
                said = time.monotonic()
                say(f"{len(rows) - num_kept} of {len(todo)} samples")
    order = [name for i in range(len(dataset)) if (name := dataset.id(i)) in rows]
    _write_lines(out / INDEX, [rows[name] for name in (*order, *sorted(rows.keys() - set(order)))])
    _write_lines(out / LEFT_OUT, [{"id": name, "reason": reason} for name, reason in sorted(left_out.items())])
    if not rows:
        named = first([f"{name}: {reason}" for name, reason in left_out.items()], "\n  ") or "there is none"
        raise UserError(f"None of the samples can be encoded:\n  {named}")
    return Encoded(out, len(rows) - num_kept, num_kept, left_out)


def _features(
    loaded: LoadedRun, batch: Batch, config: EncodeConfig, chosen: Sequence[int]
) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """(id, grid, (layers, tokens, width) or (layers, width) float32) of each sample of a batch."""
    view, layers = all_layers(loaded.student, batch.inputs)
    kept = torch.stack([layers[i].float() for i in chosen], 1).cpu()  # (B, layers, E + T, D)
    for row, name in enumerate(batch.ids):
        x = kept[row, :, view.num_extra :]
        grid = list(view.grid)
        if view.padding_mask is not None:
            valid = ~view.padding_mask[row, view.num_extra :].cpu()
            x = x[:, valid]
            grid = [int(last) + 1 for last in valid.view(view.grid).nonzero().amax(0)]
        if config.pool is not None:
            x = x.mean(1) if config.pool == "mean" else kept[row, :, 0]
        yield name, grid, x.numpy()


# ------------------------------------------------------------------------------------------------------- files


def file_name(name: str) -> str:
    """The path below `samples/`, without its ending, of the sample with this id; another for every other id.

    Slashes stay, so that the files lie in folders as the data does; what a file system may not take is written %XX.
    """
    parts: list[str] = []
    for part in name.split("/"):
        safe = quote(part, safe=" ()[]{}+,;=@!#$&'", errors="surrogateescape")
        if safe in ("", ".", ".."):
            safe = "%" + safe.encode().hex()
        if len(safe) > LONGEST_NAME:
            digest = hashlib.blake2b(safe.encode(), digest_size=8).hexdigest()
            safe = f"{safe[: LONGEST_NAME - 20]}%{digest}"
        parts.append(safe)
    return "/".join(parts)


def _write(
    out: Path, name: str, grid: list[int], features: np.ndarray, layers: Sequence[str], config: EncodeConfig
) -> dict[str, Any]:
    """Whole or not at all; the line of the index."""
    file = f"{SAMPLES}/{file_name(name)}.{config.format}"
    path = out / file
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.tmp")
    numbers = features.astype(config.dtype)
    if config.format == "npy":
        with temporary.open("wb") as handle:
            np.save(handle, numbers)
    else:
        try:
            save_file({layer: numbers[i].copy() for i, layer in enumerate(layers)}, temporary)
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(str(error)) from error
    temporary.replace(path)
    return {"id": name, "file": file, "shape": list(features.shape), "grid": grid}


def _rows_there(out: Path, config: EncodeConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of the index whose files are there and whole."""
    try:
        lines = (out / INDEX).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row: dict[str, Any] = json.loads(line)
            if _shape(out / row["file"], config) == row["shape"]:
                yield row["id"], row
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue  # a line or a file that an interruption cut short: made again


def _shape(path: Path, config: EncodeConfig) -> list[int]:
    """Of the array in a file; what a file lacks of what its header promises is an error."""
    if config.format == "npy":
        return list(np.load(path, mmap_mode="r").shape)
    with cast("Any", safe_open(path, framework="numpy")) as file:
        shapes = [list(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118 (no mapping)
    return [len(shapes), *shapes[0]]


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
