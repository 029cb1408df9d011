"""What a modality promises the core, each promise as a check that explains itself. Run by `d2v_core.testing`.

A promise is a function of a `Case`: it returns a remark for the person who reads the report, or raises `Broken` with a
sentence that says what was found, what was expected and what to do. The first line of its docstring is the promise,
the rest is why it matters. No check looks into a modality: all of them use what docs/contract.md lists.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# torch leaves much of what is used here untyped.
from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from d2v_core import checkpoint, plugins, run
from d2v_core.batching import StepLoader
from d2v_core.config import RunConfig, from_dict, load_config, read_yaml
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
    StatesShare,
    Tokens,
)
from d2v_core.data2vec import Data2Vec
from d2v_core.errors import UserError
from d2v_core.hookspecs import CONTRACT_VERSION
from d2v_core.keyed import generator
from d2v_core.probe import layers_of
from d2v_core.runfolder import open_run
from d2v_core.teacher import part_of
from d2v_core.trainer import Trainer, Updater

NUM_STEPS = 50  # of training, where a preset is made for the encoder
NUM_STEPS_OTHER = 12  # where it is not: the encoder may be one for large machines
NUM_SAMPLES = 8  # of median size, in a step of training
NUM_SAMPLES_OTHER = 2
LONGER = 1.3  # times the size of the first sample, where there is one as long
MOST_TRIED = 50  # samples, in search of one that can be read
MOST_ALIKE = 0.1  # of the pairs of tokens: a convolution over places may be narrower than a long row of hidden ones
NUM_DRAWS = 400  # of a mask, for its mean share
MOST_LEFT = 0.95  # of the loss at the start, after training
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
        return Mini(samples, [self.modality.layout(one) for one in samples], self.modality.collate(samples))

    @cached_property
    def policy(self) -> MaskingPolicy:
        return self.modality.masking()

    def masks(self, layouts: Sequence[Layout], num_copies: int, seed: int = 0) -> Masks:
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
        return self.model.student.encoder

    @cached_property
    def visible_only(self) -> bool:
        return self.masks(self.mini.layouts, 1).visible is not None


def stir(model: Data2Vec) -> Data2Vec:
    """Noise on every weight of a model, in place."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*model.student.parameters(), *model.predictor.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    model.update_teacher(0.0)
    return model


# --------------------------------------------------------------------------------------------- the plugin and its data


def door(case: Case) -> str:
    """The plugin's module imports without torch and says for which contract it was built.

    `d2v modalities` and every other verb must stay quick with this plugin installed, and a plugin of another time must
    be refused with the reason rather than with whatever error comes first.
    """
    entry = plugins.find(case.kind.name)
    module = entry.value.split(":")[0].strip()
    if plugins.contract_of(entry) is None:
        raise Broken(
            f"{module} does not say for which version of the contract it was built. Write D2V_CONTRACT = "
            f"{CONTRACT_VERSION} in it, a number and no imported name, since d2v reads it without importing the module."
        )
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, module],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Broken(f"{module} cannot be imported in a process of its own: {last}")
    if done.stdout.split()[-1] == "True":
        raise Broken(
            f"Importing {module} imports torch, which takes seconds. Import the modality inside d2v_modality() instead "
            "of at the top of the module."
        )
    return module


def recipes(case: Case) -> str:
    """Every preset loads, survives being written and read again, and every option has a sentence.

    A run folder holds its configuration as YAML and must come back from it; `d2v config` prints the sentences.
    """
    kind, folder = case.kind, case.kind.recipes()
    presets = sorted(path.stem for path in folder.glob("*.yaml"))
    if "tiny" not in presets:
        raise Broken(
            f"There is no {folder / 'tiny.yaml'}. `d2v run modality={kind.name}` takes the preset tiny unless another "
            "is given: write one that trains within minutes on a CPU."
        )
    with tempfile.TemporaryDirectory() as name:
        stored = Path(name) / "config.yaml"
        for preset in presets:
            try:
                config, _ = load_config([f"modality={kind.name}", f"preset={preset}"], lambda name: kind)
                before = config.to_dict()
                kind(config)
            except UserError as error:
                raise Broken(f"preset={preset} cannot be used: {error}") from error
            changed = _differences(before, config.to_dict())
            if changed:
                raise Broken(
                    f"{kind.__name__}(config) writes to the configuration of preset={preset}: {changed}. It is read "
                    "only: what follows from it belongs into attributes or functions."
                )
            stored.write_text(config.to_yaml(), encoding="utf-8")
            again = from_dict(read_yaml(stored), kind, str(stored))
            changed = _differences(before, again.to_dict())
            if changed or again != config:
                raise Broken(f"preset={preset} comes back from its YAML with other values: {changed or 'other types'}.")
            _say_what_each_option_means(config)
        tiny, _ = load_config([f"modality={kind.name}"], lambda name: kind)
        stored.write_text(tiny.to_yaml(), encoding="utf-8")
        for path in sorted((folder / "finetune").glob("*.yaml")):
            try:
                load_config(
                    [f"modality={kind.name}", "stage=finetune", f"from={name}", f"preset={path.stem}"],
                    lambda name: kind,
                )
            except UserError as error:
                raise Broken(f"The preset {path.stem} of stage=finetune cannot be used: {error}") from error
    return ", ".join(presets)


def _say_what_each_option_means(config: RunConfig) -> None:
    for name, section in config.sections.items():
        for field in dataclasses.fields(section):
            if not field.metadata.get("doc"):
                raise Broken(
                    f"The option {name}.{field.name} has no sentence. Declare it with opt(default, sentence) of "
                    "d2v_core.config: `d2v config` prints the sentence above the option."
                )


def data(case: Case) -> str:
    """Samples have sizes and stable names, and the same sample is read twice alike; workers can have copies of all.

    Names key every random choice: with names that change or repeat, no run could be repeated.
    """
    dataset, modality = case.dataset, case.modality
    sizes = dataset.sizes
    if not isinstance(cast("Any", sizes), np.ndarray) or sizes.dtype != np.int64 or sizes.ndim != 1:
        raise Broken(f"dataset.sizes is {_form(sizes)}; expected a (len,) int64 array, one size per sample.")
    if len(dataset) != len(sizes) or not len(sizes) or sizes.min() < 1:
        raise Broken(
            f"The data set has {len(dataset)} samples and sizes {sizes.min() if len(sizes) else 'of none'} and above; "
            "expected at least one sample, and sizes of 1 or more."
        )
    first = [dataset.id(i) for i in range(min(len(dataset), 1000))]
    if len(set(first)) < len(first):
        twice = next(one for one in first if first.count(one) > 1)
        raise Broken(
            f"Two samples are called {twice!r}. Every sample needs a name of its own, such as its file's path."
        )
    again = modality.dataset("train") if case.first else dataset
    if [again.id(i) for i in range(len(first))] != first:
        raise Broken(
            "Opened a second time, the data set gives its samples other names. A name must depend on the sample alone, "
            "such as its file's path or its number in a fixed order."
        )
    _read_twice(case, again)
    try:
        pickle.loads(pickle.dumps((modality, dataset, case.policy)))
    except Exception as error:
        raise Broken(
            f"Modality, data set or masking policy cannot be pickled ({type(error).__name__}: {error}), so no worker "
            "can read data where processes are spawned. Keep open files and functions defined in functions out of them."
        ) from error
    batching = modality.batching()
    if min(batching.batch, batching.micro_batch, batching.max_size) < 1:
        raise Broken(f"batching() gives {batching}; every size must be 1 or more.")
    return f"{len(dataset)} samples"


def _read_twice(case: Case, again: Dataset[Any]) -> None:
    modality, size = case.modality, int(min(case.dataset.sizes[0], case.modality.batching().max_size))
    for index in range(min(len(case.dataset), 3)):
        try:
            one, two = (
                modality.collate([modality.prepare(dataset[index], size, generator(0, "prepare", index))])
                for dataset in (case.dataset, again)
            )
        except BadSample:
            continue
        for name in one:
            if not torch.equal(one[name], two[name]):
                raise Broken(
                    f"Sample {case.dataset.id(index)!r}, read and prepared twice with the same random numbers, gives "
                    f"other values of {name!r}. Reading must not depend on chance; prepare() may draw from the "
                    "generator that it is given and from nothing else."
                )


def shapes(case: Case) -> str:
    """Tensors have the shapes and types that the contract gives them, from the layout to the predictions.

    The token grid is known before any network runs; masks are drawn from it. Where the two disagree, other tokens are
    hidden than those meant.
    """
    mini, model = case.mini, case.model
    rows = len(mini.samples)
    for name, value in mini.inputs.items():
        if not isinstance(cast("Any", value), Tensor):
            raise Broken(f"collate() gives {name!r} as {_form(value)}; expected a tensor.")
        if value.shape[:1] != (rows,):
            raise Broken(
                f"collate() gives {name!r} of shape {_shape(value)} for {rows} samples; the first axis is theirs."
            )
    amount = case.modality.amount(mini.inputs)
    if not 0 < amount < math.inf:
        raise Broken(f"amount() of {rows} samples is {amount}; expected how many {case.modality.unit} they hold.")
    with torch.no_grad():
        tokens = model.student.encoder.embed(mini.inputs)
        _check_tokens(case, tokens)
        _check_view(case, tokens, None)
        masks = case.masks(mini.layouts, 2)
        view = _check_view(case, tokens, masks)
        _, encoded = model.student(tokens, masks)
        prediction = model.predictor(replace(view, x=encoded.x), masks)
    width = case.modality.config.model.embed_dim
    if prediction.shape != (len(masks.scored_rows), width):
        raise Broken(
            f"The predictor gives {_shape(prediction)} for {len(masks.scored_rows)} scored tokens; expected "
            f"({len(masks.scored_rows)}, {width}), one row each, in the order of Masks.scored_rows."
        )
    if not prediction.isfinite().all():
        raise Broken("The predictor's output is not finite with the initial weights.")
    return " x ".join(map(str, tokens.x.shape))


def _check_tokens(case: Case, tokens: Tokens) -> None:
    mini, width = case.mini, case.modality.config.model.embed_dim
    expected = (len(mini.samples), mini.num_tokens, width)
    if tokens.x.shape != expected:
        raise Broken(
            f"embed() gives x of shape {_shape(tokens.x)}; layout() and model.embed_dim say {expected}: samples, "
            "tokens of the longest, width."
        )
    if tokens.x.dtype != torch.float32:
        raise Broken(f"embed() gives x as {tokens.x.dtype}; expected torch.float32 outside of autocast.")
    if math.prod(tokens.grid) != mini.num_tokens:
        raise Broken(f"embed() gives grid={tokens.grid}, whose product is not the {mini.num_tokens} tokens of x.")
    if tokens.num_extra or tokens.index is not None:
        raise Broken("embed() adds extra tokens or an index; both belong into view().")
    padded = torch.arange(mini.num_tokens) >= torch.tensor([layout.num_tokens for layout in mini.layouts])[:, None]
    if tokens.padding_mask is None:
        if padded.any():
            raise Broken(
                f"Samples of {[layout.num_tokens for layout in mini.layouts]} tokens stand in one batch, but embed() "
                "gives no padding_mask. Say which tokens are padding: (B, T) bool, True = padding."
            )
    elif tokens.padding_mask.dtype != torch.bool or tokens.padding_mask.shape != padded.shape:
        raise Broken(
            f"embed() gives padding_mask as {_form(tokens.padding_mask)}; expected {tuple(padded.shape)} bool, "
            "True = padding."
        )
    elif len(mini.layouts[0].shape) == 1 and not torch.equal(tokens.padding_mask, padded):
        row = int((tokens.padding_mask != padded).any(1).nonzero()[0])
        raise Broken(
            f"embed() marks {int(tokens.padding_mask[row].sum())} tokens of sample {row} as padding, but by layout() "
            f"it has {mini.layouts[row].num_tokens} of {mini.num_tokens}. True = padding, behind the sample's own "
            "tokens."
        )


def _check_view(case: Case, tokens: Tokens, masks: Masks | None) -> Tokens:
    call = "view(tokens, None)" if masks is None else "view(tokens, masks)"
    encoder, heads = case.encoder_module, case.modality.config.model.num_heads
    view = encoder.view(tokens, masks)
    rows = len(tokens.x) * (1 if masks is None else masks.num_copies)
    count = tokens.x.shape[1] if masks is None or masks.visible is None else masks.visible.shape[2]
    expected = (rows, view.num_extra + count, tokens.x.shape[2])
    if view.x.shape != expected:
        raise Broken(
            f"{call} gives x of shape {_shape(view.x)}; expected {expected}: "
            + ("samples" if masks is None else f"samples x {masks.num_copies} masked copies")
            + f", {view.num_extra} extra tokens + {count}, width."
        )
    if view.grid != tokens.grid:
        raise Broken(f"{call} gives grid={view.grid}; embed() gave {tokens.grid}, and that is what it stays.")
    if (tokens.padding_mask is not None) != (view.padding_mask is not None):
        raise Broken(f"{call} drops or invents the padding_mask that embed() gave.")
    if view.padding_mask is not None and view.padding_mask.shape != expected[:2]:
        raise Broken(f"{call} gives padding_mask of shape {_shape(view.padding_mask)}; expected {expected[:2]}.")
    if masks is not None and masks.visible is not None:
        if view.index is None or not torch.equal(view.index, masks.visible.flatten(0, 1)):
            raise Broken(
                f"{call} must give index = masks.visible, (rows, V), so that others know where the tokens stand."
            )
    elif view.index is not None:
        raise Broken(f"{call} gives an index, but all tokens stand there in order.")
    bias = encoder.attention_bias(view)
    layers = case.modality.config.model.num_layers
    if bias is not None and not isinstance(bias, Tensor) and len(bias) != layers:
        raise Broken(
            f"attention_bias() gives {len(bias)} biases for {layers} blocks; expected one for all or one each."
        )
    for one in [] if bias is None else [bias] if isinstance(bias, Tensor) else bias:
        full = (rows, heads, expected[1], expected[1])
        if one.dim() != 4 or any(a not in (1, b) for a, b in zip(one.shape, full, strict=True)):
            raise Broken(f"attention_bias() gives {_shape(one)}; expected what can be broadcast to {full}.")
    return view


def padding(case: Case) -> str:
    """More padding behind a sample, or other samples beside it, leave its outputs equal.

    Otherwise what a network says of a sample depends on its neighbours in the batch, and a trained network answers
    differently to a sample that comes alone.
    """
    mini, model = case.mini, case.stirred
    short, both = case.of(mini.samples[:1]), case.of(mini.samples[:2])
    length, width = short.num_tokens, both.num_tokens
    masks = case.masks(both.layouts, 1)
    alone = _cut_masks(masks, length)
    with torch.no_grad():
        for view, own, joint in (("the teacher's view", None, None), ("the student's view", alone, masks)):
            results: list[tuple[Tokens, Tensor]] = []
            for batch, given in ((short, own), (both, joint)):
                tokens = model.student.encoder.embed(batch.inputs)
                seen, encoded = model.student(tokens, given)
                results.append((seen, encoded.x))
            stages = [("embed() and view()", [seen.x[0] for seen, _ in results])]
            stages.append(("the transformer", [x[0] for _, x in results]))
            for stage, (a, b) in stages:
                a = a[_valid(results[0][0], 0)]
                b = b[_valid(results[1][0], 0)]
                if a.shape != b.shape:
                    raise Broken(
                        f"In {view}, a sample of {length} tokens has {len(a)} valid ones alone and {len(b)} beside one "
                        f"of {width}."
                    )
                apart = _apart(a, b)
                if apart > TOLERANCE:
                    raise Broken(
                        f"In {view}, a sample of {length} tokens gives other values after {stage} when it stands "
                        f"beside one of {width} tokens: {apart:.1e} of their size apart, {TOLERANCE:.0e} is rounding. "
                        "Keep padding out of means, norms and convolutions (set it to zero before each), mark it in "
                        "padding_mask, and let no sample look at another."
                    )
        _padding_in_predictions(model, both, masks)
    if width == length:
        return "all samples have the same size: compared alone and in company"
    return f"{length} tokens alone and padded to {width}"


def _padding_in_predictions(model: Data2Vec, both: Mini, masks: Masks) -> None:
    """What stands at padded places of the student's output changes no prediction."""
    view, encoded = model.student(model.student.encoder.embed(both.inputs), masks)
    if view.padding_mask is None:
        return
    noise = torch.randn(encoded.x.shape, generator=torch.Generator().manual_seed(1))
    changed = torch.where(view.padding_mask.unsqueeze(-1), encoded.x + noise, encoded.x)
    one, two = (_predict(model, view, x, masks) for x in (encoded.x, changed))
    if _apart(one, two) > TOLERANCE:
        raise Broken(
            f"Predictions depend on what stands at padded places: {_apart(one, two):.1e} of their size. The predictor "
            "must keep padding out, for example by setting it to zero before every convolution."
        )


def _cut_masks(masks: Masks, length: int) -> Masks:
    """Of the first sample alone, without its padding."""
    visible = masks.visible
    if visible is not None:
        visible = visible[:1][visible[:1] < length].reshape(1, masks.num_copies, -1)
    fill = None if masks.fill is None else masks.fill[:1, :, :length]
    return Masks.of(masks.hidden[:1, :, :length], masks.scored[:1, :, :length], fill, visible)


def _valid(view: Tokens, row: int) -> Tensor:
    """(E + T,) bool."""
    if view.padding_mask is None:
        return torch.ones(view.x.shape[1], dtype=torch.bool)
    return ~view.padding_mask[row]


# --------------------------------------------------------------------------------------------------------------- masks


def masks(case: Case) -> str:
    """Masks avoid padding, ask for something in every sample, leave something visible, and repeat for a seed.

    A hidden token that is padding teaches nothing; a sample without a scored one wastes its step; a mask that cannot
    be repeated cannot be resumed.
    """
    real = case.mini.layouts
    sets = [real, real[:1]]
    if all(len(layout.shape) == 1 and layout.maskable is None for layout in real):
        sets += [[Layout((size,)) for size in (real[0].num_tokens, 2, 5)], [Layout((3,))]]
    alike = 0
    copies_alike = 0
    draws = [(layouts, seed) for layouts in sets for seed in range(20)]
    for layouts, seed in draws:
        one, again, other = (case.masks(layouts, 3, s) for s in (seed, seed, seed + 1000))
        _check_masks(layouts, one)
        if not _equal_masks(one, again):
            raise Broken(
                "Two masks drawn with the same generators differ. Draw from the generators that the policy is given, "
                "one per sample, and from nothing else."
            )
        alike += torch.equal(one.scored, other.scored)
        copies_alike += torch.equal(one.scored[:, 0], one.scored[:, 1])
    if alike == len(draws):
        raise Broken("Masks are the same for every seed: the policy does not use the generators that it is given.")
    if copies_alike == len(draws):
        raise Broken("All masked copies of a sample are alike. Draw one mask for each of num_copies.")
    return f"{len(draws)} batches of 3 masked copies"


def _check_masks(layouts: Sequence[Layout], masks: Masks) -> None:
    longest = max(layout.num_tokens for layout in layouts)
    expected = (len(layouts), 3, longest)
    for name, value in (("hidden", masks.hidden), ("scored", masks.scored), ("fill", masks.fill)):
        kind = torch.int64 if name == "fill" else torch.bool
        if value is not None and (value.shape != expected or value.dtype != kind):
            raise Broken(f"Masks.{name} is {_form(value)}; expected {expected} {kind}: samples, copies, tokens.")
    if not torch.equal(masks.scored_rows, masks.scored.flatten().nonzero().squeeze(1)):
        raise Broken("Masks.scored_rows does not list the True places of Masks.scored. Make masks with Masks.of(...).")
    for row, layout in enumerate(layouts):
        size = layout.num_tokens
        for name, value in (("hides", masks.hidden), ("scores", masks.scored)):
            if value[row, :, size:].any():
                raise Broken(
                    f"The policy {name} padding: a sample of {size} tokens stands in a batch of {longest}, and places "
                    f"from {size} on are not its own. Draw each mask over its layout.num_tokens."
                )
        if layout.maskable is not None and masks.hidden[row][:, :size][:, ~torch.as_tensor(layout.maskable)].any():
            raise Broken("The policy hides tokens that layout.maskable rules out.")
        if not masks.scored[row].any(-1).all():
            raise Broken(
                f"A sample of {size} tokens has none that is scored, so nothing is learnt from it. Score at least one, "
                "however short the sample."
            )
        if size > 1 and masks.hidden[row, :, :size].all(-1).any():
            raise Broken(
                f"All {size} tokens of a sample are hidden: there is nothing left to predict them from. Leave at least "
                "one."
            )
        if masks.visible is not None:
            _check_visible(masks, row, size)


def _check_visible(masks: Masks, row: int, size: int) -> None:
    assert masks.visible is not None
    for hidden, visible in zip(masks.hidden[row], masks.visible[row], strict=True):
        given = visible.tolist()
        if len(set(given)) < len(given):
            raise Broken("Masks.visible names a place twice in one row.")
        shown = {place for place in given if place < size}
        meant = set((~hidden[:size]).nonzero().flatten().tolist())
        if size > 1 and shown - meant:
            raise Broken(
                f"Masks.visible shows the student places that are hidden, such as {min(shown - meant)}. Rows with "
                "fewer visible tokens are filled up with padding, never with what is hidden."
            )
        if meant - shown:
            raise Broken(f"Masks.visible leaves out places that are not hidden, such as {min(meant - shown)}.")


def _equal_masks(one: Masks, two: Masks) -> bool:
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(Masks)]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def share(case: Case) -> str:
    """As many tokens are hidden as the policy says.

    The share that is hidden decides how hard the task is; a policy that states it (`hidden_share`) is held to it.
    """
    layout = case.mini.layouts[1]
    shares = np.array([
        float(case.policy([layout], 1, [generator(seed, "share")]).hidden.sum()) / layout.num_tokens
        for seed in range(NUM_DRAWS)
    ])  # fmt: skip
    mean, error = float(shares.mean()), float(shares.std()) / math.sqrt(NUM_DRAWS)
    measured = f"{100 * mean:.1f} % of {layout.num_tokens} tokens"
    if not isinstance(case.policy, StatesShare):
        return f"{measured}; the policy states nothing (hidden_share)"
    low, high = case.policy.hidden_share(layout)
    if not low - 4 * error - 1e-9 <= mean <= high + 4 * error + 1e-9:
        raise Broken(
            f"The policy states that {100 * low:.1f} to {100 * high:.1f} % of {layout.num_tokens} tokens are hidden, "
            f"but the mean over {NUM_DRAWS} masks is {100 * mean:.1f} % (standard error {100 * error:.2f}). Either the "
            "masks or hidden_share() are not what was meant."
        )
    return f"{measured}, stated {100 * low:.1f}" + (f" to {100 * high:.1f}" if high > low else "")


# ------------------------------------------------------------------------------------- what the student and teacher see


def hiding(case: Case) -> str:
    """What is hidden does not reach the student, what is visible does, and the teacher sees everything.

    A student that can see what it is asked for learns to copy: its loss is splendid and its features are worth nothing.
    """
    mini, model = case.mini, case.stirred
    encoder = model.student.encoder
    masks = case.masks(mini.layouts, 2)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        tokens = encoder.embed(mini.inputs)
        seen, whole = encoder.view(tokens, masks), encoder.view(tokens, None)
        encoder.embed(case.of([mini.samples[1]] * 2).inputs)
        if _apart(encoder.view(tokens, masks).x, seen.x) > SAME:
            raise Broken(
                "view(tokens, masks) gives something else after embed() was called with other samples: the encoder "
                "keeps something of its last input. What a view shows must follow from tokens and masks alone."
            )
        for copy_ in range(masks.num_copies):
            rows = slice(copy_, None, masks.num_copies)
            hidden = masks.hidden[:, copy_]
            changed = _changed(tokens, hidden, noise)
            other, everything = encoder.view(changed, masks), encoder.view(changed, None)
            if _apart(other.x[rows], seen.x[rows]) > SAME or _bias_apart(encoder, other, seen, rows) > SAME:
                raise Broken(
                    "Changing the content of hidden tokens changes what the student is given"
                    + (f" (copy {copy_}; the copies of a sample stand together)" if copy_ else "")
                    + ". Replace or zero hidden tokens before anything mixes tokens (positions by convolution, norms "
                    "over time, attention bias), and for visible-only students gather afterwards."
                )
            if hidden.any() and _apart(everything.x, whole.x) <= SAME:
                raise Broken(
                    "Changing hidden tokens changes nothing in view(tokens, None): the teacher must see all tokens, "
                    "and with None nothing is hidden."
                )
            valid = torch.ones_like(hidden) if tokens.padding_mask is None else ~tokens.padding_mask
            shown = encoder.view(_changed(tokens, ~hidden & valid, noise), masks)
            if _apart(shown.x[rows], seen.x[rows]) <= SAME:
                raise Broken(
                    "Changing the visible tokens changes nothing of what the student is given: it sees no content at "
                    "all."
                )
    return f"{int(masks.hidden.sum())} hidden tokens"


def _changed(tokens: Tokens, where: Tensor, noise: torch.Generator) -> Tokens:
    """Other content at (B, T) places."""
    other = tokens.x.std() * 3 * torch.randn(tokens.x.shape, generator=noise)
    return replace(tokens, x=torch.where(where.unsqueeze(-1), other, tokens.x))


def _bias_apart(encoder: FeatureEncoder, one: Tokens, two: Tokens, rows: slice) -> float:
    biases = [encoder.attention_bias(view) for view in (one, two)]
    lists = [[] if b is None else [b] if isinstance(b, Tensor) else list(b) for b in biases]
    pairs = [[a[rows] if len(a) > 1 else a for a in biases] for biases in lists]
    return max((_apart(a, b) for a, b in zip(*pairs, strict=True)), default=0.0)


def place(case: Case) -> str:
    """A token that shows no content of its own still knows its place.

    Two hidden tokens without a place are the same question with two answers; of visible tokens, the order would be
    lost. Where the student sees visible tokens only, they are compared with one content in all of them.
    """
    mini, model = case.mini, case.stirred
    masks = case.masks(mini.layouts, 1)
    with torch.no_grad():
        tokens = model.student.encoder.embed(mini.inputs)
        if case.visible_only:
            tokens = replace(tokens, x=tokens.x[:, :1].expand_as(tokens.x))
        view, encoded = model.student(tokens, masks)
    x = encoded.x[:, view.num_extra :]
    pairs = [
        (row, a, b)
        for row in range(len(x))
        for places in _without_content(case, masks, view, row)
        for a, b in combinations(places[:40], 2)
    ]
    if not pairs:
        raise NothingToCheck("no two hidden tokens in one sample")
    alike = [(row, a, b) for row, a, b in pairs if _apart(x[row, a], x[row, b]) < SAME]
    what = "visible tokens of one content" if case.visible_only else "hidden tokens"
    if len(alike) > MOST_ALIKE * len(pairs):
        row, a, b = alike[0]
        raise Broken(
            f"Of {len(pairs)} pairs of {what}, {len(alike)} come out of the transformer alike, such as numbers {a} and "
            f"{b} of sample {row}. Nothing tells the student where they stand. Add positions after hiding (view), over "
            "a field wider than what is hidden in one piece, or give an attention_bias."
        )
    return f"{len(pairs)} pairs of {what}" + (f", {len(alike)} of them alike" if alike else "")


def _without_content(case: Case, masks: Masks, view: Tokens, row: int) -> list[list[int]]:
    """Groups of places in the view of which each has tokens that only their place can tell apart."""
    if case.visible_only:
        valid = _valid(view, row)[view.num_extra :]
        return [valid.nonzero().flatten().tolist()]
    places: list[int] = masks.hidden[row, 0].nonzero().flatten().tolist()
    if masks.fill is None:
        return [places]
    groups: dict[int, list[int]] = {}
    for one in places:
        groups.setdefault(int(masks.fill[row, 0, one]), []).append(one)
    return list(groups.values())


def teacher(case: Case) -> str:
    """Every parameter has a part in the teacher, and `embed` uses those under `self.embedding` and no others.

    The teacher is given the student's tokens where the embedding is shared; a parameter of `embed` that lies elsewhere
    would then be followed wrongly, and a misspelled prefix would never be noticed.
    """
    parts = case.modality.teacher_parts()
    names = [name for name, _ in run.build_student(case.modality).named_parameters()]
    for prefix, part in parts.items():
        if part not in ("average", "copy", "share"):
            raise Broken(f"teacher_parts() says {part!r} for {prefix!r}; expected average, copy or share.")
        if prefix and not any(name == prefix or name.startswith(prefix + ".") for name in names):
            raise Broken(
                f"teacher_parts() names {prefix!r}, but no parameter of the student begins like that. They begin with "
                f"encoder. or transformer., for example {names[0]!r}."
            )
    for name in names:
        try:
            part_of(name, parts)
        except KeyError as error:
            raise Broken(f"teacher_parts(): {error.args[0]}") from error
    model = copy.deepcopy(case.stirred)
    encoder = model.student.encoder
    _weighted_sum(encoder.embed(case.mini.inputs).x).backward()
    outside = [name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()
               and not name.startswith("embedding.")]  # fmt: skip
    if outside:
        raise Broken(
            f"embed() uses the parameter {outside[0]!r}, which lies outside of self.embedding. Put what embed() needs "
            "into the module self.embedding, or use it in view()."
        )
    return ", ".join(f"{prefix or 'the rest'} {part}" for prefix, part in parts.items())


def _weighted_sum(x: Tensor) -> Tensor:
    """A scalar of which no gradient is zero by symmetry, as that of a plain sum after a norm is."""
    return (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))).sum()


def gradients(case: Case) -> str:
    """The loss reaches every parameter of the feature encoder and the predictor.

    A parameter without a gradient keeps its initial value for ever: it was forgotten in `embed` or `view`, or something
    before it detaches.
    """
    model = copy.deepcopy(case.stirred).train()
    for seed in range(3):
        torch.manual_seed(seed)
        model(*case.batch(seed)).loss_sum.backward()
    parts = {"encoder": model.student.encoder, "predictor": model.predictor}
    parameters = {f"{part}.{name}": p for part, module in parts.items()
                  for name, p in module.named_parameters() if p.requires_grad and p.numel()}  # fmt: skip
    without = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    if without:
        raise Broken(
            f"No gradient reaches {', '.join(without[:3])}"
            + (f" and {len(without) - 3} more" if len(without) > 3 else "")
            + ". Use it on the way from embed() to the predictions, look for detach() or no_grad(), or set its "
            "requires_grad to False if it is meant to stay."
        )
    infinite = [name for name, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    if infinite:
        raise Broken(f"The gradient of {infinite[0]} is not finite. Look for a division by zero or a root at zero.")
    return f"{len(parameters)} tensors"


def predictions(case: Case) -> str:
    """Each prediction stands in the row of its token and depends on its own masked copy alone.

    Predictions and targets are matched by order; a row too early or too late, and the student learns its neighbour's
    target.
    """
    mini, model = case.mini, case.stirred
    masks = case.masks(mini.layouts, 2)
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        view, encoded = model.student(model.student.encoder.embed(mini.inputs), masks)
        before = _predict(model, view, encoded.x, masks)
        owner = masks.scored_rows // masks.hidden.shape[2]
        for row in range(len(encoded.x)):
            x = encoded.x.clone()
            x[row] += torch.randn(x[row].shape, generator=noise)
            moved = (_predict(model, view, x, masks) - before).abs().amax(1) > SAME * before.abs().max()
            own = moved[owner == row]
            if moved[owner != row].any() or (len(own) and not own.any()):
                raise Broken(
                    f"Changing the student's output in row {row} (sample {row // masks.num_copies}, copy "
                    f"{row % masks.num_copies}) changes predictions of other rows, or none of its own. Predictions "
                    "must come in the order of Masks.scored_rows, which counts (sample, copy, token) row by row."
                )
    return f"{len(before)} predictions"


def _predict(model: Data2Vec, view: Tokens, x: Tensor, masks: Masks) -> Tensor:
    """With the same noise each time, where a predictor draws any."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        return model.predictor(replace(view, x=x), masks)


# ------------------------------------------------------------------------------------------------------------ training


def determinism(case: Case) -> str:
    """The same seed gives the same weights, the same batches and the same updates.

    All chance of a run comes from its seed; a draw from a global generator, or from the clock, cannot be repeated.
    """
    first, second = (_two_updates(case) for _ in range(2))
    for what, one, two in zip(("initial weights", "batches", "weights after two updates"), first, second, strict=True):
        if one.keys() != two.keys():
            raise Broken(
                f"Done twice with one seed, the {what} have other names: {sorted(one.keys() ^ two.keys())[:3]}."
            )
        for name in one:
            if not torch.equal(one[name], two[name]):
                raise Broken(
                    f"Done twice with one seed, the {what} differ: {name}. Draw from the generator that a method is "
                    "given (prepare, masks) or from torch's own (weights, dropout), never from NumPy's or Python's "
                    "global one."
                )
    return "two updates, twice"


def _two_updates(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    modality = case.small("train.max_steps=2")
    model = run.build_model(modality).train()
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches: dict[str, Tensor] = {}
    updater = Updater(model, modality.config, torch.device("cpu"))
    steps = iter(StepLoader(modality, case.dataset, seed=0, num_copies=modality.config.train.num_masks))
    for step in range(2):
        _, _, given = next(steps)
        for number, batch in enumerate(given):
            batches |= {f"{name} of step {step}, part {number}": value for name, value in batch.inputs.items()}
            if batch.masks is not None:
                batches[f"masks of step {step}, part {number}"] = batch.masks.scored
        updater.update(step, given, modality.teacher_inputs)
    steps.close()
    return initial, batches, model.state_dict()


def resume(case: Case) -> str:
    """A run that was stopped goes on bit for bit as if it had not been, from another folder too, and loads for use.

    Whatever a modality keeps outside of its configuration and its weights is lost here.
    """
    words = ["train.max_steps=4", "train.checkpoint_every=2", "train.log_every=4", "train.keep_checkpoints=2"]
    quiet = Console(quiet=True)
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        whole, parted = Path(name) / "whole", Path(name) / "parted"
        modality = case.small(*words, f"out={whole}")
        open_run(modality.config)
        Trainer(modality, whole, quiet).fit()
        shutil.copytree(whole, parted)
        shutil.rmtree(parted / "checkpoints" / "step-00000004")
        (parted / "summary.json").unlink()
        modality = case.small(*words, f"out={parted}", "resume=auto")
        _open_again(case, modality.config)
        Trainer(modality, parted, quiet).fit()
        one, two = (checkpoint.load(folder / "checkpoints" / "step-00000004") for folder in (whole, parted))
        for part, a, b in (("student", one.model, two.model), ("teacher", one.teacher, two.teacher)):
            for tensor in a:
                if not torch.equal(a[tensor], b[tensor]):
                    raise Broken(
                        f"Stopped after 2 of 4 steps and gone on, a run ends with another {tensor} of the {part} than "
                        "without the stop. Something that changes while training is in no checkpoint: keep it in a "
                        "parameter, a buffer or a function of the step."
                    )
        _load_for_use(case, whole, one)
    torch.set_num_threads(before)
    return "4 steps, and 2 + 2"


def _open_again(case: Case, config: RunConfig) -> None:
    try:
        open_run(config)
    except UserError as error:
        raise Broken(f"A run cannot go on with the command that began it: {error}") from error


def _load_for_use(case: Case, folder: Path, stored: checkpoint.Checkpoint) -> None:
    try:
        loaded = run.load(folder)
    except UserError as error:
        raise Broken(f"d2v_core.load() of a finished run fails: {error}") from error
    fresh = run.build_model(case.make())
    run.load_model_state(fresh, stored.model, str(folder))
    inputs = case.of(case.mini.samples[:1]).inputs
    for one, two in zip(loaded.encode(inputs), layers_of(fresh.student, inputs), strict=True):
        if _apart(one, two) > TOLERANCE:
            raise Broken(
                "A loaded run gives other features than the network with its weights: loading loses something."
            )


def compiled(case: Case) -> str:
    """torch.compile gives the same loss and gradients.

    Traced and differentiated as `torch.compile` does, without the generation of machine code, which takes minutes.
    """
    batch = case.batch()
    results: list[tuple[float, dict[str, Tensor]]] = []
    shallow = _shallow(case)
    torch._dynamo.reset()  # pyright: ignore
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)  # breaks of the graph are allowed, and each is a page of warnings
    for compile_it in (False, True):
        model = copy.deepcopy(shallow)
        function: Callable[..., Any] = torch.compile(model, backend="aot_eager") if compile_it else model
        torch.default_generator.manual_seed(6)
        try:
            out = function(*batch)
            out.loss_sum.backward()
        except Exception as error:
            if not compile_it:
                raise
            raise Broken(
                f"torch.compile fails: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            ) from error
        results.append(
            (out.loss_sum.item(), {n: p.grad for n, p in model.student.named_parameters() if p.grad is not None})
        )
    torch._dynamo.reset()  # pyright: ignore
    logger.setLevel(level)
    (loss, gradient), (loss2, gradient2) = results
    if abs(loss - loss2) > 1e-3 * abs(loss):
        raise Broken(
            f"Compiled, the loss is {loss2:.6g}; without, it is {loss:.6g}. Look for code that asks how it is run."
        )
    for name in gradient:
        if name not in gradient2 or _apart(gradient[name], gradient2[name]) > 1e-2:
            raise Broken(f"Compiled, the gradient of {name} is another one.")
    return f"loss {loss / len(batch[1].scored_rows):.4g}"


def _shallow(case: Case) -> Data2Vec:
    """A network of one block, since tracing takes seconds per block; as it is where the modality wants more."""
    try:
        modality = case.make("model.num_layers=1", "target.top_k_layers=1")
        return stir(run.build_model(modality).eval())
    except UserError:
        return case.stirred


def bf16(case: Case) -> str:
    """An update with train.precision=bf16 works, and its loss is that of float32 but for rounding.

    Under autocast some tensors are bfloat16 and others are not: assigning one into the other fails.
    """
    losses: list[float] = []
    for precision in ("fp32", "bf16"):
        modality = case.small("train.max_steps=2", f"train.precision={precision}")
        model = run.build_model(modality)
        updater = Updater(model, modality.config, torch.device("cpu"))
        steps = iter(StepLoader(modality, case.dataset, seed=0, num_copies=modality.config.train.num_masks))
        try:
            numbers = updater.update(0, next(steps)[2], modality.teacher_inputs).numbers()
        except RuntimeError as error:
            if precision == "fp32":
                raise
            raise Broken(
                f"With train.precision=bf16 an update fails: {explain(error)}. Convert learned vectors to the type of "
                "the tokens before they are put among them: self.mask_embedding.to(x.dtype)."
            ) from error
        steps.close()
        if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
            raise Broken(f"With train.precision={precision} the loss is {numbers['loss']} at the first update.")
        losses.append(numbers["loss"])
    if abs(losses[0] - losses[1]) > 0.1 * abs(losses[0]):
        raise Broken(
            f"The first loss is {losses[1]:.4g} in bf16 and {losses[0]:.4g} in float32. Compute what needs the range "
            "or the digits (statistics, logarithms, long sums) in float32, inside torch.autocast(..., enabled=False)."
        )
    return f"loss {losses[1]:.4g}, in float32 {losses[0]:.4g}"


def learning(case: Case) -> str:
    """Fifty steps on the built-in data make the loss fall, and nothing collapses.

    The teacher moves and with it the size of what is asked, so the loss is taken over the variance of the targets.
    target_std is the spread of the targets over tokens: at 0 all tokens have become alike.
    """
    steps = NUM_STEPS if case.own else NUM_STEPS_OTHER
    modality = case.small(f"train.max_steps={steps}")
    model = run.build_model(modality).train()
    updater = Updater(model, modality.config, torch.device("cpu"))
    loader = iter(StepLoader(modality, case.dataset, seed=0, num_copies=modality.config.train.num_masks))
    losses: list[float] = []
    target_std = math.nan
    for step in range(steps):
        _, _, batches = next(loader)
        batches = [batch for batch in batches if batch.masks is not None]
        if not batches:
            continue
        numbers = updater.update(step, batches, modality.teacher_inputs).numbers()
        target_std = numbers["target_std"]
        if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
            raise Broken(
                f"At step {step + 1} the loss is {numbers['loss']} and the gradient norm {numbers['grad_norm']}."
            )
        losses.append(numbers["loss"] / max(target_std, 1e-3) ** 2)
    loader.close()
    least = modality.config.guard.min_target_std
    if not target_std >= least:
        raise Broken(
            f"After {steps} steps target_std is {target_std:.3f}, below guard.min_target_std={least}: the "
            "representation collapses. What usually helps: target.layer_norms=[instance] or [layer], a lower "
            "optim.lr, a teacher that moves more slowly; or embed() gives all tokens the same content."
        )
    first, last = np.mean(losses[: max(1, steps // 16)]), np.mean(losses[-max(1, steps // 4) :])
    if not last < MOST_LEFT * first:
        raise Broken(
            f"In {steps} steps on the built-in data the loss over the targets' variance goes from {first:.3f} to "
            f"{last:.3f}: it does not fall. Look at optim.lr and the warm-up of preset={case.preset}, and whether the "
            "built-in data have anything in them that can be predicted."
        )
    return f"{steps} steps: {first:.2f} to {last:.2f} of the targets' variance, target_std {target_std:.2f}"


PROMISES: Mapping[str, Callable[[Case], str]] = {
    promise.__name__: promise
    for promise in (door, recipes, data, shapes, padding, masks, share, hiding, place, teacher, gradients, predictions,
                    determinism, resume, compiled, bf16, learning)
}  # fmt: skip
"""All of them by name, in the order in which they are checked: later ones build on earlier ones."""
OF_THE_PLUGIN = ("door", "recipes")
"""Those that ask the same of every case, and are asked once."""


# -------------------------------------------------------------------------------------------------------------- helpers


def _apart(one: Tensor, two: Tensor) -> float:
    """Largest difference over the largest value of either."""
    if not one.numel():
        return 0.0
    difference = float((one.float() - two.float()).abs().max())
    size = max(float(one.float().abs().max()), float(two.float().abs().max()))
    return difference / size if size and math.isfinite(difference) else difference


def _differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """The keys whose values differ, as text; empty where none does."""
    found: list[str] = []
    for key in one.keys() | two.keys():
        a, b = one.get(key), two.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _differences(cast("dict[str, Any]", a), cast("dict[str, Any]", b))
            found += [f"{key}.{one}" for one in inner.split("; ") if one]
        elif a != b:
            found.append(f"{key}: {a!r}, then {b!r}")
    return "; ".join(sorted(found))


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _form(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__


def explain(error: BaseException) -> str:
    """An error in one line, with the innermost place that is neither the core's nor torch's."""
    others = (str(Path(__file__).parent), str(Path(torch.__file__).parent), "<")
    library = str(Path(os.__file__).parent)  # Python's own; what is installed may lie below it
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(others) and (not file.startswith(library) or "site-packages" in file):
            place = f" ({Path(file).name}, line {trace.tb_lineno}, in {trace.tb_frame.f_code.co_name})"
        trace = trace.tb_next
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}{place}"
