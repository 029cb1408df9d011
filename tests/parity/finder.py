"""Finds fixtures by what is in them: whatever lies under a folder takes part, no name is known here.

Two recorders wrote two layouts. One has NAME.json with weights called `w.student.*`, the other NAME.meta.json with
`student.*`; Hugging Face cases are a folder each, meta.json with io.safetensors. `Fixture` hides the difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

RECORDED = Path(__file__).parent / "recorded"


@dataclass(frozen=True)
class Layout:
    """Prefixes of tensor names."""

    student: str
    teacher: str
    teacher_after: str
    inputs: str


LAYOUTS = (
    Layout("w.student.", "w.teacher.", "after_ema.", "in."),
    Layout("student.", "teacher.", "teacher_after.", "input."),
)


@dataclass(frozen=True)
class Fixture:
    """One recorded case.

    path: its JSON file. family: folder under the root, "audio" or "hf/audio". kind: what was recorded (single_step,
    training_steps, mask_statistics, ...). model: the implementation it came from, in its recorder's words.
    """

    path: Path
    family: str
    name: str
    kind: str
    model: str
    meta: Mapping[str, Any]
    tensor_path: Path | None

    @property
    def id(self) -> str:
        return f"{self.family}/{self.name}"

    @property
    def config(self) -> Mapping[str, Any]:
        return self.meta["config"]

    @property
    def grad_norms(self) -> Mapping[str, float | None]:
        return self.meta.get("grad_norms_of_loss_sum") or self.meta.get("grad_norms") or {}

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        return load_file(self.tensor_path) if self.tensor_path else {}

    @cached_property
    def layout(self) -> Layout:
        return LAYOUTS[0] if any(name.startswith("w.") for name in self.tensors) else LAYOUTS[1]


def find(root: Path) -> list[Fixture]:
    """Every fixture under a folder, in a stable order. A JSON file that lists tensors but fits no known pattern is
    returned as kind "unknown", so that nobody checks less than there is."""
    return [fixture for path in sorted(root.rglob("*.json")) if (fixture := _read(path, root)) is not None]


def _read(path: Path, root: Path) -> Fixture | None:
    meta = json.loads(path.read_text())
    if not isinstance(meta, dict):
        return None
    folder, name = path.parent, path.name.removesuffix(".json").removesuffix(".meta")
    tensors: Path | None = folder / f"{name}.safetensors"
    if name == "meta" and "model_class" in meta:
        folder, name, tensors = folder.parent, folder.name, folder / "io.safetensors"
        kind = "hidden_states"
    elif "stats" in meta or "settings" in meta:
        kind = "mask_statistics"
        tensors = folder / f"{name.replace('_stats_', '_draws_')}.safetensors"
    elif "kind" in meta:
        kind = meta["kind"]
    elif {"ema", "grad_of"} <= meta.keys():
        kind = "single_step"
    elif "tensors" in meta:
        kind = "unknown"
    else:
        return None  # a configuration that lies beside a fixture
    model = next((meta[key] for key in ("model", "model_class", "function", "generator") if key in meta), "")
    family = folder.relative_to(root).as_posix()
    return Fixture(path, family, name, kind, model, meta, tensors if tensors and tensors.is_file() else None)


def root_of(config: pytest.Config) -> Path:
    """--parity-root, or ../shared/parity beside the repository, or the copy in the repository."""
    given = config.getoption("--parity-root")
    if given is not None:
        root = Path(given)
        if not root.is_dir():
            raise pytest.UsageError(f"--parity-root={given} is not a folder")
        return root
    beside = config.rootpath.parent / "shared" / "parity"
    return beside if beside.is_dir() else RECORDED


def parameters(fixtures: list[Fixture], wanted: Callable[[Fixture], bool], skip: Mapping[str, str]) -> list[Any]:
    """pytest parameters for the wanted fixtures; those of a kind in `skip` are skipped with its reason."""
    return [
        pytest.param(f, id=f.id, marks=[pytest.mark.skip(reason=skip[f.kind])] if f.kind in skip else [])
        for f in fixtures
        if wanted(f)
    ]


def parametrize(metafunc: pytest.Metafunc, wanted: Callable[[Fixture], bool], skip: Mapping[str, str]) -> None:
    """A test with an argument `fixture` runs once for each that is wanted."""
    if "fixture" in metafunc.fixturenames:
        metafunc.parametrize("fixture", parameters(find(root_of(metafunc.config)), wanted, skip))


def whole_recording(config: pytest.Config) -> list[Fixture]:
    """Every fixture. Skips the test where there is no more than the copy in the repository."""
    root = root_of(config)
    if root.resolve() == RECORDED.resolve():
        pytest.skip("the copy in the repository holds audio alone; give --parity-root FOLDER")
    return find(root)


def pick(fixtures: list[Fixture], kind: str, where: Callable[[Fixture], bool] = lambda _: True) -> Fixture:
    """The first fixture of a kind with a property. Skips the test where the folder has none."""
    for fixture in fixtures:
        if fixture.kind == kind and where(fixture):
            return fixture
    pytest.skip(f"no fixture of kind {kind} with what this test is about; the full set has one")
