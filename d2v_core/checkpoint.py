"""Checkpoints: one folder per step, complete or not there.

    checkpoints/step-00000500/model.safetensors     student and predictor
                              teacher.safetensors   what the teacher does not share with the student
                              state.pt              optimizer and counters, loads with weights_only=True
                              meta.json             format number, versions; written last

A folder is written under a temporary name, flushed to the disk and renamed, so that an interruption leaves either the
whole checkpoint or none.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from d2v_core import __version__
from d2v_core.errors import UserError

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """What one folder holds."""

    model: dict[str, Tensor]
    teacher: dict[str, Tensor]
    state: dict[str, Any]


def step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not the name of a checkpoint")
    return int(match.group(1))


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name) and (p / "meta.json").is_file())


def save(root: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write one checkpoint, then delete all but the newest `keep`. Raises OSError with older ones untouched."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    if (final / "meta.json").is_file():
        return final
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file(_plain(checkpoint.model), temporary / "model.safetensors")
        save_file(_plain(checkpoint.teacher), temporary / "teacher.safetensors")
        torch.save(checkpoint.state, temporary / "state.pt")
        meta = {"format": FORMAT, "d2v": __version__, "torch": str(torch.__version__), "step": step}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(root)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (SafetensorError, RuntimeError)):  # what the two libraries make of a full disk
            raise OSError(str(error)) from error
        raise
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return final


def load(folder: Path, device: torch.device | None = None) -> Checkpoint:
    """Raises UserError naming the file that is missing, damaged or of an unknown format."""
    where = "cpu" if device is None else str(device)
    name = "meta.json"
    try:
        meta = json.loads((folder / name).read_text(encoding="utf-8"))
        found = cast("dict[str, Any]", meta).get("format") if isinstance(meta, dict) else None
        if found != FORMAT:
            raise UserError(
                f"{folder} has checkpoint format {found}, this d2v ({__version__}) reads format {FORMAT}. "
                "Install the version that wrote it."
            )
        model = load_file(folder / (name := "model.safetensors"), device=where)
        teacher = load_file(folder / (name := "teacher.safetensors"), device=where)
        state = torch.load(folder / (name := "state.pt"), map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        # torch's own words on a pickle that it refuses advise to load it unsafely.
        reason = "not what was written" if isinstance(error, pickle.UnpicklingError) else str(error)
        raise UserError(
            f"The checkpoint {folder} cannot be read: {name}: {reason}. Delete it to use the one before."
        ) from error
    return Checkpoint(model, teacher, cast("dict[str, Any]", state))


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
