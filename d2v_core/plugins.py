"""Finds modalities by name among the installed distributions and loads exactly one.

A modality is an entry point in the group `d2v.modalities`: its name is the modality's name, its value a module with
the hook `d2v_modality`. Listing reads metadata only, so a broken plugin cannot stop a run of another modality.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, cast

from d2v_core.errors import UserError

if TYPE_CHECKING:
    from d2v_core.contract import Modality

GROUP = "d2v.modalities"
COMMANDS = "d2v.commands"


@dataclass(frozen=True)
class Plugin:
    """One entry point, as metadata tells it."""

    name: str
    distribution: str
    version: str
    origin: str
    """The module, and what it calls inside for a command."""


def installed(group: str = GROUP) -> list[Plugin]:
    """All entry points of a group, sorted by name; imports none of them."""
    found = {_describe(e) for e in entry_points(group=group)}
    return sorted(found, key=lambda p: (p.name, p.distribution))


def names() -> list[str]:
    return sorted({p.name for p in installed()})


def find(name: str, group: str = GROUP) -> EntryPoint:
    """The one entry point of this name. Raises UserError where there is none, or more than one distribution has it."""
    what = "modality" if group == GROUP else "command"
    found = {_describe(e): e for e in entry_points(group=group) if e.name == name}
    if not found:
        known = sorted({p.name for p in installed(group)})
        near = difflib.get_close_matches(name, known)
        raise UserError(
            f"There is no {what} {name!r}. Installed: {', '.join(known) or 'none'}."
            + (f" Did you mean {' or '.join(near)}?" if near else "")
            + (
                " A modality comes with the distribution that declares it: pip install it."
                if what == "modality"
                else ""
            )
        )
    if len(found) > 1:
        claims = " and ".join(f"{p.distribution} {p.version} ({p.origin})" for p in sorted(found, key=str))
        raise UserError(f"The {what} {name!r} is claimed by {claims}. Uninstall all but one of them.")
    return next(iter(found.values()))


def load(name: str) -> type[Modality[Any]]:
    """Import the plugin of this name and ask it for its modality. Raises UserError naming distribution and cause."""
    import pluggy

    from d2v_core import hookspecs

    entry = find(name)
    plugin = _describe(entry)
    whence = f"modality {name!r} from {plugin.distribution} {plugin.version}, module {plugin.origin}"
    try:
        module = import_module(entry.value)
    except Exception as error:
        raise UserError(
            f"The plugin of {whence} cannot be imported: {type(error).__name__}: {error}. "
            f"Reinstall or remove {plugin.distribution}; other modalities are not affected."
        ) from error
    manager = pluggy.PluginManager("d2v")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module, name)
        # pluggy lets a misspelled hook pass in silence unless it is asked.
        manager.check_pending()
        answers = manager.hook.d2v_modality()
    except pluggy.PluginValidationError as error:
        raise UserError(f"The plugin of {whence} has a hook that d2v does not know: {error}.") from error
    except Exception as error:
        raise UserError(f"The plugin of {whence} fails in d2v_modality(): {type(error).__name__}: {error}.") from error
    from d2v_core.contract import Modality

    if answers is None:
        raise UserError(
            f"The plugin of {whence} has no hook d2v_modality. "
            "Define `@hookimpl def d2v_modality(): return YourModality`."
        )
    if not (isinstance(answers, type) and issubclass(answers, Modality)):
        raise UserError(
            f"The plugin of {whence} returns {answers!r} from d2v_modality(); expected a subclass of d2v_core.Modality."
        )
    if answers.name != name:
        raise UserError(
            f"The plugin of {whence} brings a modality that calls itself {answers.name!r}; "
            "its `name` and the entry point's must agree."
        )
    return cast("type[Modality[Any]]", answers)


def _describe(entry: EntryPoint) -> Plugin:
    dist = entry.dist
    return Plugin(
        entry.name,
        "an unknown distribution" if dist is None else dist.name,
        "" if dist is None else dist.version,
        entry.value,
    )
