"""What a modality promises the core, each promise as a check that explains itself. Run by `d2v_core.testing`.

A promise is a function of a `Case`: it returns a remark for the person who reads the report, or raises `Broken` with a
sentence that says what was found, what was expected and what to do. The first line of its docstring is the promise,
the rest is why it matters. No check looks into a modality: all of them use what docs/contract.md lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from d2v_core.promises.case import Broken, Case, NothingToCheck, explain
from d2v_core.promises.masking import masks, share
from d2v_core.promises.network import gradients, hiding, place, predictions, teacher
from d2v_core.promises.plugin import data, door, recipes
from d2v_core.promises.tensors import padding, shapes
from d2v_core.promises.training import bf16, compiled, determinism, learning, resume

__all__ = ["OF_THE_PLUGIN", "PROMISES", "Broken", "Case", "NothingToCheck", "explain"]

PROMISES: Mapping[str, Callable[[Case], str]] = {
    promise.__name__: promise
    for promise in (door, recipes, data, shapes, padding, masks, share, hiding, place, teacher, gradients, predictions,
                    determinism, resume, compiled, bf16, learning)
}  # fmt: skip
"""All of them by name, in the order in which they are checked: later ones build on earlier ones."""
OF_THE_PLUGIN = ("door", "recipes")
"""Those that ask the same of every case, and are asked once."""
