"""The door through which d2v finds this modality. Imports nothing heavy until it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2v_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from d2v_core.contract import Modality

D2V_CONTRACT = 1  # the version of the contract that this was built for


@hookimpl
def d2v_modality() -> type[Modality[Any]]:
    from d2v_mysignal.modality import MySignalModality

    return MySignalModality
