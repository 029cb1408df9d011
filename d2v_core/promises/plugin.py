"""Promises of the plugin, its presets and its data."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# torch leaves much of what is used here untyped.
from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from d2v_core import plugins
from d2v_core.config import RunConfig, from_dict, load_config, read_yaml
from d2v_core.contract import (
    BadSample,
    Dataset,
    Modality,
)
from d2v_core.errors import UserError
from d2v_core.hookspecs import CONTRACT_VERSION
from d2v_core.keyed import generator
from d2v_core.promises.case import (
    Broken,
    Case,
    collated,
    form,
)


def door(case: Case) -> str:
    """The plugin's module, and that of a plugin's encoder, import without torch and say for which contract they were
    built.

    `d2v modalities` and every other verb must stay quick with this plugin installed, and a plugin of another time must
    be refused with the reason rather than with whatever error comes first.
    """
    modules = [_opens(plugins.find(case.kind.name))]
    if case.modality.reads_raw:
        modules.append(_opens(plugins.find(case.encoder, plugins.ENCODERS)))
    return ", ".join(modules)


def _opens(entry: EntryPoint) -> str:
    """The module of a plugin that keeps the promise."""
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
            f"Importing {module} imports torch, which takes seconds. Import what d2v_modality() or d2v_encoder() "
            "returns inside of it instead of at the top of the module."
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
                words = [f"encoder={case.encoder}"] if case.modality.reads_raw else []
                config, _ = load_config([f"modality={kind.name}", f"preset={preset}", *words], lambda name: kind)
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
        for path in sorted((folder / "finetune").glob("*.yaml")):
            _fits_some_preset(kind, path.stem, presets, Path(name))
    return ", ".join(presets)


def _fits_some_preset(kind: type[Modality[Any]], preset: str, pre_trained: Sequence[str], folder: Path) -> None:
    """Of fine-tuning: there is a pre-training preset whose runs it can start from, the default one or another."""
    errors: list[UserError] = []
    for source in sorted(pre_trained, key="tiny".__ne__):
        run, _ = load_config([f"modality={kind.name}", f"preset={source}"], lambda name: kind)
        (folder / "config.yaml").write_text(run.to_yaml(), encoding="utf-8")
        words = [f"modality={kind.name}", "stage=finetune", f"from={folder}", f"preset={preset}"]
        try:
            load_config(words, lambda name: kind)
            return
        except UserError as error:
            errors.append(error)
    raise Broken(f"The preset {preset} of stage=finetune cannot be used: {errors[0]}") from errors[0]


def _say_what_each_option_means(config: RunConfig) -> None:
    for name, section in config.sections.items():
        for field in dataclasses.fields(section):
            if not field.metadata.get("doc"):
                raise Broken(
                    f"The option {name}.{field.name} has no sentence. Declare it with opt(default, sentence) of "
                    "d2v_core.config: `d2v config` prints the sentence above the option."
                )


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


def data(case: Case) -> str:
    """Samples have sizes and stable names, and the same sample is read twice alike; workers can have copies of all.

    Names key every random choice: with names that change or repeat, no run could be repeated.
    """
    dataset, modality = case.dataset, case.modality
    sizes = dataset.sizes
    if not isinstance(cast("Any", sizes), np.ndarray) or sizes.dtype != np.int64 or sizes.ndim != 1:
        raise Broken(f"dataset.sizes is {form(sizes)}; expected a (len,) int64 array, one size per sample.")
    if len(dataset) != len(sizes) or not len(sizes) or sizes.min() < 1:
        raise Broken(
            f"The data set has {len(dataset)} samples and sizes {sizes.min() if len(sizes) else 'of none'} and above; "
            "expected at least one sample, and sizes of 1 or more."
        )
    first = [dataset.id(i) for i in range(min(len(dataset), 1000))]
    if not isinstance(cast("Any", first[0]), str):
        raise Broken(f"dataset.id(0) gives {form(first[0])}; expected a str, such as the path of the sample's file.")
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
    _cropped(case)
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


def _cropped(case: Case) -> None:
    """The longest sample, cropped to the size of the shortest, has no more tokens than that one."""
    modality, dataset, batching = case.modality, case.dataset, case.modality.batching()
    size = int(min(dataset.sizes.min(), batching.max_size))
    short, long = int(dataset.sizes.argmin()), int(dataset.sizes.argmax())
    if not batching.crop or dataset.sizes[long] == size:
        return
    try:
        expected, found = (
            modality.layout(modality.prepare(dataset[index], size, generator(0, "prepare", index))).num_tokens
            for index in (short, long)
        )
    except BadSample:
        return
    if found > expected:
        raise Broken(
            f"prepare() leaves {found} tokens of sample {dataset.id(long)!r} when it is asked for size {size}, of "
            f"which {dataset.id(short)!r} has {expected}: steps would take more memory than batching() says. Crop to "
            "the size, or give Batching(crop=False), with which shorter samples are padded."
        )


def _read_twice(case: Case, again: Dataset[Any]) -> None:
    modality, size = case.modality, int(min(case.dataset.sizes[0], case.modality.batching().max_size))
    for index in range(min(len(case.dataset), 3)):
        try:
            one, two = (
                collated(modality, [modality.prepare(dataset[index], size, generator(0, "prepare", index))])
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
