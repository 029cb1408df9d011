"""Checkpoints: one folder per step, complete or not there, and checked when it is read.

    checkpoints/step-00000500/model.safetensors     student and predictor
                              teacher.safetensors   what the teacher does not share with the student
                              state.safetensors     the tensors of the optimizer
                              state.json            its numbers, and the counters
                              manifest.json         versions, and a digest of all of the above; written last

A folder is written under a temporary name, flushed to the disk and renamed, so that an interruption leaves either the
whole checkpoint or none. The manifest has name, shape, type and digest (XXH3, 128 bits) of every tensor, and a digest
of what else the files hold and of itself: no bit of a checkpoint changes unnoticed by accident. (Against somebody who
means it a digest that lies beside the file is no help, whichever it is.) There is no pickle in a checkpoint.

Formats 1 (`state.pt`, `meta.json`, no digests) and 2 (SHA-256, which costs more time than writing) are still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from d2v_core import __version__
from d2v_core.errors import UserError

FORMAT = 3
_DIGESTS = {2: "sha256", 3: "xxh3_128"}  # by format; also what a digest is called in the manifest
MANIFEST = "manifest.json"
_OLD_MANIFEST = "meta.json"  # of format 1
_WEIGHTS = ("model.safetensors", "teacher.safetensors")
_STATE = "state.safetensors"
_NUMBERS = "state.json"
_NAME = re.compile(r"step-(\d{8})")


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """What one folder holds. state: nested mappings, lists and tuples of tensors, numbers, texts and None."""

    model: dict[str, Tensor]
    teacher: dict[str, Tensor]
    state: dict[str, Any]


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder. Raises ValueError where it is no such name."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not the name of a checkpoint")
    return int(match.group(1))


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name) and _is_complete(p))


def _is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or (folder / _OLD_MANIFEST).is_file()


def save(root: Path, step: int, checkpoint: Checkpoint, keep: int, keep_every: int | None = None) -> Path:
    """Write one checkpoint, then delete all but the newest `keep` and those of every `keep_every`-th step.

    Raises OSError with older ones untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    if _is_complete(final):
        return final
    for left in root.glob(".step-*.tmp"):  # of processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = root / f".{final.name}.tmp"
    temporary.mkdir()
    try:
        _write(temporary, step, checkpoint)
        _flush(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(root)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (SafetensorError, RuntimeError)):  # what the two libraries make of a full disk
            raise OSError(str(error)) from error
        raise
    for old in list_checkpoints(root)[:-keep]:
        if keep_every is None or step_of(old) % keep_every:
            shutil.rmtree(old)
    return final


def _write(folder: Path, step: int, checkpoint: Checkpoint) -> None:
    state_tensors: dict[str, Tensor] = {}
    numbers = (json.dumps(_packed(checkpoint.state, "", state_tensors), indent=1) + "\n").encode()
    tensors = dict(zip(_WEIGHTS, (checkpoint.model, checkpoint.teacher), strict=True)) | {_STATE: state_tensors}
    plain = {name: _plain(each) for name, each in tensors.items()}
    kind = _DIGESTS[FORMAT]
    files: dict[str, Any] = {_NUMBERS: {kind: _digest(numbers, kind)}}
    # The digests are of the tensors in memory, made while the disk flushes their file. It is the flush that runs
    # beside, since it needs no interpreter lock: two threads that hash and write wait for that lock at every tensor.
    with ThreadPoolExecutor(1) as beside:
        for name, each in plain.items():
            save_file(each, folder / name)
            flushed = beside.submit(_flush, folder / name)
            files[name] = {"header": _digest(_header(folder / name), kind), "tensors": _rows(each, kind)}
            flushed.result()
    (folder / _NUMBERS).write_bytes(numbers)
    _flush(folder / _NUMBERS)
    manifest = {"format": FORMAT, "d2v": __version__, "torch": str(torch.__version__), "step": step, "files": files}
    (folder / MANIFEST).write_text(_signed(manifest, kind), encoding="utf-8")
    _flush(folder / MANIFEST)


def load(folder: Path, device: torch.device | None = None, *, state: bool = True) -> Checkpoint:
    """Read and check a checkpoint. state: also what only a resumed run needs.

    Raises DamagedCheckpoint naming the file that is missing or not what was written, UserError for an unknown format.
    """
    name = MANIFEST if (folder / MANIFEST).is_file() else _OLD_MANIFEST
    try:
        text = (folder / name).read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        found = cast("object", manifest.get("format") if isinstance(manifest, dict) else None)  # pyright: ignore
        if not isinstance(found, int):
            raise ValueError("it has no format number")
        kind = _DIGESTS.get(found, _DIGESTS[FORMAT])
        if found not in (_DIGESTS if name == MANIFEST else (1,)):
            if name == MANIFEST:
                _check_signature(manifest, text, kind)  # a format that is to come, or a damaged number
            raise UserError(
                f"{folder} has checkpoint format {found}, this d2v ({__version__}) reads formats 1 to {FORMAT}. "
                "Install the version that wrote it."
            )
        if found == 1:
            return _load_format1(folder, device, state)
        _check_signature(manifest, text, kind)
        model, teacher = (_load_tensors(folder / (name := file), manifest, kind) for file in _WEIGHTS)
        rest: dict[str, Any] = {}
        if state:
            tensors = _load_tensors(folder / (name := _STATE), manifest, kind)
            numbers = (folder / (name := _NUMBERS)).read_bytes()
            if _digest(numbers, kind) != manifest["files"][_NUMBERS][kind]:
                raise ValueError("its digest is not that of the manifest")
            rest = _unpacked(json.loads(numbers), tensors)
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise _damaged(folder, name, str(error)) from error
    if device is not None:
        model, teacher = ({key: t.to(device) for key, t in part.items()} for part in (model, teacher))
    return Checkpoint(model, teacher, rest)


def digest_of(folder: Path) -> str:
    """SHA-256 that stands for all that a checkpoint holds: of its manifest, or, in format 1, of its weights.

    Of a checkpoint that was loaded: what the manifest says of the other files is checked there. Raises OSError.
    """
    names = (MANIFEST,) if (folder / MANIFEST).is_file() else _WEIGHTS
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that none is taken for it and its step can be saved again."""
    target, number = folder.with_name(f"damaged-{folder.name}"), 2
    while target.exists():
        target, number = folder.with_name(f"damaged-{folder.name}-{number}"), number + 1
    return folder.rename(target)


def _damaged(folder: Path, name: str, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"The checkpoint {folder} cannot be read: {name}: {reason}. Delete it to use the one before."
    )


def _load_format1(folder: Path, device: torch.device | None, state: bool) -> Checkpoint:
    where = "cpu" if device is None else str(device)
    name = _WEIGHTS[0]
    try:
        model = load_file(folder / name, device=where)
        teacher = load_file(folder / (name := _WEIGHTS[1]), device=where)
        name = "state.pt"
        rest: Any = torch.load(folder / name, map_location="cpu", weights_only=True) if state else {}
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        # torch's own words on a pickle that it refuses advise to load it unsafely.
        reason = "not what was written" if isinstance(error, pickle.UnpicklingError) else str(error)
        raise _damaged(folder, name, reason) from error
    return Checkpoint(model, teacher, rest)


# ------------------------------------------------------------------------------------------------------- digests


def _digest(data: bytes | memoryview, kind: str) -> str:
    return hashlib.sha256(data).hexdigest() if kind == "sha256" else xxhash.xxh3_128_hexdigest(data)


def _rows(tensors: Mapping[str, Tensor], kind: str) -> dict[str, dict[str, Any]]:
    """What the manifest says of each tensor."""
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            kind: _digest(tensor.reshape(-1).view(torch.uint8).numpy().data, kind),
        }
        for name, tensor in tensors.items()
    }


def _header(path: Path) -> bytes:
    """The bytes of a safetensors file before its tensors: eight that hold the length of what follows, and that."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        return start + file.read(length)


def _load_tensors(path: Path, manifest: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
    expected = manifest["files"][path.name]
    if _digest(_header(path), kind) != expected["header"]:
        raise ValueError("its header is not the one that the manifest has the digest of")
    tensors = load_file(path)
    rows = _rows(tensors, kind)
    changed = [name for name in expected["tensors"].keys() | rows if rows.get(name) != expected["tensors"].get(name)]
    if changed:
        raise ValueError(f"{len(changed)} of {len(rows)} tensors are not what was written, among them {min(changed)}")
    return tensors


def _signed(manifest: Mapping[str, Any], kind: str) -> str:
    """The manifest as text, with a digest of itself."""
    body = json.dumps(manifest, indent=1)
    return json.dumps({**manifest, kind: _digest(body.encode(), kind)}, indent=1) + "\n"


def _check_signature(manifest: Mapping[str, Any], text: str, kind: str) -> None:
    if _signed({key: value for key, value in manifest.items() if key != kind}, kind) != text:
        raise ValueError("its digest of itself is wrong")


# ------------------------------------------------------------------------------------------------------- contents


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state as JSON. Its tensors go to `tensors` under their path; keys that are numbers stay numbers."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        items = cast("Mapping[str | int, Any]", value).items()
        return {"mapping": [[key, _packed(each, f"{path}.{key}".lstrip("."), tensors)] for key, each in items]}
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[Any]", value)
        name = "tuple" if isinstance(value, tuple) else "list"
        return {name: [_packed(each, f"{path}.{i}".lstrip("."), tensors) for i, each in enumerate(items)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path} is {type(value).__name__}, which a checkpoint cannot hold")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = cast("dict[str, Any]", value).items()
    if kind == "tensor":
        return tensors[content]
    if kind == "mapping":
        return {key: _unpacked(each, tensors) for key, each in content}
    items = [_unpacked(each, tensors) for each in content]
    return tuple(items) if kind == "tuple" else items


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors on the host. Of tensors that share memory (tied weights) all but the first are copies, since the
    format holds each by itself."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return plain


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
