"""The door through which d2v finds this modality. Imports nothing heavy until it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2v_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from d2v_core.contract import Modality

D2V_CONTRACT = 1


@hookimpl
def d2v_modality() -> type[Modality[Any]]:
    """The modality; torch is imported here and not before."""
    from d2v_vision.modality import VisionModality

    return VisionModality
