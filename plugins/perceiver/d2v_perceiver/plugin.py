"""The door: found by d2v through the entry point `d2v.encoders`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2v_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from d2v_perceiver.encoder import PerceiverEncoder

D2V_CONTRACT = 1


@hookimpl
def d2v_encoder() -> type[PerceiverEncoder]:
    from d2v_perceiver.encoder import PerceiverEncoder  # in here: listing encoders must not import torch

    return PerceiverEncoder
