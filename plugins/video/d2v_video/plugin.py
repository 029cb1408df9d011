"""The door through which d2v finds this modality. Imports nothing heavy until it is asked."""

from d2v_core.hookspecs import hookimpl

D2V_CONTRACT = 1  # the version of the contract that this was built for


@hookimpl
def d2v_modality() -> type:
    from d2v_video.modality import VideoModality

    return VideoModality
