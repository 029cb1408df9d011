"""Promises that take updates to see: that a run repeats, resumes, compiles, works in bf16 and learns."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch leaves much of what is used here untyped.
from __future__ import annotations

import copy
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from d2v_core import checkpoint, run
from d2v_core.batching import StepLoader
from d2v_core.config import RunConfig
from d2v_core.data2vec import Data2Vec
from d2v_core.errors import UserError
from d2v_core.probe import layers_of
from d2v_core.promises.case import (
    TOLERANCE,
    Broken,
    Case,
    apart,
    explain,
    stir,
)
from d2v_core.runfolder import open_run
from d2v_core.trainer import Trainer, Updater

NUM_STEPS = 50  # of training, where a preset is made for the encoder
NUM_STEPS_OTHER = 12  # where it is not: the encoder may be one for large machines
MOST_LEFT = 0.95  # of the loss at the start, after training


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
                batches[f"masks of step {step}, part {number}"] = torch.stack([batch.masks.hidden, batch.masks.scored])
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
        _fit(Trainer(modality, whole, quiet))
        shutil.copytree(whole, parted)
        shutil.rmtree(parted / "checkpoints" / "step-00000004")
        (parted / "summary.json").unlink()
        modality = case.small(*words, f"out={parted}", "resume=auto")
        _open_again(case, modality.config)
        _fit(Trainer(modality, parted, quiet))
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


def _fit(trainer: Trainer) -> None:
    """A run answers Ctrl-C by saving; what was asked for here is to stop."""
    if trainer.fit() != 0:
        raise KeyboardInterrupt


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
        if apart(one, two) > TOLERANCE:
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
            with warnings.catch_warnings():
                if compile_it:
                    warnings.simplefilter(
                        "ignore"
                    )  # where warnings are errors, the tracer's own would be the modality's
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
        if name not in gradient2 or apart(gradient[name], gradient2[name]) > 1e-2:
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
