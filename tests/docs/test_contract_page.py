"""docs/contract.md says everything: every hook, every method, argument and field of the contract, every public name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import d2v_core
from d2v_core import contract, hookspecs, promises, testing
from d2v_core.promises import case, training

PAGE = (Path(__file__).parents[2] / "docs" / "contract.md").read_text(encoding="utf-8")
IN_CODE = {word for span in re.findall(r"`([^`\n]+)`", PAGE) for word in re.findall(r"\w+", span)}
PARTS = [
    one for one in vars(contract).values()
    if inspect.isclass(one) and one.__module__ == contract.__name__ and not one.__name__.startswith("_")
]  # fmt: skip


def methods(kind: type) -> list[tuple[str, Any]]:
    """What a class of the contract asks or offers, its own and public; a call counts, and what makes it does not."""
    names = [n for n in vars(kind) if not n.startswith("_") or n == "__call__"]
    found = [(n, inspect.unwrap(getattr(kind, n))) for n in names]
    return [(n, getattr(f, "__func__", f)) for n, f in found if callable(f)]


def hooks() -> list[Any]:
    return [f for f in vars(hookspecs).values() if inspect.isfunction(f) and f.__module__ == hookspecs.__name__]


def test_there_is_something_to_look_at() -> None:
    assert len(PARTS) > 12 and len(hooks()) == 2 and len(methods(contract.Modality)) > 20
    assert {"prepare", "layout", "rng"} <= IN_CODE and "walrus" not in IN_CODE


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook.__name__)
def test_every_hook(hook: Any) -> None:
    assert hook.__doc__ and hook.__name__ in IN_CODE
    assert [name for name in inspect.signature(hook).parameters if name not in IN_CODE] == []


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_part_of_the_contract(part: type) -> None:
    """Its name, its fields, its methods and their arguments stand on the page, and it has a docstring of its own."""
    assert part.__dict__.get("__doc__") and part.__name__ in IN_CODE
    wanted: set[str] = set()
    if dataclasses.is_dataclass(part):
        wanted |= {field.name for field in dataclasses.fields(part)}
        for name in wanted:
            assert re.search(rf"\b{name}\b", part.__doc__ or "") or _plain(part, name), f"{part.__name__}.{name}"
    for name, method in methods(part):
        wanted |= {name} - {"__call__", "to", "pin_memory"}  # the loader's and the loop's
        if name not in ("to", "pin_memory"):
            wanted |= set(inspect.signature(method).parameters) - {"self", "cls"}
    wanted |= {name for name in getattr(part, "__annotations__", {}) if not name.startswith("_")}
    assert sorted(wanted - IN_CODE) == []


def _plain(part: type, name: str) -> bool:
    """Fields that their class's own sentence is about."""
    return name in {
        "ProbeTask": {"name", "description", "num_classes", "input_name"},
        "Task": {"name", "train"},
        "LabelledPart": {"samples"},
    }.get(part.__name__, set())


@pytest.mark.parametrize("name", [n for n in d2v_core.__all__ if n != "__version__"])
def test_every_public_name(name: str) -> None:
    one = getattr(d2v_core, name)
    assert name in IN_CODE, f"{name} stands nowhere in docs/contract.md"
    assert one.__doc__, name


KIT = [
    importlib.import_module(f"{promises.__name__}.{path.stem}") for path in Path(promises.__path__[0]).glob("[a-z]*.py")
]


@pytest.mark.parametrize("module", [contract, hookspecs, testing, *KIT], ids=lambda module: module.__name__)
def test_every_public_function_has_a_docstring(module: Any) -> None:
    for name, one in vars(module).items():
        if (inspect.isfunction(one) or inspect.isclass(one)) and one.__module__ == module.__name__ and name[0] != "_":
            assert one.__doc__ and not one.__doc__.startswith(f"{name}("), name  # dataclasses write one by themselves


def test_every_promise() -> None:
    named = re.findall(r"^\| `(\w+)` \| ", PAGE.split("## Whether a modality")[1].split("\n## ")[0], re.M)
    assert named == list(promises.PROMISES)


def test_numbers_of_the_kit() -> None:
    assert f"{training.NUM_STEPS} steps of {case.NUM_SAMPLES} samples" in PAGE
    assert f"{training.NUM_STEPS_OTHER} steps of two samples" in PAGE and case.NUM_SAMPLES_OTHER == 2
    assert f"{100 * training.MOST_LEFT:.0f} % of what it was" in PAGE
    assert f"D2V_CONTRACT = {contract.CONTRACT_VERSION}`" in PAGE
