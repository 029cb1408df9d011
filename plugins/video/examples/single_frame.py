"""The action probe on clips that do not move: every frame is the middle one. What then is told is told without motion.

python plugins/video/examples/single_frame.py RUN
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import d2v_core
from d2v_core.probe import layers_of, run_probe
from d2v_video.data import Labelled


def still(samples: Sequence[Labelled]) -> list[Labelled]:
    """The same samples with the middle frame in place of each."""
    frozen: list[Labelled] = []
    for inputs, label in samples:
        clip = inputs["clip"]  # (1, 3, F, S, S)
        middle = clip.shape[2] // 2
        frozen.append(({"clip": clip[:, :, middle : middle + 1].expand_as(clip).contiguous()}, label))
    return frozen


def main(folder: str) -> None:
    run = d2v_core.load(folder)
    task = run.modality.probe()
    assert task is not None
    task = replace(task, train=still(task.train), dev=still(task.dev), test=still(task.test))
    for row in run_probe(task, {"pretrained": partial(layers_of, run.student)}):
        print(f"{row.system}: " + ", ".join(f"{value:.1f} % ({n} labels)" for n, value in row.accuracy.items()))


if __name__ == "__main__":
    main(sys.argv[1])
