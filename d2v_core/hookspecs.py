"""The complete extension surface. Cheap to import: a plugin's module is loaded before torch is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from d2v_core.contract import Modality, RawEncoder

CONTRACT_VERSION = 1
"""Of the contract between core and modalities (`d2v_core.contract`). Raised by a change that a plugin has to follow,
never by one that has a default.

A plugin's module says for which version it was built: `D2V_CONTRACT = 1`, a number written out, since it is read before
the module is imported. One that says nothing counts as built for version 1, which was the first.
"""

hookspec = pluggy.HookspecMarker("d2v")
hookimpl = pluggy.HookimplMarker("d2v")


@hookspec(firstresult=True)
def d2v_modality() -> type[Modality[Any]]:
    """The modality that this plugin brings. Called once, when a run asks for it by name: import torch in here."""
    raise NotImplementedError


@hookspec(firstresult=True)
def d2v_encoder() -> type[RawEncoder]:
    """The feature encoder that this plugin brings, for every modality that says what its raw values are
    (`Modality.raw`). Called when a run asks for it by name: import torch in here."""
    raise NotImplementedError
