"""The toy's door, as a plugin's should be: it imports without torch."""

from __future__ import annotations

from d2v_core.hookspecs import hookimpl

D2V_CONTRACT = 1


@hookimpl
def d2v_modality():
    from d2v_toy import ToyModality

    return ToyModality
