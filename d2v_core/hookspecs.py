"""The complete extension surface. Cheap to import: a plugin's module is loaded before torch is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from d2v_core.contract import Modality

hookspec = pluggy.HookspecMarker("d2v")
hookimpl = pluggy.HookimplMarker("d2v")


@hookspec(firstresult=True)
def d2v_modality() -> type[Modality[Any]]:
    """The modality that this plugin brings. Called once, when a run asks for it by name: import torch in here."""
    raise NotImplementedError
