"""Finds modalities by name among the installed distributions and loads exactly one.

A modality is an entry point in the group `d2v.modalities`: its name is the modality's name, its value a module with
the hook `d2v_modality`. Listing reads metadata only, so a broken plugin cannot stop a run of another modality.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_core import __version__
from d2v_core.errors import UserError
from d2v_core.hookspecs import CONTRACT_VERSION

if TYPE_CHECKING:
    from d2v_core.contract import Modality, RawEncoder

CONTRACT_NAME = "D2V_CONTRACT"
GROUP = "d2v.modalities"
ENCODERS = "d2v.encoders"
COMMANDS = "d2v.commands"
WHAT = {GROUP: "modality", ENCODERS: "encoder", COMMANDS: "command"}


@dataclass(frozen=True)
class Plugin:
    """One entry point, as metadata tells it."""

    name: str
    distribution: str
    version: str
    origin: str
    """The module, and what it calls inside for a command."""
    contract: int | None = None
    """Of a modality or an encoder: the version of the contract that its module declares; None = it says nothing."""


def installed(group: str = GROUP) -> list[Plugin]:
    """All entry points of a group, sorted by name; imports none of them."""
    found = {_describe(e) for e in entry_points(group=group)}
    return sorted(found, key=lambda p: (p.name, p.distribution))


def names(group: str = GROUP) -> list[str]:
    return sorted({p.name for p in installed(group)})


def find(name: str, group: str = GROUP) -> EntryPoint:
    """The one entry point of this name. Raises UserError where there is none, or more than one distribution has it."""
    what = WHAT[group]
    found = {_describe(e): e for e in entry_points(group=group) if e.name == name}
    if not found:
        known = names(group)
        near = difflib.get_close_matches(name, known)
        raise UserError(
            f"There is no {what} {name!r}. Installed: {', '.join(known) or 'none'}."
            + (f" Did you mean {' or '.join(near)}?" if near else "")
            + ("" if group == COMMANDS else " It comes with the distribution that declares it: pip install it.")
        )
    if len(found) > 1:
        claims = " and ".join(f"{p.distribution} {p.version} ({p.origin})" for p in sorted(found, key=str))
        raise UserError(f"The {what} {name!r} is claimed by {claims}. Uninstall all but one of them.")
    return next(iter(found.values()))


def load(name: str) -> type[Modality[Any]]:
    """Import the plugin of this name and ask it for its modality. Raises UserError naming distribution and cause."""
    return _load(name, GROUP, "Modality")


def load_encoder(name: str) -> type[RawEncoder]:
    """The same for a plugin's encoder."""
    return _load(name, ENCODERS, "RawEncoder")


def _load(name: str, group: str, base: str) -> Any:
    """The class that the plugin of this name gives, which calls itself by that name; a sub-class of the contract's
    `base`."""
    import pluggy

    from d2v_core import hookspecs

    entry, what = find(name, group), WHAT[group]
    hook = f"d2v_{what}"
    plugin = _describe(entry)
    whence = f"{what} {name!r} from {plugin.distribution} {plugin.version}, module {plugin.origin}"
    misfit = contract_misfit(plugin)
    if misfit:
        raise UserError(f"The plugin of {whence} is refused: {misfit}")
    try:
        module = import_module(entry.value)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"The plugin of {whence} cannot be imported: {type(error).__name__}: {error}. "
            f"Reinstall or remove {plugin.distribution}; nothing else is affected."
        ) from error
    manager = pluggy.PluginManager("d2v")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module, name)
        # pluggy lets a misspelled hook pass in silence unless it is asked.
        manager.check_pending()
        answers = getattr(manager.hook, hook)()
    except pluggy.PluginValidationError as error:
        raise UserError(f"The plugin of {whence} has a hook that d2v does not know: {error}.") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"The plugin of {whence} fails in {hook}(): {type(error).__name__}: {error}.") from error
    if answers is None:
        raise UserError(
            f"The plugin of {whence} has no hook {hook}. "
            f"Define `@hookimpl def {hook}(): return Your{what.capitalize()}`."
        )
    if not (isinstance(answers, type) and issubclass(answers, getattr(import_module("d2v_core.contract"), base))):
        raise UserError(
            f"The plugin of {whence} returns {answers!r} from {hook}(); expected a subclass of d2v_core.{base}."
        )
    called = getattr(answers, "name", None)
    if called != name:
        raise UserError(
            f"The plugin of {whence} brings {'an' if group == ENCODERS else 'a'} {what} that calls itself {called!r}; "
            "its `name` and the entry point's must agree."
        )
    return answers


def contract_misfit(plugin: Plugin) -> str:
    """Why a plugin cannot work with this d2v, as a sentence; empty where it can. One that says nothing counts as built
    for version 1, the first."""
    built = 1 if plugin.contract is None else plugin.contract
    if built == CONTRACT_VERSION:
        return ""
    older = built < CONTRACT_VERSION
    return (
        f"{plugin.distribution} {plugin.version} was built for version {built} of the contract, this d2v "
        f"({__version__}) has version {CONTRACT_VERSION}. Install "
        + (f"a newer {plugin.distribution}, or an older d2v." if older else "a newer d2v.")
    )


def contract_of(entry: EntryPoint) -> int | None:
    """The number that a plugin's module assigns to D2V_CONTRACT, read from its source; None where it says none.

    Nothing is imported: a plugin of another version may fail in its first line, with an error that says nothing of the
    reason.
    """
    source = _source(entry.value.split(":")[0].strip().split("."))
    try:
        tree = ast.parse("" if source is None else Path(source).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # importing it says what is wrong
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        named = any(isinstance(target, ast.Name) and target.id == CONTRACT_NAME for target in targets)
        value = getattr(node, "value", None)
        if named and isinstance(value, ast.Constant) and isinstance(value.value, int):
            return value.value
    return None


def _source(words: Sequence[str]) -> str | None:
    """The file of a dotted module, found as an import would find it, but without importing its packages."""
    path: Sequence[str] | None = None
    spec = None
    for i in range(len(words)):
        name = ".".join(words[: i + 1])
        finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
        spec = next((found for find in finders if find and (found := find(name, path)) is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if path is None and i < len(words) - 1:
            return None
    return None if spec is None else spec.origin


def _describe(entry: EntryPoint) -> Plugin:
    dist = entry.dist
    return Plugin(
        entry.name,
        "an unknown distribution" if dist is None else dist.name,
        "" if dist is None else dist.version,
        entry.value,
        None if entry.group == COMMANDS else contract_of(entry),
    )
