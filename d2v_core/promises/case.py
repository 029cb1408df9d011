"""What a promise is held against: one method and encoder of a modality, a few of its samples, its network."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# torch leaves much of what is used here untyped.
from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from d2v_core import run
from d2v_core.config import load_config
from d2v_core.contract import (
    BadSample,
    Batch,
    Batching,
    Dataset,
    FeatureEncoder,
    Layout,
    MaskingPolicy,
    Masks,
    Modality,
    Tokens,
)
from d2v_core.data2vec import Data2Vec
from d2v_core.keyed import generator

NUM_SAMPLES = 8  # of median size, in a step of training
NUM_SAMPLES_OTHER = 2
LONGER = 1.3  # times the size of the first sample, where there is one as long
MOST_TRIED = 50  # samples, in search of one that can be read
TOLERANCE = 1e-4  # between two ways to compute the same float32 numbers, over their size
SAME = 1e-5  # below this share of their size, two vectors are one


class Broken(Exception):
    """A promise that is not kept: what was found, what was expected, what to do."""


class NothingToCheck(Exception):
    """This case gives a promise nothing to hold; the reason."""


@dataclass(frozen=True)
class Mini:
    """A few prepared samples, and what the modality makes of them."""

    samples: list[Any]
    layouts: list[Layout]
    inputs: Mapping[str, Tensor]

    @property
    def num_tokens(self) -> int:
        """Of the longest sample."""
        return max(layout.num_tokens for layout in self.layouts)


class Case:
    """One method and encoder of a modality, with its smallest preset.

    own: the preset names this encoder itself. first: of the modality's cases; what is the same for all, and takes long,
    is done for this one. Everything is made from the configuration, as a run would make it.
    """

    def __init__(self, kind: type[Modality[Any]], preset: str, encoder: str, method: str, own: bool) -> None:
        self.kind, self.preset, self.encoder, self.method, self.own = kind, preset, encoder, method, own
        self.first = (method, encoder) == (kind.methods[0], kind.encoders[0])
        self.modality = self.make()

    def __str__(self) -> str:
        return f"{self.method}, {self.encoder}"

    def make(self, *words: str) -> Modality[Any]:
        """The modality of this case, with more `key=value` words. Raises UserError where they cannot work."""
        config, _ = load_config(
            [f"modality={self.kind.name}", f"preset={self.preset}", f"encoder={self.encoder}",
             f"method={self.method}", "train.device=cpu", "train.num_workers=0", "train.tensorboard=false",
             "train.probe=false", "train.num_threads=0", *words],
            lambda name: self.kind,
        )  # fmt: skip
        return self.kind(config)

    def small(self, *words: str) -> Modality[Any]:
        """The same with a step of a few samples, for whatever trains."""
        modality = self.make(*words)
        batching = self._cut(modality.batching())
        modality.batching = lambda: batching
        modality.dataset = lambda split: self.dataset  # opened once: built-in data may take seconds to make
        return modality

    def _cut(self, batching: Batching) -> Batching:
        sizes = np.minimum(self.dataset.sizes, batching.max_size)
        size = batching.max_size
        if not self.own and batching.crop:
            size = int(np.quantile(sizes, 0.25))
        limit = (NUM_SAMPLES if self.own else NUM_SAMPLES_OTHER) * int(np.median(np.minimum(sizes, size)))
        return replace(
            batching, max_size=size, batch=min(batching.batch, limit), micro_batch=min(batching.micro_batch, limit)
        )

    @cached_property
    def dataset(self) -> Dataset[Any]:
        """The modality's training data, opened once."""
        return self.modality.dataset("train")

    @cached_property
    def mini(self) -> Mini:
        """Three samples: one, another that is longer where there is any, and one more. Raises Broken."""
        sizes = np.minimum(self.dataset.sizes, self.modality.batching().max_size)
        order = np.argsort(sizes, kind="stable")
        first = len(order) // 4
        longer = int(np.searchsorted(sizes[order], LONGER * sizes[order[first]]))
        found: list[Any] = []
        for start in (first, min(longer, len(order) - 1), first + 1):
            for index in map(int, np.roll(order, -start)[:MOST_TRIED]):
                try:
                    sample = self.dataset[index]
                except BadSample:
                    continue
                found.append(self.modality.prepare(sample, int(sizes[index]), generator(0, "check", index)))
                break
            else:
                raise Broken(
                    f"{min(len(order), MOST_TRIED)} samples of dataset('train') cannot be read, so there is nothing to "
                    "check with. The built-in data of a modality must be readable."
                )
        return self.of(found)

    def of(self, samples: list[Any]) -> Mini:
        """These prepared samples with their layouts and inputs."""
        return Mini(samples, [self.modality.layout(one) for one in samples], collated(self.modality, samples))

    @cached_property
    def policy(self) -> MaskingPolicy:
        """The modality's masking, made once. Raises Broken where it is none."""
        policy = self.modality.masking()
        if not callable(cast("Any", policy)):
            raise Broken(
                f"masking() gives {form(policy)}; expected a policy such as SpanMasking(config), to be called."
            )
        return policy

    def masks(self, layouts: Sequence[Layout], num_copies: int, seed: int = 0) -> Masks:
        """Masks of samples with these layouts, of a generator for each that `seed` decides."""
        return self.policy(layouts, num_copies, [generator(seed, "mask", i) for i in range(len(layouts))])

    def batch(self, seed: int = 0) -> tuple[Mapping[str, Tensor], Masks, Mapping[str, Tensor] | None]:
        """What `Data2Vec` is given of the few samples, in two masked copies."""
        inputs, masks = self.mini.inputs, self.masks(self.mini.layouts, 2, seed)
        return inputs, masks, self.modality.teacher_inputs(Batch(inputs, masks))

    @cached_property
    def model(self) -> Data2Vec:
        """With its initial weights, in eval mode. Not to be changed."""
        return run.build_model(self.modality).eval()

    @cached_property
    def stirred(self) -> Data2Vec:
        """The same with noise on every weight, so that what begins at zero counts too."""
        return stir(copy.deepcopy(self.model))

    @property
    def encoder_module(self) -> FeatureEncoder:
        """The feature encoder of `model`."""
        return self.model.student.encoder

    @cached_property
    def visible_only(self) -> bool:
        """Whether the student is given visible tokens only."""
        return self.masks(self.mini.layouts, 1).visible is not None


def collated(modality: Modality[Any], samples: list[Any]) -> Mapping[str, Tensor]:
    """What `collate` makes of prepared samples. Raises Broken where no encoder can be given that."""
    inputs: Any = modality.collate(samples)
    if not isinstance(inputs, Mapping):
        raise Broken(f"collate() gives {form(inputs)}; expected a mapping from names to tensors.")
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise Broken(f"collate() gives {name!r} as {form(value)}; expected a tensor.")
        if value.shape[:1] != (len(samples),):
            raise Broken(
                f"collate() gives {name!r} of shape {shape(value)} for {len(samples)} samples; the first axis is "
                "theirs."
            )
        if value.dtype == torch.float64:
            raise Broken(
                f"collate() gives {name!r} as {form(value)}, as NumPy counts, where networks have float32; "
                "give torch.float32."
            )
    return inputs


def stir(model: Data2Vec) -> Data2Vec:
    """Noise on every weight of a model, in place."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*model.student.parameters(), *model.predictor.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    model.update_teacher(0.0)
    return model


def predict(model: Data2Vec, view: Tokens, x: Tensor, masks: Masks) -> Tensor:
    """With the same noise each time, where a predictor draws any."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        return model.predictor(replace(view, x=x), masks)


def valid(view: Tokens, row: int) -> Tensor:
    """(E + T,) bool, True = no padding."""
    if view.padding_mask is None:
        return torch.ones(view.x.shape[1], dtype=torch.bool)
    return ~view.padding_mask[row]


def apart(one: Tensor, two: Tensor) -> float:
    """Largest difference over the largest value of either."""
    if not one.numel():
        return 0.0
    difference = float((one.float() - two.float()).abs().max())
    size = max(float(one.float().abs().max()), float(two.float().abs().max()))
    return difference / size if size and math.isfinite(difference) else difference


def shape(x: Tensor) -> str:
    """As it is written in a sentence."""
    return str(tuple(x.shape))


def form(value: Any) -> str:
    """Shape and type of an array or tensor, the type of anything else."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__


def explain(error: BaseException) -> str:
    """An error in one line, with the innermost place that is neither the core's nor torch's."""
    others = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<")
    library = str(Path(os.__file__).parent)  # Python's own; what is installed may lie below it
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(others) and (not file.startswith(library) or "site-packages" in file):
            place = f" ({Path(file).name}, line {trace.tb_lineno}, in {trace.tb_frame.f_code.co_name})"
        trace = trace.tb_next
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}{place}"
