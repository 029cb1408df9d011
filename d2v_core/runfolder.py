"""The run folder: where it lies, what may be in it already, what is written first."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from d2v_core import plugins
from d2v_core.config import RunConfig, from_dict, read_yaml
from d2v_core.errors import UserError
from d2v_core.jointconfig import JointConfig, from_stored

# Changing these between the parts of a run changes none of its numbers.
FREE = {"out", "resume", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every",
        "train.bad_steps_limit", "train.num_workers", "train.tensorboard", "train.probe", "train.device",
        "train.compile", "train.num_threads", "train.worker_failures", "train.worker_timeout", "launch.processes",
        "launch.strategy", "launch.activation_checkpointing", "launch.backend", "launch.timeout",
        "launch.max_restarts"}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """new: made by this call. done: the run in it has all its steps."""

    path: Path
    new: bool
    done: bool


def open_run(config: RunConfig | JointConfig) -> RunFolder:
    """Create the run folder, or take up the run in it where `resume=auto` asks for that.

    Raises UserError where the folder holds something else, the stored run has another configuration, or nothing can be
    written there.
    """
    path = Path(config.out) if config.out else _new_name(config)
    stored = path / "config.yaml"
    new, done = True, False
    try:
        if stored.is_file() and config.resume == "auto":
            new = False
            _compare(read_yaml(stored), config, path)
            done = _steps_done(path) >= config.train.max_steps
        elif path.exists() and not path.is_dir():
            raise UserError(f"out={path} is a file; give a folder for the run.")
        elif path.is_dir() and any(path.iterdir()):
            raise UserError(
                f"out={path} is not empty (it holds a run), and nothing there is overwritten. Go on with that run by "
                "resume=auto, or give another folder."
                if stored.is_file()
                else f"out={path} is not empty and holds no run (no config.yaml). Nothing there is overwritten: give a "
                "new or an empty folder."
            )
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        if not done:
            temporary = path / ".config.yaml.tmp"
            temporary.write_text(config.to_yaml(), encoding="utf-8")
            temporary.replace(stored)
    except OSError as error:
        raise UserError(
            f"The run folder out={path} cannot be written: {error.strerror or error}. "
            "Choose a folder that you may write to with out=FOLDER."
        ) from error
    return RunFolder(path, new, done)


def drop_unused(path: Path) -> None:
    """Remove a run folder in which nothing came about: no checkpoint, no line of metrics, nothing of anybody else's."""
    try:
        (path / "checkpoints").rmdir()
        if {child.name for child in path.iterdir()} == {"config.yaml"}:
            (path / "config.yaml").unlink()
            path.rmdir()
        else:
            (path / "checkpoints").mkdir()
    except OSError:
        return  # in use


def _new_name(config: RunConfig | JointConfig) -> Path:
    what = config.preset if config.stage == "pretrain" else config.stage
    stem = f"{config.modality}-{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path("runs") / stem
    number = 2
    while path.exists():
        path, number = Path("runs") / f"{stem}-{number}", number + 1
    return path


def _steps_done(path: Path) -> int:
    try:
        return int(json.loads((path / "summary.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _compare(stored: Mapping[str, Any], config: RunConfig | JointConfig, path: Path) -> None:
    """A resumed run must be the same run; only a larger train.max_steps may prolong it."""
    if "modality" not in stored:
        raise UserError(
            f"{path / 'config.yaml'} is damaged: it has no key `modality`. Restore it from a copy, or start anew with "
            "another out=FOLDER."
        )
    if isinstance(stored["modality"], list) or isinstance(config, JointConfig):
        old, new = _typed(stored["modality"]), _typed(config.to_dict()["modality"])
        if old != new:
            raise UserError(f"The run in {path} has modality={old}, not {new}. Give another out=FOLDER.")
    now = _flatten(config.to_dict())
    before = {**_defaults(stored, config, path), **_flatten(stored)}
    changed = {
        key: (before.get(key), now.get(key))
        for key in before.keys() | now.keys()
        if key not in FREE and before.get(key) != now.get(key)
    }
    old_steps, new_steps = changed.get("train.max_steps", (0, 1))
    if isinstance(old_steps, int) and isinstance(new_steps, int) and new_steps > old_steps:
        changed.pop("train.max_steps", None)
    if changed:
        lines = "\n  ".join(f"{key}: stored {old!r}, now {new!r}" for key, (old, new) in sorted(changed.items()))
        raise UserError(
            f"The run in {path} has another configuration, and resuming it would mix the two:\n  {lines}\n"
            "Give the stored values, or start a new run"
            + (f" with from={path}." if stored.get("stage", "pretrain") == "pretrain" else " with another out=FOLDER.")
        )


def _defaults(stored: Mapping[str, Any], config: RunConfig | JointConfig, path: Path) -> dict[str, Any]:
    """Every option with the value that it has where a stored run says nothing, as one does that is older than it."""
    source = str(path / "config.yaml")
    try:
        if isinstance(config, JointConfig):
            return _flatten(from_stored(stored, source).to_dict())
        if stored["modality"] != config.modality:
            return {}
        return _flatten(from_dict(stored, plugins.load(config.modality), source).to_dict())
    except UserError:
        return {}  # what is wrong with it is among what differs


def _typed(modality: Any) -> str:
    """As the user types it."""
    return f"[{','.join(map(str, cast('list[Any]', modality)))}]" if isinstance(modality, list) else str(modality)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(cast("dict[str, Any]", value), f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
