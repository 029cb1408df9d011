"""Every public name says what it is: modules, classes, functions and methods of the core and of its modalities; every
argument of what `import d2v_core` offers, of the hooks and of a plugin author's tests; every option."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import d2v_core
from d2v_core import contract, plugins
from d2v_core.config import CORE_SECTIONS, KEYS, option_rows

ROOT = Path(__file__).parents[2]
PACKAGES = ("d2v_core", "modalities/audio/d2v_audio", "modalities/text/d2v_text", "modalities/vision/d2v_vision")
FILES = [
    path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if "template" not in path.parts
]
MADE_BY_LOADING = {"LoadedRun", "LoadedClassifier", "LoadedFinetuned", "Recognizer"}  # nobody calls their __init__


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[2:] if parts[0] == "modalities" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own(module: Any) -> Iterator[tuple[str, Any]]:
    """Public functions and classes that are defined in a module."""
    for name, one in vars(module).items():
        one = inspect.unwrap(one) if callable(one) else one
        kind = inspect.isfunction(one) or inspect.isclass(one)
        if kind and name[0] != "_" and one.__module__ == module.__name__ and "<" not in one.__qualname__:
            yield name, one


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Public ones that a class defines itself, properties too; a call counts."""
    for name, one in vars(kind).items():
        if isinstance(one, (staticmethod, classmethod)):
            one = one.__func__
        one = getattr(one, "fget", None) or getattr(one, "func", None) or one  # property, cached_property
        one = inspect.unwrap(one) if callable(one) else one
        if inspect.isfunction(one) and (name[0] != "_" or name == "__call__") and one.__module__ == kind.__module__:
            yield name, one


def documented(kind: type, name: str) -> bool:
    """A method has a docstring, or does what a documented one of a class above does."""
    found = [vars(one)[name] for one in kind.__mro__ if name in vars(one) and one.__module__.startswith("d2v_")]
    return any(one.__doc__ for one in found)


def undocumented(module: Any) -> list[str]:
    missing: list[str] = []
    for name, one in own(module):
        written = not one.__doc__ or (dataclasses.is_dataclass(one) and one.__doc__.startswith(f"{name}("))
        if written:  # or by the dataclass decorator
            missing.append(name)
        if inspect.isclass(one) and not issubclass(one, tuple):
            missing += [f"{name}.{method}" for method, _ in methods(one) if not documented(one, method)
                        and method != "__call__"]  # fmt: skip
    return missing


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_public_name_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
    if path.name != "__main__.py":
        assert undocumented(importlib.import_module(module_name(path))) == []


# What docs/contract.md defines; tests/docs/test_contract_page.py sees to it that each is there.
TERMS = {
    name
    for _, part in own(contract)
    if inspect.isclass(part)
    for name in (
        *(field.name for field in (dataclasses.fields(part) if dataclasses.is_dataclass(part) else ())),
        *(argument for _, method in methods(part) for argument in inspect.signature(method).parameters),
    )
}


def unsaid(one: Any, text: str) -> list[str]:
    """Arguments that neither the docstring names nor the contract defines, other than dataclasses of options, whose
    every field has a sentence."""
    missing: list[str] = []
    for name, parameter in inspect.signature(one).parameters.items():
        options = str(parameter.annotation).endswith("Config")
        if name != "self" and not options and name not in TERMS and not re.search(rf"\b{name}\b", text):
            missing.append(name)
    return missing


def api() -> list[Any]:
    """What users of the library and authors of plugins call."""
    from d2v_audio import recognize
    from d2v_core import features, finetune, run, testing

    names = [getattr(d2v_core, name) for name in d2v_core.__all__ if name != "__version__"]
    more = [features.encode_files, features.Encoded, finetune.LoadedClassifier, finetune.LoadedFinetuned, run.LoadedRun,
            testing.Conformance, testing.check, recognize.Recognizer, recognize.load_recognizer]  # fmt: skip
    return [*names, *more]


@pytest.mark.parametrize("one", api(), ids=lambda one: one.__name__)
def test_every_argument_of_the_library_is_explained(one: Any) -> None:
    if inspect.isfunction(one):
        assert unsaid(one, one.__doc__ or "") == []
        return
    about = one.__doc__ or ""
    for name, method in methods(one):
        assert unsaid(method, f"{about} {method.__doc__}") == [], name
    made = vars(one).get("__init__")
    if inspect.isfunction(made) and not dataclasses.is_dataclass(one) and one.__name__ not in MADE_BY_LOADING:
        assert unsaid(made, f"{about} {made.__doc__}") == [], "__init__"


def sections() -> dict[str, type]:
    """Every dataclass of options, by who has it."""
    found = {f"core: {name}": kind for name, kind in CORE_SECTIONS.items()}
    for modality in ("audio", "text", "vision"):
        kind = plugins.load(modality)
        for method in kind.methods:
            for encoder in kind.encoders:
                first = method == kind.methods[0]
                for name, section in (
                    kind.sections(encoder) if first else kind.method_sections(encoder, method)
                ).items():
                    found[f"{modality}: {name} {section.__name__}"] = section
        found |= {f"{modality}: {name}": section for name, section in kind.task_sections().items()}
    return found


@pytest.mark.parametrize("kind", sections().values(), ids=sections().keys())
def test_every_option_has_a_sentence(kind: type) -> None:
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    rows = list(option_rows(kind))
    assert rows and all(doc.endswith((".", ")")) for _, _, _, doc in rows)


def test_every_key_has_a_sentence() -> None:
    assert all(doc.endswith(".") for _, doc in KEYS.values())


def test_the_page_of_options_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("write_options", ROOT / "docs" / "write_options.py")
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert writer.PAGE.read_text(encoding="utf-8") == writer.page(), "run: python docs/write_options.py"


def test_the_rules_find_what_is_missing() -> None:
    """Of a module with a fault of each kind."""
    import types

    module = types.ModuleType("d2v_faulty")
    code = '''
class Bare: pass
class Base:
    """Documented."""
    def told(self, colour):
        """Of a colour."""
    def silent(self, weight): pass
    def _private(self): pass
class Sub(Base):
    """Documented."""
    def told(self, colour): pass
    @property
    def mute(self): return 1
def plain(): pass
'''
    sys.modules["d2v_faulty"] = module
    try:
        exec(code, vars(module))
        assert undocumented(module) == ["Bare", "Base.silent", "Sub.mute", "plain"]
        base = vars(module)["Base"]
        assert unsaid(base.told, "Of a colour.") == [] and unsaid(base.silent, "") == ["weight"]
    finally:
        del sys.modules["d2v_faulty"]
